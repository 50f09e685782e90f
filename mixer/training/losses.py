"""Classification losses; each returns one value per example."""

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
    """The labels of a batch as (N, K) float32.

    "label" is (N,) int32; or (N, M) int32, several an image, -1 where an image has fewer, with
    their weights in "label_weight" (N, M) float32; or (N, K) floats, which stay as they are.
    """
    label = batch["label"]
    if jnp.issubdtype(label.dtype, jnp.floating):
        return label
    labels = jax.nn.one_hot(label, num_classes)  # a row of zeros for -1
    if label.ndim == 1:
        return labels
    return jnp.max(labels * batch["label_weight"][..., None], axis=1)  # (N, M, K) is never stored


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}


def make_loss(name: str):
    """Returns the loss called `name`: a function (logits, labels) -> (N,)."""
    check_choice("loss", name, LOSSES)
    return LOSSES[name]
