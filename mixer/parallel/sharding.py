"""The device mesh, and how arrays lie on it.

The mesh has three axes. The batch is split over "data" and "fsdp"; parameters and optimizer state
are split over "fsdp" (each device keeps a share and gathers a layer's weights when it needs them,
as ZeRO stage 3: Rajbhandari et al., 2020, arXiv 1910.02054) and over "tensor", which splits the
hidden width of both MLPs (Shoeybi et al., 2019, arXiv 1909.08053). XLA's partitioner makes the
communication from these annotations; the numbers are the same on any mesh, up to rounding.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixer import formatting
from mixer.errors import UserError, nearest

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes over which a batch is split

# How the state lies on the mesh. The first pattern that is the whole name of a leaf, or the end of
# it after a "/" (the optimizer's moments and the average bear the parameters' names), decides;
# None: that dimension is whole on each device. What is not named, biases of width C and norms,
# is small and whole everywhere.
RULES = (
    (r"stem/kernel", (None, None, None, "fsdp")),  # (P, P, 3, C)
    # (S, D_S) and (D_S, S): S is 196 at 224 px, which hardly any number of devices divides.
    (r"MixerBlock_\d+/token_mixing/Dense_0/kernel", (None, ("tensor", "fsdp"))),
    (r"MixerBlock_\d+/token_mixing/Dense_1/kernel", (("tensor", "fsdp"), None)),
    (r"MixerBlock_\d+/channel_mixing/Dense_0/kernel", ("fsdp", "tensor")),  # (C, D_C)
    (r"MixerBlock_\d+/channel_mixing/Dense_1/kernel", ("tensor", "fsdp")),  # (D_C, C)
    (r"MixerBlock_\d+/\w+_mixing/Dense_0/bias", ("tensor",)),  # (D_S,), (D_C,)
    (r"head/kernel", ("fsdp", None)),  # (C, K)
    (r".*", ()),
)


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out on a mesh with the axes "data", "fsdp" and "tensor".

    Across slices, whose network is slow, "data" is laid first and "fsdp" next; "tensor" stays
    within a slice.

    Args:
      axes: size of each axis, 1 where it is not given; one of them may be -1: what the others leave
        of the devices.
      devices: all of them if not given.

    Raises:
      UserError: an unknown axis, or the sizes do not multiply to the number of devices.
    """
    for name in axes:
        if name not in AXES:
            raise UserError(f"mesh has no axis {name!r}; {', '.join(AXES)}.{nearest(name, AXES)}")
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    given = {name: axes.get(name, 1) for name in AXES}
    sizes = list(given.values())
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {given}: sizes are at least 1, and only one of them may be -1")
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count:
        raise UserError(
            f"mesh {given} does not fit {count} device(s): the sizes must multiply to {count}"
        )
    # Neighbours belong together: "tensor" lies within a host where it fits, hosts hold rows of the
    # batch that lie together, and what crosses slices is the outermost axis.
    ordered = sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))
    slices = len({_slice(device) for device in devices})
    if sizes[0] * sizes[1] % slices:
        raise UserError(
            f"mesh {given} does not fit {slices} slices: data * fsdp must be a multiple of {slices}"
        )
    # Explicit axes, jax.make_mesh's default since 0.9, make Linen's modules fail.
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(np.array(ordered).reshape(sizes), AXES, axis_types=types)


def _slice(device: jax.Device) -> int:
    """Which slice of a multislice TPU it is of; 0 where there are none."""
    return getattr(device, "slice_index", 0)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis is split over "data" and "fsdp"; everything else is whole on each device."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless the devices along "data" and "fsdp" divide `batch_size`."""
    shards = batch_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        low = max(batch_size // shards, 0) * shards
        near = " or ".join(str(size) for size in (low, low + shards) if size)
        axes = "axis 'data'" if mesh.shape["fsdp"] == 1 else "axes 'data' and 'fsdp'"
        raise UserError(
            f"{name}={batch_size}: the {shards} devices of the mesh {axes} do not divide it; "
            f"the nearest sizes that work are {near}"
        )


def leaf_name(path: Any) -> str:
    """Returns the name of a leaf: the keys on the way to it, joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name, in the tree's order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def abstract(tree: Any, shardings: Any = None) -> Any:
    """Returns shapes, dtypes and shardings of a tree's leaves.

    Args:
      tree: of arrays, or of their shapes and dtypes.
      shardings: a sharding for each leaf; None: the leaves' own.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def num_values(tree: Any) -> int:
    """Returns the number of values in all leaves of a tree together."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


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
    # What bears a parameter's name and not its shape, such as a moment that nobody keeps.
    return PartitionSpec(*axes) if len(axes) <= ndim else PartitionSpec()


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """A sharding for every leaf of the train state, or of a part of it, by `RULES`.

    Raises:
      UserError: an axis does not divide a width.
    """

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        name = leaf_name(path)
        spec = _spec(name, len(leaf.shape))
        for size, axes in zip(leaf.shape, spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                which = " * ".join(axis for axis in axes if mesh.shape[axis] > 1)
                sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
                fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                raise UserError(
                    f"mesh ({sizes}): {which} = {parts} does not divide {size}, a width of {name} "
                    f"{tuple(leaf.shape)}; what does: {fits}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(of_leaf, abstract_state)


def describe_rules(mesh: Mesh, params: Any) -> list[str]:
    """A line for each rule that decides for a parameter: how many, how split, bytes per device.

    The first heads the others, and has the sum.
    """
    found: dict[int, list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        spec = NamedSharding(mesh, _spec(name, len(leaf.shape)))
        num_bytes = math.prod(spec.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        found.setdefault(_rule(name), []).append(num_bytes)
    total = sum(map(sum, found.values()))
    return [
        f"parameters by name, what each dimension is split over, and a device's share of "
        f"{formatting.short(total, 'B')}:",
        *(
            f"  {RULES[number][0] if RULES[number][1] else 'all others'}: "
            f"{_described(mesh, RULES[number][1])}, {len(sizes)} array(s), "
            f"{formatting.short(sum(sizes), 'B')}"
            for number, sizes in sorted(found.items())
        ),
    ]


def _described(mesh: Mesh, axes: tuple) -> str:
    """Such as (-, tensor * fsdp); axes of size 1 split nothing."""
    names = []
    for each in axes:
        several = each if isinstance(each, tuple) else (each,)
        names.append(" * ".join(axis for axis in several if axis and mesh.shape[axis] > 1) or "-")
    return f"({', '.join(names)})" if any(name != "-" for name in names) else "whole"


def bytes_per_device(tree: Any) -> int:
    """What the leaves, which have shardings, take on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function` such that `constrain` within it, when it is traced, means this mesh."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Says how `x` lies on the mesh of `on_mesh`; does nothing without one.

    Args:
      x: an intermediate value.
      *axes: for each of its dimensions a mesh axis, several, None (whole on each device), or
        PartitionSpec.UNCONSTRAINED (as XLA likes).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def sum_over_shards(function: Callable, *batches: jax.Array) -> Any:
    """The sum of `function(*rows)` over the parts of a batch that devices of `on_mesh` have.

    Linear in what is summed over the batch, `function` is computed where the rows are, before they
    are summed over the devices. XLA sums first, once for each part of a batch whose gradient is
    accumulated, unless nothing but additions follows.

    Args:
      function: from arrays to a tree of arrays.
      *batches: (N, ...), split over `BATCH`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh)
    if shards == 1:
        return function(*batches)

    def apart(x: jax.Array) -> jax.Array:
        return constrain(x, BATCH, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))

    cut = [apart(x.reshape(shards, -1, *x.shape[1:])) for x in batches]
    each = jax.vmap(function)(*cut)
    return jax.tree.map(lambda x: jnp.sum(apart(x), 0), each)


def constrain_params(params: Any) -> Any:
    """`constrain` of parameters, or of what has their names and shapes, by `RULES`."""
    return jax.tree.map_with_path(
        lambda path, leaf: constrain(leaf, *_spec(leaf_name(path), leaf.ndim)), params
    )


def local_shards(mesh: Mesh, process_index: int) -> tuple[int, ...]:
    """Which of a batch's `batch_shards` parts lie on devices of a process, ascending."""
    by_shard = mesh.devices.reshape(batch_shards(mesh), -1)
    return tuple(
        shard
        for shard, devices in enumerate(by_shard)
        if any(device.process_index == process_index for device in devices)
    )


def data_processes(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which part of the data this process reads, and how many parts there are.

    Fewer than there are processes, where some of them share their rows.

    Raises:
      UserError: two processes share some of their rows and not all.
    """
    processes = {device.process_index for device in mesh.devices.flat}
    parts = sorted({local_shards(mesh, process) for process in processes})
    if sum(map(len, parts)) != batch_shards(mesh) or len(set(map(len, parts))) > 1:
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"mesh ({sizes}) cuts the batch across {len(processes)} processes unevenly; choose "
            "tensor so that it divides the devices of a host or is a multiple of them"
        )
    return parts.index(local_shards(mesh, jax.process_index())), len(parts)


def abstract_batch(
    example_spec: Mapping[str, tuple[tuple[int, ...], str]], batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a global batch of such examples (`Split.example_spec`)."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in example_spec.items()
    }


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows of a batch: those of its `local_shards`."""
    sharding, shards = batch_sharding(mesh), local_shards(mesh, jax.process_index())

    def put(local: np.ndarray) -> jax.Array:
        size = len(local) // len(shards)  # rows of a shard

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start = shards.index((index[0].start or 0) // size) * size
            return local[start : start + size]

        shape = (size * batch_shards(mesh), *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, rows)

    return {key: put(value) for key, value in batch.items()}


def prefetch(
    batches: Iterator[Mapping[str, np.ndarray]],
    put: Callable[[Mapping[str, np.ndarray]], Any],
    depth: int,
) -> Iterator[Any]:
    """Keeps `depth` batches on their way to the device, made and sent by a thread of their own.

    It starts at once; the thread ends with the iterator.
    """
    end = object()

    def fetch():
        batch = next(batches, end)
        return batch if batch is end else put(batch)

    thread = ThreadPoolExecutor(1, "prefetch")
    pending = collections.deque(thread.submit(fetch) for _ in range(depth))

    def fetched():
        try:
            while (batch := pending.popleft().result()) is not end:
                pending.append(thread.submit(fetch))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)

    return fetched()
