"""Exports a model as a StableHLO program that runs without this package (docs/export.md)."""

import contextlib
import dataclasses
import gc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from mixer import files
from mixer.errors import UserError, check_choice
from mixer.models.registry import architecture_of
from mixer.parallel import sharding
from mixer.tools.predict.prediction import names_of
from mixer.weights.arrays import write_safetensors
from mixer.weights.card import Card
from mixer.weights.load import Loaded

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FORMAT = "mlp-mixer program, 1"
# jax.export writes a flatbuffer of less than 2^31 bytes; the program without weights is small.
MAX_BYTES = 2**31 - 2**24


@dataclasses.dataclass(frozen=True)
class Paths:
    """The files of an exported model; `weights` is None if the program embeds the weights."""

    program: Path
    card: Path
    weights: Path | None


def check(path: str | Path, *, weights: str, platforms: Sequence[str]) -> Paths:
    """Checks the arguments of an export before the weights are read, and returns its files.

    Raises:
      UserError: a file exists, its folder does not, the program has the name of its weights, or a
        platform is unknown.
    """
    program = Path(path).expanduser()
    weights_file = program.with_suffix(".safetensors") if weights == "beside" else None
    if program == weights_file:
        raise UserError(f"{path}: the weights take this name; expected another ending")
    paths = Paths(program, program.with_name(f"{program.name}.json"), weights_file)
    check_new(*_present(paths))
    for platform in platforms or [""]:
        hint = "an NVIDIA GPU is cuda, an AMD GPU rocm"
        check_choice("platform", platform, PLATFORMS, hint=hint)
    return paths


def check_new(*paths: Path) -> None:
    """Raises UserError if a file exists or cannot be written."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path} already exists; move it, or choose another name")
        files.check_output("", path)


def check_head(card: Card, output: str) -> None:
    """Raises UserError if `output` is "logits" and the weights have no head."""
    if output == "logits" and not card.num_classes:
        raise UserError(f"{card.source} has no head; pass --output=pre_logits")


def _present(paths: Paths) -> list[Path]:
    """Lists the files, the program last: if the program exists, the other files exist too."""
    return [path for path in (paths.weights, paths.card, paths.program) if path is not None]


def served_weights(loaded: Loaded) -> dict[str, np.ndarray]:
    """Returns the weights as arrays by published names, such as "head/kernel".

    A bfloat16 model casts its weights at each call. They are cast here once, which gives the same
    outputs and halves the size of the file. LayerNorms and head compute in float32 and are not
    cast.
    """
    dtype, pattern = loaded.model.dtype, architecture_of(loaded.model).cast_leaves
    return {
        name: np.asarray(leaf.astype(dtype) if re.fullmatch(pattern, name) else leaf)
        for name, leaf in sharding.by_name(loaded.params).items()
    }


def make_program(
    loaded: Loaded,
    arrays: dict[str, np.ndarray],
    *,
    weights: str = "inside",
    output: str = "logits",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch_size: int | None = None,
) -> export.Exported:
    """Traces the model for `platforms`, none of which has to be available.

    The program takes images (b, H, W, channels) uint8, as decoded (RGB or grey), maps them to the
    range that the model was trained on, and returns `output` in float32.

    Args:
      loaded: the model and its card.
      arrays: its weights, from `served_weights`.
      weights: "inside": the weights are constants of the program, and the signature is
        `call(images)`; "beside": the signature is `call(arrays, images)`.
      output: "logits" (b, K) or "pre_logits" (b, C).
      platforms: names in PLATFORMS.
      batch_size: b; None: any batch size.

    Raises:
      UserError: the weights are too large to embed, or logits are requested without a head.
    """
    low, high = loaded.card.value_range
    check_head(loaded.card, output)

    def forward(arrays: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        pixels = images.astype(jnp.float32) / (255 / (high - low)) + low
        params = traverse_util.unflatten_dict(arrays, sep="/")
        return loaded.model.apply({"params": params}, pixels)[1][output]

    b = export.symbolic_shape("b")[0] if batch_size is None else batch_size
    images = jax.ShapeDtypeStruct((b, *loaded.card.image_size, loaded.card.in_channels), jnp.uint8)
    if weights == "beside":
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
        return export.export(jax.jit(forward), platforms=platforms)(shapes, images)
    if (size := sum(array.nbytes for array in arrays.values())) > MAX_BYTES:
        raise UserError(
            f"weights of {size / 1e9:.2f} GB are too large to embed in a program; expected at most "
            f"{MAX_BYTES / 1e9:.2f} GB (--weights=beside has no limit)"
        )

    def constant(images: jax.Array) -> jax.Array:
        return forward(arrays, images)

    return export.export(jax.jit(constant), platforms=platforms)(images)


def write(
    loaded: Loaded, program: export.Exported, arrays: dict[str, np.ndarray], paths: Paths
) -> None:
    """Writes a program, a JSON file that describes it, and its weights if they are separate.

    All files are complete before the first is renamed to its final name.

    Args:
      loaded: the model.
      program: the program from `make_program`.
      arrays: its weights, from `served_weights`.
      paths: the files, from `check`.
    """
    description = json.dumps(describe(loaded, program, arrays, paths), indent=2, ensure_ascii=False)
    with contextlib.ExitStack() as stack:
        # The stack renames files in reverse order, so the program is renamed last.
        new = {
            path: stack.enter_context(files.atomic_write(path)) for path in _present(paths)[::-1]
        }
        files.write_text(new[paths.card], description + "\n")
        if paths.weights is not None:
            # Save the GELU, so that `mixer.load` of this file alone gives the same model.
            write_safetensors(new[paths.weights], arrays, {"gelu": loaded.card.gelu})
        else:
            # Free the traced module, which holds a second copy of the weights.
            jax.clear_caches()
            gc.collect()
        new[paths.program].write_bytes(program.serialize())


def describe(
    loaded: Loaded, program: export.Exported, arrays: dict[str, np.ndarray], paths: Paths
) -> dict[str, Any]:
    """Returns the content of the JSON file next to the program, for the server.

    "card" describes the weights (mixer/weights/card.py), "classes" has the class names in label
    order if they are known, and "call" is Python code that runs the program from its folder.
    """
    images, (output,) = program.in_avals[-1], program.out_avals
    size = ", ".join(map(str, images.shape[1:]))
    example = images.shape[0] if isinstance(images.shape[0], int) else 1
    call = [
        "import jax, numpy",
        "from jax import export",
        f"program = export.deserialize(open({paths.program.name!r}, 'rb').read())",
        "call = jax.jit(program.call)",
        f"images = numpy.zeros(({example}, {size}), numpy.uint8)",
    ]
    if paths.weights is None:
        call += ["output = call(images)"]
        inputs = {}
    else:
        call += [
            # safetensors.flax needs only JAX; safetensors.numpy does not read bfloat16.
            "from safetensors.flax import load_file",
            f"weights = load_file({paths.weights.name!r})",
            "output = call(weights, images)",
        ]
        inputs = {"weights": {name: _spec(array) for name, array in arrays.items()}}
    return {
        "format": FORMAT,
        "program": paths.program.name,
        "weights": paths.weights.name if paths.weights else None,
        "inputs": {**inputs, "images": _spec(images)},
        "output": _spec(output),
        "platforms": list(program.platforms),
        "jax": jax.__version__,
        "calling_convention": program.calling_convention_version,
        "call": call,
        "card": loaded.card.as_json(),
        "classes": names_of(loaded.card),
    }


def _spec(array: Any) -> dict[str, Any]:
    """Returns shape and dtype; a free batch size is "b"."""
    shape = [side if isinstance(side, int) else str(side) for side in array.shape]
    return {"shape": shape, "dtype": array.dtype.name}
