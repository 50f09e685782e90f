"""A user's mistake or a failure of the machine: one clear line, and no traceback."""

import difflib
import errno
import math
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """What was wrong, the value, and what would be accepted, in one line.

    The entry points print it without a traceback; every other exception is the program's own fault
    and keeps its traceback.
    """


# A disk that is full or broken, rights, names and limits of the system.
_OF_SYSTEM = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


def line_of(error: BaseException) -> str | None:
    """The line for an error that is a user's mistake or a failure of the machine.

    None for every other error: a fault of the program, which keeps its traceback.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _OF_SYSTEM:
        return f"{error.strerror}: {error.filename or 'while reading or writing'}"
    if isinstance(error, MemoryError):
        return f"the host's memory is full: {first_line(error)}"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED: " in str(error):  # of XLA
        reason = first_line(error).partition("RESOURCE_EXHAUSTED: ")[2] or first_line(error)
        return f"the device's memory is full: {reason} (docs/scaling.md says what takes less)"
    return None


def check_choice(what: str, value: Any, choices: Iterable[str], hint: str = "") -> None:
    """Raises UserError unless `value` is one of `choices`.

    Args:
      what: what has the value: a config key, a flag or a noun.
      value: the value.
      choices: the accepted values, which the message lists.
      hint: an explanation of the choices, which the message puts in parentheses.
    """
    choices = list(choices)
    if value not in choices:
        explanation = f" ({hint})" if hint else ""
        raise UserError(
            f"{what}={value!r}; expected one of {', '.join(choices)}{explanation}."
            f"{nearest(value, choices)}"
        )


def check_number(
    what: str, value: float, *, least: float = 0, below: float = math.inf, whole: bool = False
) -> None:
    """Raises UserError unless `value` is a number of at least `least` and below `below`.

    Args:
      what: what has the value: a config key, a flag or a noun.
      value: the value; NaN is outside of every range.
      least: the least accepted value.
      below: the first value that is too large.
      whole: whether only an int is accepted.
    """
    if (whole and not isinstance(value, int)) or not least <= value < below:
        kind = "whole" if whole else "finite"
        limit = "" if below == math.inf else f" and below {below}"
        raise UserError(f"{what}={value!r}; expected a {kind} number of at least {least}{limit}")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest of `choices`, or "" where none is close."""
    lowered = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def printable(text: str) -> str:
    """The text with line breaks, control characters and bytes that are no UTF-8 written out."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def first_line(error: Exception) -> str:
    """TensorFlow's message without its op names and node traces."""
    text = getattr(error, "message", None) or str(error)
    text = text.replace("{{function_node __wrapped__", "").strip()
    if "Summarized data: " in text:  # an assertion outside of a graph: one value a line
        values = text.split("Summarized data: ")[1].splitlines()
        return " ".join(value.removeprefix("b'").removesuffix("'") for value in values)[:300]
    if text.startswith("Graph execution error:"):  # what a traced function adds comes first
        text = text.rsplit("\n\n", 1)[-1]
    line = text.splitlines()[0] if text else type(error).__name__
    line = line.split("}}")[-1].split(" [Op:")[0].strip()
    if line.startswith("assertion failed: "):  # each value in brackets
        line = line.removeprefix("assertion failed: [").removesuffix("]").replace("] [", " ")
    return line[:300]
