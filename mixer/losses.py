"""Classification losses; each returns one value per example."""

import jax
import jax.numpy as jnp
import optax

from mixer.errors import UserError, nearest


def softmax(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy. logits, labels (soft or one-hot): (N, K) -> (N,)."""
    return optax.softmax_cross_entropy(logits, labels)


def sigmoid(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, summed over the classes. logits, labels: (N, K) -> (N,).

    The authors' pre-training loss (big_vision, `mlp_mixer_i1k`).
    """
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}


def make_loss(name: str):
    """Returns the loss called `name`: a function (logits, labels) -> (N,)."""
    if name not in LOSSES:
        raise UserError(
            f"unknown loss {name!r}; one of {', '.join(LOSSES)}.{nearest(name, LOSSES)}"
        )
    return LOSSES[name]
