"""AutoAugment for CIFAR-10 on the host (Cubuk et al., 2019, arXiv 1805.09501)."""

import functools

import tensorflow as tf

from mixer.data.preprocessing import randaugment
from mixer.data.preprocessing.policies import CIFAR_POLICY, amount_of_level


def apply_level(image, name, level, sign):
    """Applies an operation at a level to an (H, W, 3) uint8 image; see `amount_of_level`."""
    return randaugment.apply_operation(image, name, amount_of_level(name, level, sign))


def autoaugment_cifar(image, key):
    """Applies one of the 25 sub-policies: two operations, each with its own probability and sign.

    Levels and ranges are those of github.com/DeepVoltaire/AutoAugment, which the reference recipe
    for CIFAR-10 used. Geometric operations sample the nearest pixel and fill with grey (128).
    """
    operations = list(dict.fromkeys((n, level) for pair in CIFAR_POLICY for n, _, level in pair))
    numbers = tf.constant(
        [[1 + operations.index((n, level)) for n, _, level in pair] for pair in CIFAR_POLICY]
    )
    chances = tf.constant([[chance for _, chance, _ in pair] for pair in CIFAR_POLICY])

    draws = tf.random.stateless_uniform([5], key)
    chosen = tf.cast(draws[0] * len(CIFAR_POLICY), tf.int32)
    branch_numbers = tf.where(draws[1:3] < chances[chosen], numbers[chosen], 0)
    signs = tf.where(draws[3:5] < 0.5, -1.0, 1.0)
    branches = [lambda image, sign: tf.identity(image)]  # number 0 does not change the image
    branches += [functools.partial(apply_level, name=n, level=level) for n, level in operations]
    for branch, sign in zip(tf.unstack(branch_numbers), tf.unstack(signs), strict=True):
        image = randaugment.choose(branch, branches, image, sign=sign)
    return image
