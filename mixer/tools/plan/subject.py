"""The subject of a plan: a config, resolved without reading its data, and its model and devices."""

import dataclasses
import re

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from mixer import sizes
from mixer.data.sources import synthetic
from mixer.errors import UserError
from mixer.models.flops import layers
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.runs import data as run_data
from mixer.tools.plan import chips
from mixer.training import program
from mixer.training import state as train_state
from mixer.training.optimizer import multipliers


@dataclasses.dataclass(frozen=True)
class DataSetInfo:
    """A public data set.

    Attributes:
      splits: number of examples by split.
      num_classes: number of classes.
      image_bytes: mean file size of an image.
      side: side of all images in pixels; None if their sizes differ.
    """

    splits: dict[str, int]
    num_classes: int
    image_bytes: float
    side: int | None = None


# Counts from TFDS (quoted from memory), sizes from its downloads; ImageNet-21k is the fall 2011
# release. A length in epochs needs the counts, and a plan does not read the data.
DATA_SETS = {
    "imagenet2012": DataSetInfo({"train": 1_281_167, "validation": 50_000}, 1000, 110e3),
    "imagenet21k": DataSetInfo({"train": 14_197_122}, 21843, 92e3),
    "cifar10": DataSetInfo({"train": 50_000, "test": 10_000}, 10, 2.3e3, 32),
    "cifar100": DataSetInfo({"train": 50_000, "test": 10_000}, 100, 2.3e3, 32),
    "oxford_iiit_pet": DataSetInfo({"train": 3680, "test": 3669}, 37, 105e3),
    "oxford_flowers102": DataSetInfo({"train": 1020, "validation": 1020, "test": 6149}, 102, 40e3),
    "digits": DataSetInfo({"train": 1257, "validation": 180, "test": 360}, 10, 200.0, 8),
    "synthetic": DataSetInfo(synthetic.SPLITS, 10, 0.0),
}
IMAGE_BYTES = 110e3  # assumed for unknown data sets: ImageNet's mean


@dataclasses.dataclass(frozen=True)
class Subject:
    """The subject of a plan: a resolved config, its model and its length."""

    config: ConfigDict
    model: nn.Module
    topology: chips.Topology
    utilization: float
    num_examples: int | None
    eval_examples: int
    image_bytes: float
    stored_side: int | None  # side of all stored images in pixels; None if unknown or mixed
    state: train_state.TrainState  # the shapes of the state
    devices: list  # devices of a TPU topology; empty for GPUs

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return sizes.pair(self.config.image_size)

    @property
    def num_params(self) -> int:
        """The number of parameters of the model."""
        return sharding.num_values(self.state.params)


def open_subject(
    config: ConfigDict,
    topology_name: str,
    *,
    utilization: float,
    num_examples: int | None = None,
    num_classes: int | None = None,
) -> Subject:
    """Resolves a config as training does, without reading its data.

    Args:
      config: config of the run.
      topology_name: name of the topology, as in `chips.find`.
      utilization: expected utilization of the peak matmul rate.
      num_examples: number of training examples; None: from `DATA_SETS`.
      num_classes: number of classes, if the config has none; None: from `DATA_SETS`.

    Raises:
      UserError: a value is invalid, or a value that only the data could provide is missing.
    """
    run.check_config(config)
    topology = chips.find(topology_name)
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization={utilization}; expected a number above 0 and at most 1")
    config = run.resolve(config, initial=run.find_initial(config))
    data_set = DATA_SETS.get(config.dataset.name.removesuffix("/fall11"))
    num_classes = config.model.num_classes or num_classes or (data_set and data_set.num_classes)
    if num_classes is None:
        raise UserError(
            f"dataset.name={config.dataset.name!r}: the number of classes is unknown; pass "
            "--num_classes"
        )
    if data_set:
        run_data.choose_splits(config, tuple(data_set.splits))
    if num_examples is None and data_set:
        num_examples = split_size(config.dataset.train_split, data_set.splits)
    if num_examples is None and run.needs_epochs(config):
        raise UserError(
            f"dataset.name={config.dataset.name!r}: the number of examples of "
            f"{config.dataset.train_split} is unknown, and the run's length is in epochs; pass "
            "--num_examples"
        )
    run.resolve_data(config, num_classes, num_examples)
    train_program = program.make_program(config, abstract_mesh(1, 1, 1))
    eval_examples = 0
    if data_set and config.dataset.val_split:
        evaluations = config.total_steps // (config.eval_every_steps or config.total_steps)
        eval_examples = evaluations * (split_size(config.dataset.val_split, data_set.splits) or 0)
    if data_set and config.dataset.test_split:
        eval_examples += split_size(config.dataset.test_split, data_set.splits) or 0
    eval_examples *= (
        2 if config.optimizer.ema_decay else 1
    )  # the averaged parameters are evaluated too
    return Subject(
        config=config,
        model=train_program.model,
        topology=topology,
        utilization=utilization,
        num_examples=num_examples,
        eval_examples=eval_examples,
        image_bytes=data_set.image_bytes if data_set else IMAGE_BYTES,
        stored_side=data_set.side if data_set else None,
        state=train_program.state,
        devices=[] if topology.is_gpu else chips.tpu_devices(topology),
    )


def abstract_mesh(*sizes: int) -> AbstractMesh:
    """Makes a mesh with axes of these sizes, without devices."""
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def split_size(spec: str, splits: dict[str, int]) -> int | None:
    """Counts the examples of a spec such as "train[:99%]+validation"; None for unknown splits.

    Percentages are rounded to the nearest example, as in TFDS.
    """
    total = 0
    for part in spec.split("+"):
        match = re.fullmatch(r"\s*(\w+)(?:\[(-?\d*%?):(-?\d*%?)\])?\s*", part)
        if not match or match[1] not in splits:
            return None
        size = splits[match[1]]

        def index(text: str | None, default: int, size: int = size) -> int:
            if not text:
                return default
            is_percentage = text.endswith("%")
            number = round(int(text[:-1]) / 100 * size) if is_percentage else int(text)
            return min(max(number + size * (number < 0), 0), size)

        total += max(index(match[3], size) - index(match[2], 0), 0)
    return total


def train_flops(subject: Subject) -> float:
    """Returns the matmul FLOPs per image in an update, without recomputation.

    Each layer's forward pass counts once, once more if its kernel is trained, and once more if an
    earlier layer is trained (gradient of its input). If all layers are trained, this is three times
    the forward pass, less the unused gradient with respect to the pixels. SAM computes two
    gradients.
    """
    params = subject.state.params
    factors = jax.tree.leaves(multipliers(params, subject.config.optimizer.lr_multipliers))
    trained_names = {
        name for name, factor in zip(sharding.by_name(params), factors, strict=True) if factor
    }
    total, needs_input_gradient = 0.0, False
    for layer, flops in layers(subject.model, subject.image_size):
        trained_leaves = {name for name in trained_names if name.rpartition("/")[0] == layer}
        total += flops * (1 + needs_input_gradient + (f"{layer}/kernel" in trained_leaves))
        needs_input_gradient = needs_input_gradient or bool(trained_leaves)
    return total * (2 if subject.config.optimizer.sam_rho else 1)


def peak(subject: Subject) -> float:
    """Returns the peak FLOP/s of a device for matmuls of the model's dtype."""
    chip = subject.topology.chip
    return chip.flops_float32 if subject.model.dtype == "float32" else chip.flops
