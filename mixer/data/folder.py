"""Folders of images as lists of examples: `<split>/<class>/<image>`, or a file of labels.

Of folders, the class list is derived over all splits, sorted by name, so that a class that one
split lacks shifts no label. A label file is jsonl, an image a line, with one label or several:
{"path": "a/b.jpg", "labels": ["cat", "pet"], "weights": [0.9, 0.2], "split": "train"}.
"""

import array
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mixer.errors import UserError, nearest

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".jxl")
# Images that TensorFlow cannot decode: they are listed, so that none is left out unseen.
UNDECODABLE = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2")
# Labels that are numbers make as many classes as the largest says; beyond this they are other ids.
MOST_CLASSES = 1 << 20
LABEL_LINE = '{"path": "cats/1.jpg", "labels": ["cat", "pet"], "weights": [1.0, 0.5]}'


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """What a folder holds.

    Attributes:
      root: the folder.
      class_names: sorted names of the classes of all splits.
      files: by split, paths relative to the root, in an order that mixes the classes and is the
        same on every machine, so that `train[:90%]` is a fair sample.
      undecodable: those of them that TensorFlow cannot decode, by their endings.
    """

    root: epath.Path
    class_names: tuple[str, ...]
    files: dict[str, list[str]]
    undecodable: tuple[str, ...]

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
      UserError: the folder does not exist or is not laid out as `<split>/<class>/<image>`, or a
        class has no image.
    """
    layout = "a folder of images is laid out as <split>/<class>/<image>, as in train/cat/0001.jpg"
    root = _root(root, layout)
    files: dict[str, list[str]] = {}
    classes: set[str] = set()
    for split in _folders(root):
        found = []
        for label in _folders(split):
            classes.add(label.name)
            found += [
                f"{split.name}/{label.name}/{image.name}"
                for image in label.iterdir()
                if image.name.lower().endswith(ENDINGS + UNDECODABLE)
                and not image.name.startswith(".")
            ]
        if found:
            # Sorted by a hash of the name: an image that is added or taken away moves no other.
            files[split.name] = sorted(
                found, key=lambda file: hashlib.blake2b(file.encode(), digest_size=16).digest()
            )
    if not files:
        raise UserError(f"{root} holds no images ({', '.join(ENDINGS)}); {layout}")
    every = [file for found in files.values() for file in found]
    empty = sorted(classes - {file.split("/")[1] for file in every})
    if empty:
        raise UserError(
            f"{root}: {len(empty)} of {len(classes)} classes have no image in any split: "
            f"{', '.join(empty[:5])}; put images ({', '.join(ENDINGS)}) into their folders, or "
            "remove the folders"
        )
    undecodable = tuple(file for file in every if file.lower().endswith(UNDECODABLE))
    return ImageFolder(root, tuple(sorted(classes)), files, undecodable)


def _root(path: str, layout: str) -> epath.Path:
    if not path:
        raise UserError(
            f"dataset.data_dir is empty; give --config.dataset.data_dir=FOLDER; {layout}"
        )
    root = epath.Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f"dataset.data_dir={root} is no folder; {layout}; where data has moved, --data_dir (of "
            "evaluate.py and inspect) says where to"
        )
    return root


def _folders(path: epath.Path) -> list[epath.Path]:
    inside = (child for child in path.iterdir() if not child.name.startswith("."))
    return sorted((child for child in inside if child.is_dir()), key=lambda child: child.name)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelFile:
    """What a label file says of n images with m labels in all.

    Flat arrays, for tens of millions of images: the path, 36 bytes, and 8 bytes for each label.

    Attributes:
      file: the label file. root: the folder that the paths start from.
      class_names: sorted names of the labels of the whole file; None where they are numbers.
      several: whether images may have several labels or weights; if not, each has exactly one.
      paths: all paths, joined.
      path_starts: (n + 1,) int64; image i's path is paths[path_starts[i] : path_starts[i + 1]].
      label_starts: (n + 1,) int64, the same for `labels` and `weights`.
      labels: (m,) int32, class numbers; -1 nowhere.
      weights: (m,) float32 in [0, 1].
      lines: (n,) int32, the line that each image stands in.
      path_hashes: (n,) uint64.
      splits: image numbers of each split, sorted by the hash of their paths.
    """

    file: epath.Path
    root: epath.Path
    class_names: tuple[str, ...] | None
    several: bool
    paths: bytes
    path_starts: np.ndarray
    label_starts: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    lines: np.ndarray
    path_hashes: np.ndarray
    splits: dict[str, np.ndarray]

    def path(self, image: int) -> str:
        """The path of an image, as the file has it."""
        return self.paths[self.path_starts[image] : self.path_starts[image + 1]].decode()

    def names(self, num_classes: int | None) -> tuple[str, ...]:
        """The class names: the file's; of labels that are numbers, 0 to num_classes - 1.

        Where `num_classes` is None the largest label says how many there are.
        """
        if self.class_names is not None:
            return self.class_names
        count = num_classes or 1 + int(self.labels.max())
        if count > MOST_CLASSES:
            raise self._fault(
                int(self.labels.argmax()),
                f"label {count - 1:,} would make {count:,} classes; number them from 0, or write "
                "names",
            )
        return tuple(str(number) for number in range(count))

    def numbers(self, class_names: Sequence[str], entries: np.ndarray) -> np.ndarray:
        """`labels` as numbers of the list `class_names`, (m,) int32.

        Raises:
          UserError: one of `entries` (places in `labels`) has a label that is not in the list.
        """
        numbers = self.labels
        if self.class_names is not None and self.class_names != tuple(class_names):
            places = {name: place for place, name in enumerate(class_names)}
            table = [places.get(name, len(class_names)) for name in self.class_names]
            numbers = np.array(table, np.int32)[numbers]
        unknown = entries[numbers[entries] >= len(class_names)]
        if len(unknown):
            first = int(unknown.min())
            label = int(self.labels[first])
            raise self._fault(
                first,
                f"label {label if self.class_names is None else repr(self.class_names[label])} is "
                f"none of the {len(class_names)} classes {', '.join(list(class_names)[:3])}, ...",
            )
        return numbers

    def _fault(self, label: int, reason: str) -> UserError:
        """The line that says what is wrong with entry `label` of `labels`."""
        image = int(np.searchsorted(self.label_starts, label, "right")) - 1
        return _line_fault(self.file, int(self.lines[image]), reason)


def read_label_file(file: str, root: str) -> LabelFile:
    """Reads a label file; `root` is the folder that its paths start from.

    Whether the images exist is found only when they are read.

    Raises:
      UserError: no such file or folder, or a line that is not as it must be, by its number.
    """
    root = _root(root, f"dataset.label_file={file} has paths relative to it")
    file = epath.Path(file).expanduser()
    path_starts, label_starts = array.array("q", [0]), array.array("q", [0])
    labels, weights = array.array("i"), array.array("f")
    lines, hashes, split_of = array.array("i"), array.array("Q"), array.array("i")
    paths, splits, places = bytearray(), {}, {}
    kind, several = None, False
    try:
        with file.open("rb") as rows:
            for number, row in enumerate(rows, 1):
                if not row.strip():
                    continue
                try:
                    image = _parse_line(row)
                    encoded = image.path.encode()
                    found = type(image.labels[0]) if image.labels else kind
                    if kind not in (None, found):
                        raise ValueError("labels are names in some lines and numbers in others")
                except ValueError as error:
                    raise _line_fault(file, number, str(error)) from None
                kind, several = found, several or image.several
                paths += encoded
                path_starts.append(len(paths))
                for label in image.labels:
                    labels.append(label if kind is int else places.setdefault(label, len(places)))
                weights.extend(image.weights)
                label_starts.append(len(labels))
                lines.append(number)
                digest = hashlib.blake2b(encoded, digest_size=8).digest()
                hashes.append(int.from_bytes(digest, "big"))
                split_of.append(splits.setdefault(image.split, len(splits)))
    except OSError as error:
        raise UserError(
            f"dataset.label_file={file} cannot be read: {error.strerror or error}"
        ) from None
    if not labels:
        raise UserError(
            f"dataset.label_file={file} holds {len(lines):,} images and no label; a line is like "
            f"{LABEL_LINE}"
        )
    labels, hashes, split_of = (np.array(each) for each in (labels, hashes, split_of))
    names = None
    if kind is not int:  # numbered as they came; now by their sorted names
        names = tuple(sorted(places))
        table = np.empty(len(names), np.int32)
        table[[places[name] for name in names]] = np.arange(len(names))
        labels = table[labels]
    order = np.argsort(hashes, kind="stable")
    listing = LabelFile(
        file=file,
        root=root,
        class_names=names,
        several=several,
        paths=bytes(paths),
        path_starts=np.array(path_starts),
        label_starts=np.array(label_starts),
        labels=labels,
        weights=np.array(weights),
        lines=np.array(lines),
        path_hashes=hashes,
        splits={name: order[split_of[order] == code] for name, code in splits.items()},
    )
    for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        one, two = sorted(order[place : place + 2].tolist())
        if listing.path(one) == listing.path(two):
            reason = f"{listing.path(two)!r} stands in line {lines[one]} already"
            raise _line_fault(file, lines[two], reason)
    return listing


def _line_fault(file: epath.Path, number: int, reason: str) -> UserError:
    return UserError(f"dataset.label_file={file}, line {number}: {reason}")


@dataclasses.dataclass(slots=True)
class _LabelledImage:
    path: str
    labels: list[Any]
    weights: list[float]
    split: str
    several: bool


def _parse_line(row: bytes) -> _LabelledImage:
    """Reads a line of a label file; ValueError says what is wrong with it."""
    try:
        line = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error}); a line is like {LABEL_LINE}") from None
    if not isinstance(line, dict):
        raise ValueError(f"no object in braces; a line is like {LABEL_LINE}")
    keys = ("path", "labels", "weights", "split")
    for key in line:
        if key not in keys:
            raise ValueError(
                f"unknown key {key!r}; known are {', '.join(keys)}.{nearest(key, keys)}"
            )
    for key in keys[:2]:
        if key not in line:
            raise ValueError(f"{key!r} is missing; a line is like {LABEL_LINE}")
    path, split = line["path"], line.get("split", "train")
    if not isinstance(path, str) or not path or path.startswith("/") or "\0" in path:
        raise ValueError(f"path {path!r} must be text, relative to dataset.data_dir")
    if not isinstance(split, str) or not split.isidentifier():
        raise ValueError(f"split {split!r} must be a name such as 'train'")
    labels, weights = line["labels"], line.get("weights")
    labels = labels if isinstance(labels, list) else [labels]
    several = weights is not None or len(labels) != 1
    kinds = {type(label) for label in labels}
    if not (kinds <= {str} or kinds <= {int}):
        raise ValueError(f"labels {line['labels']!r} must be names, or numbers from 0")
    if kinds == {int} and not all(0 <= label < 1 << 31 for label in labels):
        raise ValueError(f"labels {labels} must be numbers from 0")
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels {labels} have one twice")
    if weights is None:
        return _LabelledImage(path, labels, [1.0] * len(labels), split, several)
    weights = weights if isinstance(weights, list) else [weights]
    if len(weights) != len(labels):
        raise ValueError(f"{len(weights)} weights for {len(labels)} labels")
    if not all(type(weight) in (int, float) and 0 <= weight <= 1 for weight in weights):
        raise ValueError(f"weights {weights} must be numbers from 0 to 1")
    return _LabelledImage(path, labels, weights, split, several)
