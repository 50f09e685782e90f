"""Exports a model for serving, as a file that runs without this package: StableHLO or ONNX.

  python -m mixer.tools.export runs/digits digits.stablehlo
  python -m mixer.tools.export Mixer-B_16.npz B16.stablehlo --weights=beside --dtype=bfloat16
  python -m mixer.tools.export runs/digits digits.onnx

WEIGHTS is a run, a step of a run, a file or a short name, as `mixer.load` takes it. The file takes
one or more uint8 images and returns float32 logits. The JSON next to a StableHLO program, and the
metadata of an ONNX file, describe the weights, the classes and the preprocessing. docs/export.md
shows how to run both.
"""

from pathlib import Path
from types import ModuleType

from absl import flags

from mixer.cli import config as cli
from mixer.errors import UserError

FORMATS = ("onnx", "stablehlo")

FORMAT = flags.DEFINE_enum(
    "format", None, FORMATS, "Format of the file. Default: the ending of its name."
)
OUTPUT = flags.DEFINE_enum(
    "output", "logits", ["logits", "pre_logits"], "Output of the program: logits or features."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size",
    None,
    "Resize the weights to images of this side in pixels, or HEIGHT,WIDTH.",
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Fixed number of images. Default: any number.", 1, 2**31 - 1
)
WEIGHTS = flags.DEFINE_enum(
    "weights",
    "inside",
    ["inside", "beside"],
    "StableHLO: embed the weights in the program, or write a safetensors file that is passed to "
    "it.",
)
PLATFORMS = flags.DEFINE_list(
    "platforms",
    None,
    "StableHLO: target platforms, any of cpu, cuda, rocm, tpu. Default: cpu,cuda,tpu.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "dtype of the computation. Default: the run's dtype for StableHLO, float32 for ONNX, which has "
    "no other.",
)
MAX_INSIDE_BYTES = flags.DEFINE_integer(
    "max_inside_bytes",
    None,
    "ONNX: write weights of more bytes to a second file, OUT.onnx.data; 0: always. Default: only "
    "weights that one file cannot hold, above 2.1 GB.",
    0,
    2**31 - 2**24,
)


def main(argv: list[str]) -> None:
    """Exports the weights of the first argument to the file of the second argument."""
    if len(argv) != 3:
        raise UserError(
            f"{' '.join(argv[1:]) or 'no arguments'}: expected WEIGHTS OUT.stablehlo or WEIGHTS "
            "OUT.onnx; see python -m mixer.tools.export --help"
        )
    is_onnx = _format(argv[2]) == "onnx"
    for path in (_export_onnx if is_onnx else _export_stablehlo)(*argv[1:]):
        print(f"{path}: {path.stat().st_size:,} bytes")


def _format(path: str) -> str:
    """Returns the format of --format or else of the path's ending."""
    ending = Path(path).suffix.removeprefix(".")
    if FORMAT.value is None and ending not in FORMATS:
        raise UserError(
            f"{path}: unknown file type; expected a name that ends in .stablehlo or .onnx, or "
            "--format"
        )
    return FORMAT.value or ending


def _export_stablehlo(source: str, target: str) -> list[Path]:
    from mixer.tools.export import serving
    from mixer.weights import load as loading

    if MAX_INSIDE_BYTES.value is not None:
        raise UserError(
            f"--max_inside_bytes={MAX_INSIDE_BYTES.value} is for ONNX; expected --weights=inside "
            "or --weights=beside for StableHLO"
        )
    platforms = ["cpu", "cuda", "tpu"] if PLATFORMS.value is None else PLATFORMS.value
    platforms = list(dict.fromkeys(platforms))
    paths = serving.check(target, weights=WEIGHTS.value, platforms=platforms)
    size = cli.image_size("image_size", IMAGE_SIZE.value)
    loaded = loading.read(source, image_size=size, dtype=DTYPE.value)
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
    return [path for path in (paths.program, paths.weights, paths.card) if path is not None]


def _export_onnx(source: str, target: str) -> list[Path]:
    onnx_model = _import_onnx_model(target)
    from mixer.weights import load as loading

    for option, is_set, hint in (
        ("--weights=beside", WEIGHTS.value == "beside", "--max_inside_bytes=0"),
        ("--platforms", PLATFORMS.value is not None, "no --platforms: the runtime has the choice"),
        ("--dtype=bfloat16", DTYPE.value == "bfloat16", "float32"),
    ):
        if is_set:
            raise UserError(f"{option} is for StableHLO; expected {hint} for ONNX")
    path = onnx_model.check(target)
    size = cli.image_size("image_size", IMAGE_SIZE.value)
    loaded = loading.read(source, image_size=size, dtype="float32")
    return onnx_model.write(
        loaded,
        path,
        output=OUTPUT.value,
        batch_size=BATCH_SIZE.value,
        max_inside_bytes=MAX_INSIDE_BYTES.value,
    )


def _import_onnx_model(target: str) -> ModuleType:
    try:
        from mixer.tools.export import onnx_model
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise UserError(f"{target} needs onnx: pip install -e .[onnx]") from None
    return onnx_model


if __name__ == "__main__":
    cli.run(main)
