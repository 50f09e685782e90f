"""Parses the HLO text of a program."""

import dataclasses
import math
import re

BYTES = {
    **dict(pred=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4),
    **dict(s64=8, u64=8, f64=8, c64=8, c128=16),
}


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of an array in a program."""

    dtype: str
    dims: tuple[int, ...]
    in_memory: bool  # False: the array is in the core's fast memory

    @property
    def bytes(self) -> int:
        """The size of the array in bytes."""
        return math.prod(self.dims) * BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation."""

    name: str
    arrays: tuple[Array, ...]  # the arrays of the result, several for a tuple
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, key: str) -> str:
        """Returns the value of an attribute, such as the name of the computation that it calls."""
        return re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)[1]

    def branches(self) -> list[str]:
        """Returns the names of the computations of a conditional."""
        names = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if names:
            return [name.strip().lstrip("%") for name in names[1].split(",")]
        return [self.attribute(f"{value}_computation") for value in ("true", "false")]


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Parses HLO text; returns all computations by name, and the name of the entry.

    Raises:
      ValueError: the text has no entry, or a line is not an instruction.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = {}, ""
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if not line.startswith(" "):
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif head := _INSTRUCTION.match(line):
            current[head[2]] = _parse_instruction(head[2], line[head.end() :], bool(head[1]))
    if not entry:
        raise ValueError("the text has no line that starts with ENTRY")
    return computations, entry


def _parse_instruction(name: str, text: str, is_root: bool) -> Instruction:
    """Parses "TYPE op(operands), attributes"."""
    end = _split_list(text, 0)[1] if text.startswith("(") else text.index(" ")
    start = text.index("(", end)
    operands, close = _split_list(text, start)
    return Instruction(
        name=name,
        arrays=_parse_arrays(text[:end]),
        op=text[end:start].strip(),
        operands=tuple(part.split()[-1].lstrip("%") for part in operands),
        attributes=text[close:],
        is_root=is_root,
    )


def _parse_arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            dtype,
            tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
            not re.search(r"S\([1-9]\d*\)", layout or ""),
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _split_list(text: str, start: int) -> tuple[list[str], int]:
    """Returns the comma-separated parts of the list that opens at `start`, and the index after it.

    Commas inside nested brackets do not separate parts.
    """
    parts, depth, part_start = [], 0, start + 1
    for index in range(start, len(text)):
        letter = text[index]
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 or (depth == 1 and letter == ","):
            parts.append(text[part_start:index].strip())
            part_start = index + 1
        if depth == 0:
            return [part for part in parts if part], index + 1
    raise ValueError(f"unbalanced brackets: {text[:200]}")
