"""Assigns shardings on the device mesh to parameters by their names.

Parameters and optimizer state are split over two axes. On "fsdp" each device keeps a shard and
gathers a layer's weights when it needs them (ZeRO stage 3: Rajbhandari et al., 2020, arXiv
1910.02054). The axis "tensor" splits hidden widths (Shoeybi et al., 2019, arXiv 1909.08053).
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

# The first matching pattern applies. It must match a leaf's full name, or the end of the name after
# a "/", because the optimizer's moments and the average end in the parameters' names. A rule lists
# the mesh axes that split each of the last dimensions; None: the dimension is not split. Leading
# dimensions, and leaves without a rule of an architecture (biases of width C, and norms, which are
# small), are not split.
RULES = (
    *(rule for architecture in ARCHITECTURES.values() for rule in architecture.placement),
    (r"head/kernel", ("fsdp", None)),  # (C, K)
    (r".*", ()),
)


@functools.cache
def _rule(name: str) -> int:
    """Returns the number of the rule that applies to a leaf."""
    return next(
        number
        for number, (pattern, _) in enumerate(RULES)
        if re.fullmatch(f"(.*/)?{pattern}", name)
    )


def _spec(name: str, ndim: int) -> PartitionSpec:
    axes = RULES[_rule(name)][1]
    # A leaf with a parameter's name may lack its shape, such as a moment that is not stored.
    if not axes or len(axes) > ndim:
        return PartitionSpec()
    return PartitionSpec(*(None,) * (ndim - len(axes)), *axes)


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """Returns the sharding of every leaf of the train state, or of a subtree, from `RULES`.

    Raises:
      UserError: a mesh axis does not divide a width.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = sharding.leaf_name(path)
        spec = _spec(name, len(leaf.shape))
        for size, axes in zip(leaf.shape, spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            num_shards = math.prod(mesh.shape[axis] for axis in axes)
            if size % num_shards:
                product = " * ".join(axis for axis in axes if mesh.shape[axis] > 1)
                sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
                divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                raise UserError(
                    f"mesh ({sizes}): {product} = {num_shards} does not divide {size}, a width of "
                    f"{name} {tuple(leaf.shape)}; expected one of {divisors}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, abstract_state)


def describe_rules(mesh: Mesh, params: Any) -> list[str]:
    """Returns a line with the total size, then a line for each rule that applies to a parameter.

    A rule's line has its pattern, its split, the number of arrays and their bytes per device.
    """
    sizes: dict[int, list[int]] = {}  # bytes of each array, by the rule's number
    for name, leaf in sharding.by_name(params).items():
        placement = NamedSharding(mesh, _spec(name, len(leaf.shape)))
        num_bytes = math.prod(placement.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        sizes.setdefault(_rule(name), []).append(num_bytes)
    total = formatting.short(sum(map(sum, sizes.values())), "B")
    lines = [
        f"parameters by name, the mesh axes of each dimension, and bytes per device of {total}:"
    ]
    for number, arrays in sorted(sizes.items()):
        pattern, axes = RULES[number]
        lines.append(
            f"  {pattern if axes else 'all others'}: {_described(mesh, axes)}, {len(arrays)} "
            f"array(s), {formatting.short(sum(arrays), 'B')}"
        )
    return lines


def _described(mesh: Mesh, axes: tuple) -> str:
    """Returns a text such as "(-, tensor * fsdp)"; axes of size 1 are left out."""
    names = []
    for entry in axes:
        entry_axes = entry if isinstance(entry, tuple) else (entry,)
        split_axes = [axis for axis in entry_axes if axis and mesh.shape[axis] > 1]
        names.append(" * ".join(split_axes) or "-")
    return f"({', '.join(names)})" if any(name != "-" for name in names) else "whole"


def constrain_params(params: Any) -> Any:
    """Constrains parameters, or arrays with their names and shapes, to the shardings of `RULES`."""

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        return sharding.constrain(leaf, *_spec(sharding.leaf_name(path), leaf.ndim))

    return jax.tree.map_with_path(place, params)
