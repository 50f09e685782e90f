"""What architectures share: their first layer, parameters of layers, masks, the chain of blocks."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixer.errors import UserError
from mixer.models import layers

GELUS = ("tanh", "erf")
DTYPES = ("float32", "bfloat16")
# What the backward pass finds in memory beside the blocks' inputs; it computes the rest again.
REMAT = {
    "none": None,  # everything that it needs
    "dots": jax.checkpoint_policies.save_only_these_names("dense"),  # the outputs of matmuls
    "full": jax.checkpoint_policies.nothing_saveable,
}
MOST_BLOCKS = 1000  # each is traced and compiled; the deepest of the variants has 32
MOST_SIDE = 1 << 15  # pixels


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


def check_images(images: jax.Array, patch_size: int) -> None:
    """Raises UserError unless `images` are floats (N, H, W, 3) that the patch size divides.

    (The authors' code pads images that it does not divide, without a word.)
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images have the shape {images.shape}; expected (N, H, W, 3), RGB last")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images are {images.dtype}; expected floats, such as images / 127.5 - 1")
    check_image_size(images.shape[1:3], patch_size)


def count_blocks(names: Iterable[str]) -> int:
    """Returns the largest number of a block in names of any layout, plus 1.

    A file has more arrays than blocks, so that numbers beyond the number of its names do not count:
    the size of a file bounds what is made of a number in it.
    """
    names = list(names)
    numbers = re.findall(r"(?:[bB]lock_|blocks\.)([0-9]{1,9})(?![0-9])", " ".join(names))
    return max((int(n) + 1 for n in numbers if int(n) < len(names)), default=0)


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
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)


def patch_embedding(
    images: jax.Array, patch_size: int, hidden_dim: int, dtype: jnp.dtype, *, name: str
) -> jax.Array:
    """The per-patch fully-connected layer: images (N, H, W, 3) to tokens (N, H/P, W/P, C)."""
    kernel, bias = Dense((patch_size, patch_size, 3, hidden_dim), name=name)()
    pixels = layers.patches(images.astype(dtype), patch_size)
    return layers.dense(pixels, kernel.reshape(-1, hidden_dim), bias)


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
    """Applies a model's blocks, one after the other.

    Each block is called as `block(x, keys, keep_prob)` with one key per example (N,), from which it
    draws its masks, or None; and the probability that it keeps a branch, or None where that is 1.
    An example's keys follow from its place in the global batch: a mask depends neither on the mesh
    nor on how the batch is cut for gradient accumulation.

    Args:
      model: whose blocks they are; its fields num_blocks, stoch_depth, remat and scan_blocks apply.
      block_class: of each block.
      fields: of each block.
      x: (N, S, C).
      name: of a block's parameters, such as "MixerBlock_{}".
      key: of all masks; None: no masks (evaluation).
      example_index: (N,), place of each example in the global batch.

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
    """As `apply_blocks`, in one loop that is compiled once, over stacked parameters."""

    def apply_block(x: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        params, i, keep_prob = inputs
        keep_prob = keep_prob if model.stoch_depth else None
        x = block.apply({"params": params}, x, example_keys(i), keep_prob)
        return x, x

    if model.remat != "none":
        # The loop keeps the compiler from undoing remat.
        apply_block = jax.checkpoint(apply_block, policy=REMAT[model.remat], prevent_cse=False)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    numbers = jnp.arange(model.num_blocks)
    x, outputs = jax.lax.scan(
        apply_block, x, (stacked, numbers, jnp.array(keep_probs, jnp.float32))
    )
    return x, [outputs[i] for i in range(model.num_blocks)]
