"""Straightforward Flax implementations of the papers' formulations, as baselines.

In the Mixer, token mixing transposes, applies Dense layers, and transposes back (section 2 of the
paper, arXiv 2105.01601). The Vision Transformer (arXiv 2010.11929) uses Flax's attention. The stem
is a convolution, and the optimizer comes from optax. The parameter names are those of
`mixer.models`, so that the outputs of both can be compared.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Mlp(nn.Module):
    """Dense, GELU, Dense over the last axis."""

    hidden: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., D)."""
        width = x.shape[-1]
        x = nn.Dense(self.hidden, dtype=self.dtype)(x)
        x = nn.gelu(x, approximate=self.gelu == "tanh")
        return nn.Dense(width, dtype=self.dtype)(x)


def embed_patches(model: nn.Module, images: jax.Array, *, name: str) -> jax.Array:
    """Applies the stem of a model: (N, H, W, 3) uint8 -> (N, S, C)."""
    dtype, patch = jnp.dtype(model.dtype), (model.patch_size, model.patch_size)
    x = nn.Conv(model.hidden_dim, patch, patch, dtype=dtype, name=name)(images / 127.5 - 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])


class MixerBlock(nn.Module):
    """Token mixing and channel mixing, each added to its input."""

    tokens_hidden: int
    channels_hidden: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, S, C) -> (N, S, C)."""
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = jnp.swapaxes(y, 1, 2)
        y = Mlp(self.tokens_hidden, self.gelu, self.dtype, name="token_mixing")(y)
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + Mlp(self.channels_hidden, self.gelu, self.dtype, name="channel_mixing")(y)


class Mixer(nn.Module):
    """The network, with the fields of `mixer.models.mlp_mixer.MlpMixer`."""

    num_classes: int
    patch_size: int
    hidden_dim: int
    num_blocks: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: str
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """(N, H, W, 3) uint8 -> logits (N, num_classes) float32."""
        dtype = jnp.dtype(self.dtype)
        x = embed_patches(self, images, name="stem")
        for _ in range(self.num_blocks):
            x = MixerBlock(self.tokens_mlp_dim, self.channels_mlp_dim, self.gelu, dtype)(x)
        x = nn.LayerNorm(dtype=dtype, name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1)
        return nn.Dense(self.num_classes, name="head")(x.astype(jnp.float32))


class EncoderBlock(nn.Module):
    """Self-attention and an MLP, each added to its input."""

    num_heads: int
    mlp_dim: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, C) -> (N, T, C)."""
        y = nn.LayerNorm(dtype=self.dtype)(x)
        name = "MultiHeadDotProductAttention_0"
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name=name)(y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + Mlp(self.mlp_dim, self.gelu, self.dtype, name="MlpBlock_0")(y)


class Positions(nn.Module):
    """Adds learnt positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, C) -> (N, T, C)."""
        init = nn.initializers.normal(0.02)
        return x + self.param("pos_embedding", init, (1, *x.shape[1:])).astype(x.dtype)


class Encoder(nn.Module):
    """Positions, blocks and a LayerNorm."""

    num_blocks: int
    num_heads: int
    mlp_dim: int
    gelu: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, C) -> (N, T, C)."""
        x = Positions(name="posembed_input")(x)
        for i in range(self.num_blocks):
            name = f"encoderblock_{i}"
            x = EncoderBlock(self.num_heads, self.mlp_dim, self.gelu, self.dtype, name=name)(x)
        return nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)


class VisionTransformer(nn.Module):
    """The network with a class token, with the fields of `mixer.models.vit.VisionTransformer`."""

    num_classes: int
    patch_size: int
    hidden_dim: int
    num_blocks: int
    mlp_dim: int
    num_heads: int
    gelu: str
    dtype: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """(N, H, W, 3) uint8 -> logits (N, num_classes) float32."""
        dtype = jnp.dtype(self.dtype)
        x = embed_patches(self, images, name="embedding")
        token = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_dim)).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])), x], axis=1)
        fields = self.num_blocks, self.num_heads, self.mlp_dim, self.gelu, dtype
        x = Encoder(*fields, name="Transformer")(x)[:, 0]
        return nn.Dense(self.num_classes, name="head")(x.astype(jnp.float32))


MODULES = {"mixer": Mixer, "vit": VisionTransformer}  # by architecture


def make_train_step(model: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns `((params, opt_state), batch) -> ((params, opt_state), metrics)`, not compiled."""

    def train_step(state: tuple, batch: dict[str, jax.Array]) -> tuple[tuple, dict[str, jax.Array]]:
        params, opt_state = state

        def mean_loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, batch["image"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return jnp.mean(losses)

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    return train_step
