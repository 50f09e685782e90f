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


def check_output(flag: str, path: epath.PathLike) -> None:
    """Raises UserError where `whole` could not write, before the long work and not after it."""
    target = epath.Path(path).expanduser()
    if "://" in os.fspath(target):
        return  # a store has no folders
    if not target.parent.is_dir():
        raise UserError(f"--{flag}={path}: there is no folder {target.parent}")
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        _beside(target).touch()
        _beside(target).unlink()
    except OSError as error:
        raise UserError(
            f"--{flag}={path} cannot be written: {error.strerror}; give a file in a folder of yours"
        ) from None


def open_up(path: epath.PathLike, mode: int) -> None:
    """Gives a local file or directory that a library made for its maker alone the usual rights.

    Args:
      path: which.
      mode: 0o666 for a file, 0o777 for a directory; the process's umask is taken off.
    """
    os.umask(umask := os.umask(0))
    os.chmod(path, mode & ~umask)
