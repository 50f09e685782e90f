"""Classifies the errors of checkpoints, and suppresses the copies that Orbax's threads print."""

import contextlib
import gc
import logging as python_logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mixer.errors import UserError, printable
from mixer.parallel import backend, watchdog

# Status codes of TensorStore and XLA for problems with memory, files, permissions or networks.
MACHINE_CODES = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
)
OS_ERROR = r"os_error_code='(\d+)'"  # in the text of TensorStore's errors
MISSING_FILE_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Exceptions that Orbax raises for files that differ from what it wrote.
DAMAGE_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OSError,
    RecursionError,
)


class CheckpointError(UserError):
    """A checkpoint could not be written or restored."""


class DamagedError(CheckpointError):
    """The files of a checkpoint differ from what was saved."""


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path, which Orbax requires."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def check_name(path: epath.PathLike, *, writes: bool) -> None:
    """Raises CheckpointError for a path that Orbax and TensorStore would misread.

    Both libraries treat backslashes specially, reject bytes that are not UTF-8, and expand a path
    that they write to as a glob pattern, so that `run[1]` refers to another directory.
    """
    path = str(absolute(path))
    shown = printable(path)
    if match := re.search(r"[\\\ud800-\udfff]", path):
        fault = "a backslash" if match[0] == "\\" else "bytes that are not UTF-8"
        raise CheckpointError(
            f"{shown}: checkpoints cannot be in a directory whose name has {fault}; rename it"
        )
    if writes and (match := re.search(r"[*?\[\x00-\x1f\x7f]", path)):
        raise CheckpointError(
            f"{shown}: checkpoints cannot be written to a directory whose name has "
            f"{printable(match[0])!r}; give it another name"
        )


@contextlib.contextmanager
def reading(directory: epath.Path) -> Iterator[None]:
    """Classifies the errors of everything that reads checkpoints.

    Orbax's errors on damaged files become a DamagedError. Errors caused by the path, the machine or
    its devices become a one-line CheckpointError. A programming error passes through unchanged.
    """
    check_name(directory, writes=False)
    backend.start()
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        cause = _cause(error)  # Orbax wraps TensorStore's errors in a plain Exception
        if is_machine_error(cause):
            raise CheckpointError(
                f"checkpoint {directory} could not be read: {root_cause(error)}"
            ) from error
        if not isinstance(cause, DAMAGE_ERRORS):
            raise
        raise DamagedError(f"checkpoint {directory} is damaged: {root_cause(error)}") from error


def is_machine_error(error: BaseException) -> bool:
    """Returns whether memory, permissions, disks or networks caused a read error, not damage."""
    if isinstance(error, OSError):
        return not isinstance(error, MISSING_FILE_ERRORS)
    text = str(error)
    numbers = map(int, re.findall(OS_ERROR, text))
    return any(code in text for code in MACHINE_CODES) or any(
        not isinstance(OSError(number, ""), MISSING_FILE_ERRORS) for number in numbers
    )


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def root_cause(error: BaseException) -> str:
    """Returns the innermost cause in one line; the middle of a long text is cut out."""
    error = _cause(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if number := re.search(OS_ERROR, text):  # put it first, as the text may be cut
        text = f"{os.strerror(int(number[1]))}: {text}"
    return text if len(text) < 300 else f"{text[:120]} ... {text[-170:]}"


def reporting_handler() -> ocp.StandardCheckpointHandler:
    """Returns a checkpoint handler that ends all processes when a background write fails.

    With Orbax's handler the other processes would wait for minutes, and the reason would be lost.
    """
    handler = ocp.StandardCheckpointHandler()
    save = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> list[_Write]:
        return [_Write(future) for future in await save(*args, **kwargs) or ()]

    handler.async_save = async_save
    return handler


class _Write:
    """Wraps a future of Orbax; reports an error to all processes before raising it."""

    def __init__(self, future: Any):
        self._future = future

    def result(self, timeout: float | None = None) -> Any:
        """Waits until the write is complete."""
        try:
            return self._future.result(timeout)
        except Exception as error:
            fault = f"a checkpoint could not be written: {root_cause(error)}"
            watchdog.abort(CheckpointError(fault))
            raise


def join_writers(timeout_secs: float = 20) -> None:
    """Waits for Orbax's threads, which keep running after a failed save.

    Without the wait, the threads would write into a directory that is being removed and report
    errors of their own.
    """
    deadline = time.monotonic() + timeout_secs
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # the thread has already reported its error
                thread.join(max(deadline - time.monotonic(), 0))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the tracebacks that Orbax's threads print for errors that are raised as well.

    One damaged file or a full disk makes every pending array print its own traceback. An exception
    of the main thread leaves this context before it is printed.
    """
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    level, asyncio_logger = logging.get_verbosity(), python_logging.getLogger("asyncio")
    was_disabled = asyncio_logger.disabled
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
        logging.set_verbosity(logging.FATAL)
        asyncio_logger.disabled = True
        try:
            yield
        finally:
            gc.collect()  # failed tasks and unstarted coroutines warn when they are collected
            asyncio_logger.disabled = was_disabled
            sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
            logging.set_verbosity(level)
