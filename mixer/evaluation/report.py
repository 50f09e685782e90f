"""Evaluates weights and writes the results to their report card, for `evaluate.py`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from rich.text import Text

from mixer import files, run_files
from mixer.console import Console, ProgressBar
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import (
    classification,
    fewshot,
    linear_probe,
    omnibenchmark,
    results,
    scores,
    suites,
    tables,
    throughput,
)
from mixer.evaluation.results import ReportCard, Results
from mixer.evaluation.subject import Subject, Weights, read_weights
from mixer.parallel import processes, sharding
from mixer.runs import config as run
from mixer.runs import data as run_data
from mixer.training import losses
from mixer.training.step import make_predict

OMNIBENCHMARK, THROUGHPUT = "omnibenchmark", "throughput"


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of an evaluation.

    Attributes:
      splits: names of the splits of the subjects' configs to evaluate, if there is no suite.
      suite: tasks and groups of `suites`, PROBES, "omnibenchmark" and "throughput".
      data_dir: data directory; "": the config's, or the default of TFDS.
      label_file: file of labels; None: the config's.
      save_predictions: whether to write evaluation/SET.npz, the predictions for every image.
      batch_sizes: images per device for "throughput".
      realms: realms for "omnibenchmark"; none: all realms in `data_dir`.
    """

    splits: Sequence[str] = ()
    suite: Sequence[str] = ()
    data_dir: str = ""
    label_file: str | None = None
    save_predictions: bool = False
    batch_sizes: Sequence[int] = throughput.BATCH_SIZES
    realms: Sequence[str] = ()


# The probes of `--suite`: modules with `assign`, which takes the training, validation and test
# split, and `evaluate`, which takes the splits that `assign` returns.
PROBES = {"fewshot": fewshot, "linear_probe": linear_probe}


def evaluate(
    subjects: Sequence[Callable[[], Subject]], options: Options, *, output: str | None = None
) -> None:
    """Evaluates weights in turn; prints a report for each and a table that compares them.

    Args:
      subjects: functions that open a subject; they are called in turn, so that only one set of
        weights is in memory.
      options: the options of the evaluation.
      output: directory of side_by_side.md, the table that compares the weights; None: no file.

    Raises:
      UserError: data is missing or has other classes than the weights. With several weights, the
        error is raised after the other weights are evaluated.
    """
    console = Console()
    if output is not None and processes.is_main():
        files.make_directory(output, "--output")
    names = suites.expand(options.suite, probes=(*PROBES, OMNIBENCHMARK, THROUGHPUT))
    options = dataclasses.replace(options, suite=names)
    results_by_name: dict[str, Results] = {}
    failures: list[str] = []
    for open_subject in subjects:
        subject = None
        try:
            subject = open_subject()
            results_by_name[subject.name] = _evaluate(subject, options, console)
        except UserError as error:
            if len(subjects) == 1 or jax.process_count() > 1:
                raise  # other processes may be evaluating this subject
            failures.append(f"{subject.name}: {error}" if subject else str(error))
    if len(results_by_name) > 1:
        _show_side_by_side(results_by_name, console, output)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(subjects)} were not evaluated: {'; '.join(failures)}"
        )


def _show_side_by_side(
    results_by_name: Mapping[str, Results], console: Console, output: str | None
) -> None:
    title = "Comparison: top-1 with 95 % interval, images/s per device."
    table = results.side_by_side(results_by_name)
    console.say("")
    tables.print_document(console, title, [table])
    if output is not None and processes.is_main():
        path = epath.Path(output).expanduser() / "side_by_side.md"
        path.write_text("\n".join([title, "", *tables.markdown(table)]) + "\n")
        console.say(f"written to {path}")


def _evaluate(subject: Subject, options: Options, console: Console) -> Results:
    """Evaluates one subject; returns its new results."""
    if subject.config is not None:
        if options.data_dir:
            subject.config.dataset.data_dir = options.data_dir
        if options.label_file is not None:
            subject.config.dataset.label_file = options.label_file
    # Open all data first, so that errors in the data are raised before the evaluation.
    splits = _open_splits(subject, options, console.say)
    probes = [name for name in PROBES if name in options.suite]
    probe_splits = _open_probe_splits(subject, options.data_dir) if probes else {}
    probe_data = {
        probe: {name: PROBES[probe].assign(*splits) for name, splits in probe_splits.items()}
        for probe in probes
    }
    realms = {}
    if OMNIBENCHMARK in options.suite:
        realms = omnibenchmark.open_realms(
            options.data_dir,
            options.realms,
            image_size=subject.card.image_size,
            channels=subject.card.in_channels,
            preprocess=subject.card.preprocess,
            say=console.say,
        )
    weights = read_weights(subject, console.say)
    card = ReportCard(subject, weights.identity)
    if splits:
        _classify(subject, weights, splits, options, card, console)
    for name, data in probe_data.items():
        _probe(name, subject, weights, data, card, console)
    if realms:
        summaries = omnibenchmark.evaluate(
            weights.model,
            {suffix: read_params() for suffix, read_params in weights.params.items()},
            realms,
            card.read_section(OMNIBENCHMARK),
            batching=subject.batching,
            say=console.say,
        )
        for name, summary in summaries:
            card.add(OMNIBENCHMARK, name, summary)
    if THROUGHPUT in options.suite:
        with console.status("throughput"):
            result = throughput.measure(
                weights.model,
                weights.params[""](),
                subject.card.image_size,
                batch_sizes=options.batch_sizes,
                mesh=subject.batching.mesh,
            )
        card.add(THROUGHPUT, subject.card.variant or "model", result)
    _add_cost(subject, card, console)
    card.print(console)
    return card.new_results


def _open_splits(
    subject: Subject, options: Options, say: Callable[[str], None]
) -> dict[str, Split]:
    """Opens the splits to classify, keyed by the name of their results."""
    card = subject.card
    splits = {} if options.suite else _open_own_splits(subject, options.splits, say)
    for name in _prepared_tasks(options, say):
        suites.check_preprocess(subject.name, card.preprocess, card.image_size)
        splits[name] = suites.open_task(
            name,
            preprocess=card.preprocess,
            image_size=card.image_size,
            channels=card.in_channels,
            data_dir=options.data_dir,
        )
    for split in splits.values():
        if note := suites.check_classes(split, card.class_names, card.num_classes):
            say(f"{subject.name}: {note}")
    return splits


def _open_probe_splits(
    subject: Subject, data_dir: str
) -> dict[str, tuple[Split, Split | None, Split | None]]:
    """Opens training, validation and test split of the data of probes, by the name of the result.

    The data is that of the config; without a config, the data sets of the few-shot probe.
    """
    config = subject.config
    if config is None:
        card = subject.card
        sets = suites.open_fewshot(card.image_size, data_dir, channels=card.in_channels)
        return {name: (train, None, test) for name, (train, test) in sets.items()}
    splits = (run_data.open_split(config, name, None) for name in ("train", "val", "test"))
    return {run_data.data_name(config): tuple(splits)}


def _open_own_splits(
    subject: Subject, split_names: Sequence[str], say: Callable[[str], None]
) -> dict[str, Split]:
    """Opens the splits of the subject's config, keyed by the name of their results.

    The name is "val" or "test" if the run of the weights was trained with the same data; otherwise
    the name includes the data set, as in "cifar10_test".
    """
    config = subject.config
    if config is None:
        raise UserError(
            f"{subject.name} does not specify a data set; pass --config=FILE or --suite=NAME (one "
            f"of {', '.join((*suites.GROUPS, *PROBES, OMNIBENCHMARK, THROUGHPUT, *suites.TASKS))})"
        )
    record = subject.data_record() or {}
    class_names = subject.class_names
    if not subject.has_own_data:
        class_names = suites.names_for(config.dataset, subject.card.class_names)
    splits = {}
    for name in split_names:
        split = run_data.open_own_split(config, name, class_names, record)
        if split is None:
            continue
        long_name = f"{run_data.data_name(config)}_{name}"
        change = name in record and run_data.describe_change(record[name], split)
        if change:
            say(
                f"{split.name} differs from the data of the run: {split.num_examples:,} images; "
                f"expected {record[name]['num_examples']:,} ({change}); the result is named "
                f"{long_name}"
            )
        is_own = subject.has_own_data and name in record and not change
        splits[name if is_own else long_name] = split
    if not splits:
        keys = " and ".join(f"dataset.{name}_split" for name in split_names)
        raise UserError(f"{keys}: empty in the config of {subject.name}; expected a split")
    return splits


def _prepared_tasks(options: Options, say: Callable[[str], None]) -> list[str]:
    """Returns the tasks of the suite whose data is prepared, or all tasks if none is prepared."""
    tasks = [name for name in options.suite if name in suites.TASKS]
    missing_tasks = [name for name in tasks if not suites.is_prepared(name, options.data_dir)]
    if len(missing_tasks) == len(tasks):
        return tasks  # opening the first task raises an error that names its data
    for name in missing_tasks:
        say(f"{name}: skipped, because {suites.TASKS[name].dataset} is not prepared")
    return [name for name in tasks if name not in missing_tasks]


def _classify(
    subject: Subject,
    weights: Weights,
    splits: Mapping[str, Split],
    options: Options,
    card: ReportCard,
    console: Console,
) -> None:
    """Evaluates every set of parameters on every split, and adds the results to the card."""
    eval_step = classification.make_eval_step(
        make_predict(weights.model, subject.batching.mesh),
        losses.make_loss(subject.loss),
        subject.card.num_classes,
    )
    # Limit the batch size to the largest split: batches of small splits would be mostly padding.
    shards = sharding.batch_shards(subject.batching.mesh)
    largest = max(split.num_examples for split in splits.values())
    batch_size = min(subject.batching.global_batch_size, -(-largest // shards) * shards)
    batching = dataclasses.replace(subject.batching, global_batch_size=batch_size)
    for suffix, read_params in weights.params.items():
        params = read_params()
        for name, split in splits.items():
            name = f"{name}{suffix}"
            with ProgressBar(console, name, total=split.num_examples) as bar:
                result = classification.evaluate(
                    eval_step,
                    params,
                    split,
                    batching=batching,
                    # Called after every batch; `count` moves the bar and returns None.
                    should_stop=lambda bar=bar: bool(bar.count(batch_size, "images")),
                )
            card.add_split(name, result, split)
            if not processes.is_main():
                continue
            _write_classes(card.file_of(name, ".json"), result, split)
            if options.save_predictions:
                path = card.file_of(name, ".npz")
                classification.write_predictions(path, result.predictions, split)
                console.say(f"predictions: {path}")


def _write_classes(path: epath.Path, result: classification.Classification, split: Split) -> None:
    """Writes the accuracy and interval of each class, and confusions [label, guess, images]."""
    if result.mean_per_class is None:
        return  # per-class accuracy is undefined for images with several labels
    predictions = result.predictions
    hits, images = scores.per_class(predictions.label, predictions.hit, len(split.class_names))
    classes = [
        {
            "name": name,
            "images": int(count),
            "accuracy": float(hit / count) if count else None,
            "interval": scores.interval(int(hit), int(count)),
        }
        for name, hit, count in zip(split.class_names, hits, images, strict=True)
    ]
    confusion = scores.confusions(predictions.label, predictions.guesses[:, 0]).tolist()
    run_files.write_json(path, {"data": split.name, "classes": classes, "confusion": confusion})


def _probe(
    section: str,
    subject: Subject,
    weights: Weights,
    data: Mapping[str, Any],
    card: ReportCard,
    console: Console,
) -> None:
    """Evaluates a probe on all its data with every set of parameters; adds the results."""
    for name, splits in data.items():
        for suffix, read_params in weights.params.items():
            with console.status(Text(f"{section} on {name}{suffix}")):
                result = PROBES[section].evaluate(
                    weights.model,
                    read_params(),
                    splits,
                    batching=subject.batching,
                )
            card.add(section, name + suffix, result.summary())


def _add_cost(subject: Subject, card: ReportCard, console: Console) -> None:
    """Adds the cost of training, computed from the run's metrics.jsonl, to the card."""
    if subject.step is None:
        return
    rows = run_files.read_metrics(subject.workdir, console.say)
    rows = [row for row in rows if row["step"] <= subject.step]
    config, _ = run.read_run(subject.workdir)
    cost = throughput.core_hours(rows, global_batch_size=config.global_batch_size)
    if cost is not None:
        card.add("training", "cost", cost)
