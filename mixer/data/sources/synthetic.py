"""Synthetic images: a learnable task that needs neither files nor TensorFlow.

Example i is its class's pattern (a coarse random picture) under noise, so that a loss that does not
fall is the fault of the training and not of the data.
"""

from collections.abc import Iterator

import numpy as np

from mixer.data import order

SPLITS = {"train": 2048, "validation": 256, "test": 256}
PATTERN_SIDE = 4


def make_images(ids: np.ndarray, labels: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Draws the images of examples `ids` (n,) with classes `labels` (n,): (n, H, W, 3) uint8."""
    height, width = image_size
    rows = np.arange(height) * PATTERN_SIDE // height
    columns = np.arange(width) * PATTERN_SIDE // width
    images = np.empty((len(ids), height, width, 3), np.uint8)
    for image, example, label in zip(images, ids, labels, strict=True):
        coarse = np.random.default_rng([0, int(label)]).integers(
            32, 224, (PATTERN_SIDE, PATTERN_SIDE, 3)
        )
        noise = np.random.default_rng([1, int(example)]).integers(-32, 32, (height, width, 3))
        image[:] = coarse[rows][:, columns] + noise
    return images


def split_ids(split: str) -> np.ndarray:
    """The numbers of a split's examples; no two splits share one."""
    names = list(SPLITS)
    start = sum(SPLITS[name] for name in names[: names.index(split)])
    return np.arange(start, start + SPLITS[split])


def labels(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """The classes (n,) int32 of examples `ids` (n,)."""
    return (ids % num_classes).astype(np.int32)


def _batch(ids: np.ndarray, num_classes: int, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    classes = labels(ids, num_classes)
    return {"image": make_images(ids, classes, image_size), "label": classes}


def train_batches(
    ids: np.ndarray,
    *,
    start_step: int,
    seed: int,
    num_classes: int,
    image_size: tuple[int, int],
    global_batch_size: int,
    process_index: int,
    process_count: int,
    num_readers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's part of batch `start_step` of `ids`, and of all that follow.

    `num_readers` makes no difference: the order is one permutation, whoever reads it.
    """
    part = order.process_slice(global_batch_size, process_index, process_count)
    step = start_step
    while True:
        _, example = order.batch_examples(
            step, seed=seed, num_examples=len(ids), global_batch_size=global_batch_size
        )
        yield _batch(ids[example[part]], num_classes, image_size)
        step += 1


def eval_batches(
    ids: np.ndarray,
    *,
    num_classes: int,
    image_size: tuple[int, int],
    batch_size: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields examples `ids`, in that order; the last batch may be short."""
    for start in range(0, len(ids), batch_size):
        yield _batch(ids[start : start + batch_size], num_classes, image_size)
