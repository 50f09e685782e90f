"""Formats numbers and text for people."""

import re

from mixer.errors import printable


def duration(seconds: float) -> str:
    """Formats a duration, such as 1:02:03 or 0:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def short(value: float, unit: str) -> str:
    """Formats a value with three digits and a prefix: 75.4 GFLOP, 293 kB, 13.1 ms."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value * 1e6:.3g} u{unit}" if value else f"0 {unit}"


def in_markdown(text: str) -> str:
    """Escapes Markdown and HTML markup in the text as HTML entities.

    `html.unescape` restores the text that a terminal shows.
    """
    return re.sub(r"[&<>|*\[\]`~\\]|\b_|_\b|^#", _entity, printable(text))


def _entity(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"
