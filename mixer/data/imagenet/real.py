"""ImageNet-ReaL: multiple labels for each image of ImageNet's validation set.

Beyer et al., 2020, arXiv 2006.07159. The labels are those of the public package timm (Apache-2.0),
`imagenet_real_labels.json`. `imagenet_real.xz` holds the number of labels of each image in file
order as a byte, then the high bytes of all labels, then their low bytes.
"""

import functools
import lzma
import re
from pathlib import Path

import numpy as np

NUM_IMAGES = 50_000
_FILE_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.", re.IGNORECASE)


@functools.cache
def labels() -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels of all images, and the index of each image's first label.

    Returns:
      (m,) int32 classes of ImageNet-1k, and (50001,) int64: image k, from 0 in file order, has
      labels[starts[k] : starts[k + 1]]. 3,163 images have none, as the annotators did not agree.
    """
    data = np.frombuffer(
        lzma.decompress(Path(__file__).with_name("imagenet_real.xz").read_bytes()), np.uint8
    )
    counts = data[:NUM_IMAGES]
    high, low = np.split(data[NUM_IMAGES:].astype(np.int32), 2)
    return high * 256 + low, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def image_labels(image: int) -> list[int]:
    """Returns the labels of an image, which is numbered from 0 in file order."""
    values, starts = labels()
    return values[starts[image] : starts[image + 1]].tolist()


def image_number(file_name: str) -> int | None:
    """Returns the number (from 0) of an image named "ILSVRC2012_val_00000001.JPEG", else None."""
    match = _FILE_NAME.search(file_name)
    number = int(match[1]) - 1 if match else -1
    return number if 0 <= number < NUM_IMAGES else None
