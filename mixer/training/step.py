"""One update of the parameters, and one prediction: the two compiled programs of a run."""

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
Update = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def normalize(images: jax.Array) -> jax.Array:
    """uint8 pixels (N, H, W, 3) to float32 in [-1, 1], the published models' input; floats stay."""
    return images if images.dtype != jnp.uint8 else images.astype(jnp.float32) / 127.5 - 1.0


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    seed: int,
    mix: Mix,
    label_smoothing: float,
    lr_multipliers: Rules,
    sam_rho: float,
    ema_decay: float,
    accumulate_steps: int,
) -> Update:
    """Returns the update `(state, batch) -> (state, metrics)`, not yet compiled.

    The batch holds "image" (N, H, W, 3) uint8, or floats in [-1, 1], and labels as `dense_labels`
    takes them. Metrics are scalars: loss and top-1 accuracy of the (mixed) batch before the update,
    norms of gradient (before clipping) and parameters, and the learning rate; with a state that
    counts them, the number of updates left out so far.

    A state with `skipped` leaves an update out where loss or gradient are not finite: parameters,
    moments and average stay, and the step and with it the schedule go on.

    Args:
      model: what is trained.
      tx: the optimizer.
      schedule: for the metric; the optimizer has its own.
      loss_fn: (logits, labels) -> one value an example.
      seed: of the run; masks and mixing are functions of (seed, step).
      mix: mixup and CutMix of the whole batch.
      label_smoothing: s; labels become (1 - s) * labels + s / K.
      lr_multipliers: as `make_optimizer` has them; what they freeze takes no gradient.
      sam_rho: radius of SAM's ascent step (Foret et al., 2021): the gradient is taken at
        params + rho * g / |g|, g being that of the same batch, masks and mixing; over the global
        batch. 0: none.
      ema_decay: d of the moving average, ema <- d * ema + (1 - d) * params after every update.
      accumulate_steps: the gradient is the mean over at least so many parts of the batch, one after
        the other; more of them where that is faster (`microbatches.best_count`). Mixing and masks
        are the whole batch's, so the update is the same.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mask_key, mix_key = jax.random.split(key)
        labels = dense_labels(batch, model.num_classes)
        images, labels = mix(mix_key, normalize(batch["image"]), labels)
        whole = images, labels, jnp.arange(images.shape[0])
        count = max(accumulate_steps, microbatches.best_count(model, images.shape))
        trained = jax.tree.map(bool, multipliers(state.params, lr_multipliers))

        def mean_loss(params: Any, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            images, labels, example_index = part
            logits, _ = model.apply(
                {"params": params},
                images,
                train=True,
                example_index=example_index,
                rngs={"dropout": mask_key},
            )
            guess = jnp.argmax(logits, -1, keepdims=True)
            weight = jnp.take_along_axis(labels, guess, -1)[:, 0]
            hits = (weight > 0) & (weight == jnp.max(labels, -1))
            if label_smoothing:
                labels = (1 - label_smoothing) * labels + label_smoothing / model.num_classes
            return jnp.mean(loss_fn(logits, labels)), jnp.mean(hits)

        def gradient(params: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
            """((loss, accuracy), gradient), which is 0 for what is frozen."""

            def of_part(part: tuple[jax.Array, ...]) -> Any:
                def loss(params: Any) -> tuple[jax.Array, jax.Array]:
                    moving = jax.tree.map(
                        lambda p, moves: p if moves else jax.lax.stop_gradient(p), params, trained
                    )
                    return mean_loss(moving, part)

                return jax.value_and_grad(loss, has_aux=True)(params)

            def sharded(result: Any) -> Any:
                # Summed over the batch, the gradient goes where the parameters are.
                return result[0], constrain_params(result[1])

            if count == 1:
                return sharded(of_part(whole))
            parts = jax.tree.map(lambda x: microbatches.cut(x, count), whole)

            def add(total: Any, part: tuple[jax.Array, ...]) -> tuple[Any, None]:
                return sharded(jax.tree.map(jnp.add, total, of_part(part))), None

            zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
            total, _ = jax.lax.scan(add, sharded(zeros), parts)
            return jax.tree.map(lambda x: x / count, total)

        (loss, accuracy), grads = gradient(state.params)
        if sam_rho:
            radius = sam_rho / (optax.tree.norm(grads) + 1e-12)
            _, grads = gradient(jax.tree.map(lambda p, g: p + radius * g, state.params, grads))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        grad_norm = optax.tree.norm(grads)
        skipped = state.skipped
        if skipped is not None:
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            skipped += ~finite
            params, opt_state, ema_params = jax.tree.map(
                functools.partial(_kept, finite),
                (params, opt_state, ema_params),
                (state.params, state.opt_state, state.ema_params),
                is_leaf=_follows_step,
            )
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step),
        }
        if skipped is not None:
            metrics["skipped_steps"] = skipped
        return TrainState(state.step + 1, params, opt_state, ema_params, skipped), metrics

    return train_step


def make_train_loop(
    train_step: Update,
    *,
    seed: int,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> Callable:
    """Returns many updates in one program, `(state, examples, order, count) -> (state, metrics)`.

    Batches are drawn from examples that stay on the device. How the updates of a run are cut into
    calls makes no difference: their number is no part of the program.

    Args:
      train_step: the update of one batch.
      seed: of the run; with an example's epoch and number it makes its key.
      augment: what the images drawn take first, (images, keys (N, 4) uint32) -> images.

    Returns:
      A function of the state; of `examples`, by name (n, ...), as batches have them, and "number"
      (n,) uint32 where the images are augmented; of `order`, "epoch" and "place" (M, B) int32:
      which examples each batch takes; and of `count`, how many of the M updates are made, at least
      1. The metrics are those of the last.
    """
    # Each is traced once, although it stands in branches, and its results' shapes are asked for.
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
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def update(row: jax.Array, carried: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            batch = _apart(draw, count > 0, examples, order["epoch"][row], order["place"][row])
            batch = {name: constrain(values, BATCH) for name, values in batch.items()}
            # The update is compiled as it is alone, and nothing of it with what is around it.
            before = jax.lax.optimization_barrier((carried[0], batch))
            state, metrics = train_step(*before)
            del metrics["param_norm"]  # many small kernels, and only the last one's is wanted
            return jax.lax.optimization_barrier((state, metrics))

        shapes = jax.eval_shape(lambda: update(jnp.int32(0), (state, None))[1])
        none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        state, metrics = jax.lax.fori_loop(0, count, update, (state, none))
        return state, {**metrics, "param_norm": optax.tree.norm(state.params)}

    return train_loop


def _apart(make: Callable, true: jax.Array, *args: Any) -> Any:
    """`make(*args)`, no part of which is compiled with what uses it; `true` is, at run time.

    What a compiler joins it may round otherwise: so the numbers are those of a batch that comes
    from the host.
    """

    def branch(*args: Any) -> Any:
        # On a CPU XLA drops barriers before it joins operations; a branch it compiles by itself.
        none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(true, make, lambda *_: none, *args)

    def barrier(*args: Any) -> Any:
        return jax.lax.optimization_barrier(make(*args))

    shapes = jax.eval_shape(make, *args)
    return jax.lax.platform_dependent(*args, cpu=branch, default=barrier)


def _follows_step(node: Any) -> bool:
    """Whether it counts steps for the schedule, which a step that is left out takes on too."""
    return isinstance(node, optax.ScaleByScheduleState)


def _kept(finite: jax.Array, new: Any, old: Any) -> Any:
    """The new value, or the old one where the update is not finite."""
    return new if _follows_step(new) else jnp.where(finite, new, old)


def make_predict(model: nn.Module, mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns `(params, images (N, H, W, 3) uint8) -> logits (N, K)`, not yet compiled.

    The images lie on the mesh as `sharding.batch_sharding` has them.
    """

    def predict(params: Any, images: jax.Array) -> jax.Array:
        def of_part(images: jax.Array) -> jax.Array:
            return model.apply({"params": params}, normalize(images))[0]

        return microbatches.map_images(model, of_part, images)

    return on_mesh(predict, mesh)
