"""One update of the parameters, and one prediction: the two compiled programs of a run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixer.model import MlpMixer
from mixer.optimizer import Schedule
from mixer.train_state import TrainState

Batch = dict[str, jax.Array]


def normalize(images: jax.Array) -> jax.Array:
    """uint8 pixels (N, H, W, 3) to float32 in [-1, 1], the published models' input; floats stay."""
    return images if images.dtype != jnp.uint8 else images.astype(jnp.float32) / 127.5 - 1.0


def make_train_step(
    model: MlpMixer,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the update `(state, batch) -> (state, metrics)`, not yet compiled.

    The batch holds "image" (N, H, W, 3) uint8, or floats in [-1, 1], and "label" (N,) int32 or
    (N, K) soft. Metrics are scalars: loss and top-1 accuracy of the batch before the update, norms
    of gradient (before clipping) and parameters, and the learning rate.
    """

    def train_step(state: TrainState, batch: Batch):
        labels = batch["label"]
        if labels.ndim == 1:
            labels = jax.nn.one_hot(labels, model.num_classes)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def mean_loss(params: Any):
            logits, _ = model.apply(
                {"params": params}, normalize(batch["image"]), train=True, rngs={"dropout": key}
            )
            return jnp.mean(loss_fn(logits, labels)), logits

        (loss, logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(labels, -1)),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_predict(model: MlpMixer) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns `(params, images (N, H, W, 3) uint8) -> logits (N, K)`, not yet compiled."""

    def predict(params: Any, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, normalize(images))[0]

    return predict
