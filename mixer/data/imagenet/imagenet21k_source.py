"""Reads ImageNet-21k's official files: tars of synsets, a tar of tars, or folders of images."""

import collections
import contextlib
import dataclasses
import itertools
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Container, Iterable, Iterator
from pathlib import Path, PurePosixPath

from mixer.data.imagenet import names as imagenet_names
from mixer.data.sources.folder import fault_of
from mixer.errors import UserError

# Number of synsets of each release: image-net.org's list of fall 2011; winter 2021, without most of
# the person subtree; and the synsets of winter 2021 with at least 500 images (Ridnik et al., 2021,
# "ImageNet-21K Pretraining for the Masses").
RELEASES = {"fall11": 21_841, "winter21": 19_167, "winter21_p": 10_450}
# Folders that contain a split; images outside these folders are training images.
SPLIT_FOLDERS = {
    "imagenet21k_train": "train",
    "imagenet21k_val": "validation",
    "imagenet21k_small_classes": "small_classes",
    "train": "train",
    "val": "validation",
}
MAX_IMAGE_BYTES = 128 << 20

_SYNSET = re.compile(r"n\d{8}")
_SYNSET_TAR = re.compile(r"(n\d{8})\.tar")
_DAMAGE = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)
_EXPECTED = (
    "expected a folder of nXXXXXXXX.tar files or of nXXXXXXXX folders of images, or one tar of "
    "either (fall11_whole.tar, winter21_whole.tar.gz, imagenet21k_resized.tar.gz)"
)


def synsets() -> tuple[str, ...]:
    """Returns the 21,843 WordNet ids, sorted, which is the class order of published checkpoints.

    They are the 21,841 ids of fall11 and two without images, n03931044 and n09859684.
    """
    return imagenet_names.synsets("imagenet21k")


@dataclasses.dataclass(frozen=True)
class Unit:
    """The images of one synset: a tar file, a folder, or a part of the single tar file.

    Attributes:
      split: name of the split.
      synset: WordNet id.
      path: the tar file or folder.
      part: number of the part, from 1; the images of a synset may be in several parts of a tar.
    """

    split: str
    synset: str
    path: Path
    part: int = 1

    @property
    def name(self) -> str:
        """Split, synset and, from the second on, the part, such as "train/n01440764"."""
        return f"{self.split}/{self.synset}" + (f"/{self.part}" if self.part > 1 else "")


@dataclasses.dataclass(frozen=True)
class Source:
    """The location of the images.

    Attributes:
      path: folder or tar file.
      release: a key of RELEASES.
      num_bytes: size on disk.
      units: the units in a folder; None for a tar file, whose units are known only after reading.
    """

    path: Path
    release: str
    num_bytes: int
    units: tuple[Unit, ...] | None


def find_source(source: str, release: str = "") -> Source:
    """Finds the images at `source` and detects their layout and release.

    Args:
      source: path of a folder or a tar file.
      release: a key of RELEASES; detected if empty.

    Raises:
      UserError: there is no ImageNet-21k data, a synset is unknown or occurs twice, or the release
        cannot be detected.
    """
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise UserError(f"--source={source}: no such file or folder; {_EXPECTED}")
    units = None
    if path.is_dir():
        path, units = _look_into(path)
    if units is None:
        if fault := fault_of(path):
            raise UserError(f"--source={path}: {fault}; {_EXPECTED}")
        _open_tar(path).close()
        num_bytes = path.stat().st_size
    else:
        _refuse_unknown(path, {unit.synset for unit in units})
        twice = [name for name, n in collections.Counter(u.name for u in units).items() if n > 1]
        if twice:
            raise UserError(
                f"{path} contains {twice[0]} both as a tar file and as a folder; remove one"
            )
        num_bytes = sum(_size(unit.path) for unit in units)
    return Source(path, release or _find_release(path, units), num_bytes, units)


def _look_into(path: Path) -> tuple[Path, tuple[Unit, ...] | None]:
    """Returns the folder that contains synsets and its units, or the single tar file to read."""
    while True:
        children = sorted(c for c in path.iterdir() if not c.name.startswith("."))
        folders = [child for child in children if child.is_dir()]
        units = _units_in(children, SPLIT_FOLDERS.get(path.name, "train"))
        for folder in folders:
            if folder.name in SPLIT_FOLDERS:
                units += _units_in(sorted(folder.iterdir()), SPLIT_FOLDERS[folder.name])
        if units:
            return path, tuple(units)
        tars = [c for c in children if c.name.endswith((".tar", ".tar.gz", ".tgz"))]
        if len(tars) == 1:
            return tars[0], None
        if len(folders) != 1 or tars:
            raise UserError(f"--source={path} contains no synsets; {_EXPECTED}")
        path = folders[0]  # the top folder of an archive


def _units_in(children: Iterable[Path], split: str) -> list[Unit]:
    units = []
    for child in children:
        tar = _SYNSET_TAR.fullmatch(child.name)
        if tar and child.is_file():
            units.append(Unit(split, tar[1], child))
        elif _SYNSET.fullmatch(child.name) and child.is_dir():
            units.append(Unit(split, child.name, child))
    return units


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    with os.scandir(path) as entries:
        return sum(entry.stat().st_size for entry in entries)


def _refuse_unknown(path: Path, names: Iterable[str]) -> None:
    unknown = sorted(set(names).difference(synsets()))
    if unknown:
        raise UserError(
            f"{path} contains unknown synsets: {', '.join(unknown[:5])}; expected the "
            f"{len(synsets()):,} synsets of ImageNet-21k (remove the others)"
        )


def _find_release(path: Path, units: tuple[Unit, ...] | None) -> str:
    names = [path.name]
    if units is None:
        with _open_tar(path) as tar, contextlib.suppress(*_DAMAGE):
            names += next(_files(tar)).name.split("/")
    elif any(unit.path.parent != path for unit in units):
        return "winter21_p"
    elif len(units) > RELEASES["winter21"]:
        return "fall11"
    else:
        names.append(path.resolve().parent.name)
    if any("imagenet21k_" in name for name in names):
        return "winter21_p"
    for release in ("winter21_p", "winter21", "fall11"):
        if any(release in name for name in names):
            return release
    raise UserError(
        f"--source={path}: the names do not identify the release; pass --release="
        f"{' or --release='.join(RELEASES)}"
    )


class _TarInfo(tarfile.TarInfo):
    """A member's header; raises an error if the header is damaged or missing.

    tarfile treats both as the regular end of the file, which is a block of zeros.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            reason = "the end is missing" if not buf else f"a header is damaged ({error})"
            raise tarfile.ReadError(reason) from None


def _open_tar(path: Path) -> tarfile.TarFile:
    """Opens a tar file: with random access if it is uncompressed, else as a stream."""
    options = dict(tarinfo=_TarInfo, bufsize=1 << 20)
    try:
        with open(path, "rb") as file:
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"))
        return tarfile.open(path, "r|*" if packed else "r:", **options)
    except _DAMAGE as error:
        raise UserError(f"--source={path} is not a tar file: {error}; {_EXPECTED}") from None


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of a tar; read each file before requesting the next."""
    while (info := tar.next()) is not None:
        tar.members.clear()  # tarfile would keep gigabytes of headers for 14 million files
        if info.isfile() and not PurePosixPath(info.name).name.startswith("."):
            yield info


@dataclasses.dataclass(frozen=True)
class Member:
    """An unmodified image of the source; `data` is None if the file is too large."""

    unit: Unit
    name: str
    data: bytes | None
    size: int  # bytes in the source


@dataclasses.dataclass(frozen=True)
class Fault:
    """A skipped image, or with member "" the skipped rest of a synset or of the source."""

    split: str
    synset: str
    member: str
    reason: str


@dataclasses.dataclass(frozen=True)
class End:
    """The end of a synset's images."""

    unit: str


def events(source: Source, finished: Container[str]) -> Iterator[Member | Fault | End]:
    """Yields the images and faults of all units that are not finished, and the end of each unit."""
    units = _archive_units(source.path) if source.units is None else _folder_units(source.units)
    name = "it"
    try:
        for unit, members in units:
            name = unit.name
            if name in finished:
                continue
            count = 0
            try:
                for member in members:
                    yield member
                    count += 1
                if not count:
                    yield Fault(unit.split, unit.synset, "", "contains no images")
            except _DAMAGE as error:
                reason = f"damaged after {count} images: {error}"
                yield Fault(unit.split, unit.synset, "", reason)
            yield End(name)
    except _DAMAGE as error:
        yield Fault("", "", "", f"{source.path} is damaged after {name}: {error}")
    except OSError as error:
        raise UserError(
            f"{source.path}: reading failed after {name}: {error.strerror}; the same command "
            "continues from there"
        ) from error


def _folder_units(units: Iterable[Unit]) -> Iterator[tuple[Unit, Iterator[Member]]]:
    for unit in units:
        yield unit, (_folder_members if unit.path.is_dir() else _tar_members)(unit)


def _folder_members(unit: Unit) -> Iterator[Member]:
    with os.scandir(unit.path) as entries:
        files = sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))
    for name in files:
        path = unit.path / name
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_IMAGE_BYTES else None
        yield Member(unit, _text(name), data, size)


def _tar_members(unit: Unit) -> Iterator[Member]:
    with tarfile.open(unit.path, "r:", tarinfo=_TarInfo) as tar:
        for info in _files(tar):
            yield _member(tar, info, unit)


def _archive_units(path: Path) -> Iterator[tuple[Unit, Iterator[Member]]]:
    """Yields the synsets of a tar of `[.../]nXXXXXXXX.tar` or of `[.../]nXXXXXXXX/image`."""
    parts = collections.Counter()
    with _open_tar(path) as tar:
        for (split, synset, nested), infos in itertools.groupby(_files(tar), _place):
            if not synset:
                continue
            _refuse_unknown(path, [synset])
            parts[split, synset] += 1
            unit = Unit(split, synset, path, parts[split, synset])
            if nested:
                yield unit, _nested_members(tar, next(infos), unit)
            else:
                yield unit, (_member(tar, info, unit) for info in infos)
    if not parts:
        raise UserError(f"--source={path} contains no synsets; {_EXPECTED}")


def _place(info: tarfile.TarInfo) -> tuple[str, str, str]:
    """Returns the split, the synset ("" if there is none) and, for a synset's tar, its name."""
    *folders, name = PurePosixPath(info.name).parts
    split = next((SPLIT_FOLDERS[f] for f in folders if f in SPLIT_FOLDERS), "train")
    if tar := _SYNSET_TAR.fullmatch(name):
        return split, tar[1], info.name
    return split, next((f for f in reversed(folders) if _SYNSET.fullmatch(f)), ""), ""


def _nested_members(outer: tarfile.TarFile, info: tarfile.TarInfo, unit: Unit) -> Iterator[Member]:
    with tarfile.open(
        fileobj=outer.extractfile(info), mode="r|", tarinfo=_TarInfo, bufsize=1 << 20
    ) as tar:
        for member in _files(tar):
            yield _member(tar, member, unit)


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, unit: Unit) -> Member:
    data = tar.extractfile(info).read() if info.size <= MAX_IMAGE_BYTES else None
    size = info.size + tarfile.BLOCKSIZE + -info.size % tarfile.BLOCKSIZE
    return Member(unit, _text(PurePosixPath(info.name).name), data, size)


def _text(name: str) -> str:
    """Returns the name with non-UTF-8 bytes escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
