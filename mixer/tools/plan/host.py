"""Checks whether a host's cores and memory suffice for its devices."""

import math
from typing import Any

from mixer.data.host_or_device import Placement, Sizes, place, room
from mixer.data.preprocessing.ops import Kind
from mixer.data.preprocessing.spec import Specification, parse
from mixer.tools.plan.subject import Subject

# Images per second per core on this project's machine (docs/performance.md), with (True) and
# without RandAugment or AutoAugment on the host.
CORE_RATE = {True: 530, False: 840}
PROCESS_BYTES = 4e9  # assumed memory of Python, JAX, TensorFlow and its threads


def host_figures(subject: Subject, required_rate: float, checkpoint_bytes: int) -> dict[str, Any]:
    """Returns a host's read rate, send rate, memory and input figures as JSON.

    Args:
      subject: the subject of the plan.
      required_rate: images/s that the host's devices need.
      checkpoint_bytes: size of a checkpoint, a copy of which is written in the background.
    """
    dataset, topology = subject.config.dataset, subject.topology
    pixels = subject.model.in_channels * math.prod(subject.image_size)
    shuffle_bytes = 2 * dataset.shuffle_group_size * subject.image_bytes
    if subject.num_examples is not None:
        shuffle_bytes = min(shuffle_bytes, subject.num_examples * subject.image_bytes)
    batch = subject.config.global_batch_size / topology.num_hosts * pixels
    memory = {
        "process": PROCESS_BYTES,
        "shuffling": shuffle_bytes,
        "batches": (dataset.prefetch_batches + 2) * batch,
        "checkpoint": float(checkpoint_bytes),
    }
    return {
        "memory": memory,
        "memory_needed": sum(memory.values()),
        "memory_there": topology.chip.host_memory,
        "images_per_second": required_rate,
        "read_bytes_per_second": required_rate * subject.image_bytes,
        "send_bytes_per_second": required_rate * pixels,
        "input": _input_figures(subject, required_rate),
    }


def _input_figures(subject: Subject, required_rate: float) -> dict[str, Any]:
    """Checks whether a host's cores prepare as many images per second as its devices need.

    Args:
      subject: the subject of the plan.
      required_rate: images/s that the host's devices need.

    Returns:
      "steps": the host's part of the preprocessing. "core_rate": images/s per core.
      "cores_needed", "cores_there": number of cores needed and present. "images_per_second": rate
      that the host can prepare. "feeds_devices": number of devices that this rate can feed.
      "suffices": whether it can feed all devices. "wait_share": share of the time that the devices
      wait. "stays_on_device": whether the run keeps its images on the devices; if so, the other
      figures do not matter.
    """
    topology, placement = subject.topology, _place_images(subject)
    core_rate = CORE_RATE[bool(placement.host.of_kind(Kind.POLICY))]
    cores = topology.chip.host_cores
    devices = min(topology.num_devices, topology.chip.devices_per_host)
    share = cores * core_rate / required_rate
    return {
        "steps": str(placement.host),
        "core_rate": core_rate,
        "cores_needed": required_rate / core_rate,
        "cores_there": cores,
        "images_per_second": float(cores * core_rate),
        "feeds_devices": share * devices,
        "devices": devices,
        "suffices": share >= 1,
        "wait_share": max(0.0, 1 - share),
        "stays_on_device": placement.on_device,
    }


def _place_images(subject: Subject) -> Placement:
    """Decides whether the training images stay on the device, as far as a plan can know."""
    config, topology = subject.config, subject.topology
    text, mode = config.dataset.train_preprocess, config.dataset.on_device
    spec = parse(text) if text else Specification()

    def measure() -> Sizes | None:
        side = subject.stored_side
        stored_size = (side and (side, side)) if spec else subject.image_size
        image_size = spec.parts.host.image_size or stored_size
        if image_size is None or subject.num_examples is None:
            return None
        memory = min(topology.chip.memory, topology.chip.host_memory)
        return Sizes(
            image_size=image_size,
            num_bytes=subject.model.in_channels * math.prod(image_size) * subject.num_examples,
            stored_bytes=subject.image_bytes * subject.num_examples,
            room_bytes=room(mode, memory),
        )

    return place(
        spec,
        mode=mode,
        augment_on=config.dataset.augment_on,
        backend="gpu" if topology.is_gpu else "tpu",
        num_processes=topology.num_hosts,
        num_examples=subject.num_examples,
        num_drawn=config.total_steps * config.global_batch_size,
        measure=measure,
    )
