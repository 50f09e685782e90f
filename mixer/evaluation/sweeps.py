"""Accuracy of given weights over the image size, and over the share of shuffled patches or pixels.

The paper trains under permutations (docs/probes.md). A sweep trains nothing: the images of the
evaluation change.
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
from mixer.data.preprocessing.spec import Kind, Specification, parse
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import classification, scores, suites
from mixer.evaluation.subject import Subject
from mixer.evaluation.tables import Table, span
from mixer.models.modules import check_image_size
from mixer.runs import config as run
from mixer.runs import curves
from mixer.training import losses
from mixer.training.step import make_predict
from mixer.weights import load

SCALED = ("resize", "resize_small", "central_crop")  # ops whose size follows the images' side
SEEDS = (0, 1, 2)  # of the permutations at each share
AXES = {"resolution": "side of the images, pixels", "permutation": "share that is shuffled"}


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a curve. Shares are in 0..1.

    Attributes:
      x: side of the images in pixels, or the share that is shuffled.
      count: number of labelled images.
      top1: share of them; of several permutations, the mean.
      top1_interval: `interval` of it.
      top1_by_seed: top-1 under each permutation.
      loss: mean over the images, and over the permutations.
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
    """Points of one checkpoint in ascending x. `shuffled` is "patches", "pixels" or ""."""

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
    """Curves over the same x; `kind` is a key of AXES, `resize` that of a resolution sweep."""

    kind: str
    resize: str
    curves: tuple[Curve, ...]

    def summary(self) -> dict[str, Any]:
        """The sweep as JSON."""
        return dataclasses.asdict(self)


def check_subject(subject: Subject) -> None:
    """Raises UserError unless the weights are for square images, have a head, and have data."""
    card = subject.found.card
    height, width = card.image_size
    if height != width:
        raise UserError(
            f"--weights={subject.name} is for images of {height} x {width}; expected square ones"
        )
    if not card.num_classes:
        raise UserError(f"--weights={subject.name} has no head, and so no accuracy")
    if subject.config is None:
        raise UserError(
            f"--weights={subject.name} is no run, whose data would be taken; give --config=CONFIG"
        )


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
    spec = parse(preprocess)
    if spec.of_kind(Kind.PERMUTATION):
        raise UserError(
            f"{preprocess!r} permutes images of {old} x {old}: there is no permutation of "
            f"{new} x {new} that the weights have seen"
        )
    sized = [call for call in spec.calls if call.op.name in SCALED]
    if not sized:
        return str(spec.with_image_op(f"resize({new}, antialias=True)"))
    calls = [
        call.replace("size", _scaled(call.arguments["size"], new / old)) if call in sized else call
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
    which: str,
    resize: str,
    say: Callable[[str], None],
) -> Sweep:
    """Evaluates each checkpoint on images of each size.

    Args:
      subjects: the weights.
      sizes: sides in pixels.
      which: the split of their configs, "train", "val" or "test".
      resize: how weights come to another size, "grow" or "interpolate" (mixer/models/resize.py).
      say: prints a line about the weights and the steps at each size.

    Raises:
      UserError: a size that the weights, or the data, cannot have; nothing is computed then.
    """
    sizes = sorted(set(sizes))
    opened = {}
    for subject in subjects:
        for size in sizes:
            check_image_size((size, size), subject.found.card.patch_size)
            load.resize_card(subject.found, (size, size), resize)
            opened[subject.path, size] = _open_split(subject, which, size)
    drawn = []
    for subject in subjects:
        points = []
        for size in sizes:
            split, preprocess = opened[subject.path, size]
            loaded = load.read_stored(
                subject.found,
                image_size=size,
                resize=resize,
                mesh=subject.mesh,
                log=lambda line: None,
            )
            say(f"{subject.name} at {size} px: {preprocess}")
            result = classification.evaluate_model(
                loaded.model,
                loaded.params,
                split,
                loss=subject.loss,
                mesh=subject.mesh,
                global_batch_size=subject.batch_size,
                prefetch_batches=subject.prefetch_batches,
            )
            points.append(_point(size, [result], preprocess))
        drawn.append(Curve(subject.name, "", split.name, tuple(points)))
    return Sweep("resolution", resize, tuple(drawn))


def permutation(
    subjects: Sequence[Subject],
    shares: Sequence[float],
    *,
    which: str,
    say: Callable[[str], None],
) -> Sweep:
    """Evaluates each checkpoint on images with a share of their patches, or pixels, shuffled.

    Patches move whole. Each share has the mean over the permutations of SEEDS, each of which is the
    same for all images; the share 0 is the plain evaluation.

    Args:
      subjects: the weights.
      shares: in 0..1.
      which: the split of their configs, "train", "val" or "test".
      say: prints a line about each of the weights and its steps.

    Raises:
      UserError: a share outside 0..1, or data that is missing or not of the weights' classes.
    """
    shares = sorted(set(shares))
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"--shares: {share:g}; expected shares of the patches, from 0 to 1")
    opened = [_open_split(subject, which, subject.found.card.image_size[0]) for subject in subjects]
    drawn = []
    for subject, (split, preprocess) in zip(subjects, opened, strict=True):
        say(f"{subject.name}: {preprocess}")
        for kind, results in _shuffled_results(subject, split, shares).items():
            points = (_point(x, of_x, preprocess) for x, of_x in zip(shares, results, strict=True))
            drawn.append(Curve(subject.name, kind, split.name, tuple(points)))
    return Sweep("permutation", "", tuple(drawn))


def _shuffled_results(
    subject: Subject, split: Split, shares: Sequence[float]
) -> dict[str, list[list[classification.Classification]]]:
    """The results by kind and share, one per permutation; share 0 has one, as nothing moves."""
    loaded = load.read_stored(subject.found, mesh=subject.mesh, log=lambda line: None)
    size = loaded.card.image_size
    plain = make_predict(loaded.model, subject.mesh)

    def predict(params_and_order: tuple[Any, jax.Array], images: jax.Array) -> jax.Array:
        params, order = params_and_order
        pixels = images.reshape(images.shape[0], -1, images.shape[-1])
        return plain(params, pixels[:, order].reshape(images.shape))

    # The order is an argument, so that all permutations run the same program.
    step = classification.make_eval_step(
        predict, losses.make_loss(subject.loss), loaded.card.num_classes
    )

    def result(kind: str, share: float, seed: int) -> classification.Classification:
        if kind == "pixels":
            order = orders.pixel_order(size, seed=seed, share=share)
        else:
            patch_size = loaded.card.patch_size
            order = orders.patch_order(size, patch_size, seed=seed, share=share, within=False)
        return classification.evaluate(
            step,
            (loaded.params, order),
            split,
            global_batch_size=subject.batch_size,
            mesh=subject.mesh,
            prefetch_batches=subject.prefetch_batches,
        )

    return {
        kind: [
            [result(kind, share, seed) for seed in (SEEDS if share else SEEDS[:1])]
            for share in shares
        ]
        for kind in orders.KINDS
    }


def _open_split(subject: Subject, which: str, size: int) -> tuple[Split, str]:
    """The split with images of side `size`, and the steps that give that size."""
    config = subject.config.copy_and_resolve_references()
    preprocess = steps_at(config.dataset.eval_preprocess, config.image_size, size)
    config.image_size = size
    config.dataset.eval_preprocess = preprocess
    card = subject.found.card
    config.model.num_classes = card.num_classes
    split = run.open_own_split(config, which, subject.class_names, subject.data_record())
    if split is None:
        raise UserError(f"the config of {subject.name} names no {which}_split")
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
    """Interval of 95 % for the mean accuracy on `count` images under several permutations.

    Images and permutations are both samples, so the squares of two half-widths add up: Wilson's for
    the images and Student's for the permutations. One permutation has Wilson's interval alone.
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
    """A row per point; the first of a curve has the name of the weights."""
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
    """Draws the curves as a PNG: means with their intervals, and a mark for each permutation."""
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
        color = f"C{checkpoints.index(curve.weights)}"  # a checkpoint has a colour, a kind a line
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


def output_directory(subjects: Sequence[Subject], given: str | None) -> epath.Path:
    """Makes the directory of the results, before the long work.

    Args:
      subjects: the weights; the results of one run are in the run unless `given` says otherwise.
      given: --output.

    Raises:
      UserError: no directory is given, or it cannot be made.
    """
    if given is None:
        if len(subjects) > 1 or subjects[0].workdir is None:
            raise UserError("--output is missing: a directory for the picture and the numbers")
        given = subjects[0].workdir
    return files.make_directory(given, "--output")


def write(sweep: Sweep, directory: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Writes sweep_<kind>.json and sweep_<kind>.png into a directory, and returns their paths."""
    numbers = directory / f"sweep_{sweep.kind}.json"
    picture = directory / f"sweep_{sweep.kind}.png"
    run.write_json(numbers, sweep.summary())
    draw(sweep, picture)
    return numbers, picture
