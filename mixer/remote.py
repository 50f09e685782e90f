"""Weights from elsewhere: fetched once into a cache, whole or not at all.

`https://`, `http://`, `gs://`, `hf://owner/name[/file]` and the short names of
`mixer.published.CHECKPOINTS`. The cache is `$XDG_CACHE_HOME/mixer` or `~/.cache/mixer`, with a
folder for each address, in which the file keeps its name; deleting one fetches it anew. Files of
hf:// stay where huggingface_hub keeps them.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import logging
import os
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath
from rich import progress
from rich.console import Console

from mixer import files, published
from mixer.errors import UserError, first_line

ENDINGS = (".npz", ".safetensors")
TIMEOUT_SECS = 30
CHUNK_BYTES = 1 << 20
RETRIES = 3  # connections opened again for one file, each going on where the last one broke off
NOT_THERE = (403, 404, 410)  # a bucket that lists nothing answers 403 for what it does not have


def is_remote_file(path: epath.PathLike) -> bool:
    """Whether `fetch` has something to fetch: an address of a file, or a published short name.

    A `gs://` or `s3://` address without the ending of a weights file is a run, which is read in
    place.

    Raises:
      UserError: what looks like a short name is none.
    """
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return published.by_short_name(path) is not None
    return scheme in ("http", "https", "hf") or str(path).endswith(ENDINGS)


def fetch(path: epath.PathLike, *, log: Callable[[str], None]) -> epath.Path:
    """Returns a local file with what is at `path`; fetches it where it is not cached.

    The JSON beside it (its name and .json; for safetensors config.json too) comes too where there
    is one.

    Args:
      path: a local path, which is returned as it is, an address or a short name.
      log: gets a line on what was fetched, and from where.

    Raises:
      UserError: no such file, no network, no access, a file cut short, a web page in its place, a
        full disk, another kind of file, or a package that is missing.
    """
    if not is_remote_file(path):
        return epath.Path(path).expanduser()
    short = published.by_short_name(path)
    address = short.url if short else published.https_address(str(path))
    scheme, _, rest = address.partition("://")
    if scheme == "hf":
        return _fetch_from_hub(rest, log)
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name
    _check_ending(name, address)
    target = cache_dir() / hashlib.sha256(address.encode()).hexdigest()[:16] / name
    if target.exists():
        log(f"{address}: cached as {target}")
        return epath.Path(target)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may want the same file: the second waits, and finds it there. The lock
        # goes with the process that holds it, and leaves no stale file behind.
        with open(target.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _fetch_into(target, address)
                log(f"{address}: fetched {target.stat().st_size / 1e6:,.1f} MB to {target}")
    return epath.Path(target)


def _fetch_into(target: Path, address: str) -> None:
    """Fetches a file and the JSON beside it; the file gets its name once all of it is there."""
    get = _download if address.startswith(("http://", "https://")) else _copy
    try:
        with files.whole(target) as new:
            get(address, new)
            for name in () if published.find(address) else _beside(target.name):
                with contextlib.suppress(_NotThereError), files.whole(target.parent / name) as it:
                    get(_sibling(address, name), it)
    except _NotThereError as error:
        raise UserError(str(error)) from None


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/mixer`, or `~/.cache/mixer`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mixer"


def _check_ending(name: str, address: str) -> None:
    if not name.endswith(ENDINGS):
        raise UserError(
            f"{address}: weights are read from {' and '.join(ENDINGS)} files (PyTorch's .bin, .pt "
            "and .pth hold code as well as values; save them as safetensors)"
        )


def _beside(name: str) -> list[str]:
    """Names of the JSON files that may describe the weights `name`."""
    config = ["config.json"] if name.endswith(".safetensors") else []
    return [f"{name}.json", *config]


def _sibling(address: str, name: str) -> str:
    """The address of another file in the same folder; a query string stays."""
    parts = urllib.parse.urlsplit(address)
    path = parts.path.rpartition("/")[0] + "/" + urllib.parse.quote(name)
    return urllib.parse.urlunsplit(parts._replace(path=path))


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turns an error of writing into the cache into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror or error}; XDG_CACHE_HOME moves the cache"
        ) from None


class _NotThereError(Exception):
    """There is no such file, or a web page in its place."""


def _download(address: str, target: Path) -> None:
    """Downloads a file by http; a connection that breaks off is taken up where it ended."""
    with open(target, "wb") as file, _progress(target.stem) as show:
        length = _receive(address, file, show)
        for _ in range(RETRIES):
            if file.tell() == length:
                return
            _receive(address, file, show)
        if file.tell() != length:
            raise UserError(
                f"{address}: {file.tell():,} of {length:,} bytes came, and then no more in "
                f"{RETRIES + 1} attempts; try again"
            )


def _receive(address: str, file: BinaryIO, show: Callable[[int, int | None], None]) -> int:
    """Appends to `file` what it lacks of `address`; returns the length the whole should have.

    Where the connection breaks off, less is there then.
    """
    request = urllib.request.Request(address, headers={"User-Agent": "mlp-mixer-jax"})
    if file.tell():
        request.add_header("Range", f"bytes={file.tell()}-")
    with _open(request) as answer:
        if file.tell() and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.seek(0)  # this server starts from the beginning again
            file.truncate()
        if answer.headers.get_content_type() == "text/html":
            raise _NotThereError(f"{address} is a web page; give the address of the file itself")
        length = None if answer.length is None else file.tell() + answer.length
        free = shutil.disk_usage(os.path.dirname(file.name)).free
        if (answer.length or 0) > free:
            raise OSError(
                errno.ENOSPC,
                f"it has {answer.length / 1e6:,.1f} MB, and {free / 1e6:,.1f} are free",
            )
        while True:
            try:
                chunk = answer.read(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                if length is None:
                    raise UserError(f"{address}: the connection broke off: {error}") from None
                return length
            if not chunk:
                return file.tell() if length is None else length
            file.write(chunk)
            show(file.tell(), length)


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    address = request.full_url
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECS)
    except urllib.error.HTTPError as error:
        if error.code in NOT_THERE:
            raise _NotThereError(
                f"{address}: no such file, or none that may be read ({error.code} {error.reason})"
            ) from None
        raise UserError(f"{address} was refused: {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise UserError(
            f"{address} cannot be reached: {reason}; a file that was fetched elsewhere can be "
            "given by its path"
        ) from None


def _copy(address: str, target: Path) -> None:
    """Copies a file from cloud storage, with the credentials that its library finds."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    # What fails here is the storage, by errors of TensorFlow's, gcsfs's or s3fs's own.
    try:
        source = epath.Path(address)
        found = source.exists()
        if found:
            source.copy(target, overwrite=True)
            length = source.stat().length
    except ImportError as error:
        raise UserError(
            f"{address} needs TensorFlow, or pip install gcsfs (s3://: s3fs): {error}"
        ) from None
    except Exception as error:
        raise UserError(f"{address} cannot be read: {first_line(error)}") from None
    if not found:
        raise _NotThereError(f"{address}: no such file")
    if target.stat().length != length:
        raise UserError(f"{address}: {target.stat().length:,} of {length:,} bytes came; try again")


def _fetch_from_hub(rest: str, log: Callable[[str], None]) -> epath.Path:
    """Fetches hf://owner/name, that is its model.safetensors, or hf://owner/name/file."""
    parts = rest.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"hf://{rest}: expected hf://owner/name or hf://owner/name/file.npz")
    repository, name = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "model.safetensors"
    _check_ending(name, f"hf://{rest}")
    try:
        from huggingface_hub import errors, hf_hub_download, utils
    except ImportError:
        raise UserError(f"hf://{rest} needs huggingface_hub: pip install -e .[hub]") from None
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    published.refuse_other_models(repository)

    def get(file: str) -> epath.Path:
        return epath.Path(hf_hub_download(repository, file))

    try:
        path = get(name)
        folder = name.rpartition("/")[0]
        unreachable = []
        for beside in _beside(Path(name).name):
            try:
                get(f"{folder}/{beside}".lstrip("/"))
            except errors.LocalEntryNotFoundError:
                unreachable.append(beside)
            except errors.EntryNotFoundError:
                pass
    except errors.LocalEntryNotFoundError:  # a kind of EntryNotFoundError
        raise UserError(f"hf://{rest} cannot be reached, and is not in the cache") from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"hf://{repository} has no {name}; name a file that it has: hf://{repository}/FILE.npz"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"hf://{repository} asks for its terms to be accepted, and a login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"hf://{repository}: no such repository, or a private one") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"hf://{rest} cannot be read: {first_line(error)}") from None
    about = f"; whether it has {' and '.join(unreachable)} cannot be asked" if unreachable else ""
    log(f"hf://{rest}: {path}{about}")
    return path


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yields what shows how far a download is: a bar where stderr is a terminal, else nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
