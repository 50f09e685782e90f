"""MLP-Mixer (Tolstikhin et al., 2021, arXiv 2105.01601), section 2 and figure 1.

Dimensions in the docstrings: N images, S tokens, C channels (`hidden_dim`), D_S (`tokens_mlp_dim`),
D_C (`channels_mlp_dim`), P (`patch_size`). Parameters bear the names of the released checkpoints.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mixer.errors import UserError, check_choice, check_number
from mixer.models import layers
from mixer.parallel.sharding import BATCH, constrain

# Paper, table 1.
_SIZES = {
    "S": dict(num_blocks=8, hidden_dim=512, tokens_mlp_dim=256, channels_mlp_dim=2048),
    "B": dict(num_blocks=12, hidden_dim=768, tokens_mlp_dim=384, channels_mlp_dim=3072),
    "L": dict(num_blocks=24, hidden_dim=1024, tokens_mlp_dim=512, channels_mlp_dim=4096),
    "H": dict(num_blocks=32, hidden_dim=1280, tokens_mlp_dim=640, channels_mlp_dim=5120),
}
VARIANTS = {
    name: dict(_SIZES[name[0]], patch_size=int(name[2:]))
    for name in ("S/32", "S/16", "S/8", "B/32", "B/16", "L/32", "L/16", "H/14")
}
MOST_BLOCKS = 1000  # each is traced and compiled; the deepest of the variants has 32
MOST_SIDE = 1 << 15  # pixels
GELUS = ("tanh", "erf")
DTYPES = ("float32", "bfloat16")
# What the backward pass finds in memory, beside the blocks' inputs; the rest it computes again.
REMAT = {
    "none": None,  # everything that it needs
    "dots": jax.checkpoint_policies.save_only_these_names("dense"),  # what the matmuls give
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _example_keys(key: jax.Array, example_index: jax.Array) -> jax.Array:
    """One key per example, from its place in the global batch: (N,) keys.

    A mask drawn from it depends neither on how the batch is laid out over devices nor on how it is
    cut for gradient accumulation.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, example_index)


def _drop(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Dropout with one key per example. x: (N, ...)."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Dense(nn.Module):
    """The parameters of an affine map from `shape[:-1]` to `shape[-1]`, as `nn.Dense` has them."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel and bias, float32."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), self.shape, jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[-1:], jnp.float32)


class Norm(nn.Module):
    """The parameters of a LayerNorm over `width`, as `nn.LayerNorm` has them."""

    width: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns scale and bias, float32."""
        of = ((self.width,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, *of)
        return scale, self.param("bias", nn.initializers.zeros, *of)


class MlpBlock(nn.Module):
    """Dense, GELU, Dense over one axis of (N, S, C). Paper, equation 1."""

    axis: int
    mlp_dim: int
    gelu: str
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array | None,
        norm: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Applies the MLP.

        Args:
          x: (N, S, C).
          keys: (N,), which draw the dropout masks; None leaves dropout out.
          norm: parameters of a LayerNorm of the same axis that comes before it.
        """
        dim = x.shape[self.axis]
        apply = layers.token_dense if self.axis == 1 else layers.dense
        first = apply if norm is None else layers.norm_dense
        affine = Dense((dim, self.mlp_dim), name="Dense_0")()
        x = checkpoint_name(first(x, *(norm or ()), *affine), "dense")
        x = constrain(x, BATCH, *(("tensor", None) if self.axis == 1 else (None, "tensor")))
        x = layers.gelu(x, self.gelu)
        if keys is not None:
            x = _drop(x, self.dropout, _fold(keys, 0))
        x = checkpoint_name(apply(x, *Dense((self.mlp_dim, dim), name="Dense_1")()), "dense")
        if keys is not None:
            x = _drop(x, self.dropout, _fold(keys, 1))
        return x


def _fold(keys: jax.Array, data: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each with its skip connection: (N, S, C) -> (N, S, C)."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: str
    dropout: float
    drop_path_rescale: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, keys: jax.Array | None, keep_prob: jax.Array | float | None
    ) -> jax.Array:
        """Applies the block.

        Args:
          x: (N, S, C).
          keys: (N,), of which all masks are drawn; None: no masks (evaluation).
          keep_prob: with which each branch of an example is kept; None: always.
        """

        def mlp(name: str, mlp_dim: int, branch: int, x: jax.Array, *norm: Any) -> jax.Array:
            branch_keys = None if keys is None or not self.dropout else _fold(keys, branch)
            block = MlpBlock(1 + branch, mlp_dim, self.gelu, self.dropout, name=name)
            return block(x, branch_keys, *norm)

        def drop_path(x: jax.Array, branch: int) -> jax.Array:
            if keys is None or keep_prob is None:
                return x
            draw = jax.vmap(lambda key: jax.random.bernoulli(key, keep_prob))
            keep = draw(_fold(keys, 2 + branch))[:, None, None].astype(x.dtype)
            return (
                x * keep / jnp.asarray(keep_prob, x.dtype) if self.drop_path_rescale else x * keep
            )

        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = mlp("token_mixing", self.tokens_mlp_dim, 0, y)
        x = constrain(x + drop_path(y, 0), BATCH, None, None)
        norm = Norm(x.shape[-1], name="LayerNorm_1")()
        y = mlp("channel_mixing", self.channels_mlp_dim, 1, x, norm)
        return constrain(x + drop_path(y, 1), BATCH, None, None)


class MlpMixer(nn.Module):
    """The whole network.

    Attributes:
      num_classes: width of the head; 0: there is none, and the pre-logits stand for the logits, as
        in the authors' code.
      patch_size: P, the side of a square patch in pixels.
      hidden_dim: C. num_blocks: L. tokens_mlp_dim: D_S. channels_mlp_dim: D_C.
      gelu: "tanh" (the authors' code) or "erf" (timm).
      stoch_depth: drop rate r of the last block; block i of L drops each of its two branches, per
        example, with probability i / max(L - 1, 1) * r.
      stoch_depth_rescale: False is the authors' code: a kept branch is left as it is, and
        evaluation scales nothing. True divides a kept branch by its probability, as timm does,
        whose Mixers drop with one rate in all blocks; here the rate grows either way.
      dropout: rate after each of the two layers of every MLP; kept values are rescaled.
      head_bias_init: first value of the head's bias (the authors' code starts the sigmoid loss at
        -6.9 with 1,000 classes and at -10 with 21,843). The head's kernel starts at zero.
      dtype: "float32" or "bfloat16" for the computation; parameters and logits are float32.
      remat: "none", "dots" or "full": what of a block the backward pass computes again, to save
        memory (Chen et al., 2016, arXiv 1604.06174). The numbers stay.
      scan_blocks: whether the blocks are one loop, compiled once, over their stacked parameters
        instead of so many copies. Names, parameters and numbers stay.
    """

    num_classes: int
    patch_size: int
    hidden_dim: int
    num_blocks: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: str = "tanh"
    stoch_depth: float = 0.0
    stoch_depth_rescale: bool = False
    dropout: float = 0.0
    head_bias_init: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan_blocks: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, example_index: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the logits and everything on the way to them.

        Args:
          images: (N, H, W, 3) float in [-1, 1]; H and W are multiples of P.
          train: whether to draw stochastic depth and dropout; then `apply` needs
            `rngs={"dropout": key}`.
          example_index: (N,) place of each image in the global batch, which its masks are drawn
            from; 0..N-1 where it is not given.

        Returns:
          `(logits, out)`: logits (N, num_classes) float32; out holds "stem" (N, H/P, W/P, C),
          "block_0" ... (N, S, C), "pre_logits" (N, C) and "logits".

        Raises:
          UserError: images of another form or of whole numbers, or the patch does not divide them.
            (SAME padding in the authors' code takes such an image and pads it without a word.)
        """
        dtype = jnp.dtype(self.dtype)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(f"images are {images.shape}; (N, H, W, 3) is taken, RGB last")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images are {images.dtype}; floats are taken, as a rule images / 127.5 - 1"
            )
        check_image_size(images.shape[1:3], self.patch_size)
        if example_index is None:
            example_index = jnp.arange(images.shape[0])
        masked = train and bool(self.stoch_depth or self.dropout)
        key = self.make_rng("dropout") if masked else None
        last = max(self.num_blocks - 1, 1)
        keep_probs = [1 - i / last * self.stoch_depth for i in range(self.num_blocks)]

        def block_keys(i: jax.Array | int) -> jax.Array | None:
            return _example_keys(jax.random.fold_in(key, i), example_index) if masked else None

        out = {}
        kernel, bias = Dense((self.patch_size, self.patch_size, 3, self.hidden_dim), name="stem")()
        x = layers.patches(images.astype(dtype), self.patch_size)
        x = out["stem"] = layers.dense(x, kernel.reshape(-1, self.hidden_dim), bias)
        n, rows, columns, _ = x.shape  # of no images, too
        x = constrain(x.reshape(n, rows * columns, self.hidden_dim), BATCH, None, None)
        fields = dict(
            tokens_mlp_dim=self.tokens_mlp_dim,
            channels_mlp_dim=self.channels_mlp_dim,
            gelu=self.gelu,
            dropout=self.dropout,
            drop_path_rescale=self.stoch_depth_rescale,
            dtype=dtype,
        )
        if self.scan_blocks and not self.is_initializing():
            block = MixerBlock(**fields, parent=None)
            params = [self.variables["params"][f"MixerBlock_{i}"] for i in range(self.num_blocks)]

            def apply_block(x: jax.Array, each: tuple) -> tuple[jax.Array, jax.Array]:
                params, i, keep_prob = each
                keep_prob = keep_prob if self.stoch_depth else None
                x = block.apply({"params": params}, x, block_keys(i), keep_prob)
                return x, x

            if self.remat != "none":
                # The loop itself keeps the compiler from undoing it.
                apply_block = jax.checkpoint(
                    apply_block, policy=REMAT[self.remat], prevent_cse=False
                )
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            numbers = jnp.arange(self.num_blocks)
            each = stacked, numbers, jnp.array(keep_probs, jnp.float32)
            x, outputs = jax.lax.scan(apply_block, x, each)
            out |= {f"block_{i}": outputs[i] for i in range(self.num_blocks)}
        else:
            block_class = MixerBlock
            if self.remat != "none":
                block_class = nn.remat(MixerBlock, policy=REMAT[self.remat])
            for i, keep_prob in enumerate(keep_probs):
                block = block_class(**fields, name=f"MixerBlock_{i}")
                x = block(x, block_keys(i), None if keep_prob == 1 else keep_prob)
                out[f"block_{i}"] = x
        x = nn.LayerNorm(dtype=dtype, name="pre_head_layer_norm")(x)
        x = out["pre_logits"] = jnp.mean(x, axis=1).astype(jnp.float32)
        if self.num_classes:
            x = nn.Dense(
                self.num_classes,
                kernel_init=nn.initializers.zeros,
                bias_init=nn.initializers.constant(self.head_bias_init),
                name="head",
            )(x)
        out["logits"] = x
        return x, out


def count_params(
    *,
    image_size: tuple[int, int],
    patch_size: int,
    hidden_dim: int,
    num_blocks: int,
    tokens_mlp_dim: int,
    channels_mlp_dim: int,
    num_classes: int,
) -> int:
    """Number of parameters for images of (H, W) pixels, without building the model."""
    c = hidden_dim
    s = (image_size[0] // patch_size) * (image_size[1] // patch_size)
    tokens = (2 * s + 1) * tokens_mlp_dim + s
    channels = (2 * c + 1) * channels_mlp_dim + c
    stem, norm, head = (3 * patch_size**2 + 1) * c, 2 * c, (c + 1) * num_classes
    return stem + num_blocks * (tokens + channels + 2 * norm) + norm + head


def check_image_size(size: tuple[int, int], patch_size: int) -> None:
    """Raises UserError where `patch_size` does not divide both sides of `size` (H, W)."""
    if max(size) > MOST_SIDE:
        raise UserError(f"image {size[0]} x {size[1]}: sides are expected up to {MOST_SIDE} pixels")
    for side in size:
        if side % patch_size or side < 1:
            low = side // patch_size * patch_size
            near = " or ".join(str(s) for s in (low, low + patch_size) if s > 0) or patch_size
            raise UserError(
                f"image {size[0]} x {size[1]}: the patch size {patch_size} does not divide {side}; "
                f"the nearest sides that work are {near}"
            )


def make_model(*, variant: str | None = None, num_classes: int, **fields) -> MlpMixer:
    """Builds a model from a variant's name, from explicit dimensions, or from both.

    Args:
      variant: one of `VARIANTS`, or None when every dimension is given.
      num_classes: width of the head.
      **fields: fields of `MlpMixer`; those that are not None replace the variant's.

    Raises:
      UserError: an unknown variant or field, a missing dimension or a value out of range.
    """
    known = [
        field.name for field in dataclasses.fields(MlpMixer) if field.name not in ("parent", "name")
    ]
    for name in fields:
        check_choice("field of the model", name, known)
    if variant is not None:
        check_choice("model.variant", variant, VARIANTS)
    given = {name: value for name, value in fields.items() if value is not None}
    fields = {**VARIANTS.get(variant, {}), **given}
    dimensions = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
    missing = [name for name in dimensions if name not in fields]
    if missing:
        raise UserError(f"the model needs a variant ({', '.join(VARIANTS)}) or {missing}")
    for name in ("num_classes", *dimensions):
        value = num_classes if name == "num_classes" else fields[name]
        most = MOST_BLOCKS if name == "num_blocks" else 2**31 - 1
        check_number(f"model.{name}", value, least=1, below=most + 1, whole=True)
    if not math.isfinite(fields.get("head_bias_init", 0)):
        raise UserError(f"model.head_bias_init is {fields['head_bias_init']}; it must be finite")
    for name in ("stoch_depth", "dropout"):
        check_number(f"model.{name}", fields.get(name, 0), below=1)
    for name, options in (("gelu", GELUS), ("dtype", DTYPES), ("remat", tuple(REMAT))):
        check_choice(f"model.{name}", fields.get(name, options[0]), options)
    return MlpMixer(num_classes=num_classes, **fields)
