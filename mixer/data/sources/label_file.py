"""Reads a label file: one image per line, as jsonl or CSV.

A line of jsonl has one or more labels, such as {"path": "a/b.jpg", "labels": ["cat", "pet"],
"weights": [0.9, 0.2], "split": "train"}. A line of CSV has one label; the columns are named in the
header, `path,label` or `path,label,split`. In both formats, `file_name` and `label` are read as in
the metadata files of Hugging Face's image folders, whose other columns are ignored.
"""

import array
import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from etils import epath

from mixer.data.sources import folder
from mixer.errors import UserError, check_choice

# Largest number of classes that numeric labels may imply; larger numbers are probably ids.
MAX_CLASSES = 1 << 20
HEADER = "path,label or path,label,split"
LABEL_LINE = '{"path": "cats/1.jpg", "labels": ["cat", "pet"], "weights": [1.0, 0.5]}'


@dataclasses.dataclass(frozen=True, eq=False)
class LabelFile:
    """The content of a label file with n images and m labels in total.

    Flat arrays allow tens of millions of images. An image takes 36 bytes plus the length of
    its path, and a label takes 8 bytes.

    Attributes:
      file: the label file.
      root: the folder that the paths are relative to.
      class_names: sorted names of all labels of the file; None if labels are numbers.
      several: whether images may have several labels or weights; if not, each has exactly one.
      paths: all paths, concatenated.
      path_starts: (n + 1,) int64; image i's path is paths[path_starts[i] : path_starts[i + 1]].
      label_starts: (n + 1,) int64, the same for `labels` and `weights`.
      labels: (m,) int32, class numbers; never -1.
      weights: (m,) float32 in [0, 1].
      lines: (n,) int32, line number of each image.
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
        """Returns the path of an image as text."""
        return folder.decode(self.encoded_path(image))

    def encoded_path(self, image: int) -> bytes:
        """Returns the path of an image as bytes."""
        return self.paths[self.path_starts[image] : self.path_starts[image + 1]]

    def names(self, num_classes: int | None) -> tuple[str, ...]:
        """Returns the class names: those of the file, or 0 to num_classes - 1 for numeric labels.

        If `num_classes` is None, the largest label determines the number of classes.
        """
        if self.class_names is not None:
            return self.class_names
        count = num_classes or 1 + int(self.labels.max())
        if count > MAX_CLASSES:
            raise self._fault(
                int(self.labels.argmax()),
                f"label {count - 1:,} would imply {count:,} classes; number the classes from 0, or "
                "use names",
            )
        return tuple(str(number) for number in range(count))

    def numbers(self, class_names: Sequence[str], entries: np.ndarray) -> np.ndarray:
        """Returns `labels` as numbers in the list `class_names`, (m,) int32.

        Raises:
          UserError: one of `entries` (indices into `labels`) has a label that is not in the list.
        """
        numbers = self.labels
        if self.class_names is not None and self.class_names != tuple(class_names):
            indices = {name: index for index, name in enumerate(class_names)}
            table = [indices.get(name, len(class_names)) for name in self.class_names]
            numbers = np.array(table, np.int32)[numbers]
        unknown = entries[numbers[entries] >= len(class_names)]
        if len(unknown):
            first = int(unknown.min())
            label = int(self.labels[first])
            raise self._fault(
                first,
                f"label {label if self.class_names is None else repr(self.class_names[label])} is "
                f"not one of the {len(class_names)} classes {folder.listed(class_names)}",
            )
        return numbers

    def _fault(self, label: int, reason: str) -> UserError:
        """Returns the error for entry `label` of `labels`."""
        image = int(np.searchsorted(self.label_starts, label, "right")) - 1
        return _line_fault(self.file, int(self.lines[image]), reason)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledPaths(Sequence):
    """Paths of some images of a label file, created on access because there may be millions.

    Attributes:
      listing: the label file.
      images: (n,) numbers of the images.
    """

    listing: LabelFile
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> bytes:
        return self.listing.encoded_path(self.images[index])


@dataclasses.dataclass(slots=True)
class LabelledImage:
    """One image of a label file.

    Attributes:
      line: line number.
      path: path relative to the root.
      labels: its labels, all names or all class numbers.
      weights: a weight for each label; None if the line has none, which means 1.
      split: name of the split.
    """

    line: int
    path: bytes
    labels: list[str] | list[int]
    weights: list[float] | None
    split: str


def collect(file: epath.Path, root: epath.Path, images: Iterable[LabelledImage]) -> LabelFile:
    """Collects the images of a label file into flat arrays.

    Raises:
      UserError: some labels are names and others are numbers.
    """
    path_starts, label_starts = array.array("q", [0]), array.array("q", [0])
    labels, weights = array.array("i"), array.array("f")
    lines, hashes, split_of = array.array("i"), array.array("Q"), array.array("i")
    paths, splits, codes = bytearray(), {}, {}
    kind, several = None, False
    for image in images:
        label_type = type(image.labels[0]) if image.labels else kind
        if kind not in (None, label_type):
            reason = "labels are names in some lines and numbers in others"
            raise _line_fault(file, image.line, reason)
        kind = label_type
        several |= image.weights is not None or len(image.labels) != 1
        paths += image.path
        path_starts.append(len(paths))
        for label in image.labels:
            labels.append(label if kind is int else codes.setdefault(label, len(codes)))
        weights.extend(image.weights or [1.0] * len(image.labels))
        label_starts.append(len(labels))
        lines.append(image.line)
        hashes.append(int.from_bytes(hashlib.blake2b(image.path, digest_size=8).digest(), "big"))
        split_of.append(splits.setdefault(image.split, len(splits)))
    labels, hashes, split_of = (np.array(values) for values in (labels, hashes, split_of))
    names = None
    if kind is not int:  # renumber from order of appearance to sorted names
        names = tuple(sorted(codes))
        table = np.empty(len(names), np.int32)
        table[[codes[name] for name in names]] = np.arange(len(names))
        labels = table[labels]
    order = np.argsort(hashes, kind="stable")
    return LabelFile(
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


def read_label_file(file: str, root: str) -> LabelFile:
    """Reads a label file; its paths are relative to `root`, by default the folder of the file.

    A missing image is reported only when it is read.

    Raises:
      UserError: the file or folder does not exist, or a line (named by its number) is invalid.
    """
    if root:
        root = folder.find_root(root, f"dataset.label_file={file} has paths relative to it")
    file = folder.find_file("dataset.label_file", file)
    root = root or file.parent
    parse = _parse_csv if file.suffix.lower() == ".csv" else _parse
    try:
        listing = collect(file, root, parse(file))
    except OSError as error:
        raise UserError(
            f"dataset.label_file={file} cannot be read: {error.strerror or error}"
        ) from None
    if not len(listing.labels):
        raise UserError(
            f"dataset.label_file={file} contains {len(listing.lines):,} images but no label; "
            f"expected lines such as {LABEL_LINE}"
        )
    order = np.argsort(listing.path_hashes, kind="stable")
    hashes = listing.path_hashes[order]
    for index in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
        first, second = sorted(order[index : index + 2].tolist())
        if listing.path(first) == listing.path(second):
            reason = f"{listing.path(second)!r} is already in line {listing.lines[first]}"
            raise _line_fault(file, listing.lines[second], reason)
    return listing


def _line_fault(file: epath.Path, number: int, reason: str) -> UserError:
    return UserError(f"dataset.label_file={file}, line {number}: {reason}")


def _parse(file: epath.Path) -> Iterator[LabelledImage]:
    """Yields the images of all lines; raises UserError for the first invalid line."""
    with file.open("rb") as rows:
        for number, row in enumerate(rows, 1):
            if row.strip():
                try:
                    yield _parse_line(number, row)
                except ValueError as error:
                    raise _line_fault(file, number, str(error)) from None


def _parse_line(number: int, row: bytes) -> LabelledImage:
    """Parses a line of a label file; raises ValueError with the reason if it is invalid."""
    try:
        line = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); expected a line such as {LABEL_LINE}") from None
    if not isinstance(line, dict):
        raise ValueError(f"not an object in braces; expected a line such as {LABEL_LINE}")
    if "file_name" in line:  # Hugging Face's format
        if "label" not in line:
            raise ValueError("'label' is missing; a line with 'file_name' needs it")
        line = {
            "path": line["file_name"],
            "labels": line["label"],
            "split": line.get("split", _split_of(line["file_name"])),
        }
    keys = ("path", "labels", "weights", "split")
    for key in line:
        check_choice("key", key, keys)
    for key in keys[:2]:
        if key not in line:
            raise ValueError(f"{key!r} is missing; expected a line such as {LABEL_LINE}")
    path, split = line["path"], line.get("split", folder.TRAIN_SPLIT)
    _check_place(path, split)
    labels, weights = line["labels"], line.get("weights")
    labels = labels if isinstance(labels, list) else [labels]
    kinds = {type(label) for label in labels}
    if not (kinds <= {str} or kinds <= {int}):
        raise ValueError(f"labels {line['labels']!r} must be names, or numbers from 0")
    if kinds == {int} and not all(0 <= label < 1 << 31 for label in labels):
        raise ValueError(f"labels {labels} must be numbers from 0")
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels {labels} contain a duplicate")
    if weights is not None:
        weights = weights if isinstance(weights, list) else [weights]
        if len(weights) != len(labels):
            raise ValueError(f"{len(weights)} weights for {len(labels)} labels")
        if not all(type(weight) in (int, float) and 0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights {weights} must be numbers from 0 to 1")
    return LabelledImage(number, folder.encode(path), labels, weights, split)


def _check_place(path: object, split: object) -> None:
    """Raises ValueError if the path or the split of an image is invalid."""
    if not isinstance(path, str) or not path or path.startswith("/") or "\0" in path:
        raise ValueError(f"path {path!r} must be text, relative to dataset.data_dir")
    if not isinstance(split, str) or not split.isidentifier():
        raise ValueError(f"split {split!r} must be a name such as 'train'")


def _split_of(path: object) -> str:
    """Returns the split of an image in Hugging Face's layout: its first folder, or "train"."""
    name = path.partition("/")[0] if isinstance(path, str) else ""
    return name if name in folder.SPLIT_NAMES else folder.TRAIN_SPLIT


def _parse_csv(file: epath.Path) -> Iterator[LabelledImage]:
    """Yields the images of a CSV file; raises UserError for the first invalid line.

    Labels are class numbers if all of them are whole numbers, otherwise names.
    """
    are_numbers = all(row["label"].isdecimal() for _, row in _rows(file))
    for number, row in _rows(file):
        label = row["label"]
        if are_numbers and (len(label) > 10 or int(label) >= 1 << 31):
            raise _line_fault(file, number, f"label {label[:20]} must be a number below 2^31")
        yield LabelledImage(
            number,
            folder.encode(row["path"]),
            [int(label) if are_numbers else label],
            None,
            row["split"],
        )


def _rows(file: epath.Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the line number, and "path", "label" and "split", of each row of a CSV file."""
    with file.open("rb") as binary:
        text = io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        try:
            columns = [name.strip() for name in next(reader, [])]
            is_hugging_face = "file_name" in columns
            names = ["file_name" if is_hugging_face else "path", "label", "split"]
            is_unknown = not is_hugging_face and not set(columns) <= set(names)
            if is_unknown or len(set(columns)) < len(columns) or not {*names[:2]} <= {*columns}:
                raise ValueError(f"the header is {','.join(columns)!r}; expected {HEADER}")
            for values in reader:
                if not values:
                    continue
                if len(values) != len(columns):
                    raise ValueError(f"{len(values)} values; the header has {len(columns)} columns")
                row = dict(zip(columns, values, strict=True))
                path, label = (row[name] for name in names[:2])
                split = row.get("split") or (
                    _split_of(path) if is_hugging_face else folder.TRAIN_SPLIT
                )
                _check_place(path, split)
                if not label:
                    raise ValueError(f"{path!r} has no label")
                yield reader.line_num, {"path": path, "label": label, "split": split}
        except (ValueError, csv.Error) as error:
            raise _line_fault(file, max(reader.line_num, 1), str(error)) from None
