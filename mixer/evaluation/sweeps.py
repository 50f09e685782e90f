"""Accuracy of weights over the image size, and over the share of shuffled patches or pixels.

The paper trains models on permuted images (docs/probes.md). A sweep does not train: it changes only
the images of the evaluation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from scipy import special

from mixer import files
from mixer.data.preprocessing import permutation as orders
from mixer.data.preprocessing.ops import Kind
from mixer.data.preprocessing.spec import Specification, parse
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import classification, scores, suites
from mixer.evaluation.subject import Subject
from mixer.evaluation.tables import Table, span
from mixer.models.modules import check_image_size
from mixer.runs import config as run
from mixer.runs import curves
from mixer.runs import data as run_data
from mixer.sizes import Size, pair, shorten, text
from mixer.training import losses
from mixer.training.step import make_predict
from mixer.weights import load

SCALED = ("resize", "resize_small", "central_crop")  # ops whose size scales with the image size
SEEDS = (0, 1, 2)  # seeds of the permutations at each share
AXES = {"resolution": "image size (pixels)", "permutation": "shuffled share"}


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a curve. Accuracies are in 0..1.

    Attributes:
      x: side of the images in pixels, or the shuffled share.
      count: number of labelled images.
      top1: accuracy on the labelled images, averaged over the permutations.
      top1_interval: `interval` of `top1`.
      top1_by_seed: top-1 for each permutation.
      loss: mean over the images and the permutations.
      preprocess: preprocessing of the images.
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
    """The points of one checkpoint in ascending x. `shuffled` is "patches", "pixels" or ""."""

    weights: str
    shuffled: str
    data: str
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """The name in the picture and in the table."""
        return f"{self.weights}: {self.shuffled}" if self.shuffled else self.weights


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Curves over the same x. `kind` is a key of AXES; `resize` is "" for permutations."""

    kind: str
    resize: str
    curves: tuple[Curve, ...]


def check_subject(subject: Subject) -> None:
    """Raises UserError unless the weights have a head and a config."""
    card = subject.stored.card
    if not card.num_classes:
        raise UserError(f"--weights={subject.name} has no head; expected weights of a classifier")
    if subject.config is None:
        raise UserError(
            f"--weights={subject.name} does not specify a data set; pass --config=CONFIG"
        )


def preprocess_at(preprocess: str, old: Size, new: Size) -> str:
    """Changes a preprocessing to images of side `old` so that it gives images of side `new`.

    The sizes of `resize`, `resize_small` and `central_crop` are multiplied by new / old, so that
    the same part of each picture is visible. Without any of these ops the pictures are stored at
    side `old`, and an antialiased bilinear resize is appended.

    Raises:
      UserError: the preprocessing is invalid, or permutes the images, or the sizes differ and one
        of them is not square.
    """
    if pair(old) == pair(new) or not preprocess:  # synthetic data is not preprocessed
        return preprocess
    if not isinstance(old, int) or not isinstance(new, int):
        raise UserError(
            f"preprocessing {preprocess!r} is for images of {text(old)} pixels; expected a config "
            f"with image_size={new}"
        )
    spec = parse(preprocess)
    if spec.of_kind(Kind.PERMUTATION):
        raise UserError(
            f"{preprocess!r} permutes {old} x {old} images; expected none, because a permutation "
            f"has no equivalent at {new} x {new}"
        )
    if not any(call.op.name in SCALED for call in spec.calls):
        return str(spec.with_image_op(f"resize({new}, antialias=True)"))
    calls = [
        call.replace("size", _scaled(call.arguments["size"], new / old))
        if call.op.name in SCALED
        else call
        for call in spec.calls
    ]
    return str(Specification(tuple(calls)))


def _scaled(size: int | tuple[int, int], factor: float) -> int | tuple[int, int]:
    if isinstance(size, int):
        return round(size * factor)
    height, width = size
    return round(height * factor), round(width * factor)


def resolution(
    subjects: Sequence[Subject],
    sizes: Sequence[int],
    *,
    split_name: str,
    resize: str,
    say: Callable[[str], None],
) -> Sweep:
    """Evaluates each checkpoint on images of each size.

    Args:
      subjects: the weights.
      sizes: sides in pixels.
      split_name: the split of their configs, "train", "val" or "test".
      resize: method that resizes weights, "grow" or "interpolate" (mixer/models/resize.py).
      say: prints a line with the weights and the preprocessing at each size.

    Raises:
      UserError: the weights or the data do not support a size; raised before any evaluation.
    """
    sizes = sorted(set(sizes))
    splits = {}
    for subject in subjects:
        height, width = subject.stored.card.image_size
        if height != width:
            raise UserError(
                f"--weights={subject.name} takes {height} x {width} images; expected square images"
            )
        for size in sizes:
            check_image_size((size, size), subject.stored.card.patch_size)
            load.resize_card(subject.stored, (size, size), resize)
            splits[subject.path, size] = _open_split(subject, split_name, size)
    sweep_curves = []
    for subject in subjects:
        points = []
        for size in sizes:
            split, preprocess = splits[subject.path, size]
            loaded = load.read_stored(
                subject.stored,
                image_size=size,
                resize=resize,
                mesh=subject.batching.mesh,
                log=lambda line: None,
            )
            say(f"{subject.name} at {size} px: {preprocess}")
            result = classification.evaluate_model(
                loaded.model,
                loaded.params,
                split,
                loss=subject.loss,
                batching=subject.batching,
            )
            points.append(_point(size, [result], preprocess))
        sweep_curves.append(Curve(subject.name, "", split.name, tuple(points)))
    return Sweep("resolution", resize, tuple(sweep_curves))


def permutation(
    subjects: Sequence[Subject],
    shares: Sequence[float],
    *,
    split_name: str,
    say: Callable[[str], None],
) -> Sweep:
    """Evaluates each checkpoint on images with a share of their patches or pixels shuffled.

    Pixels within a shuffled patch keep their order. The accuracy for a share is the mean over the
    permutations of SEEDS, each the same for all images; share 0 is the ordinary evaluation.

    Args:
      subjects: the weights.
      shares: in 0..1.
      split_name: the split of their configs, "train", "val" or "test".
      say: prints a line with the weights and their preprocessing.

    Raises:
      UserError: a share is outside 0..1, or the data is missing or has other classes.
    """
    shares = sorted(set(shares))
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"--shares: {share:g}; expected shares of the patches, from 0 to 1")
    splits = [
        _open_split(subject, split_name, shorten(subject.stored.card.image_size))
        for subject in subjects
    ]
    sweep_curves = []
    for subject, (split, preprocess) in zip(subjects, splits, strict=True):
        say(f"{subject.name}: {preprocess}")
        for kind, results in _shuffled_results(subject, split, shares).items():
            points = (_point(x, rs, preprocess) for x, rs in zip(shares, results, strict=True))
            sweep_curves.append(Curve(subject.name, kind, split.name, tuple(points)))
    return Sweep("permutation", "", tuple(sweep_curves))


def _shuffled_results(
    subject: Subject, split: Split, shares: Sequence[float]
) -> dict[str, list[list[classification.Classification]]]:
    """Returns the results by kind and share, one per permutation, and only one for share 0."""
    mesh = subject.batching.mesh
    loaded = load.read_stored(subject.stored, mesh=mesh, log=lambda line: None)
    size = loaded.card.image_size
    predict_logits = make_predict(loaded.model, mesh)

    def predict(params_and_order: tuple[Any, jax.Array], images: jax.Array) -> jax.Array:
        params, order = params_and_order
        pixels = images.reshape(images.shape[0], -1, images.shape[-1])
        return predict_logits(params, pixels[:, order].reshape(images.shape))

    # Pass the order as an argument, so that all permutations share one compiled program.
    step = classification.make_eval_step(
        predict, losses.make_loss(subject.loss), loaded.card.num_classes
    )

    def result(kind: str, share: float, seed: int) -> classification.Classification:
        if kind == "pixels":
            order = orders.pixel_order(size, seed=seed, share=share)
        else:
            patch_size = loaded.card.patch_size
            order = orders.patch_order(
                size, patch_size, seed=seed, share=share, shuffle_within=False
            )
        return classification.evaluate(
            step, (loaded.params, order), split, batching=subject.batching
        )

    return {
        kind: [
            [result(kind, share, seed) for seed in (SEEDS if share else SEEDS[:1])]
            for share in shares
        ]
        for kind in orders.KINDS
    }


def _open_split(subject: Subject, split_name: str, size: Size) -> tuple[Split, str]:
    """Opens a split with images of this size; returns it and its preprocessing."""
    config = subject.config.copy_and_resolve_references()
    preprocess = preprocess_at(config.dataset.eval_preprocess, shorten(config.image_size), size)
    config.image_size = size
    config.dataset.eval_preprocess = preprocess
    card = subject.stored.card
    config.model.num_classes = card.num_classes
    split = run_data.open_own_split(config, split_name, subject.class_names, subject.data_record())
    if split is None:
        raise UserError(f"dataset.{split_name}_split is empty in the config of {subject.name}")
    try:
        suites.check_classes(split, card.class_names, card.num_classes)
    except UserError as error:
        raise UserError(f"{subject.name}: {error}") from None
    return split, preprocess


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
    """Returns the 95 % interval of the mean accuracy on `count` images over the permutations.

    Images and permutations are both random samples, so the squares of their half-widths, Wilson's
    and Student's, add up. With one permutation the result is Wilson's interval.
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


def make_table(sweep: Sweep) -> Table:
    """Makes a table with a row per point; the first row of each curve has its label."""
    is_permutation = sweep.kind == "permutation"
    header = ["weights", "share" if is_permutation else "pixels", "top-1", "95 % interval"]
    header += ["lowest to highest"] * is_permutation + ["loss"]
    rows = []
    for curve in sweep.curves:
        label = curve.label
        for point in curve.points:
            row = [label, f"{point.x:g}", f"{point.top1:.2%}", span(point.top1_interval)]
            if is_permutation:
                row.append(span((min(point.top1_by_seed), max(point.top1_by_seed))))
            rows.append([*row, f"{point.loss:.4f}"])
            label = ""
    return Table(header, rows)


def draw(sweep: Sweep, path: epath.PathLike) -> None:
    """Draws the curves to a PNG file: means with intervals, and a mark for each permutation."""
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
        color = f"C{checkpoints.index(curve.weights)}"  # color by checkpoint, line style by kind
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
    title = {"grow": "weights grown", "interpolate": "weights interpolated", "": ""}[sweep.resize]
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(AXES[sweep.kind])
    axes.set_xticks(xs)
    axes.set_ylabel("top-1, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def output_directory(subjects: Sequence[Subject], output: str | None) -> epath.Path:
    """Creates the directory of the results, before the evaluation.

    Args:
      subjects: the weights.
      output: value of --output; None: the run, if the subjects are one run.

    Raises:
      UserError: no directory is given, or it cannot be created.
    """
    if output is None:
        if len(subjects) > 1 or subjects[0].workdir is None:
            raise UserError("--output is missing; expected a directory for the results")
        output = subjects[0].workdir
    return files.make_directory(output, "--output")


def write(sweep: Sweep, directory: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Writes sweep_<kind>.json and sweep_<kind>.png to a directory and returns their paths."""
    numbers = directory / f"sweep_{sweep.kind}.json"
    picture = directory / f"sweep_{sweep.kind}.png"
    run.write_json(numbers, dataclasses.asdict(sweep))
    draw(sweep, picture)
    return numbers, picture
