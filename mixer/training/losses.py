"""Classification losses; each returns one value per example."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixer.errors import check_choice


def softmax(logits: jax.Array, labels: jax.Array, weights: np.ndarray | None = None) -> jax.Array:
    """Softmax cross-entropy. logits, labels (soft or one-hot): (N, K) -> (N,).

    `weights` (K,) multiply the term of each class: -sum_k w_k y_k log p_k.
    """
    if weights is not None:
        labels = weights * labels
    return optax.softmax_cross_entropy(logits, labels)


def sigmoid(logits: jax.Array, labels: jax.Array, weights: np.ndarray | None = None) -> jax.Array:
    """Sigmoid cross-entropy, summed over the classes. logits, labels: (N, K) -> (N,).

    The authors' pre-training loss (big_vision, `mlp_mixer_i1k`). `weights` (K,) multiply the terms
    of present labels: -sum_k w_k y_k log p_k + (1 - y_k) log(1 - p_k).
    """
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
    if weights is not None:
        losses -= (weights - 1) * labels * jax.nn.log_sigmoid(logits)
    return jnp.sum(losses, axis=-1)


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


def class_weights(counts: np.ndarray, balance: float) -> np.ndarray:
    """Returns the weight of each class, (K,) float32, from its number of training images.

    A class with n images has the weight n^-balance, up to a factor that makes the mean weight of
    all labels 1, so that the learning rate keeps its meaning. With balance 1 the weight is
    N / (K n), and the weights of the images of a class sum to the same for every class. A class
    without images has the weight 1.
    """
    has_images = counts > 0
    weights = np.ones(len(counts))
    weights[has_images] = counts[has_images] ** -float(balance)
    weights[has_images] *= counts.sum() / (weights * counts).sum()
    return weights.astype(np.float32)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}


def make_loss(
    name: str, weights: np.ndarray | None = None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the loss function of that name: (logits, labels) -> (N,).

    `weights` (K,) are the weights of the classes; None: all 1.
    """
    check_choice("loss", name, LOSSES)
    return LOSSES[name] if weights is None else functools.partial(LOSSES[name], weights=weights)
