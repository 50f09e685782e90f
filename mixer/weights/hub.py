"""Writes a folder for the Hugging Face Hub: weights, timm's config.json and a model card.

The names and values in config.json are those of timm 1.0.31 (`timm.models.save_for_hf`), which
opens the folder with `timm.create_model("local-dir:DIR", pretrained=True)`. The JSON sidecar of the
weights is part of the folder, so that `mixer.load` returns what was written.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mixer import files, run_files, sizes
from mixer.data.imagenet import names as imagenet
from mixer.data.preprocessing import spec
from mixer.data.preprocessing.ops import Kind
from mixer.errors import UserError
from mixer.models.registry import ARCHITECTURES
from mixer.parallel import sharding
from mixer.weights import checkpoint, fetch, formats
from mixer.weights.card import Card

WEIGHTS_NAME = fetch.HUB_NAMES[0]
# For weights without a known preprocessing: that of timm's Mixers and of many of its other models.
_DEFAULT_RESIZE = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
# timm's (Pillow's) name of each method of a resize; other methods have no counterpart.
_INTERPOLATIONS = {
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "area": "box",
    "lanczos3": "lanczos",
    "nearest": "nearest",
}


def write_folder(
    path: epath.PathLike,
    arrays: Mapping[str, Any],
    card: Card,
    *,
    license_name: str,
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes the folder atomically.

    Absolute paths in the card and the results are shortened to their last part, because the folder
    will be public.

    Args:
      path: the folder, which does not exist.
      arrays: float32 arrays by published name.
      card: the card of the weights.
      license_name: the license of the weights, as the Hub spells it.
      results: results by split, as `read_results` returns them; their "data" is optional.

    Raises:
      UserError: a value is NaN or infinite, or timm has no such model.
    """
    architecture = ARCHITECTURES[card.architecture]
    if not architecture.timm_class:
        titles = [entry.title for entry in ARCHITECTURES.values() if entry.timm_class]
        raise UserError(
            f"{path}: no Hub folder for {architecture.title}; expected weights of "
            f"{' or '.join(titles)} (convert to .npz instead)"
        )
    dims = card.dimensions
    arrays, card = formats.timm_form(arrays, card, source=path)
    changes = [
        f"`{key}={value}`: timm lacks this option. This folder has `{key}={card.dimensions[key]}`, "
        "and its outputs are equal."
        for key, value in dims.items()
        if value != card.dimensions[key]
    ]
    card = dataclasses.replace(card, source=_without_folder(card.source))
    results = {
        split: summary | {"data": _without_folder(summary.get("data", split))}
        for split, summary in results.items()
    }
    with files.atomic_directory(path) as folder:
        formats.write_file(folder / WEIGHTS_NAME, arrays, card, layout="timm")
        run_files.write_json(folder / "config.json", timm_config(card))
        text = model_card(
            card,
            name=epath.Path(path).name,
            num_params=sharding.num_values(arrays),
            license_name=license_name,
            results=results,
            changes=changes,
        )
        files.write_text(folder / "README.md", text)


def _without_folder(text: str) -> str:
    """Returns text such as "/data/pets val" without the folder of the path that it starts with."""
    return text.rpartition("/")[2] if os.path.isabs(text) else text


def read_results(run: epath.PathLike) -> dict[str, dict[str, Any]]:
    """Returns the results of the weights that `mixer.load` reads from a run, by split.

    Args:
      run: a run or one of its checkpoints. If it keeps a moving average, the results are those of
        the average, under the names of the splits.

    Returns:
      The summaries in the run's results.json; {} if it has no results of this checkpoint.
    """
    step = checkpoint.find_step(run)
    workdir, is_best = step.parent.parent, step.parent.name == "best"
    for name in ("best",) if is_best else ("last", step.name):
        results = run_files.read_results(workdir, name) or {}
        if results.get("step") == int(step.name) and "weights" not in results:
            break
    else:
        return {}
    suffix = "_ema" if checkpoint.saved_params(step, "ema_params") else ""
    return {
        split.removesuffix(suffix): summary
        for split, summary in results.get("splits", {}).items()
        if split.endswith("_ema") == bool(suffix) and {"count", "top1"} <= summary.keys()
    }


# config.json.


def timm_config(card: Card) -> dict[str, Any]:
    """Returns the content of config.json: how timm builds the model and prepares its images.

    "architecture" is a name that timm does not know if it builds no such model by name.
    """
    architecture = ARCHITECTURES[card.architecture]
    arguments = architecture.timm_arguments(card.model(), card.image_size)
    name = timm_name(card)
    first = architecture.stored_name(next(iter(architecture.leaf_names(0))), "timm")
    is_rgb = card.in_channels == sizes.RGB_CHANNELS
    low, high = card.value_range
    if low == high:
        raise UserError(f"preprocessing {card.preprocess!r}: its pixel range is empty")
    config = {
        "architecture": name or architecture.timm_class.rpartition(".")[2],
        "num_classes": card.num_classes,
        "model_args": _model_args(card, arguments, name),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [card.in_channels, *card.image_size],
            "fixed_input_size": True,
            **(_timm_resize(card) or _DEFAULT_RESIZE),
            "mean": [-low / (high - low)] * card.in_channels,
            "std": [1 / (high - low)] * card.in_channels,
            "num_classes": card.num_classes,
            "pool_size": None,
            # timm would convert the kernel of another number of channels, as if it were RGB.
            "first_conv": first.removesuffix(".weight") if is_rgb else None,
            "classifier": "head",
        },
    }
    return config | _labels(card.class_names)


def timm_name(card: Card) -> str | None:
    """Returns the name under which timm builds the model; None: it has none."""
    architecture = ARCHITECTURES[card.architecture]
    arguments = architecture.timm_arguments(card.model(), card.image_size)
    for name, fixed in architecture.timm_models.items():
        if all(arguments[key] == value for key, value in fixed.items()):
            return name
    return architecture.timm_any_model or None


def _model_args(card: Card, arguments: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Returns the arguments that timm's function `name` does not set itself."""
    architecture = ARCHITECTURES[card.architecture]
    fixed = architecture.timm_models.get(name, {})
    args = {key: value for key, value in arguments.items() if fixed.get(key) != value}
    del args["num_classes"]  # it is in pretrained_cfg
    if not names_activation(card):
        del args["act_layer"]
    return args


def names_activation(card: Card) -> bool:
    """Returns whether timm takes the name of an activation, which JSON can hold."""
    return bool(ARCHITECTURES[card.architecture].timm_any_model)


def _labels(class_names: str | tuple[str, ...] | None) -> dict[str, Any]:
    """Returns timm's label names; for a list of ImageNet, its ids and a description of each."""
    if class_names is None:
        return {}
    if isinstance(class_names, tuple):
        return {"label_names": list(class_names)}
    ids, names = imagenet.synsets(class_names), imagenet.class_names(class_names)
    return {
        "label_names": list(ids),
        "label_descriptions": dict(zip(ids, names, strict=True)),
    }


def _calls(card: Card) -> list[spec.Call] | None:
    """Returns the ops on the image of the evaluation preprocessing; None if it is unknown."""
    if card.preprocess is None:
        return None
    try:
        calls = spec.parse(card.preprocess).calls
    except UserError:  # written by a newer version
        return None
    return [call for call in calls if call.op.kind is not Kind.LABEL]


def _timm_resize(card: Card) -> dict[str, Any] | None:
    """Returns timm's resize and crop nearest to the evaluation preprocessing, or None."""
    calls = _calls(card)
    if calls is None or calls[0].op.name != "decode":
        return None
    calls = [call for call in calls[1:] if call.op.kind is not Kind.RANGE]
    resize, size = (calls[0].arguments if calls else {}), card.image_size
    interpolation = _INTERPOLATIONS.get(resize.get("method", "bilinear"))
    if interpolation is None:
        return None
    match [call.op.name for call in calls]:
        case []:  # the images have the size of the model, which timm's resize leaves as it is
            crop_mode, side = "center", size[0]
        case ["resize"]:
            crop_mode, side = "squash", size[0]
        case [_, "central_crop"] if size[0] != size[1]:
            return None
        case ["resize", "central_crop"] if isinstance(resize["size"], int):
            crop_mode, side = "squash", resize["size"]
        case ["resize_small", "central_crop"]:
            crop_mode, side = "center", resize["size"]
        case _:
            return None
    crop_pct = size[0] / side
    while math.floor(size[0] / crop_pct) < side:  # timm's form of the resized side
        crop_pct = math.nextafter(crop_pct, 0)
    return {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}


def _preprocessing_note(card: Card) -> str:
    """Returns how timm's preprocessing differs from that of the weights; "" if it does not."""
    calls = _calls(card)
    if calls is None:
        return (
            "Preprocessing: that of these weights is unknown. config.json has a bicubic resize and "
            "a centre crop."
        )
    if _timm_resize(card) is None:
        return (
            f"Preprocessing: config.json has no form of `{card.preprocess}`; it has a bicubic "
            "resize and a centre crop, with the pixel range of these weights."
        )
    resizes = [call.arguments for call in calls if "method" in call.arguments]
    if not resizes:
        height, width = card.image_size
        return (
            f"Preprocessing: these weights take images of {height} x {width} pixels as they are. "
            "timm resizes images of any other size."
        )
    arguments = resizes[0]
    is_exact = arguments["antialias"] and arguments["method"] in ("bilinear", "bicubic")
    if is_exact and calls[0].arguments["dct"] == "accurate":
        return ""
    return (
        f"Preprocessing: timm decodes and resizes with Pillow, which antialiases. "
        f"`{card.preprocess}` gives slightly different pixels, and so other logits."
    )


# The model card.


def model_card(
    card: Card,
    *,
    name: str,
    num_params: int,
    license_name: str,
    results: Mapping[str, Mapping[str, Any]],
    changes: Sequence[str] = (),
) -> str:
    """Returns the text of the model card, README.md. `changes` describes changed options."""
    parts = [
        _front_matter(card, name=name, license_name=license_name, results=results),
        f"# {name}",
        _description(card, num_params),
        *(["## Results", _results_table(results)] if results else []),
        "## Preprocessing",
        _preprocessing(card),
        "## Usage",
        _usage(card),
        "## Usage in timm",
        _timm_usage(card),
        "## What timm cannot express",
        _timm_limits(card, changes),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(
    card: Card, *, name: str, license_name: str, results: Mapping[str, Mapping[str, Any]]
) -> str:
    """Returns the card's metadata in YAML, of which a JSON string is a valid scalar."""
    title = ARCHITECTURES[card.architecture].title
    lines = [
        f"license: {license_name}",
        f"library_name: {'timm' if timm_name(card) else 'jax'}",
        "pipeline_tag: "
        + ("image-classification" if card.num_classes else "image-feature-extraction"),
        "tags:",
        *(f"- {tag}" for tag in (title.lower(), "jax", "flax")),
    ]
    if results:
        lines += [
            "model-index:",
            f"- name: {_yaml(name)}",
            "  results:",
        ]
    for split, summary in results.items():
        lines += [
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {_yaml(summary['data'])}",
            f"      type: {_yaml(split)}",
            "    metrics:",
            "    - type: accuracy",
            f"      value: {summary['top1']:.6g}",
        ]
    return "\n".join(["---", *lines, "---"])


def _yaml(text: str) -> str:
    return json.dumps(text)


def _description(card: Card, num_params: int) -> str:
    title, (height, width) = ARCHITECTURES[card.architecture].title, card.image_size
    dims = ", ".join(f"{key} {_number(value)}" for key, value in card.dimensions.items())
    lines = [
        f"- Model: {title}{f' {card.variant}' if card.variant else ''} ({dims})",
        f"- Parameters: {num_params:,} (float32)",
        f"- Images: {height} x {width} pixels",
        f"- Classes: {card.num_classes:,}" if card.num_classes else "- Classes: none (no head)",
        f"- GELU: {card.gelu}",
        f"- Source: {card.source}",
    ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        "| split | images | top-1 | 95 % interval | top-5 | loss |",
        "|---|---|---|---|---|---|",
    ]
    for split, summary in results.items():
        low, high = summary.get("top1_interval") or (None, None)
        loss = summary.get("loss")
        cells = (
            split,
            f"{summary['count']:,}",
            _percent(summary["top1"]),
            "" if low is None else f"{_percent(low)} to {_percent(high)}",
            _percent(summary.get("top5")),
            "" if loss is None else f"{loss:.4f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    notes = [
        f"`{split}` is {summary['data']}."
        for split, summary in results.items()
        if summary["data"] != split
    ]
    return "\n".join(rows) + "\n\nIntervals are Wilson's." + "".join(f" {note}" for note in notes)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _preprocessing(card: Card) -> str:
    low, high = card.value_range
    channels = {1: "grey", 3: "RGB"}.get(card.in_channels, f"{card.in_channels} channels")
    lines = [f"The model takes pixels in [{low:g}, {high:g}], {channels}."]
    if card.preprocess is not None:
        lines.append(f"Evaluation preprocessing: `{card.preprocess}`.")
    return " ".join(lines)


def _usage(card: Card) -> str:
    shape = ", ".join(map(str, (*card.image_size, card.in_channels)))
    return "\n".join(
        [
            "```python",
            "import mixer",
            "",
            'model, params = mixer.load("hf://OWNER/NAME")  # or a local copy of this folder',
            f'logits, out = model.apply({{"params": params}}, images)  # (N, {shape})',
            "```",
        ]
    )


def _timm_usage(card: Card) -> str:
    if timm_name(card):
        arguments, imports = "pretrained=True", ["import timm"]
        if card.gelu == "tanh" and not names_activation(card):
            arguments += ', act_layer=timm.layers.get_act_layer("gelu_tanh")'
            imports.append("import timm.layers")
        code = [*imports, "", f'model = timm.create_model("hf-hub:OWNER/NAME", {arguments})']
        text = 'For a local copy, `"local-dir:DIR"` takes the place of `"hf-hub:OWNER/NAME"`.'
    else:
        architecture = ARCHITECTURES[card.architecture]
        module, _, _ = architecture.timm_class.rpartition(".")
        arguments = architecture.timm_arguments(card.model(), card.image_size)
        activation = arguments.pop("act_layer")
        code = [
            "import safetensors.torch",
            "import timm.layers",
            f"import {module}",
            "",
            f"model = {architecture.timm_class}(",
            *(f"    {key}={value!r}," for key, value in arguments.items()),
            f'    act_layer=timm.layers.get_act_layer("{activation}"),',
            ")",
            f'model.load_state_dict(safetensors.torch.load_file("{WEIGHTS_NAME}"))',
        ]
        text = ""
    low, high = card.value_range
    shape = ", ".join(map(str, (card.in_channels, *card.image_size)))
    code += [
        "model.eval()",
        f"logits = model(images)  # (N, {shape}), pixels in [{low:g}, {high:g}]",
    ]
    return "\n".join(["```python", *code, "```"] + ["", text] * bool(text))


def _timm_limits(card: Card, changes: Sequence[str]) -> str:
    limits = list(changes)
    if timm_name(card) is None:
        limits.append(
            "Dimensions: timm has no name for them, so `timm.create_model` cannot open this folder "
            "(`Unknown model`). The code above builds the model from timm's class."
        )
    elif card.gelu == "tanh" and not names_activation(card):
        limits.append(
            "GELU: these weights need the tanh form. config.json cannot name an activation, and "
            "without `act_layer` timm computes the erf form: the logits then differ."
        )
    if note := _preprocessing_note(card):
        limits.append(note)
    return "\n".join(f"- {limit}" for limit in limits) or (
        "Nothing: for the same pixels, timm's logits equal ours up to float32 rounding. For the "
        "same image file, rounding in the resize changes some pixels by 1 or 2 of 255 levels."
    )
