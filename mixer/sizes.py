"""Sizes of images and patches: a side in pixels, or (height, width)."""

from collections.abc import Sequence
from typing import Any

from mixer.errors import UserError, check_number

RGB_CHANNELS = 3

Size = int | Sequence[int]


def pair(size: Size) -> tuple[int, int]:
    """Returns (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def shorten(size: Size) -> int | tuple[int, int]:
    """Returns the side of a square, or (height, width): the form of configs and model fields."""
    height, width = pair(size)
    return height if height == width else (height, width)


def text(size: Size) -> str:
    """Returns a size for messages, such as "224" or "64 x 32"."""
    height, width = pair(size)
    return str(height) if height == width else f"{height} x {width}"


def check_size(name: str, value: Any, *, limit: int) -> None:
    """Raises UserError unless `value` is a whole number from 1 to `limit` - 1, or two of them.

    Args:
      name: name of the value in the message.
      value: the value.
      limit: the exclusive upper limit.
    """
    is_sequence = isinstance(value, tuple | list)
    if isinstance(value, str) or (is_sequence and len(value) != 2):
        raise UserError(f"{name}={value!r}; expected a side in pixels, or (height, width)")
    for side in value if is_sequence else (value,):
        check_number(name, side, minimum=1, limit=limit, integer=True)
