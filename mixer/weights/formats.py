"""Weight files: npz in the published or the legacy layout, and safetensors with timm's names.

In every layout an array is identified by its name in the released checkpoints, joined by "/", such
as "MixerBlock_0/token_mixing/Dense_0/kernel".
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from mixer import files
from mixer.errors import UserError, check_choice
from mixer.models.modules import GELUS, count_blocks
from mixer.models.registry import ARCHITECTURES, Architecture
from mixer.weights import foreign
from mixer.weights.arrays import (
    DamagedError,
    Shapes,
    StoredArray,
    check_dtypes,
    describe_non_finite,
    open_npz,
    open_safetensors,
    open_sharded,
    printable_line,
    write_npz,
    write_safetensors,
)
from mixer.weights.card import FORMAT, Card, card_path, checksum, read_card, read_json

# For each layout, the suffix of its files and the GELU form of the code base that defines it.
ENDINGS = {"published": ".npz", "legacy": ".npz", "timm": ".safetensors"}
GELU_OF = {"published": "tanh", "legacy": "tanh", "timm": "erf"}


@dataclasses.dataclass(frozen=True)
class File:
    """An opened weight file; holds names and shapes, and reads each array on request.

    Attributes:
      path: path of the file.
      architecture: key of `mixer.models.registry.ARCHITECTURES`.
      layout: key of ENDINGS.
      shapes: shapes by published name; an array that the layout does not define keeps its own name.
      read: returns the array of such a name, with the published axes, in the file's dtype.
      gelu: GELU form in the file's header; None if the header has none.
      notes: lines for the log on wrappers and arrays that were ignored.
    """

    path: epath.Path
    architecture: str
    layout: str
    shapes: Shapes
    read: Callable[[str], np.ndarray]
    gelu: str | None
    notes: tuple[str, ...]


def open_file(path: epath.PathLike) -> File:
    """Opens a weight file and recognises its layout from the names of its arrays.

    Raises:
      UserError: the file does not exist, is not a weight file, holds another model, or has an
        array with an unsupported dtype.
    """
    path, gelu = epath.Path(path).expanduser(), None
    # A device or a pipe might never end. If the path cannot be opened, reading reports the reason.
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{path} is not a regular file")
    match path.suffix.lower():
        case ".npz":
            arrays = open_npz(path)
        case ".safetensors":
            arrays, metadata = open_safetensors(path)
            gelu = _gelu_in(path, metadata)
        case ".json" if path.name.endswith(foreign.INDEX_ENDING):
            arrays, metadata = open_sharded(path)
            gelu = _gelu_in(path, metadata)
        case _:
            advice = foreign.advice(path)
            raise UserError(advice or f"{path} is not a weight file; expected .npz or .safetensors")
    arrays, notes = _unwrap(arrays)
    name, layout = recognise({name: array.shape for name, array in arrays.items()}, path)
    check_dtypes(arrays, path)

    architecture = ARCHITECTURES[name]
    fields = _read_fields(path)
    stored_names = {}  # published name -> name in the file; several leaves may share an array
    for leaf in architecture.leaf_names(count_blocks(arrays)):
        if (stored := architecture.stored_name(leaf, layout)) in arrays:
            stored_names[leaf] = stored
    stored_names |= {name: name for name in arrays.keys() - set(stored_names.values())}

    def shape(leaf: str) -> tuple[int, ...]:
        # broadcast_to allocates no memory for the array.
        placeholder = np.broadcast_to(np.float32(0), arrays[stored_names[leaf]].shape)
        return architecture.from_layout(leaf, placeholder, layout, fields).shape

    def read(leaf: str) -> np.ndarray:
        return architecture.from_layout(leaf, arrays[stored_names[leaf]].read(), layout, fields)

    shapes = {leaf: shape(leaf) for leaf in stored_names}
    return File(path, name, layout, shapes, read, gelu, notes)


def _gelu_in(path: epath.Path, metadata: Mapping[str, str]) -> str | None:
    """Returns the GELU form in a safetensors header; None if the header has none."""
    gelu = metadata.get("gelu")
    if gelu not in (None, *GELUS):
        expected = ", ".join(GELUS)
        raise DamagedError(path, f"header of {path}: gelu={gelu!r}; expected {expected}")
    return gelu


def _read_fields(path: epath.Path) -> dict[str, Any]:
    """Returns the model's fields in the JSON sidecar of a file, or else in timm's config.json."""
    if (sidecar := read_card(path)) is not None:
        return sidecar
    is_npz = path.suffix.lower() == ".npz"
    values = None if is_npz else read_json(path.with_name("config.json"))
    fields = values.get("model_args") if isinstance(values, dict) else None
    return fields if isinstance(fields, dict) else {}


# Keys under which training programs nest weights, in order of preference: averages come first.
_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module", "_orig_mod")
_WRAPPERS += ("params", "opt/target", "target", "timm_model")  # the last: of transformers


def _first_parts(architecture: Architecture) -> set[str]:
    """Returns the first parts of the stem's and blocks' names, such as "stem" and "blocks"."""
    stem, *other_names = architecture.leaf_names(1)
    block = next(name for name in other_names if name.startswith(architecture.block.format(0)))
    layouts = architecture.layouts
    stored = (architecture.stored_name(name, lay) for name in (stem, block) for lay in layouts)
    return {re.split("[/.]", name)[0] for name in stored}


def _unwrap(arrays: dict[str, StoredArray]) -> tuple[dict[str, StoredArray], tuple[str, ...]]:
    """Extracts the weights from a training program's state; returns (arrays, notes for the log)."""
    first_parts = set().union(*map(_first_parts, ARCHITECTURES.values()))
    notes = []
    while not any(re.split("[/.]", name)[0] in first_parts for name in arrays):
        for wrapper in _WRAPPERS:
            content = {
                name[len(wrapper) + 1 :]: array
                for name, array in arrays.items()
                if name.startswith((f"{wrapper}/", f"{wrapper}."))
            }
            if any(first_parts.intersection(re.split("[/.]", name)) for name in content):
                break
        else:
            break  # no known architecture; `recognise` reports it
        num_ignored = len(arrays) - len(content)
        ignored = f", {num_ignored} other arrays ignored" * bool(num_ignored)
        notes.append(f"taken from {wrapper!r}{ignored}")
        arrays = content
    return arrays, tuple(notes)


def recognise(shapes: Shapes, source: epath.PathLike) -> tuple[str, str]:
    """Returns the architecture and the layout of a file's arrays.

    Args:
      shapes: shapes of the arrays by their names in the file.
      source: path or URL for messages.

    Raises:
      UserError: the arrays are of another model; the message names the model if it is known.
    """
    for name, architecture in ARCHITECTURES.items():
        if layout := architecture.recognise(shapes, source):
            return name, layout
    expected = []
    for architecture in ARCHITECTURES.values():
        first = next(iter(architecture.leaf_names(0)))
        layouts = architecture.layouts
        names = (f"{architecture.stored_name(first, lay)} ({lay} layout)" for lay in layouts)
        expected.append(f"{architecture.title}: {' or '.join(names)}")
    names = ", ".join(map(printable_line, sorted(shapes)[:4])) or "no arrays"
    ending = " ..." if len(shapes) > 4 else ""
    raise UserError(
        f"{source} does not hold weights of a known model: {names}{ending}; {'; '.join(expected)}"
    )


def timm_form(
    arrays: Mapping[str, Any], card: Card, *, source: epath.PathLike
) -> tuple[Mapping[str, Any], Card]:
    """Returns the arrays and the card of an equal model that timm has.

    Raises:
      UserError: timm has no such model; the message names `source`.
    """
    architecture = ARCHITECTURES[card.architecture]
    options, arrays = architecture.timm_form(card.model(), arrays, card.image_size)
    card = dataclasses.replace(card, dimensions={**card.dimensions, **options})
    if architecture.timm_arguments(card.model(), card.image_size) is None:
        options = ", ".join(f"{key}={card.dimensions[key]}" for key in architecture.options)
        raise UserError(f"{source}: timm has no {architecture.title} with {options}")
    return arrays, card


def write_file(
    path: epath.PathLike, arrays: Mapping[str, Any], card: Card, *, layout: str
) -> epath.Path:
    """Writes a weight file and its JSON sidecar atomically.

    The bytes depend only on the arrays. In the timm layout, the file holds `timm_form` of them.

    Args:
      path: path with the suffix that ENDINGS gives for the layout.
      arrays: float32 arrays by published name.
      card: the card that is saved in the JSON, which also contains the arguments of timm's class
        for the same model.
      layout: "published", "legacy" or "timm".

    Returns:
      The path of the JSON.

    Raises:
      UserError: a value is NaN or infinite, the architecture has no such layout, timm has no such
        model, or the suffix belongs to another layout.
    """
    path = epath.Path(path)
    architecture = ARCHITECTURES[card.architecture]
    check_choice("layout", layout, architecture.layouts)
    if path.suffix != ENDINGS[layout]:
        raise UserError(f"{path}: files in the {layout} layout end in {ENDINGS[layout]}")
    if layout == "timm":
        arrays, card = timm_form(arrays, card, source=path)
    timm_arguments = architecture.timm_arguments(card.model(), card.image_size)
    parts: dict[str, dict[str, np.ndarray]] = {}  # the leaves of each array in the file
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if fault := describe_non_finite(array):
            raise UserError(f"{path} is not written: {name} {fault}")
        array = architecture.to_layout(name, array, layout)
        parts.setdefault(architecture.stored_name(name, layout), {})[name] = array
    order = list(architecture.leaf_names(card.num_blocks))
    stored = {
        name: np.concatenate([leaves[leaf] for leaf in sorted(leaves, key=order.index)])
        if len(leaves) > 1
        else next(iter(leaves.values()))
        for name, leaves in parts.items()
    }
    values = {"format": FORMAT, "layout": layout} | card.as_json()
    values["checksum"] = checksum(lambda name: np.asarray(arrays[name]), arrays)
    values["timm"] = timm_arguments
    # The JSON gets its final name first, because arrays without it could be misidentified.
    with files.atomic_write(path) as new, files.atomic_write(card_path(path)) as new_card:
        files.write_text(new_card, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        if layout == "timm":
            # transformers refuses a file whose header has entries but no "format".
            write_safetensors(new, stored, {"format": "pt", "gelu": card.gelu})
        else:
            write_npz(new, stored)
    return card_path(path)
