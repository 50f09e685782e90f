"""Downloads files over HTTP, with limits on time and disk space."""

import concurrent.futures
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

from mixer.errors import UserError, first_line, reason_of
from mixer.weights import published

TIMEOUT_SECS = 20  # to open a connection, and to receive the next byte
# A download fails if it is slower than this for SLOW_SECS, or takes longer than MAX_SECS.
MIN_BYTES_PER_SEC = 10_000
SLOW_SECS = 60
MAX_SECS = 6 * 3600
CHUNK_BYTES = 1 << 18
RETRIES = 3  # new connections per file; each one resumes where the last one broke
MISSING_CODES = (403, 404, 410)  # a bucket without list permission answers 403 for missing files


class MissingFileError(Exception):
    """The server has no file at the URL, or sends a web page instead."""


def parse_url(url: str) -> str:
    """Returns an HTTP URL in ASCII, without its fragment.

    Raises:
      UserError: the text is not an HTTP URL, or contains a user or a password.
    """
    label = published.redact(url)
    try:
        parts = urllib.parse.urlsplit(url)
        netloc = parts.netloc.lower().encode("idna").decode()
        # `port` raises ValueError for an invalid port.
        is_valid = parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:
        is_valid = False  # the error may quote a password, so its text is dropped
    if not is_valid or parts.scheme not in ("http", "https"):
        raise UserError(f"{label} is not an HTTP URL; expected https://HOST/PATH/FILE.npz")
    if "@" in netloc:
        raise UserError(f"{label}: expected a URL without a user name or a password")
    path = urllib.parse.quote(parts.path or "/", safe="%/:@!$&'()*+,;=~")
    query = urllib.parse.quote(parts.query, safe="%/:@!$&'()*+,;=~?[]")
    return urllib.parse.urlunsplit((parts.scheme, netloc, path, query, ""))


def run_with_timeout(
    work: Callable[[], Any],
    label: str,
    count_bytes: Callable[[], int] | None = None,
    max_secs: float | None = None,
) -> Any:
    """Returns `work()`, and abandons the call if it takes too long or receives too little.

    The work runs in a thread, because name look-ups, retries inside libraries and servers that send
    a byte at a time have no overall time limit.

    Args:
      work: function to call; its thread keeps running if it is abandoned.
      label: the URL, for messages.
      count_bytes: returns the number of bytes received so far; None if it is unknown.
      max_secs: time limit; None: MAX_SECS.

    Raises:
      UserError: the work took too long, or received too little.
    """
    future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # An executor would wait for an abandoned thread at exit.
    threading.Thread(target=run, daemon=True).start()
    max_secs = MAX_SECS if max_secs is None else max_secs
    start_secs = window_secs = time.monotonic()
    count = 0
    while not concurrent.futures.wait([future], min(1, SLOW_SECS / 2)).done:
        now_secs = time.monotonic()
        if now_secs - start_secs > max_secs:
            raise UserError(f"{label}: not finished after {max_secs:,} s")
        if count_bytes is None:
            continue
        num_new = count_bytes() - count
        if num_new >= MIN_BYTES_PER_SEC * SLOW_SECS:
            window_secs, count = now_secs, count + num_new
        elif now_secs - window_secs > SLOW_SECS:
            raise UserError(
                f"{label}: received {num_new:,} bytes in the last {SLOW_SECS} s; "
                f"expected at least {MIN_BYTES_PER_SEC:,} per second"
            )
    return future.result()


def check_disk_space(length: int, folder: epath.PathLike) -> None:
    """Raises OSError if the disk of `folder` has less than `length` bytes free."""
    free = shutil.disk_usage(folder).free
    if length > free:
        raise OSError(
            errno.ENOSPC,
            f"the file needs {length / 1e6:,.1f} MB; {free / 1e6:,.1f} MB are free",
        )


def download(url: str, target: Path, max_bytes: int | None = None) -> None:
    """Downloads a file over HTTP.

    Args:
      url: a URL that `parse_url` returned.
      target: path of the file to write.
      max_bytes: largest accepted size; None: no limit.

    Raises:
      MissingFileError: the server has no such file, or sends a web page instead.
      UserError: the download failed for another reason.
      OSError: the file cannot be written, or would fill the disk.
    """
    with open(target, "wb") as file, _progress(target.stem) as show:
        transfer = _Download(url, file, max_bytes, show)
        run_with_timeout(transfer.run, published.redact(url), lambda: transfer.received)


class _Download:
    """Downloads one file, and resumes after a broken connection."""

    def __init__(
        self,
        url: str,
        file: BinaryIO,
        max_bytes: int | None,
        show: Callable[[int, int | None], None],
    ):
        self._url, self._label = url, published.redact(url)
        self._file, self._max_bytes, self._show = file, max_bytes, show
        self._length: int | None = None  # bytes of the complete file
        # Name and value of the header that identifies this version of the file.
        self._version: tuple[str, str] | None = None
        self._stalls = 0  # connections that timed out
        self.received = 0  # bytes over all connections

    def run(self) -> None:
        """Receives the file; opens new connections if one breaks."""
        attempts = 0
        while attempts <= RETRIES and self._stalls < 2:
            if self._receive():
                return
            attempts += 1
        length = "an unknown number of" if self._length is None else f"{self._length:,}"
        raise UserError(
            f"{self._label}: received {self._file.tell():,} of {length} bytes in {attempts} "
            "attempts; try again"
        )

    def _receive(self) -> bool:
        """Receives the rest of the file over one connection; returns whether the file is complete.

        The rest is appended only if it belongs to the same version of the file. If the server does
        not identify versions, the download restarts from the first byte.
        """
        offset = self._file.tell() if self._version else 0
        headers = {"User-Agent": "mlp-mixer-jax"}
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": self._version[1]}
        with _open(urllib.request.Request(self._url, headers=headers)) as response:
            if offset and response.status in (206, 416):  # 416: the file has become shorter
                if not self._continues(response, offset):
                    self._version = None
                    return False
            else:
                self._start(response)
            return self._read(response)

    def _continues(self, response: http.client.HTTPResponse, offset: int) -> bool:
        """Returns whether the response continues the same version of the file at byte `offset`."""
        part = f"bytes {offset}-{self._length - 1}/{self._length}"
        name, value = self._version
        return response.headers.get("Content-Range") == part and response.headers.get(name) == value

    def _start(self, response: http.client.HTTPResponse) -> None:
        """Restarts from the first byte, and stores the length and the version of the file."""
        if response.status != 200:
            raise UserError(
                f"{self._label}: the server returned the status {response.status}; expected 200"
            )
        if response.headers.get_content_type() == "text/html":
            raise MissingFileError(f"{self._label} is a web page; pass the URL of the file itself")
        self._file.seek(0)
        self._file.truncate()
        self._length, self._version = response.length, None
        tag, last_modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
        if self._length is not None and tag and not tag.startswith("W/"):
            self._version = "ETag", tag
        elif self._length is not None and last_modified:
            self._version = "Last-Modified", last_modified
        folder = os.path.dirname(self._file.name)
        if self._length is not None:
            self._check_size(self._length)
            check_disk_space(self._length, folder)
        self._max_unsized_bytes = shutil.disk_usage(folder).free // 2

    def _check_size(self, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise UserError(f"{self._label}: {size:,} bytes; expected at most {self._max_bytes:,}")

    def _read(self, response: http.client.HTTPResponse) -> bool:
        """Appends received bytes to the file; returns whether the file is complete."""
        while self._length is None or self._file.tell() < self._length:
            num_left = CHUNK_BYTES if self._length is None else self._length - self._file.tell()
            try:
                chunk = response.read1(min(num_left, CHUNK_BYTES))
            except (OSError, ValueError, http.client.HTTPException) as error:
                self._stalls += isinstance(error, TimeoutError)
                return False
            if not chunk:
                return self._length is None
            self._file.write(chunk)
            self.received += len(chunk)
            if self._length is None:
                self._check_size(self._file.tell())
                if self._file.tell() > self._max_unsized_bytes:
                    raise OSError(
                        errno.ENOSPC,
                        "the server sent no length, and half of the free disk space is used",
                    )
            self._show(self._file.tell(), self._length)
        return True


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTP URLs; for others, raises a UserError that contains no secrets."""

    def http_error_302(self, req, fp, code, msg, headers):
        target = headers.get("Location") or headers.get("URI")
        if target is not None:
            try:
                parse_url(urllib.parse.urljoin(req.full_url, target))
            except ValueError:  # UserError is a ValueError
                origin, target = published.redact(req.full_url), published.redact(target)
                raise UserError(
                    f"{origin} redirects to {target[:200]!r}, which is not an HTTP URL"
                ) from None
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Opens a URL; a 416 response to a range request is returned instead of raised."""
    label = published.redact(request.full_url)
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_SECS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and request.has_header("Range"):
            return error
        error.close()
        reason = f"{error.code} {first_line(Exception(error.reason))}"
        if error.code in MISSING_CODES:
            raise MissingFileError(
                f"{label}: no such file, or no permission to read it ({reason})"
            ) from None
        raise UserError(f"{label}: the server refused the request: {reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # urllib may wrap an error, or only its text
        raise UserError(
            f"{label} cannot be reached: {reason_of(reason)}; download the file on another machine "
            "and pass its path"
        ) from None


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yields a function that shows progress: a bar if stderr is a terminal, else nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda received, total: None
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
        yield lambda received, total: bar.update(task, completed=received, total=total)
