"""Exports a model for serving: a StableHLO program that runs without this package.

  python -m mixer.tools.export runs/digits digits.stablehlo
  python -m mixer.tools.export Mixer-B_16.npz B16.stablehlo --weights=beside --dtype=bfloat16

WEIGHTS is a run, a step of it, a file or a short name, whatever `mixer.load` takes. The program
takes one uint8 image or more and returns float32 logits; a JSON beside it tells what it takes,
what it returns and how it is called from Python. docs/export.md shows how it is loaded.
"""

from absl import flags

from mixer.cli import config as cli
from mixer.errors import UserError

WEIGHTS = flags.DEFINE_enum(
    "weights",
    "inside",
    ["inside", "beside"],
    "Weights as constants of the program, or in a safetensors file that it is called with.",
)
PLATFORMS = flags.DEFINE_list(
    "platforms", ["cpu", "cuda", "tpu"], "What it is to run on, of cpu, cuda, rocm, tpu."
)
OUTPUT = flags.DEFINE_enum(
    "output", "logits", ["logits", "pre_logits"], "What it returns: logits, or features."
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the computation; the run's own if not given."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size",
    None,
    "For images of another size: a side in pixels, or HEIGHT,WIDTH; the weights are grown to it.",
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Fixes the number of images; any from 1 if not given.", 1, 2**31 - 1
)


def main(argv: list[str]) -> None:
    """Exports the weights that the first argument names to the file that the second names."""
    if len(argv) != 3:
        raise UserError(
            f"{' '.join(argv[1:]) or 'no arguments'}: expected WEIGHTS OUT.stablehlo; see "
            "python -m mixer.tools.export --help"
        )
    from mixer.tools.export import serving
    from mixer.weights import load as loading

    platforms = list(dict.fromkeys(PLATFORMS.value))
    paths = serving.check(argv[2], weights=WEIGHTS.value, platforms=platforms)
    size = cli.image_size("image_size", IMAGE_SIZE.value)
    loaded = loading.read(argv[1], image_size=size, dtype=DTYPE.value)
    arrays = serving.served_weights(loaded)
    program = serving.make_program(
        loaded,
        arrays,
        weights=WEIGHTS.value,
        output=OUTPUT.value,
        platforms=platforms,
        batch_size=BATCH_SIZE.value,
    )
    serving.write(loaded, program, arrays, paths)
    for path in (paths.program, paths.weights, paths.card):
        if path is not None:
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    cli.run(main)
