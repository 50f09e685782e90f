"""Whether a host's cores and memory suffice for its devices."""

from typing import Any

from mixer.data import resident
from mixer.data.preprocessing.spec import Kind, Specification, parse
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
      needed: images/s of a host.

    Returns:
      "steps": of the preprocessing that the host takes, the others being the device's.
      "core_rate": images/s of a core. "cores_needed", "cores_there": of a host.
      "images_per_second": that a host can prepare. "feeds_devices": for so many.
      "suffices", and "wait_share": of the time that the devices would wait.
      "stays_on_device": whether the set is read once instead, so that nothing of this matters.
    """
    dataset, topology = subject.config.dataset, subject.topology
    spec = parse(dataset.train_preprocess) if dataset.train_preprocess else Specification()
    on_device = topology.is_gpu if dataset.augment_on == "auto" else dataset.augment_on == "device"
    if on_device and can_augment_on_device(spec):
        spec = spec.parts.host
    core_rate = CORE_RATE[bool(spec.of_kind(Kind.POLICY))]
    cores = topology.chip.host_cores
    devices = min(topology.num_devices, topology.chip.devices_per_host)
    share = cores * core_rate / needed
    return {
        "steps": str(spec),
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
    spec = parse(dataset.train_preprocess) if dataset.train_preprocess else Specification()
    parts = spec.parts
    if parts.random_on_host:
        return False
    if dataset.on_device != "auto":
        return dataset.on_device == "on"
    sized = not spec or parts.host.image_size is not None
    side = config.image_size if sized else subject.stored_side
    if side is None or topology.num_hosts > 1 or not subject.num_examples:
        return False
    if parts.device:
        backend = "gpu" if topology.is_gpu else "tpu"
        if dataset.augment_on == "host" or resident.are_slow(parts.device, (side, side), backend):
            return False
    fits = max(3 * side**2, subject.image_bytes) * subject.num_examples <= resident.AUTO_BYTES
    return fits and config.total_steps * config.global_batch_size >= subject.num_examples


def can_augment_on_device(spec: Specification) -> bool:
    """Whether a stream's device can compute some of these ops: what it gets has one size."""
    return bool(spec.parts.device) and spec.parts.host.image_size is not None
