"""Small data sets that stay: decoded once, kept, and never read again.

The training images go to the devices as they are after the steps that are the same in every epoch;
there they are drawn in the order of the streaming path (`order.batch_examples`) and take their
random steps (`mixer/data/preprocessing/device.py`) with the same keys. Images for evaluation stay
on the host.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixer.data import order
from mixer.data.preprocessing import device as augment
from mixer.data.preprocessing.spec import Kind, Specification
from mixer.data.splits import Cache, Split
from mixer.errors import UserError
from mixer.formatting import short
from mixer.parallel import sharding

MODES = ("auto", "on", "off")
# What "auto" keeps at most, and decodes at most of what is stored: the first step waits for all of
# it, which takes seconds (a core decodes about 100 MB of JPEG a second). CIFAR's images are 154 MB,
# as much as 1,020 of 224 px.
AUTO_BYTES = 512 << 20
SHARE = 8  # and the part of the memory that they take at most, which is the model's else
READ_AT_ONCE = 512  # images
SMALL_SIDE = 64  # pixels, up to which a CPU applies policies as fast as it trains


@dataclasses.dataclass(frozen=True)
class Examples:
    """All training examples, on the host.

    Attributes:
      arrays: what batches are made from: "image" (n, H, W, 3), "label" and the like; where steps
        are left for the device, "number" (n,) uint32, which the examples' keys are made with.
      augment: these steps, (images, keys (N, 4) uint32) -> images; None where none is left.
      about: a line for the user.
    """

    arrays: dict[str, np.ndarray]
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None
    about: str

    @property
    def num_examples(self) -> int:
        """How many they are."""
        return len(self.arrays["label"])


def read(
    split: Split,
    *,
    mode: str,
    num_drawn: int,
    augment_on: str = "auto",
    should_stop: Callable[[], bool] = lambda: False,
) -> Examples | str:
    """Reads all images of `split` through the steps that are the same in every epoch.

    Args:
      split: of training.
      mode: "auto", "on" or "off", the config's dataset.on_device.
      num_drawn: how many images the whole run draws; "auto" reads no set that is larger.
      augment_on: the config's dataset.augment_on; with "host", "auto" leaves random steps there.
      should_stop: asked after each batch; where it says so, reading ends.

    Returns:
      The examples, or why they are to be streamed.

    Raises:
      UserError: why, with "on".
    """
    if mode == "off":
        return "dataset.on_device=off"
    try:
        if mode == "auto" and jax.process_count() > 1:
            raise UserError("several processes share the reading")
        if mode == "auto" and num_drawn < split.num_examples:
            raise UserError(f"the run draws {num_drawn:,} of {split.num_examples:,} images")
        return _read(split, mode, augment_on, should_stop)
    except UserError as error:
        if mode == "on":
            raise UserError(f"dataset.on_device=on: {error}") from error
        return str(error)


def _read(
    split: Split, mode: str, augment_on: str, should_stop: Callable[[], bool]
) -> Examples | str:
    if split.order_depends_on_readers:
        raise UserError(f"{split.name} can only be read file by file, for its size")
    host, device_steps = split, Specification()
    if split.preprocess:
        parts = split.preprocess.parts
        if parts.random_on_host:
            raise UserError(f"{parts.random_on_host} makes other images of them each epoch")
        device_steps = parts.device
        host = split.with_preprocess(parts.host, image_size=(None, None))
        if None in host.example_spec["image"][0]:  # what the stored images have, all the same
            first = next(host.sequential_batches(start=0, stop=1, batch_size=1))
            host = split.with_preprocess(parts.host, image_size=first["image"].shape[1:3])
    if mode == "auto" and device_steps:
        if augment_on == "host":
            raise UserError("dataset.augment_on=host")
        if are_slow(device_steps, host.example_spec["image"][0][:2], jax.default_backend()):
            raise UserError(f"{device_steps} take the host less time than this device")
    count, num_bytes, room = host.num_examples, _num_bytes(host), _room(mode)
    if num_bytes > room:
        limit = "dataset.on_device=auto keeps" if mode == "auto" else "the device has room for"
        raise UserError(f"they take {short(num_bytes, 'B')}, and {limit} {short(room, 'B')}")
    if mode == "auto" and (stored := split.stored_bytes()) > AUTO_BYTES:
        raise UserError(
            f"about {short(stored, 'B')} are stored, and dataset.on_device=auto reads "
            f"{short(AUTO_BYTES, 'B')} before the first step"
        )
    arrays = {
        name: np.empty((count, *shape), dtype) for name, (shape, dtype) in host.example_spec.items()
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
    about = f"{count:,} of {height} x {width} px, {short(num_bytes, 'B')}"
    if not device_steps:
        return Examples(arrays, None, about)
    arrays["number"] = split.numbers.astype(np.uint32)
    steps = augment.make_augment(split.preprocess, (height, width))
    return Examples(arrays, steps, f"{about}; there they take {device_steps}")


def _in_order(split: Split) -> Iterator[dict[str, np.ndarray]]:
    """Batches of all examples, once; UserError where their images differ in size."""
    try:
        yield from split.sequential_batches(
            start=0, stop=split.num_examples, batch_size=READ_AT_ONCE
        )
    except UserError as error:
        other = re.search(r"cannot use (.*): .*\[(\d+),(\d+),3\] is not compatible", str(error))
        if other is None:
            raise
        height, width = split.example_spec["image"][0][:2]
        raise UserError(
            f"images differ in size ({height} x {width}, and {other[1]} {other[2]} x {other[3]}); "
            "put resize or a crop before the first random step, as in decode|resize(64)|flip_lr"
        ) from error


def are_slow(steps: Specification, size: tuple[int, int], backend: str) -> bool:
    """Whether steps on (H, W) are faster on the host: policies on large images, but for GPUs."""
    large = size[0] * size[1] > SMALL_SIDE**2
    return backend != "gpu" and large and bool(steps.of_kind(Kind.POLICY))


def _room(mode: str) -> int:
    """Bytes that examples may take of a device's memory and of the host's, which has a copy."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    room = psutil.virtual_memory().available
    # On a CPU the devices' copies are the host's memory too.
    room = min(room, stats["bytes_limit"]) if "bytes_limit" in stats else room // (1 + len(devices))
    return _auto_room(room) if mode == "auto" else room // 2


def put(examples: Examples, mesh: Mesh) -> dict[str, jax.Array]:
    """The arrays of the examples, whole on every device; each process gives its devices theirs."""
    whole = sharding.replicated(mesh)
    return {
        name: jax.make_array_from_callback(values.shape, whole, values.__getitem__)
        for name, values in examples.arrays.items()
    }


def order_spec(length: int, global_batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of what `put_order` gives."""
    where = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    shape = (length, global_batch_size)
    return {
        "epoch": jax.ShapeDtypeStruct(shape, np.int32, sharding=where),
        "place": jax.ShapeDtypeStruct(shape, np.int32, sharding=where),
    }


def put_order(
    step: int, count: int, *, seed: int, num_examples: int, spec: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Which examples the batches `step` to `step + count` draw, as the streaming path does.

    Returns:
      "epoch" and "place" (length, B) as `spec` has them; the rows beyond `count` are 0.
    """
    rows = {name: np.zeros(each.shape, each.dtype) for name, each in spec.items()}
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
    """The same split, which keeps what `sequential_batches` has read, where that is little.

    So an evaluation decodes its images once, and the next ones do without TensorFlow.
    """
    if split is None or _num_bytes(split) > _auto_room(psutil.virtual_memory().available):
        return split
    return dataclasses.replace(split, cache=Cache())


def _num_bytes(split: Split) -> int:
    """What all examples of a split take."""
    return split.num_examples * sum(
        math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in split.example_spec.values()
    )


def _auto_room(memory: int) -> int:
    return min(AUTO_BYTES, memory // SHARE)
