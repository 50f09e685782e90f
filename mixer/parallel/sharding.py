"""The device mesh, and the shardings of batches.

The mesh has three axes. The batch is split over "data" and "fsdp"; `mixer.models.placement` splits
parameters and optimizer state over "fsdp" and "tensor". XLA's partitioner derives the communication
from these annotations. Results are the same on any mesh, up to rounding.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixer.errors import UserError, check_choice

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split a batch


def mesh_sizes(axes: Mapping[str, int], count: int) -> dict[str, int]:
    """Returns the size of each axis of `AXES`.

    Args:
      axes: sizes by axis; the default is 1, and one size may be -1, for the remaining devices.
      count: number of devices.

    Raises:
      UserError: an axis is unknown, or the product of the sizes is not the number of devices.
    """
    for name in axes:
        check_choice("axis of mesh", name, AXES)
    requested = {name: axes.get(name, 1) for name in AXES}
    fixed = [size for size in requested.values() if size != -1]
    if len(fixed) < len(requested) - 1 or min(fixed) < 1:
        raise UserError(f"mesh {requested}; expected sizes of at least 1, or -1 for one of them")
    remaining = count // math.prod(fixed)
    sizes = {name: remaining if size == -1 else size for name, size in requested.items()}
    if math.prod(sizes.values()) != count:
        raise UserError(
            f"mesh {requested} does not fit {count} device(s): the sizes must multiply to {count}"
        )
    return sizes


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes "data", "fsdp" and "tensor".

    The network between TPU slices is slow, so slices split "data" first and "fsdp" next, and never
    "tensor".

    Args:
      axes: sizes by axis, as for `mesh_sizes`.
      devices: the devices; None: all.

    Raises:
      UserError: as for `mesh_sizes`, or the number of slices does not divide data * fsdp.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(mesh_sizes(axes, len(devices)).values())
    # In this order "tensor" stays within a host if it fits, each host holds contiguous rows of the
    # batch, and only the outermost axis crosses slices.
    ordered = sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))
    slices = len({_slice(device) for device in devices})
    if sizes[0] * sizes[1] % slices:
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not fit {slices} slices: data * fsdp "
            f"must be a multiple of {slices}"
        )
    # Explicit axes, jax.make_mesh's default since 0.9, make Linen's modules fail.
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(np.array(ordered).reshape(sizes), AXES, axis_types=types)


def _slice(device: jax.Device) -> int:
    """Returns the number of a device's TPU slice; 0 if there are no slices."""
    return getattr(device, "slice_index", 0)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits only the batch axis, over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
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
      tree: arrays, or their shapes and dtypes.
      shardings: a sharding for each leaf; None: those of the leaves.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def num_values(tree: Any) -> int:
    """Returns the total number of values in the leaves of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes per device of a tree whose leaves have shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Returns `function`, in which `constrain` refers to this mesh during tracing."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Constrains the sharding of `x` on the mesh of `on_mesh`; does nothing without a mesh.

    Args:
      x: an intermediate value.
      *axes: for each dimension a mesh axis, several axes, None (not split), or
        PartitionSpec.UNCONSTRAINED (XLA decides).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def sum_over_shards(function: Callable, *batches: jax.Array) -> Any:
    """Returns the sum of `function(*shards)` over the batch's shards on the mesh of `on_mesh`.

    The function must be linear in its sums over the batch. It is computed on each shard before the
    sum over the devices. Otherwise XLA would sum over the devices first, once per microbatch of an
    accumulated gradient, unless only additions follow.

    Args:
      function: maps arrays to a tree of arrays.
      *batches: arrays (N, ...), split over `BATCH`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh)
    if shards == 1:
        return function(*batches)

    def split(x: jax.Array) -> jax.Array:
        return constrain(x, BATCH, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))

    sharded = [split(x.reshape(shards, -1, *x.shape[1:])) for x in batches]
    results = jax.vmap(function)(*sharded)
    return jax.tree.map(lambda x: jnp.sum(split(x), 0), results)


def local_shards(mesh: Mesh, process_index: int) -> tuple[int, ...]:
    """Returns the numbers of the batch shards on a process's devices, in ascending order."""
    by_shard = mesh.devices.reshape(batch_shards(mesh), -1)
    return tuple(
        shard
        for shard, devices in enumerate(by_shard)
        if any(device.process_index == process_index for device in devices)
    )


def data_processes(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process reads part `index` of `count` parts of the data.

    There are fewer parts than processes if processes share their rows of the batch.

    Raises:
      UserError: two processes share only some of their rows.
    """
    processes = {device.process_index for device in mesh.devices.flat}
    parts = sorted({local_shards(mesh, process) for process in processes})
    if sum(map(len, parts)) != batch_shards(mesh) or len(set(map(len, parts))) > 1:
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"mesh ({sizes}) divides the batch unevenly among {len(processes)} processes; "
            "choose tensor so that it divides the devices of a host or is a multiple of them"
        )
    return parts.index(local_shards(mesh, jax.process_index())), len(parts)


def abstract_batch(
    example_spec: Mapping[str, tuple[tuple[int, ...], str]], batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a global batch; see `Split.example_spec`."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in example_spec.items()
    }


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays from this process's rows of a batch, those of its `local_shards`."""
    sharding, shards = batch_sharding(mesh), local_shards(mesh, jax.process_index())

    def put(local: np.ndarray) -> jax.Array:
        size = len(local) // len(shards)  # rows of a shard

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start = shards.index((index[0].start or 0) // size) * size
            return local[start : start + size]

        shape = (size * batch_shards(mesh), *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, rows)

    return {key: put(value) for key, value in batch.items()}
