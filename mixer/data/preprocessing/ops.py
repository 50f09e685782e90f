"""Declares the preprocessing ops: their arguments, and where the functions are that compute them.

This module imports neither TensorFlow nor JAX.
"""

import dataclasses
import enum
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from mixer.sizes import RGB_CHANNELS

MOST_SIDE = 8192  # pixels; a square image of this side takes 0.8 GB as float32
MOST_PADDING = 1024
MOST_CHANNELS = 1024
MAX_CLASSES = 1 << 20


# Rules for the arguments of ops.


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that an argument may have.

    Attributes:
      accepts: returns whether a value is valid.
      refusal: the error for invalid values; it follows "argument=value is".
    """

    accepts: Callable[[Any], bool]
    refusal: str


def _number(low: float, high: float, meaning: str = "a number") -> Rule:
    return Rule(
        lambda value: type(value) in (int, float) and low <= value <= high,  # False for NaN
        f"not between {low} and {high} ({meaning})",
    )


def _integer(low: int, high: int) -> Rule:
    return Rule(
        lambda value: type(value) is int and low <= value <= high,
        f"not between {low} and {high} (a whole number)",
    )


def _choice(*values: Any) -> Rule:
    *first, last = map(repr, values)
    refusal = f"neither {', '.join(first)} nor {last}"
    return Rule(lambda value: any(type(value) is type(v) and value == v for v in values), refusal)


_SIDE = _integer(1, MOST_SIDE)
_SIDES = Rule(
    lambda value: (
        _SIDE.accepts(value)
        or (isinstance(value, tuple | list) and len(value) == 2 and all(map(_SIDE.accepts, value)))
    ),
    f"neither a side between 1 and {MOST_SIDE} (a whole number) nor two of them, (height, width)",
)
_SHARE = _number(0, 1)
_AREA = _number(1e-6, 1, "a share of the image, not percent")
_DCT = _choice("fast", "accurate")
_FLAG = _choice(False, True)
_METHOD = _choice(
    *("area", "bicubic", "bilinear", "gaussian", "lanczos3", "lanczos5", "mitchellcubic"),
    "nearest",
)
_SEED = _integer(0, (1 << 63) - 1)
_LEVEL = _number(-1e6, 1e6)
_FILL = Rule(
    lambda value: value == "noise" or (type(value) is int and 0 <= value <= 255),
    "neither 'noise' nor a value 0 to 255",
)


# The registry.

REQUIRED = inspect.Parameter.empty


class Kind(enum.Enum):
    """The kinds of ops that other rules of a specification distinguish."""

    DECODING = "takes the bytes of the file; the first op must be of this kind"
    WINDOW = "cuts out a window, which must fit into the image"
    PERMUTATION = "reorders the pixels of images of one size"
    POLICY = "draws from many operations, which is expensive"
    RANGE = "converts the pixels to floats; must be the last op on the image"
    LABEL = "changes the label"
    OTHER = "none of these"


@dataclasses.dataclass(frozen=True)
class Op:
    """The declaration of an op.

    Attributes:
      name: name of the op in a specification, and of the functions that compute it.
      arguments: for each argument, in order, its rule and its default (or REQUIRED).
      kind: kind of the op.
      random: whether the op draws random numbers from a key.
      host: module of this package with the host's function. It takes the image (for a LABEL op, the
        example), the `key` if the op is random, and the arguments.
      device: module with the device's function. It takes a batch of images, the `keys` if the op is
        random, and the same arguments. None: the op always runs on the host.
      ascending: two arguments, the first of which must not be larger than the second.
      needs_rgb: whether the op is only for images with 3 channels.
    """

    name: str
    arguments: dict[str, tuple[Rule, Any]] = dataclasses.field(default_factory=dict)
    kind: Kind = Kind.OTHER
    random: bool = False
    host: str = "host"
    device: str | None = None
    ascending: tuple[str, str] | None = None
    needs_rgb: bool = False

    @property
    def signature(self) -> inspect.Signature:
        """The arguments as a Python signature."""
        return inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
                for name, (_, default) in self.arguments.items()
            ]
        )

    @property
    def host_function(self) -> Callable:
        """The host's function; access imports TensorFlow."""
        return getattr(importlib.import_module(f"{__package__}.{self.host}"), self.name)

    @property
    def device_function(self) -> Callable:
        """The device's function, if the op has one; access imports JAX."""
        return getattr(importlib.import_module(f"{__package__}.{self.device}"), self.name)


_SIZE = {"size": (_SIDE, REQUIRED)}
_SIZES = {"size": (_SIDES, REQUIRED)}
_AREAS = ("min_area", "max_area")
_PUBLISHED = {"published": (_FLAG, False)}
_RESIZING = {"antialias": (_FLAG, False)} | _PUBLISHED
_CHANNELS = {"channels": (_integer(1, MOST_CHANNELS), RGB_CHANNELS)}

OPS = {
    op.name: op
    for op in (
        Op("decode", {"dct": (_DCT, "fast")} | _CHANNELS, Kind.DECODING, host="decoding"),
        Op(
            "inception_crop",
            _SIZES
            | {"min_area": (_AREA, 0.05), "max_area": (_AREA, 1.0), "dct": (_DCT, "fast")}
            | _PUBLISHED
            | _CHANNELS,
            Kind.DECODING,
            random=True,
            ascending=_AREAS,
        ),
        Op("resize", _SIZES | {"method": (_METHOD, "bilinear")} | _RESIZING),
        Op("resize_small", _SIZE | {"method": (_METHOD, "area")} | _RESIZING),
        Op("central_crop", _SIZES, Kind.WINDOW, device="device"),
        Op(
            "random_crop",
            _SIZES | {"pad": (_integer(0, MOST_PADDING), 0)},
            Kind.WINDOW,
            random=True,
            device="device",
        ),
        Op("flip_lr", random=True, device="device"),
        Op(
            "random_affine",
            {
                "degrees": (_number(0, 360), 0.0),
                "translate": (_number(0, MOST_SIDE), 0.0),
                "scale": (_number(0, 5), 0.0),
                "shear": (_number(0, 10), 0.0),
            },
            random=True,
            device="device",
        ),
        Op(
            "randaugment",
            {
                "num_layers": (_integer(0, 16), 2),
                "magnitude": (_number(0, 30), 10),
                "mode": (_choice("faithful", "fixed", "published"), "faithful"),
            },
            Kind.POLICY,
            random=True,
            host="randaugment",
            device="device_policies",
            needs_rgb=True,
        ),
        Op(
            "autoaugment_cifar",
            kind=Kind.POLICY,
            random=True,
            host="autoaugment",
            device="device_policies",
            needs_rgb=True,
        ),
        Op(
            "random_erasing",
            {
                "prob": (_SHARE, 0.25),
                "min_area": (_AREA, 0.02),
                "max_area": (_AREA, 1 / 3),
                "min_aspect": (_number(1e-6, 1), 0.3),
                "fill": (_FILL, "noise"),
            },
            random=True,
            ascending=_AREAS,
            device="device",
        ),
        Op(
            "permute_patches",
            _SIZES | {"patch_size": (_SIDES, REQUIRED), "seed": (_SEED, 0)},
            Kind.PERMUTATION,
            device="device",
        ),
        Op("permute_pixels", _SIZES | {"seed": (_SEED, 0)}, Kind.PERMUTATION, device="device"),
        Op(
            "value_range",
            {"low": (_LEVEL, -1.0), "high": (_LEVEL, 1.0)},
            Kind.RANGE,
            ascending=("low", "high"),
            device="device",
        ),
        Op(
            "one_hot",
            {
                "num_classes": (_integer(1, MAX_CLASSES), REQUIRED),
                "on": (_SHARE, 1.0),
                "off": (_SHARE, 0.0),
            },
            Kind.LABEL,
        ),
    )
}
