"""The tables of RandAugment and AutoAugment, and the amounts of their operations.

The host (mixer/data/preprocessing/randaugment.py, autoaugment.py) and the device
(device_policies.py) both use them. This module does not import TensorFlow.
"""

from typing import Any

import numpy as np

FILL = 128  # value of uncovered pixels
# The kernel with which the published code smooths for sharpness.
CONVOLUTION = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")

# The operations of RandAugment (Cubuk et al., 2020), in the order of its draws.
OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "cutout",
    "solarize_add",
)

# AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019, arXiv 1805.09501): 25 sub-policies of two
# operations (name, probability, level). Levels are 0 to 9; None if the operation has no level.
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


def amount_of_magnitude(name: str, magnitude: float, sign: Any, *, mode: str) -> Any:
    """Returns the amount of a RandAugment operation at a magnitude.

    Args:
      name: one of OPERATIONS.
      magnitude: 10 means rotations of 30 degrees, shears of 0.3, shifts of 100 pixels of 224,
        factors of 1.9, a cutout of 80 pixels of 224, 4 bits in posterize, and 110 in solarize_add.
        Amounts are proportional to the magnitude, except for factors, which start at 0.1.
      sign: direction of geometric operations, -1.0 or 1.0; a number or an array.
      mode: "faithful", "fixed" or "published". Unless it is "fixed", the threshold of solarize
        wraps modulo 256, as in the published recipe.

    Returns:
      Degrees, a slope or a share of the side, all with the sign; a number of bits, a threshold, an
      addition, half of cutout's side as a share of the width, or a factor. Lengths are in pixels
      instead of shares if `mode` is "published". None if the operation has no amount.
    """
    share = magnitude / 10
    side = 1 if mode == "published" else 224
    threshold = int(256 * share)
    factor = 0.1 + 1.8 * share
    amount = {
        "rotate": 30 * share,
        "shear_x": 0.3 * share,
        "shear_y": 0.3 * share,
        "translate_x": 100 / side * share,
        "translate_y": 100 / side * share,
        "posterize": int(4 * share),
        "solarize": min(threshold, 256) if mode == "fixed" else threshold % 256,
        "solarize_add": int(110 * share),
        "cutout": int(40 * share) / side,
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
    }.get(name)
    return sign * amount if name in GEOMETRY else amount


def amount_of_level(name: str, level: int | None, sign: Any) -> Any:
    """Returns the amount of an AutoAugment operation at a level.

    Amounts are those of the common PyTorch implementations.

    Args:
      name: an operation of CIFAR_POLICY.
      level: 0 (weakest) to 9; amounts are linear in it. None if the operation has no level.
      sign: direction of geometric operations and of factors, -1.0 or 1.0; a number or an array.

    Returns:
      As `amount_of_magnitude`.
    """
    if level is None:
        return None
    share = level / 9
    amount = {
        "rotate": 30 * share,
        "shear_x": 0.3 * share,
        "shear_y": 0.3 * share,
        "translate_x": 150 / 331 * share,
        "translate_y": 150 / 331 * share,
        "posterize": round(8 - 4 * share),
        "solarize": round(256 * (1 - share)),
    }.get(name)
    if amount is None:  # color, contrast, brightness, sharpness: a factor around 1
        return 1 + sign * (0.9 * share)
    return sign * amount if name in GEOMETRY else amount
