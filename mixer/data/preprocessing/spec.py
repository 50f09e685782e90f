"""Parses and checks specifications of preprocessing ops.

A specification is text such as "decode|random_crop(32, pad=4)|flip_lr": calls of ops, joined by
"|". `parse` checks all of it before any data is opened, and returns a `Specification`. This module
imports neither TensorFlow nor JAX.
"""

import ast
import dataclasses
from typing import Any

from mixer import sizes
from mixer.data.preprocessing.ops import OPS, Kind, Op
from mixer.errors import UserError, check_choice


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
    def channels(self) -> int | None:
        """Number of channels of the images; None for a part without the op that decodes them."""
        return self.calls[0].arguments.get("channels") if self.calls else None

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
    spec: str | Specification,
    image_size: tuple[int | None, int | None] = (None, None),
    *,
    channels: int | None = None,
) -> Specification:
    """Parses the text of a specification such as "decode|random_crop(32, pad=4)|flip_lr".

    Args:
      spec: the text; for a parsed specification, only `image_size` and `channels` are checked.
      image_size: required (H, W) of the preprocessed images; None: any.
      channels: required number of channels of the images; None: any.

    Raises:
      UserError: an op is unknown, an argument is invalid, the order of ops is invalid, an op needs
        RGB images, or images have another size or another number of channels.
    """
    if isinstance(spec, str):
        try:
            calls = tuple(_make_call(text, place) for place, text in enumerate(spec.split("|")))
            _check_order(calls)
            _check_sizes(calls)
            _check_channels(calls)
        except ValueError as error:
            raise UserError(f"preprocessing {spec!r}: {error}") from None
        spec = Specification(calls)
    output_size = spec.image_size
    if output_size and any(side not in (output_size[i], None) for i, side in enumerate(image_size)):
        height, width = image_size
        raise UserError(
            f"preprocessing {str(spec)!r} produces images of {output_size[0]} x {output_size[1]}; "
            f"expected image_size={height if height == width else image_size}"
        )
    if channels not in (None, spec.channels):
        raise UserError(
            f"preprocessing {str(spec)!r} produces images of {spec.channels} channel(s); expected "
            f"model.in_channels={channels}"
        )
    return spec


def with_channels(spec: str, channels: int) -> str:
    """Returns a specification whose images have `channels` channels, as its decoding op says.

    A text that gives the op's argument `channels` itself, an empty text, and a text for the default
    of 3 channels (RGB) do not change.

    Raises:
      UserError: as in `parse`.
    """
    if not spec or channels == sizes.RGB_CHANNELS:
        return spec
    decoding, *later_calls = parse(spec).calls
    node = _parse_text(decoding.text)
    names = {keyword.arg for keyword in node.keywords}
    if len(node.args) == len(decoding.arguments) or "channels" in names:
        return spec
    node.keywords.append(ast.keyword("channels", ast.Constant(channels)))
    return str(parse("|".join([ast.unparse(node), *(call.text for call in later_calls)])))


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
        raise ValueError(f"{name}: an argument is given twice")
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
        raise ValueError("decode must occur once, as the first op")
    on_image = [call for call in calls if call.op.kind is not Kind.LABEL]
    if any(call.op.kind is Kind.RANGE for call in on_image[:-1]):
        raise ValueError("no image op may follow value_range")


def _check_channels(calls: tuple[Call, ...]) -> None:
    channels = calls[0].arguments["channels"]
    for call in calls:
        if call.op.needs_rgb and channels != sizes.RGB_CHANNELS:
            raise ValueError(
                f"{call.op.name} needs RGB images; the images have {channels} channel(s), as in "
                f"model.in_channels={channels}"
            )


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
        sides = sizes.pair(size)
        if call.op.kind is Kind.WINDOW:
            padding = 2 * call.arguments.get("pad", 0)
            if short_side and min(sides) > short_side + padding:
                room = short_side + padding
                raise ValueError(f"{name}: size={size} is larger than the image, {room} pixels")
            if image_size and any(
                side > room + padding for side, room in zip(sides, image_size, strict=True)
            ):
                room = " x ".join(str(side + padding) for side in image_size)
                raise ValueError(f"{name}: size={size} is larger than the image, {room}")
        if call.op.kind is Kind.PERMUTATION and image_size not in (None, sides):
            raise ValueError(
                f"{name}: size={size} differs from the image, {image_size[0]} x {image_size[1]}"
            )
        patch_size = call.arguments.get("patch_size", 1)
        if any(side % patch for side, patch in zip(sides, sizes.pair(patch_size), strict=True)):
            raise ValueError(
                f"{name}: patches of {sizes.text(patch_size)} pixels do not divide {sides[0]} x "
                f"{sides[1]}"
            )
        image_size, short_side = (None if name == "resize_small" else sides), min(sides)
    return image_size
