"""Mixup and CutMix on the device: on the global batch, anew in every step.

The partner of image i is image i - 1 of the global batch, the last one for the first. big_vision
rolls by one too, but within each device's share of the batch: on one device it makes the same
pairs, on several others. Everything here is a function of the step's key and of the places in the
global batch, so that the number of devices changes nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixer.errors import UserError, check_number

Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_mix(*, alpha: float, per_example: bool, cutmix_alpha: float, cutmix_prob: float) -> Mix:
    """Returns `(key, images (N, H, W, 3) float, labels (N, K)) -> (images, labels)`, mixed.

    Args:
      alpha: mixup's lambda is max(u, 1 - u), u from Beta(alpha, alpha), so that an image keeps the
        larger share of itself (Zhang et al., 2018; the maximum is the authors'); 0: no mixup.
      per_example: whether each image draws its own lambda or window; else all share the step's.
      cutmix_alpha: CutMix pastes a window of the partner whose share of the area is drawn from
        Beta(cutmix_alpha, cutmix_alpha), around a uniform place, cut off at the border; labels are
        mixed by the area that is left (Yun et al., 2019).
      cutmix_prob: share of the steps (of the images, with `per_example`) that take CutMix; the
        others take mixup.

    Raises:
      UserError: a value out of its range.
    """
    check_number("mixup.alpha", alpha)
    check_number("mixup.cutmix_alpha", cutmix_alpha)
    if not 0 <= cutmix_prob <= 1 or bool(cutmix_prob) != bool(cutmix_alpha):
        raise UserError(
            f"mixup.cutmix_prob={cutmix_prob} and mixup.cutmix_alpha={cutmix_alpha}: the first is "
            "in [0, 1], and both are 0 or neither"
        )

    def mix(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not alpha and not cutmix_alpha:
            return images, labels
        count = (images.shape[0] if per_example else 1,)
        keys = jax.random.split(key, 4)
        own = jnp.ones((*count, 1, 1, 1))  # share of the image itself, by pixel
        if alpha:
            u = _beta(keys[0], alpha, count)
            own = jnp.maximum(u, 1 - u)[:, None, None, None]
        label_share = own[:, 0, 0]
        if cutmix_alpha:
            area = _beta(keys[1], cutmix_alpha, count)
            outside = ~_window(keys[2], area, images.shape[1:3])
            chosen = jax.random.bernoulli(keys[3], cutmix_prob, count)
            own = jnp.where(chosen[:, None, None, None], outside[..., None], own)
            label_share = jnp.where(
                chosen[:, None], jnp.mean(outside, (1, 2))[:, None], label_share
            )
        mixed = own * images + (1 - own) * jnp.roll(images, 1, axis=0)
        return mixed, label_share * labels + (1 - label_share) * jnp.roll(labels, 1, axis=0)

    return mix


def _beta(key: jax.Array, alpha: float, shape: tuple[int, ...]) -> jax.Array:
    """Numbers from Beta(alpha, alpha), of its quantiles at 2^16 places, each as likely.

    `jax.random.beta` draws them in loops of a length that chance decides, where a GPU waits for its
    host in each round, and takes logarithms of constants, which a compiler may round otherwise in
    one program than in another. What is looked up has the same bits in both.
    """
    if alpha == 1:
        return jax.random.uniform(key, shape)
    from scipy import special  # a fifth of a second, which a run without mixing can do without

    places = (np.arange(1 << 16) + 0.5) / (1 << 16)
    quantiles = special.betaincinv(alpha, alpha, places).astype(np.float32)
    return jnp.asarray(quantiles)[jax.random.bits(key, shape, jnp.uint16)]


def _window(key: jax.Array, area: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Windows of the image's aspect and of share `area` (n,) of it: (n, H, W) bool."""
    inside = []
    for axis, side in enumerate(size):
        middle = jax.random.uniform(jax.random.fold_in(key, axis), area.shape, maxval=side)
        half = jnp.sqrt(area) * side / 2
        place = jnp.arange(side) + 0.5
        inside.append(jnp.abs(place - middle[:, None]) < half[:, None])
    return inside[0][:, :, None] & inside[1][:, None, :]
