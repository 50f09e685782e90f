"""Lists the examples in a folder of images: `<split>/<class>/<image>`, or a label file.

The class list of folders is the sorted union over all splits, so a class that is missing in one
split does not shift labels. A label file is jsonl with one image per line and one or more labels:
{"path": "a/b.jpg", "labels": ["cat", "pet"], "weights": [0.9, 0.2], "split": "train"}.
"""

import array
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mixer.errors import UserError, check_choice, first_line
from mixer.files import parse_path

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".jxl")
# Images that TensorFlow cannot decode. Training raises an error for them instead of skipping them.
UNDECODABLE = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2")
# Images that `predict` may read with Pillow; training skips them with a message.
RARE = (
    *(".apng", ".avifs", ".bw", ".dib", ".icb", ".icns", ".ico", ".j2c", ".j2k", ".jpc", ".jpf"),
    *(".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".pnm", ".ppm", ".psd", ".rgb"),
    *(".rgba", ".sgi", ".tga", ".vda", ".vst", ".xbm", ".xpm"),
)
LISTED = frozenset(ENDINGS + UNDECODABLE)
ACCEPTED = ", ".join(ENDINGS)
# Folders that systems and programs create among a user's folders. Hidden folders are skipped too.
IGNORED_NAMES = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information")
)
# Largest number of classes that numeric labels may imply; larger labels are probably other ids.
MOST_CLASSES = 1 << 20
LABEL_LINE = '{"path": "cats/1.jpg", "labels": ["cat", "pet"], "weights": [1.0, 0.5]}'
# Values in place of a file's size.
MISSING, IRREGULAR = -1, -2
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
EXAMPLES = 5  # names that a message lists


def encode(name: str) -> bytes:
    """Returns the bytes of a file name, including undecodable bytes."""
    return name.encode("utf-8", "surrogateescape")


def decode(name: bytes) -> str:
    """Returns the text of a file name, with non-UTF-8 bytes escaped as four characters."""
    return name.decode("utf-8", "backslashreplace")


def displayed(text: str) -> str:
    """Returns `text` as one line for a terminal, with control characters escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(
        ascii(character)[1:-1]
        if unicodedata.category(character) in ("Cc", "Zl", "Zp")
        else character
        for character in text
    )


def irregular(mode: int) -> str:
    """Returns why a file with this `st_mode` is not opened; "" for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    return f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def fault_of(path: bytes | str) -> str:
    """Returns why a local file is not opened; "" for a regular file."""
    try:
        return irregular(os.stat(path).st_mode)
    except OSError as error:
        return error.strerror


@dataclasses.dataclass(frozen=True)
class Listing:
    """The entries of one folder, sorted by name, without hidden entries.

    Attributes:
      folders: pairs of a name and whether it is a symbolic link.
      files: pairs of a name and the reason why the file must not be opened, or "".
    """

    folders: list[tuple[bytes, bool]]
    files: list[tuple[bytes, str]]


def _is_left_out(name: bytes) -> bool:
    return name.startswith(b".") or decode(name).lower() in IGNORED_NAMES


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether `path` is an address in an object store such as gs://."""
    return "://" in os.fspath(path)


def find_file(key: str, path: str) -> epath.Path:
    """Returns the file that the user passed as `key`; UserError if it is not a readable file."""
    file = parse_path(key, path)
    if not is_remote(file):
        try:
            fault = irregular(os.stat(file).st_mode)
        except OSError as error:
            fault = error.strerror
        if fault:
            raise UserError(f"{key}={displayed(path)} cannot be read: {fault}")
    return file


@contextlib.contextmanager
def _naming(path: bytes) -> Iterator[None]:
    """Turns an OSError into a UserError with the path of the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{displayed(decode(path))} cannot be read: {error.strerror}") from None


def _identity(root: epath.Path, inside: bytes) -> Any:
    """Returns an identity of the folder `inside` of `root` that is the same for all its paths."""
    if is_remote(root):
        return inside
    path = _join(os.fsencode(root), inside)
    with _naming(path):
        status = os.stat(path)
    return status.st_dev, status.st_ino


def list_folder(root: epath.Path, inside: bytes) -> Listing:
    """Lists the folder `inside` of `root`; raises UserError if it cannot be read."""
    if is_remote(root):
        return _list_in_store(root / inside.decode())
    path = _join(os.fsencode(root), inside)
    folders, files = [], []
    with _naming(path), os.scandir(path) as children:
        for child in children:
            if _is_left_out(child.name):
                continue
            try:
                if child.is_dir():
                    folders.append((child.name, child.is_symlink()))
                    continue
                fault = "" if child.is_file() else fault_of(child.path)
            except OSError as error:  # a link to itself
                fault = error.strerror
            files.append((child.name, fault))
    return Listing(sorted(folders), sorted(files))


def _list_in_store(folder: epath.Path) -> Listing:
    folders, files = [], []
    for child in folder.iterdir():
        name = child.name.encode()
        if _is_left_out(name):
            continue
        # `is_dir` is a request to the store, so a name with a suffix is assumed to be a file.
        if b"." not in name and child.is_dir():
            folders.append((name, False))
        else:
            files.append((name, ""))
    return Listing(sorted(folders), sorted(files))


def walk(
    root: epath.PathLike, inside: bytes = b"", *, skipped_folders: Iterable[bytes] = ()
) -> Iterator[tuple[bytes, str]]:
    """Yields the files below a folder, each with "" or the reason why it must not be opened.

    Symbolic links are followed. A folder that several paths reach is read once, and by its real
    path rather than by a link, so cyclic links do not loop.

    Args:
      root: folder that the paths are relative to.
      inside: the folder to read, relative to the root.
      skipped_folders: folders that are not read, relative to the root.

    Raises:
      UserError: a folder cannot be read.
    """
    root = epath.Path(root)
    identities = {_identity(root, folder) for folder in skipped_folders}
    waiting = collections.deque([inside])
    while waiting:
        folder = waiting.popleft()
        identity = _identity(root, folder)
        if identity in identities:
            continue
        identities.add(identity)
        listing = list_folder(root, folder)
        for name, fault in listing.files:
            yield _join(folder, name), fault
        waiting.extend(_join(folder, name) for name, is_link in listing.folders if is_link)
        waiting.extendleft(
            _join(folder, name) for name, is_link in reversed(listing.folders) if not is_link
        )


def _join(folder: bytes, name: bytes) -> bytes:
    return b"/".join(filter(None, (folder, name)))


def ending(name: bytes) -> str:
    """Returns the suffix of a file name in lower case, such as ".jpg"."""
    return "." + decode(name.rpartition(b".")[2].lower())


def file_sizes(root: epath.PathLike, paths: Sequence[bytes]) -> np.ndarray | None:
    """Returns the sizes in bytes of local files, (n,) int64; MISSING or IRREGULAR for bad files.

    Returns None for an object store such as gs://, which would need a request per file.
    """
    if is_remote(root):
        return None
    root = os.fsencode(root)

    def sizes(part: Sequence[bytes]) -> list[int]:
        part_sizes = []
        for path in part:
            try:
                status = os.stat(os.path.join(root, path))
                part_sizes.append(IRREGULAR if irregular(status.st_mode) else status.st_size)
            except OSError:
                part_sizes.append(MISSING)
        return part_sizes

    remaining_paths = iter(paths)
    parts = iter(lambda: list(itertools.islice(remaining_paths, 1024)), [])
    # Threads hide the latency of network disks.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return np.array(list(itertools.chain.from_iterable(pool.map(sizes, parts))), np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredFiles:
    """The files that hold the examples of a split.

    Attributes:
      root: the folder that the paths are relative to.
      paths: paths of the files.
      class_numbers: class of each file, (n,); None if a file holds several examples.
      num_classes: number of classes.
      known_sizes: sizes from `file_sizes`, if they have been computed.
    """

    root: epath.Path
    paths: Sequence[bytes]
    class_numbers: np.ndarray | None
    num_classes: int
    known_sizes: np.ndarray | None = None

    @functools.cached_property
    def sizes(self) -> np.ndarray | None:
        """The sizes of the files, as `file_sizes` returns them."""
        if self.known_sizes is not None:
            return self.known_sizes
        return file_sizes(self.root, self.paths)

    def record(self) -> dict[str, Any] | None:
        """Returns the record by which a run recognises its files; None if sizes are unknown."""
        if self.sizes is None:
            return None
        sizes = np.maximum(self.sizes, 0)
        record = {
            "num_files": len(sizes),
            "num_bytes": int(sizes.sum()),
            "sizes": hashlib.blake2b(self.sizes.tobytes(), digest_size=16).hexdigest(),
        }
        if self.class_numbers is not None:
            numbers = self.class_numbers
            summed = np.bincount(numbers, sizes, self.num_classes)  # float64: exact up to 8 PiB
            record["class_files"] = np.bincount(numbers, minlength=self.num_classes).tolist()
            record["class_bytes"] = summed.astype(np.int64).tolist()
        return record

    def newest(self, class_number: int | None) -> str:
        """Returns the path of the last changed file of one class or of all; "" if none exists."""
        indices = range(len(self.paths))
        if class_number is not None:
            indices = np.flatnonzero(self.class_numbers == class_number).tolist()

        def modification_secs(index: int) -> float:
            try:
                return os.stat(os.path.join(os.fsencode(self.root), self.paths[index])).st_mtime
            except OSError:
                return -1.0

        return decode(self.paths[max(indices, key=modification_secs)]) if len(indices) else ""


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The content of a folder of images.

    Attributes:
      root: the folder.
      class_names: sorted names of the classes of all splits.
      files: for each split, paths relative to the root. Their order mixes the classes and is the
        same on every machine, so that `train[:90%]` is a random sample.
      faults: for the path of an unusable image, the reason.
      remarks: lines for the user on possible mistakes in the layout.
      nested: number of images in subfolders of a class folder.
    """

    root: epath.Path
    class_names: tuple[str, ...]
    files: dict[str, list[bytes]]
    faults: dict[bytes, str]
    remarks: tuple[str, ...]
    nested: int

    def labels(self, files: Sequence[bytes], class_names: Sequence[str]) -> np.ndarray:
        """Returns the class numbers (n,) int32 of `files` in the list `class_names`."""
        indices = {name: index for index, name in enumerate(class_names)}
        names = {_class_of(file) for file in files}
        numbers = {name: indices[decode(name)] for name in names if decode(name) in indices}
        if unknown := sorted(map(decode, names - set(numbers))):
            raise UserError(
                f"{displayed(str(self.root))} holds classes that the run was not trained on: "
                f"{unknown[:EXAMPLES]}; the run's {len(class_names)} classes are "
                f"{listed(class_names)}"
            )
        return np.array([numbers[_class_of(file)] for file in files], np.int32)


def _class_of(file: bytes) -> bytes:
    return file.split(b"/", 2)[1]


def listed(names: Iterable[str], show: Callable[[str], str] = displayed) -> str:
    """Returns the first few names for a message."""
    names = list(names)
    ending = ", ..." if len(names) > EXAMPLES else ""
    return ", ".join(displayed(show(name)) for name in names[:EXAMPLES]) + ending


class _Scan:
    """Scans the folders of a data set.

    Attributes:
      images: for each split, the images of all classes.
      class_folders: for each class, its folders in the splits that hold images.
      faults: as in `ImageFolder`.
      nested, beside, rare: images in subfolders of a class folder, images outside class folders,
        and images in formats that training skips.
      copies: folders that are not a class, but a split of another data set.
    """

    def __init__(self, root: epath.Path, subfolders: bool):
        self.root, self.subfolders = root, subfolders
        self.images: dict[bytes, list[bytes]] = {}
        self.class_folders: dict[str, list[bytes]] = {}
        self.faults: dict[bytes, str] = {}
        self.nested, self.beside, self.rare, self.copies = [], [], [], []
        top = list_folder(root, b"")
        self.beside += [name for name, _ in top.files if ending(name) in LISTED]
        self.splits = [name for name, _ in top.folders]
        for split in self.splits:
            self._read_split(split)

    def _read_split(self, split: bytes) -> None:
        inside = list_folder(self.root, split)
        self.beside += [_join(split, name) for name, _ in inside.files if ending(name) in LISTED]
        by_class = {name: self._read_class(split, name) for name, _ in inside.folders}
        if images := [image for images in by_class.values() for image in images]:
            self.images[split] = images
            for name in by_class:
                self.class_folders.setdefault(decode(name), []).append(_join(split, name))

    def _read_class(self, split: bytes, name: bytes) -> list[bytes]:
        images, nested = [], []
        for file, fault in walk(self.root, _join(split, name), skipped_folders=(b"", split)):
            if ending(file) in RARE:
                self.rare.append(file)
            if ending(file) not in LISTED:
                continue
            (images if file.count(b"/") == 2 else nested).append(file)
            if ending(file) in UNDECODABLE:
                fault = fault or "TensorFlow cannot decode its format; convert it"
            if fault:
                self.faults[file] = fault
        if self.subfolders and name in self.splits and len(nested) > len(images):
            self.copies.append(_join(split, name))  # as in backup/train/cat/1.jpg
        self.nested += nested
        return images + nested if self.subfolders else images

    def remarks(self) -> tuple[str, ...]:
        """Returns lines for the user on possible mistakes in the layout."""
        nested = "read as images of the class"
        if not self.subfolders:
            nested = "left out, as when this run was started"
        return tuple(
            f"{len(images):,} {description}, such as {displayed(decode(images[0]))}, are {fate}"
            for images, description, fate in (
                (self.nested, "images in subfolders of a class folder", nested),
                (self.beside, "images outside of class folders", "left out"),
                (self.rare, "images of other formats", f"left out; expected {ACCEPTED}"),
            )
            if images
        )


def scan(root: str, *, subfolders: bool = True) -> ImageFolder:
    """Lists the images under `root`.

    Args:
      root: the folder, with the layout `<split>/<class>/<image>`.
      subfolders: whether to read images in subfolders of a class folder. Runs that older code
        started do not.

    Raises:
      UserError: the folder does not exist or has another layout, or a class has no image.
    """
    layout = "a folder of images is laid out as <split>/<class>/<image>, as in train/cat/0001.jpg"
    tree = _Scan(find_root(root, layout), subfolders)
    shown = displayed(str(tree.root))
    if tree.copies:
        raise UserError(
            f"{shown}: {listed(map(decode, tree.copies))}: the name of a split in the place of a "
            f"class; {layout} (move a second data set out of this folder)"
        )
    if not tree.images:
        other_images = tree.beside + tree.rare
        hint = f" (not as {displayed(decode(other_images[0]))})" if other_images else ""
        raise UserError(f"{shown} holds no images ({ACCEPTED}) of a class; {layout}{hint}")
    names = {decode(_class_of(image)) for images in tree.images.values() for image in images}
    if empty := sorted(set(tree.class_folders) - names):
        folders = [decode(folder) for name in empty for folder in tree.class_folders[name]]
        raise UserError(
            f"{shown}: {len(empty)} of {len(tree.class_folders)} classes have no image in any "
            f"split: {listed(folders)}; put images ({ACCEPTED}) into these folders, or remove them"
        )
    # Sort by a hash of the name, so that adding or removing an image does not reorder the others.
    files = {
        decode(split): sorted(
            images, key=lambda file: hashlib.blake2b(file, digest_size=16).digest()
        )
        for split, images in tree.images.items()
    }
    return ImageFolder(
        root=tree.root,
        class_names=tuple(sorted(names)),
        files=files,
        faults=tree.faults,
        remarks=tree.remarks(),
        nested=len(tree.nested),
    )


def find_root(path: str, layout: str) -> epath.Path:
    """Returns the folder `dataset.data_dir`; raises UserError if it does not exist."""
    if not path:
        raise UserError(
            f"dataset.data_dir is empty; expected --config.dataset.data_dir=FOLDER; {layout}"
        )
    root = parse_path("dataset.data_dir", path)
    try:
        is_folder = root.is_dir()
    except Exception as error:
        if not isinstance(error, OSError) and not is_remote(root):
            raise  # only object stores raise exceptions other than OSError
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"dataset.data_dir={displayed(path)} cannot be read: {reason}") from None
    if not is_folder:
        raise UserError(
            f"dataset.data_dir={displayed(str(root))} is not a folder; {layout}; if the data has "
            "moved, pass --data_dir (evaluate.py and inspect)"
        )
    return root


@dataclasses.dataclass(frozen=True, eq=False)
class LabelFile:
    """The content of a label file with n images and m labels in total.

    Flat arrays allow tens of millions of images. An image takes its path and 36 bytes, and 8 bytes
    per label.

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
        return decode(self.encoded_path(image))

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
        if count > MOST_CLASSES:
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
                f"none of the {len(class_names)} classes {', '.join(list(class_names)[:3])}, ...",
            )
        return numbers

    def _fault(self, label: int, reason: str) -> UserError:
        """Returns the error for entry `label` of `labels`."""
        image = int(np.searchsorted(self.label_starts, label, "right")) - 1
        return _line_fault(self.file, int(self.lines[image]), reason)


def read_label_file(file: str, root: str) -> LabelFile:
    """Reads a label file; its paths are relative to the folder `root`.

    A missing image is reported only when it is read.

    Raises:
      UserError: the file or folder does not exist, or a line (named by its number) is invalid.
    """
    root = find_root(root, f"dataset.label_file={file} has paths relative to it")
    file = find_file("dataset.label_file", file)
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
                    encoded = encode(image.path)
                    label_type = type(image.labels[0]) if image.labels else kind
                    if kind not in (None, label_type):
                        raise ValueError("labels are names in some lines and numbers in others")
                except ValueError as error:
                    raise _line_fault(file, number, str(error)) from None
                kind, several = label_type, several or image.several
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
            f"dataset.label_file={file} holds {len(lines):,} images and no label; expected lines "
            f"such as {LABEL_LINE}"
        )
    labels, hashes, split_of = (np.array(values) for values in (labels, hashes, split_of))
    names = None
    if kind is not int:  # renumber from order of appearance to sorted names
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
    for index in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
        first, second = sorted(order[index : index + 2].tolist())
        if listing.path(first) == listing.path(second):
            reason = f"{listing.path(second)!r} is already in line {lines[first]}"
            raise _line_fault(file, lines[second], reason)
    return listing


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
    """Parses a line of a label file; raises ValueError with the reason if it is invalid."""
    try:
        line = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); expected a line such as {LABEL_LINE}") from None
    if not isinstance(line, dict):
        raise ValueError(f"not an object in braces; expected a line such as {LABEL_LINE}")
    keys = ("path", "labels", "weights", "split")
    for key in line:
        check_choice("key", key, keys)
    for key in keys[:2]:
        if key not in line:
            raise ValueError(f"{key!r} is missing; expected a line such as {LABEL_LINE}")
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
        raise ValueError(f"labels {labels} contain a duplicate")
    if weights is None:
        return _LabelledImage(path, labels, [1.0] * len(labels), split, several)
    weights = weights if isinstance(weights, list) else [weights]
    if len(weights) != len(labels):
        raise ValueError(f"{len(weights)} weights for {len(labels)} labels")
    if not all(type(weight) in (int, float) and 0 <= weight <= 1 for weight in weights):
        raise ValueError(f"weights {weights} must be numbers from 0 to 1")
    return _LabelledImage(path, labels, weights, split, several)
