"""Fixed permutations of an image's pixels (the paper's section on input permutations).

An order (H W,) int64 gives, for each pixel of the new image in row-major order, the index of a
pixel of the old image. It depends only on the sizes and a seed, on every machine and version: NumPy
guarantees that for the integers of PCG64, but not for `Generator.permutation`.
"""

import numpy as np

from mixer import sizes

KINDS = ("patches", "pixels")


def shuffled(count: int, *, seed: int, stream: int = 0, share: float = 1.0) -> np.ndarray:
    """Returns a permutation (count,) of 0 to count - 1.

    Args:
      count: number of elements.
      seed: seed of the permutation.
      stream: permutations of the same seed and different streams are independent.
      share: share of the elements that are permuted; the seed selects them, and the others stay in
        place. The elements of a smaller share are a subset of those of a larger share.
    """
    keys = np.random.PCG64([seed, stream]).random_raw(count)
    chosen = np.argsort(keys, kind="stable")[: round(share * count)]
    order = np.arange(count)
    order[np.sort(chosen)] = chosen
    return order


def pixel_order(image_size: tuple[int, int], *, seed: int, share: float = 1.0) -> np.ndarray:
    """Returns the order (H W,) that permutes a share of all pixels."""
    height, width = image_size
    return shuffled(height * width, seed=seed, share=share)


def patch_order(
    image_size: tuple[int, int],
    patch_size: sizes.Size,
    *,
    seed: int,
    share: float = 1.0,
    shuffle_within: bool = True,
) -> np.ndarray:
    """Returns the order (H W,) that permutes a share of the P x P patches.

    With `shuffle_within`, one permutation is also applied to the pixels within every patch.

    Raises:
      ValueError: the patch size does not divide the image.
    """
    (height, width), (patch_height, patch_width) = image_size, sizes.pair(patch_size)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"patches of {sizes.text(patch_size)} pixels do not divide {height} x {width}"
        )
    rows, columns = height // patch_height, width // patch_width
    places = np.arange(height * width).reshape(rows, patch_height, columns, patch_width)
    places = places.transpose(0, 2, 1, 3).reshape(rows * columns, -1)  # (S, P^2)
    moved = places[shuffled(rows * columns, seed=seed, share=share)]
    if shuffle_within:
        moved = moved[:, shuffled(patch_height * patch_width, seed=seed, stream=1)]
    order = np.empty(height * width, np.int64)
    order[places] = moved
    return order
