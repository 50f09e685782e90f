"""Files of weights: the published npz layout, the legacy one, and timm's names in safetensors.

Whatever the layout, arrays are known by the names of the released checkpoints, joined by "/", such
as "MixerBlock_0/token_mixing/Dense_0/kernel".
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from mixer import files
from mixer.errors import UserError
from mixer.models.modules import GELUS, count_blocks
from mixer.models.registry import ARCHITECTURES, Architecture
from mixer.weights import foreign
from mixer.weights.arrays import (
    DamagedError,
    Shapes,
    StoredArray,
    check_dtypes,
    check_regular,
    not_finite,
    open_npz,
    open_safetensors,
    short_name,
    write_npz,
    write_safetensors,
)
from mixer.weights.card import FORMAT, Card, card_path, checksum

# By layout: the ending of its files, and the GELU of the code whose layout it is.
ENDINGS = {"published": ".npz", "legacy": ".npz", "timm": ".safetensors"}
GELU_OF = {"published": "tanh", "legacy": "tanh", "timm": "erf"}


@dataclasses.dataclass(frozen=True)
class File:
    """An opened file: names and shapes; an array is read when it is asked for.

    Attributes:
      path: where it is.
      architecture: key of `mixer.models.registry.ARCHITECTURES`.
      layout: key of ENDINGS.
      shapes: by published name; an array that the layout does not have goes by its own.
      read: an array by that name, with the published axes, in the file's dtype.
      gelu: that of the file's own header; None: the header has none.
      notes: what was passed over or taken off, for the log.
    """

    path: epath.Path
    architecture: str
    layout: str
    shapes: Shapes
    read: Callable[[str], np.ndarray]
    gelu: str | None
    notes: tuple[str, ...]


def open_file(path: epath.PathLike) -> File:
    """Opens a file of weights and recognises its layout from its names.

    Raises:
      UserError: no such file, one of another kind, another model, or an array of another dtype.
    """
    path, gelu = epath.Path(path).expanduser(), None
    check_regular(path)
    match path.suffix.lower():
        case ".npz":
            arrays = open_npz(path)
        case ".safetensors":
            arrays, metadata = open_safetensors(path)
            gelu = metadata.get("gelu")
            if gelu not in (None, *GELUS):
                expected = ", ".join(GELUS)
                raise DamagedError(path, f"header of {path}: gelu={gelu!r}; expected {expected}")
        case _:
            advice = foreign.advice(path)
            raise UserError(
                advice or f"{path} is no file of weights; .npz and .safetensors are read"
            )
    arrays, notes = _unwrapped(arrays)
    name, layout = recognise({name: array.shape for name, array in arrays.items()}, path)
    check_dtypes(arrays, path)

    architecture = ARCHITECTURES[name]
    places = {}  # published name -> the file's
    for leaf in architecture.leaf_names(count_blocks(arrays)):
        if (stored := architecture.stored_name(leaf, layout)) in arrays:
            places[leaf] = stored
    places |= {name: name for name in arrays.keys() - set(places.values())}

    def shape(leaf: str) -> tuple[int, ...]:
        placeholder = np.broadcast_to(np.float32(0), arrays[places[leaf]].shape)  # no memory
        return architecture.from_layout(leaf, placeholder, layout).shape

    def read(leaf: str) -> np.ndarray:
        return architecture.from_layout(leaf, arrays[places[leaf]].read(), layout)

    return File(path, name, layout, {leaf: shape(leaf) for leaf in places}, read, gelu, notes)


# What training programs put around weights: of several the first, an average before the rest.
_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module", "_orig_mod")
_WRAPPERS += ("params", "opt/target", "target")


def _first_parts(architecture: Architecture) -> set[str]:
    """How names of the first layer and of blocks begin in files, such as "stem" and "blocks"."""
    stem, *rest = architecture.leaf_names(1)
    block = next(name for name in rest if name.startswith(architecture.block.format(0)))
    stored = (architecture.stored_name(name, lay) for name in (stem, block) for lay in ENDINGS)
    return {re.split("[/.]", name)[0] for name in stored}


def _unwrapped(arrays: dict[str, StoredArray]) -> tuple[dict[str, StoredArray], tuple[str, ...]]:
    """Takes the weights out of a training program's state: (arrays, what was done)."""
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
            break  # of no architecture here
        rest = len(arrays) - len(content)
        notes.append(f"taken out of {wrapper!r}" + f", {rest} arrays beside it left" * bool(rest))
        arrays = content
    return arrays, tuple(notes)


def recognise(shapes: Shapes, source: epath.PathLike) -> tuple[str, str]:
    """Returns architecture and layout of a file's arrays.

    Args:
      shapes: of the arrays, by their names in the file.
      source: for messages.

    Raises:
      UserError: another model, which is named where it is known.
    """
    for name, architecture in ARCHITECTURES.items():
        if layout := architecture.recognise(shapes, source):
            return name, layout
    expected = []
    for architecture in ARCHITECTURES.values():
        first = next(iter(architecture.leaf_names(0)))
        names = (f"{architecture.stored_name(first, lay)} ({lay} layout)" for lay in ENDINGS)
        expected.append(f"no {architecture.title}, which has {', '.join(names)}")
    names = ", ".join(map(short_name, sorted(shapes)[:4])) or "nothing"
    more = " ..." if len(shapes) > 4 else ""
    raise UserError(f"{source} holds {'; '.join(expected)}: it has {names}{more}")


def write_file(
    path: epath.PathLike, arrays: Mapping[str, Any], card: Card, *, layout: str
) -> epath.Path:
    """Writes a file of weights and its JSON, each whole or not at all.

    The bytes are a function of the arrays alone.

    Args:
      path: ends as ENDINGS says for the layout.
      arrays: by published name, float32.
      card: for the JSON, which has the arguments of timm's class for the same model too.
      layout: "published", "legacy" or "timm".

    Returns:
      The path of the JSON.

    Raises:
      UserError: a value is NaN or infinite, or the ending is another layout's.
    """
    path = epath.Path(path)
    if path.suffix != ENDINGS[layout]:
        raise UserError(f"{path}: files in the {layout} layout end in {ENDINGS[layout]}")
    architecture = ARCHITECTURES[card.architecture]
    stored = {}
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if fault := not_finite(array):
            raise UserError(f"{path} is not written: {name} {fault}")
        array = architecture.to_layout(name, array, layout)
        stored[architecture.stored_name(name, layout)] = array
    values = {"format": FORMAT, "layout": layout} | card.as_json()
    values["checksum"] = checksum(lambda name: np.asarray(arrays[name]), arrays)
    values["timm"] = architecture.timm_arguments(card.model(), card.image_size)
    # The JSON gets its name first: arrays without it could be taken for something else.
    with files.whole(path) as new, files.whole(card_path(path)) as new_card:
        files.write_text(new_card, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        if layout == "timm":
            write_safetensors(new, stored, {"gelu": card.gelu})
        else:
            write_npz(new, stored)
    return card_path(path)
