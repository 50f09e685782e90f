"""Linear probe on full data: multinomial logistic regression on the frozen features of a split.

With features x_i (C,), weights W (C, K) and bias b (K,) the objective is

  F(W, b) = mean_i -log softmax(x_i W + b)[label_i] + penalty(W)

over the n training images. |W| is the Frobenius norm, and the penalty is one of

  "squared": lam / 2 * |W|^2, as scikit-learn's LogisticRegression with C = 1 / (lam * n);
  "norm":    lam * |W|, as OmniBenchmark (Zhang et al., 2022, arXiv 2207.07106) [read].

`lam` is the one with the highest top-1 on a validation split; the test split is classified once,
with the weights of that `lam`.

L-BFGS runs on the devices, over all data at once and in float64. Its variables are scaled such that
F has about the same curvature in every direction: the features are centred, and W is scaled along
the eigenvectors of their covariance. This changes neither F nor its optimum. If the eigenvalues
span six orders of magnitude, 30 iterations suffice instead of thousands.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mixer import memory
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import features as features_lib
from mixer.evaluation import scores
from mixer.evaluation.evaluator import Result, Setup, parameter_sets
from mixer.parallel import sharding
from mixer.runs import config as run_config

Splits = tuple[Split, Split, Split]  # to fit on, to choose lam on, to report
Variables = tuple[jax.Array, jax.Array]  # of the optimizer: (C, K) and (K,)

LAMBDAS = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1, 1.0)  # OmniBenchmark's [read]
# At the optimum the gradients of the data and of the penalty cancel. A fit has converged if their
# sum is at most this share of the penalty's gradient; F is then within about TOLERANCE**2 times the
# penalty of its minimum.
TOLERANCE = 1e-3
MAX_ITERATIONS = 5000
ITERATIONS_PER_CALL = 100  # between two calls the variables are scaled again
CHUNK_VALUES = 1 << 22  # features or logits per chunk and device: 32 MiB in float64
HELD_OUT_SHARE = 0.1  # of the training images, if there is no validation split


@dataclasses.dataclass(frozen=True)
class Fit:
    """The probe of one `lam`.

    Attributes:
      lam: strength of the penalty.
      weights: (C, K) float64.
      bias: (K,) float64.
      objective: F.
      residual: the norm of F's gradient, divided by that of the penalty's gradient; 0 if W = 0 is
        the exact optimum.
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

    def progress(self) -> dict[str, Any]:
        """How the optimization went, as JSON has it."""
        names = ("lam", "iterations", "residual", "converged")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Result of the probe. Shares are in 0..1, intervals (low, high) of 95 %.

    Attributes:
      train, validation, test: names of the splits.
      train_count, validation_count, count: their numbers of images.
      num_classes: of the data.
      untrained_classes: how many of them have no training image; test images of these are errors.
      penalty: "squared" or "norm".
      lam: the chosen strength of the penalty.
      on_edge: whether `lam` is the smallest or the largest of LAMBDAS.
      top1, top1_interval: share of the test images.
      mean_per_class, mean_per_class_interval: mean of the top-1 of the test split's classes.
      path: per `lam` its validation top-1, iterations, residual and whether it converged.
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
        """All fields, as JSON has them."""
        return dataclasses.asdict(self)


# The optimizer.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """Features and labels on the devices, in M chunks whose rows are split over the devices.

    Attributes:
      features: (M, R, C) float32.
      labels: (M, R) int32; -1 in the rows that pad the last chunk.
    """

    features: jax.Array
    labels: jax.Array

    def sum(self, function: Callable[[jax.Array, jax.Array], Any]) -> Any:
        """The sum over the chunks of `function(features (R, C) float64, labels (R,))`.

        The gradient recomputes a chunk instead of keeping its logits.
        """

        def add(total: Any, chunk: _Rows) -> tuple[Any, None]:
            value = function(chunk.features.astype(jnp.float64), chunk.labels)
            return jax.tree.map(jnp.add, total, value), None

        chunk = jax.ShapeDtypeStruct(self.features.shape[1:], jnp.float64)
        shapes = jax.eval_shape(function, chunk, self.labels[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(jax.checkpoint(add), zeros, self)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Statistics:
    """What follows from the data alone.

    Attributes:
      count: () float64, the number n of images.
      mean: (C,) of the features.
      eigenvalues: (C,) of the features' covariance, ascending.
      basis: (C, C), its eigenvectors in columns.
      prior: (K,) logarithms of the classes' shares, the best bias at W = 0.
      gradient: (C, K) of the mean cross-entropy at W = 0 and that bias.
    """

    count: jax.Array
    mean: jax.Array
    eigenvalues: jax.Array
    basis: jax.Array
    prior: jax.Array
    gradient: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Objective:
    """F as a function of scaled variables.

    Attributes:
      rows: the data.
      statistics: of the data.
      lam: () strength of the penalty.
      scale: (C, 1) of W along each eigenvector.
      bias_scale: () of the bias of centred features.
      penalty: "squared" or "norm".
    """

    rows: _Rows
    statistics: _Statistics
    lam: jax.Array
    scale: jax.Array
    bias_scale: jax.Array
    penalty: str = dataclasses.field(metadata={"static": True})

    def variables(self, weights: jax.Array, bias: jax.Array) -> Variables:
        """The variables of weights (C, K) and a bias (K,) of centred features."""
        return self.statistics.basis.T @ weights / self.scale, bias / self.bias_scale

    def parameters(self, variables: Variables) -> tuple[jax.Array, jax.Array]:
        """The inverse of `variables`."""
        return self.statistics.basis @ (self.scale * variables[0]), self.bias_scale * variables[1]

    def __call__(self, variables: Variables) -> jax.Array:
        """F."""
        weights, bias = self.parameters(variables)
        bias = bias - self.statistics.mean @ weights
        loss = _cross_entropy(self.rows, weights, bias) / self.statistics.count
        if self.penalty == "squared":
            return loss + self.lam / 2 * jnp.sum(weights**2)
        return loss + self.lam * jnp.linalg.norm(weights)

    def residual(self, variables: Variables, gradient: Variables) -> jax.Array:
        """`Fit.residual` from the gradient for the variables."""
        weights, _ = self.parameters(variables)
        norm = self.lam * (jnp.linalg.norm(weights) if self.penalty == "squared" else 1.0)
        # The bias is the weight of a constant, here of one as large as the features on average.
        size = jnp.mean(self.statistics.eigenvalues)
        squares = jnp.sum((gradient[0] / self.scale) ** 2)
        squares += size * jnp.sum((gradient[1] / self.bias_scale) ** 2)
        return jnp.sqrt(squares) / norm


def _lay_out(array: np.ndarray, mesh: Mesh, *, width: int, padding: int) -> jax.Array:
    """Rows (n, ...) in chunks (M, R, ...) whose rows are split over the mesh."""
    shards = sharding.batch_shards(mesh)
    rows = min(max(CHUNK_VALUES // width, 1), -(-len(array) // shards)) * shards
    chunks = -(-len(array) // rows)
    widths = [(0, chunks * rows - len(array))] + [(0, 0)] * (array.ndim - 1)
    padded = np.pad(array, widths, constant_values=padding)
    where = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    return features_lib.put(padded.reshape(chunks, rows, *array.shape[1:]), where)


def _cross_entropy(rows: _Rows, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """The sum over all images of the softmax cross-entropy of `features @ weights + bias`."""

    def loss(features: jax.Array, labels: jax.Array) -> jax.Array:
        logits = features @ weights + bias
        label_logits = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=1) - label_logits
        return jnp.sum(jnp.where(labels >= 0, losses, 0.0))

    return rows.sum(loss)


def _softmax_curvature(rows: _Rows, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """The sum over all images of the cross-entropy's mean curvature in its K - 1 free logits."""

    def curvature(features: jax.Array, labels: jax.Array) -> jax.Array:
        trace = 1 - jnp.sum(jax.nn.softmax(features @ weights + bias) ** 2, axis=1)
        return jnp.sum(jnp.where(labels >= 0, trace, 0.0)) / (bias.shape[0] - 1)

    return rows.sum(curvature)


def _analyse(rows: _Rows, num_classes: int) -> _Statistics:
    """The statistics of rows that have each of the classes."""

    def sums(features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float64)  # all 0 in padding
        return jnp.sum(one_hot, axis=1) @ features, jnp.sum(one_hot, axis=0)

    feature_sums, class_counts = rows.sum(sums)
    count = jnp.sum(class_counts)
    mean, prior = feature_sums / count, jnp.log(class_counts / count)

    def products(features: jax.Array, labels: jax.Array) -> jax.Array:
        centred = jnp.where((labels >= 0)[:, None], features - mean, 0.0)
        return centred.T @ centred

    eigenvalues, basis = jnp.linalg.eigh(rows.sum(products) / count)
    zero = jnp.zeros((mean.shape[0], num_classes))
    return _Statistics(
        count=count,
        mean=mean,
        eigenvalues=jnp.maximum(eigenvalues, 0.0),
        basis=basis,
        prior=prior,
        gradient=jax.grad(_cross_entropy, argnums=1)(rows, zero, prior) / count,
    )


def _optimize(
    rows: _Rows,
    statistics: _Statistics,
    lam: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
    *,
    penalty: str,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """One to ITERATIONS_PER_CALL iterations of L-BFGS.

    Args:
      rows: the data.
      statistics: of the data.
      lam: () strength of the penalty.
      weights: (C, K) to start from; not 0 if the penalty is "norm".
      bias: (K,) of centred features.
      penalty: "squared" or "norm".

    Returns:
      New weights and bias, and the values of `Fit` by name.
    """
    # Along an eigenvector the curvature of F is about the eigenvalue times the curvature of the
    # softmax, plus that of the penalty. Probabilities near 0 and 1 have little curvature.
    softmax = _softmax_curvature(rows, weights, bias - statistics.mean @ weights) / statistics.count
    curvature = lam if penalty == "squared" else lam / jnp.linalg.norm(weights)
    objective = _Objective(
        rows=rows,
        statistics=statistics,
        lam=lam,
        scale=1 / jnp.sqrt(softmax * statistics.eigenvalues + curvature)[:, None],
        bias_scale=1 / jnp.sqrt(softmax),
        penalty=penalty,
    )
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def iterate(carry: tuple) -> tuple:
        variables, state, _, iterations = carry
        value, gradient = value_and_grad(variables, state=state)
        updates, state = solver.update(
            gradient, state, variables, value=value, grad=gradient, value_fn=objective
        )
        variables = optax.apply_updates(variables, updates)
        residual = objective.residual(variables, optax.tree.get(state, "grad"))
        return variables, state, residual, iterations + 1

    def has_work(carry: tuple) -> jax.Array:
        _, _, residual, iterations = carry
        return (residual > TOLERANCE) & (iterations < ITERATIONS_PER_CALL)

    variables = objective.variables(weights, bias)
    variables, state, residual, iterations = jax.lax.while_loop(
        has_work, iterate, (variables, solver.init(variables), jnp.inf, 0)
    )
    values = {"objective": optax.tree.get(state, "value"), "residual": residual}
    return *objective.parameters(variables), values | {"iterations": iterations}


class Fitter:
    """Fits probes of one set of features on the devices, one `lam` after the other."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        *,
        mesh: Mesh,
        penalty: str,
    ):
        """Lays the data on the devices.

        Args:
          features: (n, C) float32, on every process.
          labels: (n,) int32; every class has at least one.
          num_classes: K, at least 2.
          mesh: of the devices over which the rows are split.
          penalty: "squared" or "norm".
        """
        width, everywhere = max(features.shape[1], num_classes), sharding.replicated(mesh)
        analyse = jax.jit(_analyse, static_argnums=1, out_shardings=everywhere)
        self._optimize = jax.jit(_optimize, static_argnames="penalty", out_shardings=everywhere)
        self._penalty = penalty
        with jax.enable_x64(True):
            self._rows = _Rows(
                _lay_out(features.astype(np.float32), mesh, width=width, padding=0),
                _lay_out(labels.astype(np.int32), mesh, width=width, padding=-1),
            )
            self._statistics = analyse(self._rows, num_classes)
            self._steepest = float(jnp.linalg.norm(self._statistics.gradient))
            self._weights = jnp.zeros_like(self._statistics.gradient)
            self._bias = self._statistics.prior  # of centred features

    def fit(self, lam: float, should_stop: Callable[[], bool] = lambda: False) -> Fit | None:
        """The probe with the penalty's strength `lam`, started from the one before.

        Args:
          lam: above 0.
          should_stop: asked every ITERATIONS_PER_CALL iterations; None is returned if it is true.
        """
        # At W = 0 no direction lowers the cross-entropy by more than `steepest` per unit of |W|.
        if self._steepest == 0 or (self._penalty == "norm" and self._steepest <= lam):
            zeros, prior = np.zeros(self._weights.shape), np.asarray(self._statistics.prior)
            return Fit(lam, zeros, prior, -float(np.sum(np.exp(prior) * prior)), 0.0, 0)
        iterations, residual = 0, np.inf
        while residual > TOLERANCE and iterations < MAX_ITERATIONS:
            if should_stop():
                return None
            with jax.enable_x64(True):
                if self._penalty == "norm" and not self._weights.any():
                    self._leave_zero(lam)
                self._weights, self._bias, values = self._optimize(
                    self._rows,
                    self._statistics,
                    lam,
                    self._weights,
                    self._bias,
                    penalty=self._penalty,
                )
                bias = self._bias - self._statistics.mean @ self._weights
            residual = float(values["residual"])
            iterations += int(values["iterations"])
        return Fit(
            lam=lam,
            weights=np.asarray(self._weights),
            bias=np.asarray(bias),
            objective=float(values["objective"]),
            residual=residual,
            iterations=iterations,
        )

    def _leave_zero(self, lam: float) -> None:
        """Takes a step of proximal gradient descent from W = 0, where the norm has no gradient.

        The step lowers F: the softmax has a curvature of at most 1/2.
        """
        length = 2 / self._statistics.eigenvalues[-1] * (1 - lam / self._steepest)
        self._weights = -length * self._statistics.gradient


# The probe.


def hold_out(train: Split) -> tuple[Split, Split]:
    """Splits a training split in two, the second with a tenth of each class's images.

    Of a class with two or more images at least one is held out. Seed 0 draws them.

    Raises:
      UserError: no class has two images.
    """
    labels = train.labels()
    rng, is_held_out = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        if len(places) > 1:
            is_held_out[places[: max(int(HELD_OUT_SHARE * len(places)), 1)]] = True
    if not is_held_out.any():
        raise UserError(
            f"linear probe: {train.name} has one image per class; expected two or more, of which "
            "one is held out to choose lam"
        )
    return train.select(np.flatnonzero(~is_held_out)), train.select(np.flatnonzero(is_held_out))


def assign(train: Split, validation: Split | None, test: Split | None) -> Splits:
    """The splits to fit on, to choose lam on and to report.

    Without a test split the validation split is reported. If no validation split is left, lam is
    chosen on images that are held out of the training split.

    Raises:
      UserError: there is neither, they have different classes, images have several labels, or all
        training images have the same class.
    """
    if test is None:
        validation, test = None, validation
    if test is None:
        raise UserError("linear probe: dataset.test_split and dataset.val_split are empty")
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


def _guess(features: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """The class (M, R) int32 of the highest logit of features (M, R, C)."""

    def guess(chunk: jax.Array) -> jax.Array:
        return jnp.argmax(chunk.astype(jnp.float64) @ weights + bias, axis=-1).astype(jnp.int32)

    return jax.lax.map(guess, features)


def _make_classify(
    features: np.ndarray, num_classes: int, mesh: Mesh
) -> Callable[[Fit], np.ndarray]:
    """Returns `Fit -> classes (n,)` for n `features`, which are laid on the devices once."""
    width = max(features.shape[1], num_classes)
    chunks = _lay_out(features.astype(np.float32), mesh, width=width, padding=0)
    guess = jax.jit(_guess, out_shardings=sharding.replicated(mesh))

    def classify(probe: Fit) -> np.ndarray:
        with jax.enable_x64(True):
            guesses = guess(chunks, probe.weights, probe.bias)
        return np.asarray(guesses).reshape(-1)[: len(features)]

    return classify


def evaluate(
    model: nn.Module,
    params: Any,
    splits: Splits,
    *,
    penalty: str,
    mesh: Mesh,
    global_batch_size: int,
    prefetch_batches: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> ProbeResult | None:
    """Fits, chooses lam and classifies the test split; None if `should_stop` ended it.

    Every process of a run on many hosts computes its part and gets the whole result.

    Args:
      model: whose pre_logits are the features.
      params: of the model, on every device of the mesh.
      splits: as of `assign`.
      penalty: "squared" or "norm".
      mesh: of the devices, over which images and features are split.
      global_batch_size: images per step of the model, over all devices.
      prefetch_batches: batches on their way to the devices.
      should_stop: asked after every batch and every ITERATIONS_PER_CALL iterations.

    Raises:
      UserError: features that are not finite.
      NoRoomError: the features do not fit into memory.
    """
    num_images = sum(split.num_examples for split in splits)
    num_bytes = 2 * 4 * model.hidden_dim * num_images  # as collected, and as laid out
    memory.check_room(num_bytes, f"features of {num_images:,} images", on_host=True)
    features, labels = [], [split.labels() for split in splits]
    for split in splits:
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
    # Classes without a training image take no part; their test images are errors.
    classes, train_labels = np.unique(labels[0], return_inverse=True)
    fitter = Fitter(features[0], train_labels, len(classes), mesh=mesh, penalty=penalty)
    classify = _make_classify(features[1], len(classes), mesh)
    best, best_top1, path = None, -1.0, []
    for lam in sorted(LAMBDAS, reverse=True):
        probe = fitter.fit(lam, should_stop)
        if probe is None:
            return None
        top1 = float(np.mean(classes[classify(probe)] == labels[1]))
        if top1 > best_top1:  # among equals the strongest penalty
            best, best_top1 = probe, top1
        path.append({"validation_top1": top1, **probe.progress()})
    guesses = classes[_make_classify(features[2], len(classes), mesh)(best)]
    train, validation, test = splits
    return ProbeResult(
        train=train.name,
        validation=validation.name,
        test=test.name,
        train_count=train.num_examples,
        validation_count=validation.num_examples,
        num_classes=len(test.class_names),
        untrained_classes=len(test.class_names) - len(classes),
        penalty=penalty,
        lam=best.lam,
        on_edge=best.lam in (min(LAMBDAS), max(LAMBDAS)),
        path=tuple(path),
        **_figures(guesses, labels[2], len(test.class_names)),
    )


def _figures(guesses: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """The fields of `ProbeResult` that follow from the guesses (n,) for the test split."""
    hit = guesses == labels
    hits, counts = scores.per_class(labels, hit, num_classes)
    shares, counts = hits[counts > 0] / counts[counts > 0], counts[counts > 0]
    return {
        "count": len(hit),
        "top1": float(hit.mean()),
        "top1_interval": scores.interval(int(hit.sum()), len(hit)),
        "mean_per_class": float(shares.mean()),
        "mean_per_class_interval": scores.mean_interval(shares, counts),
    }


class LinearProbe:
    """The probe of a run at its validations, with the squared penalty.

    The validation split is reported; lam is chosen on training images that are held out.

    Attributes:
      name: "linear_probe".
      key: of the accuracy in metrics.jsonl.
    """

    name, key = "linear_probe", "linear_probe/top1"

    def __init__(self, dataset: str, splits: Splits, setup: Setup):
        """`splits` are as of `assign`; results are named by `dataset`."""
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
            result = evaluate(
                self._setup.model,
                values,
                self._splits,
                penalty="squared",
                mesh=self._setup.mesh,
                global_batch_size=self._setup.global_batch_size,
                prefetch_batches=self._setup.prefetch_batches,
                should_stop=should_stop,
            )
            if result is None:
                return None
            summary = result.summary()
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
    """The probe of a run: `eval_suite=linear_probe`. It does not read the test split."""
    # The training images are not augmented here.
    train = run_config.open_split(
        config, "train", splits.train.class_names, subfolders=splits.subfolders
    )
    return LinearProbe(run_config.data_name(config), assign(train, None, splits.val), setup)


def open_splits(config: ConfigDict) -> Splits:
    """The splits of a config's data for the probe of finished weights, as `assign` has them."""
    return assign(*(run_config.open_split(config, name, None) for name in ("train", "val", "test")))


# The report, from `ProbeResult.summary()` as results.json has it.


def sentence(summary: Mapping[str, Any]) -> str:
    """The figures of a probe in one line."""
    low, high = summary["top1_interval"]
    figures = (
        f"top-1 {summary['top1']:.2%} ({low:.2%} to {high:.2%}) of {summary['count']:,} images",
        f"mean per class {summary['mean_per_class']:.2%}",
        f"lam {summary['lam']:g}",
    )
    return ", ".join([*figures, *remarks(summary)])


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What limits a probe's figures."""
    texts = []
    if summary["on_edge"]:
        texts.append("lam is at an end of its list")
    if failures := [f"{point['lam']:g}" for point in summary["path"] if not point["converged"]]:
        texts.append(f"not converged with lam {', '.join(failures)}")
    if count := summary["untrained_classes"]:
        texts.append(f"{count:,} of {summary['num_classes']:,} classes have no training image")
    return texts


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
    """A line per probe on its training data and its remarks."""
    return [
        "; ".join(
            [
                f"{name}: fitted on {summary['train_count']:,} images of {summary['train']}",
                *remarks(summary),
            ]
        )
        for name, summary in summaries.items()
    ]
