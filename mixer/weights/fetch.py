"""Weights from elsewhere: fetched once into a cache, whole or not at all.

`https://`, `http://`, `gs://`, `hf://owner/name[/file]` and the short names of
`mixer.weights.published.CHECKPOINTS`. The cache is `$XDG_CACHE_HOME/mixer` or `~/.cache/mixer`,
with a folder for each address, in which the file keeps its name; deleting one fetches it anew.
Files of hf:// stay where huggingface_hub keeps them.

An address may hold secrets: messages, and all that is saved, have it as `published.shown` gives it.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import http.client
import logging
import os
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath
from rich import progress
from rich.console import Console

from mixer import files
from mixer.errors import UserError, first_line
from mixer.files import STORES
from mixer.weights import foreign, published
from mixer.weights.foreign import ENDINGS

TIMEOUT_SECS = 20  # for a connection, and for the next byte of it
# A download that is slower than this over SLOW_SECS is given up, and any after MAX_SECS.
MIN_BYTES_PER_SEC = 10_000
SLOW_SECS = 60
MAX_SECS = 6 * 3600
MAX_CARD_BYTES = 16_000_000  # of a JSON beside weights; 21,843 names of classes take one
CHUNK_BYTES = 1 << 18
RETRIES = 3  # connections opened again for one file, each going on where the last one broke off
NOT_THERE = (403, 404, 410)  # a bucket that lists nothing answers 403 for what it does not have
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
        return _in_time(lambda: question(place), str(path), None, SLOW_SECS)


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
        address = _checked(address)
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
        beside = (file for file in path.parent.iterdir() if file.name.endswith(ENDINGS))
        path = next(beside, path)
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
            deadline = time.monotonic() + MAX_SECS
        if time.monotonic() > deadline:
            raise UserError(f"{where}: another process has been fetching it for {MAX_SECS:,} s")
        time.sleep(0.2)


def _fetch_into(target: Path, address: str) -> None:
    """Fetches a file and the JSON beside it; the file gets its name once all of it is there."""
    get = _download if address.startswith(("http://", "https://")) else _copy
    try:
        with files.whole(target) as new:
            get(address, new)
            for name in () if published.find(address) else _beside(target.name):
                beside = target.parent / name
                try:
                    with files.whole(beside) as new_beside:
                        get(_sibling(address, name), new_beside, most=MAX_CARD_BYTES)
                except _NotThereError:
                    beside.unlink(missing_ok=True)  # of weights that were here before
    except _NotThereError as error:
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


def _beside(name: str) -> list[str]:
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


def _checked(address: str) -> str:
    """A web address in ASCII, without fragment; UserError for what is none."""
    where = published.shown(address)
    try:
        parts = urllib.parse.urlsplit(address)
        port, host = parts.port, parts.hostname or ""
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError:
        host = ""  # what is wrong is not told: it may quote a password
    if not host or not address.isprintable() or parts.scheme not in ("http", "https"):
        raise UserError(f"{where} is no web address; expected https://HOST/PATH/FILE.npz")
    if "@" in parts.netloc:
        raise UserError(f"{where}: an address with a user or a password in it is not read")
    place = f"[{host}]" if ":" in host else host
    return urllib.parse.urlunsplit(
        (
            parts.scheme,
            place if port is None else f"{place}:{port}",
            urllib.parse.quote(parts.path or "/", safe="%/:@!$&'()*+,;=~"),
            urllib.parse.quote(parts.query, safe="%/:@!$&'()*+,;=~?[]"),
            "",
        )
    )


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


class _NotThereError(Exception):
    """There is no such file, or a web page in its place."""


def _in_time(
    work: Callable[[], Any],
    where: str,
    received: Callable[[], int] | None = None,
    max_secs: float | None = None,
) -> Any:
    """`work()`, which is left to itself where it takes too long or receives too little.

    It runs in a thread: names are looked up, libraries try again and servers send single bytes
    without any time limit of their own.

    Args:
      work: what to do; once it is left, nobody waits for it.
      where: for the message.
      received: bytes so far; None: they are not known.
      max_secs: how long it may take; None: MAX_SECS.

    Raises:
      UserError: it took too long.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    max_secs = MAX_SECS if max_secs is None else max_secs
    begin = last = time.monotonic()
    count = 0
    while thread.is_alive():
        thread.join(min(1, SLOW_SECS / 2))
        now = time.monotonic()
        if received is not None and received() - count >= MIN_BYTES_PER_SEC * SLOW_SECS:
            last, count = now, received()
        if thread.is_alive() and received is not None and now - last > SLOW_SECS:
            raise UserError(
                f"{where}: {received() - count:,} bytes came in the last {SLOW_SECS} s; expected "
                f"at least {MIN_BYTES_PER_SEC:,} a second"
            )
        if thread.is_alive() and now - begin > max_secs:
            raise UserError(f"{where}: no end after {max_secs:,} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _check_room(length: int, folder: epath.PathLike) -> None:
    free = shutil.disk_usage(folder).free
    if length > free:
        raise OSError(
            errno.ENOSPC, f"it has {length / 1e6:,.1f} MB, and {free / 1e6:,.1f} are free"
        )


def _download(address: str, target: Path, most: int | None = None) -> None:
    """Downloads a file by http, of at most so many bytes."""
    with open(target, "wb") as file, _progress(target.stem) as show:
        download = _Download(address, file, most, show)
        _in_time(download.run, published.shown(address), lambda: download.received)


class _Download:
    """A file on its way by http; a connection that breaks off is taken up where it ended."""

    def __init__(
        self,
        address: str,
        file: BinaryIO,
        most: int | None,
        show: Callable[[int, int | None], None],
    ):
        self._address, self._where = address, published.shown(address)
        self._file, self._most, self._show = file, most, show
        self._length: int | None = None  # of the whole
        # What the server calls this version of the file: a header's name and its value.
        self._version: tuple[str, str] | None = None
        self._stalls = 0  # connections that stood still
        self.received = 0  # bytes, by all connections

    def run(self) -> None:
        """Receives the file, by several connections if need be."""
        attempts = 0
        while attempts <= RETRIES and self._stalls < 2:
            if self._receive():
                return
            attempts += 1
        length = "an unknown number of" if self._length is None else f"{self._length:,}"
        raise UserError(
            f"{self._where}: {self._file.tell():,} of {length} bytes came, and then no more in "
            f"{attempts} attempts; try again"
        )

    def _receive(self) -> bool:
        """Receives what the file lacks, by one connection; whether that was all of it.

        A part is added only to the same version of the file. A server that does not name its
        versions sends all of it again.
        """
        done = self._file.tell() if self._version else 0
        headers = {"User-Agent": "mlp-mixer-jax"}
        if done:
            headers |= {"Range": f"bytes={done}-", "If-Range": self._version[1]}
        with _open(urllib.request.Request(self._address, headers=headers)) as answer:
            if done and answer.status in (206, 416):  # 416: the file has become shorter
                if not self._goes_on(answer, done):
                    self._version = None
                    return False
            else:
                self._begin(answer)
            return self._read(answer)

    def _goes_on(self, answer: http.client.HTTPResponse, done: int) -> bool:
        """Whether a part is what comes after `done` bytes of the same version."""
        part = f"bytes {done}-{self._length - 1}/{self._length}"
        name, value = self._version
        return answer.headers.get("Content-Range") == part and answer.headers.get(name) == value

    def _begin(self, answer: http.client.HTTPResponse) -> None:
        """Begins with the first byte."""
        if answer.status != 200:
            raise UserError(f"{self._where}: the server answers {answer.status}, which is no file")
        if answer.headers.get_content_type() == "text/html":
            raise _NotThereError(
                f"{self._where} is a web page; give the address of the file itself"
            )
        self._file.seek(0)
        self._file.truncate()
        self._length, self._version = answer.length, None
        tag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
        if self._length is not None and tag and not tag.startswith("W/"):
            self._version = "ETag", tag
        elif self._length is not None and modified:
            self._version = "Last-Modified", modified
        folder = os.path.dirname(self._file.name)
        if self._length is not None:
            self._check_size(self._length)
            _check_room(self._length, folder)
        self._room = shutil.disk_usage(folder).free // 2

    def _check_size(self, size: int) -> None:
        if self._most is not None and size > self._most:
            raise UserError(f"{self._where}: {size:,} bytes; expected at most {self._most:,}")

    def _read(self, answer: http.client.HTTPResponse) -> bool:
        """Appends what comes; whether it was all."""
        while self._length is None or self._file.tell() < self._length:
            rest = CHUNK_BYTES if self._length is None else self._length - self._file.tell()
            try:
                chunk = answer.read1(min(rest, CHUNK_BYTES))
            except (OSError, ValueError, http.client.HTTPException) as error:
                self._stalls += isinstance(error, TimeoutError)
                return False
            if not chunk:
                return self._length is None
            self._file.write(chunk)
            self.received += len(chunk)
            if self._length is None:
                self._check_size(self._file.tell())
                if self._file.tell() > self._room:
                    raise OSError(
                        errno.ENOSPC, "it does not say its length, and would fill half of the disk"
                    )
            self._show(self._file.tell(), self._length)
        return True


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to web addresses; others end in one line, without their secrets."""

    def http_error_302(self, req, fp, code, msg, headers):
        target = headers.get("Location") or headers.get("URI")
        if target is not None:
            try:
                _checked(urllib.parse.urljoin(req.full_url, target))
            except ValueError:  # a UserError too
                place, target = published.shown(req.full_url), published.shown(target)
                raise UserError(
                    f"{place} redirects to {target[:200]!r}, which is no web address"
                ) from None
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Opens an address; the answer to a part that lies beyond the end of the file has code 416."""
    where = published.shown(request.full_url)
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_SECS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and request.has_header("Range"):
            return error
        error.close()
        reason = f"{error.code} {first_line(Exception(error.reason))}"
        if error.code in NOT_THERE:
            raise _NotThereError(
                f"{where}: no such file, or none that may be read ({reason})"
            ) from None
        raise UserError(f"{where} was refused: {reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or first_line(Exception(reason))
        raise UserError(
            f"{where} cannot be reached: {reason}; a file that was fetched elsewhere can be "
            "given by its path"
        ) from None


def _copy(address: str, target: Path, most: int | None = None) -> None:
    """Copies a file from cloud storage, with the credentials that its library finds."""

    def received() -> int:
        return os.path.getsize(target) if os.path.exists(target) else 0

    def measure() -> int | None:
        source = epath.Path(address)
        return source.stat().length if source.exists() else None

    with _reading(address):
        length = _in_time(measure, address, None, SLOW_SECS)
    if length is None:
        raise _NotThereError(f"{address}: no such file")
    if most is not None and length > most:
        raise UserError(f"{address}: {length:,} bytes; expected at most {most:,}")
    _check_room(length, target.parent)
    with _reading(address):
        _in_time(lambda: epath.Path(address).copy(target, overwrite=True), address, received)
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
        download = functools.partial(hf_hub_download, repository, file)
        return epath.Path(_in_time(download, f"hf://{rest}"))

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
