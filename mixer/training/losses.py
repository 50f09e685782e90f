"""Classification losses; each returns one value per example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mixer.errors import check_choice


def softmax(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy. logits, labels (soft or one-hot): (N, K) -> (N,)."""
    return optax.softmax_cross_entropy(logits, labels)


def sigmoid(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, summed over the classes. logits, labels: (N, K) -> (N,).

    The authors' pre-training loss (big_vision, `mlp_mixer_i1k`).
    """
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)


def dense_labels(batch: dict[str, jax.Array], num_classes: int) -> jax.Array:
    """Returns the labels of a batch as (N, K) float32.

    "label" is (N,) int32; or (N, M) int32 with up to M labels per image, padded with -1, and their
    weights in "label_weight" (N, M) float32; or (N, K) floats, which are returned unchanged.
    """
    label = batch["label"]
    if jnp.issubdtype(label.dtype, jnp.floating):
        return label
    labels = jax.nn.one_hot(label, num_classes)  # the label -1 gives zeros
    if label.ndim == 1:
        return labels
    return jnp.max(labels * batch["label_weight"][..., None], axis=1)  # XLA never stores (N, M, K)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}


def make_loss(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the loss function of that name: (logits, labels) -> (N,)."""
    check_choice("loss", name, LOSSES)
    return LOSSES[name]
