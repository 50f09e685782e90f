"""The subject of an evaluation: the weights of a run or a file, and data to evaluate them on."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from mixer import files, run_files, sizes
from mixer.data.preprocessing.spec import with_channels
from mixer.errors import UserError
from mixer.evaluation.evaluator import Batching
from mixer.models.registry import ARCHITECTURES, num_params
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.training import program
from mixer.training.state import abstract_params
from mixer.weights import checkpoint, fetch, load, published
from mixer.weights.card import Card, checksum

BATCH_SIZE = 64  # images per device, without a config that has a batch size


@dataclasses.dataclass(frozen=True)
class Subject:
    """Weights that have not been read yet, and the data to evaluate them on.

    Attributes:
      name: a run, a file, a URL without its query, or a short name.
      path: the path of the weights, as `mixer.load` takes it; for a run, the checkpoint's
        directory.
      stored: the weights at `path`.
      workdir: the run that trained the weights, if the run is evaluated or its config specifies the
        data; else None.
      checkpoint_name: "last", "best" or a step number, if the run itself is evaluated: then both
        sets of its parameters are evaluated, and the results are written to the run. None for all
        other weights.
      config: the config of the data and the loss, with the dimensions of the weights; None if no
        data is specified.
      has_own_data: whether `config` is the config of the run `workdir`.
      published: published accuracies of these weights: (name, {data set: (top-1, source)}).
      output: directory of the results.
      batching: the batches of images, on the mesh of all devices.
    """

    name: str
    path: str
    stored: load.StoredWeights
    workdir: epath.Path | None
    checkpoint_name: str | None
    config: ConfigDict | None
    has_own_data: bool
    published: tuple[str, dict[str, tuple[float, str]]] | None
    output: epath.Path
    batching: Batching

    @property
    def step(self) -> int | None:
        """The step of the checkpoint, if a run itself is evaluated."""
        return None if self.checkpoint_name is None else int(epath.Path(self.path).name)

    @property
    def resize(self) -> str:
        """How the weights are resized to the image size of the data, as for `mixer.load`."""
        if self.config is None:
            return ARCHITECTURES[self.stored.card.architecture].default_resize
        return self.config.init_resize

    @property
    def card(self) -> Card:
        """The card of the weights, with the image size and the preprocessing of the data.

        Raises:
          UserError: the weights cannot be resized to that size.
        """
        card = self.stored.card
        if self.config is None:
            return card
        size = sizes.pair(self.config.image_size)
        card = load.resize_card(self.stored, size, self.resize)
        return dataclasses.replace(card, preprocess=self.config.dataset.eval_preprocess)

    @property
    def num_params(self) -> int:
        """The number of parameters at the image size of the data."""
        card = self.card
        return num_params(card.model(), card.image_size)

    @property
    def loss(self) -> str:
        """The loss, "softmax" or "sigmoid"."""
        return "softmax" if self.config is None else self.config.loss

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, if the weights list them."""
        names = self.stored.card.class_names
        return names if isinstance(names, tuple) else None

    def data_record(self) -> dict[str, dict[str, Any]] | None:
        """The record of each split in data.json, if `config` is the config of the run."""
        return run_files.read_data(self.workdir)["splits"] if self.has_own_data else None


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters of a subject.

    Attributes:
      model: the model that the parameters belong to.
      params: by the suffix of the results, a function that reads a set of parameters onto the mesh:
        "" for the parameters, "_ema" for the moving average of a run that keeps one.
      identity: the entries of results.json that identify the weights; results of other weights are
        overwritten.
    """

    model: nn.Module
    params: dict[str, Callable[[], Any]]
    identity: dict[str, Any]


def open_subject(
    path: epath.PathLike,
    *,
    checkpoint_name: str | None = None,
    config: ConfigDict | None = None,
    preprocess: str | None = None,
    output: str | None = None,
    say: Callable[[str], None] = print,
) -> Subject:
    """Finds weights and their data without reading any array.

    Args:
      path: a run, if `checkpoint_name` is given; else weights, as `mixer.load` takes them.
      checkpoint_name: "last", "best" or a step number, to evaluate the run itself.
      config: the config of the data, the loss and the image size; None: the config of the run that
        trained the weights, if there is one.
      preprocess: preprocessing that replaces that of the config or of the weights.
      output: directory of the results; None: the run, or runs/evaluate_NAME.
      say: prints a line about each download.

    Raises:
      UserError: the run, checkpoint or file does not exist, or `config` has another image size than
        the run.
    """
    if config is not None:
        run.check_config(config)
    name, workdir = published.redact(path), None
    if checkpoint_name is not None:
        workdir = files.parse_path("--workdir", path)
        run.read_run(workdir)  # raises an error if the directory is not a run
        name, path = str(workdir), checkpoint.find_named(workdir, checkpoint_name)
    elif config is None and fetch.is_run(path):
        workdir = _find_run(path)
    image_size = None if config is None else config.image_size
    stored = load.find(path, image_size=image_size, log=say)
    card = stored.card
    is_own_size = image_size is None or sizes.pair(image_size) == card.image_size
    if checkpoint_name is not None and not is_own_size:
        raise UserError(
            f"--config has image_size={image_size}; expected {sizes.shorten(card.image_size)}, the "
            f"image size of {workdir} (--weights={workdir} resizes the weights to another size)"
        )
    figures = None
    if config is None and preprocess is None and checkpoint_name is None:
        figures = published.find_accuracies(
            path, variant=card.variant, num_classes=card.num_classes
        )
    has_own_data = config is None and workdir is not None
    if has_own_data:
        config, _ = run.read_run(workdir)
    elif config is not None:
        config = _with_dimensions(config, card)
    if preprocess is not None:
        preprocess = with_channels(preprocess, card.in_channels)
        stored = dataclasses.replace(stored, card=dataclasses.replace(card, preprocess=preprocess))
        if config is not None:
            config.dataset.eval_preprocess = preprocess
    return Subject(
        name=name,
        path=str(path),
        stored=stored,
        workdir=workdir,
        checkpoint_name=checkpoint_name,
        config=config,
        has_own_data=has_own_data,
        published=figures,
        output=_output_directory(output, name, workdir if checkpoint_name is not None else None),
        batching=_batching(config),
    )


def read_weights(subject: Subject, say: Callable[[str], None]) -> Weights:
    """Reads the parameters of a subject; a run's parameters are read when `params` is called.

    Args:
      subject: the subject to read the weights of.
      say: prints a line that describes the weights.

    Raises:
      UserError: the arrays do not fit the model, or are damaged.
    """
    if subject.checkpoint_name is not None:
        return _run_weights(subject)
    config = subject.config
    loaded = load.read_stored(
        subject.stored,
        image_size=None if config is None else config.image_size,
        resize=subject.resize,
        dtype=None if config is None else config.model.dtype,
        mesh=subject.batching.mesh,
        log=say,
    )
    arrays = traverse_util.flatten_dict(loaded.params, sep="/")
    identity = {
        "weights": subject.name,
        "checksum": checksum(
            lambda name: np.asarray(arrays[name]),
            {name: array.shape for name, array in arrays.items()},
        ),
        "preprocess": subject.card.preprocess,
        "loss": subject.loss,
    }
    return Weights(loaded.model, {"": lambda: loaded.params}, identity)


def _run_weights(subject: Subject) -> Weights:
    """Returns the parameters of a run's checkpoint and, if the run keeps one, their average."""
    config, _ = run.read_run(subject.workdir)
    model = program.build_model(config)
    abstract = abstract_params(model, subject.stored.card.image_size, subject.batching.mesh)

    restore = functools.partial(checkpoint.restore_params, subject.path, abstract)
    params = {"": functools.partial(restore, item="params")}
    if config.optimizer.ema_decay:
        params["_ema"] = functools.partial(restore, item="ema_params")
    identity: dict[str, Any] = {"step": subject.step}
    if subject.output != subject.workdir:
        identity["weights"] = subject.path
    return Weights(model, params, identity)


def _find_run(path: epath.PathLike) -> epath.Path | None:
    """Returns the training run if the path is a run or one of its steps; None for other weights."""
    workdir = checkpoint.find_step(path).parent.parent
    return workdir if run_files.is_trained(run_files.read_config(workdir) or {}) else None


def _with_dimensions(config: ConfigDict, card: Card) -> ConfigDict:
    """Returns the resolved config, with the dimensions of the weights."""
    config = config.copy_and_resolve_references()
    with config.ignore_type():  # a patch size is an int or a tuple
        config.model.update(card.dimensions, name=card.architecture)
    return run.resolve(config, initial=None)


def _output_directory(output: str | None, name: str, workdir: epath.Path | None) -> epath.Path:
    if output:
        return files.parse_path("--output", output)
    if workdir is not None:
        return workdir
    file_name = re.sub(r"[^\w.-]+", "_", name.rpartition("://")[2]).strip("_.")
    return epath.Path(f"runs/evaluate_{file_name}")


def _batching(config: ConfigDict | None) -> Batching:
    """Returns the batches of the config; their size is rounded up to a multiple of the devices."""
    # The mesh has all devices of this program, whatever mesh the run was trained on.
    mesh = sharding.make_mesh({"data": -1})
    shards = sharding.batch_shards(mesh)
    if config is None:
        return Batching(mesh, BATCH_SIZE * shards)
    batch_size = config.eval_batch_size or config.global_batch_size
    return Batching(mesh, -(-batch_size // shards) * shards, config.dataset.prefetch_batches)
