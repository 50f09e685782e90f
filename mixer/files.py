"""Files that are whole or not there."""

import contextlib
import os
import re
from collections.abc import Iterator

from etils import epath

from mixer.errors import UserError, first_line, printable

STORES = ("gs", "s3", "az")  # schemes of cloud storage that etils.epath reads


def parse_path(what: str, path: epath.PathLike) -> epath.Path:
    """The path or address that a user gave, expanded.

    Args:
      what: that names it, such as "--output"; "" where the path is an argument by itself.
      path: as it was given.

    Raises:
      UserError: it can be none.
    """
    text = os.fspath(path)
    name = f"{what}={printable(text)}" if what else printable(text)
    scheme, separator, rest = text.partition("://")
    if separator and scheme not in STORES:
        hint = ""
        if scheme == "file":
            hint = f"; write {what}={rest}" if what else f"; write {rest}"
        raise UserError(
            f"{name}: {scheme}:// is not read or written; expected a path, or an address in "
            f"{', '.join(f'{store}://' for store in STORES)}{hint}"
        )
    if separator and not rest.strip("/"):
        raise UserError(f"{name}: expected a bucket, as in {scheme}://BUCKET/PATH")
    if "\0" in text:
        raise UserError(f"{name}: expected a path, without a null character")
    return epath.Path(path).expanduser()


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


def write_text(path: epath.Path, text: str) -> None:
    """Writes UTF-8; lone surrogates, which it has no bytes for, as JSON writes them."""
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def remove_unfinished(directory: epath.Path) -> None:
    """Removes what processes that were killed in `whole` have left in a local directory."""
    if "://" in os.fspath(directory):
        return  # a writer to a store leaves nothing behind
    for path in directory.iterdir():
        name = re.fullmatch(r"\..+\.([0-9]{1,9})\.new", path.name)
        if name and not _is_another_alive(int(name[1])) and path.is_file():
            path.unlink(missing_ok=True)


def _is_another_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except OSError as error:
        return isinstance(error, PermissionError)  # it lives, and is another user's
    return True


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
    target = parse_path(what, path)
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


def make_directory(path: epath.PathLike, flag: str = "") -> epath.Path:
    """Makes a directory that can be written to, before the long work; returns its expanded path.

    Args:
      path: as the user gave it.
      flag: the flag that gave it, such as "--output"; "" if no flag did.

    Raises:
      UserError: the directory cannot be made, or not be written to.
    """
    target = parse_path(flag, path)
    is_address = "://" in os.fspath(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not is_address:
            _beside(target / "x").touch()
            _beside(target / "x").unlink()
    except Exception as error:
        if not isinstance(error, OSError) and not is_address:
            raise  # the client of an object store has exceptions of its own
        name = f"{flag}={path}" if flag else str(path)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{name} cannot be made, or written to: {reason}; give a folder of yours"
        ) from None
    return target


def identity(path: epath.PathLike) -> tuple[int, int] | None:
    """What tells a local file or directory from one made later under its name; None: no such."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def open_up(path: epath.PathLike, mode: int) -> None:
    """Gives a local file or directory that a library made for its maker alone the usual rights.

    Args:
      path: which.
      mode: 0o666 for a file, 0o777 for a directory; the process's umask is taken off.
    """
    os.umask(umask := os.umask(0))
    os.chmod(path, mode & ~umask)


def read_regular(path: epath.PathLike) -> bytes | None:
    """The bytes of a file, None where there is none.

    Raises:
      UserError: it is a directory, a device or a pipe, or cannot be read; a store does not answer.
    """
    path = epath.Path(path)
    try:
        if not path.exists():
            return None
        is_local = "://" not in os.fspath(path)
        if path.is_dir() or (is_local and not os.path.isfile(path)):
            kind = "a directory" if path.is_dir() else "no regular file"
            raise UserError(f"{path} is {kind}; expected a file")
        return path.read_bytes()
    except Exception as error:
        if not isinstance(error, OSError) and "://" not in os.fspath(path):
            raise  # a store's client has exceptions of its own
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}") from error
