"""Modules that architectures share: patch embedding, layer parameters, masks, chain of blocks."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mixer import sizes
from mixer.errors import UserError
from mixer.models import layers
from mixer.parallel.sharding import BATCH, constrain
from mixer.sizes import Size

GELUS = ("tanh", "erf")
DTYPES = ("float32", "bfloat16")
# Activations that are stored for the backward pass, besides the blocks' inputs.
REMAT = {
    "none": None,  # all of them
    "dots": jax.checkpoint_policies.save_only_these_names("dense"),  # the outputs of matmuls
    "full": jax.checkpoint_policies.nothing_saveable,
}
MAX_BLOCKS = 1000  # each block is traced and compiled; the deepest variant has 32
MAX_SIDE = 1 << 15  # pixels


def check_image_size(size: tuple[int, int], patch_size: Size) -> None:
    """Raises UserError unless the patch size divides `size` (H, W)."""
    if max(size) > MAX_SIDE:
        raise UserError(f"image {size[0]} x {size[1]}; expected sides of at most {MAX_SIDE} pixels")
    for side, patch in zip(size, sizes.pair(patch_size), strict=True):
        if side % patch or side < 1:
            low = side // patch * patch
            near = " or ".join(str(s) for s in (low, low + patch) if s > 0) or patch
            raise UserError(
                f"image {size[0]} x {size[1]}: the patch size {sizes.text(patch_size)} does not "
                f"divide {side}; the nearest sides that work are {near}"
            )


def patch_grid(image_size: tuple[int, int], patch_size: Size) -> tuple[int, int]:
    """Returns the number of patches along each side of an image, (H / P, W / P)."""
    (height, width), (patch_height, patch_width) = image_size, sizes.pair(patch_size)
    return height // patch_height, width // patch_width


def check_images(images: jax.Array, patch_size: Size, in_channels: int) -> None:
    """Raises UserError unless `images` are floats (N, H, W, channels) that the patch size divides.

    The authors' code silently pads images that the patch size does not divide.
    """
    if images.ndim != 4 or images.shape[-1] != in_channels:
        channels = "RGB" if in_channels == sizes.RGB_CHANNELS else f"{in_channels} channel(s)"
        raise UserError(
            f"images have the shape {images.shape}; expected (N, H, W, {in_channels}), with "
            f"{channels} in the last dimension"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images are {images.dtype}; expected floats, such as images / 127.5 - 1")
    check_image_size(images.shape[1:3], patch_size)


def timm_channels(in_channels: int) -> dict[str, int]:
    """Returns the argument of timm's classes for the number of channels; timm's default is RGB."""
    return {} if in_channels == sizes.RGB_CHANNELS else {"in_chans": in_channels}


def count_blocks(names: Iterable[str]) -> int:
    """Returns the largest number of a block in names of any layout, plus 1.

    A file has more arrays than blocks, so larger block numbers than the number of names are
    ignored. A damaged name therefore cannot cause a huge allocation.
    """
    names = list(names)
    numbers = re.findall(r"(?:[bB]lock_|blocks\.)([0-9]{1,9})(?![0-9])", " ".join(names))
    return max((int(n) + 1 for n in numbers if int(n) < len(names)), default=0)


class Dense(nn.Module):
    """The parameters of an affine map from `shape[:-1]` to `shape[-1]`, as in `nn.Dense`.

    With `groups` above 1, they are those of as many independent maps, stacked in a leading axis.
    """

    shape: tuple[int, ...]
    groups: int = 1
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel and bias, float32."""

        def draw(key: jax.Array, init: Callable, shape: tuple[int, ...]) -> jax.Array:
            if self.groups == 1:
                return init(key, shape, jnp.float32)
            keys = jax.random.split(key, self.groups)
            return jax.vmap(lambda key: init(key, shape, jnp.float32))(keys)

        kernel = self.param("kernel", draw, self.kernel_init, self.shape)
        return kernel, self.param("bias", draw, self.bias_init, self.shape[-1:])


class Norm(nn.Module):
    """The parameters of a LayerNorm over `width`, as in `nn.LayerNorm`."""

    width: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns scale and bias, float32."""
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)


def patch_embedding(
    images: jax.Array, patch_size: Size, hidden_dim: int, dtype: jnp.dtype, *, name: str
) -> jax.Array:
    """Applies the per-patch fully-connected layer: images (N, H, W, 3) to (N, H/P, W/P, C).

    The kernel has the channels of the images: (P, P, 3, C) for RGB.
    """
    shape = (*sizes.pair(patch_size), images.shape[-1], hidden_dim)
    kernel, bias = Dense(shape, name=name)()
    pixels = layers.patches(images.astype(dtype), patch_size)
    return layers.dense(pixels, kernel.reshape(-1, hidden_dim), bias)


def head(x: jax.Array, num_classes: int, bias_init: float) -> jax.Array:
    """Applies the classifier, whose kernel starts at zero: (N, C) to (N, num_classes).

    Without classes there is no head, and x is returned.
    """
    if not num_classes:
        return x
    zeros, constant = nn.initializers.zeros, nn.initializers.constant(bias_init)
    return nn.Dense(num_classes, kernel_init=zeros, bias_init=constant, name="head")(x)


def fold(keys: jax.Array, data: int) -> jax.Array:
    """Folds `data` into each of the keys (N,)."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Drops values of x (N, ...) at `rate`, with one key per example; scales the kept ones."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def drop_path(
    x: jax.Array, keep_prob: jax.Array | float, keys: jax.Array, *, rescale: bool
) -> jax.Array:
    """Keeps the branch x (N, S, C) of an example with probability `keep_prob`, else zeroes it.

    With `rescale`, a kept branch is divided by its probability.
    """
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, keep_prob))
    keep = draw(keys)[:, None, None].astype(x.dtype)
    return x * keep / jnp.asarray(keep_prob, x.dtype) if rescale else x * keep


class MlpBlock(nn.Module):
    """Dense, GELU, Dense over one axis of (N, S, C).

    Paper, equation 1. Vision Transformer (arXiv 2010.11929), section 3.1.
    """

    axis: int
    mlp_dim: int
    gelu: str
    dropout: float
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros

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
          keys: (N,) random keys for the dropout masks; None: no dropout.
          norm: scale and bias of a preceding LayerNorm over the same axis; None: no LayerNorm.
        """
        dim = x.shape[self.axis]
        init = dict(kernel_init=self.kernel_init, bias_init=self.bias_init)
        apply = layers.token_dense if self.axis == 1 else layers.dense
        first = apply if norm is None else layers.norm_dense
        affine = Dense((dim, self.mlp_dim), **init, name="Dense_0")()
        x = checkpoint_name(first(x, *(norm or ()), *affine), "dense")
        x = constrain(x, BATCH, *(("tensor", None) if self.axis == 1 else (None, "tensor")))
        x = layers.gelu(x, self.gelu)
        if keys is not None:
            x = dropout(x, self.dropout, fold(keys, 0))
        affine = Dense((self.mlp_dim, dim), **init, name="Dense_1")()
        x = checkpoint_name(apply(x, *affine), "dense")
        if keys is not None:
            x = dropout(x, self.dropout, fold(keys, 1))
        return x


def dropout_keys(keys: jax.Array | None, branch: int, rate: float) -> jax.Array | None:
    """Returns the keys (N,) for the dropout masks of a block's branch; None: no dropout."""
    return None if keys is None or not rate else fold(keys, branch)


def drop_branch(
    y: jax.Array,
    keys: jax.Array | None,
    branch: int,
    keep_prob: jax.Array | float | None,
    *,
    rescale: bool,
) -> jax.Array:
    """Applies `drop_path` to a block's branch; without keys or a probability, returns `y`."""
    if keys is None or keep_prob is None:
        return y
    return drop_path(y, keep_prob, fold(keys, 2 + branch), rescale=rescale)


def apply_blocks(
    model: nn.Module,
    block_class: type[nn.Module],
    fields: dict[str, Any],
    x: jax.Array,
    *,
    name: str,
    key: jax.Array | None,
    example_index: jax.Array,
) -> tuple[jax.Array, list[jax.Array]]:
    """Applies a model's blocks in sequence.

    Each block is called as `block(x, keys, keep_prob)`. `keys` (N,) are random keys for the masks
    of each example, or None. `keep_prob` is the probability that a branch is kept, or None if it is
    1. An example's keys depend only on its position in the global batch, not on the mesh or on the
    microbatches of gradient accumulation.

    Args:
      model: the model, with the fields num_blocks, stoch_depth, remat and scan_blocks.
      block_class: class of the blocks.
      fields: fields of each block.
      x: (N, S, C).
      name: pattern of the name of a block's parameters, such as "MixerBlock_{}".
      key: random key for all masks; None: no masks (evaluation).
      example_index: (N,), position of each example in the global batch.

    Returns:
      The output of the last block, and the list of every block's output.
    """
    last = max(model.num_blocks - 1, 1)
    keep_probs = [1 - i / last * model.stoch_depth for i in range(model.num_blocks)]

    def example_keys(i: jax.Array | int) -> jax.Array | None:
        if key is None:
            return None
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, i), example_index)

    if model.scan_blocks and not model.is_initializing():
        block = block_class(**fields, parent=None)
        params = [model.variables["params"][name.format(i)] for i in range(model.num_blocks)]
        return _scan_blocks(model, block, params, x, keep_probs, example_keys)
    if model.remat != "none":
        block_class = nn.remat(block_class, policy=REMAT[model.remat])
    outputs = []
    for i, keep_prob in enumerate(keep_probs):
        block = block_class(**fields, name=name.format(i))
        x = block(x, example_keys(i), None if keep_prob == 1 else keep_prob)
        outputs.append(x)
    return x, outputs


def _scan_blocks(
    model: nn.Module,
    block: nn.Module,
    params: Sequence[Any],
    x: jax.Array,
    keep_probs: Sequence[float],
    example_keys: Callable[[jax.Array], jax.Array | None],
) -> tuple[jax.Array, list[jax.Array]]:
    """Applies the blocks in one loop over stacked parameters, which is compiled once."""

    def apply_block(x: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        params, i, keep_prob = inputs
        keep_prob = keep_prob if model.stoch_depth else None
        x = block.apply({"params": params}, x, example_keys(i), keep_prob)
        return x, x

    if model.remat != "none":
        # Inside a loop the compiler cannot undo remat, so `prevent_cse` is unnecessary.
        apply_block = jax.checkpoint(apply_block, policy=REMAT[model.remat], prevent_cse=False)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    numbers = jnp.arange(model.num_blocks)
    x, outputs = jax.lax.scan(
        apply_block, x, (stacked, numbers, jnp.array(keep_probs, jnp.float32))
    )
    return x, [outputs[i] for i in range(model.num_blocks)]
