"""How the parameters of each architecture lie on the device mesh, by their names.

Parameters and optimizer state are split over "fsdp" (each device keeps a share and gathers a
layer's weights when it needs them, as ZeRO stage 3: Rajbhandari et al., 2020, arXiv 1910.02054) and
over "tensor", which splits hidden widths (Shoeybi et al., 2019, arXiv 1909.08053).
"""

import functools
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixer import formatting
from mixer.errors import UserError
from mixer.models.registry import ARCHITECTURES
from mixer.parallel import sharding

# The first pattern that is the whole name of a leaf, or the end of it after a "/" (the optimizer's
# moments and the average bear the parameters' names), decides. For each dimension it gives the
# axes that split it; None: the dimension is whole on each device. Leaves that no architecture
# names, biases of width C and norms, are small and whole everywhere.
RULES = (
    *(rule for architecture in ARCHITECTURES.values() for rule in architecture.placement),
    (r"head/kernel", ("fsdp", None)),  # (C, K)
    (r".*", ()),
)


@functools.cache
def _rule(name: str) -> int:
    """Number of the rule that decides for a leaf."""
    return next(
        number
        for number, (pattern, _) in enumerate(RULES)
        if re.fullmatch(f"(.*/)?{pattern}", name)
    )


def _spec(name: str, ndim: int) -> PartitionSpec:
    axes = RULES[_rule(name)][1]
    # A leaf may bear a parameter's name and not its shape, such as a moment that is not kept.
    return PartitionSpec(*axes) if len(axes) <= ndim else PartitionSpec()


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """Returns a sharding for every leaf of the train state, or of a part of it, by `RULES`.

    Raises:
      UserError: an axis does not divide a width.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = sharding.leaf_name(path)
        spec = _spec(name, len(leaf.shape))
        for size, axes in zip(leaf.shape, spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                which = " * ".join(axis for axis in axes if mesh.shape[axis] > 1)
                sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
                divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                raise UserError(
                    f"mesh ({sizes}): {which} = {parts} does not divide {size}, a width of {name} "
                    f"{tuple(leaf.shape)}; expected one of {divisors}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, abstract_state)


def describe_rules(mesh: Mesh, params: Any) -> list[str]:
    """Returns a line for each rule that decides for a parameter, after a line with the sum.

    A line has the pattern, the split, the number of arrays and their bytes per device.
    """
    sizes: dict[int, list[int]] = {}  # bytes of each array, by the rule's number
    for name, leaf in sharding.by_name(params).items():
        where = NamedSharding(mesh, _spec(name, len(leaf.shape)))
        num_bytes = math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        sizes.setdefault(_rule(name), []).append(num_bytes)
    total = formatting.short(sum(map(sum, sizes.values())), "B")
    lines = [
        f"parameters by name, what each dimension is split over, and a device's share of {total}:"
    ]
    for number, arrays in sorted(sizes.items()):
        pattern, axes = RULES[number]
        lines.append(
            f"  {pattern if axes else 'all others'}: {_described(mesh, axes)}, {len(arrays)} "
            f"array(s), {formatting.short(sum(arrays), 'B')}"
        )
    return lines


def _described(mesh: Mesh, axes: tuple) -> str:
    """Such as (-, tensor * fsdp); axes of size 1 split nothing."""
    names = []
    for entry in axes:
        several = entry if isinstance(entry, tuple) else (entry,)
        names.append(" * ".join(axis for axis in several if axis and mesh.shape[axis] > 1) or "-")
    return f"({', '.join(names)})" if any(name != "-" for name in names) else "whole"


def constrain_params(params: Any) -> Any:
    """Constrains parameters, or arrays with their names and shapes, to the mesh by `RULES`."""

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        return sharding.constrain(leaf, *_spec(sharding.leaf_name(path), leaf.ndim))

    return jax.tree.map_with_path(place, params)
