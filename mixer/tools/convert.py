r"""Converts weights between runs, npz files (published or legacy layout) and timm's safetensors.

  python -m mixer.tools.convert runs/pets Mixer-pets.npz        # vision_transformer, big_vision
  python -m mixer.tools.convert runs/pets/best pets.safetensors   # timm
  python -m mixer.tools.convert Mixer-B_16.npz b16.safetensors
  python -m mixer.tools.convert hf://timm/mixer_b16_224.miil_in21k runs/miil
  python -m mixer.tools.convert old.npz new_448.npz --image_size=448
  python -m mixer.tools.convert runs/pets pets --to=hub           # a folder for the Hub, and timm
  python -m mixer.tools.convert runs/pets --report                # all arrays and the total

The name of OUT determines its format: .npz is the published layout (--layout=legacy: the legacy
layout), .safetensors is timm's, and a name without an extension is a run, which mixer.load,
--config.init_from and all tools accept. --to=hub writes a folder for the Hugging Face Hub: weights
with timm's names, config.json and a model card. A JSON file next to the output describes the
weights (docs/weights.md). Values are not changed: a round trip is bit-identical.
"""

import os
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

from absl import flags
from etils import epath

from mixer import files, sizes
from mixer.cli import config as cli
from mixer.errors import UserError

LAYOUT = flags.DEFINE_enum(
    "layout", "published", ["published", "legacy"], "Layout of the npz file."
)
TO = flags.DEFINE_enum("to", None, ["hub"], "hub: write a folder for the Hugging Face Hub.")
LICENSE = flags.DEFINE_string(
    "license", "unknown", "For --to=hub: license of the weights, as the Hub spells it."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size", None, "Resize the weights to images of this side in pixels, or HEIGHT,WIDTH."
)
RESIZE = flags.DEFINE_enum(
    "resize",
    None,
    ["grow", "interpolate"],
    "Method for --image_size: grow (integer factors, as in the paper) or interpolate (any size; "
    "not in the paper). Default: grow for a Mixer, interpolate for a Vision Transformer.",
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
        results = {}
        if layout == "hub" and not IMAGE_SIZE.value and not GELU.value:
            results = _results(source)
        write(out, loaded, layout, license_name=LICENSE.value, results=results)


def _results(source: str) -> dict[str, dict[str, Any]]:
    """Returns the results of the weights at `source` by split; {} if they are not a run's."""
    from mixer.weights import fetch, hub

    return hub.read_results(source) if fetch.is_run(source) else {}


def _layout(out: epath.Path) -> str:
    """Returns the layout for the name of `out`; raises UserError if `out` is not writable."""
    if flags.FLAGS["license"].present and TO.value != "hub":
        raise UserError(f"--license={LICENSE.value} is for --to=hub")
    if not re.fullmatch("[A-Za-z0-9.+-]+", LICENSE.value):
        raise UserError(
            f"--license={LICENSE.value!r}; expected a license as the Hub spells it, such as "
            "apache-2.0, mit, cc-by-4.0 or other"
        )
    layouts = {".npz": LAYOUT.value, ".safetensors": "timm", "": "run"}
    if TO.value == "hub":
        if out.suffix in (".npz", ".safetensors"):
            raise UserError(f"--to=hub writes a folder; expected the name of a folder, not {out}")
        layout = "hub"
    elif out.suffix not in layouts:
        raise UserError(
            f"{out}: unknown file type; expected .npz, .safetensors, or no extension to write a run"
        )
    else:
        layout = layouts[out.suffix]
    if LAYOUT.value == "legacy" and layout != "legacy":
        raise UserError(f"--layout=legacy is for .npz files; expected an .npz file, not {out}")
    from mixer.weights.card import card_path

    if "://" in str(out):
        raise UserError(
            f"{out} is a remote path; expected a local path (copy the files afterwards)"
        )
    for path in (out,) if layout in ("run", "hub") else (out, card_path(out)):
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; remove it, or choose another name")
        files.check_output("", path)
    return layout


def write(
    out: epath.Path,
    loaded: Any,
    layout: str,
    *,
    license_name: str = "unknown",
    results: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> None:
    """Writes weights as a file with its JSON file, or as a folder; prints what it wrote.

    Args:
      out: path of the file or the folder.
      loaded: the weights, a `mixer.weights.load.Loaded`.
      layout: "run", "hub" or a key of `mixer.weights.formats.GELU_OF`.
      license_name: for "hub", the license of the weights.
      results: for "hub", the results by split.

    Raises:
      UserError: the file system reports an error.
    """
    from mixer.weights import formats, hub

    try:
        if layout == "run":
            description = _write_run(out, loaded)
        elif layout == "hub":
            description = _write_hub(out, loaded, license_name, results)
        else:
            description = _write_file(out, loaded, layout)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}; expected a writable folder with "
            "enough disk space"
        ) from None
    print(f"written: {out} {description}")
    gelu = loaded.card.gelu
    of_timm = layout in ("timm", "hub")
    # The config of a run specifies its GELU.
    default_gelu = formats.GELU_OF.get("timm" if of_timm else layout, gelu)
    if gelu != default_gelu and not (layout == "hub" and hub.names_activation(loaded.card)):
        programs = "timm defaults" if of_timm else "vision_transformer and big_vision default"
        note = f"note: these weights need GELU {gelu}; {programs} to {default_gelu}"
        print(note, file=sys.stderr)


def _write_file(out: epath.Path, loaded: Any, layout: str) -> str:
    """Writes a file of `layout` and its JSON file; returns a description of both."""
    from mixer.parallel import sharding
    from mixer.weights import formats

    arrays = sharding.by_name(loaded.params)
    card_path = formats.write_file(out, arrays, loaded.card, layout=layout)
    count, size = sharding.num_values(arrays), out.stat().length / 1e6
    return f"({layout} layout, {count:,} parameters, {size:,.1f} MB), {card_path.name}"


def _write_hub(
    out: epath.Path, loaded: Any, license_name: str, results: Mapping[str, Mapping[str, Any]]
) -> str:
    """Writes a folder for the Hub; returns a description of its files."""
    from mixer.parallel import sharding
    from mixer.weights import hub

    arrays = sharding.by_name(loaded.params)
    hub.write_folder(out, arrays, loaded.card, license_name=license_name, results=results)
    weights = out / hub.WEIGHTS_NAME
    count, size = sharding.num_values(arrays), weights.stat().length / 1e6
    return (
        f"({weights.name}, {count:,} parameters, {size:,.1f} MB; {weights.name}.json, config.json, "
        "README.md)"
    )


def _write_run(out: epath.Path, loaded: Any) -> str:
    """Writes a run with zero updates, atomically; returns the list of its files."""
    import jax.numpy as jnp

    from mixer import run_files
    from mixer.training.state import TrainState
    from mixer.weights import checkpoint

    card = loaded.card
    fields = {
        "name": card.architecture,
        **card.dimensions,
        "num_classes": card.num_classes,
        "gelu": card.gelu,
    }
    config = {
        "source": card.source,
        "image_size": sizes.shorten(card.image_size),
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
