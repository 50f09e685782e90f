"""A training run, planned for accelerators that are not there: does it fit, and how fast may it be.

For TPUs the run's own update is compiled for the topology and what it computes, moves and sends is
counted (`mixer.tools.plan.hlo`); for GPUs all of it is estimated by arithmetic. docs/plan.md
explains it.
"""

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.errors import JaxRuntimeError
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from mixer.data import resident
from mixer.data.preprocessing import device as augment
from mixer.data.sources import synthetic
from mixer.errors import UserError
from mixer.formatting import duration, short
from mixer.models import placement
from mixer.models.flops import forward_flops, layers
from mixer.models.modules import REMAT
from mixer.models.registry import architecture_of
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.plan import chips, hlo
from mixer.training import state as train_state
from mixer.training.optimizer import multipliers


@dataclasses.dataclass(frozen=True)
class Set:
    """A public data set: examples of its splits, classes, mean bytes of an image's file.

    `side` is that of its images in pixels, where they all have one.
    """

    splits: dict[str, int]
    num_classes: int
    image_bytes: float
    side: int | None = None


# Counts as TFDS gives them [recalled], sizes from its downloads; ImageNet-21k is the fall 2011
# release. A length in epochs needs the counts, and the data is not at hand.
SETS = {
    "imagenet2012": Set({"train": 1_281_167, "validation": 50_000}, 1000, 110e3),
    "imagenet21k": Set({"train": 14_197_122}, 21843, 92e3),
    "cifar10": Set({"train": 50_000, "test": 10_000}, 10, 2.3e3, 32),
    "cifar100": Set({"train": 50_000, "test": 10_000}, 100, 2.3e3, 32),
    "oxford_iiit_pet": Set({"train": 3680, "test": 3669}, 37, 105e3),
    "oxford_flowers102": Set({"train": 1020, "validation": 1020, "test": 6149}, 102, 40e3),
    "digits": Set({"train": 1257, "validation": 180, "test": 360}, 10, 200.0, 8),
    "synthetic": Set(synthetic.SPLITS, 10, 0.0),
}
IMAGE_BYTES = 110e3  # of an unknown set: ImageNet's mean

# Images a second that a core of this project's machine prepares (docs/performance.md), with
# RandAugment or AutoAugment on the host and without.
CORE_RATE = {True: 530, False: 840}
WRITE_RATE = 200e6  # bytes/s, assumed, of one host to a bucket
PROCESS_BYTES = 4e9  # assumed: what Python, JAX, TensorFlow and its threads hold

# What of an image a block keeps for the backward pass, in copies of S x C and of the hidden
# C x D_S + S x D_C: by kind of program and policy. "working" is there once besides, while a block
# is computed. Fitted to what compiled programs take (docs/scaling.md); of "gpu" only "none" is.
KEPT = {
    "tpu": {"none": (1, 1), "dots": (1, 1), "full": (1, 0), "working": (4, 1.5)},
    "tpu scan": {"none": (3, 6), "dots": (1, 1), "full": (1, 0), "working": (4, 5)},
    "gpu": {"none": (4, 3), "dots": (3, 1), "full": (1, 0), "working": (4, 4)},
}
# What passes between a block and the main memory, in the same copies; of "gpu" [estimated].
PASSED = {
    "tpu": {"none": (5, 8), "dots": (5, 8), "full": (5, 9.5)},
    "tpu scan": {"none": (8, 15), "dots": (6, 10), "full": (6, 10)},
    "gpu": {"none": (10, 14), "dots": (10, 15), "full": (10, 17)},
}
COMPILES = 4  # of a search


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


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned: a resolved config, its model and its length."""

    config: ConfigDict
    model: nn.Module
    topology: chips.Topology
    utilization: float
    num_examples: int | None
    eval_examples: int
    image_bytes: float
    stored_side: int | None  # of all images, in pixels
    state: train_state.TrainState  # shapes
    devices: list  # of a TPU topology; empty for GPUs

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.config.image_size, self.config.image_size)

    @property
    def num_params(self) -> int:
        """How many parameters the model has."""
        return sharding.num_values(self.state.params)


def open_subject(
    config: ConfigDict,
    topology_name: str,
    *,
    utilization: float,
    num_examples: int | None = None,
    num_classes: int | None = None,
) -> Subject:
    """Resolves a config as training does, without its data.

    Args:
      config: of the run.
      topology_name: as `chips.find` takes it.
      utilization: share of the peak that matmuls are expected to reach.
      num_examples: of the training split; None: what `SETS` says.
      num_classes: likewise, where the config does not say.

    Raises:
      UserError: a value that is not accepted, or one that only the data has.
    """
    run.check_config(config)
    topology = chips.find(topology_name)
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization={utilization}; it must be above 0 and at most 1")
    config = config.copy_and_resolve_references()
    known = SETS.get(config.dataset.name.removesuffix("/fall11"))
    run.resolve_model(config, run.find_initial(config), None)
    run.resolve_permutation(config)
    if config.model.num_classes is None:
        config.model.num_classes = num_classes or (known.num_classes if known else None)
    if config.model.num_classes is None:
        raise UserError(
            f"how many classes {config.dataset.name!r} has is not known: give --num_classes"
        )
    if num_examples is None and known:
        num_examples = split_size(config.dataset.train_split, known.splits)
    if num_examples is None and run.needs_epochs(config):
        raise UserError(
            f"how many examples {config.dataset.name!r} {config.dataset.train_split} has is not "
            "known, and the run's length is in epochs: give --num_examples"
        )
    run.resolve_lengths(config, num_examples)
    model = run.build_model(config)
    eval_examples = 0
    if known and config.dataset.val_split:
        evaluations = config.total_steps // (config.eval_every_steps or config.total_steps)
        eval_examples = evaluations * (split_size(config.dataset.val_split, known.splits) or 0)
    if known and config.dataset.test_split:
        eval_examples += split_size(config.dataset.test_split, known.splits) or 0
    eval_examples *= 2 if config.optimizer.ema_decay else 1  # the average is evaluated too
    return Subject(
        config=config,
        model=model,
        topology=topology,
        utilization=utilization,
        num_examples=num_examples,
        eval_examples=eval_examples,
        image_bytes=known.image_bytes if known else IMAGE_BYTES,
        stored_side=known.side if known else None,
        state=_abstract_state(config, _abstract_mesh(1, 1, 1)),
        devices=[] if topology.is_gpu else chips.tpu_devices(topology),
    )


def split_size(spec: str, splits: dict[str, int]) -> int | None:
    """Examples of "train[:99%]+validation" and the like; None where a name is not in `splits`.

    Percentages are rounded to the nearest example, as TFDS does.
    """
    total = 0
    for part in spec.split("+"):
        match = re.fullmatch(r"\s*(\w+)(?:\[(-?\d*%?):(-?\d*%?)\])?\s*", part)
        if not match or match[1] not in splits:
            return None
        size = splits[match[1]]

        def place(text: str | None, default: int, size: int = size) -> int:
            if not text:
                return default
            share = text.endswith("%")
            number = round(int(text[:-1]) / 100 * size) if share else int(text)
            return min(max(number + size * (number < 0), 0), size)

        total += max(place(match[3], size) - place(match[2], 0), 0)
    return total


# The closed form, where some parameters may be frozen.


def train_flops(subject: Subject) -> float:
    """FLOPs of the matmuls that one image takes in an update, without recomputation.

    Forward, and again as many for the gradient of each trained kernel and for that of each layer's
    input, where something below it is trained: three times the forward, less the gradient by the
    pixels, which nobody needs. SAM takes two gradients.
    """
    params = subject.state.params
    factors = jax.tree.leaves(multipliers(params, subject.config.optimizer.lr_multipliers))
    trained = {
        name for name, factor in zip(sharding.by_name(params), factors, strict=True) if factor
    }
    total, below = 0.0, False
    for layer, flops in layers(subject.model, subject.image_size):
        own = {name for name in trained if name.rpartition("/")[0] == layer}
        total += flops * (1 + below + (f"{layer}/kernel" in own))
        below = below or bool(own)
    return total * (2 if subject.config.optimizer.sam_rho else 1)


# One update: compiled, or estimated.


def own_settings(subject: Subject) -> Settings:
    """Those of the config itself.

    Raises:
      UserError: its mesh does not fit the topology.
    """
    config, count = subject.config, subject.topology.num_devices
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    fixed = [size for size in sizes.values() if size != -1]
    wrong = len(fixed) < 2 or min(fixed) < 1
    if not wrong:
        left = count // math.prod(fixed)
        sizes = {axis: left if size == -1 else size for axis, size in sizes.items()}
    if wrong or math.prod(sizes.values()) != count:
        raise UserError(
            f"mesh {config.mesh.to_dict()} does not fit {subject.topology.name}: the sizes must "
            f"multiply to {count}"
        )
    return Settings(
        **sizes,
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


def _abstract_mesh(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _bytes_per_device(tree: Any, mesh: AbstractMesh) -> float:
    shardings = placement.state_shardings(mesh, tree)
    return float(sharding.bytes_per_device(sharding.abstract(tree, shardings)))


def _abstract_state(config: ConfigDict, mesh: Mesh | AbstractMesh) -> train_state.TrainState:
    _, tx = run.build_optimizer(config)
    return train_state.abstract_state(
        run.build_model(config),
        tx,
        (config.image_size, config.image_size),
        mesh,
        ema=bool(config.optimizer.ema_decay),
        skips=config.nan_policy == "skip",
    )


def _check(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where a batch cannot be parted so."""
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
    abstract = _abstract_state(config, mesh)
    model = run.build_model(config)
    schedule, tx = run.build_optimizer(config)
    example = {"image": ((*subject.image_size, 3), "uint8"), "label": ((), "int32")}
    batch = sharding.abstract_batch(example, config.global_batch_size, mesh)
    started = time.perf_counter()
    lowered = run.jit_train_step(config, model, schedule, tx, abstract).lower(abstract, batch)
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
    # What is given is there throughout; of the results those that take no argument's place.
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
    # The compiler has found a place for everything.
    return dataclasses.replace(
        step,
        compiled=True,
        fits=True,
        compile_seconds=seconds,
        unknown_loops=counts.unknown_loops,
    )


def memory_of_error(text: str) -> float | None:
    """Bytes that a program needs, of the compiler's message that they are too many."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available", text)
    if not match:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return float(number) * 1024 ** (" KMGT".index(unit))


def estimate_step(subject: Subject, settings: Settings) -> Step:
    """The same by arithmetic: for GPUs, and to choose what is worth compiling.

    The state is exact, activations are `KEPT`, communication is what the mesh needs at least.

    Raises:
      UserError: settings that do not divide the batch or a width.
    """
    config, model = _with(subject, settings), subject.model
    mesh = _abstract_mesh(settings.data, settings.fsdp, settings.tensor)
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
    kept, passed = (
        {policy: copies[0] * stream + copies[1] * hidden for policy, copies in table[kind].items()}
        for table in (KEPT, PASSED)
    )
    activations = model.num_blocks * kept[settings.remat] + kept["working"]
    pixels = 3 * math.prod(subject.image_size)
    gathered = params * settings.fsdp / model.num_blocks * (settings.fsdp > 1)  # a block's weights
    temporary = at_once * activations + 4 * images * pixels + params + gathered
    memory = {
        "state": state,
        "batch and results": images * pixels,
        "temporary": temporary,
    }

    again = 0.0
    if settings.remat == "full":  # all of a block but its last layer
        again = sum(
            flops
            for name, flops in layers(model, subject.image_size)
            if name.endswith(("Dense_0", "token_mixing/Dense_1"))
        )
    flops = (train_flops(subject) + again) * images / settings.tensor

    # The state is read and written once, whole weights with each part of a batch.
    moved = images * model.num_blocks * passed[settings.remat] + 2 * state
    moved += 2 * params * settings.fsdp * settings.accumulate_steps

    whole = params * settings.fsdp
    collectives = {}
    if settings.fsdp > 1:
        # Each part of a batch gathers the weights forward and backward, as matmuls take them.
        share = (settings.fsdp - 1) / settings.fsdp * settings.accumulate_steps
        half = whole / 2 if not subject.topology.is_gpu or width == 2 else whole
        collectives["all-gather"] = hlo.Traffic(
            0, 2 * half * settings.accumulate_steps, 2 * half * share
        )
        collectives["reduce-scatter"] = hlo.Traffic(
            0, whole * settings.accumulate_steps, whole * share
        )
    reduced = sent = 0.0
    if settings.data > 1:
        reduced, sent = params, 2 * params * (settings.data - 1) / settings.data
    if settings.tensor > 1:
        times = (5 if settings.remat == "full" else 4) * model.num_blocks
        reduced += times * stream * images
        sent += times * stream * images * 2 * (settings.tensor - 1) / settings.tensor
    if reduced:
        collectives["all-reduce"] = hlo.Traffic(0, reduced, sent)
    return _timed(
        subject, settings, memory=memory, flops=flops, num_bytes=moved, collectives=collectives
    )


def peak(subject: Subject) -> float:
    """FLOP/s that matmuls of the model's dtype reach at most on a device."""
    chip = subject.topology.chip
    return chip.flops_float32 if subject.model.dtype == "float32" else chip.flops


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


# What else could be done.


def candidates(subject: Subject) -> list[Step]:
    """Estimates of all settings worth a thought, the fastest that should fit first.

    Meshes of powers of two that divide batch and widths, with "tensor" at most 8; every policy of
    rematerialisation; up to 16 parts of a batch where nothing else fits.
    """
    own, count = own_settings(subject), subject.topology.num_devices
    powers = [2**n for n in range(count.bit_length()) if count % 2**n == 0]
    found = []
    for parts in (2**n for n in range(5)):
        for tensor, fsdp in itertools.product([p for p in powers if p <= 8], powers):
            if count % (tensor * fsdp):
                continue
            for remat in REMAT:
                settings = dataclasses.replace(
                    own,
                    data=count // (tensor * fsdp),
                    fsdp=fsdp,
                    tensor=tensor,
                    remat=remat,
                    accumulate_steps=parts,
                )
                try:
                    found.append(estimate_step(subject, settings))
                except UserError:  # an axis does not divide
                    break
        if any(step.fits for step in found):
            break
    if not found:
        raise UserError(
            f"global_batch_size={subject.config.global_batch_size}: no mesh of {count} devices "
            "divides it; take another number of devices, or another batch"
        )
    return sorted(found, key=_rank)


def _rank(step: Step) -> tuple:
    """Fitting first, then by time; of equals the simplest mesh."""
    settings = step.settings
    return (
        not step.fits,
        round(step.seconds, 5) if step.fits else step.memory,
        settings.tensor,
        settings.fsdp,
        list(REMAT).index(settings.remat),
    )


def search(subject: Subject, say: Callable[[str], None]) -> list[Step]:
    """Ranks settings: those that fit first, the fastest at the top.

    For TPUs the most promising are compiled, at most COMPILES: the best estimate of each policy of
    rematerialisation, then the next best; what the compiler finds corrects the estimates of memory.

    Args:
      subject: what is planned.
      say: is told of each compilation, with the time left.
    """
    estimated = candidates(subject)
    if subject.topology.is_gpu:
        return estimated
    say(f"{len(estimated)} settings estimated; at most {COMPILES} are compiled")
    done: list[Step] = []
    ratio = 1.0  # compiled memory by estimated
    limit = subject.topology.chip.memory
    started = time.perf_counter()
    waiting = list(estimated)
    while waiting and len(done) < COMPILES:
        fitting = [s for s in waiting if s.memory * ratio <= limit] or waiting[:1]
        tried = {step.settings.remat for step in done}
        best = next((s for s in fitting if s.settings.remat not in tried), fitting[0])
        waiting.remove(best)
        step = compile_step(subject, best.settings)
        ratio = step.memory / best.memory
        done.append(step)
        each = (time.perf_counter() - started) / len(done)
        verdict = f"{step.seconds * 1e3:.1f} ms" if step.fits else "does not fit"
        say(
            f"compiled {len(done)} of {COMPILES}: {step.settings}: {step.memory / chips.GIB:.1f} "
            f"GiB, {verdict}; {each:.0f} s each, {each * (COMPILES - len(done)):.0f} s left"
        )
    return [*sorted(done, key=_rank), *waiting]


def advice(subject: Subject, step: Step) -> str:
    """What to change where a step does not fit: the best that should, by the estimate."""
    ratio = step.memory / estimate_step(subject, step.settings).memory
    own = (step.settings.data, step.settings.fsdp, step.settings.tensor)
    narrower = ""
    if subject.topology.is_gpu and subject.model.dtype == "float32":
        narrower = "--config.model.dtype=bfloat16 halves activations and time; or "
    # The mesh that was asked for, with less in memory, before another one.
    for other in sorted(
        candidates(subject),
        key=lambda s: (s.settings.data, s.settings.fsdp, s.settings.tensor) != own,
    ):
        if other.memory * ratio <= subject.topology.chip.memory and other.settings != step.settings:
            return (
                f"{narrower}should fit, at {other.memory * ratio / chips.GIB:.1f} GiB (estimated): "
                f"{other.settings.overrides}"
            )
    return "no mesh, rematerialisation or accumulation should make it fit: take more devices"


# What the whole run takes.


def summary(subject: Subject, step: Step) -> dict[str, Any]:
    """Every figure of a plan, as JSON has it: seconds, bytes, FLOPs and images."""
    config, topology, chip = subject.config, subject.topology, subject.topology.chip
    batch, devices = config.global_batch_size, topology.num_devices
    per_image = train_flops(subject)
    rate = batch / step.seconds
    forward = forward_flops(subject.model, subject.image_size)
    evaluation = subject.eval_examples * forward / (devices * peak(subject) * subject.utilization)
    seconds = config.total_steps * step.seconds + evaluation
    checkpoint = sharding.bytes_per_device(subject.state)
    hosts, dataset = topology.num_hosts, config.dataset
    pixels = 3 * config.image_size**2
    per_host = rate / hosts
    shuffled = 2 * dataset.shuffle_group_size * subject.image_bytes
    if subject.num_examples is not None:
        shuffled = min(shuffled, subject.num_examples * subject.image_bytes)
    on_host = {
        "process": PROCESS_BYTES,
        "shuffling": shuffled,
        "batches": (dataset.prefetch_batches + 2) * batch / hosts * pixels,
        "checkpoint": float(checkpoint),
    }
    return {
        "topology": dataclasses.asdict(topology) | {"num_hosts": hosts},
        "compiled": step.compiled,
        "utilization": subject.utilization,
        "parameters": subject.num_params,
        "run": {
            "steps": config.total_steps,
            "global_batch_size": batch,
            "images": config.total_steps * batch,
            "examples": subject.num_examples,
            "epochs": config.total_steps * batch / subject.num_examples
            if subject.num_examples
            else None,
        },
        "settings": dataclasses.asdict(step.settings),
        "overrides": step.settings.overrides,
        "fits": step.fits,
        "memory": {
            "needed": step.memory,
            "of_chip": chip.memory,
            "parts": step.memory_parts,
        },
        "compile_seconds": step.compile_seconds,
        "per_image": {"forward_flops": forward, "train_flops": per_image},
        "step": {
            "model_flops": per_image * batch / devices,
            "executed_flops": step.flops,
            "bytes": step.bytes,
            "collectives": {
                kind: dataclasses.asdict(traffic) for kind, traffic in step.collectives.items()
            },
            "sent": step.sent,
            "floors": step.floors,
            "compilers_schedule": step.schedule,
            "seconds": step.seconds,
            "limit": step.limit,
            "model_flops_utilization": per_image * batch / devices / peak(subject) / step.seconds,
        },
        "images_per_second": rate,
        "images_per_second_per_device": rate / devices,
        "evaluation_seconds": evaluation,
        "hours": seconds / 3600,
        "device_hours": seconds / 3600 * devices,
        "checkpoint": {
            "bytes": checkpoint,
            "write_seconds": checkpoint / WRITE_RATE,
            "kept_bytes": checkpoint
            * (config.checkpoint.keep_last + bool(config.checkpoint.keep_best)),
            "every_seconds": config.checkpoint.every_steps * step.seconds,
        },
        "host": {
            "memory": on_host,
            "memory_needed": sum(on_host.values()),
            "memory_there": chip.host_memory,
            "images_per_second": per_host,
            "read_bytes_per_second": per_host * subject.image_bytes,
            "send_bytes_per_second": per_host * pixels,
            "input": _input(subject, per_host),
        },
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
    steps = dataset.train_preprocess
    on_device = topology.is_gpu if dataset.augment_on == "auto" else dataset.augment_on == "device"
    if steps and on_device and _can_augment_on_device(steps):
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


def _can_augment_on_device(steps: str) -> bool:
    """Whether a stream's device can take steps of these: what it is given has one size."""
    parts = augment.split(steps)
    return parts.device is not None and _gives_one_size(parts.host)


def _gives_one_size(steps: str) -> bool:
    """Whether images of any size have one after these steps."""
    return any(name in steps for name in ("resize(", "central_crop(", "inception_crop("))


def _input_rows(subject: Subject, plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines that say whether the input suffices, and what could be done where it does not."""
    prepared = plan["host"]["input"]
    if prepared["stays_on_device"]:
        return [("input suffices", "yes: the images are read once and stay on the devices")]
    rate = f"{prepared['core_rate']:,} images/s a core"
    figures = (
        f"about {prepared['cores_needed']:,.1f} of a host's {prepared['cores_there']} cores "
        f"prepare them at {rate}; it could feed {prepared['feeds_devices']:,.3g} devices and has "
        f"{prepared['devices']}"
    )
    if prepared["suffices"]:
        rows = [("input suffices", f"yes: {figures}")]
    else:
        total = prepared["images_per_second"] * subject.topology.num_hosts
        rows = [
            (
                "input suffices",
                f"NO: {figures}. It gives {total:,.0f} images/s in all, and the devices wait "
                f"{prepared['wait_share']:.0%} of the time",
            )
        ]
        if prepared["steps"] and _can_augment_on_device(prepared["steps"]):
            device_steps = augment.split(prepared["steps"]).device
            change = f"--config.dataset.augment_on=device ({device_steps} on the devices)"
            rows.append(("to change", change))
    if prepared["steps"] != subject.config.dataset.train_preprocess:
        rows.append(("", f"the host's steps are {prepared['steps']}, the others the devices'"))
    return rows


def report(subject: Subject, step: Step) -> list[tuple[str, str]]:
    """A plan's figures, for people: (what, how much)."""
    plan, chip, topology = summary(subject, step), subject.topology.chip, subject.topology
    of_run, of_step, host = plan["run"], plan["step"], plan["host"]
    gib = chips.GIB
    length = f"{of_run['steps']:,} steps of {of_run['global_batch_size']:,} images"
    if of_run["epochs"]:
        length += f", {of_run['epochs']:,.1f} epochs of {of_run['examples']:,}"
    rows = [
        ("topology", f"{topology.name}: {topology.what} in {topology.num_hosts:,} host(s)"),
        (
            "model",
            f"{subject.num_params:,} parameters, {subject.config.image_size} px, "
            f"{subject.model.num_classes:,} classes, {subject.model.dtype}",
        ),
        ("run", length),
        ("settings", str(step.settings)),
        (
            "figures",
            f"of the compiled update ({step.compile_seconds:.0f} s to compile)"
            if step.compiled
            else "ESTIMATED by arithmetic: nothing was compiled",
        ),
    ]
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in step.memory_parts.items())
    verdict = f"{step.memory / gib:.2f} of {chip.memory / gib:.2f} GiB a device"
    if step.fits:
        rows.append(("fits", f"yes: {verdict} ({parts})"))
    else:
        over = (step.memory - chip.memory) / gib
        rows.append(("fits", f"NO: {verdict}, {over:.2f} too many ({parts})"))
        rows.append(("to change", advice(subject, step)))
        rows.append(("", "what follows is an estimate, and would hold if it fitted"))
    if step.unknown_loops:
        rows.append(("", f"{step.unknown_loops} loop(s) of unknown length are counted once"))
    extra = step.flops / of_step["model_flops"] - 1
    rows.append(
        (
            "FLOPs",
            f"{short(plan['per_image']['train_flops'], 'FLOP')} an image by the closed form "
            f"(forward {short(plan['per_image']['forward_flops'], 'FLOP')}); a device executes "
            f"{short(step.flops, 'FLOP')} a step ({extra:+.1%})",
        )
    )
    rows.append(("memory traffic", f"{short(step.bytes, 'B')} a device and step"))
    for kind, traffic in step.collectives.items():
        count = f"{traffic.count:,} x, " if traffic.count else ""
        rows.append(
            (
                kind,
                f"{count}{short(traffic.payload, 'B')} of arrays, a device sends "
                f"{short(traffic.sent, 'B')}",
            )
        )
    floors = ", ".join(f"{name} {short(time, 's')}" for name, time in step.floors.items())
    rows.append(("floors of a step", f"{floors}, each at its peak"))
    if step.schedule:
        schedule = f"{short(step.schedule, 's')} a step, communication left out"
        rows.append(("compiler's schedule", schedule))
    rows.append(
        (
            "expected",
            f"{short(step.seconds, 's')} a step with matmuls at {subject.utilization:.0%} of "
            f"their peak, limited by {step.limit}: "
            f"{plan['images_per_second']:,.0f} images/s, "
            f"{plan['images_per_second_per_device']:,.0f} a device",
        )
    )
    rows.append(
        (
            "whole run",
            f"{plan['hours']:,.3g} hours, {plan['device_hours']:,.4g} device-hours (evaluation "
            f"{duration(plan['evaluation_seconds'])} of it, as min:s)",
        )
    )
    saved = plan["checkpoint"]
    rows.append(
        (
            "checkpoint",
            f"{short(saved['bytes'], 'B')}, every {duration(saved['every_seconds'])}; "
            f"{saved['write_seconds']:,.0f} s to write beside the training at "
            f"{short(WRITE_RATE, 'B/s')} (assumed); {short(saved['kept_bytes'], 'B')} are kept",
        )
    )
    if not host["input"]["stays_on_device"]:
        rows.append(
            (
                "each host reads",
                f"{host['images_per_second']:,.0f} images/s, "
                f"{short(host['read_bytes_per_second'], 'B/s')} of files, sends "
                f"{short(host['send_bytes_per_second'], 'B/s')} to its devices",
            )
        )
    rows += _input_rows(subject, plan)
    needs = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in host["memory"].items())
    rows.append(
        (
            "each host's memory",
            f"{host['memory_needed'] / 1e9:,.1f} of {host['memory_there'] / 1e9:,.0f} GB ({needs})",
        )
    )
    return rows


def ranking(subject: Subject, steps: list[Step], most: int = 12) -> list[tuple[str, ...]]:
    """Rows of a search's table, its head first."""
    return [
        ("settings", "figures", "GiB", "fits", "ms a step", "images/s", "limit"),
        *(
            (
                str(step.settings),
                "compiled" if step.compiled else "estimated",
                f"{step.memory / chips.GIB:.2f}",
                "yes" if step.fits else "no",
                f"{step.seconds * 1e3:,.1f}" if step.fits else "",
                f"{subject.config.global_batch_size / step.seconds:,.0f}" if step.fits else "",
                step.limit if step.fits else "",
            )
            for step in steps[:most]
        ),
    ]
