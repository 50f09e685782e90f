"""AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019, arXiv 1805.09501)."""

import functools

import tensorflow as tf

from mixer.data.preprocessing import randaugment as ops
from mixer.data.preprocessing.policies import CIFAR_POLICY, amount_of_level


def apply_level(image, name, level, sign):
    """One operation at a level of 0 to 9, as strong as `amount_of_level` says.

    Args:
      image: (H, W, 3) uint8.
      name: the operation.
      level: 0 to 9; None where it takes none.
      sign: -1.0 or 1.0, of what goes either way: geometry, and enhancing about factor 1.
    """
    operation = getattr(ops, name)
    if level is None:
        return operation(image)
    amount = amount_of_level(name, level)
    match name:
        case "rotate" | "shear_x" | "shear_y":
            return operation(image, sign * amount)
        case "translate_x" | "translate_y":
            side = tf.cast(tf.shape(image)[0 if name == "translate_y" else 1], tf.float32)
            return operation(image, sign * amount * side)
        case "brightness" | "color" | "contrast" | "sharpness":
            return operation(image, 1 + sign * amount)
    return operation(image, amount)


def autoaugment_cifar(image, key):
    """One of the 25 sub-policies: two operations, each with its own probability and sign.

    What a geometric operation uncovers is grey (128). Levels and ranges are those of the code that
    the CIFAR-10 record used (github.com/DeepVoltaire/AutoAugment); pixels are the nearest ones.
    """
    kinds = sorted({(name, level or 0) for pair in CIFAR_POLICY for name, _, level in pair})
    number = {kind: place for place, kind in enumerate(kinds, start=1)}  # 0 leaves the image as is
    numbers = tf.constant([[number[n, level or 0] for n, _, level in p] for p in CIFAR_POLICY])
    chances = tf.constant([[chance for _, chance, _ in pair] for pair in CIFAR_POLICY])
    levels = {(name, level or 0): level for pair in CIFAR_POLICY for name, _, level in pair}

    draws = tf.random.stateless_uniform([5], key)
    chosen = tf.cast(draws[0] * len(CIFAR_POLICY), tf.int32)
    taken = tf.where(draws[1:3] < chances[chosen], numbers[chosen], 0)
    signs = tf.where(draws[3:5] < 0.5, -1.0, 1.0)
    branches = [lambda image, sign: tf.identity(image)]
    for name, level in kinds:
        branches.append(functools.partial(apply_level, name=name, level=levels[name, level]))
    for which, sign in zip(tf.unstack(taken), tf.unstack(signs), strict=True):
        image = ops.choose(which, branches, image, sign=sign)
    return image
