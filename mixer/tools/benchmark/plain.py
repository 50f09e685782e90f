"""A straightforward Flax implementation of the paper's formulation, as a baseline.

Token mixing transposes, applies Dense layers, and transposes back (section 2 of the paper, arXiv
2105.01601); the stem is a convolution, and the optimizer comes from optax. The parameter names are
those of `mixer.models.mlp_mixer`, so that the outputs of both can be compared.
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
        x = images / 127.5 - 1
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.hidden_dim, patch, patch, dtype=dtype, name="stem")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(self.num_blocks):
            x = MixerBlock(self.tokens_mlp_dim, self.channels_mlp_dim, self.gelu, dtype)(x)
        x = nn.LayerNorm(dtype=dtype, name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1)
        return nn.Dense(self.num_classes, name="head")(x.astype(jnp.float32))


def make_train_step(model: Mixer, tx: optax.GradientTransformation) -> Callable[..., Any]:
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
