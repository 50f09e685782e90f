"""Linear probe on full data: multinomial logistic regression on the frozen features of a split.

`logistic.py` has the objective and its two penalties. The probe chooses the strength `lam` of the
penalty with the highest top-1 on a validation split, and classifies the test split once, with the
weights for that `lam`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from mixer import memory
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import features as features_lib
from mixer.evaluation import logistic, scores
from mixer.evaluation.evaluator import Batching, Evaluator, Setup
from mixer.evaluation.tables import Table, percent, span

Splits = tuple[Split, Split, Split]  # for the fit, for the choice of lam, for the reported result

LAMBDAS = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1, 1.0)  # the values in OmniBenchmark's code
HELD_OUT_SHARE = 0.1  # share of training images held out if there is no validation split


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """The result of the probe. Accuracies are in 0..1; intervals are (low, high) at 95 %.

    Attributes:
      train, validation, test: names of the splits.
      train_count, validation_count, count: numbers of images of the splits.
      num_classes: number of classes of the data.
      untrained_classes: number of classes without a training image; their test images count as
        errors.
      penalty: "squared" or "norm".
      lam: the chosen strength of the penalty.
      on_edge: whether `lam` is the smallest or the largest of LAMBDAS.
      top1, top1_interval: top-1 accuracy on the test split.
      mean_per_class, mean_per_class_interval: mean of the per-class accuracies on the test split.
      path: for each `lam` the validation top-1, the iterations, the residual and whether the fit
        converged.
    """

    train: str
    validation: str
    test: str
    train_count: int
    validation_count: int
    count: int
    num_classes: int
    untrained_classes: int
    penalty: str
    lam: float
    on_edge: bool
    top1: float
    top1_interval: tuple[float, float]
    mean_per_class: float
    mean_per_class_interval: tuple[float, float]
    path: tuple[dict[str, Any], ...]

    def summary(self) -> dict[str, Any]:
        """All fields as JSON."""
        return dataclasses.asdict(self)


def hold_out(train: Split) -> tuple[Split, Split]:
    """Splits a training split in two; the second part has a tenth of the images of each class.

    At least one image is held out of each class with two or more images. The images are drawn with
    seed 0.

    Raises:
      UserError: no class has two images.
    """
    labels = train.labels()
    rng, is_held_out = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        if len(indices) > 1:
            is_held_out[indices[: max(int(HELD_OUT_SHARE * len(indices)), 1)]] = True
    if not is_held_out.any():
        raise UserError(
            f"linear probe: {train.name} has one image per class; expected at least two, because "
            "one is held out to choose lam"
        )
    return train.select(np.flatnonzero(~is_held_out)), train.select(np.flatnonzero(is_held_out))


def assign(train: Split, validation: Split | None, test: Split | None) -> Splits:
    """Returns the splits for the fit, for the choice of lam and for the reported result.

    Without a test split, the result is reported for the validation split. If no other validation
    split is left, lam is chosen on images held out of the training split.

    Raises:
      UserError: there is neither a validation nor a test split, the classes of the splits differ,
        images have several labels, or all training images have the same class.
    """
    if test is None:
        validation, test = None, validation
    if test is None:
        raise UserError(
            "linear probe: dataset.test_split and dataset.val_split are empty; expected a split in "
            "one of them"
        )
    for split in (train, validation or test, test):
        if split.multi_label:
            raise UserError(
                f"linear probe: {split.name} has several labels per image; expected one"
            )
        if split.class_names != train.class_names:
            raise UserError(
                f"linear probe: {train.name} has {len(train.class_names)} classes and {split.name} "
                f"{len(split.class_names)}; expected the same classes in the same order"
            )
    if len(np.unique(train.labels())) < 2:
        raise UserError(f"linear probe: {train.name} has images of one class; expected two or more")
    if validation is None:
        train, validation = hold_out(train)
    return train, validation, test


def evaluate(
    model: nn.Module,
    params: Any,
    splits: Splits,
    *,
    batching: Batching,
    penalty: str = "squared",
    should_stop: Callable[[], bool] = lambda: False,
) -> ProbeResult | None:
    """Fits the probe for each lam, chooses lam and classifies the test split.

    On several hosts each process computes a part, and all processes return the complete result.

    Args:
      model: the model whose pre_logits are the features.
      params: parameters of the model, on every device of the mesh.
      splits: the splits that `assign` returns.
      batching: the batches of images; the features are sharded over its mesh.
      penalty: "squared" or "norm".
      should_stop: called after every batch and every logistic.ITERATIONS_PER_CALL iterations.

    Returns:
      The result; None if `should_stop` returned True.

    Raises:
      UserError: features are not finite.
      NoRoomError: the features do not fit into memory.
    """
    num_images = sum(split.num_examples for split in splits)
    # Features are in memory twice: as collected, and as chunks for the devices.
    num_bytes = 2 * 4 * model.hidden_dim * num_images
    memory.check_room(num_bytes, f"features of {num_images:,} images", on_host=True)
    labels = [split.labels() for split in splits]
    features = features_lib.collect(
        model, params, splits, batching=batching, should_stop=should_stop
    )
    if features is None:
        return None
    mesh = batching.mesh
    # Leave out classes without a training image; their test images count as errors.
    classes, train_labels = np.unique(labels[0], return_inverse=True)
    fitter = logistic.Fitter(features[0], train_labels, len(classes), mesh=mesh, penalty=penalty)
    classify = logistic.make_classify(features[1], len(classes), mesh)
    best_fit, best_top1, path = None, -1.0, []
    for lam in sorted(LAMBDAS, reverse=True):
        fit = fitter.fit(lam, should_stop)
        if fit is None:
            return None
        top1 = float(np.mean(classes[classify(fit)] == labels[1]))
        if top1 > best_top1:  # on ties the strongest penalty wins
            best_fit, best_top1 = fit, top1
        path.append({"validation_top1": top1, **fit.progress()})
    guesses = classes[logistic.make_classify(features[2], len(classes), mesh)(best_fit)]
    train, validation, test = splits
    hit = guesses == labels[2]
    hits, counts = scores.per_class(labels[2], hit, len(test.class_names))
    mean, mean_interval = scores.mean_per_class(hits, counts)
    return ProbeResult(
        train=train.name,
        validation=validation.name,
        test=test.name,
        train_count=train.num_examples,
        validation_count=validation.num_examples,
        num_classes=len(test.class_names),
        untrained_classes=len(test.class_names) - len(classes),
        penalty=penalty,
        lam=best_fit.lam,
        on_edge=best_fit.lam in (min(LAMBDAS), max(LAMBDAS)),
        path=tuple(path),
        count=len(hit),
        top1=float(hit.mean()),
        top1_interval=scores.interval(int(hit.sum()), len(hit)),
        mean_per_class=mean,
        mean_per_class_interval=mean_interval,
    )


class LinearProbeEvaluator(Evaluator):
    """The linear probe of a run at each validation, with the squared penalty.

    The validation split is reported; lam is chosen on training images that are held out.
    """

    name, key, section = "linear_probe", "linear_probe/top1", "linear_probe"

    def __init__(self, dataset: str, train: Split, test: Split, setup: Setup):
        """Takes a training split with evaluation preprocessing; `dataset` names the results."""
        super().__init__(dataset, setup)
        self._splits = assign(train, None, test)

    def evaluate(self, params: Any, should_stop: Callable[[], bool]) -> ProbeResult | None:
        """Evaluates one set of parameters, as `Evaluator.evaluate` specifies."""
        model, batching = self._setup.model, self._setup.batching
        return evaluate(model, params, self._splits, batching=batching, should_stop=should_stop)

    def metrics(self, result: ProbeResult) -> dict[str, float]:
        """Returns the accuracies and the chosen lam."""
        return {key: getattr(result, key) for key in ("top1", "mean_per_class", "lam")}

    def line(self, result: ProbeResult, suffix: str) -> str:
        """Returns the result as a sentence."""
        return f"linear probe{suffix}: {sentence(result.summary())}"


# The functions below format `ProbeResult.summary()`, as read from results.json.


def sentence(summary: Mapping[str, Any]) -> str:
    """Formats the result of a probe as one line."""
    interval = span(summary["top1_interval"])
    figures = (
        f"top-1 {summary['top1']:.2%} ({interval}) of {summary['count']:,} images",
        f"mean per class {summary['mean_per_class']:.2%}",
        f"lam {summary['lam']:g}",
    )
    return ", ".join([*figures, *remarks(summary)])


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Returns remarks on what limits the result of a probe."""
    texts = []
    if summary["on_edge"]:
        texts.append("lam is the smallest or largest value tried")
    if failures := [f"{point['lam']:g}" for point in summary["path"] if not point["converged"]]:
        texts.append(f"not converged with lam {', '.join(failures)}")
    if count := summary["untrained_classes"]:
        texts.append(f"{count:,} of {summary['num_classes']:,} classes have no training image")
    return texts


def make_table(summaries: Mapping[str, Mapping[str, Any]], title: str = "linear probe") -> Table:
    """Makes a table with a row per probe."""
    rows = [
        (
            name,
            f"{summary['count']:,}",
            percent(summary["top1"]),
            span(summary["top1_interval"]),
            percent(summary["mean_per_class"]),
            f"{summary['lam']:g}",
            f"{summary['validation_count']:,} images",
        )
        for name, summary in summaries.items()
    ]
    columns = ("test images", "top-1", "95 % interval", "per class", "lam", "lam chosen on")
    return Table((title, *columns), rows)


def notes(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line per probe with its training data and remarks."""
    return [
        "; ".join(
            [
                f"{name}: fitted on {summary['train_count']:,} images of {summary['train']}",
                *remarks(summary),
            ]
        )
        for name, summary in summaries.items()
    ]
