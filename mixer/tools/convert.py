r"""Converts weights: runs, npz files (published or legacy layout), safetensors with timm's names.

  python -m mixer.tools.convert runs/pets Mixer-pets.npz        # vision_transformer, big_vision
  python -m mixer.tools.convert runs/pets/best pets.safetensors   # timm
  python -m mixer.tools.convert Mixer-B_16.npz b16.safetensors
  python -m mixer.tools.convert hf://timm/mixer_b16_224.miil_in21k runs/miil
  python -m mixer.tools.convert old.npz new_448.npz --image_size=448
  python -m mixer.tools.convert runs/pets --report                # the tree of parameters

What OUT is follows from its name: .npz is the published layout (--layout=legacy: the legacy one),
.safetensors timm's, a name without an ending a run, which mixer.load, --config.init_from and every
tool take. Beside a file stands a JSON that says what it is (docs/weights.md). Values are not
changed: a round trip gives the same bits.
"""

import contextlib
import math
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
REPORT = flags.DEFINE_bool("report", False, "Print the tree: shapes, counts and norms.")


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
        report(loaded.params)
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
    from mixer.weights import formats as weights

    if "://" in str(out):
        raise UserError(f"{out}: give a local path, and copy what is written there")
    for path in (out, weights.card_path(out)) if out.suffix else (out,):
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
    from flax import traverse_util

    from mixer.weights import formats as weights

    if layout == "run":
        with _writing(out):
            write_run(out, loaded)
        print(f"written: {out} (checkpoints/0, config.json, data.json)")
        return
    arrays = traverse_util.flatten_dict(loaded.params, sep="/")
    with _writing(out):
        beside = weights.write_file(out, arrays, loaded.card, layout=layout)
    count = sum(array.size for array in arrays.values())
    size = out.stat().length / 1e6
    print(f"written: {out} ({layout} layout, {count:,} parameters, {size:,.1f} MB), {beside.name}")
    theirs = weights.GELU_OF[layout]
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
    from mixer.weights import formats as weights

    card = loaded.card
    with checkpoint.Checkpoints(new / "checkpoints", keep_last=1) as checkpoints:
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), loaded.params, ()))
        checkpoints.wait()
    height, width = card.image_size
    fields = {name: getattr(card, name) for name in (*weights.DIMENSIONS, "num_classes", "gelu")}
    config = {
        "source": card.source,
        "image_size": height if height == width else [height, width],
        "model": {"variant": card.variant, "dtype": loaded.model.dtype} | fields,
        "dataset": {"eval_preprocess": card.preprocess},
    }
    run_files.write_json(new / "config.json", config)
    run_files.write_json(new / "data.json", {"class_names": card.class_names})


def report(params) -> None:
    """Prints every module and array: shape, number of parameters, L2 norm."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "shape", "parameters", "norm", box=None)
    for column in table.columns[2:]:
        column.justify = "right"

    def add(name: str, node, depth: int) -> tuple[int, float]:
        """Adds a row for `node` and those below it; returns its count and sum of squares."""
        row = len(rows)
        rows.append(None)
        if isinstance(node, dict):
            parts = [add(key, node[key], depth + 1) for key in sorted(node, key=_in_order)]
            count, squares = (sum(part) for part in zip(*parts, strict=True))
            shape = ""
        else:
            count, squares = node.size, float(np.sum(np.square(np.asarray(node, np.float64))))
            shape = str(tuple(node.shape))
        rows[row] = ("  " * depth + name, shape, f"{count:,}", f"{math.sqrt(squares):.4g}")
        return count, squares

    rows: list = []
    add("params", params, 0)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    # Elsewhere than at a terminal no line is cut.
    console.print(table, width=None if console.is_terminal else 100, soft_wrap=False)


def _in_order(name: str) -> tuple[int, int, str]:
    """As the image passes them: stem, blocks by number, the last norm, the head."""
    stem, _, number = name.rpartition("_")
    if stem == "MixerBlock":
        return 1, int(number), ""
    places = {"stem": 0, "pre_head_layer_norm": 2, "head": 3, "token_mixing": 1}
    places |= {"channel_mixing": 3, "LayerNorm_1": 2, "LayerNorm_0": 0}
    return places.get(name, 0), 0, name


if __name__ == "__main__":
    cli.run(main)
