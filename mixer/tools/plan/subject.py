"""What is planned: a config resolved without its data, its model, length and devices."""

import dataclasses
import re

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from mixer.data.sources import synthetic
from mixer.errors import UserError
from mixer.models.flops import layers
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.plan import chips
from mixer.training import program
from mixer.training import state as train_state
from mixer.training.optimizer import multipliers


@dataclasses.dataclass(frozen=True)
class Set:
    """A public data set.

    Attributes:
      splits: examples by split.
      num_classes: of the labels.
      image_bytes: mean size of an image's file.
      side: of all images, in pixels; None where their sizes differ.
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
      topology_name: as for `chips.find`.
      utilization: share of their peak that matmuls are expected to reach.
      num_examples: of the training split; None: from `SETS`.
      num_classes: where the config has none; None: from `SETS`.

    Raises:
      UserError: a wrong value, or a missing one that only the data has.
    """
    run.check_config(config)
    topology = chips.find(topology_name)
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization={utilization}; it must be above 0 and at most 1")
    config = run.resolve(config, initial=run.find_initial(config))
    known = SETS.get(config.dataset.name.removesuffix("/fall11"))
    num_classes = config.model.num_classes or num_classes or (known and known.num_classes)
    if num_classes is None:
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
    run.resolve_data(config, num_classes, num_examples)
    train_program = program.make_program(config, abstract_mesh(1, 1, 1))
    eval_examples = 0
    if known and config.dataset.val_split:
        evaluations = config.total_steps // (config.eval_every_steps or config.total_steps)
        eval_examples = evaluations * (split_size(config.dataset.val_split, known.splits) or 0)
    if known and config.dataset.test_split:
        eval_examples += split_size(config.dataset.test_split, known.splits) or 0
    eval_examples *= 2 if config.optimizer.ema_decay else 1  # the average is evaluated too
    return Subject(
        config=config,
        model=train_program.model,
        topology=topology,
        utilization=utilization,
        num_examples=num_examples,
        eval_examples=eval_examples,
        image_bytes=known.image_bytes if known else IMAGE_BYTES,
        stored_side=known.side if known else None,
        state=train_program.state,
        devices=[] if topology.is_gpu else chips.tpu_devices(topology),
    )


def abstract_mesh(*sizes: int) -> AbstractMesh:
    """A mesh with such axes, without devices."""
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


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


def peak(subject: Subject) -> float:
    """FLOP/s that matmuls of the model's dtype reach at most on a device."""
    chip = subject.topology.chip
    return chip.flops_float32 if subject.model.dtype == "float32" else chip.flops
