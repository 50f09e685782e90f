"""Downloads by http, within a time and within the room on the disk."""

import contextlib
import errno
import http.client
import os
import shutil
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

from mixer.errors import UserError, first_line
from mixer.weights import published

TIMEOUT_SECS = 20  # for a connection, and for the next byte of it
# A download that is slower than this over SLOW_SECS is given up, and any after MAX_SECS.
MIN_BYTES_PER_SEC = 10_000
SLOW_SECS = 60
MAX_SECS = 6 * 3600
CHUNK_BYTES = 1 << 18
RETRIES = 3  # connections opened again for one file, each going on where the last one broke off
NOT_THERE = (403, 404, 410)  # a bucket that lists nothing answers 403 for what it does not have


class NotThereError(Exception):
    """There is no such file, or a web page in its place."""


def parse_address(address: str) -> str:
    """Returns a web address in ASCII, without fragment.

    Raises:
      UserError: it is no web address, or has a user or a password in it.
    """
    where = published.shown(address)
    try:
        parts = urllib.parse.urlsplit(address)
        port, host = parts.port, parts.hostname or ""
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError:
        host = ""  # the error may quote a password, so its text is dropped
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


def run_in_time(
    work: Callable[[], Any],
    where: str,
    count_bytes: Callable[[], int] | None = None,
    max_secs: float | None = None,
) -> Any:
    """Returns `work()`, and abandons it where it takes too long or receives too little.

    The work runs in a thread: looking up names, the retries of libraries and servers that send
    single bytes have no time limit of their own.

    Args:
      work: what to do; once it is abandoned, nobody waits for it.
      where: the address, for the message.
      count_bytes: returns the bytes received so far; None: they are not known.
      max_secs: limit; None: MAX_SECS.

    Raises:
      UserError: it took too long, or received too little.
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
        if count_bytes is not None and count_bytes() - count >= MIN_BYTES_PER_SEC * SLOW_SECS:
            last, count = now, count_bytes()
        if thread.is_alive() and count_bytes is not None and now - last > SLOW_SECS:
            raise UserError(
                f"{where}: {count_bytes() - count:,} bytes came in the last {SLOW_SECS} s; "
                f"expected at least {MIN_BYTES_PER_SEC:,} a second"
            )
        if thread.is_alive() and now - begin > max_secs:
            raise UserError(f"{where}: no end after {max_secs:,} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def check_room(length: int, folder: epath.PathLike) -> None:
    """Raises OSError where the disk of `folder` has less than `length` bytes left."""
    free = shutil.disk_usage(folder).free
    if length > free:
        raise OSError(
            errno.ENOSPC, f"it has {length / 1e6:,.1f} MB, and {free / 1e6:,.1f} are free"
        )


def download(address: str, target: Path, max_bytes: int | None = None) -> None:
    """Downloads a file by http.

    Args:
      address: as `parse_address` returns it.
      target: the file that is written.
      max_bytes: the largest accepted size; None: any.

    Raises:
      NotThereError: the server has no such file, or a web page in its place.
      UserError: the download failed otherwise.
      OSError: the file cannot be written, or would fill the disk.
    """
    with open(target, "wb") as file, _progress(target.stem) as show:
        transfer = _Download(address, file, max_bytes, show)
        run_in_time(transfer.run, published.shown(address), lambda: transfer.received)


class _Download:
    """The transfer of one file; after a broken connection it continues where it stopped."""

    def __init__(
        self,
        address: str,
        file: BinaryIO,
        max_bytes: int | None,
        show: Callable[[int, int | None], None],
    ):
        self._address, self._where = address, published.shown(address)
        self._file, self._max_bytes, self._show = file, max_bytes, show
        self._length: int | None = None  # of the whole
        # What the server calls this version of the file: a header's name and its value.
        self._version: tuple[str, str] | None = None
        self._stalls = 0  # connections that stood still
        self.received = 0  # bytes, by all connections

    def run(self) -> None:
        """Receives the file, by several connections where one breaks off."""
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
        """Receives the rest of the file by one connection; returns whether the file is complete.

        A part is added only to the same version of the file. A server that does not name its
        versions sends all of it again.
        """
        done = self._file.tell() if self._version else 0
        headers = {"User-Agent": "mlp-mixer-jax"}
        if done:
            headers |= {"Range": f"bytes={done}-", "If-Range": self._version[1]}
        with _open(urllib.request.Request(self._address, headers=headers)) as answer:
            if done and answer.status in (206, 416):  # 416: the file has become shorter
                if not self._continues(answer, done):
                    self._version = None
                    return False
            else:
                self._start(answer)
            return self._read(answer)

    def _continues(self, answer: http.client.HTTPResponse, done: int) -> bool:
        """Whether the answer is the part after `done` bytes of the same version."""
        part = f"bytes {done}-{self._length - 1}/{self._length}"
        name, value = self._version
        return answer.headers.get("Content-Range") == part and answer.headers.get(name) == value

    def _start(self, answer: http.client.HTTPResponse) -> None:
        """Starts with the first byte, and remembers the length and the version of the file."""
        if answer.status != 200:
            raise UserError(f"{self._where}: the server answers {answer.status}, which is no file")
        if answer.headers.get_content_type() == "text/html":
            raise NotThereError(f"{self._where} is a web page; give the address of the file itself")
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
            check_room(self._length, folder)
        self._room = shutil.disk_usage(folder).free // 2

    def _check_size(self, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise UserError(f"{self._where}: {size:,} bytes; expected at most {self._max_bytes:,}")

    def _read(self, answer: http.client.HTTPResponse) -> bool:
        """Appends what the server sends; returns whether the file is complete."""
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
                parse_address(urllib.parse.urljoin(req.full_url, target))
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
            raise NotThereError(
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
