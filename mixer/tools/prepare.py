"""Prepares and checks the data of a run.

  python -m mixer.tools.prepare tfds cifar10
  python -m mixer.tools.prepare imagenet21k --source=/data/fall11_whole.tar --data_dir=/data/tfds
  python -m mixer.tools.prepare check --config=configs/folder.py \
      --config.dataset.data_dir=/data/pets --output=pets_exclude.jsonl

`tfds NAME` downloads and prepares a data set of tensorflow-datasets. `imagenet21k` prepares
ImageNet-21k from its official tar files (docs/imagenet21k.md); after an interruption, the same
command resumes. `check` decodes every image of a config's splits and lists those that cannot be
read; a run with --config.dataset.exclude=pets_exclude.jsonl excludes them before it shuffles.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from mixer import files, sizes
from mixer.cli import config as cli
from mixer.errors import UserError, printable

DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "tfds, imagenet21k: output directory. Default: the default of TFDS."
)
SOURCE = flags.DEFINE_string("source", "", "imagenet21k: a folder or a tar file.")
RELEASE = flags.DEFINE_enum(
    "release",
    "",
    ["", "fall11", "winter21", "winter21_p"],
    "imagenet21k: release, if it is not clear from the name of the source.",
)
OUTPUT = flags.DEFINE_string("output", "exclude.jsonl", "check: file for the list of images.")
LINE_SECS = 60.0  # interval of progress lines without a terminal


def main(argv: list[str]) -> None:
    """Runs the command in the arguments."""
    match argv[1:]:
        case ["tfds", name]:
            prepare_tfds(name, DATA_DIR.value)
        case ["imagenet21k"]:
            prepare_imagenet21k(SOURCE.value, DATA_DIR.value, RELEASE.value)
        case ["check"]:
            check(cli.config(), OUTPUT.value)
        case arguments:
            raise UserError(
                f"{' '.join(arguments) or 'no command'}: expected `tfds NAME`, `imagenet21k "
                "--source=...` or `check --config=...`; see python -m mixer.tools.prepare --help"
            )


def prepare_tfds(name: str, data_dir: str) -> None:
    """Downloads and prepares a TFDS data set."""
    import tensorflow_datasets as tfds

    from mixer.data.sources import stored as sources

    if name.partition("/")[0] == "imagenet21k":
        raise UserError(
            "imagenet21k cannot be downloaded automatically; get its tar files from "
            "image-net.org, then run `python -m mixer.tools.prepare imagenet21k "
            "--source=TAR_OR_FOLDER`"
        )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with sources.bounded_downloads():
        builder = sources.tfds_builder(name, data_dir, prepared=False)
        try:
            builder.download_and_prepare(file_format=tfds.core.FileFormat.TFRECORD)
        except sources.DOWNLOAD_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{name} could not be prepared in {builder.data_dir}: {reason[:500]} (without a "
                "network, copy the folder from a machine that has prepared it)"
            ) from error
    _print_prepared(builder)


def prepare_imagenet21k(source: str, data_dir: str, release: str) -> None:
    """Prepares ImageNet-21k from its tar files, or resumes an interrupted preparation."""
    import tensorflow as tf

    from mixer.data.imagenet import imagenet21k, imagenet21k_source

    tf.config.set_visible_devices([], "GPU")  # TensorFlow would allocate all GPU memory
    archive = imagenet21k_source.find_source(source, release)
    print(f"{archive.path}: {archive.release}, {archive.num_bytes / 1e9:,.1f} GB", flush=True)
    try:
        with _progress() as report:
            summary = imagenet21k.prepare(archive, data_dir, report=report)
    except KeyboardInterrupt:
        print(
            "stopped; the same command resumes and repeats only the last seconds", file=sys.stderr
        )
        sys.exit(128 + signal.SIGINT)
    if summary is not None:
        expected = imagenet21k_source.RELEASES[archive.release]
        print(
            f"{summary.synsets:,} of {expected:,} synsets present, {summary.damaged:,} damaged; "
            f"{summary.skipped:,} faults in {summary.skipped_path}"
        )
    _print_prepared(imagenet21k.builder(archive.release, data_dir))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """Shows the progress of a preparation: a bar on a terminal, otherwise a line per minute."""
    from rich import progress

    from mixer.console import Console
    from mixer.formatting import duration

    console = Console()
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[status]}"),
    )
    bar = progress.Progress(*columns, console=console) if console.is_terminal else None
    tasks = {}
    starts = {}  # by stage: time and state when this process entered the stage
    last_update = time.monotonic()

    def report(state: Any) -> None:
        nonlocal last_update
        clock = time.monotonic()
        start_time, start = starts.setdefault(state.stage, (clock, state))
        if clock - last_update < (0.2 if bar else LINE_SECS):
            return
        last_update = clock
        seconds = max(clock - start_time, 1e-9)
        rate = (state.images - start.images) / seconds
        speed = (state.done_bytes - start.done_bytes) / seconds
        # The bytes read from a packed file slightly exceed its size.
        remaining_bytes = max(state.total_bytes - state.done_bytes, 0)
        time_left = duration(remaining_bytes / speed) if speed else "?"
        faults = f"{state.skipped:,} faults"
        status = f"{state.images:,} images  {rate:,.0f} images/s  {faults}  left {time_left}"
        if bar:
            if state.stage not in tasks:
                tasks[state.stage] = bar.add_task(state.stage, total=state.total_bytes, status="")
            bar.update(tasks[state.stage], completed=state.done_bytes, status=status)
        else:
            share = 1 - remaining_bytes / state.total_bytes
            console.say(f"{state.stage} {share:.1%}  {status}")

    with bar or contextlib.nullcontext():
        yield report


def _print_prepared(builder) -> None:
    sizes = ", ".join(
        f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items()
    )
    print(f"{builder.info.full_name} is prepared in {builder.data_dir}: {sizes}")


def check(config, output: str) -> None:
    """Decodes every image of the config's splits; writes a list of those that cannot be read.

    All other errors and warnings that a training run would give are reported as in training.
    """
    from mixer.console import Console, ProgressBar
    from mixer.data import splits as pipeline
    from mixer.data.stored_split import make_split
    from mixer.runs import config as run

    if config.dataset.name == "synthetic":
        raise UserError("synthetic data has no images to check")
    console = Console()
    faults: dict[str, str] = {}
    num_images = 0
    files.check_output("--output", output)
    run.check_config(config)
    run.resolve_channels(config)
    # Check everything except the images first, because reading all images can take hours.
    with contextlib.suppress(pipeline.Unusable):
        _open_as_training(config)
    size = sizes.pair(config.image_size)
    for name in ("train", "val", "test"):
        spec = config.dataset[f"{name}_split"]
        if not spec:
            continue
        steps = config.dataset["train_preprocess" if name == "train" else "eval_preprocess"]
        source = pipeline.open_source(config.dataset, spec, None, config.model.num_classes)
        results = make_split(source, steps, image_size=size).check()
        with ProgressBar(console, f"checking {spec}", total=len(source.kept_numbers)) as bar:
            for number, fault in results:
                bar.count(1, "images")
                num_images += 1
                if fault is not None:
                    faults[source.example_id(number)] = fault
    if config.dataset.exclude:  # the new list includes the list of the config
        for example in pipeline.read_exclusions(config.dataset.exclude):
            faults.setdefault(example, f"listed in {config.dataset.exclude}")
    with files.atomic_write(output) as new_path, new_path.open("w") as file:
        for example in sorted(faults):
            file.write(json.dumps({"example": example, "reason": faults[example]}) + "\n")
            console.say(f"{printable(example)}: {faults[example]}")
    console.say(f"{num_images:,} images checked, {len(faults):,} cannot be used; list: {output}")
    clean_config = config.copy_and_resolve_references()
    if faults:
        console.say(f"exclude them with --config.dataset.exclude={output}")
        clean_config.dataset.exclude = output
    train = _open_as_training(clean_config).train
    for line in pipeline.remarks(config.dataset, train):
        console.say(f"warning: {line}")


def _open_as_training(config) -> Any:
    """Opens the splits of a config; raises UserError if training with it would."""
    from mixer.runs import data as run_data

    splits = run_data.open_splits(config, None)
    if config.model.num_classes is not None:
        run_data.check_classes(config, splits.train.class_names)
    return splits


if __name__ == "__main__":
    cli.run(main)
