"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path to write to, which becomes `path` where nothing goes wrong."""
    path = epath.Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def open_up(path: epath.PathLike, mode: int) -> None:
    """Gives a local file or directory that a library made for its maker alone the usual rights.

    Args:
      path: which.
      mode: 0o666 for a file, 0o777 for a directory; the process's umask is taken off.
    """
    os.umask(umask := os.umask(0))
    os.chmod(path, mode & ~umask)
