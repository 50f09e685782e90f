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

import contextlib
import os
import sys
from collections.abc import Iterator

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
        raise UserError(f"{out}: remote path; expected a local path (copy the files afterwards)")
    for path in (out, card_path(out)) if out.suffix else (out,):
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; remove it, or choose another name")
        files.check_output("", path)
    return layout


@contextlib.contextmanager
def _writing(out: epath.Path) -> Iterator[None]:
    """Turns errors of the file system into a UserError with a one-line message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}; expected a writable folder with "
            "enough disk space"
        ) from None


def write(out: epath.Path, loaded, layout: str) -> None:
    """Writes the weights as a file of `layout` with its JSON file, or as a run."""
    from mixer.parallel import sharding
    from mixer.weights import formats

    if layout == "run":
        with _writing(out):
            write_run(out, loaded)
        print(f"written: {out} (checkpoints/0, config.json, data.json)")
        return
    arrays = sharding.by_name(loaded.params)
    with _writing(out):
        card_path = formats.write_file(out, arrays, loaded.card, layout=layout)
    count = sharding.num_values(arrays)
    size = out.stat().length / 1e6
    description = f"{layout} layout, {count:,} parameters, {size:,.1f} MB"
    print(f"written: {out} ({description}), {card_path.name}")
    default_gelu = formats.GELU_OF[layout]
    if loaded.card.gelu != default_gelu:
        programs = "timm" if layout == "timm" else "vision_transformer and big_vision"
        note = f"note: these weights need GELU {loaded.card.gelu}; {programs} default to"
        print(f"{note} {default_gelu}", file=sys.stderr)


def write_run(out: epath.Path, loaded) -> None:
    """Writes weights as a run with zero updates, atomically."""
    with files.atomic_directory(out) as new_directory:
        _fill_run(new_directory, loaded)


def _fill_run(directory: epath.Path, loaded) -> None:
    import jax.numpy as jnp

    from mixer import run_files
    from mixer.training.state import TrainState
    from mixer.weights import checkpoint

    card = loaded.card
    with checkpoint.Checkpoints(directory / "checkpoints", keep_last=1) as checkpoints:
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), loaded.params, ()))
        checkpoints.wait()
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
    run_files.write_json(directory / "config.json", config)
    run_files.write_json(directory / "data.json", {"class_names": card.class_names})


if __name__ == "__main__":
    cli.run(main)
