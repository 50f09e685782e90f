"""Whether a host's cores and memory suffice for its devices."""

from typing import Any

from mixer.data import resident
from mixer.data.preprocessing import device as augment
from mixer.tools.plan.subject import Subject

# Images a second that a core of this project's machine prepares (docs/performance.md), with
# RandAugment or AutoAugment on the host and without.
CORE_RATE = {True: 530, False: 840}
PROCESS_BYTES = 4e9  # assumed: what Python, JAX, TensorFlow and its threads hold


def host_figures(subject: Subject, needed: float, checkpoint_bytes: int) -> dict[str, Any]:
    """What a host reads, sends and holds, as JSON has it.

    Args:
      subject: what is planned.
      needed: images/s that the host's devices take.
      checkpoint_bytes: of one checkpoint, a copy of which is written in the background.
    """
    dataset, topology = subject.config.dataset, subject.topology
    pixels = 3 * subject.config.image_size**2
    shuffled = 2 * dataset.shuffle_group_size * subject.image_bytes
    if subject.num_examples is not None:
        shuffled = min(shuffled, subject.num_examples * subject.image_bytes)
    batch = subject.config.global_batch_size / topology.num_hosts * pixels
    memory = {
        "process": PROCESS_BYTES,
        "shuffling": shuffled,
        "batches": (dataset.prefetch_batches + 2) * batch,
        "checkpoint": float(checkpoint_bytes),
    }
    return {
        "memory": memory,
        "memory_needed": sum(memory.values()),
        "memory_there": topology.chip.host_memory,
        "images_per_second": needed,
        "read_bytes_per_second": needed * subject.image_bytes,
        "send_bytes_per_second": needed * pixels,
        "input": _input(subject, needed),
    }


def _input(subject: Subject, needed: float) -> dict[str, Any]:
    """Whether a host's cores prepare as many images a second as its devices take.

    Args:
      subject: what is planned.
      needed: images/s that the host's devices take.

    Returns:
      "steps": the host's part of the preprocessing. "core_rate": images/s of a core.
      "cores_needed", "cores_there": of the host. "images_per_second": that the host can prepare.
      "feeds_devices": for how many devices that suffices. "suffices": whether for all.
      "wait_share": share of the time that the devices wait. "stays_on_device": whether the run
      reads its images once instead, so that none of this matters.
    """
    dataset, topology = subject.config.dataset, subject.topology
    steps = dataset.train_preprocess
    on_device = topology.is_gpu if dataset.augment_on == "auto" else dataset.augment_on == "device"
    if steps and on_device and can_augment_on_device(steps):
        steps = augment.split(steps).host
    core_rate = CORE_RATE["randaugment" in steps or "autoaugment" in steps]
    cores = topology.chip.host_cores
    devices = min(topology.num_devices, topology.chip.devices_per_host)
    share = cores * core_rate / needed
    return {
        "steps": steps,
        "core_rate": core_rate,
        "cores_needed": needed / core_rate,
        "cores_there": cores,
        "images_per_second": float(cores * core_rate),
        "feeds_devices": share * devices,
        "devices": devices,
        "suffices": share >= 1,
        "wait_share": max(0.0, 1 - share),
        "stays_on_device": _stays_on_device(subject),
    }


def _stays_on_device(subject: Subject) -> bool:
    """Whether the run reads its images once (`resident.read`), as far as that is known here."""
    config, dataset, topology = subject.config, subject.config.dataset, subject.topology
    parts = augment.split(dataset.train_preprocess) if dataset.train_preprocess else None
    if parts and parts.random_on_host:
        return False
    if dataset.on_device != "auto":
        return dataset.on_device == "on"
    sized = not parts or _gives_one_size(parts.host)
    side = config.image_size if sized else subject.stored_side
    if side is None or topology.num_hosts > 1 or not subject.num_examples:
        return False
    if parts and parts.device:
        backend = "gpu" if topology.is_gpu else "tpu"
        if dataset.augment_on == "host" or resident.are_slow(parts.device, (side, side), backend):
            return False
    fits = max(3 * side**2, subject.image_bytes) * subject.num_examples <= resident.AUTO_BYTES
    return fits and config.total_steps * config.global_batch_size >= subject.num_examples


def can_augment_on_device(steps: str) -> bool:
    """Whether a stream's device can take steps of these: what it is given has one size."""
    parts = augment.split(steps)
    return parts.device is not None and _gives_one_size(parts.host)


def _gives_one_size(steps: str) -> bool:
    """Whether images of any size have one after these steps."""
    return any(name in steps for name in ("resize(", "central_crop(", "inception_crop("))
