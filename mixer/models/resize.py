"""Weights for another image size. Only token mixing depends on it: D_S and S are its widths.

`grow` is the paper's (supplement, fine-tuning at higher resolution): for sides K_h and K_w times as
large the image is cut into K_h x K_w tiles of the old size, and each tile is mixed by itself with
the old weights. Until training changes that, the mean of the grown model's pre-logits over a large
image is the mean of the old model's over its tiles.

`interpolate` is not the paper's. It takes any size, larger or smaller: the token MLP sees the new
tokens resampled to the old grid, and what it returns is resampled to the new one.

Both work leaf by leaf, by published names, on NumPy arrays. Sizes are (H, W) in pixels, grids are
(H / P, W / P) in tokens; tokens are row-major, S = H W / P^2.
"""

import math

import jax
import numpy as np

from mixer.errors import UserError


def factors(old: tuple[int, int], new: tuple[int, int], patch_size: int) -> tuple[int, int] | None:
    """How many tiles of size `old` an image of size `new` is cut into: (K_h, K_w).

    None where a side of `new` is no multiple of the old one, or of the patch.
    """
    if any(n < o or n % o or n % patch_size for o, n in zip(old, new, strict=True)):
        return None
    return new[0] // old[0], new[1] // old[1]


def check(old: tuple[int, int], new: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """As `factors`, but a size that weights cannot be grown to raises.

    Raises:
      UserError: with the nearest sides that work.
    """
    found = factors(old, new, patch_size)
    if found is not None:
        return found
    near = " x ".join(_near(o, n) for o, n in zip(old, new, strict=True))
    raise UserError(
        f"weights for {old[0]} x {old[1]} images cannot be grown to {new[0]} x {new[1]}: each side "
        f"has to be a whole multiple of theirs, and the nearest are {near}; interpolation, which "
        f"is not the paper's, takes every multiple of the patch size {patch_size} (docs/weights.md)"
    )


def _near(old: int, new: int) -> str:
    """The multiples of `old` next to `new`, such as "448 or 672"."""
    low = new // old * old
    if low == new:
        return str(new)
    return f"({low} or {low + old})" if low else str(old)


def _role(name: str) -> str | None:
    """Such as "Dense_0/kernel" for a leaf of token mixing, None for any other."""
    block, _, role = name.partition("/token_mixing/")
    return role if block.rpartition("/")[2].startswith("MixerBlock_") and role else None


def grown_shape(name: str, shape: tuple[int, ...], factors: tuple[int, int]) -> tuple[int, ...]:
    """The shape that `grow` gives a leaf of shape `shape`."""
    if _role(name) is None:
        return tuple(shape)
    return tuple(side * math.prod(factors) for side in shape)


def grow(
    name: str, array: np.ndarray, *, grid: tuple[int, int], factors: tuple[int, int]
) -> np.ndarray:
    """One leaf of a model for images `factors` times as large.

    Kernels are block-diagonal with K_h K_w copies of the old one, biases are repeated; whatever
    runs over tokens is brought from the order of the tiles into row-major order. dtype and bits
    stay; the result is the only memory that is taken.

    Args:
      name: as published, "MixerBlock_0/token_mixing/Dense_0/kernel".
      array: the leaf. One that is not token mixing's is returned as it is.
      grid: (H / P, W / P) of the weights.
      factors: (K_h, K_w), as `check` returns them.
    """
    role = _role(name)
    if role is None or factors == (1, 1):
        return array
    k_h, k_w = factors
    h, w = grid
    if role == "Dense_0/bias":  # D_S
        return np.tile(array, k_h * k_w)
    if role == "Dense_1/bias":  # S
        return np.tile(array.reshape(h, w), factors).reshape(-1)
    grown = np.zeros(grown_shape(name, array.shape, factors), array.dtype)
    # A large image's token is (tile's row, row in it, tile's column, column in it); a hidden unit
    # is (tile, the old unit).
    if role == "Dense_0/kernel":  # S, D_S
        blocks = grown.reshape(k_h, h, k_w, w, k_h * k_w, -1).transpose(0, 2, 4, 1, 3, 5)
        block = array.reshape(h, w, -1)
    else:  # D_S, S
        blocks = grown.reshape(k_h * k_w, -1, k_h, h, k_w, w).transpose(2, 4, 0, 1, 3, 5)
        block = array.reshape(-1, h, w)
    for row in range(k_h):
        for column in range(k_w):
            blocks[row, column, row * k_w + column] = block
    return grown


def interpolated_shape(
    name: str, shape: tuple[int, ...], grid: tuple[int, int], new_grid: tuple[int, int]
) -> tuple[int, ...]:
    """The shape that `interpolate` gives a leaf of shape `shape`."""
    role = _role(name)
    if role is None or role == "Dense_0/bias":
        return tuple(shape)
    axis = _token_axis(role)
    return (*shape[:axis], math.prod(new_grid), *shape[axis + 1 :])


def _token_axis(role: str) -> int:
    return 1 if role == "Dense_1/kernel" else 0


def interpolate(
    name: str, array: np.ndarray, *, grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """One leaf of a model for images of another size, D_S unchanged. Not the paper's.

    With R the bilinear resampling of one grid to another (half-pixel centres, antialiased where it
    shrinks, as images are resized), W2' = R(old to new) W2 and b2 likewise, and
    W1' = R(new to old)^T W1: the hidden units are those of the old weights on the resampled tokens.
    The transpose is the bilinear enlargement of W1 times S / S', but exact at the borders: tokens
    that are all alike give the same hidden units as before, and outputs that were alike stay so.

    Args:
      name: as published.
      array: the leaf. One that does not depend on the number of tokens is returned as it is.
      grid: (H / P, W / P) of the weights.
      new_grid: that of the images to come.
    """
    role = _role(name)
    if role is None or role == "Dense_0/bias" or grid == new_grid:
        return array
    if role == "Dense_0/kernel":
        rows, columns = (_bilinear(n, o).T for o, n in zip(grid, new_grid, strict=True))
    else:
        rows, columns = (_bilinear(o, n) for o, n in zip(grid, new_grid, strict=True))
    tokens_first = np.moveaxis(array, _token_axis(role), 0).astype(np.float32)
    field = tokens_first.reshape(*grid, -1)
    field = np.tensordot(rows, field, (1, 0))  # H', w, units
    field = np.tensordot(columns, field, (1, 1))  # W', H', units
    tokens_first = field.swapaxes(0, 1).reshape(math.prod(new_grid), *tokens_first.shape[1:])
    return np.ascontiguousarray(np.moveaxis(tokens_first, 0, _token_axis(role)), array.dtype)


def _bilinear(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that resamples `old` points to `new`; every row sums to one."""
    return np.asarray(jax.image.resize(np.eye(old, dtype=np.float32), (new, old), "bilinear"))
