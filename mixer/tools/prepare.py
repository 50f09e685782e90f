"""Prepares data before a run, and checks it.

  python -m mixer.tools.prepare tfds cifar10
  python -m mixer.tools.prepare check --config=configs/folder.py \
      --config.dataset.data_dir=/data/pets --output=pets_exclude.jsonl

`tfds NAME` downloads and prepares a data set of tensorflow-datasets. `check` decodes every image of
a config's splits and lists those that cannot be read; a run with
--config.dataset.exclude=pets_exclude.jsonl leaves them out before anything is ordered.
"""

import json
import sys
from pathlib import Path

from absl import flags

from mixer import cli
from mixer.errors import UserError

DATA_DIR = flags.DEFINE_string("data_dir", "", "tfds: where to; TFDS's own default if not given.")
OUTPUT = flags.DEFINE_string("output", "exclude.jsonl", "check: the list to write.")


def main(argv: list[str]) -> None:
    """Runs the command that the arguments name."""
    match argv[1:]:
        case ["tfds", name]:
            prepare_tfds(name, DATA_DIR.value)
        case ["check"]:
            check(cli.config(), OUTPUT.value)
        case other:
            raise UserError(
                f"{' '.join(other) or 'no command'}: expected `tfds NAME` or `check --config=...`; "
                "see python -m mixer.tools.prepare --help"
            )


def prepare_tfds(name: str, data_dir: str) -> None:
    """Downloads and prepares a TFDS data set."""
    import tensorflow_datasets as tfds

    from mixer.data import sources

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = sources.tfds_builder(name, data_dir, prepared=False)
    try:
        builder.download_and_prepare(file_format=tfds.core.FileFormat.TFRECORD)
    except (OSError, tfds.download.DownloadError, AssertionError) as error:
        # No network, a moved file, or one that has to be fetched by hand: the message says where.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} could not be prepared in {builder.data_dir}: {reason}") from error
    sizes = ", ".join(
        f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items()
    )
    print(f"{builder.info.full_name} is prepared in {builder.data_dir}: {sizes}")


def check(config, output: str) -> None:
    """Decodes every image of the config's splits; writes a list of those that cannot be read."""
    from rich.console import Console
    from rich.progress import track

    from mixer.data import pipeline, sources
    from mixer.data.preprocess import make_preprocess

    if config.dataset.name == "synthetic":
        raise UserError("synthetic data has no images to check")
    console = Console(highlight=False, soft_wrap=True)
    faults: dict[str, str] = {}
    seen = 0
    try:
        Path(output).write_text("")  # tried before the long work, not after it
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error.strerror}") from None
    size = (config.image_size, config.image_size)
    for which in ("train", "val", "test"):
        spec = config.dataset[f"{which}_split"]
        if not spec:
            continue
        steps = config.dataset["train_preprocess" if which == "train" else "eval_preprocess"]
        source = pipeline.open_source(config.dataset, spec, None)
        results = sources.check(source, make_preprocess(steps, size))
        if console.is_terminal:
            results = track(results, f"checking {spec}", len(source.kept), console=console)
        for number, fault in results:
            seen += 1
            if fault is not None:
                faults[source.example_id(number)] = fault
    if config.dataset.exclude:  # a list made earlier stays in force
        for example in pipeline.read_exclusions(config.dataset.exclude):
            faults.setdefault(example, f"listed in {config.dataset.exclude}")
    with open(output, "w") as file:
        for example in sorted(faults):
            file.write(json.dumps({"example": example, "reason": faults[example]}) + "\n")
            console.print(f"{example}: {faults[example]}", markup=False)
    console.print(f"{seen:,} images checked, {len(faults):,} cannot be used; list: {output}")
    if faults:
        console.print(f"leave them out with --config.dataset.exclude={output}")


if __name__ == "__main__":
    cli.run(main)
