"""Where training images lie, and which ops the device computes.

All rules of `dataset.on_device` and `dataset.augment_on` are here: the run, its plan and the
benchmark ask them. Nothing is read or measured here.
"""

import dataclasses
from collections.abc import Callable

from mixer.data.preprocessing.spec import Kind, Specification
from mixer.errors import UserError
from mixer.formatting import short

ON_DEVICE = ("auto", "on", "off")
AUGMENT_ON = ("auto", "host", "device")
# What "auto" keeps at most, and decodes at most of what is stored: the first step waits for all of
# it, which takes seconds (a core decodes about 100 MB of JPEG a second). CIFAR's images are 154 MB,
# as much as 1,020 of 224 px.
AUTO_BYTES = 512 << 20
AUTO_SHARE = 8  # "auto" leaves the model all but this part of the memory
SMALL_SIDE = 64  # pixels, up to which a CPU applies policies as fast as it trains


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the training images take, as the host's part of the ops leaves them.

    Attributes:
      image_size: (H, W).
      num_bytes: of all, as arrays.
      stored_bytes: of all, as they are stored; an estimate.
      room_bytes: that the arrays may take (`room`).
    """

    image_size: tuple[int, int]
    num_bytes: float
    stored_bytes: float
    room_bytes: float


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where training images lie, and where their ops are computed.

    Attributes:
      reason: why the images are streamed; empty where all of them stay on the device.
      host: the ops that the host computes.
      device: the ops that a device computes after them; false where there are none.
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
      spec: of training.
      mode: the config's dataset.on_device; "on" keeps all that can be kept.
      augment_on: the config's dataset.augment_on.
      backend: what JAX calls the devices.
      num_processes: processes that read.
      num_examples: images of the split; None: not known, which "auto" streams.
      num_drawn: images that the whole run draws.
      measure: gives what the images take; None: not known. It may open files, and is called only
        where no other rule streams the images.
      read_by_file: whether the order of training goes file by file.
    """
    parts, auto = spec.parts, mode == "auto"
    reason = ""
    if mode == "off":
        reason = "dataset.on_device=off"
    elif auto and num_processes > 1:
        reason = "several processes share the reading"
    elif auto and num_examples is None:
        reason = "how many images there are is not known"
    elif auto and num_drawn < num_examples:
        reason = f"the run draws {num_drawn:,} of {num_examples:,} images"
    elif read_by_file:
        reason = "the set can only be read file by file, for its size"
    elif parts.random_on_host:
        reason = f"{parts.random_on_host} makes other images of them each epoch"
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
        return f"{device} take the host less time than this device"
    if sizes.num_bytes > sizes.room_bytes:
        owner = "dataset.on_device=auto keeps" if auto else "the device has room for"
        return (
            f"they take {short(sizes.num_bytes, 'B')}, and {owner} {short(sizes.room_bytes, 'B')}"
        )
    if auto and sizes.stored_bytes > AUTO_BYTES:
        return (
            f"about {short(sizes.stored_bytes, 'B')} are stored, and dataset.on_device=auto reads "
            f"{short(AUTO_BYTES, 'B')} before the first step"
        )
    return ""


def stream(spec: Specification, reason: str, *, augment_on: str, backend: str) -> Placement:
    """Decides which ops the device computes on images that are streamed for a reason."""
    # TPUs gather slowly, and their hosts have many cores; a CPU is its own host.
    wants_device = augment_on == "device" or (augment_on == "auto" and backend == "gpu")
    if wants_device and can_augment(spec):
        return Placement(reason, spec.parts.host, spec.parts.device)
    return Placement(reason, spec, Specification())


def can_augment(spec: Specification) -> bool:
    """Whether a device can compute some ops of a stream: those whose images have one size."""
    return bool(spec.parts.device) and spec.parts.host.image_size is not None


def check_augment_on(spec: Specification, augment_on: str) -> None:
    """Raises UserError if dataset.augment_on=device but the device cannot compute the ops."""
    if augment_on == "device" and spec.parts.device and not can_augment(spec):
        raise UserError(
            f"dataset.augment_on=device: the host's ops {str(spec.parts.host)!r} give images of "
            "varying sizes; expected one size (add resize or a crop, as in decode|resize(64))"
        )


def room(mode: str, memory_bytes: float) -> float:
    """Bytes that the images may take of memory, with dataset.on_device "auto" or "on"."""
    return min(AUTO_BYTES, memory_bytes // AUTO_SHARE) if mode == "auto" else memory_bytes // 2
