"""One update on one device: compiled for a TPU topology, or estimated by arithmetic.

For TPUs the run's own update is compiled and what it computes, moves and sends is counted
(`mixer.tools.plan.hlo`); for GPUs all of it is estimated. docs/plan.md explains it.
"""

import dataclasses
import math
import re
import time
from typing import Any

from jax.errors import JaxRuntimeError
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from mixer.errors import UserError
from mixer.models import placement
from mixer.models.flops import layers
from mixer.models.registry import architecture_of
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.plan import hlo
from mixer.tools.plan.subject import Subject, abstract_mesh, peak, train_flops
from mixer.training import program

# What a block keeps of an image for the backward pass, in copies of S x C and of the hidden
# C x D_S + S x D_C: by kind of program and policy. "working" comes once more, for the block in
# progress. Fitted to compiled programs (docs/scaling.md); of "gpu" only "none" is.
KEPT = {
    "tpu": {"none": (1, 1), "dots": (1, 1), "full": (1, 0), "working": (4, 1.5)},
    "tpu scan": {"none": (3, 6), "dots": (1, 1), "full": (1, 0), "working": (4, 5)},
    "gpu": {"none": (4, 3), "dots": (3, 1), "full": (1, 0), "working": (4, 4)},
}
# Traffic between a block and the main memory, in the same copies; of "gpu" [estimated].
PASSED = {
    "tpu": {"none": (5, 8), "dots": (5, 8), "full": (5, 9.5)},
    "tpu scan": {"none": (8, 15), "dots": (6, 10), "full": (6, 10)},
    "gpu": {"none": (10, 14), "dots": (10, 15), "full": (10, 17)},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a search may change of a config, none of which changes the numbers of training."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    scan_blocks: bool
    accumulate_steps: int

    @property
    def overrides(self) -> str:
        """As the command line of train.py takes them."""
        return (
            f"--config.mesh.data={self.data} --config.mesh.fsdp={self.fsdp} "
            f"--config.mesh.tensor={self.tensor} --config.model.remat={self.remat} "
            f"--config.model.scan_blocks={self.scan_blocks} "
            f"--config.optimizer.accumulate_steps={self.accumulate_steps}"
        )

    def __str__(self) -> str:
        """In a few words."""
        return (
            f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}, remat {self.remat}"
            f"{', scan' * self.scan_blocks}"
            f"{f', {self.accumulate_steps} parts' * (self.accumulate_steps > 1)}"
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """An update on one device.

    Attributes:
      settings: how it is laid out.
      compiled: whether the figures are of the compiled program; else they are estimated.
      fits: whether the program fits the device's memory.
      memory: bytes that it needs; the parts of it are in `memory_parts`.
      memory_parts: state (parameters, moments, average), batch and outputs, and temporary.
      flops: that are executed, recomputation included.
      bytes: from and to the main memory; 0 where it does not fit.
      collectives: by kind, as in `hlo.Counts`.
      sent: bytes that the device sends.
      floors: seconds that the matmuls, the memory and the links need at least, at their peaks.
      seconds: expected: at the stated share of the matmuls' peak, and not below another floor nor
        below `schedule`.
      limit: which of these decides.
      schedule: seconds that the TPU's compiler expects of the kernels one after the other, without
        communication; 0 where it does not say.
      compile_seconds: 0 where it is not compiled.
      unknown_loops: how many loops of the program are counted as if they ran once.
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


def own_settings(subject: Subject) -> Settings:
    """The settings of the config itself.

    Raises:
      UserError: its mesh does not fit the topology.
    """
    config = subject.config
    return Settings(
        **sharding.mesh_sizes(config.mesh, subject.topology.num_devices),
        remat=config.model.remat,
        scan_blocks=config.model.scan_blocks,
        accumulate_steps=config.optimizer.accumulate_steps,
    )


def _with(subject: Subject, settings: Settings) -> ConfigDict:
    config = subject.config.copy_and_resolve_references()
    config.mesh.update({axis: getattr(settings, axis) for axis in sharding.AXES})
    config.model.update(remat=settings.remat, scan_blocks=settings.scan_blocks)
    config.optimizer.accumulate_steps = settings.accumulate_steps
    return config


def _bytes_per_device(tree: Any, mesh: AbstractMesh) -> float:
    shardings = placement.state_shardings(mesh, tree)
    return float(sharding.bytes_per_device(sharding.abstract(tree, shardings)))


def _check(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where the batch does not divide into the parts or over the mesh."""
    parts = config.optimizer.accumulate_steps
    if config.global_batch_size % parts:
        raise UserError(f"{parts} parts do not divide global_batch_size")
    run.check_batch_size(config, mesh)


def compile_step(subject: Subject, settings: Settings) -> Step:
    """Compiles the update for a TPU topology and counts what is in it.

    Raises:
      UserError: settings that do not divide the batch or a width.
    """
    config = _with(subject, settings)
    mesh = sharding.make_mesh(config.mesh, subject.devices)
    _check(config, mesh)
    train_program = program.make_program(config, mesh)
    abstract = train_program.state
    example = {"image": ((*subject.image_size, 3), "uint8"), "label": ((), "int32")}
    batch = sharding.abstract_batch(example, config.global_batch_size, mesh)
    started = time.perf_counter()
    lowered = train_program.jit_step().lower(abstract, batch)
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        needed = memory_of_error(str(error))
        if needed is None:
            raise
        return dataclasses.replace(
            estimate_step(subject, settings),
            compiled=True,
            fits=False,
            memory=needed,
            memory_parts={"state": float(sharding.bytes_per_device(abstract))},
            compile_seconds=time.perf_counter() - started,
        )
    seconds = time.perf_counter() - started
    used = compiled.memory_analysis()
    state = sharding.bytes_per_device(abstract)
    # Arguments stay throughout; results count where they do not take an argument's place.
    around = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    memory = {
        "state": float(state),
        "batch and results": float(around - state),
        "temporary": float(used.temp_size_in_bytes),
        "program": float(used.generated_code_size_in_bytes),
    }
    counts = hlo.count(compiled.as_text())
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
    # It fits: the compiler has placed everything.
    return dataclasses.replace(
        step,
        compiled=True,
        fits=True,
        compile_seconds=seconds,
        unknown_loops=counts.unknown_loops,
    )


def memory_of_error(text: str) -> float | None:
    """Bytes that a program needs, from the compiler's error; None where it does not say."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available", text)
    if not match:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return float(number) * 1024 ** (" KMGT".index(unit))


def estimate_step(subject: Subject, settings: Settings) -> Step:
    """Estimates the update by arithmetic: for GPUs, and to choose what is worth compiling.

    The state is exact, activations are `KEPT`, communication is what the mesh needs at least.

    Raises:
      UserError: settings that do not divide the batch or a width.
    """
    config, model = _with(subject, settings), subject.model
    mesh = abstract_mesh(settings.data, settings.fsdp, settings.tensor)
    _check(config, mesh)
    state = _bytes_per_device(subject.state, mesh)
    params = _bytes_per_device(subject.state.params, mesh)
    width = 2 if model.dtype == "bfloat16" else 4
    images = config.global_batch_size / (settings.data * settings.fsdp)  # of a device
    at_once = images / settings.accumulate_steps

    tokens = math.prod(subject.image_size) // model.patch_size**2
    stream = tokens * model.hidden_dim * width
    hidden = architecture_of(model).hidden_values(model, subject.image_size)
    hidden *= width / settings.tensor

    kind = "gpu" if subject.topology.is_gpu else "tpu" + " scan" * settings.scan_blocks
    stored, passed = (
        {policy: copies[0] * stream + copies[1] * hidden for policy, copies in table[kind].items()}
        for table in (KEPT, PASSED)
    )
    activations = model.num_blocks * stored[settings.remat] + stored["working"]
    pixels = 3 * math.prod(subject.image_size)
    gathered = params * settings.fsdp / model.num_blocks * (settings.fsdp > 1)  # a block's weights
    temporary = at_once * activations + 4 * images * pixels + params + gathered
    memory = {
        "state": state,
        "batch and results": images * pixels,
        "temporary": temporary,
    }

    # The state is read and written once, whole weights with each part of a batch.
    moved = images * model.num_blocks * passed[settings.remat] + 2 * state
    moved += 2 * params * settings.fsdp * settings.accumulate_steps
    image_flops = train_flops(subject) + _recomputed_flops(subject, settings)
    return _timed(
        subject,
        settings,
        memory=memory,
        flops=image_flops * images / settings.tensor,
        num_bytes=moved,
        collectives=_collectives(subject, settings, params, stream * images),
    )


def _recomputed_flops(subject: Subject, settings: Settings) -> float:
    """FLOPs of an image that remat "full" repeats: all layers of a block but the last."""
    if settings.remat != "full":
        return 0.0
    return sum(
        flops
        for name, flops in layers(subject.model, subject.image_size)
        if name.endswith(("Dense_0", "token_mixing/Dense_1"))
    )


def _collectives(
    subject: Subject, settings: Settings, params: float, stream: float
) -> dict[str, hlo.Traffic]:
    """What the mesh needs at least.

    Args:
      subject: what is planned.
      settings: how it is laid out.
      params: bytes of a device's share of the parameters.
      stream: bytes of the residual stream of a device's images.
    """
    whole = params * settings.fsdp
    collectives = {}
    if settings.fsdp > 1:
        # Each part of a batch gathers the weights forward and backward, as matmuls take them.
        share = (settings.fsdp - 1) / settings.fsdp * settings.accumulate_steps
        is_float32 = subject.topology.is_gpu and subject.model.dtype == "float32"
        taken = whole if is_float32 else whole / 2
        collectives["all-gather"] = hlo.Traffic(
            0, 2 * taken * settings.accumulate_steps, 2 * taken * share
        )
        collectives["reduce-scatter"] = hlo.Traffic(
            0, whole * settings.accumulate_steps, whole * share
        )
    reduced = sent = 0.0
    if settings.data > 1:
        reduced, sent = params, 2 * params * (settings.data - 1) / settings.data
    if settings.tensor > 1:
        times = (5 if settings.remat == "full" else 4) * subject.model.num_blocks
        reduced += times * stream
        sent += times * stream * 2 * (settings.tensor - 1) / settings.tensor
    if reduced:
        collectives["all-reduce"] = hlo.Traffic(0, reduced, sent)
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
    chip, topology = subject.topology.chip, subject.topology
    sent = sum(traffic.sent for traffic in collectives.values())
    links = sent / chip.link
    if chip.network and topology.num_hosts > 1:
        # Summed within a host first, each of its devices then sends a share of the sum.
        links += sent / chip.devices_per_host / chip.network
    floors = {
        "matmuls": flops / peak(subject),
        "memory": num_bytes / chip.bandwidth,
        "links": links,
    }
    expected = floors | {
        "matmuls": floors["matmuls"] / subject.utilization,
        "the compiler's schedule": schedule,
    }
    limit = max(expected, key=expected.__getitem__)
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
        sent=sent,
        floors=floors,
        seconds=expected[limit],
        limit=limit,
        schedule=schedule,
    )


def make_step(subject: Subject, settings: Settings) -> Step:
    """The update compiled where there is a compiler, else estimated."""
    if subject.topology.is_gpu:
        return estimate_step(subject, settings)
    return compile_step(subject, settings)
