"""Draws pictures of a run as PNG files, and writes an HTML page that shows them.

  python -m mixer.tools.inspect --workdir=runs/digits
  python -m mixer.tools.inspect --workdir=runs/digits,runs/seed1 --checkpoint=best --output=pictures
  python -m mixer.tools.inspect --weights=Mixer-B_16.npz --output=B16 --data_dir=FOLDER --split=val

The pictures show training curves, the stem's filters, token-mixing units, activations by depth,
confusions and the images with the most confident guesses. With several runs, the page compares them
and shows these pictures for the first. RUN/inspect/index.html is self-contained. docs/inspect.md
explains the pictures.
"""

from absl import flags

from mixer.cli import config as cli
from mixer.errors import UserError, printable

WORKDIR = flags.DEFINE_list("workdir", [], "Directory of the run, or of several: RUN,RUN2,...")
WEIGHTS = flags.DEFINE_string(
    "weights", None, "Instead of runs: a file of weights or a short name such as B/16-i21k."
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Checkpoint of the run: last, best (by validation) or a step number."
)
OUTPUT = flags.DEFINE_string("output", None, "Directory of the pictures. Default: RUN/inspect.")
SPLIT = flags.DEFINE_enum(
    "split", None, ["test", "val"], "Split to evaluate. Default: test, or val without a test split."
)
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Data directory; for --weights, a folder with SPLIT/CLASS/IMAGE."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image_size", None, "For --weights: resize them to this side in pixels, or HEIGHT,WIDTH."
)


def main(argv: list[str]) -> None:
    """Draws the pictures of the run or the weights in the flags."""
    if len(argv) > 1:
        raise UserError(
            f"unexpected argument {argv[1]!r}; see python -m mixer.tools.inspect --help"
        )
    if cli.CONFIG.value is not None:
        raise UserError("--config is not accepted; a run is drawn with its own config")
    workdirs = list(filter(None, WORKDIR.value))
    if bool(workdirs) == bool(WEIGHTS.value):
        raise UserError(
            "expected either --workdir=RUN or --weights=FILE, as in --workdir=runs/digits"
        )
    if workdirs and IMAGE_SIZE.value:
        raise UserError("--image_size is for --weights; a run has its own image size")
    if WEIGHTS.value and flags.FLAGS["checkpoint"].present:
        raise UserError(f"--checkpoint={CHECKPOINT.value} is for runs; expected --workdir=RUN")
    from mixer.parallel import backend
    from mixer.tools.inspect import page

    backend.start()
    path = page.write(
        workdirs=workdirs,
        weights=WEIGHTS.value,
        checkpoint_name=CHECKPOINT.value,
        output=OUTPUT.value,
        split_name=SPLIT.value,
        data_dir=DATA_DIR.value,
        image_size=cli.image_size("image_size", IMAGE_SIZE.value),
        log=lambda line: print(printable(line), flush=True),
    )
    print(printable(f"written to {path}"))


if __name__ == "__main__":
    cli.run(main)
