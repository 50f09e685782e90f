"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from mixer.errors import UserError


def _beside(path: epath.Path) -> epath.Path:
    return path.with_name(f".{path.name}.{os.getpid()}.new")


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path to write to, which becomes `path` where nothing goes wrong."""
    path = epath.Path(path).expanduser()
    new = _beside(path)
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a directory to fill, which becomes `path` where nothing goes wrong."""
    path = epath.Path(path).expanduser()
    new = _beside(path)
    try:
        new.mkdir()
        yield new
        new.rename(path)
    finally:
        if new.exists():
            new.rmtree()


def check_output(what: str, path: epath.PathLike) -> epath.Path:
    """The path of a file to be written, expanded; before the long work and not after it.

    Args:
      what: that names it, such as "--output"; "" where the path is an argument by itself.
      path: as it was given.

    Raises:
      UserError: neither `whole` nor `whole_directory` could write there.
    """
    target = epath.Path(path).expanduser()
    name = f"{what}={path}" if what else str(path)
    if "://" in os.fspath(target):
        return target  # a store has no folders
    if not target.parent.is_dir():
        raise UserError(f"{name}: there is no folder {target.parent}")
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError(None, "it is a folder" if target.is_dir() else "it is a device")
        _beside(target).touch()
        _beside(target).unlink()
    except OSError as error:
        raise UserError(
            f"{name} cannot be written: {error.strerror}; give a file in a folder of yours"
        ) from None
    return target


def make_output_directory(what: str, path: epath.PathLike) -> epath.Path:
    """The path of a directory of results, expanded and made; before the long work.

    Args:
      what: as for `check_output`.
      path: as it was given.

    Raises:
      UserError: it cannot be made, or not be written to.
    """
    target = epath.Path(path).expanduser()
    name = f"{what}={path}" if what else str(path)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if "://" not in os.fspath(target):
            _beside(target / "x").touch()
            _beside(target / "x").unlink()
    except OSError as error:
        raise UserError(
            f"{name} cannot be made, or written to: {error.strerror}; give a folder of yours"
        ) from None
    return target


def open_up(path: epath.PathLike, mode: int) -> None:
    """Gives a local file or directory that a library made for its maker alone the usual rights.

    Args:
      path: which.
      mode: 0o666 for a file, 0o777 for a directory; the process's umask is taken off.
    """
    os.umask(umask := os.umask(0))
    os.chmod(path, mode & ~umask)
