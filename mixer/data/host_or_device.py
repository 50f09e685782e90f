"""Decides whether training images stay on the device, and which ops the device computes.

Training, plan and benchmark all use these rules of `dataset.on_device` and `dataset.augment_on`.
This module reads and measures nothing itself.
"""

import dataclasses
from collections.abc import Callable

from mixer.data.preprocessing.ops import Kind
from mixer.data.preprocessing.spec import Specification
from mixer.errors import UserError
from mixer.formatting import short

ON_DEVICE = ("auto", "on", "off")
AUGMENT_ON = ("auto", "host", "device")
# With "auto", the largest size of the arrays and of the encoded images. The first step waits until
# all images are decoded, which takes seconds: a core decodes about 100 MB of JPEG per second.
# CIFAR's images take 154 MB, as much as 1,020 images of 224 px.
AUTO_BYTES = 512 << 20
AUTO_SHARE = 8  # with "auto", images take at most 1 / AUTO_SHARE of the memory
SMALL_SIDE = 64  # pixels; up to this side, a CPU applies policies as fast as it trains


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the training images after the host's ops.

    Attributes:
      image_size: (H, W).
      num_bytes: bytes of all images as arrays.
      stored_bytes: bytes of all encoded images, estimated.
      room_bytes: bytes that the arrays may take, from `room`.
    """

    image_size: tuple[int, int]
    num_bytes: float
    stored_bytes: float
    room_bytes: float


@dataclasses.dataclass(frozen=True)
class Placement:
    """Whether training images stay on the device, and where their ops are computed.

    Attributes:
      reason: the reason for streaming the images; "" if all of them stay on the device.
      host: the ops that the host computes.
      device: the ops that a device computes after them; may be empty.
    """

    reason: str
    host: Specification
    device: Specification

    @property
    def on_device(self) -> bool:
        """Whether all images stay on the device."""
        return not self.reason


def place(
    spec: Specification,
    *,
    mode: str,
    augment_on: str,
    backend: str,
    num_processes: int,
    num_examples: int | None,
    num_drawn: int,
    measure: Callable[[], Sizes | None],
    read_by_file: bool = False,
) -> Placement:
    """Decides whether a run's training images stay on the device.

    Args:
      spec: the training preprocessing.
      mode: the config's dataset.on_device.
      augment_on: the config's dataset.augment_on.
      backend: JAX's name of the devices' platform.
      num_processes: number of processes that read.
      num_examples: number of images in the split; None if unknown, in which case "auto" streams.
      num_drawn: number of images that the whole run draws.
      measure: returns the sizes of the images, or None if they are unknown. It may open files, and
        is called only if no other rule streams the images.
      read_by_file: whether training reads file by file.
    """
    parts, auto = spec.parts, mode == "auto"
    reason = ""
    if mode == "off":
        reason = "dataset.on_device=off"
    elif auto and num_processes > 1:
        reason = "several processes share the reading"
    elif auto and num_examples is None:
        reason = "the number of images is not known"
    elif auto and num_drawn < num_examples:
        reason = f"the run draws {num_drawn:,} of {num_examples:,} images"
    elif read_by_file:
        reason = "the data set is so large that it is read file by file"
    elif parts.random_on_host:
        reason = f"{parts.random_on_host} on the host changes the images in each epoch"
    elif auto and parts.device and augment_on == "host":
        reason = "dataset.augment_on=host"
    else:
        sizes = measure()
        if sizes is not None:
            reason = _reason_by_size(sizes, parts.device, backend, auto)
        elif auto:
            reason = "the size of the images is not known"
    if reason:
        return stream(spec, reason, augment_on=augment_on, backend=backend)
    return Placement("", parts.host, parts.device)


def _reason_by_size(sizes: Sizes, device: Specification, backend: str, auto: bool) -> str:
    is_large = sizes.image_size[0] * sizes.image_size[1] > SMALL_SIDE**2
    if auto and is_large and backend != "gpu" and device.of_kind(Kind.POLICY):
        return f"the host computes {device} faster than this device"
    if sizes.num_bytes > sizes.room_bytes:
        limit = "dataset.on_device=auto keeps at most" if auto else "the device has room for"
        return (
            f"the images take {short(sizes.num_bytes, 'B')}, and {limit} "
            f"{short(sizes.room_bytes, 'B')}"
        )
    if auto and sizes.stored_bytes > AUTO_BYTES:
        return (
            f"the files take about {short(sizes.stored_bytes, 'B')}, and dataset.on_device=auto "
            f"reads at most {short(AUTO_BYTES, 'B')} before the first step"
        )
    return ""


def stream(spec: Specification, reason: str, *, augment_on: str, backend: str) -> Placement:
    """Decides which ops the device computes for streamed images; `reason` says why they are."""
    # TPUs gather slowly, and their hosts have many cores. For a CPU, host and device are the same.
    wants_device = augment_on == "device" or (augment_on == "auto" and backend == "gpu")
    if wants_device and can_augment(spec):
        return Placement(reason, spec.parts.host, spec.parts.device)
    return Placement(reason, spec, Specification())


def can_augment(spec: Specification) -> bool:
    """Returns whether a device can compute ops of a stream, which requires images of one size."""
    return bool(spec.parts.device) and spec.parts.host.image_size is not None


def check_augment_on(spec: Specification, augment_on: str) -> None:
    """Raises UserError if dataset.augment_on=device but the device cannot compute the ops."""
    if augment_on == "device" and spec.parts.device and not can_augment(spec):
        raise UserError(
            f"dataset.augment_on=device: the host's ops {str(spec.parts.host)!r} produce images of "
            "different sizes; expected one size (add resize or a crop, as in decode|resize(64))"
        )


def room(mode: str, memory_bytes: float) -> float:
    """Returns the bytes of memory that images may take with dataset.on_device "auto" or "on"."""
    return min(AUTO_BYTES, memory_bytes // AUTO_SHARE) if mode == "auto" else memory_bytes // 2
