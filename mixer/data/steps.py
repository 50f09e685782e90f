"""The syntax of preprocessing: steps `name(arguments)` joined by "|". No TensorFlow here."""

import ast
from typing import Any


def parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """The name, positional and named arguments of a step such as "resize(224, method='area')".

    Raises:
      ValueError: it is not of that form, or an argument is no literal.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        return call.func.id, args, kwargs
    except (SyntaxError, AttributeError) as error:
        raise ValueError(f"{text.strip()!r} is no step; write name(arguments)") from error


def pixel_range(preprocess: str | None) -> tuple[float, float]:
    """What the values 0 and 255 of a pixel become for the model, by the steps `preprocess`.

    It is (-1, 1) unless one of them is `value_range(low, high)`.

    Raises:
      ValueError: a step is not of the form of one.
    """
    for text in (preprocess or "").split("|"):
        if text.strip().startswith("value_range"):
            _, args, kwargs = parse_call(text)
            given = dict(zip(("low", "high"), args, strict=False)) | kwargs
            return float(given.get("low", -1)), float(given.get("high", 1))
    return -1.0, 1.0
