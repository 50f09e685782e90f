"""Sweeps the image size, or the share of shuffled patches, and measures the accuracy of weights.

  python -m mixer.tools.sweep resolution --weights=runs/cifar --sizes=16,24,32,48
  python -m mixer.tools.sweep resolution --weights=runs/cifar --sizes=32,64 --resize=grow
  python -m mixer.tools.sweep permutation --weights=runs/a,runs/b --output=runs/sweep
  python -m mixer.tools.sweep permutation --weights=pets.npz --config=configs/folder.py \
      --config.dataset.data_dir=pets/ --output=runs/sweep

The tool prints a table and writes sweep_<kind>.json and sweep_<kind>.png: top-1 with 95 %
intervals.
"""

from absl import flags

from mixer.cli import config as cli
from mixer.cli import program
from mixer.errors import UserError

KINDS = ("resolution", "permutation")
WEIGHTS = flags.DEFINE_list(
    "weights", [], "Runs, steps of runs, files of weights or short names such as B/16-i21k."
)
SPLIT = flags.DEFINE_enum("split", "test", ["test", "val", "train"], "Split of the config.")
OUTPUT = flags.DEFINE_string(
    "output", None, "Directory of the picture and the JSON file. Default for a single run: the run."
)
SIZES = flags.DEFINE_list("sizes", None, "resolution: sides of the images in pixels.")
RESIZE = flags.DEFINE_enum(
    "resize",
    "interpolate",
    ["interpolate", "grow"],
    "resolution: method that resizes the weights. interpolate: to any multiple of the patch size; "
    "grow: by integer factors, intended for fine-tuning.",
)
SHARES = flags.DEFINE_list(
    "shares", ["0", "0.25", "0.5", "0.75", "1"], "permutation: shares of the patches and pixels."
)
KIND_OF_FLAG = {"sizes": "resolution", "resize": "resolution", "shares": "permutation"}


def main(argv: list[str]) -> None:
    """Runs the sweep in the arguments."""
    if len(argv) != 2 or argv[1] not in KINDS:
        raise UserError(
            f"{' '.join(argv[1:]) or 'no arguments'}: expected resolution or permutation; see "
            "python -m mixer.tools.sweep --help"
        )
    for flag, kind in KIND_OF_FLAG.items():
        if flags.FLAGS[flag].present and kind != argv[1]:
            raise UserError(f"--{flag} is for the {kind} sweep")
    if not WEIGHTS.value:
        raise UserError(
            "--weights is missing; expected a run or a file, as in --weights=runs/cifar"
        )
    if len(set(WEIGHTS.value)) < len(WEIGHTS.value):
        raise UserError(f"--weights={','.join(WEIGHTS.value)}: duplicate; expected different names")
    sizes = program.numbers("sizes", SIZES.value)
    shares = program.numbers("shares", SHARES.value, float)
    if argv[1] == "resolution" and not sizes:
        raise UserError("--sizes is missing; for example --sizes=32,64")
    config = None if cli.CONFIG.value is None else cli.config()

    from mixer.console import Console
    from mixer.evaluation import sweeps, tables
    from mixer.evaluation.subject import open_subject

    console = Console()
    subjects = [open_subject(path, config=config, say=console.say) for path in WEIGHTS.value]
    for subject in subjects:
        sweeps.check_subject(subject)
    output = sweeps.output_directory(subjects, OUTPUT.value)
    options = dict(split_name=SPLIT.value, say=console.say)
    if argv[1] == "resolution":
        sweep = sweeps.resolution(subjects, sizes, resize=RESIZE.value, **options)
    else:
        sweep = sweeps.permutation(subjects, shares, **options)
    tables.print_table(console, sweeps.make_table(sweep))
    numbers, picture = sweeps.write(sweep, output)
    console.say(f"written to {numbers} and {picture}")


if __name__ == "__main__":
    cli.run(main)
