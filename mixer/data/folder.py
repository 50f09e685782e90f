"""A folder of images, `<split>/<class>/*.{jpg,jpeg,png}`, as a list of examples.

The class list is derived over all splits, sorted by name, so that a class that one split lacks
shifts no label.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from mixer.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """What a folder holds.

    Attributes:
      root: the folder.
      class_names: sorted names of the classes of all splits.
      files: by split, paths relative to the root, in an order that mixes the classes and is the
        same on every machine, so that `train[:90%]` is a fair sample.
    """

    root: epath.Path
    class_names: tuple[str, ...]
    files: dict[str, list[str]]

    def labels(self, files: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
        """Class numbers of `files` in the list `class_names`, (n,) int32."""
        number = {name: i for i, name in enumerate(class_names)}
        unknown = sorted({file.split("/")[1] for file in files} - set(number))
        if unknown:
            raise UserError(
                f"{self.root} holds classes that the run was not trained on: {unknown[:5]}; "
                f"the run's {len(class_names)} classes are {', '.join(list(class_names)[:5])}, ..."
            )
        return np.array([number[file.split("/")[1]] for file in files], np.int32)


def scan(root: str) -> ImageFolder:
    """Lists the images under `root`.

    Raises:
      UserError: the folder does not exist or is not laid out as `<split>/<class>/<image>`.
    """
    layout = "a folder of images is laid out as <split>/<class>/<image>, as in train/cat/0001.jpg"
    if not root:
        raise UserError(
            f"dataset.data_dir is empty; give --config.dataset.data_dir=FOLDER; {layout}"
        )
    root = epath.Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"dataset.data_dir={root} is no folder; {layout}")
    files: dict[str, list[str]] = {}
    classes: set[str] = set()
    for split in _folders(root):
        found = []
        for label in _folders(split):
            classes.add(label.name)
            found += [
                f"{split.name}/{label.name}/{image.name}"
                for image in label.iterdir()
                if image.name.lower().endswith(ENDINGS) and not image.name.startswith(".")
            ]
        if found:
            # Sorted by a hash of the name: an image that is added or taken away moves no other.
            files[split.name] = sorted(
                found, key=lambda file: hashlib.blake2b(file.encode(), digest_size=16).digest()
            )
    if not files:
        raise UserError(f"{root} holds no images ({', '.join(ENDINGS)}); {layout}")
    return ImageFolder(root, tuple(sorted(classes)), files)


def _folders(path: epath.Path) -> list[epath.Path]:
    inside = (child for child in path.iterdir() if not child.name.startswith("."))
    return sorted((child for child in inside if child.is_dir()), key=lambda child: child.name)
