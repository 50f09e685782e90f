"""Keeps small data sets in memory, so that images are decoded only once.

The host computes the ops that are the same in every epoch and sends the training images to the
devices. The devices draw the images in the same order as a stream (`order.batch_examples`) and
compute the other ops (mixer/data/preprocessing/device.py) with the same random keys as a stream.
Images for evaluation stay on the host.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixer.data import order
from mixer.data.host_or_device import Placement, Sizes, place, room
from mixer.data.preprocessing.device import make_augment
from mixer.data.splits import Cache, Split
from mixer.errors import UserError
from mixer.formatting import short
from mixer.parallel import sharding

READ_AT_ONCE = 512  # images


@dataclasses.dataclass(frozen=True)
class Examples:
    """All training examples, on the host.

    Attributes:
      arrays: the arrays of all examples: "image" (n, H, W, 3), "label" and others; and "number"
        (n,) uint32, which determines an example's random key, if the device computes ops.
      augment: the device's ops, (images, keys (N, 4) uint32) -> images; None if it has none.
      about: a line for the user.
    """

    arrays: dict[str, np.ndarray]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None
    about: str

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.arrays["label"])


def read(
    split: Split,
    *,
    mode: str,
    num_drawn: int,
    augment_on: str = "auto",
    should_stop: Callable[[], bool] = lambda: False,
) -> Examples | str:
    """Reads all images of `split` and applies the host's ops, if the images fit on the device.

    Args:
      split: the training split.
      mode: the config's dataset.on_device.
      num_drawn: number of images that the whole run draws.
      augment_on: the config's dataset.augment_on.
      should_stop: called after each batch; reading stops if it returns True.

    Returns:
      The examples, or the reason why training streams them.

    Raises:
      UserError: mode is "on", and the images cannot stay on the device.
    """
    host = functools.cache(lambda: _host_split(split))
    try:
        placement = place(
            split.preprocess,
            mode=mode,
            augment_on=augment_on,
            backend=jax.default_backend(),
            num_processes=jax.process_count(),
            num_examples=split.num_examples,
            num_drawn=num_drawn,
            measure=lambda: _measure(host(), mode),
            read_by_file=split.order_depends_on_readers,
        )
        if placement.on_device:
            return _read(host(), split, placement, should_stop)
        raise UserError(placement.reason)
    except UserError as error:
        if mode == "on":
            raise UserError(f"dataset.on_device=on: {error}") from error
        return str(error)


def _host_split(split: Split) -> Split:
    """Returns the split with only the host's ops, for images of one size.

    If the ops do not determine the size, the first image does; `_in_order` raises an error for
    images of another size.
    """
    host = split.with_preprocess(split.preprocess.parts.host, image_size=(None, None))
    if None not in host.example_spec["image"][0]:
        return host
    first = next(host.sequential_batches(start=0, stop=1, batch_size=1))
    return host.with_preprocess(host.preprocess, image_size=first["image"].shape[1:3])


def _measure(host: Split, mode: str) -> Sizes:
    """Returns the sizes of the images and of this machine's memory."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    memory = psutil.virtual_memory().available
    # The host keeps a copy. On a CPU the devices' copies use host memory too.
    if "bytes_limit" in stats:
        memory = min(memory, stats["bytes_limit"])
    else:
        memory //= 1 + len(devices)
    return Sizes(
        image_size=host.example_spec["image"][0][:2],
        num_bytes=_num_bytes(host),
        stored_bytes=host.stored_bytes() if mode == "auto" else 0,
        room_bytes=room(mode, memory),
    )


def _read(
    host: Split, split: Split, placement: Placement, should_stop: Callable[[], bool]
) -> Examples | str:
    """Reads all examples in order; returns a reason if it was stopped."""
    arrays = {
        name: np.empty((host.num_examples, *shape), dtype)
        for name, (shape, dtype) in host.example_spec.items()
    }
    start = 0
    for batch in _in_order(host):
        stop = start + len(batch["label"])
        for name, values in batch.items():
            arrays[name][start:stop] = values
        start = stop
        if should_stop():
            return "reading was interrupted"
    height, width = arrays["image"].shape[1:3]
    about = f"{split.num_examples:,} of {height} x {width} px, {short(_num_bytes(host), 'B')}"
    if not placement.device:
        return Examples(arrays, None, about)
    arrays["number"] = split.numbers.astype(np.uint32)
    augment = make_augment(split.preprocess, (height, width))
    return Examples(arrays, augment, f"{about}; the device applies {placement.device}")


def _in_order(split: Split) -> Iterator[dict[str, np.ndarray]]:
    """Yields all examples once; raises UserError if images differ in size."""
    try:
        yield from split.sequential_batches(
            start=0, stop=split.num_examples, batch_size=READ_AT_ONCE
        )
    except UserError as error:
        match = re.search(r"cannot use (.*): .*\[(\d+),(\d+),\d+\] is not compatible", str(error))
        if match is None:
            raise
        height, width = split.example_spec["image"][0][:2]
        raise UserError(
            f"images differ in size ({height} x {width}, and {match[1]} {match[2]} x {match[3]}); "
            "put resize or a crop before the first random op, as in decode|resize(64)|flip_lr"
        ) from error


def put(examples: Examples, mesh: Mesh) -> dict[str, jax.Array]:
    """Replicates the arrays on all devices; each process serves its own devices."""
    replicated = sharding.replicated(mesh)
    return {
        name: jax.make_array_from_callback(values.shape, replicated, values.__getitem__)
        for name, values in examples.arrays.items()
    }


def order_spec(length: int, global_batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of the arrays that `put_order` returns."""
    spec = jax.ShapeDtypeStruct(
        (length, global_batch_size),
        np.int32,
        sharding=NamedSharding(mesh, PartitionSpec(None, sharding.BATCH)),
    )
    return {"epoch": spec, "place": spec}


def put_order(
    step: int, count: int, *, seed: int, num_examples: int, spec: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns the examples of the batches `step` to `step + count`, the same as in a stream.

    Returns:
      "epoch" and "place" (length, B), with the shapes of `spec`; rows from `count` on are 0.
    """
    rows = {name: np.zeros(array.shape, array.dtype) for name, array in spec.items()}
    for row in range(count):
        rows["epoch"][row], rows["place"][row] = order.batch_examples(
            step + row,
            seed=seed,
            num_examples=num_examples,
            global_batch_size=spec["place"].shape[1],
        )
    return {
        name: jax.make_array_from_callback(values.shape, spec[name].sharding, values.__getitem__)
        for name, values in rows.items()
    }


def remember(split: Split | None) -> Split | None:
    """Returns the split with a cache of its batches, if they fit into memory.

    The first evaluation decodes the images; later evaluations need no TensorFlow.
    """
    available = psutil.virtual_memory().available
    if split is None or _num_bytes(split) > room("auto", available):
        return split
    return dataclasses.replace(split, cache=Cache())


def _num_bytes(split: Split) -> int:
    """Returns the bytes of all examples of a split as arrays."""
    return split.num_examples * sum(
        math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in split.example_spec.values()
    )
