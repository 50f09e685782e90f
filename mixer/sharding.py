"""The device mesh, and how arrays lie on it."""

import collections
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixer.errors import UserError


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """Lays all devices out on a mesh with named axes.

    Args:
      axes: size of each axis; one of them may be -1: what the others leave of the devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    names, sizes = tuple(axes), list(axes.values())
    count = jax.device_count()
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {dict(axes)}: sizes are at least 1, and only one of them may be -1")
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size != -1], dtype=int))
        sizes[sizes.index(-1)] = count // rest
    if int(np.prod(sizes)) != count:
        raise UserError(
            f"mesh {dict(axes)} does not fit {count} device(s): the sizes must multiply to {count}"
        )
    # Explicit axes, jax's default since 0.9, make Linen's modules fail; jax 0.11 renamed the
    # keyword arguments, so they are passed by position.
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * len(names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis is split over "data"; everything else is whole on each device."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless the devices along "data" divide `batch_size`."""
    shards = mesh.shape["data"]
    if batch_size < 1 or batch_size % shards:
        low = max(batch_size // shards, 0) * shards
        near = " or ".join(str(size) for size in (low, low + shards) if size)
        raise UserError(
            f"{name}={batch_size}: the {shards} devices of the mesh axis 'data' do not divide it; "
            f"the nearest sizes that work are {near}"
        )


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """A sharding for every leaf of the train state: all replicated (data parallel)."""
    return jax.tree.map(lambda _: replicated(mesh), abstract_state)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's part of a batch."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


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
