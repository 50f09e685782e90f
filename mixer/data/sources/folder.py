"""Lists the examples in a folder of images.

The layout is `<split>/<class>/<image>`, or `<class>/<image>`, which is one split "train".

The class list is the sorted union over all splits, so a class that is missing in one split does not
shift labels.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mixer.errors import UserError, first_line, printable
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
LAYOUT = (
    "a folder of images is laid out as <split>/<class>/<image>, as in train/cat/0001.jpg, or as "
    "<class>/<image>, as in cat/0001.jpg"
)
# Names of splits, in order of preference for each use.
TRAIN_SPLIT, VAL_SPLITS, TEST_SPLIT = "train", ("val", "valid", "validation"), "test"
SPLIT_NAMES = frozenset((TRAIN_SPLIT, *VAL_SPLITS, TEST_SPLIT))


def encode(name: str) -> bytes:
    """Returns the bytes of a file name, including undecodable bytes."""
    return name.encode("utf-8", "surrogateescape")


def decode(name: bytes) -> str:
    """Returns the text of a file name, with non-UTF-8 bytes escaped as four characters."""
    return name.decode("utf-8", "backslashreplace")


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
    """Returns whether `path` is a URL of an object store, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def find_file(key: str, path: str) -> epath.Path:
    """Returns the file that the user passed as `key`; UserError if it is not a readable file."""
    file = parse_path(key, path)
    if not is_remote(file) and (fault := fault_of(os.fspath(file))):
        raise UserError(f"{key}={printable(path)} cannot be read: {fault}")
    return file


@contextlib.contextmanager
def _naming(path: bytes) -> Iterator[None]:
    """Turns an OSError into a UserError with the path of the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(decode(path))} cannot be read: {error.strerror}") from None


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
    queue = collections.deque([inside])
    while queue:
        folder = queue.popleft()
        identity = _identity(root, folder)
        if identity in identities:
            continue
        identities.add(identity)
        listing = list_folder(root, folder)
        for name, fault in listing.files:
            yield _join(folder, name), fault
        queue.extend(_join(folder, name) for name, is_link in listing.folders if is_link)
        queue.extendleft(
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
      is_flat: whether the layout is `<class>/<image>`.
      hint: why the layout is not `<class>/<image>`, if it looks like it; else "".
    """

    root: epath.Path
    class_names: tuple[str, ...]
    files: dict[str, list[bytes]]
    faults: dict[bytes, str]
    remarks: tuple[str, ...]
    nested: int
    is_flat: bool
    hint: str

    def labels(self, files: Sequence[bytes], class_names: Sequence[str]) -> np.ndarray:
        """Returns the class numbers (n,) int32 of `files` in the list `class_names`."""
        indices = {name: index for index, name in enumerate(class_names)}
        folders = [_class_of(file, self.is_flat) for file in files]
        names = set(folders)
        numbers = {name: indices[decode(name)] for name in names if decode(name) in indices}
        if unknown := sorted(map(decode, names - set(numbers))):
            raise UserError(
                f"{printable(str(self.root))} contains classes that the run was not trained on: "
                f"{unknown[:EXAMPLES]}; expected the run's {len(class_names)} classes, "
                f"{listed(class_names)}"
            )
        return np.array([numbers[folder] for folder in folders], np.int32)


def _class_of(file: bytes, is_flat: bool) -> bytes:
    return file.split(b"/", 2)[0 if is_flat else 1]


def listed(names: Iterable[str]) -> str:
    """Returns the first few names for a message."""
    names = list(names)
    ending = ", ..." if len(names) > EXAMPLES else ""
    return ", ".join(map(printable, names[:EXAMPLES])) + ending


class _Scan:
    """Scans the folders of a data set.

    Attributes:
      images: for each split, the images of all classes.
      class_folders: for each class, its folders in the splits that hold images.
      faults: as in `ImageFolder`.
      nested_images, stray_images, rare_images: images in subfolders of a class folder, images
        outside class folders, and images in formats that training skips.
      misplaced_splits: folders that are not a class, but a split of another data set.
      direct_files: for each folder of the root, the files directly in it, as in `Listing`.
      is_flat: whether the layout is `<class>/<image>`: no image is in a folder of a folder.
    """

    def __init__(self, root: epath.Path, subfolders: bool):
        self.root, self.subfolders = root, subfolders
        self.images: dict[bytes, list[bytes]] = {}
        self.class_folders: dict[str, list[bytes]] = {}
        self.faults: dict[bytes, str] = {}
        self.nested_images, self.stray_images, self.rare_images = [], [], []
        self.misplaced_splits: list[bytes] = []
        self.direct_files: dict[bytes, list[tuple[bytes, str]]] = {}
        top = list_folder(root, b"")
        self.stray_images += [name for name, _ in top.files if ending(name) in LISTED]
        self.splits = [name for name, _ in top.folders]
        for split in self.splits:
            self._read_split(split)
        direct = {name.partition(b"/")[0] for name in self.stray_images if b"/" in name}
        # Images in train/ and test/ only have no class.
        self.is_flat = not self.images and not {decode(name) for name in direct} <= SPLIT_NAMES
        if self.is_flat:
            self._read_flat()

    def _read_split(self, split: bytes) -> None:
        inside = list_folder(self.root, split)
        self.direct_files[split] = inside.files
        self.stray_images += [
            _join(split, name) for name, _ in inside.files if ending(name) in LISTED
        ]
        by_class = {name: self._read_class(split, name) for name, _ in inside.folders}
        if images := [image for images in by_class.values() for image in images]:
            self.images[split] = images
            for name in by_class:
                self.class_folders.setdefault(decode(name), []).append(_join(split, name))

    def _read_flat(self) -> None:
        """Reads the folders of the root as classes of one split."""
        self.stray_images = [name for name in self.stray_images if b"/" not in name]
        self.images[TRAIN_SPLIT.encode()] = images = []
        for folder, files in self.direct_files.items():
            self.class_folders[decode(folder)] = [folder]
            paths = ((_join(folder, name), fault) for name, fault in files)
            images += [file for file, fault in paths if self._is_image(file, fault)]

    def _is_image(self, file: bytes, fault: str) -> bool:
        """Returns whether training reads `file`; notes why if it cannot."""
        if ending(file) in RARE:
            self.rare_images.append(file)
        if ending(file) not in LISTED:
            return False
        if ending(file) in UNDECODABLE:
            fault = fault or "TensorFlow cannot decode its format; convert it"
        if fault:
            self.faults[file] = fault
        return True

    def _read_class(self, split: bytes, name: bytes) -> list[bytes]:
        images, nested = [], []
        for file, fault in walk(self.root, _join(split, name), skipped_folders=(b"", split)):
            if self._is_image(file, fault):
                (images if file.count(b"/") == 2 else nested).append(file)
        if self.subfolders and name in self.splits and len(nested) > len(images):
            self.misplaced_splits.append(_join(split, name))  # as in backup/train/cat/1.jpg
        self.nested_images += nested
        return images + nested if self.subfolders else images

    def hint(self) -> str:
        """Returns the `hint` of `ImageFolder`."""
        direct = [name for name in self.stray_images if b"/" in name]
        if not direct or SPLIT_NAMES & set(map(decode, self.images)):
            return ""
        deep = next(iter(self.images.values()))[0]
        return (
            f"; {printable(decode(deep))} makes the layout <split>/<class>/<image>: for "
            f"<class>/<image>, as in {printable(decode(direct[0]))}, move it into a class folder"
        )

    def remarks(self) -> tuple[str, ...]:
        """Returns lines for the user on possible mistakes in the layout."""
        nested = "read as images of the class"
        if not self.subfolders:
            nested = "left out, as when this run was started"
        return tuple(
            f"{len(images):,} {description}, such as {printable(decode(images[0]))}, are {fate}"
            for images, description, fate in (
                (self.nested_images, "images in subfolders of a class folder", nested),
                (self.stray_images, "images outside of class folders", "left out"),
                (self.rare_images, "images of other formats", f"left out; expected {ACCEPTED}"),
            )
            if images
        )


def _in_order(images: list[bytes]) -> list[bytes]:
    """Sorts by a hash of the name, so that adding an image does not reorder the others."""
    return sorted(images, key=_digest)


def _digest(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=16).digest()


def _stratified(images: list[bytes]) -> list[bytes]:
    """Sorts images `<class>/<image>` so that every class is spread evenly over the list.

    Image i of the n images of a class, in the order of `_in_order`, is at (i + u) / n of the list
    (systematic sampling), so a part of the list has the same share of every class, to one image. u
    in [0, 1) is a hash of the class's name: small classes do not all miss the same part.
    """
    images = _in_order(images)
    classes = [file.partition(b"/")[0] for file in images]
    counts, positions = collections.Counter(classes), []
    ranks = {name: int.from_bytes(_digest(name)[:4], "big") / 2**32 for name in counts}
    for name in classes:
        positions.append(ranks[name] / counts[name])
        ranks[name] += 1
    order = sorted(range(len(images)), key=positions.__getitem__)  # stable: ties keep their order
    return [images[index] for index in order]


def scan(root: str, *, subfolders: bool = True) -> ImageFolder:
    """Lists the images under `root`.

    Args:
      root: the folder, with the layout `<split>/<class>/<image>` or `<class>/<image>`.
      subfolders: whether to read images in subfolders of a class folder. Runs that older code
        started do not.

    Raises:
      UserError: the folder does not exist or has another layout, or a class has no image.
    """
    tree = _Scan(find_root(root, LAYOUT), subfolders)
    shown = printable(str(tree.root))
    if tree.misplaced_splits:
        raise UserError(
            f"{shown}: {listed(map(decode, tree.misplaced_splits))}: the name of a split in the "
            f"place of a class; {LAYOUT} (move a second data set out of this folder)"
        )
    if not tree.images:
        other_images = tree.stray_images + tree.rare_images
        hint = f" (not as {printable(decode(other_images[0]))})" if other_images else ""
        raise UserError(f"{shown} contains no images ({ACCEPTED}) of a class; {LAYOUT}{hint}")
    names = {
        decode(_class_of(image, tree.is_flat))
        for images in tree.images.values()
        for image in images
    }
    if empty := sorted(set(tree.class_folders) - names):
        folders = [decode(folder) for name in empty for folder in tree.class_folders[name]]
        raise UserError(
            f"{shown}: {len(empty)} of {len(tree.class_folders)} classes have no image in any "
            f"split: {listed(folders)}; put images ({ACCEPTED}) into these folders, or remove them"
        )
    sort = _stratified if tree.is_flat else _in_order
    return ImageFolder(
        root=tree.root,
        class_names=tuple(sorted(names)),
        files={decode(split): sort(images) for split, images in tree.images.items()},
        faults=tree.faults,
        remarks=tree.remarks(),
        nested=len(tree.nested_images),
        is_flat=tree.is_flat,
        hint=tree.hint(),
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
        raise UserError(f"dataset.data_dir={printable(path)} cannot be read: {reason}") from None
    if not is_folder:
        raise UserError(
            f"dataset.data_dir={printable(str(root))} is not a folder; {layout}; if the data has "
            "moved, pass --data_dir (evaluate.py and inspect)"
        )
    return root
