"""Few-shot linear probe: ridge regression in closed form on the features of a few images a class.

The protocol is that of the authors' code (big_vision, `evaluators/fewshot_lsr`) [read]: the shots
are drawn by NumPy's generator of the seed, features are standardised by the shots' mean and
deviation, a constant stands for the bias, targets are -1 and 1. Only the images that are drawn are
decoded.

The devices compute the features; the host fits and classifies, in float64: the constant gives the
Gram matrix an eigenvalue of 10,000 for each example, beside which float32 loses the small ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from scipy import linalg, special

from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import features as features_lib
from mixer.evaluation import scores
from mixer.evaluation.evaluator import Result, Setup, parameter_sets
from mixer.evaluation.tables import Table
from mixer.runs import config as run_config

BIAS = 100.0  # the constant feature, so large that its weight is hardly regularised
MIN_DEVIATION = 1e-5  # added to the deviation of each feature
ROWS = 1024  # images that are classified at once: (ROWS, K) float64 scores


@dataclasses.dataclass(frozen=True)
class Shots:
    """Result with one number of shots. Shares are in 0..1.

    Attributes:
      shots: images a class.
      examples: images in all, of each draw.
      short_classes: how many classes have fewer images, all of which were taken.
      accuracies: top-1 of each draw, seed 0 first.
      mean: of them. std: their sample deviation, None of a single draw.
      interval: (low, high) of 95 % for the mean, as `interval` has it.
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
    """Result of the probe.

    Attributes:
      train: name of the split that the shots are from. test: of the one that is classified.
      count: images of `test`. num_classes: K.
      l2: strength of the regularisation.
      results: for each number of shots.
    """

    train: str
    test: str
    count: int
    num_classes: int
    l2: float
    results: tuple[Shots, ...]

    def summary(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return dataclasses.asdict(self)


def make_table(summaries: dict[str, dict[str, Any]]) -> Table:
    """A table of `FewShot.summary()`s by the name of their data."""
    rows = []
    for name, summary in summaries.items():
        for each in summary["results"]:
            low, high = each["interval"]
            short = each["short_classes"]
            images = f"{each['examples']:,}" + (f" ({short:,} classes have fewer)" if short else "")
            rows.append(
                (
                    name,
                    f"{each['shots']}",
                    images,
                    f"{each['mean']:.2%}",
                    f"{low:.2%} to {high:.2%}",
                    "" if each["std"] is None else f"{each['std']:.2%}",
                    ", ".join(f"{accuracy:.2%}" for accuracy in each["accuracies"]),
                )
            )
    header = "few-shot probe", "shots a class", "shots", "top-1", "95 % interval", "deviation"
    return Table((*header, "draws"), rows)


class FewShotEvaluator:
    """The probe after each validation: shots of the training split, tested on the validation split.

    Attributes:
      name: "fewshot".
      key: of the 10-shot accuracy in metrics.jsonl.
    """

    name, key = "fewshot", "fewshot/10shot"

    def __init__(self, dataset: str, train: Split, test: Split, setup: Setup):
        """`train` has the preprocessing of evaluation; results are named by `dataset`."""
        check(train, test)
        self._dataset, self._train, self._test, self._setup = dataset, train, test, setup

    def is_due(self, step: int) -> bool:
        """Whether the probe runs after update `step`."""
        return self._setup.is_due(step)

    def run(
        self, params: Any, ema_params: Any | None, should_stop: Callable[[], bool]
    ) -> list[Result] | None:
        """As `Evaluator.run`."""
        results = []
        for weights, suffix, values in parameter_sets(params, ema_params):
            result = evaluate(
                self._setup.model,
                values,
                self._train,
                self._test,
                mesh=self._setup.mesh,
                global_batch_size=self._setup.global_batch_size,
                prefetch_batches=self._setup.prefetch_batches,
                should_stop=should_stop,
            )
            if result is None:
                return None
            metrics = {f"fewshot{suffix}/{row.shots}shot": row.mean for row in result.results}
            results.append(
                Result(
                    dataset=self._dataset,
                    weights=weights,
                    section="fewshot",
                    name=f"{self._dataset}{suffix}",
                    metrics=metrics,
                    summary=result.summary(),
                    line=", ".join(f"{key}: {value:.2%}" for key, value in metrics.items()),
                )
            )
        return results


def open_evaluator(config: ConfigDict, splits: run_config.Splits, setup: Setup) -> FewShotEvaluator:
    """The probe of a run: `eval_suite=fewshot`."""
    # The images that the shots are drawn from are not augmented.
    train = run_config.open_split(
        config, "train", splits.train.class_names, subfolders=splits.subfolders
    )
    return FewShotEvaluator(run_config.data_name(config), train, splits.val, setup)


def evaluate(
    model: nn.Module,
    params: Any,
    train: Split,
    test: Split,
    *,
    mesh: Mesh,
    global_batch_size: int,
    prefetch_batches: int,
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: int = 3,
    l2: float = 2.0**10,
    should_stop: Callable[[], bool] = lambda: False,
) -> FewShot | None:
    """Classifies `test` by a probe of a few images of `train`; None where `should_stop` ended it.

    Every process of a run on many hosts computes its part and gets the whole result.

    Args:
      model: whose pre_logits are the features.
      params: of the model, on every device of the mesh.
      train: where the shots are drawn from.
      test: all of which is classified.
      mesh: of the devices; the test images' features are split over its axis "data".
      global_batch_size: images a step of the model, over all devices.
      prefetch_batches: batches on their way to the devices.
      shots: images a class; a class that has fewer gives all.
      seeds: how many draws, of seeds 0, 1, ...
      l2: strength of the regularisation, which is not divided by the number of examples.
      should_stop: asked after every batch and every probe.

    Raises:
      UserError: images with several labels, a class without images, other classes in the two
        splits, features that are not finite.
    """
    train_labels, test_labels = check(train, test)
    num_classes = len(train.class_names)
    draws = [draw(train_labels, num_classes, max(shots), seed) for seed in range(seeds)]
    # The images of all draws are read together, each once.
    places = np.unique(np.concatenate([np.concatenate(of_class) for of_class in draws]))
    features = []
    for split in (train.select(places), test):
        split_features = features_lib.collect(
            model,
            params,
            split,
            mesh=mesh,
            global_batch_size=global_batch_size,
            prefetch_batches=prefetch_batches,
            should_stop=should_stop,
        )
        if split_features is None:
            return None
        features.append(split_features)
    shot_features, test_features = features

    results = []
    for number in shots:
        hits = []
        for of_class in draws:
            chosen = np.concatenate([places_of_class[:number] for places_of_class in of_class])
            shot_rows = shot_features[np.searchsorted(places, chosen)]
            probe = fit(shot_rows, train_labels[chosen], l2, num_classes)
            hits.append(probe.classify(test_features) == test_labels)
            if should_stop():
                return None
        results.append(_summarize(number, train_labels, np.stack(hits)))
    return FewShot(train.name, test.name, len(test_labels), num_classes, l2, tuple(results))


def _summarize(shots: int, train_labels: np.ndarray, hits: np.ndarray) -> Shots:
    """The result of one number of shots, from the hits (draws, images)."""
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
    """The labels (n,) of both splits; UserError where they are not fit for a probe."""
    names = train.class_names
    if names != test.class_names:
        raise UserError(
            f"few-shot: {train.name} has {len(names)} classes and {test.name} "
            f"{len(test.class_names)}, or others; they must have the same, in the same order"
        )
    for split in (train, test):
        if split.multi_label:
            raise UserError(
                f"few-shot: {split.name} has several labels an image, or none; it takes one"
            )
    if len(names) < 2:
        raise UserError(f"few-shot: {train.name} has one class, {names[0]}; it takes two or more")
    labels = train.labels()
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(empty):
        raise UserError(
            f"few-shot: {train.name} has no image of {len(empty):,} of {len(names):,} classes, "
            f"the first of them {names[empty[0]]}; it takes one or more of each"
        )
    return labels, test.labels()


def draw(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> list[np.ndarray]:
    """Places of `shots` random images of each class, or of all that it has: K arrays.

    Their first n are a draw of n shots, so that one draw serves every number of shots.
    """
    rng = np.random.default_rng(seed)
    by_class = np.split(
        np.argsort(labels, kind="stable"),
        np.cumsum(np.bincount(labels, minlength=num_classes))[:-1],
    )
    return [rng.permutation(places)[:shots] for places in by_class]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier on standardised features.

    Attributes:
      mean, deviation: (C,) of the shots.
      weights: (C + 1, K), the last row for the constant feature.
    """

    mean: np.ndarray
    deviation: np.ndarray
    weights: np.ndarray

    def classify(self, features: np.ndarray) -> np.ndarray:
        """The class (n,) with the highest score of each row of features (n, C)."""
        guesses = [
            np.argmax(self.standardise(features[start : start + ROWS]) @ self.weights, axis=1)
            for start in range(0, len(features), ROWS)
        ]
        return np.concatenate(guesses)

    def standardise(self, features: np.ndarray) -> np.ndarray:
        """Features (n, C), standardised in float64, and the constant feature: (n, C + 1)."""
        scaled = (features.astype(np.float64) - self.mean) / self.deviation
        return np.pad(scaled, ((0, 0), (0, 1)), constant_values=BIAS)


def fit(features: np.ndarray, labels: np.ndarray, l2: float, num_classes: int) -> Probe:
    """Fits the W that minimizes |x W - y|^2 + l2 |W|^2, with targets y of -1 and 1.

    Args:
      features: (n, C), before standardisation.
      labels: (n,) classes.
      l2: strength of the regularisation, above 0.
      num_classes: K.
    """
    exact = features.astype(np.float64)
    mean, deviation = exact.mean(axis=0), exact.std(axis=0) + MIN_DEVIATION
    x = Probe(mean, deviation, np.empty(0)).standardise(features)
    # x^T y from the sums of each class: dense targets of 21,843 classes would take 95 GB.
    sums = np.zeros((num_classes, x.shape[1]))
    np.add.at(sums, labels, x)
    gram = x.T @ x + l2 * np.eye(x.shape[1])
    weights = linalg.solve(gram, (2 * sums - x.sum(axis=0)).T, assume_a="pos")
    return Probe(mean, deviation, weights)


def interval(hits: np.ndarray) -> tuple[float, float]:
    """Interval of 95 % of the mean of `hits` (draws, images), over draws and over images.

    Both are samples, of the shots that might have been drawn and of the images that might have been
    in the test split, and the squares of their two half-widths add up. That of the draws has the
    quantile of Student's distribution, for they are few; of a single draw there is none, and the
    interval is of that draw alone. That of the images has two hits and two misses more, as in
    `scores.mean_interval`.
    """
    draws = len(hits)
    of_image = np.append(hits.mean(axis=0), [0, 0, 1, 1])
    square = scores.Z_95**2 * of_image.var() / len(of_image)
    if draws > 1:
        quantile = special.stdtrit(draws - 1, 0.975)
        square += quantile**2 * hits.mean(axis=1).var(ddof=1) / draws
    mean, half = float(hits.mean()), float(square**0.5)
    return max(mean - half, 0.0), min(mean + half, 1.0)
