"""Synthetic images: a learnable task that needs neither files nor TensorFlow.

Example i is the pattern of its class (a coarse random image) plus noise, so that a loss that does
not decrease indicates a fault in training, not in the data.
"""

import numpy as np

SPLITS = {"train": 2048, "validation": 256, "test": 256}
PATTERN_SIDE = 4


def make_images(
    ids: np.ndarray, labels: np.ndarray, image_shape: tuple[int, int, int]
) -> np.ndarray:
    """Draws the images of examples `ids` (n,) with classes `labels` (n,), uint8.

    `image_shape` is (H, W, channels); the result is (n, H, W, channels).
    """
    height, width, channels = image_shape
    rows = np.arange(height) * PATTERN_SIDE // height
    columns = np.arange(width) * PATTERN_SIDE // width
    images = np.empty((len(ids), *image_shape), np.uint8)
    for image, example, label in zip(images, ids, labels, strict=True):
        coarse = np.random.default_rng([0, int(label)]).integers(
            32, 224, (PATTERN_SIDE, PATTERN_SIDE, channels)
        )
        noise = np.random.default_rng([1, int(example)]).integers(-32, 32, image_shape)
        image[:] = coarse[rows][:, columns] + noise
    return images


def split_ids(split: str) -> np.ndarray:
    """Returns the numbers of a split's examples; splits are disjoint."""
    names = list(SPLITS)
    start = sum(SPLITS[name] for name in names[: names.index(split)])
    return np.arange(start, start + SPLITS[split])


def labels(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the classes (n,) int32 of examples `ids` (n,)."""
    return (ids % num_classes).astype(np.int32)
