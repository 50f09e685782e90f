r"""Converts weights: runs, npz files (published or legacy layout), safetensors with timm's names.

  python -m mixer.tools.convert runs/pets Mixer-pets.npz        # vision_transformer, big_vision
  python -m mixer.tools.convert runs/pets/best pets.safetensors   # timm
  python -m mixer.tools.convert Mixer-B_16.npz b16.safetensors
  python -m mixer.tools.convert hf://timm/mixer_b16_224.miil_in21k runs/miil
  python -m mixer.tools.convert old.npz new_448.npz --image_size=448
  python -m mixer.tools.convert runs/pets --report                # every array, and the sum

What OUT is follows from its name: .npz is the published layout (--layout=legacy: the legacy one),
.safetensors timm's, a name without an ending a run, which mixer.load, --config.init_from and every
tool take. Beside a file stands a JSON that says what it is (docs/weights.md). Values are not
changed: a round trip gives the same bits.
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
    "layout", "published", ["published", "legacy"], "Layout of an npz file that is written."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size", None, "Weights for images of another size: a side in pixels, or HEIGHT,WIDTH."
)
RESIZE = flags.DEFINE_enum(
    "resize",
    "grow",
    ["grow", "interpolate"],
    "How: by whole factors as in the paper, or to any size, which is not the paper's.",
)
GELU = flags.DEFINE_enum(
    "gelu", None, ["tanh", "erf"], "Which GELU the weights are for, where IN does not say it right."
)
REPORT = flags.DEFINE_bool("report", False, "Print each array: shape, size, mean, deviation.")


def main(argv: list[str]) -> None:
    """Converts what the arguments name."""
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
    """The layout that the name of `out` means; UserError where nothing can be written there."""
    layouts = {".npz": LAYOUT.value, ".safetensors": "timm", "": "run"}
    if out.suffix not in layouts:
        raise UserError(
            f"{out}: an .npz or .safetensors file can be written, or a run, whose name has no "
            "ending"
        )
    layout = layouts[out.suffix]
    if LAYOUT.value == "legacy" and layout != "legacy":
        raise UserError(f"--layout=legacy is for .npz files, and not for {out}")
    from mixer.weights.card import card_path

    if "://" in str(out):
        raise UserError(f"{out}: give a local path, and copy what is written there")
    for path in (out, card_path(out)) if out.suffix else (out,):
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; remove it, or give another name")
        files.check_output("", path)
    return layout


@contextlib.contextmanager
def _writing(out: epath.Path) -> Iterator[None]:
    """Turns what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}; give a name in a folder that "
            "has room and may be written to"
        ) from None


def write(out: epath.Path, loaded, layout: str) -> None:
    """Writes the weights as a file of `layout` with its JSON, or as a "run"."""
    from mixer.parallel import sharding
    from mixer.weights import formats

    if layout == "run":
        with _writing(out):
            write_run(out, loaded)
        print(f"written: {out} (checkpoints/0, config.json, data.json)")
        return
    arrays = sharding.by_name(loaded.params)
    with _writing(out):
        beside = formats.write_file(out, arrays, loaded.card, layout=layout)
    count = sharding.num_values(arrays)
    size = out.stat().length / 1e6
    print(f"written: {out} ({layout} layout, {count:,} parameters, {size:,.1f} MB), {beside.name}")
    theirs = formats.GELU_OF[layout]
    if loaded.card.gelu != theirs:
        whose = "timm" if layout == "timm" else "vision_transformer and big_vision"
        note = f"note: these weights are for GELU {loaded.card.gelu}; {whose} compute {theirs}"
        print(f"{note}, unless told otherwise", file=sys.stderr)


def write_run(out: epath.Path, loaded) -> None:
    """Writes weights as a run of no steps, whole or not at all."""
    with files.whole_directory(out) as new:
        _fill_run(new, loaded)


def _fill_run(new: epath.Path, loaded) -> None:
    import jax.numpy as jnp

    from mixer import run_files
    from mixer.training.state import TrainState
    from mixer.weights import checkpoint

    card = loaded.card
    with checkpoint.Checkpoints(new / "checkpoints", keep_last=1) as checkpoints:
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), loaded.params, ()))
        checkpoints.wait()
    height, width = card.image_size
    fields = {**card.dimensions, "num_classes": card.num_classes, "gelu": card.gelu}
    config = {
        "source": card.source,
        "image_size": height if height == width else [height, width],
        "model": {"variant": card.variant, "dtype": loaded.model.dtype} | fields,
        "dataset": {"eval_preprocess": card.preprocess},
    }
    run_files.write_json(new / "config.json", config)
    run_files.write_json(new / "data.json", {"class_names": card.class_names})


if __name__ == "__main__":
    cli.run(main)
