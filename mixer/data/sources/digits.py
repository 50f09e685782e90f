"""Handwritten digits as a TFDS builder: real scans that need no download.

digits.npz holds 1,797 images of 8 x 8 pixels, values 0 to 16, in 10 classes: the test part of
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49), licensed CC BY 4.0 and unchanged, in the order of
scikit-learn's `load_digits`. The split is fixed: the first 360 of a seeded permutation are "test",
the next 180 "validation", the other 1,257 "train".
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

SPLIT_SEED = 123
SCANS = Path(__file__).with_name("digits.npz")


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set "digits"."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS reads it so)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Handwritten digits, 8 x 8 pixels, from the UCI repository.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        with np.load(SCANS, allow_pickle=False) as scans:
            images, labels = scans["images"], scans["labels"]
        order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
        splits = {"train": order[540:], "validation": order[360:540], "test": order[:360]}
        return {
            name: self._generate_examples(images, labels, rows) for name, rows in splits.items()
        }

    def _generate_examples(self, images, labels, rows):
        for row in rows:
            grey = np.round(images[row] * (255 / 16)).astype(np.uint8)  # values are 0 to 16
            image = np.repeat(grey[..., None], 3, axis=-1)
            yield int(row), {"image": image, "label": int(labels[row])}
