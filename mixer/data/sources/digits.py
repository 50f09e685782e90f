"""scikit-learn's handwritten digits as a TFDS builder: real scans that need no download.

1,797 images of 8 x 8 pixels in 10 classes (Alpaydin and Kaynak, 1998, UCI "Optical recognition of
handwritten digits", test part). The split is fixed: the first 360 of a seeded permutation are
"test", the next 180 "validation", the other 1,257 "train".
"""

import numpy as np
import tensorflow_datasets as tfds

SPLIT_SEED = 123


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set "digits"."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS reads it so)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Handwritten digits, 8 x 8 pixels, from scikit-learn.",
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
        from sklearn.datasets import load_digits

        scans = load_digits()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(scans.target))
        splits = {"train": order[540:], "validation": order[360:540], "test": order[:360]}
        return {name: self._generate_examples(scans, rows) for name, rows in splits.items()}

    def _generate_examples(self, scans, rows):
        for row in rows:
            grey = np.round(scans.images[row] * (255 / 16)).astype(np.uint8)  # values are 0 to 16
            image = np.repeat(grey[..., None], 3, axis=-1)
            yield int(row), {"image": image, "label": int(scans.target[row])}
