"""AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019, arXiv 1805.09501)."""

import functools

import tensorflow as tf

from mixer.data import randaugment as ops

# Twenty-five sub-policies of two operations: (name, probability, level 0 to 9). Some take no level.
CIFAR_POLICY = (
    (("invert", 0.1, None), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, None), ("equalize", 0.9, None)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, None), ("equalize", 0.5, None)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, None), ("auto_contrast", 0.4, None)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, None)),
    (("equalize", 0.2, None), ("auto_contrast", 0.6, None)),
    (("equalize", 0.2, None), ("equalize", 0.6, None)),
    (("color", 0.9, 9), ("equalize", 0.6, None)),
    (("auto_contrast", 0.8, None), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, None)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, None), ("solarize", 0.8, 3)),
    (("equalize", 0.8, None), ("invert", 0.1, None)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, None)),
)


def apply_level(image, name, level, sign):
    """One operation at a level of 0 to 9, as strong as the common PyTorch implementations make it.

    Args:
      image: (H, W, 3) uint8.
      name: the operation.
      level: 0 (weakest) to 9; ranges over the levels are linear. None where it takes none.
      sign: -1.0 or 1.0, of what goes either way: geometry, and enhancing about factor 1.
    """
    operation = getattr(ops, name)
    if level is None:
        return operation(image)
    share = level / 9
    match name:
        case "rotate":
            return operation(image, sign * (30 * share))
        case "shear_x" | "shear_y":
            return operation(image, sign * (0.3 * share))
        case "translate_x" | "translate_y":
            side = tf.cast(tf.shape(image)[0 if name == "translate_y" else 1], tf.float32)
            return operation(image, sign * (150 / 331 * share) * side)
        case "brightness" | "color" | "contrast" | "sharpness":
            return operation(image, 1 + sign * (0.9 * share))
        case "posterize":
            return operation(image, round(8 - 4 * share))
        case "solarize":
            return operation(image, round(256 * (1 - share)))
    raise ValueError(f"{name} takes no level")


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
