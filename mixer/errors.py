"""A user's mistake: one clear line, and no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was wrong, the value, and what would be accepted, in one line.

    The entry points print it without a traceback; every other exception is the program's own fault
    and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest of `known`, or "" where none is close."""
    lowered = {other.lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


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
