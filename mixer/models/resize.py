"""What architectures share where weights are resized for another image size.

`grow` is the paper's (supplement, fine-tuning at higher resolution): for sides K_h and K_w times as
large the image is cut into K_h x K_w tiles of the old size, and each tile is mixed by itself with
the old weights. Until training changes that, the mean of the grown model's pre-logits over a large
image is the mean of the old model's over its tiles.

`interpolate` is not the paper's. It takes any size, larger or smaller: the token MLP sees the new
tokens resampled to the old grid, and its output is resampled to the new one.

What either does to a leaf is the architecture's (`mixer/models/registry.py`). Sizes are (H, W) in
pixels, grids are (H / P, W / P) in tokens.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from mixer.errors import UserError


def growth_factors(old: tuple[int, int], new: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Returns how many tiles of size `old` an image of size `new` is cut into: (K_h, K_w).

    Raises:
      UserError: a side of `new` is no multiple of the old one, or of the patch; the message has the
        nearest sides that are.
    """
    if all(n % o == 0 and n >= o and n % patch_size == 0 for o, n in zip(old, new, strict=True)):
        return new[0] // old[0], new[1] // old[1]
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


def resampling(grid: tuple[int, int], new_grid: tuple[int, int]) -> list[np.ndarray]:
    """Returns the matrices (new side, old side) that resample rows and columns of a grid.

    The resampling is bilinear with half-pixel centres, antialiased where it shrinks, as images are
    resized; every row of a matrix sums to one.
    """
    return [
        np.asarray(jax.image.resize(np.eye(old, dtype=np.float32), (new, old), "bilinear"))
        for old, new in zip(grid, new_grid, strict=True)
    ]


def resample(
    array: np.ndarray, matrices: Sequence[np.ndarray], *, grid: tuple[int, int], axis: int
) -> np.ndarray:
    """Applies matrices for rows and columns to the tokens of `grid`, which lie along `axis`."""
    rows, columns = matrices
    tokens_first = np.moveaxis(array, axis, 0).astype(np.float32)
    field = tokens_first.reshape(*grid, -1)
    field = np.tensordot(rows, field, (1, 0))  # H', w, units
    field = np.tensordot(columns, field, (1, 1))  # W', H', units
    tokens_first = field.swapaxes(0, 1).reshape(math.prod(field.shape[:2]), *tokens_first.shape[1:])
    return np.ascontiguousarray(np.moveaxis(tokens_first, 0, axis), array.dtype)
