"""Mixup and CutMix on the device, drawn for the global batch in every step.

The partner of image i is image i - 1 of the global batch; the first image's partner is the last.
big_vision also rolls the batch by one, but within each device's shard, so its pairs depend on the
number of devices. Here everything depends only on the step's key and on positions in the global
batch, so the number of devices does not change the result.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixer.errors import UserError, check_number

Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_mix(*, alpha: float, per_example: bool, cutmix_alpha: float, cutmix_prob: float) -> Mix:
    """Returns the mixing function `(key, images, labels (N, K)) -> (images, labels)`.

    Args:
      alpha: mixup's lambda is max(u, 1 - u) with u from Beta(alpha, alpha), so that each image
        keeps the larger weight (Zhang et al., 2018; the maximum is from the authors' code); 0: no
        mixup.
      per_example: whether each image draws its own lambda or window; otherwise the whole batch
        shares one.
      cutmix_alpha: CutMix pastes a window of the partner. Its fraction of the image's area is drawn
        from Beta(cutmix_alpha, cutmix_alpha), its centre is uniform, and it is cropped at the
        border. Labels are weighted by the visible areas (Yun et al., 2019).
      cutmix_prob: fraction of the steps (of the images, with `per_example`) that use CutMix instead
        of mixup.

    Raises:
      UserError: a value is out of range.
    """
    check_number("mixup.alpha", alpha)
    check_number("mixup.cutmix_alpha", cutmix_alpha)
    if not 0 <= cutmix_prob <= 1 or bool(cutmix_prob) != bool(cutmix_alpha):
        raise UserError(
            f"mixup.cutmix_prob={cutmix_prob} and mixup.cutmix_alpha={cutmix_alpha}; expected a "
            "probability in [0, 1], and both 0 or both positive"
        )

    def mix(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not alpha and not cutmix_alpha:
            return images, labels
        count = (images.shape[0] if per_example else 1,)
        keys = jax.random.split(key, 4)
        weight = jnp.ones((*count, 1, 1, 1))  # weight of the image itself, per pixel
        if alpha:
            u = _beta(keys[0], alpha, count)
            weight = jnp.maximum(u, 1 - u)[:, None, None, None]
        label_weight = weight[:, 0, 0]
        if cutmix_alpha:
            area = _beta(keys[1], cutmix_alpha, count)
            outside = ~_window(keys[2], area, images.shape[1:3])
            uses_cutmix = jax.random.bernoulli(keys[3], cutmix_prob, count)
            weight = jnp.where(uses_cutmix[:, None, None, None], outside[..., None], weight)
            label_weight = jnp.where(
                uses_cutmix[:, None], jnp.mean(outside, (1, 2))[:, None], label_weight
            )
        mixed = weight * images + (1 - weight) * jnp.roll(images, 1, axis=0)
        return mixed, label_weight * labels + (1 - label_weight) * jnp.roll(labels, 1, axis=0)

    return mix


def _beta(key: jax.Array, alpha: float, shape: tuple[int, ...]) -> jax.Array:
    """Draws from Beta(alpha, alpha) by looking up one of 2^16 equally likely quantiles.

    `jax.random.beta` uses rejection sampling, whose trip count depends on the data, so that a GPU
    waits for its host in every iteration. It also takes logarithms of constants, which the compiler
    may round differently in different programs. A table gives the same bits in every program.
    """
    if alpha == 1:
        return jax.random.uniform(key, shape)
    from scipy import special  # takes 0.2 s to import, so runs without mixing skip it

    probabilities = (np.arange(1 << 16) + 0.5) / (1 << 16)
    quantiles = special.betaincinv(alpha, alpha, probabilities).astype(np.float32)
    return jnp.asarray(quantiles)[jax.random.bits(key, shape, jnp.uint16)]


def _window(key: jax.Array, area: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns windows (n, H, W) bool with the image's aspect and fractional `area` (n,)."""
    inside = []
    for axis, side in enumerate(size):
        middle = jax.random.uniform(jax.random.fold_in(key, axis), area.shape, maxval=side)
        half = jnp.sqrt(area) * side / 2
        centres = jnp.arange(side) + 0.5
        inside.append(jnp.abs(centres - middle[:, None]) < half[:, None])
    return inside[0][:, :, None] & inside[1][:, None, :]
