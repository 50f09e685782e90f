"""Few-shot linear probe: closed-form ridge regression on the features of a few images per class.

The protocol follows the authors' code (big_vision, `evaluators/fewshot_lsr`): NumPy's
generator draws the shots from the seed, features are standardised by the mean and standard
deviation of the shots, a constant feature replaces the bias, and targets are -1 and 1. Only the
drawn images are decoded.

The devices compute the features; the host fits and classifies in float64: the constant feature adds
10,000 per example to one eigenvalue of the Gram matrix, and float32 would lose the small ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from scipy import linalg, special

from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import features as features_lib
from mixer.evaluation import scores
from mixer.evaluation.evaluator import Batching, Evaluator, Setup
from mixer.evaluation.tables import Table, percent, span

BIAS = 100.0  # the constant feature; it is so large that its weight is hardly regularised
L2 = 2.0**10  # strength of the regularisation, which is not divided by the number of examples
MIN_DEVIATION = 1e-5  # added to the standard deviation of each feature
ROWS = 1024  # images classified at once: (ROWS, K) float64 scores


@dataclasses.dataclass(frozen=True)
class Shots:
    """The result for one number of shots. Accuracies are in 0..1.

    Attributes:
      shots: images per class.
      examples: total number of images in each draw.
      short_classes: number of classes that have fewer images; all of these images are used.
      accuracies: top-1 of each draw, seed 0 first.
      mean: mean of the accuracies.
      std: their sample standard deviation; None for a single draw.
      interval: 95 % confidence interval (low, high) of the mean, from `interval`.
    """

    shots: int
    examples: int
    short_classes: int
    accuracies: tuple[float, ...]
    mean: float
    std: float | None
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class FewShot:
    """The result of the probe.

    Attributes:
      train: name of the split that the shots are drawn from.
      test: name of the split that is classified.
      count: number of images of `test`.
      num_classes: K.
      l2: strength of the regularisation.
      results: the result for each number of shots.
    """

    train: str
    test: str
    count: int
    num_classes: int
    l2: float
    results: tuple[Shots, ...]

    def summary(self) -> dict[str, Any]:
        """All fields as JSON."""
        return dataclasses.asdict(self)


def make_table(summaries: dict[str, dict[str, Any]]) -> Table:
    """Makes a table with a row per data set and number of shots, from `FewShot.summary()`s."""
    rows = []
    for name, summary in summaries.items():
        for result in summary["results"]:
            num_short = result["short_classes"]
            note = f" ({num_short:,} classes have fewer)" if num_short else ""
            rows.append(
                (
                    name,
                    f"{result['shots']}",
                    f"{result['examples']:,}{note}",
                    percent(result["mean"]),
                    span(result["interval"]),
                    percent(result["std"]),
                    ", ".join(f"{accuracy:.2%}" for accuracy in result["accuracies"]),
                )
            )
    header = "few-shot probe", "shots per class", "shots", "top-1", "95 % interval", "std"
    return Table((*header, "draws"), rows)


class FewShotEvaluator(Evaluator):
    """The few-shot probe of a run at each validation, tested on the validation split."""

    name, key, section = "fewshot", "fewshot/10shot", "fewshot"

    def __init__(self, dataset: str, train: Split, test: Split, setup: Setup):
        """Takes a training split with evaluation preprocessing; `dataset` names the results."""
        super().__init__(dataset, setup)
        self._splits = assign(train, None, test)

    def evaluate(self, params: Any, should_stop: Callable[[], bool]) -> FewShot | None:
        """Evaluates one set of parameters, as `Evaluator.evaluate` specifies."""
        model, batching = self._setup.model, self._setup.batching
        return evaluate(model, params, self._splits, batching=batching, should_stop=should_stop)

    def metrics(self, result: FewShot) -> dict[str, float]:
        """Returns the mean accuracy for each number of shots."""
        return {f"{row.shots}shot": row.mean for row in result.results}

    def line(self, result: FewShot, suffix: str) -> str:
        """Returns the metrics by their full key."""
        metrics = self.metrics(result)
        return ", ".join(f"fewshot{suffix}/{key}: {value:.2%}" for key, value in metrics.items())


def assign(train: Split, validation: Split | None, test: Split | None) -> tuple[Split, Split]:
    """Returns the split of the shots and the split that is classified.

    Without a test split, the validation split is classified.

    Raises:
      UserError: there is neither a validation nor a test split, or `check` raises an error.
    """
    test = validation if test is None else test
    if test is None:
        raise UserError(
            "few-shot: dataset.test_split and dataset.val_split are empty; expected a "
            "split in one of them"
        )
    check(train, test)
    return train, test


def evaluate(
    model: nn.Module,
    params: Any,
    splits: tuple[Split, Split],
    *,
    batching: Batching,
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: int = 3,
    should_stop: Callable[[], bool] = lambda: False,
) -> FewShot | None:
    """Classifies a test split with a probe fitted to a few images of a training split.

    On several hosts each process computes a part, and all processes return the complete result.

    Args:
      model: the model whose pre_logits are the features.
      params: parameters of the model, on every device of the mesh.
      splits: the split that the shots are drawn from, and the split that is classified.
      batching: the batches of images.
      shots: numbers of images per class; a class that has fewer images contributes all of them.
      seeds: number of draws, with seeds 0, 1, ...
      should_stop: called after every batch and every probe.

    Returns:
      The result; None if `should_stop` returned True.

    Raises:
      UserError: images have several labels, a class has no images, the classes of the splits
        differ, or features are not finite.
    """
    train, test = splits
    train_labels, test_labels = check(train, test)
    num_classes = len(train.class_names)
    draws = [draw(train_labels, num_classes, max(shots), seed) for seed in range(seeds)]
    # Read the images of all draws together, each image once.
    drawn_indices = np.unique(np.concatenate([np.concatenate(arrays) for arrays in draws]))
    features = features_lib.collect(
        model,
        params,
        (train.select(drawn_indices), test),
        batching=batching,
        should_stop=should_stop,
    )
    if features is None:
        return None
    shot_features, test_features = features
    results = []
    for number in shots:
        hits = []
        for indices_by_class in draws:
            indices = np.concatenate([one_class[:number] for one_class in indices_by_class])
            shot_rows = shot_features[np.searchsorted(drawn_indices, indices)]
            probe = fit(shot_rows, train_labels[indices], L2, num_classes)
            hits.append(probe.classify(test_features) == test_labels)
            if should_stop():
                return None
        results.append(_summarize(number, train_labels, np.stack(hits)))
    return FewShot(train.name, test.name, len(test_labels), num_classes, L2, tuple(results))


def _summarize(shots: int, train_labels: np.ndarray, hits: np.ndarray) -> Shots:
    """Returns the result of one number of shots, from the hits (draws, images)."""
    accuracies, counts = hits.mean(axis=1), np.bincount(train_labels)
    return Shots(
        shots=shots,
        examples=int(np.minimum(counts, shots).sum()),
        short_classes=int(np.sum(counts < shots)),
        accuracies=tuple(accuracies.tolist()),
        mean=float(accuracies.mean()),
        std=float(accuracies.std(ddof=1)) if len(hits) > 1 else None,
        interval=interval(hits),
    )


def check(train: Split, test: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels (n,) of both splits.

    Raises:
      UserError: the classes differ, there are fewer than two, images do not have exactly one label,
        or a class has no training image.
    """
    names = train.class_names
    if names != test.class_names:
        raise UserError(
            f"few-shot: {train.name} has {len(names)} classes and {test.name} has "
            f"{len(test.class_names)}; expected the same classes in the same order"
        )
    for split in (train, test):
        if split.multi_label:
            raise UserError(
                f"few-shot: {split.name} has images with several labels or none; expected one "
                "label per image"
            )
    if len(names) < 2:
        raise UserError(f"few-shot: {train.name} has one class, {names[0]}; expected two or more")
    labels = train.labels()
    empty_classes = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(empty_classes):
        raise UserError(
            f"few-shot: {train.name} has no images of {len(empty_classes):,} of its {len(names):,} "
            f"classes, for example {names[empty_classes[0]]}; expected at least one per class"
        )
    return labels, test.labels()


def draw(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> list[np.ndarray]:
    """Draws `shots` random images of each class and returns their indices as K arrays.

    A class with fewer images contributes all of them. The first n of each array are a draw of n
    shots, so one draw serves every number of shots.
    """
    rng = np.random.default_rng(seed)
    indices_by_class = np.split(
        np.argsort(labels, kind="stable"),
        np.cumsum(np.bincount(labels, minlength=num_classes))[:-1],
    )
    return [rng.permutation(indices)[:shots] for indices in indices_by_class]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier on standardised features.

    Attributes:
      mean, deviation: (C,) mean and standard deviation of the shots' features.
      weights: (C + 1, K); the last row is for the constant feature.
    """

    mean: np.ndarray
    deviation: np.ndarray
    weights: np.ndarray

    def classify(self, features: np.ndarray) -> np.ndarray:
        """Returns the class (n,) with the highest score for each row of features (n, C)."""
        chunks = (features[start : start + ROWS] for start in range(0, len(features), ROWS))
        guesses = [
            np.argmax(_standardise(chunk, self.mean, self.deviation) @ self.weights, axis=1)
            for chunk in chunks
        ]
        return np.concatenate(guesses)


def _standardise(features: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Standardises features (n, C) in float64 and appends the constant feature: (n, C + 1)."""
    scaled = (features.astype(np.float64) - mean) / deviation
    return np.pad(scaled, ((0, 0), (0, 1)), constant_values=BIAS)


def fit(features: np.ndarray, labels: np.ndarray, l2: float, num_classes: int) -> Probe:
    """Fits the W that minimizes |x W - y|^2 + l2 |W|^2, with targets y of -1 and 1.

    Args:
      features: (n, C), before standardisation.
      labels: (n,) classes.
      l2: strength of the regularisation, above 0.
      num_classes: K.
    """
    features64 = features.astype(np.float64)
    mean, deviation = features64.mean(axis=0), features64.std(axis=0) + MIN_DEVIATION
    x = _standardise(features, mean, deviation)
    # Compute x^T y from per-class sums: dense targets of 21,843 classes would take 95 GB.
    sums = np.zeros((num_classes, x.shape[1]))
    np.add.at(sums, labels, x)
    gram = x.T @ x + l2 * np.eye(x.shape[1])
    weights = linalg.solve(gram, (2 * sums - x.sum(axis=0)).T, assume_a="pos")
    return Probe(mean, deviation, weights)


def interval(hits: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % confidence interval of the mean of `hits` (draws, images).

    Both the shots and the test images are random samples, so the squared half-widths of their two
    confidence intervals are added. The draws are few, so their half-width uses a quantile of
    Student's t distribution; with a single draw the interval covers the test images only. The
    half-width for the test images is computed with two extra hits and two extra misses, as in
    `scores.mean_interval`.
    """
    draws = len(hits)
    image_means = np.append(hits.mean(axis=0), [0, 0, 1, 1])
    squared_half_width = scores.Z_95**2 * image_means.var() / len(image_means)
    if draws > 1:
        quantile = special.stdtrit(draws - 1, 0.975)
        squared_half_width += quantile**2 * hits.mean(axis=1).var(ddof=1) / draws
    mean, half_width = float(hits.mean()), float(squared_half_width**0.5)
    return max(mean - half_width, 0.0), min(mean + half_width, 1.0)
