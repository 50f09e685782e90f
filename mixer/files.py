"""Checks paths, and reads and writes files and directories atomically."""

import contextlib
import os
import re
from collections.abc import Iterator

from etils import epath

from mixer.errors import UserError, printable, reason_of

STORES = ("gs", "s3", "az")  # schemes of cloud storage that etils.epath reads


def parse_path(option: str, path: epath.PathLike) -> epath.Path:
    """Checks and expands a path or URL that a user passed.

    Args:
      option: the option with the path, such as "--output"; "" for a positional argument.
      path: the path that the user passed.

    Raises:
      UserError: the text is not a valid path or URL.
    """
    text = os.fspath(path)
    name = f"{option}={printable(text)}" if option else printable(text)
    scheme, separator, remainder = text.partition("://")
    if separator and scheme not in STORES:
        hint = ""
        if scheme == "file":
            hint = f"; use {option}={remainder}" if option else f"; use {remainder}"
        raise UserError(
            f"{name}: {scheme}:// is not supported; expected a path, or a URL that starts with "
            f"{', '.join(f'{store}://' for store in STORES)}{hint}"
        )
    if separator and not remainder.strip("/"):
        raise UserError(f"{name}: expected a bucket, as in {scheme}://BUCKET/PATH")
    if "\0" in text:
        raise UserError(f"{name}: expected a path without a null character")
    return epath.Path(path).expanduser()


@contextlib.contextmanager
def storage_errors(path: epath.PathLike, problem: str, hint: str = "") -> Iterator[None]:
    """Turns an error of a disk or an object store into a UserError: problem, reason and hint.

    Object stores raise exceptions of their own classes. For a local path, an exception other than
    OSError is a bug and passes through unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "://" not in os.fspath(path):
            raise
        raise UserError(f"{problem}: {reason_of(error)}{hint}") from error


def _temporary_path(path: epath.Path) -> epath.Path:
    return path.with_name(f".{path.name}.{os.getpid()}.new")


@contextlib.contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary path to write to, which is renamed to `path` on success."""
    path = epath.Path(path).expanduser()
    temporary = _temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: epath.Path, text: str) -> None:
    """Writes text as UTF-8; escapes lone surrogates as JSON does."""
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def remove_unfinished(directory: epath.Path) -> None:
    """Removes the temporary files that killed processes left in a local directory."""
    if "://" in os.fspath(directory):
        return  # unfinished writes to an object store leave no files
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
        return isinstance(error, PermissionError)  # the process of another user is alive
    return True


@contextlib.contextmanager
def atomic_directory(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary directory to fill, which is renamed to `path` on success."""
    path = epath.Path(path).expanduser()
    temporary = _temporary_path(path)
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    finally:
        if temporary.exists():
            temporary.rmtree()


def check_output(option: str, path: epath.PathLike) -> epath.Path:
    """Checks, before a long computation, that a file can be written; returns its expanded path.

    Args:
      option: the option with the path, such as "--output"; "" for a positional argument.
      path: the path that the user passed.

    Raises:
      UserError: the path cannot be written to.
    """
    target = parse_path(option, path)
    name = f"{option}={path}" if option else str(path)
    if "://" in os.fspath(target):
        return target  # an object store has no folders
    if not target.parent.is_dir():
        raise UserError(f"{name}: no folder {target.parent}; expected a file in an existing folder")
    hint = "; expected a file in a writable folder"
    with storage_errors(target, f"{name} cannot be written", hint):
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError(None, "it is a folder" if target.is_dir() else "it is a device")
        _temporary_path(target).touch()
        _temporary_path(target).unlink()
    return target


def make_directory(path: epath.PathLike, option: str = "") -> epath.Path:
    """Creates a writable directory before a long computation; returns its expanded path.

    Args:
      path: the path that the user passed.
      option: the option with the path, such as "--output"; "" for a positional argument.

    Raises:
      UserError: the directory cannot be created or written to.
    """
    target = parse_path(option, path)
    name = f"{option}={path}" if option else str(path)
    problem = f"{name} cannot be created or written to"
    with storage_errors(target, problem, "; expected a writable folder"):
        target.mkdir(parents=True, exist_ok=True)
        if "://" not in os.fspath(target):
            _temporary_path(target / "x").touch()
            _temporary_path(target / "x").unlink()
    return target


def identity(path: epath.PathLike) -> tuple[int, int] | None:
    """Returns the identity of a local file or directory; None if it does not exist.

    A file that replaces another one has a different identity.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def check_identity(path: epath.PathLike, expected: tuple[int, int]) -> None:
    """Raises UserError unless `path` still is the file or directory with the given identity."""
    if (current := identity(path)) != expected:
        fault = "is gone" if current is None else "is a different one now"
        raise UserError(
            f"{path} {fault}: it was removed or replaced while the run was writing to it; the run "
            "cannot continue there"
        )


def set_default_permissions(path: epath.PathLike, mode: int) -> None:
    """Gives default permissions to a file or directory that a library created as private.

    Args:
      path: a local file or directory.
      mode: 0o666 for a file, 0o777 for a directory; the umask of the process is applied.
    """
    os.umask(umask := os.umask(0))
    os.chmod(path, mode & ~umask)


def read_regular(path: epath.PathLike) -> bytes | None:
    """Returns the bytes of a file; None if it does not exist.

    Raises:
      UserError: the path is a directory, a device or a pipe, or the file cannot be read.
    """
    path = epath.Path(path)
    with storage_errors(path, f"{path} cannot be read"):
        if not path.exists():
            return None
        is_local = "://" not in os.fspath(path)
        if path.is_dir() or (is_local and not os.path.isfile(path)):
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise UserError(f"{path} is {kind}; expected a file")
        return path.read_bytes()
