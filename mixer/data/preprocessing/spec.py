"""The ops of preprocessing, `name(arguments)` joined by "|", and what their arguments may be.

A specification is checked here as a whole, before any data is opened. No TensorFlow here.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from mixer.errors import UserError, check_choice

MOST_SIDE = 8192  # pixels of an image; as float32 one takes 0.8 GB
MOST_PADDING = 1024
MOST_CLASSES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an argument may be.

    Attributes:
      accepts: from a literal to whether it may.
      refusal: what the other literals are; it follows "argument=value is".
    """

    accepts: Callable[[Any], bool]
    refusal: str


def _number(low: float, high: float, what: str = "a number") -> Kind:
    return Kind(
        lambda value: type(value) in (int, float) and low <= value <= high,  # NaN is not
        f"not between {low} and {high} ({what})",
    )


def _whole(low: int, high: int) -> Kind:
    return Kind(
        lambda value: type(value) is int and low <= value <= high,
        f"not between {low} and {high} (a whole number)",
    )


def _choice(*values: Any) -> Kind:
    *most, last = map(repr, values)
    refusal = f"neither {', '.join(most)} nor {last}"
    return Kind(lambda value: any(type(value) is type(v) and value == v for v in values), refusal)


_SIDE = _whole(1, MOST_SIDE)
_SIDES = Kind(
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
_SEED = _whole(0, (1 << 63) - 1)
_LEVEL = _number(-1e6, 1e6)
_FILL = Kind(
    lambda value: value == "noise" or (type(value) is int and 0 <= value <= 255),
    "neither 'noise' nor a value 0 to 255",
)


REQUIRED = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Op:
    """The arguments of an op.

    Attributes:
      arguments: by name, in their order: what each may be, and its default or REQUIRED.
      ascending: two of them, of which the first must not be larger than the second.
    """

    arguments: dict[str, tuple[Kind, Any]] = dataclasses.field(default_factory=dict)
    ascending: tuple[str, str] | None = None

    @property
    def signature(self) -> inspect.Signature:
        """The arguments as Python binds them."""
        return inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
                for name, (_, default) in self.arguments.items()
            ]
        )


_AREAS = ("min_area", "max_area")
# mixer/data/preprocessing/host.py computes them on the host, and mixer/data/preprocessing/device.py
# some on the device.
OPS = {
    "decode": Op({"dct": (_DCT, "fast")}),
    "inception_crop": Op(
        {
            "size": (_SIDES, REQUIRED),
            "min_area": (_AREA, 0.05),
            "max_area": (_AREA, 1.0),
            "dct": (_DCT, "fast"),
        },
        ascending=_AREAS,
    ),
    "resize": Op(
        {
            "size": (_SIDES, REQUIRED),
            "method": (_METHOD, "bilinear"),
            "antialias": (_FLAG, False),
        }
    ),
    "resize_small": Op(
        {"size": (_SIDE, REQUIRED), "method": (_METHOD, "area"), "antialias": (_FLAG, False)}
    ),
    "central_crop": Op({"size": (_SIDE, REQUIRED)}),
    "random_crop": Op({"size": (_SIDE, REQUIRED), "pad": (_whole(0, MOST_PADDING), 0)}),
    "flip_lr": Op(),
    "random_affine": Op(
        {
            "degrees": (_number(0, 360), 0.0),
            "translate": (_number(0, MOST_SIDE), 0.0),
            "scale": (_number(0, 5), 0.0),
            "shear": (_number(0, 10), 0.0),
        }
    ),
    "randaugment": Op(
        {
            "num_layers": (_whole(0, 16), 2),
            "magnitude": (_number(0, 30), 10),
            "mode": (_choice("faithful", "fixed"), "faithful"),
        }
    ),
    "autoaugment_cifar": Op(),
    "random_erasing": Op(
        {
            "prob": (_SHARE, 0.25),
            "min_area": (_AREA, 0.02),
            "max_area": (_AREA, 1 / 3),
            "min_aspect": (_number(1e-6, 1), 0.3),
            "fill": (_FILL, "noise"),
        },
        ascending=_AREAS,
    ),
    "permute_patches": Op(
        {"size": (_SIDES, REQUIRED), "patch_size": (_SIDE, REQUIRED), "seed": (_SEED, 0)}
    ),
    "permute_pixels": Op({"size": (_SIDES, REQUIRED), "seed": (_SEED, 0)}),
    "value_range": Op({"low": (_LEVEL, -1.0), "high": (_LEVEL, 1.0)}, ascending=("low", "high")),
    "one_hot": Op(
        {
            "num_classes": (_whole(1, MOST_CLASSES), REQUIRED),
            "on": (_SHARE, 1.0),
            "off": (_SHARE, 0.0),
        }
    ),
}
DECODING = ("decode", "inception_crop")  # one of them comes first
LABEL_OPS = ("one_hot",)  # the others are on the image


@dataclasses.dataclass(frozen=True)
class Step:
    """One op of a specification.

    Attributes:
      text: as it was written.
      name: of the op.
      arguments: all of them by name, those not given having their defaults.
    """

    text: str
    name: str
    arguments: dict[str, Any]


def parse(spec: str, image_size: tuple[int | None, int | None] = (None, None)) -> list[Step]:
    """The steps of a specification such as "decode|random_crop(32, pad=4)|flip_lr".

    Args:
      spec: steps joined by "|".
      image_size: (H, W) that the images must have in the end; None: any.

    Raises:
      UserError: an unknown op, arguments that are wrong or out of range, an order that cannot be,
        or images of another size.
    """
    try:
        steps = [_parse_step(text) for text in spec.split("|")]
        _check_order(steps)
        made = _image_size(steps)
    except ValueError as error:
        raise UserError(f"preprocessing {spec!r}: {error}") from None
    if made and any(side not in (made[i], None) for i, side in enumerate(image_size)):
        height, width = image_size
        raise UserError(
            f"preprocessing {spec!r} gives no images of image_size="
            f"{height if height == width else image_size}: it makes them {made[0]} x {made[1]}"
        )
    return steps


def _parse_step(text: str) -> Step:
    """One step; ValueError says what is wrong with it."""
    name, args, kwargs = parse_call(text)
    check_choice("op", name, OPS)
    op = OPS[name]
    try:
        bound = op.signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    bound.apply_defaults()
    for key, value in bound.arguments.items():
        if not op.arguments[key][0].accepts(value):
            raise ValueError(f"{name}: {key}={value!r} is {op.arguments[key][0].refusal}")
    if op.ascending:
        low, high = op.ascending
        if bound.arguments[low] > bound.arguments[high]:
            raise ValueError(
                f"{name}: {low}={bound.arguments[low]!r} is above {high}={bound.arguments[high]!r}"
            )
    return Step(text.strip(), name, bound.arguments)


def _check_order(steps: list[Step]) -> None:
    names = [step.name for step in steps if step.name not in LABEL_OPS]
    if steps[0].name not in DECODING:
        raise ValueError(f"the first step must be {' or '.join(DECODING)}")
    if "decode" in names[1:]:
        raise ValueError("decode must be the first step, once")
    if "value_range" in names[:-1]:
        raise ValueError("no step on the image may follow value_range")


def _image_size(steps: list[Step]) -> tuple[int, int] | None:
    """(H, W) of the images after the steps; None where theirs matters.

    Raises:
      ValueError: a crop, or an order of pixels, that does not fit what the steps before it leave.
    """
    size, short = None, None  # (H, W); the short side is also known after resize_small
    for step in steps:
        of_step = step.arguments.get("size")
        sides = (of_step, of_step) if isinstance(of_step, int) else tuple(of_step or ())
        if step.name.endswith("_crop") and step.name not in DECODING:
            room = short and short + 2 * step.arguments.get("pad", 0)
            if room and of_step > room:
                raise ValueError(f"{step.name}: size={of_step} is more than the {room} pixels left")
        if step.name.startswith("permute_") and size not in (None, sides):
            raise ValueError(
                f"{step.name}: size={of_step} is not that of the image, {size[0]} x {size[1]}"
            )
        patch_size = step.arguments.get("patch_size", 1)
        if sides and any(side % patch_size for side in sides):
            raise ValueError(
                f"{step.name}: patches of {patch_size} pixels do not divide {sides[0]} x {sides[1]}"
            )
        if step.name == "resize_small":
            size, short = None, of_step
        elif sides:
            size, short = sides, min(sides)
    return size


def parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """The name, positional and named arguments of a step such as "resize(224, method='area')".

    An argument that is no literal comes as `Code`, which no op accepts.

    Raises:
      ValueError: it is not of that form.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        args = [_literal(arg) for arg in call.args]
        kwargs = {str(word.arg): _literal(word.value) for word in call.keywords}
        name = call.func.id
    except (SyntaxError, AttributeError, MemoryError, RecursionError):  # the parser's own limits
        raise ValueError(f"{text.strip()[:80]!r} is no step; write name(arguments)") from None
    if len(kwargs) < len(call.keywords):
        raise ValueError(f"{name}: an argument is given twice")
    return name, args, kwargs


@dataclasses.dataclass(frozen=True)
class Code:
    """An expression that is no number, text, tuple or list of these; it is not evaluated."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Code(ast.unparse(node))


def pixel_range(preprocess: str | None) -> tuple[float, float]:
    """What the values 0 and 255 of a pixel become for the model, by the steps `preprocess`.

    It is (-1, 1) unless one of them is `value_range(low, high)`.

    Raises:
      ValueError: a step is not of the form of one.
    """
    for text in (preprocess or "").split("|"):
        if text.strip().startswith("value_range"):
            arguments = _parse_step(text).arguments
            return float(arguments["low"]), float(arguments["high"])
    return -1.0, 1.0
