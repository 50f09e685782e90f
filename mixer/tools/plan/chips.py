"""Specifications of accelerators: memory, peak rates, links and hosts.

The vendors publish the figures. Those of TPU7x and B200 were read on the pages below. The others
are quoted from memory: those of TPUs from Google's pages about each generation and its machine
types, those of GPUs from NVIDIA's data sheets. v3's links are from Jouppi et al., 2020, "A
domain-specific supercomputer for training deep neural networks". The memory of TPUs is the memory
available to a program, as libtpu 0.0.42 reports it for a program that does not fit.

TPU7x [read: docs.cloud.google.com/tpu/docs/tpu7x]: a chip has 2,307 TFLOP/s in bfloat16, 192 GiB at
7,380 GB/s and links of 1,200 GB/s in both directions; a host has 4 chips, 224 virtual CPUs and 960
GB. JAX has one device for each of the two cores of a chip, with half of these figures. No page
gives the clock.

B200 [read: docs.nvidia.com/dgx/dgxb200-user-guide]: a host has 8 GPUs, 1,440 GB, NVLink of 14.4
TB/s in both directions, 8 network cards of 400 Gb/s, 224 threads and 2 TB. A DGX B200 has 64 TB/s
of memory bandwidth and 72 PFLOP/s in FP8 with sparsity [read: a summary of
nvidia.com/en-us/data-center/dgx-b200]; dense bfloat16 is a quarter of this. We found no page of
NVIDIA's with its rate in TF32 and take half of bfloat16's, as for the other GPUs. The memory is
what CUDA reports [read: github.com/pytorch/ao/pull/4002].
"""

import dataclasses
import math
import re

from mixer.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: a chip or, on TPU v3 and TPU7x, one of the two cores of a chip.

    Attributes:
      memory: bytes available to a program.
      flops: peak FLOP/s of dense bfloat16 matmuls.
      flops_float32: peak FLOP/s of float32 matmuls at JAX's default precision, which is bfloat16 on
        a TPU and TF32 on a GPU.
      bandwidth: bytes/s of the main memory.
      link: bytes/s that a device can send over all links, within the slice (TPU) or the host (GPU).
      network: bytes/s that a device can send to other hosts; 0 if its links reach them.
      devices_per_host: devices per host in a slice with several hosts.
      host_cores: virtual CPUs per host.
      host_memory: bytes of memory per host.
      clock: Hz of a TPU core, derived from its peak rate; 0 if it is unknown, or if the compiler
        reports no cycles.
    """

    memory: float
    flops: float
    flops_float32: float
    bandwidth: float
    link: float
    network: float
    devices_per_host: int
    host_cores: int
    host_memory: float
    clock: float = 0.0


GIB = 2**30
TPUS = {
    "v3": Chip(15.48 * GIB, 61.5e12, 61.5e12, 450e9, 164e9, 0, 8, 96, 340e9, 0.94e9),
    "v4": Chip(30.75 * GIB, 275e12, 275e12, 1200e9, 300e9, 0, 4, 240, 407e9, 1.05e9),
    "v5e": Chip(15.75 * GIB, 197e12, 197e12, 819e9, 200e9, 0, 4, 112, 192e9, 1.5e9),
    "v5p": Chip(95.74 * GIB, 459e12, 459e12, 2765e9, 600e9, 0, 4, 208, 448e9, 1.75e9),
    "v6e": Chip(31.25 * GIB, 918e12, 918e12, 1638e9, 400e9, 0, 4, 180, 720e9),
    "tpu7x": Chip(94.75 * GIB, 1153.5e12, 1153.5e12, 3690e9, 300e9, 0, 8, 224, 960e9),
}
# Generations in which each of the two cores of a chip is a device.
TWO_DEVICES = ("v3", "tpu7x")
# Generations with two-dimensional slices; the others have three dimensions (quoted from memory).
FLAT = ("v3", "v5e", "v6e")
FLAT_SHAPES = [[2, 2], [2, 4], [4, 4], [4, 8], [8, 8], [8, 16], [16, 16], [16, 32], [32, 32]]
# JAX uses 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
JAX_SHARE = 0.75
GPUS = {
    "A100": Chip(79.2 * GIB * JAX_SHARE, 312e12, 156e12, 2039e9, 300e9, 25e9, 8, 96, 1360e9),
    "H100": Chip(79.6 * GIB * JAX_SHARE, 989e12, 495e12, 3350e9, 450e9, 50e9, 8, 208, 1872e9),
    "H200": Chip(140.4 * GIB * JAX_SHARE, 989e12, 495e12, 4800e9, 450e9, 50e9, 8, 224, 2952e9),
    "B200": Chip(178.35 * GIB * JAX_SHARE, 2250e12, 1125e12, 8000e9, 900e9, 50e9, 8, 224, 2000e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a plan.

    Attributes:
      name: name on the command line.
      generation: a key of TPUS or GPUS.
      chip: specification of each device.
      is_gpu: whether the devices are GPUs.
      num_devices: number of devices.
    """

    name: str
    generation: str
    chip: Chip
    is_gpu: bool
    num_devices: int

    @property
    def num_hosts(self) -> int:
        """The number of hosts."""
        return math.ceil(self.num_devices / self.chip.devices_per_host)

    @property
    def size(self) -> str:
        """The number and kind of the devices, such as "128 cores" or "8 GPUs"."""
        kind = "GPU" if self.is_gpu else "core" if self.generation in TWO_DEVICES else "chip"
        return f"{self.num_devices:,} {kind}{'s' * (self.num_devices > 1)}"


def find(name: str) -> Topology:
    """Returns the topology with a name: GENERATION:SHAPE in chips, as "v5e:16x16", or "gpu:8xH100".

    Raises:
      UserError: the name is not a topology.
    """
    kind, _, shape = name.partition(":")
    if kind == "gpu":
        match = re.fullmatch(r"([1-9]\d*)x(\w+)", shape)
        if not match or match[2] not in GPUS:
            raise UserError(
                f"--topology={name}; expected gpu:NUMBERxKIND, where KIND is one of "
                f"{', '.join(GPUS)}"
            )
        chip = GPUS[match[2]]
        count = int(match[1])
        if count > chip.devices_per_host and count % chip.devices_per_host:
            raise UserError(
                f"--topology={name}: {count} GPUs; expected at most {chip.devices_per_host} or a "
                f"multiple of {chip.devices_per_host}, the number of GPUs per host"
            )
        return Topology(name, match[2], chip, True, count)
    check_choice("kind of --topology", kind, (*TPUS, "gpu"), hint="as in v5e:16x16 or gpu:8xH100")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise UserError(f"--topology={name}; expected a shape in chips, such as v5e:16x16")
    sides = [int(side) for side in shape.split("x")]
    chips = math.prod(sides)
    if kind in FLAT and sides not in FLAT_SHAPES:
        shapes = ", ".join("x".join(map(str, shape)) for shape in FLAT_SHAPES)
        raise UserError(f"--topology={name}; expected one of {kind}'s shapes: {shapes}")
    if kind not in FLAT and len(sides) != 3:
        raise UserError(f"--topology={name}; expected three dimensions, as in {kind}:4x4x4")
    return Topology(name, kind, TPUS[kind], False, chips * (2 if kind in TWO_DEVICES else 1))


def tpu_devices(topology: Topology) -> list:
    """Returns the devices of a TPU topology, to compile for; needs no TPU.

    Raises:
      UserError: the TPU compiler is not installed or does not support the shape.
    """
    try:
        import libtpu  # noqa: F401  (the compiler; JAX finds it)
    except ImportError:
        raise UserError(
            f"--topology={topology.name} requires the TPU compiler, libtpu; run pip install -e "
            "'.[plan]' in the project's directory"
        ) from None
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    # Combine the two cores of a v4 chip into one device, as on a real v4 machine.
    options = {"chip_config_name": "megacore"} if topology.generation == "v4" else {}
    try:
        description = topologies.get_topology_desc(topology.name, "tpu", **options)
    except JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: {str(error).splitlines()[0]}") from None
    return description.devices
