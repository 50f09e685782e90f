"""One update on one device: compiled for a TPU topology, or estimated by arithmetic.

For TPUs the run's own update is compiled, and its FLOPs, memory traffic and communication are
counted (`mixer.tools.plan.hlo`); for GPUs they are estimated. docs/plan.md has the details.
"""

import dataclasses
import math
import re
import time
from typing import Any

from jax.errors import JaxRuntimeError
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from mixer.models import placement
from mixer.models.flops import layers
from mixer.models.modules import patch_grid
from mixer.models.registry import architecture_of
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.plan import hlo
from mixer.tools.plan.subject import Subject, abstract_mesh, peak, train_flops
from mixer.training import program

# Activations that a block saves per image for the backward pass, in copies of S x C and of the
# hidden C x D_S + S x D_C, by kind of program and policy. "working" is added once, for the block in
# progress. Fitted to compiled programs (docs/scaling.md); for "gpu" only "none" is fitted.
SAVED_COPIES = {
    "tpu": {"none": (1, 1), "dots": (1, 1), "full": (1, 0), "working": (4, 1.5)},
    "tpu scan": {"none": (3, 6), "dots": (1, 1), "full": (1, 0), "working": (4, 5)},
    "gpu": {"none": (4, 3), "dots": (3, 1), "full": (1, 0), "working": (4, 4)},
}
# Traffic between a block and the main memory, in the same copies; "gpu" is an estimate.
MOVED_COPIES = {
    "tpu": {"none": (5, 8), "dots": (5, 8), "full": (5, 9.5)},
    "tpu scan": {"none": (8, 15), "dots": (6, 10), "full": (6, 10)},
    "gpu": {"none": (10, 14), "dots": (10, 15), "full": (10, 17)},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that a search can change; none of them affects the results of training."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    scan_blocks: bool
    accumulate_steps: int

    @property
    def overrides(self) -> str:
        """The settings as flags of train.py."""
        return (
            f"--config.mesh.data={self.data} --config.mesh.fsdp={self.fsdp} "
            f"--config.mesh.tensor={self.tensor} --config.model.remat={self.remat} "
            f"--config.model.scan_blocks={self.scan_blocks} "
            f"--config.optimizer.accumulate_steps={self.accumulate_steps}"
        )

    def __str__(self) -> str:
        """Returns a short description."""
        return (
            f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}, remat {self.remat}"
            f"{', scan' * self.scan_blocks}"
            f"{f', {self.accumulate_steps} parts' * (self.accumulate_steps > 1)}"
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """An update on one device.

    Attributes:
      settings: mesh, rematerialisation and accumulation.
      compiled: whether the figures are from the compiled program; if not, they are estimates.
      fits: whether the program fits into the device's memory.
      memory: bytes that the program needs, the sum of `memory_parts`.
      memory_parts: bytes by part: state (parameters, moments, average), batch and results,
        temporary arrays and program.
      flops: executed FLOPs, including recomputation.
      bytes: bytes read from and written to the main memory.
      collectives: traffic by kind, as in `hlo.Counts`.
      sent: bytes that the device sends.
      floors: minimum seconds for matmuls, memory and links, each at its peak rate.
      seconds: expected duration, the maximum of the matmuls at the expected utilization, the other
        floors and `schedule`.
      limit: the name of the one that determines `seconds`.
      schedule: the TPU compiler's estimate for the kernels in sequence, in seconds, without
        communication; 0 if unknown.
      compile_seconds: compile time; 0 if the figures are estimated.
      unknown_loops: number of loops with an unknown trip count, which count as one iteration.
      unreadable: why the compiled program could not be counted, in which case only the memory is
        the compiler's, and the other figures are estimates; empty if it was counted.
    """

    settings: Settings
    compiled: bool
    fits: bool
    memory: float
    memory_parts: dict[str, float]
    flops: float
    bytes: float
    collectives: dict[str, hlo.Traffic]
    sent: float
    floors: dict[str, float]
    seconds: float
    limit: str
    schedule: float = 0.0
    compile_seconds: float = 0.0
    unknown_loops: int = 0
    unreadable: str = ""


def own_settings(subject: Subject) -> Settings:
    """Returns the settings of the config.

    Raises:
      UserError: the mesh of the config does not fit the topology.
    """
    config = subject.config
    return Settings(
        **sharding.mesh_sizes(config.mesh, subject.topology.num_devices),
        remat=config.model.remat,
        scan_blocks=config.model.scan_blocks,
        accumulate_steps=config.optimizer.accumulate_steps,
    )


def _config_with(subject: Subject, settings: Settings) -> ConfigDict:
    """Returns a copy of the config with these settings."""
    config = subject.config.copy_and_resolve_references()
    config.mesh.update({axis: getattr(settings, axis) for axis in sharding.AXES})
    config.model.update(remat=settings.remat, scan_blocks=settings.scan_blocks)
    config.optimizer.accumulate_steps = settings.accumulate_steps
    return config


def _bytes_per_device(tree: Any, mesh: AbstractMesh) -> float:
    shardings = placement.state_shardings(mesh, tree)
    return float(sharding.bytes_per_device(sharding.abstract(tree, shardings)))


def compile_step(subject: Subject, settings: Settings) -> Step:
    """Compiles the update for a TPU topology and counts its FLOPs and traffic.

    Raises:
      UserError: the settings do not divide the batch or a width.
    """
    config = _config_with(subject, settings)
    mesh = sharding.make_mesh(config.mesh, subject.devices)
    run.check_batch_size(config, mesh)
    train_program = program.make_program(config, mesh)
    abstract = train_program.state
    example = {"image": ((*subject.image_size, 3), "uint8"), "label": ((), "int32")}
    batch = sharding.abstract_batch(example, config.global_batch_size, mesh)
    start_time = time.perf_counter()
    lowered = train_program.jit_step().lower(abstract, batch)
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        needed_bytes = memory_of_error(str(error))
        if needed_bytes is None:
            raise
        return dataclasses.replace(
            estimate_step(subject, settings),
            compiled=True,
            fits=False,
            memory=needed_bytes,
            memory_parts={"state": float(sharding.bytes_per_device(abstract))},
            compile_seconds=time.perf_counter() - start_time,
        )
    seconds = time.perf_counter() - start_time
    analysis = compiled.memory_analysis()
    state = sharding.bytes_per_device(abstract)
    # Arguments stay allocated; results count unless they reuse the memory of an argument.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = {
        "state": float(state),
        "batch and results": float(analysis.argument_size_in_bytes + results - state),
        "temporary": float(analysis.temp_size_in_bytes),
        "program": float(analysis.generated_code_size_in_bytes),
    }
    try:
        counts = hlo.count(compiled.as_text())
    except hlo.UnreadableProgramError as error:
        return dataclasses.replace(
            estimate_step(subject, settings),
            compiled=True,
            fits=True,
            memory=sum(memory.values()),
            memory_parts=memory,
            compile_seconds=seconds,
            unreadable=str(error),
        )
    clock = subject.topology.chip.clock
    step = _timed(
        subject,
        settings,
        memory=memory,
        flops=counts.flops,
        num_bytes=counts.bytes,
        collectives=dict(counts.collectives),
        schedule=counts.cycles / clock if clock else 0.0,
    )
    # A program that compiles fits into memory.
    return dataclasses.replace(
        step,
        compiled=True,
        fits=True,
        compile_seconds=seconds,
        unknown_loops=counts.unknown_loops,
    )


def memory_of_error(text: str) -> float | None:
    """Returns the bytes that a program needs, from the compiler's error; None if not in it."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available", text)
    if not match:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return float(number) * 1024 ** (" KMGT".index(unit))


def estimate_step(subject: Subject, settings: Settings) -> Step:
    """Estimates the update by arithmetic, for GPUs and to choose settings worth compiling.

    The state is exact, activations come from `SAVED_COPIES`, and communication is the minimum for
    the mesh.

    Raises:
      UserError: the settings do not divide the batch or a width.
    """
    config, model = _config_with(subject, settings), subject.model
    mesh = abstract_mesh(settings.data, settings.fsdp, settings.tensor)
    run.check_batch_size(config, mesh)
    state = _bytes_per_device(subject.state, mesh)
    params = _bytes_per_device(subject.state.params, mesh)
    width = 2 if model.dtype == "bfloat16" else 4
    images = config.global_batch_size / (settings.data * settings.fsdp)  # per device
    microbatch = images / settings.accumulate_steps

    tokens = math.prod(patch_grid(subject.image_size, model.patch_size))
    stream = tokens * model.hidden_dim * width
    hidden = architecture_of(model).hidden_values(model, subject.image_size)
    hidden *= width / settings.tensor

    kind = "gpu" if subject.topology.is_gpu else "tpu" + " scan" * settings.scan_blocks
    saved_bytes, moved_bytes = (
        {policy: copies[0] * stream + copies[1] * hidden for policy, copies in table[kind].items()}
        for table in (SAVED_COPIES, MOVED_COPIES)
    )
    activations = model.num_blocks * saved_bytes[settings.remat] + saved_bytes["working"]
    pixels = model.in_channels * math.prod(subject.image_size)
    # While a block computes, its gathered weights are in memory.
    gathered_bytes = params * settings.fsdp / model.num_blocks * (settings.fsdp > 1)
    temporary = microbatch * activations + 4 * images * pixels + params + gathered_bytes
    memory = {
        "state": state,
        "batch and results": images * pixels,
        "temporary": temporary,
    }

    # The state is read and written once, and the gathered weights once per part of a batch.
    num_bytes = images * model.num_blocks * moved_bytes[settings.remat] + 2 * state
    num_bytes += 2 * params * settings.fsdp * settings.accumulate_steps
    image_flops = train_flops(subject) + _recomputed_flops(subject, settings)
    return _timed(
        subject,
        settings,
        memory=memory,
        flops=image_flops * images / settings.tensor,
        num_bytes=num_bytes,
        collectives=_collectives(subject, settings, params, stream * images),
    )


def _recomputed_flops(subject: Subject, settings: Settings) -> float:
    """Returns the FLOPs per image that remat "full" repeats: all layers of a block but the last."""
    if settings.remat != "full":
        return 0.0
    block = architecture_of(subject.model).block
    recomputed = 0.0
    for i in range(subject.model.num_blocks):
        *flops, _ = (
            flops
            for name, flops in layers(subject.model, subject.image_size)
            if name.startswith(f"{block.format(i)}/")
        )
        recomputed += sum(flops)
    return recomputed


def _collectives(
    subject: Subject, settings: Settings, params: float, stream: float
) -> dict[str, hlo.Traffic]:
    """Returns the minimum communication of the mesh.

    Args:
      subject: the subject of the plan.
      settings: the settings of the update.
      params: bytes of a device's share of the parameters.
      stream: bytes of the residual stream of a device's images.
    """
    gathered_bytes = params * settings.fsdp
    collectives = {}
    if settings.fsdp > 1:
        # Each part of a batch gathers the weights in the forward and the backward pass, in the
        # dtype of the matmuls.
        share = (settings.fsdp - 1) / settings.fsdp * settings.accumulate_steps
        is_float32 = subject.topology.is_gpu and subject.model.dtype == "float32"
        matmul_bytes = gathered_bytes if is_float32 else gathered_bytes / 2
        collectives["all-gather"] = hlo.Traffic(
            0, 2 * matmul_bytes * settings.accumulate_steps, 2 * matmul_bytes * share
        )
        collectives["reduce-scatter"] = hlo.Traffic(
            0, gathered_bytes * settings.accumulate_steps, gathered_bytes * share
        )
    reduced_bytes = sent_bytes = 0.0
    if settings.data > 1:
        reduced_bytes = params
        sent_bytes = 2 * params * (settings.data - 1) / settings.data
    if settings.tensor > 1:
        times = (5 if settings.remat == "full" else 4) * subject.model.num_blocks
        reduced_bytes += times * stream
        sent_bytes += times * stream * 2 * (settings.tensor - 1) / settings.tensor
    if reduced_bytes:
        collectives["all-reduce"] = hlo.Traffic(0, reduced_bytes, sent_bytes)
    return collectives


def _timed(
    subject: Subject,
    settings: Settings,
    *,
    memory: dict[str, float],
    flops: float,
    num_bytes: float,
    collectives: dict[str, hlo.Traffic],
    schedule: float = 0.0,
) -> Step:
    """Returns the step with its duration and the limit that determines the duration."""
    chip, topology = subject.topology.chip, subject.topology
    sent_bytes = sum(traffic.sent for traffic in collectives.values())
    link_secs = sent_bytes / chip.link
    if chip.network and topology.num_hosts > 1:
        # Devices first reduce within their host; then each of them sends a share of the sum.
        link_secs += sent_bytes / chip.devices_per_host / chip.network
    floors = {
        "matmuls": flops / peak(subject),
        "memory": num_bytes / chip.bandwidth,
        "links": link_secs,
    }
    durations = floors | {
        "matmuls": floors["matmuls"] / subject.utilization,
        "the compiler's schedule": schedule,
    }
    limit = max(durations, key=durations.__getitem__)
    total = sum(memory.values())
    return Step(
        settings=settings,
        compiled=False,
        fits=total <= chip.memory,
        memory=total,
        memory_parts=memory,
        flops=flops,
        bytes=num_bytes,
        collectives=collectives,
        sent=sent_bytes,
        floors=floors,
        seconds=durations[limit],
        limit=limit,
        schedule=schedule,
    )


def make_step(subject: Subject, settings: Settings) -> Step:
    """Compiles the update for TPUs, and estimates it for GPUs."""
    if subject.topology.is_gpu:
        return estimate_step(subject, settings)
    return compile_step(subject, settings)
