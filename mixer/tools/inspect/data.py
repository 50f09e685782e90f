"""Opens the split that `mixer.tools.inspect` evaluates, and reads its images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mixer.data import splits
from mixer.data.preprocessing.spec import pixel_range
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.runs import data as run_data
from mixer.tools.predict import prediction
from mixer.weights.load import Loaded


def open_split(
    config: Any,
    loaded: Loaded,
    split_name: str | None,
    data_dir: str | None,
    data_record: dict[str, Any] | None,
) -> Split:
    """Opens the split to evaluate: of a run's config, or of a folder if `config` is None.

    Args:
      config: config of the run; None for weights.
      loaded: the weights.
      split_name: name of the split; None: the test split, or the only split of a folder.
      data_dir: data directory that replaces that of the config; for weights, the folder.
      data_record: the entry "splits" of the run's data.json.

    Raises:
      UserError: the split or its data does not exist, or does not fit the weights.
    """
    if config is not None:
        if data_dir is not None:
            config.dataset.data_dir = data_dir
        names = tuple(loaded.card.class_names)
        for name in (split_name,) if split_name else ("test", "val"):
            split = run_data.open_own_split(config, name, names, data_record)
            if split is not None:
                return split
        keys = (
            f"dataset.{split_name}_split"
            if split_name
            else "dataset.test_split and dataset.val_split"
        )
        raise UserError(f"{keys}: empty in the config; expected a split")
    if data_dir is None:
        raise UserError("--data_dir is missing; expected a folder of images")
    if loaded.card.preprocess is None:
        raise UserError(f"{loaded.card.source} does not specify its preprocessing")
    dataset = ConfigDict(
        dict(name="folder", data_dir=data_dir, label_file="", label_key="", exclude="")
        | dict(class_order="sorted", shuffle_group_size=1)
    )
    if split_name is None:
        names = splits.split_names(dataset)
        split_name = names[0] if len(names) == 1 else "test"
    split = splits.open_split(
        dataset,
        split_name,
        loaded.card.preprocess,
        image_size=loaded.card.image_size,
        channels=loaded.card.in_channels,
        num_classes=loaded.card.num_classes or None,
        class_names=prediction.names_of(loaded.card),
    )
    if loaded.card.num_classes not in (0, len(split.class_names)):
        raise UserError(
            f"{split.name} has {len(split.class_names):,} classes; expected "
            f"{loaded.card.num_classes:,}, as in {loaded.card.source}"
        )
    return split


def read_images(split: Split, indices: Sequence[int]) -> list[np.ndarray]:
    """Reads the preprocessed images (H, W, channels) at the given indices of a split."""
    images = []
    for index in map(int, indices):
        batch = next(split.sequential_batches(start=index, stop=index + 1, batch_size=1))
        images.append(batch["image"][0])
    return images


def read_first(split: Split, count: int) -> np.ndarray:
    """Reads the first images (n, H, W, channels) of a split, whose order mixes the classes."""
    stop = min(count, split.num_examples)
    batches = split.sequential_batches(start=0, stop=stop, batch_size=stop)
    return next(batches)["image"]


def as_pixels(images: np.ndarray, preprocess: str | None) -> np.ndarray:
    """Converts RGB or grey images to RGB pixels, uint8, including floats from `value_range`."""
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    if images.dtype == np.uint8:
        return images
    low, high = pixel_range(preprocess)
    pixels = (np.asarray(images, np.float32) - low) / (high - low) * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
