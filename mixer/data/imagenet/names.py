"""Class lists of ImageNet: WordNet ids and names, in the label order of published weights.

Ids and names are those of the public package timm (Apache-2.0), files `imagenet_synsets.txt`,
`imagenet21k_goog_synsets.txt`, `imagenet21k_miil_synsets.txt` and `imagenet_synset_to_lemma.txt`;
the names are WordNet's lemmas. `imagenet_classes.xz` contains one line per id in ascending order,
with three columns separated by tabs: the difference to the previous id, the sum of the bits of the
LISTS that contain it (1, 2 and 4), and its names. The ids of every list are in ascending order.
"""

import functools
import itertools
import lzma
from pathlib import Path

from mixer.errors import check_choice

# Number of classes of ImageNet-1k, of the published ImageNet-21k checkpoints, and of the subset for
# the miil weights (Ridnik et al., 2021, arXiv 2104.10972).
LISTS = {"imagenet1k": 1_000, "imagenet21k": 21_843, "imagenet21k_miil": 11_221}


@functools.cache
def _classes(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the ids and names of a list."""
    check_choice("list of classes", name, LISTS)
    text = lzma.decompress(Path(__file__).with_name("imagenet_classes.xz").read_bytes()).decode()
    steps, lists, names = zip(*(line.split("\t") for line in text.splitlines()), strict=True)
    ids = itertools.accumulate(map(int, steps))
    bit = 1 << list(LISTS).index(name)
    rows = [
        (f"n{i:08}", n) for i, held, n in zip(ids, lists, names, strict=True) if int(held) & bit
    ]
    return tuple(zip(*rows, strict=True))


def synsets(name: str) -> tuple[str, ...]:
    """Returns the unique WordNet ids of a list, such as "n01440764", in label order.

    "imagenet21k" contains all ids of "imagenet21k_miil" and 999 of "imagenet1k", without n04399382.

    Args:
      name: a key of LISTS.

    Raises:
      UserError: no list of that name.
    """
    return _classes(name)[0]


def class_names(name: str) -> tuple[str, ...]:
    """Returns the class names of a list, such as "tench, Tinca tinca", in label order.

    Names are not unique: ImageNet-1k has "crane" twice, the bird and the machine, and 525 names of
    ImageNet-21k belong to two or more classes. Use labels or `synsets` to distinguish classes.

    Args:
      name: a key of LISTS.

    Raises:
      UserError: no list of that name.
    """
    return _classes(name)[1]
