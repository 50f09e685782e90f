"""Weights from elsewhere: fetched once into a cache, whole or not at all.

`https://`, `http://`, `gs://`, `hf://owner/name[/file]` and the short names of
`mixer.weights.published.CHECKPOINTS`. The cache is `$XDG_CACHE_HOME/mixer` or `~/.cache/mixer`,
with a folder for each address, in which the file keeps its name; deleting one fetches it anew.
Files of hf:// stay where huggingface_hub keeps them.

An address may hold secrets: messages, and all that is saved, have it as `published.shown` gives it.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from mixer import files
from mixer.errors import UserError, first_line
from mixer.files import STORES
from mixer.weights import download, foreign, published
from mixer.weights.foreign import ENDINGS

MAX_CARD_BYTES = 16_000_000  # of a JSON beside weights; 21,843 names of classes take one
# Parameters of a query that sign an address and say nothing of what lies there.
_SIGNATURES = re.compile(
    r"x-(amz|goog|ms|oss)-.*|(.*[-_])?(signature|token|secret|password|credential)|sig|auth"
    r"|expires|policy|key-pair-id|api_?key|(aws|oss)accesskeyid|googleaccessid",
    re.IGNORECASE,
)


def is_remote_file(path: epath.PathLike) -> bool:
    """Whether `fetch` has something to fetch: an address of a file, or a published short name.

    A `gs://` or `s3://` address without the ending of a weights file is a run, which is read in
    place.

    Raises:
      UserError: what looks like a short name is none, or an address that cannot be one.
    """
    scheme, rest = _split(path)
    if not scheme and not str(path).startswith("://"):
        return published.by_short_name(path) is not None
    if scheme in STORES:
        if not rest.partition("/")[0]:
            raise UserError(f"{path} names no bucket; expected {scheme}://BUCKET/PATH")
        return rest.endswith(ENDINGS)
    if scheme not in ("http", "https", "hf"):
        raise UserError(
            f"{published.shown(path)}: {scheme}:// is not read; expected a path of this machine, "
            f"https://, hf:// or {', '.join(f'{store}://' for store in STORES)}"
        )
    return True


def is_directory(path: epath.PathLike) -> bool:
    """Whether there is a directory at `path`, here or in cloud storage; False for a file's address.

    Raises:
      UserError: an address that cannot be one, or storage that does not answer.
    """
    return not is_remote_file(path) and _ask(path, lambda place: place.is_dir())


def exists(path: epath.PathLike) -> bool:
    """Whether there is anything at a path of this machine or of cloud storage."""
    return _ask(path, lambda place: place.exists())


def _ask(path: epath.PathLike, question: Callable[[epath.Path], bool]) -> bool:
    with _reading(path):
        place = epath.Path(path).expanduser()
        if not _split(path)[0]:
            return question(place)
        return download.run_in_time(lambda: question(place), str(path), None, download.SLOW_SECS)


def _split(path: epath.PathLike) -> tuple[str, str]:
    """The scheme in lower case, "" for a path of this machine, and the rest."""
    scheme, separator, rest = str(path).partition("://")  # as etils.epath sees it
    return (scheme.lower(), rest) if separator else ("", scheme)


def fetch(path: epath.PathLike, *, log: Callable[[str], None]) -> epath.Path:
    """Returns a local file with what is at `path`; fetches it where it is not cached.

    The JSON beside it (its name and .json; for safetensors config.json too) comes too where there
    is one.

    Args:
      path: a local path, which is returned as it is, an address or a short name.
      log: gets a line on what was fetched, and from where.

    Raises:
      UserError: no such file, no network, no access, a file cut short, a server that sends too
        slowly, a web page in its place, a full disk, another kind of file, or a package that is
        missing.
    """
    if not is_remote_file(path):
        return epath.Path(path).expanduser()
    short = published.by_short_name(path)
    address = short.url if short else published.https_address(str(path))
    scheme, rest = _split(address)
    if scheme == "hf":
        return _fetch_from_hub(rest, log)
    if scheme in ("http", "https"):
        address = download.parse_address(address)
        name = urllib.parse.unquote(urllib.parse.urlsplit(address).path)
    else:
        address = name = f"{scheme}://{rest}"
    name = name.rpartition("/")[2]
    where = published.shown(address)
    _check_ending(name, where)
    if not name.isprintable() or len(name.encode()) > 200:
        raise UserError(f"{where}: the file's name has characters, or a length, that no file has")
    target = cache_dir() / hashlib.sha256(_unsigned(address).encode()).hexdigest()[:16] / name
    with _disk_errors(target):
        if target.is_file():
            log(f"{where}: cached as {target}")
            return epath.Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may want the same file: the second waits, and finds it there. The lock
        # goes with the process that holds it, and leaves no stale file behind.
        with open(target.parent / ".lock", "w") as lock:
            _lock(lock, where, log)
            if not target.is_file():
                for stale in target.parent.glob(".*.new"):  # of a process that was killed
                    stale.unlink(missing_ok=True)
                _fetch_into(target, address)
                log(f"{where}: fetched {target.stat().st_size / 1e6:,.1f} MB to {target}")
    return epath.Path(target)


def fetch_anew(path: epath.Path) -> str:
    """How a damaged file is fetched again, as the end of a message.

    Args:
      path: the weights that `fetch` returned, or a JSON beside them.
    """
    if cache_dir() in path.parents:
        # Once the weights are gone, what is beside them is fetched too.
        weights = (file for file in path.parent.iterdir() if file.name.endswith(ENDINGS))
        path = next(weights, path)
    else:
        path = os.path.realpath(path)  # huggingface_hub has links to what it fetched
    return f"; delete {path} to fetch it anew"


def _lock(file: BinaryIO, where: str, log: Callable[[str], None]) -> None:
    """Takes the lock of a cached file, or waits for the process that has it."""
    deadline = None
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        if deadline is None:
            log(f"{where}: waiting for another process, which fetches it")
            deadline = time.monotonic() + download.MAX_SECS
        if time.monotonic() > deadline:
            raise UserError(
                f"{where}: another process has been fetching it for {download.MAX_SECS:,} s"
            )
        time.sleep(0.2)


def _fetch_into(target: Path, address: str) -> None:
    """Fetches a file and the JSON beside it; the file gets its name once all of it is there."""
    get = download.download if address.startswith(("http://", "https://")) else _copy
    try:
        with files.whole(target) as new:
            get(address, new)
            for name in () if published.find(address) else _json_names(target.name):
                json_path = target.parent / name
                try:
                    with files.whole(json_path) as new_json:
                        get(_sibling(address, name), new_json, max_bytes=MAX_CARD_BYTES)
                except download.NotThereError:
                    json_path.unlink(missing_ok=True)  # that of earlier weights
    except download.NotThereError as error:
        raise UserError(str(error)) from None


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/mixer`, or `~/.cache/mixer`.

    Raises:
      UserError: the home directory is not known.
    """
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base.startswith("~"):
        raise UserError(
            "this user has no home directory, and so no cache for weights; XDG_CACHE_HOME=DIR "
            "says where it is"
        )
    return Path(base) / "mixer"


def _check_ending(name: str, where: str) -> None:
    if name.endswith(ENDINGS):
        return
    read = f"{where}: weights are read from {' and '.join(ENDINGS)} files"
    if foreign.is_pickled(name):
        raise UserError(f"{read}, and {name} {foreign.pickle_advice(name)}")
    raise UserError(f"{read}; the address has to end in the name of one")


def _json_names(name: str) -> list[str]:
    """Names of the JSON files that may describe the weights `name`."""
    config = ["config.json"] if name.endswith(".safetensors") else []
    return [f"{name}.json", *config]


def _sibling(address: str, name: str) -> str:
    """The address of another file in the same folder; a query string stays."""
    parts = urllib.parse.urlsplit(address)
    path = parts.path.rpartition("/")[0] + "/" + urllib.parse.quote(name)
    return urllib.parse.urlunsplit(parts._replace(path=path))


def _unsigned(address: str) -> str:
    """The address without the parameters of its query that only sign it."""
    path, _, query = address.partition("?")
    names = [word for word in query.split("&") if not _SIGNATURES.fullmatch(word.split("=")[0])]
    return "?".join(filter(None, (path, "&".join(names))))


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turns an error of writing into the cache into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror or error}; XDG_CACHE_HOME moves the cache"
        ) from None


@contextlib.contextmanager
def _reading(path: epath.PathLike) -> Iterator[None]:
    """Turns what fails in a file system or in cloud storage into one line.

    Storage fails by errors of TensorFlow's, gcsfs's or s3fs's own.
    """
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{path} needs TensorFlow, or pip install gcsfs (s3://: s3fs): {error}"
        ) from None
    except Exception as error:
        if not _split(path)[0] and not isinstance(error, OSError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}") from None


def _copy(address: str, target: Path, max_bytes: int | None = None) -> None:
    """Copies a file from cloud storage, with the credentials that its library finds."""

    def count_bytes() -> int:
        return os.path.getsize(target) if os.path.exists(target) else 0

    def measure() -> int | None:
        source = epath.Path(address)
        return source.stat().length if source.exists() else None

    with _reading(address):
        length = download.run_in_time(measure, address, None, download.SLOW_SECS)
    if length is None:
        raise download.NotThereError(f"{address}: no such file")
    if max_bytes is not None and length > max_bytes:
        raise UserError(f"{address}: {length:,} bytes; expected at most {max_bytes:,}")
    download.check_room(length, target.parent)
    with _reading(address):
        download.run_in_time(
            lambda: epath.Path(address).copy(target, overwrite=True), address, count_bytes
        )
    if target.stat().length != length:
        raise UserError(f"{address}: {target.stat().length:,} of {length:,} bytes came; try again")


def _fetch_from_hub(rest: str, log: Callable[[str], None]) -> epath.Path:
    """Fetches hf://owner/name, that is its model.safetensors, or hf://owner/name/file."""
    parts = rest.split("/", 2)
    odd = {"", ".", ".."}.intersection(rest.split("/"))
    if len(parts) < 2 or odd or not rest.isprintable():
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

    cache_dir()  # its cache is beside ours, and needs a home directory as well

    def get(file: str) -> epath.Path:
        call = functools.partial(hf_hub_download, repository, file)
        return epath.Path(download.run_in_time(call, f"hf://{rest}"))

    try:
        path = get(name)
        folder = name.rpartition("/")[0]
        unreachable = []
        for json_name in _json_names(Path(name).name):
            try:
                get(f"{folder}/{json_name}".lstrip("/"))
            except errors.LocalEntryNotFoundError:
                unreachable.append(json_name)
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
