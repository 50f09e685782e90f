"""Fetches remote weights once into a cache; a file appears there only when it is complete.

Sources are `https://`, `http://`, `gs://`, `hf://owner/name[/file]` and the short names of
`mixer.weights.published.CHECKPOINTS`. The cache is `$XDG_CACHE_HOME/mixer` or `~/.cache/mixer`. It
has one folder per URL, in which the file keeps its name; delete the folder to fetch the file
again. Files of hf:// stay in the cache of huggingface_hub.

A URL may hold secrets, so messages and saved files contain only `published.redact(url)`.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from etils import epath

from mixer import files
from mixer.errors import UserError, first_line
from mixer.files import STORES
from mixer.weights import arrays, download, foreign, published
from mixer.weights.foreign import ENDINGS, INDEX_ENDING

# The weights in a folder or repository of the Hugging Face Hub, in order of preference.
HUB_NAMES = ("model.safetensors", f"model{INDEX_ENDING}")
MAX_CARD_BYTES = 16_000_000  # size of a JSON sidecar; 21,843 class names take about 1 MB
# Query parameters that sign a URL and do not identify the file.
_SIGNATURES = re.compile(
    r"x-(amz|goog|ms|oss)-.*|(.*[-_])?(signature|token|secret|password|credential)|sig|auth"
    r"|expires|policy|key-pair-id|api_?key|(aws|oss)accesskeyid|googleaccessid",
    re.IGNORECASE,
)


def is_remote_file(path: epath.PathLike) -> bool:
    """Returns whether `fetch` has to download `path`: the URL of a file, or a short name.

    A `gs://` or `s3://` URL without the suffix of a weight file is a run, which is read in
    place.

    Raises:
      UserError: the short name is unknown, or the URL is invalid.
    """
    scheme, remainder = _split(path)
    if not scheme and not str(path).startswith("://"):
        return published.by_short_name(path) is not None
    if scheme in STORES:
        if not remainder.partition("/")[0]:
            raise UserError(f"{path}: no bucket; expected {scheme}://BUCKET/PATH")
        return remainder.endswith(ENDINGS)
    if scheme not in ("http", "https", "hf"):
        raise UserError(
            f"{published.redact(path)}: {scheme}:// is not supported; expected a local path, "
            f"https://, hf:// or {', '.join(f'{store}://' for store in STORES)}"
        )
    return True


def is_directory(path: epath.PathLike) -> bool:
    """Returns whether `path` is a local or cloud directory; False for the URL of a file.

    Raises:
      UserError: the URL is invalid, or the cloud storage does not answer.
    """
    return not is_remote_file(path) and _query(path, lambda path: path.is_dir())


def is_run(path: epath.PathLike) -> bool:
    """Returns whether `path` is a directory that is not a folder of the Hub."""
    return is_directory(path) and hub_weights(path) is None


def hub_weights(path: epath.PathLike) -> epath.Path | None:
    """Returns the weight file in a folder of the Hugging Face Hub; None for any other path."""
    path = epath.Path(path).expanduser()
    if "://" in str(path) or (path / "checkpoints").is_dir():  # a run
        return None
    return next((path / name for name in HUB_NAMES if (path / name).is_file()), None)


def exists(path: epath.PathLike) -> bool:
    """Returns whether a local or cloud path exists."""
    return _query(path, lambda path: path.exists())


def _query(path: epath.PathLike, predicate: Callable[[epath.Path], bool]) -> bool:
    with _reading(path):
        full_path = epath.Path(path).expanduser()
        if not _split(path)[0]:
            return predicate(full_path)
        return download.run_with_timeout(
            lambda: predicate(full_path), str(path), None, download.SLOW_SECS
        )


def _split(path: epath.PathLike) -> tuple[str, str]:
    """Returns the scheme in lower case ("" for a local path) and the remainder of the path."""
    scheme, separator, remainder = str(path).partition("://")  # as in etils.epath
    return (scheme.lower(), remainder) if separator else ("", scheme)


def fetch(path: epath.PathLike, *, log: Callable[[str], None]) -> epath.Path:
    """Returns the path of a local copy of `path`; downloads the file if it is not cached.

    If the source has JSON sidecars, they are fetched too: the file's name plus .json, and for a
    safetensors file also config.json.

    Args:
      path: a local path, which is returned unchanged, a URL, or a short name.
      log: called with a line on what was fetched and its URL.

    Raises:
      UserError: the file does not exist, cannot be reached or read, is incomplete, is a web page or
        another type of file; the server is too slow, the disk is full, or a package is missing.
    """
    if not is_remote_file(path):
        return epath.Path(path).expanduser()
    short = published.by_short_name(path)
    url = short.url if short else published.https_url(str(path))
    scheme, remainder = _split(url)
    if scheme == "hf":
        return _fetch_from_hub(remainder, log)
    if scheme in ("http", "https"):
        url = download.parse_url(url)
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    else:
        url = name = f"{scheme}://{remainder}"
    name = name.rpartition("/")[2]
    label = published.redact(url)
    _check_ending(name, label)
    if not name.isprintable() or len(name.encode()) > 200:
        raise UserError(f"{label}: the file's name is too long or has unprintable characters")
    target = cache_dir() / hashlib.sha256(_without_signature(url).encode()).hexdigest()[:16] / name
    hint = "; set XDG_CACHE_HOME to move the cache"
    with files.storage_errors(target, f"{target} cannot be written", hint):
        if target.is_file():
            log(f"{label}: cached as {target}")
            return epath.Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        # If two processes fetch the same file, the second waits for the first. The OS releases the
        # lock when a process ends, so a killed process cannot leave a stale lock.
        with open(target.parent / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"{label}: waiting for another process to fetch it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                for stale in target.parent.glob(".*.new"):  # left by a killed process
                    stale.unlink(missing_ok=True)
                _fetch_into(target, url)
                log(f"{label}: fetched {target.stat().st_size / 1e6:,.1f} MB to {target}")
    return epath.Path(target)


def refetch_hint(path: epath.Path) -> str:
    """Returns the end of an error message, which says how to fetch a damaged file again.

    Args:
      path: the weight file that `fetch` returned, or its JSON sidecar.
    """
    if cache_dir() in path.parents:
        # If the weight file is missing, `fetch` downloads the sidecar again as well.
        weights = (file for file in path.parent.iterdir() if file.name.endswith(ENDINGS))
        path = next(weights, path)
    else:
        path = os.path.realpath(path)  # huggingface_hub links to its downloads
    return f"; delete {path} to fetch it again"


def _fetch_into(target: Path, url: str) -> None:
    """Fetches a file and its JSON sidecar; the file gets its final name once it is complete."""
    get = download.download if url.startswith(("http://", "https://")) else _copy
    try:
        with files.atomic_write(target) as new:
            get(url, new)
            for name in () if published.find(url) else _json_names(target.name):
                json_path = target.parent / name
                try:
                    with files.atomic_write(json_path) as new_json:
                        get(_sibling(url, name), new_json, max_bytes=MAX_CARD_BYTES)
                except download.MissingFileError:
                    json_path.unlink(missing_ok=True)  # left by earlier weights
    except download.MissingFileError as error:
        raise UserError(str(error)) from None


def cache_dir() -> Path:
    """Returns the cache directory, `$XDG_CACHE_HOME/mixer` or `~/.cache/mixer`.

    Raises:
      UserError: the home directory is unknown.
    """
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base.startswith("~"):
        raise UserError(
            "no cache for weights: this user has no home directory; set XDG_CACHE_HOME=DIR"
        )
    return Path(base) / "mixer"


def _check_ending(name: str, label: str) -> None:
    if name.endswith(ENDINGS):
        return
    problem = f"{label}: expected a URL that ends in {' or '.join(ENDINGS)}"
    if advice := foreign.file_advice(name):
        raise UserError(f"{problem}; {name} {advice}")
    raise UserError(problem)


def _json_names(name: str) -> list[str]:
    """Returns the names of the JSON files that may describe the weight file `name`."""
    config = ["config.json"] if name.endswith((".safetensors", INDEX_ENDING)) else []
    return [f"{name}.json", *config]


def _sibling(url: str, name: str) -> str:
    """Returns the URL of another file in the same folder, with the same query string."""
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rpartition("/")[0] + "/" + urllib.parse.quote(name)
    return urllib.parse.urlunsplit(parts._replace(path=path))


def _without_signature(url: str) -> str:
    """Returns the URL without the query parameters that only sign it."""
    path, _, query = url.partition("?")
    names = [word for word in query.split("&") if not _SIGNATURES.fullmatch(word.split("=")[0])]
    return "?".join(filter(None, (path, "&".join(names))))


@contextlib.contextmanager
def _reading(path: epath.PathLike) -> Iterator[None]:
    """Turns errors of a file system or of cloud storage into a one-line UserError.

    For cloud storage, TensorFlow, gcsfs and s3fs raise exceptions of their own classes.
    """
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # gcsfs also logs what it raises
    with files.storage_errors(path, f"{path} cannot be read"):
        try:
            yield
        except ImportError as error:
            raise UserError(
                f"{path} needs TensorFlow, or pip install gcsfs (s3://: s3fs): {error}"
            ) from None


def _copy(url: str, target: Path, max_bytes: int | None = None) -> None:
    """Copies a file from cloud storage, with the credentials that the storage library finds."""

    def count_bytes() -> int:
        return os.path.getsize(target) if os.path.exists(target) else 0

    def measure() -> int | None:
        source = epath.Path(url)
        return source.stat().length if source.exists() else None

    with _reading(url):
        length = download.run_with_timeout(measure, url, None, download.SLOW_SECS)
    if length is None:
        raise download.MissingFileError(f"{url}: no such file")
    if max_bytes is not None and length > max_bytes:
        raise UserError(f"{url}: {length:,} bytes; expected at most {max_bytes:,}")
    download.check_disk_space(length, target.parent)
    with _reading(url):
        download.run_with_timeout(
            lambda: epath.Path(url).copy(target, overwrite=True), url, count_bytes
        )
    if target.stat().length != length:
        raise UserError(f"{url}: received {target.stat().length:,} of {length:,} bytes; try again")


def _fetch_from_hub(remainder: str, log: Callable[[str], None]) -> epath.Path:
    """Fetches hf://owner/name/file; for hf://owner/name, the first of HUB_NAMES.

    For the index of a sharded file, its files are fetched too.
    """
    url = f"hf://{remainder}"
    parts = remainder.split("/", 2)
    has_bad_part = {"", ".", ".."}.intersection(remainder.split("/"))
    if len(parts) < 2 or has_bad_part or not remainder.isprintable():
        raise UserError(f"{url}: expected hf://owner/name or hf://owner/name/file.npz")
    repository, names = "/".join(parts[:2]), parts[2:] or HUB_NAMES
    for name in names:
        if not name.endswith(INDEX_ENDING):
            _check_ending(name, url)
    try:
        from huggingface_hub import errors, hf_hub_download, list_repo_files, utils
    except ImportError:
        raise UserError(f"{url} needs huggingface_hub: pip install -e .[hub]") from None
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    published.refuse_other_models(repository)

    cache_dir()  # raises without a home directory, which huggingface_hub's cache needs as well

    def get(file: str) -> epath.Path:
        call = functools.partial(hf_hub_download, repository, file)
        return epath.Path(download.run_with_timeout(call, url))

    def get_first(names: Sequence[str]) -> tuple[epath.Path, str]:
        for name in names[:-1]:
            try:
                return get(name), name
            except errors.LocalEntryNotFoundError:
                raise
            except errors.EntryNotFoundError:
                pass
        return get(names[-1]), names[-1]

    def other_files() -> str:
        """Returns the end of the message for a repository without such a file."""
        present = []
        with contextlib.suppress(errors.HfHubHTTPError, OSError, UserError):
            call = functools.partial(list_repo_files, repository)
            present = sorted(download.run_with_timeout(call, url, None, download.SLOW_SECS))
        for file in present:
            if advice := foreign.file_advice(file):
                return f"hf://{repository}/{file} {advice}"
        return f"expected one of its files: hf://{repository}/FILE.npz"

    expected = " or ".join(names)
    try:
        path, name = get_first(names)
        folder = name.rpartition("/")[0]
        if name.endswith(INDEX_ENDING):
            expected = f"file that its {name} lists"
            for shard in arrays.shard_names(path):
                get(f"{folder}/{shard}".lstrip("/"))
        unreachable = []
        for json_name in _json_names(Path(name).name):
            try:
                get(f"{folder}/{json_name}".lstrip("/"))
            except errors.LocalEntryNotFoundError:
                unreachable.append(json_name)
            except errors.EntryNotFoundError:
                pass
    except errors.LocalEntryNotFoundError:  # a subclass of EntryNotFoundError
        raise UserError(f"{url} cannot be reached, and is not in the cache") from None
    except errors.EntryNotFoundError:
        raise UserError(f"hf://{repository} has no {expected}; {other_files()}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"hf://{repository} is gated: accept its terms on the Hub and log in"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"hf://{repository}: no such repository, or a private one") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"{url} cannot be read: {first_line(error)}") from None
    note = f"; could not check for {' and '.join(unreachable)}" if unreachable else ""
    log(f"{url}: {path}{note}")
    return path
