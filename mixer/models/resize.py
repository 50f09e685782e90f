"""Shared code of the architectures for resizing weights to another image size.

`grow` is the method of the paper (supplement, fine-tuning at higher resolution): an image whose
sides are K_h and K_w times as large is cut into K_h x K_w tiles of the old size, and each tile is
mixed separately with the old weights. Before training, the grown model's pre-logits for a large
image are the mean of the old model's pre-logits for its tiles.

`interpolate` is not from the paper. It accepts any size, larger or smaller: the token MLP receives
the new tokens resampled to the old grid, and its output is resampled to the new grid.

Each architecture defines how a leaf is resized (`mixer/models/registry.py`). Sizes are (H, W) in
pixels; grids are (H / P, W / P) in tokens.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from mixer import sizes
from mixer.errors import UserError


def growth_factors(
    old: tuple[int, int], new: tuple[int, int], patch_size: sizes.Size
) -> tuple[int, int]:
    """Returns into how many tiles of size `old` an image of size `new` is cut: (K_h, K_w).

    Raises:
      UserError: a side of `new` is not a multiple of the old side, or of the patch size; the
        message lists the nearest valid sides.
    """
    sides = zip(old, new, sizes.pair(patch_size), strict=True)
    if all(n % o == 0 and n >= o and n % patch == 0 for o, n, patch in sides):
        return new[0] // old[0], new[1] // old[1]
    near = " x ".join(_near(o, n) for o, n in zip(old, new, strict=True))
    raise UserError(
        f"weights for {old[0]} x {old[1]} images cannot be grown to {new[0]} x {new[1]}: each side "
        f"must be an integer multiple of the old side; the nearest are {near}; interpolation, "
        "which is not from the paper, accepts every multiple of the patch size "
        f"{sizes.text(patch_size)} (docs/weights.md)"
    )


def _near(old: int, new: int) -> str:
    """Returns the multiples of `old` nearest to `new`, such as "448 or 672"."""
    low = new // old * old
    if low == new:
        return str(new)
    return f"({low} or {low + old})" if low else str(old)


def resampling(grid: tuple[int, int], new_grid: tuple[int, int]) -> list[np.ndarray]:
    """Returns the matrices (new side, old side) that resample rows and columns of a grid.

    The resampling is bilinear with half-pixel centres, and antialiased when it shrinks, like the
    resizing of images. Every row of a matrix sums to one.
    """
    return [
        np.asarray(jax.image.resize(np.eye(old, dtype=np.float32), (new, old), "bilinear"))
        for old, new in zip(grid, new_grid, strict=True)
    ]


def resample(
    array: np.ndarray, matrices: Sequence[np.ndarray], *, grid: tuple[int, int], axis: int
) -> np.ndarray:
    """Applies the matrices for rows and columns to the tokens of `grid`, which are on `axis`."""
    rows, columns = matrices
    tokens_first = np.moveaxis(array, axis, 0).astype(np.float32)
    field = tokens_first.reshape(*grid, -1)
    field = np.tensordot(rows, field, (1, 0))  # H', w, units
    field = np.tensordot(columns, field, (1, 1))  # W', H', units
    tokens_first = field.swapaxes(0, 1).reshape(math.prod(field.shape[:2]), *tokens_first.shape[1:])
    return np.ascontiguousarray(np.moveaxis(tokens_first, 0, axis), array.dtype)
