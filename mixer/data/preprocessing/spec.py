"""Declares the preprocessing ops and parses specifications of them.

A specification is text such as "decode|random_crop(32, pad=4)|flip_lr": calls of ops, joined by
"|". `parse` checks all of it before any data is opened, and returns a `Specification`. This module
imports neither TensorFlow nor JAX.
"""

import ast
import dataclasses
import enum
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from mixer.errors import UserError, check_choice

MOST_SIDE = 8192  # pixels; a square image of this side takes 0.8 GB as float32
MOST_PADDING = 1024
MOST_CLASSES = 1 << 20


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
    WINDOW = "cuts out a square, which must fit into the image"
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
    """

    name: str
    arguments: dict[str, tuple[Rule, Any]] = dataclasses.field(default_factory=dict)
    kind: Kind = Kind.OTHER
    random: bool = False
    host: str = "host"
    device: str | None = None
    ascending: tuple[str, str] | None = None

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
_RESIZING = {"antialias": (_FLAG, False)}

OPS = {
    op.name: op
    for op in (
        Op("decode", {"dct": (_DCT, "fast")}, Kind.DECODING, host="decoding"),
        Op(
            "inception_crop",
            _SIZES | {"min_area": (_AREA, 0.05), "max_area": (_AREA, 1.0), "dct": (_DCT, "fast")},
            Kind.DECODING,
            random=True,
            ascending=_AREAS,
        ),
        Op("resize", _SIZES | {"method": (_METHOD, "bilinear")} | _RESIZING),
        Op("resize_small", _SIZE | {"method": (_METHOD, "area")} | _RESIZING),
        Op("central_crop", _SIZE, Kind.WINDOW, device="device"),
        Op(
            "random_crop",
            _SIZE | {"pad": (_integer(0, MOST_PADDING), 0)},
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
                "mode": (_choice("faithful", "fixed"), "faithful"),
            },
            Kind.POLICY,
            random=True,
            host="randaugment",
            device="device_policies",
        ),
        Op(
            "autoaugment_cifar",
            kind=Kind.POLICY,
            random=True,
            host="autoaugment",
            device="device_policies",
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
            _SIZES | {"patch_size": (_SIDE, REQUIRED), "seed": (_SEED, 0)},
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
                "num_classes": (_integer(1, MOST_CLASSES), REQUIRED),
                "on": (_SHARE, 1.0),
                "off": (_SHARE, 0.0),
            },
            Kind.LABEL,
        ),
    )
}


# Specifications.


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
      op: the op.
      arguments: all arguments by name, including defaults.
      text: text of the call.
      place: index of the call in the specification; the key of a random op depends on it.
    """

    op: Op
    arguments: dict[str, Any]
    text: str
    place: int

    def replace(self, argument: str, value: Any) -> "Call":
        """Returns the call with another, unchecked value of an argument that the text contains."""
        call = _parse_text(self.text)
        place = list(self.op.arguments).index(argument)
        node = ast.parse(repr(value), mode="eval").body
        if place < len(call.args):
            call.args[place] = node
        else:
            next(word for word in call.keywords if word.arg == argument).value = node
        arguments = self.arguments | {argument: value}
        return dataclasses.replace(self, arguments=arguments, text=ast.unparse(call))


@dataclasses.dataclass(frozen=True)
class Specification:
    """A sequence of calls; `str()` returns its text. An empty specification is false."""

    calls: tuple[Call, ...] = ()

    def __str__(self) -> str:
        return "|".join(call.text for call in self.calls)

    def __bool__(self) -> bool:
        return bool(self.calls)

    def of_kind(self, kind: Kind) -> tuple[Call, ...]:
        """Returns the calls of ops of one kind."""
        return tuple(call for call in self.calls if call.op.kind is kind)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the preprocessed images; None if it depends on the images."""
        return _check_sizes(self.calls)

    @property
    def parts(self) -> "Parts":
        """The part for the host, and the part that a device can compute after it.

        The device's part starts at the first op that is random or `value_range` and from which on
        every op has a device function. Ops whose result is the same in every epoch stay on the
        host, as do ops on the label.
        """
        on_image = [call for call in self.calls if call.op.kind is not Kind.LABEL]
        start = 1 + max((n for n, call in enumerate(on_image) if not call.op.device), default=-1)
        while start < len(on_image) and not (
            on_image[start].op.random or on_image[start].op.kind is Kind.RANGE
        ):
            start += 1
        device = on_image[start:]
        host = [call for call in self.calls if call not in device]
        random = next((call.op.name for call in host if call.op.random), None)
        return Parts(Specification(tuple(host)), Specification(tuple(device)), random)

    def with_image_op(self, text: str) -> "Specification":
        """Returns the specification with an op appended to the ops on pixels, unless present."""
        texts = [call.text for call in self.calls]
        if text in texts:
            return self
        end = next((call.place for call in self.of_kind(Kind.RANGE)), len(texts))
        return parse("|".join([*texts[:end], text, *texts[end:]]))


@dataclasses.dataclass(frozen=True)
class Parts:
    """The two parts of a specification; calls keep their places, and therefore their keys.

    Attributes:
      host: the ops on the image before the device's first op, and all ops on the label.
      device: the ops on the image that a device computes after them; may be empty.
      random_on_host: name of the first random op of `host`, which makes images differ between
        epochs; None if there is none.
    """

    host: Specification
    device: Specification
    random_on_host: str | None


def parse(
    spec: str | Specification, image_size: tuple[int | None, int | None] = (None, None)
) -> Specification:
    """Parses the text of a specification such as "decode|random_crop(32, pad=4)|flip_lr".

    Args:
      spec: the text; for a parsed specification, only `image_size` is checked.
      image_size: required (H, W) of the preprocessed images; None: any.

    Raises:
      UserError: an op is unknown, an argument is invalid, the order of ops is invalid, or images
        have another size.
    """
    if isinstance(spec, str):
        try:
            calls = tuple(_make_call(text, place) for place, text in enumerate(spec.split("|")))
            _check_order(calls)
            _check_sizes(calls)
        except ValueError as error:
            raise UserError(f"preprocessing {spec!r}: {error}") from None
        spec = Specification(calls)
    made = spec.image_size
    if made and any(side not in (made[i], None) for i, side in enumerate(image_size)):
        height, width = image_size
        raise UserError(
            f"preprocessing {str(spec)!r} produces images of {made[0]} x {made[1]}; expected "
            f"image_size={height if height == width else image_size}"
        )
    return spec


def pixel_range(preprocess: str | None) -> tuple[float, float]:
    """Returns the model's values for the pixel values 0 and 255, from a specification's text.

    They are (-1, 1) unless the text contains `value_range(low, high)`. Other ops are not checked.

    Raises:
      ValueError: the arguments of `value_range` are invalid.
    """
    for text in (preprocess or "").split("|"):
        if text.partition("(")[0].strip() == "value_range":
            arguments = _make_call(text, 0).arguments
            return float(arguments["low"]), float(arguments["high"])
    return -1.0, 1.0


def _make_call(text: str, place: int) -> Call:
    """Parses one call; raises ValueError if it is invalid."""
    call = _parse_text(text)
    name = call.func.id
    check_choice("op", name, OPS)
    op = OPS[name]
    try:
        values = [_literal(node) for node in call.args]
        keywords = {str(word.arg): _literal(word.value) for word in call.keywords}
    except (MemoryError, RecursionError):  # the parser's own limits
        raise _syntax_error(text) from None
    if len(keywords) < len(call.keywords):
        raise ValueError(f"{name}: an argument occurs twice")
    try:
        bound = op.signature.bind(*values, **keywords)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    bound.apply_defaults()
    for key, value in bound.arguments.items():
        rule = op.arguments[key][0]
        if not rule.accepts(value):
            raise ValueError(f"{name}: {key}={value!r} is {rule.refusal}")
    if op.ascending:
        low, high = op.ascending
        if bound.arguments[low] > bound.arguments[high]:
            raise ValueError(
                f"{name}: {low}={bound.arguments[low]!r} is above {high}={bound.arguments[high]!r}"
            )
    return Call(op, bound.arguments, text, place)


def _parse_text(text: str) -> ast.Call:
    """Parses the syntax of a call such as "resize(224, method='area')"; else raises ValueError."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        call = None
    if isinstance(call, ast.Name):
        call = ast.Call(call, [], [])
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise _syntax_error(text)
    return call


def _syntax_error(text: str) -> ValueError:
    return ValueError(f"{text.strip()[:80]!r} is not an op; expected name(arguments)")


@dataclasses.dataclass(frozen=True)
class Code:
    """An expression that is not a literal; it is never evaluated, and no rule accepts it."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Code(ast.unparse(node))


def _check_order(calls: tuple[Call, ...]) -> None:
    if calls[0].op.kind is not Kind.DECODING:
        names = [op.name for op in OPS.values() if op.kind is Kind.DECODING]
        raise ValueError(f"the first op must be {' or '.join(names)}")
    if any(call.op.name == "decode" for call in calls[1:]):
        raise ValueError("decode must be the first op, once")
    on_image = [call for call in calls if call.op.kind is not Kind.LABEL]
    if any(call.op.kind is Kind.RANGE for call in on_image[:-1]):
        raise ValueError("no op on the image may follow value_range")


def _check_sizes(calls: tuple[Call, ...]) -> tuple[int, int] | None:
    """Returns (H, W) of the images after the calls; None if it depends on the images.

    Raises:
      ValueError: a crop or a permutation does not fit the images that the previous calls produce.
    """
    image_size, short_side = None, None  # resize_small determines only the short side
    for call in calls:
        name, size = call.op.name, call.arguments.get("size")
        if size is None:
            continue
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if call.op.kind is Kind.WINDOW:
            room = short_side and short_side + 2 * call.arguments.get("pad", 0)
            if room and size > room:
                raise ValueError(f"{name}: size={size} is larger than the image, {room} pixels")
        if call.op.kind is Kind.PERMUTATION and image_size not in (None, sides):
            raise ValueError(
                f"{name}: size={size} differs from the image, {image_size[0]} x {image_size[1]}"
            )
        patch_size = call.arguments.get("patch_size", 1)
        if any(side % patch_size for side in sides):
            raise ValueError(
                f"{name}: patches of {patch_size} pixels do not divide {sides[0]} x {sides[1]}"
            )
        image_size, short_side = (None if name == "resize_small" else sides), min(sides)
    return image_size
