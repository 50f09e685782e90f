"""Evaluates a run on its validation and test splits: a table here, JSON in the run.

  python evaluate.py --workdir=runs/digits
  python evaluate.py --workdir=runs/digits --checkpoint=best --split=test

The model, the data, the preprocessing and the class names are the run's own.
"""

from absl import flags

from mixer import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Which weights: last, best (by validation) or a step's number."
)
SPLIT = flags.DEFINE_enum(
    "split", "all", ["all", "val", "test", "train"], "Which split of the config; all: val and test."
)

DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data is now, if it has moved since the training."
)
LABEL_FILE = flags.DEFINE_string(
    "label_file", None, "Where its file of labels is now, if that has moved."
)


def main(argv: list[str]) -> None:
    """Evaluates what the flags say."""
    if len(argv) > 1:
        raise cli.UserError(f"unexpected argument {argv[1]!r}; see python evaluate.py --help")
    if cli.CONFIG.value is not None:
        raise cli.UserError("--config is not accepted: a run is evaluated with its own config")
    if not WORKDIR.value:
        raise cli.UserError("--workdir is missing; for example --workdir=runs/digits")
    from mixer.evaluation import report

    splits = ["val", "test"] if SPLIT.value == "all" else [SPLIT.value]
    report.evaluate_run(
        WORKDIR.value,
        checkpoint_name=CHECKPOINT.value,
        splits=splits,
        data_dir=DATA_DIR.value,
        label_file=LABEL_FILE.value,
    )


if __name__ == "__main__":
    cli.run(main)
