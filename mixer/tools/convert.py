r"""Converts weights between runs, npz files (published or legacy layout) and timm's safetensors.

  python -m mixer.tools.convert runs/pets Mixer-pets.npz        # vision_transformer, big_vision
  python -m mixer.tools.convert runs/pets/best pets.safetensors   # timm
  python -m mixer.tools.convert Mixer-B_16.npz b16.safetensors
  python -m mixer.tools.convert hf://timm/mixer_b16_224.miil_in21k runs/miil
  python -m mixer.tools.convert old.npz new_448.npz --image_size=448
  python -m mixer.tools.convert runs/pets --report                # all arrays and the total

The name of OUT determines its format: .npz is the published layout (--layout=legacy: the legacy
layout), .safetensors is timm's, and a name without an extension is a run, which mixer.load,
--config.init_from and all tools accept. A JSON file next to the output describes the weights
(docs/weights.md). Values are not changed: a round trip is bit-identical.
"""

import os
import sys
from typing import Any

from absl import flags
from etils import epath

from mixer import files
from mixer.cli import config as cli
from mixer.errors import UserError

LAYOUT = flags.DEFINE_enum(
    "layout", "published", ["published", "legacy"], "Layout of the npz file."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size", None, "Resize the weights to images of this side in pixels, or HEIGHT,WIDTH."
)
RESIZE = flags.DEFINE_enum(
    "resize",
    "grow",
    ["grow", "interpolate"],
    "Method for --image_size: grow (integer factors, as in the paper) or interpolate (any size; "
    "not in the paper).",
)
GELU = flags.DEFINE_enum(
    "gelu", None, ["tanh", "erf"], "GELU of the weights, if IN does not specify it correctly."
)
REPORT = flags.DEFINE_bool("report", False, "Print shape, size, mean and std of each array.")


def main(argv: list[str]) -> None:
    """Converts the weights in the arguments."""
    match argv[1:]:
        case [source, out]:
            out = files.parse_path("", out)
            layout = _layout(out)
        case [source] if REPORT.value:
            out = None
        case _:
            raise UserError(
                "expected IN OUT, or IN --report; see python -m mixer.tools.convert --help"
            )
    from clu import parameter_overview

    from mixer.weights import load as loading

    loaded = loading.read(
        source,
        image_size=cli.image_size("image_size", IMAGE_SIZE.value),
        gelu=GELU.value,
        resize=RESIZE.value,
        head="keep",
        log=lambda line: print(line, file=sys.stderr),
    )
    if REPORT.value:
        print(parameter_overview.get_parameter_overview(loaded.params))
    if out is not None:
        write(out, loaded, layout)


def _layout(out: epath.Path) -> str:
    """Returns the layout for the name of `out`; raises UserError if `out` is not writable."""
    layouts = {".npz": LAYOUT.value, ".safetensors": "timm", "": "run"}
    if out.suffix not in layouts:
        raise UserError(
            f"{out}: unknown file type; expected .npz, .safetensors, or no extension to write a run"
        )
    layout = layouts[out.suffix]
    if LAYOUT.value == "legacy" and layout != "legacy":
        raise UserError(f"--layout=legacy is for .npz files; expected an .npz file, not {out}")
    from mixer.weights.card import card_path

    if "://" in str(out):
        raise UserError(
            f"{out} is a remote path; expected a local path (copy the files afterwards)"
        )
    for path in (out, card_path(out)) if out.suffix else (out,):
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; remove it, or choose another name")
        files.check_output("", path)
    return layout


def write(out: epath.Path, loaded: Any, layout: str) -> None:
    """Writes weights as a file of `layout` with its JSON file, or as a run; prints what it wrote.

    Args:
      out: path of the file or the run.
      loaded: the weights, a `mixer.weights.load.Loaded`.
      layout: "run" or a key of `mixer.weights.formats.GELU_OF`.

    Raises:
      UserError: the file system reports an error.
    """
    from mixer.weights import formats

    try:
        if layout == "run":
            description = _write_run(out, loaded)
        else:
            description = _write_file(out, loaded, layout)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}; expected a writable folder with "
            "enough disk space"
        ) from None
    print(f"written: {out} {description}")
    gelu = loaded.card.gelu
    default_gelu = formats.GELU_OF.get(layout, gelu)  # the config of a run specifies its GELU
    if gelu != default_gelu:
        programs = "timm" if layout == "timm" else "vision_transformer and big_vision"
        note = f"note: these weights need GELU {gelu}; {programs} default to {default_gelu}"
        print(note, file=sys.stderr)


def _write_file(out: epath.Path, loaded: Any, layout: str) -> str:
    """Writes a file of `layout` and its JSON file; returns a description of both."""
    from mixer.parallel import sharding
    from mixer.weights import formats

    arrays = sharding.by_name(loaded.params)
    card_path = formats.write_file(out, arrays, loaded.card, layout=layout)
    count, size = sharding.num_values(arrays), out.stat().length / 1e6
    return f"({layout} layout, {count:,} parameters, {size:,.1f} MB), {card_path.name}"


def _write_run(out: epath.Path, loaded: Any) -> str:
    """Writes a run with zero updates, atomically; returns the list of its files."""
    import jax.numpy as jnp

    from mixer import run_files
    from mixer.training.state import TrainState
    from mixer.weights import checkpoint

    card = loaded.card
    height, width = card.image_size
    fields = {
        "name": card.architecture,
        **card.dimensions,
        "num_classes": card.num_classes,
        "gelu": card.gelu,
    }
    config = {
        "source": card.source,
        "image_size": height if height == width else [height, width],
        "model": {"variant": card.variant, "dtype": loaded.model.dtype} | fields,
        "dataset": {"eval_preprocess": card.preprocess},
    }
    with files.atomic_directory(out) as directory:
        with checkpoint.Checkpoints(directory / "checkpoints", keep_last=1) as checkpoints:
            checkpoints.save(TrainState(jnp.zeros((), jnp.int32), loaded.params, ()))
            checkpoints.wait()
        run_files.write_json(directory / "config.json", config)
        run_files.write_json(directory / "data.json", {"class_names": card.class_names})
    return "(checkpoints/0, config.json, data.json)"


if __name__ == "__main__":
    cli.run(main)
