"""Prepares data before a run, and checks it.

  python -m mixer.tools.prepare tfds cifar10
  python -m mixer.tools.prepare imagenet21k --source=/data/fall11_whole.tar --data_dir=/data/tfds
  python -m mixer.tools.prepare check --config=configs/folder.py \
      --config.dataset.data_dir=/data/pets --output=pets_exclude.jsonl

`tfds NAME` downloads and prepares a data set of tensorflow-datasets. `imagenet21k` makes one of the
official tar files (docs/imagenet21k.md); stopped or killed, the same command goes on. `check`
decodes every image of a config's splits and lists those that cannot be read; a run with
--config.dataset.exclude=pets_exclude.jsonl leaves them out before anything is ordered.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from mixer import files
from mixer.cli import config as cli
from mixer.errors import UserError

DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "tfds, imagenet21k: where to; TFDS's own default if not given."
)
SOURCE = flags.DEFINE_string("source", "", "imagenet21k: a folder or a tar file.")
RELEASE = flags.DEFINE_enum(
    "release",
    "",
    ["", "fall11", "winter21", "winter21_p"],
    "imagenet21k: which it is, where its name does not tell.",
)
OUTPUT = flags.DEFINE_string("output", "exclude.jsonl", "check: the list to write.")
LINE_SECS = 60.0


def main(argv: list[str]) -> None:
    """Runs the command that the arguments name."""
    match argv[1:]:
        case ["tfds", name]:
            prepare_tfds(name, DATA_DIR.value)
        case ["imagenet21k"]:
            prepare_imagenet21k(SOURCE.value, DATA_DIR.value, RELEASE.value)
        case ["check"]:
            check(cli.config(), OUTPUT.value)
        case other:
            raise UserError(
                f"{' '.join(other) or 'no command'}: expected `tfds NAME`, `imagenet21k "
                "--source=...` or `check --config=...`; see python -m mixer.tools.prepare --help"
            )


def prepare_tfds(name: str, data_dir: str) -> None:
    """Downloads and prepares a TFDS data set."""
    import tensorflow_datasets as tfds

    from mixer.data.sources import stored as sources

    if name.partition("/")[0] == "imagenet21k":
        raise UserError(
            "imagenet21k is not downloaded: get its tar files from image-net.org, then "
            "`python -m mixer.tools.prepare imagenet21k --source=TAR_OR_FOLDER`"
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
    """Prepares ImageNet-21k from its tar files, or goes on where it was stopped."""
    import tensorflow as tf

    from mixer.data.imagenet import imagenet21k, imagenet21k_source

    tf.config.set_visible_devices([], "GPU")  # TensorFlow would take all of its memory
    found = imagenet21k_source.find_source(source, release)
    print(f"{found.path}: {found.release}, {found.num_bytes / 1e9:,.1f} GB", flush=True)
    try:
        with _progress() as report:
            summary = imagenet21k.prepare(found, data_dir, report=report)
    except KeyboardInterrupt:
        print("stopped; the same command goes on, but for the last seconds", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if summary is not None:
        expected = imagenet21k_source.RELEASES[found.release]
        print(
            f"{summary.synsets:,} of {expected:,} synsets present, {summary.damaged:,} damaged; "
            f"{summary.skipped:,} faults in {summary.skipped_path}"
        )
    _print_prepared(imagenet21k.builder(found.release, data_dir))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """Shows how far a preparation is: a bar at a terminal, else a line a minute."""
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
    begun = {}  # by stage: when this process came to it, and how far it was
    shown = time.monotonic()

    def report(now: Any) -> None:
        nonlocal shown
        clock = time.monotonic()
        since, first = begun.setdefault(now.stage, (clock, now))
        if clock - shown < (0.2 if bar else LINE_SECS):
            return
        shown = clock
        seconds = max(clock - since, 1e-9)
        rate = (now.images - first.images) / seconds
        speed = (now.done_bytes - first.done_bytes) / seconds
        # What a packed file holds is a little more than its size.
        left_bytes = max(now.total_bytes - now.done_bytes, 0)
        left = duration(left_bytes / speed) if speed else "?"
        status = f"{now.images:,} images  {rate:,.0f} images/s  {now.skipped:,} faults  left {left}"
        if bar:
            if now.stage not in tasks:
                tasks[now.stage] = bar.add_task(now.stage, total=now.total_bytes, status="")
            bar.update(tasks[now.stage], completed=now.done_bytes, status=status)
        else:
            share = 1 - left_bytes / now.total_bytes
            console.say(f"{now.stage} {share:.1%}  {status}")

    with bar or contextlib.nullcontext():
        yield report


def _print_prepared(builder) -> None:
    sizes = ", ".join(
        f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items()
    )
    print(f"{builder.info.full_name} is prepared in {builder.data_dir}: {sizes}")


def check(config, output: str) -> None:
    """Decodes every image of the config's splits; writes a list of those that cannot be read.

    Whatever else would end or disturb a training run is told as training tells it.
    """
    from mixer.console import Console, ProgressBar
    from mixer.data import splits as pipeline
    from mixer.data.sources import folder
    from mixer.data.stored_split import make_split

    if config.dataset.name == "synthetic":
        raise UserError("synthetic data has no images to check")
    console = Console()
    faults: dict[str, str] = {}
    seen = 0
    files.check_output("--output", output)
    # The mistakes that are not an image's come first: reading all may take hours.
    with contextlib.suppress(pipeline.Unusable):
        _open_as_training(config)
    size = (config.image_size, config.image_size)
    for which in ("train", "val", "test"):
        spec = config.dataset[f"{which}_split"]
        if not spec:
            continue
        steps = config.dataset["train_preprocess" if which == "train" else "eval_preprocess"]
        source = pipeline.open_source(config.dataset, spec, None, config.model.num_classes)
        results = make_split(source, steps, image_size=size).check()
        with ProgressBar(console, f"checking {spec}", total=len(source.kept)) as bar:
            for number, fault in results:
                bar.count(1, "images")
                seen += 1
                if fault is not None:
                    faults[source.example_id(number)] = fault
    if config.dataset.exclude:  # a list made earlier stays in force
        for example in pipeline.read_exclusions(config.dataset.exclude):
            faults.setdefault(example, f"listed in {config.dataset.exclude}")
    with files.whole(output) as new, new.open("w") as file:
        for example in sorted(faults):
            file.write(json.dumps({"example": example, "reason": faults[example]}) + "\n")
            console.say(f"{folder.displayed(example)}: {faults[example]}")
    console.say(f"{seen:,} images checked, {len(faults):,} cannot be used; list: {output}")
    rest = config.copy_and_resolve_references()
    if faults:
        console.say(f"leave them out with --config.dataset.exclude={output}")
        rest.dataset.exclude = output
    train = _open_as_training(rest).train
    for line in pipeline.remarks(config.dataset, train):
        console.say(f"warning: {line}")


def _open_as_training(config) -> Any:
    """The splits of a config; UserError for what a run with it would be refused for."""
    from mixer.runs import config as run

    run.check_config(config)
    splits = run.open_splits(config, None)
    if config.model.num_classes is not None:
        run.check_classes(config, splits.train.class_names)
    return splits


if __name__ == "__main__":
    cli.run(main)
