"""Accuracy of given weights over the image size, and over the share of shuffled patches or pixels.

The paper trains under permutations (docs/probes.md); here the weights are as they are, and the
images of the evaluation change.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.table import Table
from rich.text import Text
from scipy import special

from mixer import files, run_files
from mixer.data import splits as pipeline
from mixer.data.preprocessing import permutation as orders
from mixer.data.preprocessing import spec as steps
from mixer.errors import UserError, printable
from mixer.evaluation import classification, scores, suites
from mixer.models.mlp_mixer import check_image_size
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.runs import curves
from mixer.training import losses
from mixer.training.step import make_predict
from mixer.weights import checkpoint
from mixer.weights import fetch as remote
from mixer.weights import formats as weights
from mixer.weights import load as loading

SEEDS = (0, 1, 2)  # of the permutations at each share
AXES = {"resolution": "side of the images, pixels", "permutation": "share that is shuffled"}


@dataclasses.dataclass(frozen=True)
class Point:
    """A place on a curve. Shares are in 0..1.

    Attributes:
      x: side of the images in pixels, or the share that is shuffled.
      count: number of images that have a label.
      top1: of them; the mean over the permutations where there are several.
      top1_interval: of 95 %, as `interval` has it.
      top1_by_seed: of each permutation.
      loss: mean, likewise.
      preprocess: the steps that made the images.
    """

    x: float
    count: int
    top1: float
    top1_interval: tuple[float, float]
    top1_by_seed: tuple[float, ...]
    loss: float
    preprocess: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of one checkpoint, by growing x. `shuffled` is "patches", "pixels" or ""."""

    weights: str
    shuffled: str
    data: str
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """What the picture and the table call it."""
        return f"{self.weights}: {self.shuffled}" if self.shuffled else self.weights


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Curves over the same x; `kind` is a key of AXES, `resize` that of a resolution sweep."""

    kind: str
    resize: str
    curves: tuple[Curve, ...]

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Subject:
    """Weights and the data they are evaluated on.

    Attributes:
      path: of the weights, as given.
      found: they, not read yet.
      config: whose data, evaluation steps and loss are used.
      mesh: of the devices. batch_size: images at once, over all of them.
      class_names: those that the data must have; None: they are not known.
      which: "train", "val" or "test".
      workdir: of the run that the weights are of; None: another config says the data.
    """

    path: str
    found: loading.Found
    config: ConfigDict
    mesh: Mesh
    batch_size: int
    class_names: tuple[str, ...] | None
    which: str
    workdir: epath.Path | None


def open_subject(
    path: str, *, config: ConfigDict | None, which: str, say: Callable[[str], None]
) -> Subject:
    """Finds weights and the config of the data; no array is read.

    Args:
      path: as `mixer.load` takes it.
      config: of the data; None: that of the run that `path` is, or is a step of.
      which: split of the config, "train", "val" or "test".
      say: gets a line on what is fetched.

    Raises:
      UserError: no weights there, not for square images, or no run and no config either.
    """
    found = loading.find(path, log=say)
    card, workdir = found.card, None
    height, width = card.image_size
    if height != width:
        raise UserError(
            f"--weights={found.path} is for images of {height} x {width}; sweeps take square ones"
        )
    if not card.num_classes:
        raise UserError(f"--weights={found.path} has no head, and so no accuracy")
    class_names = card.class_names if isinstance(card.class_names, tuple) else None
    if config is not None:
        config = config.copy_and_resolve_references()
        run.check_config(config)
        config.model.update({name: getattr(card, name) for name in weights.DIMENSIONS})
        run.resolve_permutation(config)
    elif remote.is_directory(path):
        workdir = checkpoint.find_step(path).parent.parent
        config, class_names = run.read_run(workdir)
    else:
        raise UserError(
            f"--weights={found.path} is no run, which would say the data; --config=CONFIG does"
        )
    config.model.num_classes = card.num_classes
    mesh = sharding.make_mesh({"data": -1})
    batch_size = config.eval_batch_size or config.global_batch_size
    shards = sharding.batch_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    return Subject(str(path), found, config, mesh, batch_size, class_names, which, workdir)


def steps_at(preprocess: str, old: int, new: int) -> str:
    """Steps that give images of side `old`, made to give `new`.

    The sizes of `resize`, `resize_small` and `central_crop` are multiplied by new / old, so that as
    much of the picture is seen. Where there is none of these the pictures are stored at their
    size: they are resized at the end, bilinear and antialiased.

    Raises:
      UserError: the images are permuted, for which there is no such thing at another size; or a
        step is not of the form of one.
    """
    if old == new or not preprocess:  # synthetic data has no steps
        return preprocess
    scaled, found = [], False
    for text in [step.text for step in steps.parse(preprocess)]:
        name, args, kwargs = steps.parse_call(text)
        if name.startswith("permute_"):
            raise UserError(
                f"{preprocess!r} permutes images of {old} x {old}: there is no permutation of "
                f"{new} x {new} that the weights have seen"
            )
        if name in ("resize", "resize_small", "central_crop"):
            found = True
            if args:
                args[0] = _scaled(args[0], new / old)
            elif "size" in kwargs:
                kwargs["size"] = _scaled(kwargs["size"], new / old)
            arguments = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
            text = f"{name}({', '.join(arguments)})"
        scaled.append(text)
    if found:
        return "|".join(scaled)
    return orders.with_step(preprocess, f"resize({new}, antialias=True)")


def _scaled(size: int | tuple[int, int], factor: float) -> int | tuple[int, int]:
    if isinstance(size, int):
        return round(size * factor)
    height, width = size
    return round(height * factor), round(width * factor)


def resolution(
    subjects: Sequence[Subject],
    sizes: Sequence[int],
    *,
    resize: str,
    say: Callable[[str], None],
) -> Sweep:
    """Evaluates each checkpoint on images of each size.

    Args:
      subjects: the weights.
      sizes: sides in pixels.
      resize: how weights come to another size, "grow" or "interpolate" (mixer/models/resize.py).
      say: gets a line on the weights and the steps at each size.

    Raises:
      UserError: a size that the weights, or the data, cannot have; nothing is computed then.
    """
    sizes = sorted(set(sizes))
    opened = {}
    for subject in subjects:
        for size in sizes:
            check_image_size((size, size), subject.found.card.patch_size)
            loading.resized(subject.found, (size, size), resize)
            opened[subject.path, size] = _open_split(subject, size)
    drawn = []
    for subject in subjects:
        points = []
        for size in sizes:
            split, preprocess = opened[subject.path, size]
            loaded = loading.read(
                subject.path,
                image_size=size,
                resize=resize,
                mesh=subject.mesh,
                log=lambda line: None,
            )
            say(f"{subject.found.path} at {size} px: {preprocess}")
            step = classification.make_eval_step(
                make_predict(loaded.model, subject.mesh),
                losses.make_loss(subject.config.loss),
                loaded.card.num_classes,
            )
            result = _evaluate(step, loaded.params, split, subject)
            points.append(_point(size, [result], preprocess))
        drawn.append(Curve(subject.found.path, "", split.name, tuple(points)))
    return Sweep("resolution", resize, tuple(drawn))


def permutation(
    subjects: Sequence[Subject], shares: Sequence[float], *, say: Callable[[str], None]
) -> Sweep:
    """Evaluates each checkpoint on images of which a share of the patches, or pixels, is shuffled.

    Patches move whole. At each share the mean over the permutations of SEEDS is taken, each of them
    the same for all images; at 0 it is the plain evaluation.

    Args:
      subjects: the weights.
      shares: in 0..1.
      say: gets a line on each of the weights and its steps.

    Raises:
      UserError: a share that is none, or data that is not there or not the weights'.
    """
    shares = sorted(set(shares))
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"--shares: {share:g} is no share of the patches; 0 to 1 are taken")
    opened = [_open_split(subject, subject.found.card.image_size[0]) for subject in subjects]
    drawn = []
    for subject, (split, preprocess) in zip(subjects, opened, strict=True):
        say(f"{subject.found.path}: {preprocess}")
        for kind, results in _shuffled_results(subject, split, shares).items():
            points = (_point(x, of_x, preprocess) for x, of_x in zip(shares, results, strict=True))
            drawn.append(Curve(subject.found.path, kind, split.name, tuple(points)))
    return Sweep("permutation", "", tuple(drawn))


def _shuffled_results(
    subject: Subject, split: pipeline.Split, shares: Sequence[float]
) -> dict[str, list[list[classification.Classification]]]:
    """By kind and share, the results under each permutation; nothing moves at share 0."""
    loaded = loading.read(subject.path, mesh=subject.mesh, log=lambda line: None)
    size = loaded.card.image_size
    plain = make_predict(loaded.model, subject.mesh)

    def predict(params_and_order: tuple[Any, jax.Array], images: jax.Array) -> jax.Array:
        params, order = params_and_order
        pixels = images.reshape(images.shape[0], -1, images.shape[-1])
        return plain(params, pixels[:, order].reshape(images.shape))

    # The order is an argument: one program serves all.
    step = classification.make_eval_step(
        predict, losses.make_loss(subject.config.loss), loaded.card.num_classes
    )

    def result(kind: str, share: float, seed: int) -> classification.Classification:
        if kind == "pixels":
            order = orders.pixel_order(size, seed=seed, share=share)
        else:
            patch_size = loaded.card.patch_size
            order = orders.patch_order(size, patch_size, seed=seed, share=share, within=False)
        return _evaluate(step, (loaded.params, order), split, subject)

    return {
        kind: [
            [result(kind, share, seed) for seed in (SEEDS if share else SEEDS[:1])]
            for share in shares
        ]
        for kind in orders.KINDS
    }


def _open_split(subject: Subject, size: int) -> tuple[pipeline.Split, str]:
    """The split at a size of its images, and the steps that give it."""
    config = subject.config.copy_and_resolve_references()
    preprocess = steps_at(config.dataset.eval_preprocess, config.image_size, size)
    config.image_size = size
    config.dataset.eval_preprocess = preprocess
    data = run_files.read_data(subject.workdir) if subject.workdir is not None else None
    split = run.open_own_split(config, subject.which, subject.class_names, data and data["splits"])
    if split is None:
        raise UserError(f"the config of {subject.found.path} names no {subject.which}_split")
    card = subject.found.card
    try:
        suites.check_classes(split, card.class_names, card.num_classes)
    except UserError as error:
        raise UserError(f"{subject.found.path}: {error}") from None
    return split, preprocess


def _evaluate(
    step: Callable, params: Any, split: pipeline.Split, subject: Subject
) -> classification.Classification:
    return classification.evaluate(
        step,
        params,
        split,
        global_batch_size=subject.batch_size,
        mesh=subject.mesh,
        prefetch_batches=subject.config.dataset.prefetch_batches,
    )


def _point(x: float, results: Sequence[classification.Classification], preprocess: str) -> Point:
    count = results[0].labelled
    top1 = float(np.mean([result.top1 for result in results]))
    return Point(
        x=x,
        count=count,
        top1=top1,
        top1_interval=interval([result.top1 for result in results], count),
        top1_by_seed=tuple(result.top1 for result in results),
        loss=float(np.mean([result.loss for result in results])),
        preprocess=preprocess,
    )


def interval(shares: Sequence[float], count: int) -> tuple[float, float]:
    """Interval of 95 % of the mean of the accuracies on `count` images under several permutations.

    Images and permutations are both samples, and the squares of the two half-widths add up:
    Wilson's for the mean on so many images, Student's for so many permutations; of one, Wilson's.
    """
    mean, draws = float(np.mean(shares)), len(shares)
    low, high = scores.interval(mean * count, count)
    if draws == 1:
        return low, high
    spread = special.stdtrit(draws - 1, 0.975) * np.std(shares, ddof=1) / draws**0.5
    return (
        max(mean - float(np.hypot(mean - low, spread)), 0.0),
        min(mean + float(np.hypot(high - mean, spread)), 1.0),
    )


def as_table(sweep: Sweep) -> Table:
    """A line for each point."""
    table = Table()
    table.add_column("weights", overflow="fold")
    for name in ("pixels" if sweep.kind == "resolution" else "share", "top-1", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    if sweep.kind == "permutation":
        table.add_column("lowest to highest", justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    for curve in sweep.curves:
        label = Text(printable(curve.label))
        for point in curve.points:
            low, high = point.top1_interval
            row = [label, f"{point.x:g}", f"{point.top1:.2%}", f"{low:.2%} to {high:.2%}"]
            if sweep.kind == "permutation":
                row.append(f"{min(point.top1_by_seed):.2%} to {max(point.top1_by_seed):.2%}")
            table.add_row(*row, f"{point.loss:.4f}")
            label = Text()
        table.add_section()
    return table


def draw(sweep: Sweep, path: epath.PathLike) -> None:
    """Draws the curves as a PNG: means with their intervals, and a dot for each permutation."""
    with curves.drawing():
        figure = curves.make_figure(7, 4.5)
        _draw_curves(sweep, figure.subplots())
        curves.save_figure(figure, path)


def _draw_curves(sweep: Sweep, axes: Any) -> None:
    checkpoints = list(dict.fromkeys(curve.weights for curve in sweep.curves))
    for curve in sweep.curves:
        xs = [point.x for point in curve.points]
        means = np.array([point.top1 for point in curve.points])
        low, high = np.array([point.top1_interval for point in curve.points]).T
        color = f"C{checkpoints.index(curve.weights)}"  # a colour a checkpoint, a line a kind
        axes.errorbar(
            xs,
            100 * means,
            100 * np.array([means - low, high - means]),
            color=color,
            linestyle="--" if curve.shuffled == "pixels" else "-",
            marker="o",
            markersize=4,
            capsize=3,
            label=curves.legend_label(curve.label),
        )
        for point in curve.points:
            if len(point.top1_by_seed) > 1:
                dots = [100 * top1 for top1 in point.top1_by_seed]
                axes.plot([point.x] * len(dots), dots, "_", color=color, alpha=0.6)
    how = {"grow": "weights grown", "interpolate": "weights interpolated", "": ""}[sweep.resize]
    axes.set_title(how, fontsize=10)
    axes.set_xlabel(AXES[sweep.kind])
    axes.set_xticks(xs)
    axes.set_ylabel("top-1, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def output_directory(subjects: Sequence[Subject], given: str | None) -> epath.Path:
    """Makes the directory of the results, before the long work and not after it.

    Args:
      subjects: the weights; one run's results are in the run where nothing else is given.
      given: as the user has it.

    Raises:
      UserError: none is given, or it cannot be made.
    """
    if given is None:
        if len(subjects) > 1 or subjects[0].workdir is None:
            raise UserError("--output is missing: a directory for the picture and the numbers")
        given = subjects[0].workdir
    return files.make_output_directory("--output", given)


def write(sweep: Sweep, directory: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Writes sweep_<kind>.json and sweep_<kind>.png into a directory, and returns their paths."""
    numbers = directory / f"sweep_{sweep.kind}.json"
    picture = directory / f"sweep_{sweep.kind}.png"
    run.write_json(numbers, sweep.summary())
    draw(sweep, picture)
    return numbers, picture
