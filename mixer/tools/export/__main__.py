"""Exports a model for serving: a StableHLO program that runs without this package.

  python -m mixer.tools.export runs/digits digits.stablehlo
  python -m mixer.tools.export Mixer-B_16.npz B16.stablehlo --weights=beside --dtype=bfloat16

WEIGHTS is a run, a step of a run, a file or a short name, as `mixer.load` takes it. The program
takes one or more uint8 images and returns float32 logits. A JSON file next to it describes its
inputs, its output and how to call it from Python. docs/export.md shows how to load it.
"""

from absl import flags

from mixer.cli import config as cli
from mixer.errors import UserError

WEIGHTS = flags.DEFINE_enum(
    "weights",
    "inside",
    ["inside", "beside"],
    "Embed the weights in the program, or write a safetensors file that is passed to it.",
)
PLATFORMS = flags.DEFINE_list(
    "platforms", ["cpu", "cuda", "tpu"], "Target platforms: any of cpu, cuda, rocm, tpu."
)
OUTPUT = flags.DEFINE_enum(
    "output", "logits", ["logits", "pre_logits"], "Output of the program: logits or features."
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "dtype of the computation. Default: the run's dtype."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size",
    None,
    "Resize the weights to images of this side in pixels, or HEIGHT,WIDTH.",
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Fixed number of images. Default: any number.", 1, 2**31 - 1
)


def main(argv: list[str]) -> None:
    """Exports the weights of the first argument to the file of the second argument."""
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
