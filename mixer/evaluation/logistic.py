"""Multinomial logistic regression by L-BFGS, with one of two penalties.

With features x_i (C,), weights W (C, K) and bias b (K,) the objective is

  F(W, b) = mean_i -log softmax(x_i W + b)[label_i] + penalty(W)

over the n images. |W| is the Frobenius norm, and the penalty is one of

  "squared": lam / 2 * |W|^2, as scikit-learn's LogisticRegression with C = 1 / (lam * n);
  "norm":    lam * |W|, as the code of OmniBenchmark (Zhang et al., 2022, arXiv 2207.07106).

L-BFGS runs on the devices, on all data at once and in float64. Its variables are preconditioned so
that F has about the same curvature in every direction: the features are centred, and W is scaled
along the eigenvectors of their covariance. This changes neither F nor its optimum. With eigenvalues
that span six orders of magnitude, 30 iterations suffice instead of thousands.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixer.parallel import sharding

Variables = tuple[jax.Array, jax.Array]  # variables of the optimizer: (C, K) and (K,)

# At the optimum the gradients of the loss and of the penalty cancel. A fit has converged if the
# norm of their sum is at most this fraction of the norm of the penalty's gradient; F then exceeds
# its minimum by about TOLERANCE**2 times the penalty.
TOLERANCE = 1e-3
MAX_ITERATIONS = 5000
ITERATIONS_PER_CALL = 100  # each call rescales the variables
CHUNK_VALUES = 1 << 22  # features or logits per chunk and device: 32 MiB in float64


@dataclasses.dataclass(frozen=True)
class Fit:
    """The fitted regression for one `lam`.

    Attributes:
      lam: strength of the penalty.
      weights: (C, K) float64.
      bias: (K,) float64.
      objective: value of F.
      residual: norm of F's gradient divided by the norm of the penalty's gradient; 0 if W = 0 is
        the exact optimum.
      iterations: number of L-BFGS iterations.
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
        """The progress of the optimization as JSON."""
        names = ("lam", "iterations", "residual", "converged")
        return {name: getattr(self, name) for name in names}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """Features and labels on the devices, in M chunks whose rows are sharded over the devices.

    Attributes:
      features: (M, R, C) float32.
      labels: (M, R) int32; -1 in the padding rows of the last chunk.
    """

    features: jax.Array
    labels: jax.Array

    def sum(self, function: Callable[[jax.Array, jax.Array], Any]) -> Any:
        """Sums `function(features (R, C) float64, labels (R,))` over the chunks.

        The backward pass recomputes the logits of a chunk instead of saving them.
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
    """Statistics of the data that do not depend on `lam`.

    Attributes:
      count: () float64, the number n of images.
      mean: (C,) mean of the features.
      eigenvalues: (C,) eigenvalues of the covariance of the features, ascending.
      basis: (C, C) eigenvectors of the covariance, in columns.
      prior: (K,) logarithms of the class frequencies, the best bias at W = 0.
      gradient: (C, K) gradient of the mean cross-entropy at W = 0 and the bias `prior`.
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
    """F as a function of the scaled variables.

    Attributes:
      rows: the data.
      statistics: statistics of the data.
      lam: () strength of the penalty.
      scale: (C, 1) scale of W along each eigenvector.
      bias_scale: () scale of the bias for centred features.
      penalty: "squared" or "norm".
    """

    rows: _Rows
    statistics: _Statistics
    lam: jax.Array
    scale: jax.Array
    bias_scale: jax.Array
    penalty: str = dataclasses.field(metadata={"static": True})

    def variables(self, weights: jax.Array, bias: jax.Array) -> Variables:
        """Converts weights (C, K) and a bias (K,) for centred features to variables."""
        return self.statistics.basis.T @ weights / self.scale, bias / self.bias_scale

    def parameters(self, variables: Variables) -> tuple[jax.Array, jax.Array]:
        """Converts variables to weights and a bias for centred features."""
        return self.statistics.basis @ (self.scale * variables[0]), self.bias_scale * variables[1]

    def __call__(self, variables: Variables) -> jax.Array:
        """Returns F."""
        weights, bias = self.parameters(variables)
        bias = bias - self.statistics.mean @ weights
        loss = _cross_entropy(self.rows, weights, bias) / self.statistics.count
        if self.penalty == "squared":
            return loss + self.lam / 2 * jnp.sum(weights**2)
        return loss + self.lam * jnp.linalg.norm(weights)

    def residual(self, variables: Variables, gradient: Variables) -> jax.Array:
        """Computes `Fit.residual` from the gradient with respect to the variables."""
        weights, _ = self.parameters(variables)
        norm = self.lam * (jnp.linalg.norm(weights) if self.penalty == "squared" else 1.0)
        # The bias is the weight of a constant feature. To make its gradient comparable, the
        # constant has the mean square of the features.
        size = jnp.mean(self.statistics.eigenvalues)
        squares = jnp.sum((gradient[0] / self.scale) ** 2)
        squares += size * jnp.sum((gradient[1] / self.bias_scale) ** 2)
        return jnp.sqrt(squares) / norm


def _lay_out(array: np.ndarray, mesh: Mesh, *, width: int, padding: int) -> jax.Array:
    """Puts rows (n, ...) on the devices as chunks (M, R, ...) whose rows are sharded."""
    shards = sharding.batch_shards(mesh)
    rows = min(max(CHUNK_VALUES // width, 1), -(-len(array) // shards)) * shards
    chunks = -(-len(array) // rows)
    widths = [(0, chunks * rows - len(array))] + [(0, 0)] * (array.ndim - 1)
    padded = np.pad(array, widths, constant_values=padding)
    row_sharding = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    chunked = padded.reshape(chunks, rows, *array.shape[1:])
    return jax.make_array_from_callback(chunked.shape, row_sharding, lambda index: chunked[index])


def _cross_entropy(rows: _Rows, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """Sums the softmax cross-entropy of `features @ weights + bias` over all images."""

    def loss(features: jax.Array, labels: jax.Array) -> jax.Array:
        logits = features @ weights + bias
        label_logits = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=1) - label_logits
        return jnp.sum(jnp.where(labels >= 0, losses, 0.0))

    return rows.sum(loss)


def _softmax_curvature(rows: _Rows, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """Sums the mean curvature of the cross-entropy in its K - 1 free logits over all images."""

    def curvature(features: jax.Array, labels: jax.Array) -> jax.Array:
        trace = 1 - jnp.sum(jax.nn.softmax(features @ weights + bias) ** 2, axis=1)
        return jnp.sum(jnp.where(labels >= 0, trace, 0.0)) / (bias.shape[0] - 1)

    return rows.sum(curvature)


def _analyse(rows: _Rows, num_classes: int) -> _Statistics:
    """Computes the statistics of rows in which every class occurs."""

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
    """Runs one to ITERATIONS_PER_CALL iterations of L-BFGS.

    Args:
      rows: the data.
      statistics: statistics of the data.
      lam: () strength of the penalty.
      weights: (C, K) initial weights; not 0 if the penalty is "norm".
      bias: (K,) initial bias for centred features.
      penalty: "squared" or "norm".

    Returns:
      The new weights, the new bias, and fields of `Fit` by name.
    """
    # Along an eigenvector, the curvature of F is about the eigenvalue times the curvature of the
    # softmax, plus the curvature of the penalty. The softmax has little curvature where
    # probabilities are near 0 and 1, so each call measures it again.
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
    """Fits regressions for several `lam` in turn to one set of features on the devices."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        *,
        mesh: Mesh,
        penalty: str,
    ):
        """Puts the data on the devices.

        Args:
          features: (n, C) float32, on every process.
          labels: (n,) int32; every class occurs at least once.
          num_classes: K, at least 2.
          mesh: mesh of the devices over which the rows are sharded.
          penalty: "squared" or "norm".
        """
        width, replicated = max(features.shape[1], num_classes), sharding.replicated(mesh)
        analyse = jax.jit(_analyse, static_argnums=1, out_shardings=replicated)
        self._optimize = jax.jit(_optimize, static_argnames="penalty", out_shardings=replicated)
        self._penalty = penalty
        with jax.enable_x64(True):
            self._rows = _Rows(
                _lay_out(features.astype(np.float32), mesh, width=width, padding=0),
                _lay_out(labels.astype(np.int32), mesh, width=width, padding=-1),
            )
            self._statistics = analyse(self._rows, num_classes)
            self._steepest = float(jnp.linalg.norm(self._statistics.gradient))
            self._weights = jnp.zeros_like(self._statistics.gradient)
            self._bias = self._statistics.prior  # the bias for centred features

    def fit(self, lam: float, should_stop: Callable[[], bool] = lambda: False) -> Fit | None:
        """Fits the regression for one `lam`, starting from the previous fit.

        Args:
          lam: strength of the penalty, above 0.
          should_stop: called every ITERATIONS_PER_CALL iterations; None is returned if it is True.
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
        """Takes a proximal gradient step away from W = 0, where the norm has no gradient.

        The step lowers F, because the curvature of the softmax is at most 1/2.
        """
        length = 2 / self._statistics.eigenvalues[-1] * (1 - lam / self._steepest)
        self._weights = -length * self._statistics.gradient


def _guess(features: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the class (M, R) int32 with the highest logit for features (M, R, C)."""

    def guess(chunk: jax.Array) -> jax.Array:
        return jnp.argmax(chunk.astype(jnp.float64) @ weights + bias, axis=-1).astype(jnp.int32)

    return jax.lax.map(guess, features)


def make_classify(
    features: np.ndarray, num_classes: int, mesh: Mesh
) -> Callable[[Fit], np.ndarray]:
    """Puts n `features` on the devices and returns the function `Fit -> classes (n,)`."""
    width = max(features.shape[1], num_classes)
    chunks = _lay_out(features.astype(np.float32), mesh, width=width, padding=0)
    guess = jax.jit(_guess, out_shardings=sharding.replicated(mesh))

    def classify(fit: Fit) -> np.ndarray:
        with jax.enable_x64(True):
            guesses = guess(chunks, fit.weights, fit.bias)
        return np.asarray(guesses).reshape(-1)[: len(features)]

    return classify
