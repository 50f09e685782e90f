"""Linear probe on full data: multinomial logistic regression on the frozen features of a split.

With the features x_i (C,), the weights W (C, K) and the bias b (K,) the objective is

  F(W, b) = mean_i -log softmax(x_i W + b)[label_i] + penalty(W),

whose penalty is one of

  "squared": lam / 2 * |W|^2, scikit-learn's LogisticRegression with C = 1 / (lam * n);
  "norm":    lam * |W|, OmniBenchmark's (Zhang et al., 2022, arXiv 2207.07106) [read].

|W| is the Frobenius norm, n the number of training images; the bias is free. `lam` is chosen on a
validation split by top-1 and the test split is classified once, by the weights of that `lam`.

The optimizer is L-BFGS over the whole of the data, on the devices, in float64. Its variables are
those in which F is about as curved in every direction: the features are centred, and W is scaled
along the eigenvectors of their covariance. This changes neither F nor its optimum; where the
eigenvalues span six orders of magnitude it needs 30 iterations in place of thousands.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mixer import formatting, memory
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import features as features_lib
from mixer.evaluation import scores
from mixer.evaluation.evaluator import Result, Setup, parameter_sets
from mixer.models.mlp_mixer import MlpMixer
from mixer.parallel import sharding
from mixer.runs import config as run_config

Splits = tuple[Split, Split, Split]  # to fit on, to choose lam on, to report

LAMBDAS = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1, 1.0)  # OmniBenchmark's [read]
# The gradient of F is the sum of the data's and the penalty's, which cancel at the optimum. A fit
# has converged when what is left is at most this share of the penalty's. F then lies within about
# TOLERANCE**2 times the penalty of its optimum.
TOLERANCE = 1e-3
MAX_ITERATIONS = 5000
ITERATIONS_AT_ONCE = 100  # then the variables are scaled anew, and `should_stop` is asked
CHUNK_VALUES = 1 << 22  # features or logits of a chunk on a device, 32 MiB as float64
HELD_OUT = 10  # one of so many training images is held out where there is no validation split


@dataclasses.dataclass(frozen=True)
class Fit:
    """The probe of one `lam`.

    Attributes:
      lam: strength of the penalty.
      weights: (C, K) float64. bias: (K,) float64.
      objective: F.
      residual: the norm of F's gradient divided by that of the penalty's gradient; 0 where the
        weights are 0 because the penalty outweighs every gradient of the data.
      iterations: of L-BFGS.
    """

    lam: float
    weights: np.ndarray
    bias: np.ndarray
    objective: float
    residual: float
    iterations: int

    @property
    def converged(self) -> bool:
        """Whether the optimality condition holds to TOLERANCE."""
        return self.residual <= TOLERANCE


@dataclasses.dataclass(frozen=True)
class Probed:
    """Result of the probe. Shares are in 0..1, intervals (low, high) of 95 %.

    Attributes:
      train, validation, test: names of the splits.
      train_count, validation_count, count: images of them.
      num_classes: K. untrained_classes: how many of them have no training image; images of these
        are misses.
      penalty: "squared" or "norm".
      lam: the chosen one. on_edge: whether it is the smallest or largest of the list.
      top1, top1_interval: share of the test images.
      mean_per_class, mean_per_class_interval: mean over the test split's classes of the top-1.
      path: for each `lam` its validation top-1, iterations, residual and whether it converged.
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
        """All of it, as JSON has it."""
        return dataclasses.asdict(self)


# The optimizer.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "features",
        "labels",
        "count",
        "mean",
        "eigenvalues",
        "basis",
        "prior",
        "gradient",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Problem:
    """The data of a fit, on the devices, and what of F follows from it alone.

    Attributes:
      features: (M, R, C) float32 in M chunks, whose rows are split over the devices.
      labels: (M, R) int32; -1 in rows that fill the last chunk up.
      count: () float64, n.
      mean: (C,) of the features.
      eigenvalues, basis: (C,) and (C, C) of the features' covariance.
      prior: (K,) logarithms of the classes' shares, the best bias where W = 0.
      gradient: (C, K) of the data term at W = 0 and that bias.
    """

    features: jax.Array
    labels: jax.Array
    count: jax.Array
    mean: jax.Array
    eigenvalues: jax.Array
    basis: jax.Array
    prior: jax.Array
    gradient: jax.Array


def _lay_out(array: np.ndarray, mesh: Mesh, *, width: int, fill: int) -> jax.Array:
    """Rows (n, ...) in chunks (M, R, ...) whose rows are split over the mesh."""
    shards = sharding.batch_shards(mesh)
    rows = min(max(CHUNK_VALUES // width, 1), -(-len(array) // shards)) * shards
    chunks = -(-len(array) // rows)
    padding = [(0, chunks * rows - len(array))] + [(0, 0)] * (array.ndim - 1)
    padded = np.pad(array, padding, constant_values=fill)
    where = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    return features_lib.put(padded.reshape(chunks, rows, *array.shape[1:]), where)


def _sum_over_chunks(of_chunk: Callable, features: jax.Array, labels: jax.Array) -> Any:
    """The sum of `of_chunk(features (R, C) float64, labels (R,))` over the chunks.

    What a chunk computes is computed anew for its gradient, and not kept.
    """

    def add(total: Any, chunk: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        x, labels = chunk
        return jax.tree.map(jnp.add, total, of_chunk(x.astype(jnp.float64), labels)), None

    shapes = jax.eval_shape(of_chunk, features[0].astype(jnp.float64), labels[0])
    zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes)
    return jax.lax.scan(jax.checkpoint(add), zeros, (features, labels))[0]


def _data_term(
    features: jax.Array, labels: jax.Array, count: jax.Array, weights: jax.Array, bias: jax.Array
) -> jax.Array:
    """The mean cross-entropy of `features @ weights + bias`."""

    def of_chunk(x: jax.Array, labels: jax.Array) -> jax.Array:
        logits = x @ weights + bias
        of_label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(labels >= 0, jax.nn.logsumexp(logits, axis=1) - of_label, 0.0))

    return _sum_over_chunks(of_chunk, features, labels) / count


def _softmax_curvature(
    features: jax.Array, labels: jax.Array, count: jax.Array, weights: jax.Array, bias: jax.Array
) -> jax.Array:
    """The mean eigenvalue of the cross-entropy's second derivative in the K - 1 free logits."""

    def of_chunk(x: jax.Array, labels: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(x @ weights + bias)
        return jnp.sum(jnp.where(labels >= 0, 1 - jnp.sum(probabilities**2, axis=1), 0.0))

    return _sum_over_chunks(of_chunk, features, labels) / count / (bias.shape[0] - 1)


def _analyse(features: jax.Array, labels: jax.Array, num_classes: int) -> dict[str, jax.Array]:
    """What `_Problem` holds besides features (M, R, C) and labels (M, R)."""

    def sums(x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = (labels >= 0).astype(jnp.float64)
        return there @ x, there @ jax.nn.one_hot(labels, num_classes, dtype=jnp.float64)

    total, class_counts = _sum_over_chunks(sums, features, labels)
    count = jnp.sum(class_counts)
    mean, prior = total / count, jnp.log(class_counts / count)

    def products(x: jax.Array, labels: jax.Array) -> jax.Array:
        centred = jnp.where((labels >= 0)[:, None], x - mean, 0.0)
        return centred.T @ centred

    eigenvalues, basis = jnp.linalg.eigh(_sum_over_chunks(products, features, labels) / count)
    zero = jnp.zeros((features.shape[-1], num_classes))
    gradient = jax.grad(_data_term, argnums=3)(features, labels, count, zero, prior)
    return {
        "count": count,
        "mean": mean,
        "eigenvalues": jnp.maximum(eigenvalues, 0.0),
        "basis": basis,
        "prior": prior,
        "gradient": gradient,
    }


def _optimize(
    problem: _Problem, lam: jax.Array, weights: jax.Array, bias: jax.Array, *, penalty: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One to ITERATIONS_AT_ONCE iterations of L-BFGS.

    Args:
      problem: the data.
      lam: () strength of the penalty.
      weights: (C, K) to start from, not 0 where the penalty is "norm".
      bias: (K,) of centred features.
      penalty: "squared" or "norm".

    Returns:
      Weights, bias, F, the relative residual as of `Fit`, and the number of iterations.
    """
    data = (problem.features, problem.labels, problem.count)
    # F's curvature along eigenvector j is about eigenvalue j times that of the softmax, and the
    # penalty's. That of the softmax shrinks as its probabilities near 0 and 1.
    softmax = _softmax_curvature(*data, weights, bias - problem.mean @ weights)
    curvature = lam if penalty == "squared" else lam / jnp.linalg.norm(weights)
    scale = 1 / jnp.sqrt(softmax * problem.eigenvalues + curvature)[:, None]
    bias_scale = 1 / jnp.sqrt(softmax)

    def unpack(variables: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return problem.basis @ (scale * variables[0]), bias_scale * variables[1]

    def objective(variables: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, bias = unpack(variables)
        value = _data_term(*data, weights, bias - problem.mean @ weights)
        if penalty == "squared":
            return value + lam / 2 * jnp.sum(weights**2)
        return value + lam * jnp.linalg.norm(weights)

    def residual(variables: tuple[jax.Array, jax.Array], gradient: tuple) -> jax.Array:
        of_penalty = lam * (jnp.linalg.norm(unpack(variables)[0]) if penalty == "squared" else 1.0)
        of_weights, of_bias = gradient[0] / scale, gradient[1] / bias_scale
        # The bias weighs a feature that is 1 everywhere: as one of the features' mean size.
        size = jnp.mean(problem.eigenvalues)
        return jnp.sqrt(jnp.sum(of_weights**2) + size * jnp.sum(of_bias**2)) / of_penalty

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def iterate(carry: tuple) -> tuple:
        variables, state, _, number = carry
        value, gradient = value_and_grad(variables, state=state)
        updates, state = solver.update(
            gradient, state, variables, value=value, grad=gradient, value_fn=objective
        )
        variables = optax.apply_updates(variables, updates)
        return variables, state, residual(variables, optax.tree.get(state, "grad")), number + 1

    def goes_on(carry: tuple) -> jax.Array:
        return (carry[2] > TOLERANCE) & (carry[3] < ITERATIONS_AT_ONCE)

    variables = (problem.basis.T @ weights / scale, bias / bias_scale)
    variables, state, left, number = jax.lax.while_loop(
        goes_on, iterate, (variables, solver.init(variables), jnp.inf, 0)
    )
    return *unpack(variables), optax.tree.get(state, "value"), left, number


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    mesh: Mesh,
    penalty: str,
    lambdas: Sequence[float] = LAMBDAS,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Fit | None]:
    """Yields the probe of each `lam`, the largest first, each started from the one before.

    Args:
      features: (n, C) float32, on every process.
      labels: (n,) int32; every class has one or more.
      num_classes: K, 2 or more.
      mesh: of the devices over which the rows are split.
      penalty: "squared" or "norm".
      lambdas: strengths of the penalty, above 0.
      should_stop: asked every ITERATIONS_AT_ONCE iterations; once it answers yes, None is yielded
        last.
    """
    width, everywhere = max(features.shape[1], num_classes), sharding.replicated(mesh)
    analyse = jax.jit(_analyse, static_argnums=2, out_shardings=everywhere)
    optimize = jax.jit(_optimize, static_argnames="penalty", out_shardings=everywhere)
    with jax.enable_x64(True):
        rows = (
            _lay_out(features.astype(np.float32), mesh, width=width, fill=0),
            _lay_out(labels.astype(np.int32), mesh, width=width, fill=-1),
        )
        problem = _Problem(*rows, **analyse(*rows, num_classes))
        steepest = float(jnp.linalg.norm(problem.gradient))
        weights, bias = jnp.zeros_like(problem.gradient), problem.prior
    for lam in sorted(lambdas, reverse=True):
        # W = 0 is the optimum where no direction gains more than the slope of the norm takes.
        if steepest == 0 or (penalty == "norm" and steepest <= lam):
            prior = np.asarray(problem.prior)
            yield Fit(lam, np.asarray(weights), prior, -np.sum(np.exp(prior) * prior), 0.0, 0)
            continue
        iterations, residual = 0, np.inf
        while residual > TOLERANCE and iterations < MAX_ITERATIONS:
            if should_stop():
                yield None
                return
            with jax.enable_x64(True):
                if penalty == "norm" and not weights.any():
                    # The norm has no gradient at 0: a step of proximal gradient descent, whose
                    # length is right for the data term's largest curvature, leaves it.
                    length = 2 / problem.eigenvalues[-1]
                    weights = -length * (1 - lam / steepest) * problem.gradient
                weights, bias, value, left, number = optimize(
                    problem, lam, weights, bias, penalty=penalty
                )
                offset = bias - problem.mean @ weights
            residual, iterations = float(left), iterations + int(number)
        yield Fit(lam, np.asarray(weights), np.asarray(offset), float(value), residual, iterations)


# The probe.


def hold_out(train: Split) -> tuple[Split, Split]:
    """A training and a validation split: a tenth of each class's images, drawn by seed 0.

    Of a class that has two images or more it is one at least.

    Raises:
      UserError: no class has two images.
    """
    labels = train.labels()
    rng, held_out = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        if len(places) > 1:
            held_out[places[: max(len(places) // HELD_OUT, 1)]] = True
    if not held_out.any():
        raise UserError(
            f"linear probe: {train.name} has one image of each class; expected two or more, to "
            "choose lam on some"
        )
    return train.select(np.flatnonzero(~held_out)), train.select(np.flatnonzero(held_out))


def assign(train: Split, validation: Split | None, test: Split | None) -> Splits:
    """The splits to fit on, to choose lam on and to report.

    Without a test split the validation split is reported; without another, lam is chosen on a
    tenth of the training split, which is then not fitted on.

    Raises:
      UserError: neither, other classes in one of them, several labels an image, one class.
    """
    if test is None:
        validation, test = None, validation
    if test is None:
        raise UserError("the linear probe needs dataset.test_split or dataset.val_split")
    for split in (train, validation or test, test):
        if split.multi_label:
            raise UserError(
                f"linear probe: {split.name} has several labels an image, or none; expected one"
            )
        if split.class_names != train.class_names:
            raise UserError(
                f"linear probe: {train.name} has {len(train.class_names)} classes and {split.name} "
                f"{len(split.class_names)}, or others; expected the same, in the same order"
            )
    if len(np.unique(train.labels())) < 2:
        raise UserError(f"linear probe: {train.name} has images of one class; expected two or more")
    if validation is None:
        train, validation = hold_out(train)
    return train, validation, test


def _guess(features: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """The class (M, R) int32 of the highest logit of features (M, R, C)."""

    def of_chunk(x: jax.Array) -> jax.Array:
        return jnp.argmax(x.astype(jnp.float64) @ weights + bias, axis=-1).astype(jnp.int32)

    return jax.lax.map(of_chunk, features)


def _make_classify(features: np.ndarray, num_classes: int, mesh: Mesh) -> Callable:
    """Returns `Fit -> classes (n,)` of the n `features`, which are laid on the devices once."""
    width = max(features.shape[1], num_classes)
    chunks = _lay_out(features.astype(np.float32), mesh, width=width, fill=0)
    guess = jax.jit(_guess, out_shardings=sharding.replicated(mesh))

    def classify(fitted: Fit) -> np.ndarray:
        with jax.enable_x64(True):
            guesses = guess(chunks, fitted.weights, fitted.bias)
        return np.asarray(guesses).reshape(-1)[: len(features)]

    return classify


def evaluate(
    model: MlpMixer,
    params: Any,
    splits: Splits,
    *,
    penalty: str,
    mesh: Mesh,
    global_batch_size: int,
    prefetch_batches: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Probed | None:
    """Fits, chooses lam and classifies the test split; None where `should_stop` ended it.

    Every process of a run on many hosts computes its part and gets the whole result.

    Args:
      model: whose pre_logits are the features.
      params: of the model, on every device of the mesh.
      splits: to fit on, to choose lam on and to report, as `assign` gives them.
      penalty: "squared" or "norm".
      mesh: of the devices, over which the images and their features are split.
      global_batch_size: images a step of the model, over all devices.
      prefetch_batches: batches on their way to the devices.
      should_stop: asked after every batch and every ITERATIONS_AT_ONCE iterations.

    Raises:
      UserError: features that are not finite.
      NoRoomError: the features do not fit into memory.
    """
    images = sum(split.num_examples for split in splits)
    what = f"the linear probe's features of {images:,} images"
    memory.check_room(2 * 4 * model.hidden_dim * images, what, on_host=True)
    features = []
    for split in splits:
        collected = features_lib.collect(
            model,
            params,
            split,
            mesh=mesh,
            global_batch_size=global_batch_size,
            prefetch_batches=prefetch_batches,
            should_stop=should_stop,
        )
        if collected is None:
            return None
        features.append(collected)
    labels = [split.labels() for split in splits]
    classes, trained = np.unique(labels[0], return_inverse=True)  # those that can be fitted
    classify_validation, classify_test = (
        _make_classify(each, len(classes), mesh) for each in features[1:]
    )
    best, best_top1, path = None, -1.0, []
    for fitted in fit(
        features[0], trained, len(classes), mesh=mesh, penalty=penalty, should_stop=should_stop
    ):
        if fitted is None:
            return None
        top1 = float(np.mean(classes[classify_validation(fitted)] == labels[1]))
        if top1 > best_top1:  # of equal ones the stronger penalty
            best, best_top1 = fitted, top1
        path.append(
            {
                "lam": fitted.lam,
                "validation_top1": top1,
                "iterations": fitted.iterations,
                "residual": fitted.residual,
                "converged": fitted.converged,
            }
        )
    return _report(splits, labels, classes[classify_test(best)], len(classes), penalty, best, path)


def _report(
    splits: Splits,
    labels: list[np.ndarray],
    guesses: np.ndarray,
    trained_classes: int,
    penalty: str,
    best: Fit,
    path: list[dict[str, Any]],
) -> Probed:
    """The figures of the guesses (n,) for the test split."""
    train, validation, test = splits
    num_classes, hit = len(test.class_names), guesses == labels[2]
    hits, counts = scores.per_class(labels[2], hit, num_classes)
    there = counts > 0
    shares = hits[there] / counts[there]
    return Probed(
        train=train.name,
        validation=validation.name,
        test=test.name,
        train_count=train.num_examples,
        validation_count=validation.num_examples,
        count=test.num_examples,
        num_classes=num_classes,
        untrained_classes=num_classes - trained_classes,
        penalty=penalty,
        lam=best.lam,
        on_edge=best.lam in (min(LAMBDAS), max(LAMBDAS)),
        top1=float(hit.mean()),
        top1_interval=scores.interval(int(hit.sum()), len(hit)),
        mean_per_class=float(shares.mean()),
        mean_per_class_interval=scores.mean_interval(shares, counts[there]),
        path=tuple(path),
    )


class LinearProbe:
    """The probe after each validation: fitted on the training split, reported on the validation's.

    lam is chosen on a tenth of the training split. The penalty is the squared one.

    Attributes:
      name: "linear_probe".
      key: of the accuracy in metrics.jsonl.
    """

    name, key = "linear_probe", "linear_probe/top1"

    def __init__(self, dataset: str, splits: Splits, setup: Setup):
        """`splits` are as `assign` gives them; results are named by `dataset`."""
        self._dataset, self._splits, self._setup = dataset, splits, setup

    def is_due(self, step: int) -> bool:
        """Whether the probe runs after update `step`."""
        return self._setup.is_due(step)

    def run(
        self, params: Any, ema_params: Any | None, should_stop: Callable[[], bool]
    ) -> list[Result] | None:
        """As `Evaluator.run`."""
        results = []
        for weights, suffix, values in parameter_sets(params, ema_params):
            probed = evaluate(
                self._setup.model,
                values,
                self._splits,
                penalty="squared",
                mesh=self._setup.mesh,
                global_batch_size=self._setup.global_batch_size,
                prefetch_batches=self._setup.prefetch_batches,
                should_stop=should_stop,
            )
            if probed is None:
                return None
            summary = probed.summary()
            results.append(
                Result(
                    dataset=self._dataset,
                    weights=weights,
                    section=self.name,
                    name=f"{self._dataset}{suffix}",
                    metrics={
                        f"{self.name}{suffix}/{key}": summary[key]
                        for key in ("top1", "mean_per_class", "lam")
                    },
                    summary=summary,
                    line=f"linear probe{suffix}: {sentence(summary)}",
                )
            )
        return results


def open_evaluator(config: ConfigDict, splits: run_config.Splits, setup: Setup) -> LinearProbe:
    """The probe of a run: `eval_suite=linear_probe`. The test split is not looked at."""
    # The images that the probe is fitted on are not augmented.
    train = run_config.open_split(
        config, "train", splits.train.class_names, subfolders=splits.subfolders
    )
    return LinearProbe(run_config.data_name(config), assign(train, None, splits.val), setup)


def open_splits(config: ConfigDict) -> Splits:
    """The splits of a config's data for the probe of finished weights, as of `assign`."""
    return assign(*(run_config.open_split(config, name, None) for name in ("train", "val", "test")))


# The report, from `Probed.summary()` as results.json has it.


def sentence(summary: Mapping[str, Any]) -> str:
    """What came of a probe."""
    low, high = summary["top1_interval"]
    figures = (
        f"top-1 {summary['top1']:.2%} ({low:.2%} to {high:.2%}) of {summary['count']:,} images",
        f"mean per class {summary['mean_per_class']:.2%}",
        f"lam {summary['lam']:g}",
    )
    return ", ".join([*figures, *remarks(summary)])


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of a probe's figures should know."""
    found = []
    if summary["on_edge"]:
        found.append("at an end of lam's list")
    if failed := [f"{each['lam']:g}" for each in summary["path"] if not each["converged"]]:
        found.append(f"not converged with lam {', '.join(failed)}")
    if count := summary["untrained_classes"]:
        found.append(f"{count:,} of {summary['num_classes']:,} classes without a training image")
    return found


def table(
    summaries: Mapping[str, Mapping[str, Any]], title: str = "linear probe"
) -> list[tuple[str, ...]]:
    """The cells of a table, its header first: a row per probe."""
    columns = ("test images", "top-1", "95 % interval", "per class", "lam", "lam chosen on")
    rows = [(title, *columns)]
    for name, summary in summaries.items():
        low, high = summary["top1_interval"]
        figures = f"{summary['top1']:.2%}", f"{low:.2%} to {high:.2%}"
        per_class, lam = f"{summary['mean_per_class']:.2%}", f"{summary['lam']:g}"
        images = f"{summary['validation_count']:,} images"
        rows.append((name, f"{summary['count']:,}", *figures, per_class, lam, images))
    return rows


def notes(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line per probe on its data and what a reader should know."""
    return [
        "; ".join(
            [
                f"{name}: fitted on {summary['train_count']:,} images of {summary['train']}",
                *remarks(summary),
            ]
        )
        for name, summary in summaries.items()
    ]


def lines(rows: Sequence[Sequence[str]], texts: Sequence[str]) -> list[str]:
    """The lines of a table and of the notes below it, in Markdown."""
    header, *others = (f"| {' | '.join(map(formatting.in_markdown, row))} |" for row in rows)
    rule = "|---" * len(rows[0]) + "|"
    return [header, rule, *others, "", *(f"{formatting.in_markdown(each)}.  " for each in texts)]


def markdown(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of the table of probes by the name of their data."""
    return lines(table(summaries), notes(summaries))
