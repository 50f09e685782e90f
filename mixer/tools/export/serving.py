"""A model as a StableHLO program that runs without this package (docs/export.md)."""

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
from mixer.data.imagenet import names as imagenet_names
from mixer.errors import UserError, check_choice
from mixer.models.registry import architecture_of
from mixer.parallel import sharding
from mixer.weights.arrays import write_safetensors
from mixer.weights.load import Loaded

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FORMAT = "mlp-mixer program, 1"
# jax.export writes a flatbuffer, which ends at 2^31 bytes; the program without weights is small.
MAX_BYTES = 2**31 - 2**24


@dataclasses.dataclass(frozen=True)
class Paths:
    """The files of an exported model; `weights` is None where they are inside the program."""

    program: Path
    card: Path
    weights: Path | None


def check(path: str | Path, *, weights: str, platforms: Sequence[str]) -> Paths:
    """The files that an export to `path` writes; called before the weights are read.

    Raises:
      UserError: one of them exists, their folder does not, the ending is not .stablehlo, or a
        platform is unknown.
    """
    program = Path(path).expanduser()
    if program.suffix != ".stablehlo":
        raise UserError(f"{path}: the file to write has to end in .stablehlo")
    beside = program.with_suffix(".safetensors") if weights == "beside" else None
    paths = Paths(program, program.with_name(f"{program.name}.json"), beside)
    for file in _present(paths):
        if file.exists():
            raise UserError(f"{file} exists; move it away, or choose another name")
        files.check_output("", file)
    for platform in platforms or [""]:
        hint = "an NVIDIA GPU is cuda, an AMD GPU rocm"
        check_choice("platform", platform, PLATFORMS, hint=hint)
    return paths


def _present(paths: Paths) -> list[Path]:
    """The program comes last: where it is, the others are too."""
    return [path for path in (paths.weights, paths.card, paths.program) if path is not None]


def served_weights(loaded: Loaded) -> dict[str, np.ndarray]:
    """Arrays by published names, such as "head/kernel".

    What a bfloat16 model rounds whenever it is called is rounded here once: its values are the
    same, and the file is half as large. LayerNorms and head are computed in float32 and stay so.
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
    """Traces the model for `platforms`, of which none has to be here.

    The program takes images (b, H, W, 3) uint8, RGB as decoded, maps them to the range that the
    model was trained on, and returns `output` in float32.

    Args:
      loaded: the model, and what it is.
      arrays: its weights, by `served_weights`.
      weights: "inside": constants of the program, which is called as `call(images)`; "beside": it
        is called as `call(arrays, images)`.
      output: "logits" (b, K) or "pre_logits" (b, C).
      platforms: of PLATFORMS.
      batch_size: b; None: any.

    Raises:
      UserError: weights too large to be inside.
    """
    low, high = loaded.card.value_range
    if output == "logits" and not loaded.card.num_classes:
        raise UserError(f"{loaded.card.source} has no head; --output=pre_logits needs none")

    def forward(arrays: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        pixels = images.astype(jnp.float32) / (255 / (high - low)) + low
        params = traverse_util.unflatten_dict(arrays, sep="/")
        return loaded.model.apply({"params": params}, pixels)[1][output]

    b = export.symbolic_shape("b")[0] if batch_size is None else batch_size
    images = jax.ShapeDtypeStruct((b, *loaded.card.image_size, 3), jnp.uint8)
    if weights == "beside":
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
        return export.export(jax.jit(forward), platforms=platforms)(shapes, images)
    if (size := sum(array.nbytes for array in arrays.values())) > MAX_BYTES:
        raise UserError(
            f"weights of {size / 1e9:.2f} GB do not fit inside a program, whose file ends at "
            f"{MAX_BYTES / 1e9:.2f} GB; --weights=beside takes any"
        )

    def constant(images: jax.Array) -> jax.Array:
        return forward(arrays, images)

    return export.export(jax.jit(constant), platforms=platforms)(images)


def write(
    loaded: Loaded, program: export.Exported, arrays: dict[str, np.ndarray], paths: Paths
) -> None:
    """Writes a program, a JSON that describes it, and the weights if they are beside it.

    All are whole before the first has its name.

    Args:
      loaded: the model.
      program: by `make_program`.
      arrays: the program's weights, by `served_weights`.
      paths: by `check`.
    """
    described = json.dumps(describe(loaded, program, arrays, paths), indent=2, ensure_ascii=False)
    with contextlib.ExitStack() as stack:
        # Names are given last first, so the program's comes when the others are there.
        new = {path: stack.enter_context(files.whole(path)) for path in _present(paths)[::-1]}
        files.write_text(new[paths.card], described + "\n")
        if paths.weights is not None:
            # With their GELU, so that `mixer.load` of this file alone gives the same model.
            write_safetensors(new[paths.weights], arrays, {"gelu": loaded.card.gelu})
        else:
            # The traced module holds the weights once more, and is of no use from here on.
            jax.clear_caches()
            gc.collect()
        new[paths.program].write_bytes(program.serialize())


def describe(
    loaded: Loaded, program: export.Exported, arrays: dict[str, np.ndarray], paths: Paths
) -> dict[str, Any]:
    """What a server has to know, for the JSON beside the program.

    "card" is what the weights are (mixer/weights/card.py), "classes" the names in label order
    where they are known, "call" Python that runs the program from its folder.
    """
    images, (output,) = program.in_avals[-1], program.out_avals
    names = loaded.card.class_names
    if isinstance(names, str):
        names = imagenet_names.class_names(names)
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
            # By JAX and not by NumPy, for which safetensors reads no bfloat16; Flax is not needed.
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
        "classes": names,
    }


def _spec(array: Any) -> dict[str, Any]:
    """Shape, a free batch size as "b", and dtype."""
    shape = [side if isinstance(side, int) else str(side) for side in array.shape]
    return {"shape": shape, "dtype": array.dtype.name}
