"""The two compiled programs of a run: one update of the parameters, and one prediction."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mixer.data import philox
from mixer.models import microbatches
from mixer.models.placement import constrain_params
from mixer.parallel.sharding import BATCH, constrain, on_mesh
from mixer.training.losses import dense_labels
from mixer.training.mixup import Mix
from mixer.training.optimizer import Rules, Schedule, multipliers
from mixer.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def normalize(images: jax.Array) -> jax.Array:
    """Maps uint8 pixels (N, H, W, channels) to float32 in [-1, 1]; returns floats unchanged."""
    return images if images.dtype != jnp.uint8 else images.astype(jnp.float32) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The update `(state, batch) -> (state, metrics)`, not yet compiled.

    The batch holds "image" (N, H, W, channels), uint8 or floats in [-1, 1], and labels in a form
    that `dense_labels` accepts. Metrics are scalars: loss and top-1 accuracy of the (mixed) batch
    before the update, norms of the gradient (before clipping) and of the parameters, the learning
    rate, and the number of skipped updates if the state counts them.

    If the state has `skipped`, an update whose loss or gradient is not finite is skipped:
    parameters, moments and average keep their values, and the step (and the schedule) advances.

    Attributes:
      model: the network.
      tx: the optimizer.
      schedule: the schedule, for the metric; the optimizer contains its own copy.
      loss_fn: (logits, labels) -> one value per example.
      seed: the run's seed; masks and mixing depend only on (seed, step).
      mix: mixup and CutMix of the whole batch.
      label_smoothing: s; labels become (1 - s) * labels + s / K.
      lr_multipliers: rules as in `make_optimizer`; parameters with multiplier 0 get no gradient.
      sam_rho: radius of SAM's ascent step (Foret et al., 2021): the gradient is taken at
        params + rho * g / |g|, where g is the gradient of the same batch with the same masks and
        mixing, over the global batch. 0: no SAM.
      ema_decay: d of the moving average, ema <- d * ema + (1 - d) * params after every update.
      accumulate_steps: minimum number of microbatches over which the gradient is averaged; more are
        used if that is faster (`microbatches.best_count`). Mixing and masks are drawn for the whole
        batch, so the number of microbatches does not change the update.
    """

    model: nn.Module
    tx: optax.GradientTransformation
    schedule: Schedule
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array]
    _: dataclasses.KW_ONLY
    seed: int
    mix: Mix
    label_smoothing: float
    lr_multipliers: Rules
    sam_rho: float
    ema_decay: float
    accumulate_steps: int

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Returns the state after the update, and the metrics of the batch before it."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        mask_key, mix_key = jax.random.split(key)
        labels = dense_labels(batch, self.model.num_classes)
        images, labels = self.mix(mix_key, normalize(batch["image"]), labels)
        examples = images, labels, jnp.arange(images.shape[0])

        (loss, accuracy), grads = self._gradient(state.params, examples, mask_key)
        if self.sam_rho:
            radius = self.sam_rho / (optax.tree.norm(grads) + 1e-12)
            ascended = jax.tree.map(lambda p, g: p + radius * g, state.params, grads)
            _, grads = self._gradient(ascended, examples, mask_key)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if self.ema_decay:
            ema_params = optax.incremental_update(params, ema_params, 1 - self.ema_decay)

        grad_norm = optax.tree.norm(grads)
        skipped = state.skipped
        if skipped is not None:
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            skipped += ~finite
            params, opt_state, ema_params = jax.tree.map(
                functools.partial(_new_if_finite, finite),
                (params, opt_state, ema_params),
                (state.params, state.opt_state, state.ema_params),
                is_leaf=_counts_steps,
            )
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "learning_rate": self.schedule(state.step),
        }
        if skipped is not None:
            metrics["skipped_steps"] = skipped
        return TrainState(state.step + 1, params, opt_state, ema_params, skipped), metrics

    def _gradient(self, params: Any, examples: tuple[jax.Array, ...], mask_key: jax.Array) -> Any:
        """Returns ((loss, accuracy), gradient) of the batch, averaged over microbatches."""
        loss_and_grad = jax.value_and_grad(self._loss, has_aux=True)
        count = microbatches.best_count(self.model, examples[0].shape)
        count = max(self.accumulate_steps, count)
        if count == 1:
            return _place_gradient(loss_and_grad(params, examples, mask_key))

        def add(total: Any, part: tuple[jax.Array, ...]) -> tuple[Any, None]:
            total = jax.tree.map(jnp.add, total, loss_and_grad(params, part, mask_key))
            return _place_gradient(total), None

        parts = jax.tree.map(lambda x: microbatches.cut(x, count), examples)
        zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, _place_gradient(zeros), parts)
        return jax.tree.map(lambda x: x / count, total)

    def _loss(
        self, params: Any, examples: tuple[jax.Array, ...], mask_key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns mean loss and top-1 accuracy of examples (images, labels, place in the batch)."""
        images, labels, example_index = examples
        is_trained = jax.tree.map(bool, multipliers(params, self.lr_multipliers))
        params = jax.tree.map(
            lambda p, trained: p if trained else jax.lax.stop_gradient(p), params, is_trained
        )
        logits, _ = self.model.apply(
            {"params": params},
            images,
            train=True,
            example_index=example_index,
            rngs={"dropout": mask_key},
        )
        guess = jnp.argmax(logits, -1, keepdims=True)
        weight = jnp.take_along_axis(labels, guess, -1)[:, 0]
        hits = (weight > 0) & (weight == jnp.max(labels, -1))
        if self.label_smoothing:
            uniform = self.label_smoothing / self.model.num_classes
            labels = (1 - self.label_smoothing) * labels + uniform
        return jnp.mean(self.loss_fn(logits, labels)), jnp.mean(hits)


def _place_gradient(result: Any) -> Any:
    """Shards the gradient like the parameters, after it has been summed over the batch."""
    return result[0], constrain_params(result[1])


def make_train_loop(
    train_step: Update,
    *,
    seed: int,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> Callable:
    """Returns one program of many updates, `(state, examples, order, count) -> (state, metrics)`.

    Batches are drawn from examples that stay on the device. The number of updates per call is an
    argument of the program, so it can vary without recompilation and without changing results.

    Args:
      train_step: the update of one batch.
      seed: the run's seed; the seed, an example's epoch and its number determine its random key.
      augment: function (images, keys (N, 4) uint32) -> images that is applied to the drawn images.

    Returns:
      A function of four arguments: the state; `examples`, arrays (n, ...) by the names in a batch,
      with "number" (n,) uint32 if the images are augmented; `order`, "epoch" and "place" (M, B)
      int32, the examples of each batch; and `count`, how many of the M updates to make, at least 1.
      The metrics are those of the last update.
    """
    # jit traces each function only once; `inline` keeps the lowered program the same.
    train_step = jax.jit(train_step, inline=True)

    @functools.partial(jax.jit, inline=True)
    def draw(examples: Batch, epoch: jax.Array, place: jax.Array) -> Batch:
        batch = {name: values[place] for name, values in examples.items()}
        if augment is not None:
            keys = philox.fold_in(philox.make_key(seed, epoch), batch.pop("number"))
            batch["image"] = augment(batch["image"], keys)
        return batch

    def train_loop(
        state: TrainState, examples: Batch, order: Batch, count: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def update(row: jax.Array, carry: Any) -> tuple[TrainState, Metrics]:
            batch = _isolate(draw, count > 0, examples, order["epoch"][row], order["place"][row])
            batch = {name: constrain(values, BATCH) for name, values in batch.items()}
            # The barriers keep XLA from fusing the update with anything outside it.
            state, batch = jax.lax.optimization_barrier((carry[0], batch))
            state, metrics = train_step(state, batch)
            del metrics["param_norm"]  # needs many small kernels, and only the last norm is used
            return jax.lax.optimization_barrier((state, metrics))

        shapes = jax.eval_shape(lambda: update(jnp.int32(0), (state, None))[1])
        state, metrics = jax.lax.fori_loop(0, count, update, (state, _zeros(shapes)))
        return state, {**metrics, "param_norm": optax.tree.norm(state.params)}

    return train_loop


def _isolate(make: Callable, true: jax.Array, *args: Any) -> Any:
    """Returns `make(*args)`, and keeps XLA from fusing it with its consumers.

    Fusion would change rounding; without it the values equal those of a batch from the host. `true`
    is an array that is true at run time but not constant for the compiler.
    """

    def branch(*args: Any) -> Any:
        # XLA:CPU removes barriers before fusion, but compiles each branch separately.
        return jax.lax.cond(true, make, lambda *_: _zeros(shapes), *args)

    def barrier(*args: Any) -> Any:
        return jax.lax.optimization_barrier(make(*args))

    shapes = jax.eval_shape(make, *args)
    return jax.lax.platform_dependent(*args, cpu=branch, default=barrier)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _counts_steps(node: Any) -> bool:
    """Returns whether `node` is the schedule's step count, which skipped updates also advance."""
    return isinstance(node, optax.ScaleByScheduleState)


def _new_if_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """Returns the new value, or the old value if the update is not finite."""
    return new if _counts_steps(new) else jnp.where(finite, new, old)


def make_predict(
    model: nn.Module, mesh: Mesh, layer: str | None = None
) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the uncompiled function `(params, images (N, H, W, channels)) -> logits (N, K)`.

    The images must have the sharding `sharding.batch_sharding`. The function returns the output of
    `layer` instead, such as "pre_logits" (N, C), unless `layer` is None.
    """

    def predict(params: Any, images: jax.Array) -> jax.Array:
        def apply(images: jax.Array) -> jax.Array:
            logits, out = model.apply({"params": params}, normalize(images))
            return logits if layer is None else out[layer]

        return microbatches.map_images(model, apply, images)

    return on_mesh(predict, mesh)
