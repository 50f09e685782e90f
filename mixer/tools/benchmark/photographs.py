"""Writes generated photographs, which the measurement `data` reads."""

import io
from pathlib import Path

import numpy as np

from mixer import sizes
from mixer.errors import UserError

COUNT = 1024  # 110 MB, which fits into the page cache, so that the disk is not measured
IMAGENET_BYTES = 110_000  # mean file size in ImageNet
IMAGENET_SIZE = (375, 500)  # (H, W), the most common size in ImageNet
SMALL = 64  # pixels; data sets up to this image size are stored at that size


def size_for(image_size: sizes.Size) -> tuple[int, int]:
    """Returns the size (H, W) of the photographs for a config's image size in pixels."""
    size = sizes.pair(image_size)
    return IMAGENET_SIZE if max(size) > SMALL else size


def write(directory: Path, size: tuple[int, int]) -> float:
    """Writes JPEGs of a size (H, W), which are random windows of scikit-learn's two photographs.

    For IMAGENET_SIZE, the JPEG quality is chosen to match the mean file size of ImageNet; for other
    sizes it is 95.

    Returns:
      Mean size in bytes.

    Raises:
      UserError: scikit-learn is not installed.
    """
    from PIL import Image

    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError(
            "scikit-learn, which contains the photographs, is missing; run pip install -e .[bench]"
        ) from None

    photographs = load_sample_images().images  # 427 x 640
    rng = np.random.default_rng(0)
    height, width = size

    def window(number: int) -> Image.Image:
        top, left = rng.integers(427 - height + 1), rng.integers(640 - width + 1)
        pixels = photographs[number % 2][top : top + height, left : left + width]
        return Image.fromarray(pixels[:, :: rng.choice((-1, 1))])

    quality = 95
    if size == IMAGENET_SIZE:
        sample = [window(number) for number in range(16)]
        quality = min(
            range(80, 100),
            key=lambda q: abs(np.mean([len(_encode(w, q)) for w in sample]) - IMAGENET_BYTES),
        )
    directory.mkdir(parents=True)
    num_bytes = 0
    for number in range(COUNT):
        content = _encode(window(number), quality)
        (directory / f"{number:04}.jpg").write_bytes(content)
        num_bytes += len(content)
    return num_bytes / COUNT


def _encode(picture, quality: int) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()
