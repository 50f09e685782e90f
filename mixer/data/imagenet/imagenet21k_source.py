"""The official files of ImageNet-21k: tars of synsets, a tar of those, or folders of images."""

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

# Synsets of each release: those of image-net.org's list of fall 2011, those left in winter 2021
# without most of the person subtree, and those of them with 500 images or more (Ridnik et al.,
# 2021, "ImageNet-21K Pretraining for the Masses").
RELEASES = {"fall11": 21_841, "winter21": 19_167, "winter21_p": 10_450}
# Folders that stand for a split; images outside of them are training images.
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
    """The 21,843 WordNet ids in the class order of the published checkpoints, all ids sorted.

    They are the 21,841 of fall11 and two that have no images, n03931044 and n09859684.
    """
    return imagenet_names.synsets("imagenet21k")


@dataclasses.dataclass(frozen=True)
class Unit:
    """The images of one synset: a tar file or a folder."""

    split: str
    synset: str
    path: Path

    @property
    def name(self) -> str:
        """Such as "train/n01440764"."""
        return f"{self.split}/{self.synset}"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the images are.

    Attributes:
      path: folder or tar file.
      release: a key of RELEASES.
      num_bytes: size on disk.
      units: what a folder holds; None for a tar file, which tells only as it is read.
    """

    path: Path
    release: str
    num_bytes: int
    units: tuple[Unit, ...] | None


def find_source(source: str, release: str = "") -> Source:
    """Looks what is at `source`.

    Args:
      source: path of a folder or a tar file.
      release: a key of RELEASES; found by looking if empty.

    Raises:
      UserError: nothing of ImageNet-21k is there, a synset is unknown or there twice, or the
        release can not be told.
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
            raise UserError(f"{path} holds {twice[0]} as a tar file and as a folder; take one away")
        num_bytes = sum(_size(unit.path) for unit in units)
    return Source(path, release or _find_release(path, units), num_bytes, units)


def _look_into(path: Path) -> tuple[Path, tuple[Unit, ...] | None]:
    """The folder that holds synsets and what it holds, or the one tar file to read."""
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
            raise UserError(f"--source={path}: no synset in it; {_EXPECTED}")
        path = folders[0]  # an archive's own top folder


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
            f"{path} holds {', '.join(unknown[:5])}: none of the {len(synsets()):,} synsets of "
            "ImageNet-21k; take it away"
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
        f"--source={path}: cannot tell the release by its names; give --release="
        f"{' or --release='.join(RELEASES)}"
    )


class _TarInfo(tarfile.TarInfo):
    """A member's header; one that is damaged or missing ends the file with an error.

    tarfile takes both for the proper end, which is a block of zeros.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            reason = "the end is missing" if not buf else f"a damaged header ({error})"
            raise tarfile.ReadError(reason) from None


def _open_tar(path: Path) -> tarfile.TarFile:
    """Opens a tar file: by seeking where it is plain, else as a stream."""
    options = dict(tarinfo=_TarInfo, bufsize=1 << 20)
    try:
        with open(path, "rb") as file:
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"))
        return tarfile.open(path, "r|*" if packed else "r:", **options)
    except _DAMAGE as error:
        raise UserError(f"--source={path} is no tar file: {error}; {_EXPECTED}") from None


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar; read each before the next is asked for."""
    while (info := tar.next()) is not None:
        tar.members.clear()  # tarfile keeps them all: gigabytes in a tar of 14 million
        if info.isfile() and not PurePosixPath(info.name).name.startswith("."):
            yield info


@dataclasses.dataclass(frozen=True)
class Member:
    """An image as it is in the source; `data` is None where it is too large to be one."""

    split: str
    synset: str
    name: str
    data: bytes | None
    size: int  # what it takes of the source


@dataclasses.dataclass(frozen=True)
class Fault:
    """What was left out: an image, or with member "" the rest of a synset or of the source."""

    split: str
    synset: str
    member: str
    reason: str


@dataclasses.dataclass(frozen=True)
class End:
    """The end of the synset's images."""

    unit: str


_Opened = tuple[str, str, str, Iterator[Member]]  # unit, split, synset, its images


def events(source: Source, done: Container[str]) -> Iterator[Member | Fault | End]:
    """All images of the units that are not done, their faults, and the end of each unit."""
    units = _archive_units(source.path) if source.units is None else _folder_units(source.units)
    unit = "it"
    try:
        for unit, split, synset, members in units:
            if unit in done:
                continue
            count = 0
            try:
                for member in members:
                    yield member
                    count += 1
                if not count:
                    yield Fault(split, synset, "", "holds no images")
            except _DAMAGE as error:
                yield Fault(split, synset, "", f"damaged after {count} images: {error}")
            yield End(unit)
    except _DAMAGE as error:
        yield Fault("", "", "", f"{source.path} is damaged after {unit}: {error}")
    except OSError as error:
        raise UserError(
            f"{source.path}: reading failed after {unit}: {error.strerror}; the same command goes "
            "on from there"
        ) from error


def _folder_units(units: Iterable[Unit]) -> Iterator[_Opened]:
    for unit in units:
        read = _folder_members if unit.path.is_dir() else _tar_members
        yield unit.name, unit.split, unit.synset, read(unit)


def _folder_members(unit: Unit) -> Iterator[Member]:
    with os.scandir(unit.path) as entries:
        files = sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))
    for name in files:
        path = unit.path / name
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_IMAGE_BYTES else None
        yield Member(unit.split, unit.synset, _text(name), data, size)


def _tar_members(unit: Unit) -> Iterator[Member]:
    with tarfile.open(unit.path, "r:", tarinfo=_TarInfo) as tar:
        for info in _files(tar):
            yield _member(tar, info, unit.split, unit.synset)


def _archive_units(path: Path) -> Iterator[_Opened]:
    """Synsets of a tar of tars, `[.../]nXXXXXXXX.tar`, or of folders, `[.../]nXXXXXXXX/image`."""
    runs = collections.Counter()
    with _open_tar(path) as tar:
        for (split, synset, nested), infos in itertools.groupby(_files(tar), _place):
            if not synset:
                continue
            _refuse_unknown(path, [synset])
            runs[split, synset] += 1
            run = runs[split, synset]  # a synset's images may lie in several places
            unit = f"{split}/{synset}" + (f"/{run}" if run > 1 else "")
            if nested:
                yield unit, split, synset, _nested_members(tar, next(infos), split, synset)
            else:
                yield unit, split, synset, (_member(tar, i, split, synset) for i in infos)
    if not runs:
        raise UserError(f"--source={path}: no synset in it; {_EXPECTED}")


def _place(info: tarfile.TarInfo) -> tuple[str, str, str]:
    """Split, synset ("" where it belongs to none) and, for a synset's tar, its name."""
    *folders, name = PurePosixPath(info.name).parts
    split = next((SPLIT_FOLDERS[f] for f in folders if f in SPLIT_FOLDERS), "train")
    if tar := _SYNSET_TAR.fullmatch(name):
        return split, tar[1], info.name
    return split, next((f for f in reversed(folders) if _SYNSET.fullmatch(f)), ""), ""


def _nested_members(
    outer: tarfile.TarFile, info: tarfile.TarInfo, split: str, synset: str
) -> Iterator[Member]:
    with tarfile.open(
        fileobj=outer.extractfile(info), mode="r|", tarinfo=_TarInfo, bufsize=1 << 20
    ) as tar:
        for member in _files(tar):
            yield _member(tar, member, split, synset)


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, split: str, synset: str) -> Member:
    data = tar.extractfile(info).read() if info.size <= MAX_IMAGE_BYTES else None
    size = info.size + tarfile.BLOCKSIZE + -info.size % tarfile.BLOCKSIZE
    return Member(split, synset, _text(PurePosixPath(info.name).name), data, size)


def _text(name: str) -> str:
    """The name with bytes that are no UTF-8 written out."""
    return name.encode("utf-8", "backslashreplace").decode()
