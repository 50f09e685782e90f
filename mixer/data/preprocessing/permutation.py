"""Fixed orders of an image's pixels: the paper's section on invariance to input permutations.

An order (H W,) int64 says of every place of the new image, row by row, which pixel of the old one
stands there. It is a function of the sizes and a seed alone, on every machine and version: NumPy
promises that for the integers of PCG64, and not for `Generator.permutation`.
"""

import numpy as np

KINDS = ("patches", "pixels")


def shuffled(count: int, *, seed: int, stream: int = 0, share: float = 1.0) -> np.ndarray:
    """A permutation (count,) of 0 to count - 1.

    Args:
      count: how many places.
      seed: of the permutation.
      stream: permutations of one seed and different streams have nothing to do with each other.
      share: of the places, chosen by the seed too, whose contents are shuffled among themselves;
        the others keep theirs. A smaller share's places are among a larger one's.
    """
    keys = np.random.PCG64([seed, stream]).random_raw(count)
    chosen = np.argsort(keys, kind="stable")[: round(share * count)]
    order = np.arange(count)
    order[np.sort(chosen)] = chosen
    return order


def pixel_order(image_size: tuple[int, int], *, seed: int, share: float = 1.0) -> np.ndarray:
    """The order (H W,) in which a share of all pixels is shuffled."""
    height, width = image_size
    return shuffled(height * width, seed=seed, share=share)


def patch_order(
    image_size: tuple[int, int],
    patch_size: int,
    *,
    seed: int,
    share: float = 1.0,
    within: bool = True,
) -> np.ndarray:
    """The order (H W,) in which a share of the P x P patches is shuffled.

    With `within`, the pixels of every patch are shuffled too, by one permutation for all of them.

    Raises:
      ValueError: the patch size does not divide the image.
    """
    height, width = image_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"patches of {patch_size} pixels do not divide {height} x {width}")
    rows, columns = height // patch_size, width // patch_size
    places = np.arange(height * width).reshape(rows, patch_size, columns, patch_size)
    places = places.transpose(0, 2, 1, 3).reshape(rows * columns, patch_size**2)  # (S, P^2)
    moved = places[shuffled(rows * columns, seed=seed, share=share)]
    if within:
        moved = moved[:, shuffled(patch_size**2, seed=seed, stream=1)]
    order = np.empty(height * width, np.int64)
    order[places] = moved
    return order
