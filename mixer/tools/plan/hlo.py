"""Counts FLOPs, memory traffic and communication of a compiled program from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once and ignores communication.
This module multiplies the body of a loop by its trip count. The counts are for one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from mixer.tools.plan import hlo_text
from mixer.tools.plan.hlo_text import Instruction

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Instructions that move no data themselves; the computations that they call are counted.
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "custom-call", "partition-id", "replica-id", "domain"),
    *("async-start", "async-update", "opt-barrier"),
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Communication of one kind.

    Attributes:
      count: number of operations.
      payload: bytes of the arrays that are reduced, gathered or sent.
      sent: minimum bytes that a device sends: (n - 1) / n of a payload among n devices, and twice
        that for all-reduce (the ring algorithm, which is optimal).
    """

    count: int = 0
    payload: float = 0.0
    sent: float = 0.0


@dataclasses.dataclass(frozen=True)
class Counts:
    """The counts of one run of a program on one device.

    Attributes:
      flops: FLOPs of matmuls and convolutions, two per multiply-add; multiplications with padding
        are not counted.
      bytes: bytes read from and written to the device's main memory, once per array and kernel.
      collectives: traffic by kind.
      cycles: the TPU compiler's estimate; 0 if there is none.
      unknown_loops: loops whose trip count depends on the data; their bodies count once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: tuple[tuple[str, Traffic], ...] = ()
    cycles: float = 0.0
    unknown_loops: int = 0


class UnreadableProgramError(Exception):
    """The text of a program is damaged, or in a form that this module does not know."""


def count(text: str) -> Counts:
    """Counts a program from its HLO text.

    Args:
      text: HLO text, optimized (`compiled.as_text()`) or not (`lowered.as_text("hlo")`).

    Raises:
      UnreadableProgramError: the text cannot be read.
    """
    try:
        return _count(*hlo_text.parse(text))
    except _DAMAGES as error:  # each is how a missing part of the text shows
        raise UnreadableProgramError(f"{type(error).__name__}: {error}") from error


_DAMAGES = (
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration),
    *(TypeError, ValueError),
)


def _count(computations: dict[str, dict[str, Instruction]], entry: str) -> Counts:
    """Counts a parsed program."""

    @functools.cache
    def counts_of(name: str) -> Counts:
        """Counts a computation that is not part of a fusion."""
        computation = computations[name]
        parts, in_fusions = [], {}
        for instruction in computation.values():
            counts = _count_instruction(instruction, computation, computations, fused=False)
            parts.append((1, counts))
            if instruction.op == "while":
                times = _trip_count(instruction, computations)
                parts.append((times or 1, counts_of(instruction.attribute("body"))))
                parts.append((1, Counts(unknown_loops=int(times is None))))
            elif instruction.op == "conditional":
                branches = [counts_of(name) for name in instruction.branches()]
                parts.append((1, max(branches, key=lambda branch: (branch.flops, branch.bytes))))
            elif instruction.op == "call":
                parts.append((1, counts_of(instruction.attribute("to_apply"))))
            elif instruction.op == "async-start":
                parts.append((1, counts_of(instruction.attribute("calls"))))
            elif instruction.op == "fusion":
                # On TPUs a collective that overlaps with matmuls appears in several fusions (its
                # start, its overlap and its end) with the same channel.
                for inner, counts in _count_fusion(instruction.attribute("calls"), computations):
                    channel = re.search(r"channel_id=(\d+)", inner.attributes)
                    if counts.collectives and channel:
                        in_fusions[channel[1]] = counts
                    else:
                        parts.append((1, counts))
        return _sum([*parts, *((1, counts) for counts in in_fusions.values())])

    return counts_of(entry)


def _trip_count(loop: Instruction, computations: dict) -> int | None:
    """Returns the trip count of a loop; None if it depends on the data."""
    constant = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if constant:
        return int(constant[1])
    # lax.scan and lax.map count from 0 to a constant.
    condition = computations[loop.attribute("condition")]
    root = next(i for i in condition.values() if i.is_root)
    if root.op != "compare" or "direction=LT" not in root.attributes:
        return None
    limit = condition[root.operands[1]]
    if limit.op != "constant" or limit.arrays[0].dtype != "s32":
        return None
    return int(limit.operands[0])


def _count_fusion(name: str, computations: dict) -> Iterator[tuple[Instruction, Counts]]:
    """Yields (instruction, counts) of a fusion's computation and of the fusions in it."""
    for inner in computations[name].values():
        counts = _count_instruction(inner, computations[name], computations, fused=True)
        if inner.op == "all-reduce" and name.startswith("all-reduce-scatter"):
            # On TPUs, reduce-scatter is an all-reduce and the slice that the device keeps.
            traffic = _traffic("reduce-scatter", inner, computations[name])
            counts = dataclasses.replace(counts, collectives=(("reduce-scatter", traffic),))
        yield inner, counts
        if inner.op == "fusion":
            yield from _count_fusion(inner.attribute("calls"), computations)


def _count_instruction(
    instruction: Instruction, computation: dict[str, Instruction], computations: dict, fused: bool
) -> Counts:
    """Counts an instruction without the computations that it calls."""
    kind = instruction.op.removesuffix("-start")
    collectives, flops = (), 0.0
    if kind in COLLECTIVES:
        collectives = ((kind, _traffic(kind, instruction, computation)),)
    elif instruction.op in ("dot", "convolution") or _is_gemm(instruction):
        left, right = (computation[name].arrays[0].dims for name in instruction.operands[:2])
        if instruction.op == "convolution":
            flops = _convolution_flops(instruction, left, right)
        else:
            flops = _matmul_flops(instruction, left)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return Counts(
        flops=flops,
        bytes=0.0 if fused else _count_bytes(instruction, computation, computations),
        collectives=collectives,
        cycles=float(cycles[1]) if cycles and not fused else 0.0,
    )


def _is_gemm(instruction: Instruction) -> bool:
    """Whether the instruction is a matmul in a GPU library, possibly with a bias and more."""
    return instruction.op == "custom-call" and '"gemm_backend_config"' in instruction.attributes


def _matmul_flops(matmul: Instruction, left: tuple[int, ...]) -> float:
    """Returns 2 * result elements * contracted sizes of a dot or a matmul in a GPU library."""
    # lhs_contracting_dims={1} in a dot, "lhs_contracting_dimensions":["1"] in a library's matmul
    contracted = re.search(r'lhs_contracting_dim\w+"?[=:][{\[]([\d,"]*)', matmul.attributes)[1]
    sizes = [left[int(dim)] for dim in re.findall(r"\d+", contracted)]
    return 2.0 * math.prod(matmul.arrays[0].dims) * math.prod(sizes)


def _convolution_flops(
    convolution: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
    """Returns 2 * batch * output features * input features * positions outside the padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    left_labels, right_labels, out_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    window = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(label for label in left_labels if label.isdigit())

    def values(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    positions = 1
    for label, stride, pad, left_step, right_step in zip(
        spatial,
        values("stride", "1"),
        values("pad", "0_0"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        strict=True,
    ):
        size = left[left_labels.index(label)]
        out = np.arange(convolution.arrays[0].dims[out_labels.index(label)])[:, None]
        tap = np.arange(right[right_labels.index(label)])[None]
        position = out * int(stride) + tap * int(right_step) - int(pad.split("_")[0])
        is_inside = (position >= 0) & (position <= (size - 1) * int(left_step))
        positions *= int(np.sum(is_inside & (position % int(left_step) == 0)))
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    batch = left[left_labels.index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * batch * right[right_labels.index("i")] * right[right_labels.index("o")] * positions


def _traffic(kind: str, instruction: Instruction, computation: dict[str, Instruction]) -> Traffic:
    """Returns the traffic of a collective."""
    size = sum(array.bytes for name in instruction.operands for array in computation[name].arrays)
    devices = _group_size(instruction.attributes)
    if kind == "all-gather":
        size *= devices
    share = {"all-reduce": 2.0, "collective-permute": None, "collective-broadcast": None}
    factor = share.get(kind, 1.0)
    sent = size if factor is None else factor * size * (devices - 1) / devices
    return Traffic(1, size, sent)


def _group_size(attributes: str) -> int:
    """Returns the number of devices in each group of a collective."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if iota:
        return int(iota[1].split(",")[-1])
    group = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(group[1].split(",")) if group else 1


def _count_bytes(
    instruction: Instruction, computation: dict[str, Instruction], computations: dict
) -> float:
    """Returns the bytes of main memory that an instruction outside fusions reads and writes."""
    op = instruction.op
    if _is_gemm(instruction):
        # Exclude the last array of the result, which is the library's scratch memory.
        inputs = [computation[name].arrays for name in instruction.operands if name in computation]
        arrays = [*instruction.arrays[:-1], *(array for group in inputs for array in group)]
        return float(sum(array.bytes for array in arrays))
    if (
        op in _NO_TRAFFIC
        or op.endswith(("-done", "-update"))
        or op.removesuffix("-start") in COLLECTIVES
    ):
        return 0.0
    out = sum(array.bytes for array in instruction.arrays if array.in_memory)
    operands = [computation[name] for name in instruction.operands if name in computation]
    if op in ("slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start"):
        # The result of a "-start" instruction is (operand, slice, flag).
        part = instruction.arrays[1 if op.endswith("-start") else 0]
        return part.bytes * (operands[0].arrays[0].in_memory + part.in_memory)
    if op == "dynamic-update-slice":
        return 2.0 * operands[1].arrays[0].bytes
    if op == "copy-start":  # the result is (destination, source, flag)
        return sum(array.bytes for array in instruction.arrays[:2] if array.in_memory)
    if op != "fusion":
        arrays = [array for operand in operands for array in operand.arrays]
        return out + sum(array.bytes for array in arrays if array.in_memory)
    inner = computations[instruction.attribute("calls")]
    read = 0.0
    for number, operand in enumerate(operands):
        if all(array.in_memory for array in operand.arrays):
            size = sum(array.bytes for array in operand.arrays)
            read += _bytes_read(inner, number, size, computations)
    return read + _bytes_written(inner, out)


def _bytes_read(inner: dict[str, Instruction], number: int, size: int, computations: dict) -> float:
    """Returns the bytes of an operand that a fusion reads: only the slices, if it slices it."""
    names = {i.name for i in inner.values() if i.op == "parameter" and i.operands == (str(number),)}
    read, has_grown = 0.0, True
    while has_grown:  # follow bitcasts, which are the operand in another shape
        casts = {i.name for i in inner.values() if i.op == "bitcast" and i.operands[0] in names}
        has_grown, names = not casts <= names, names | casts
    for user in inner.values():
        if user.op == "bitcast" or not names.intersection(user.operands):
            continue
        if user.op in ("slice", "dynamic-slice", "gather") and user.operands[0] in names:
            read += user.arrays[0].bytes
        elif user.op == "fusion":
            nested = computations[user.attribute("calls")]
            for index, name in enumerate(user.operands):
                if name in names:
                    read += _bytes_read(nested, index, size, computations)
        elif user.op != "dynamic-update-slice" or user.operands[0] not in names:
            return size
    return min(read, size)


def _bytes_written(inner: dict[str, Instruction], size: float) -> float:
    """Returns the bytes that a fusion writes: only the update, if it updates an array in place."""
    root = next(i for i in inner.values() if i.is_root)
    ends = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    for end in ends:
        result = end
        while end.op == "bitcast":
            end = inner[end.operands[0]]
        if end.op == "dynamic-update-slice" and result.arrays[0].in_memory:
            size -= result.arrays[0].bytes - inner[end.operands[1]].arrays[0].bytes
    return max(size, 0.0)


def _sum(parts: Iterable[tuple[int, Counts]]) -> Counts:
    """Sums pairs of (multiplier, counts)."""
    numbers = dict.fromkeys(("flops", "bytes", "cycles", "unknown_loops"), 0)
    traffic: dict[str, Traffic] = {}
    for times, counts in parts:
        for name in numbers:
            numbers[name] += times * getattr(counts, name)
        for kind, added in counts.collectives:
            total = traffic.get(kind, Traffic())
            traffic[kind] = Traffic(
                total.count + times * added.count,
                total.payload + times * added.payload,
                total.sent + times * added.sent,
            )
    ordered = tuple((kind, traffic[kind]) for kind in COLLECTIVES if kind in traffic)
    return Counts(**numbers, collectives=ordered)
