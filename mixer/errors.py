"""Errors of the user or the machine, which programs report in one line without a traceback."""

import difflib
import errno
import math
import signal
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake of the user; the message has the problem, the value and what is expected.

    Entry points print the message without a traceback. Other exceptions are bugs of the program and
    keep their traceback.
    """


# Error numbers for full or broken disks, permissions, names and limits of the operating system.
_SYSTEM_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


def line_of(error: BaseException) -> str | None:
    """Returns the line for an error of the user or the machine.

    Returns None for every other error, which is a bug of the program and keeps its traceback.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        return f"{error.strerror}: {error.filename or 'while reading or writing'}"
    if isinstance(error, MemoryError):
        return f"the host's memory is full: {first_line(error)}"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED: " in str(error):  # from XLA
        reason = first_line(error).partition("RESOURCE_EXHAUSTED: ")[2] or first_line(error)
        return f"the device's memory is full: {reason} (docs/scaling.md lists ways to need less)"
    return None


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a program that ends with `error`."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 1 if line_of(error) is None else 2


def check_choice(name: str, value: Any, choices: Iterable[str], hint: str = "") -> None:
    """Raises UserError unless `value` is one of `choices`.

    Args:
      name: name of the value in the message: a config key, a flag or a noun.
      value: the value.
      choices: the accepted values, which the message lists.
      hint: an explanation of the choices, which the message puts in parentheses.
    """
    choices = list(choices)
    if value not in choices:
        explanation = f" ({hint})" if hint else ""
        raise UserError(
            f"{name}={value!r}; expected one of {', '.join(choices)}{explanation}."
            f"{nearest(value, choices)}"
        )


def check_number(
    name: str, value: float, *, minimum: float = 0, limit: float = math.inf, integer: bool = False
) -> None:
    """Raises UserError unless `minimum <= value < limit`.

    Args:
      name: name of the value in the message: a config key, a flag or a noun.
      value: the value; NaN is outside of every range.
      minimum: the smallest accepted value.
      limit: the exclusive upper limit.
      integer: whether only an int is accepted.
    """
    if (integer and not isinstance(value, int)) or not minimum <= value < limit:
        kind = "whole" if integer else "finite"
        suffix = "" if limit == math.inf else f" and below {limit}"
        raise UserError(f"{name}={value!r}; expected a {kind} number of at least {minimum}{suffix}")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest of `choices`, or "" if none is close."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.5)
    return f" Did you mean {by_lower_case[matches[0]]!r}?" if matches else ""


def printable(text: str) -> str:
    """Returns the text with line breaks, control characters and non-UTF-8 bytes escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def reason_of(error: BaseException) -> str:
    """Returns the operating system's description of an error, or else the error's first line."""
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error, without TensorFlow's op names and node traces."""
    text = getattr(error, "message", None) or str(error)
    text = text.replace("{{function_node __wrapped__", "").strip()
    if "Summarized data: " in text:  # an eager assertion, with one value per line
        values = text.split("Summarized data: ")[1].splitlines()
        return " ".join(value.removeprefix("b'").removesuffix("'") for value in values)[:300]
    if text.startswith("Graph execution error:"):  # the reason comes last
        text = text.rsplit("\n\n", 1)[-1]
    line = text.splitlines()[0] if text else type(error).__name__
    line = line.split("}}")[-1].split(" [Op:")[0].strip()
    if line.startswith("assertion failed: "):  # a graph assertion, with each value in brackets
        line = line.removeprefix("assertion failed: [").removesuffix("]").replace("] [", " ")
    return line[:300]
