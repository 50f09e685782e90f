"""The order of the class names of a folder or label file: the config's dataset.class_order."""

import codecs
import re
from collections.abc import Sequence

from mixer.data.sources import folder
from mixer.errors import UserError, printable

SORTED, NATURAL = "sorted", "natural"


def arrange(order: str, names: Sequence[str], *, are_numbers: bool = False) -> tuple[str, ...]:
    """Returns the class names of a model in label order.

    Args:
      order: "sorted"; "natural", which puts class2 before class10; or a file with one name per
        line, which may also name classes that the data lacks.
      names: sorted names of the classes of the data.
      are_numbers: whether the data has class numbers instead of names: indices of the file's lines.

    Raises:
      UserError: the file cannot be read, a name is empty or occurs twice, or the file lacks a class
        of the data.
    """
    if order == SORTED:
        return tuple(names)
    if order == NATURAL:
        return tuple(sorted(names, key=_natural))
    file_names = read_class_file(order)
    if not are_numbers and (missing := sorted(set(names) - set(file_names))):
        raise UserError(
            f"dataset.class_order={printable(order)} lacks {len(missing):,} of {len(names):,} "
            f"classes of the data: {folder.listed(missing)}; expected one class name per line"
        )
    return file_names


def _natural(name: str) -> tuple:
    """Returns a sort key by which runs of digits are compared as numbers."""
    parts = re.split(r"([0-9]+)", name)  # text and digits alternate
    digits = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = [(len(part), part) for part in digits]
    return parts, name


def read_class_file(path: str) -> tuple[str, ...]:
    """Reads the class names of a file, one per line; blank lines at its end are ignored."""
    file = folder.find_file("dataset.class_order", path)
    lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(
            f"dataset.class_order={printable(path)} is empty; expected one class name per line"
        )
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = folder.decode(line)
        if not name.strip():
            raise UserError(
                f"dataset.class_order={printable(path)}, line {number}: the line is blank; "
                "expected a class name"
            )
        if name in line_of:
            raise UserError(
                f"dataset.class_order={printable(path)}, line {number}: {printable(name)!r} is "
                f"already in line {line_of[name]}; expected each class once"
            )
        line_of[name] = number
    return tuple(line_of)
