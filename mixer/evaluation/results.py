"""Reads and writes results.json, all results of a set of weights, and the report results.md."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mixer import files, run_files
from mixer.console import Console
from mixer.data.splits import Split
from mixer.evaluation import (
    fewshot,
    linear_probe,
    omnibenchmark,
    scores,
    suites,
    tables,
    throughput,
)
from mixer.evaluation.classification import Classification
from mixer.evaluation.subject import Subject
from mixer.evaluation.tables import Block, Table, percent, short_span, span
from mixer.models.registry import ARCHITECTURES
from mixer.parallel import processes
from mixer.runs import directory as run_directory

Interval = tuple[float, float]
# Columns of the table of splits; a column without values is omitted.
COLUMNS = (
    *("set", "images", "top-1", "95 % interval", "top-5", "loss", "ECE", "per class"),
    "published",
)


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """The result of one split in results.json; accuracies are in 0..1, intervals at 95 %.

    A value is None if an older version of the code wrote the file and did not record the value;
    `mean_per_class` is also None if images have several labels.

    Attributes:
      count: number of images.
      top1: top-1 accuracy on the labelled images.
      top1_interval: its interval.
      labelled, top5, loss, ece, mean_per_class, mean_per_class_interval: as in `Classification`.
      data: name of the split.
      reported: "top1" or "mean_per_class", the metric that papers report for the data set.
      published: the published accuracy: {"weights", "top1", "source"}.
    """

    count: int
    top1: float
    top1_interval: Interval
    labelled: int | None = None
    top5: float | None = None
    loss: float | None = None
    ece: float | None = None
    mean_per_class: float | None = None
    mean_per_class_interval: Interval | None = None
    data: str | None = None
    reported: str = "top1"
    published: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """The content of a results.json.

    Attributes:
      step: step of the checkpoint; None for weights that are not a run's checkpoint.
      splits: results of splits by name, such as "val" or "test_ema".
      sections: all other sections by name, such as "fewshot"; each holds summaries by name.
    """

    step: int | None
    splits: Mapping[str, SplitResult]
    sections: Mapping[str, Mapping[str, Any]]


def read(directory: epath.PathLike, checkpoint_name: str) -> Results | None:
    """Reads the results of the named checkpoint from a directory; returns None if there are none.

    Raises:
      UserError: the file is damaged.
    """
    content = run_files.read_results(directory, checkpoint_name)
    return None if content is None else parse(content)


def parse(content: Mapping[str, Any]) -> Results:
    """Parses the content of a results.json; skips splits without a count or an accuracy."""
    splits = {
        name: _split_result(value)
        for name, value in content.get("splits", {}).items()
        if {"count", "top1"} <= value.keys()
    }
    sections = {name: content[name] for name in SECTIONS if name in content}
    return Results(content.get("step"), splits, sections)


def _split_result(value: Mapping[str, Any]) -> SplitResult:
    names = [field.name for field in dataclasses.fields(SplitResult)]
    fields = {name: value[name] for name in names if name in value}
    for name in ("top1_interval", "mean_per_class_interval"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    wilson = scores.interval(value["top1"] * value["count"], value["count"])
    return SplitResult(**{"top1_interval": wilson, **fields})


class ReportCard:
    """Writes results.json and results.md of one subject, on process 0 only."""

    def __init__(self, subject: Subject, identity: Mapping[str, Any]):
        """Checks that the results can be written, before anything is computed.

        Args:
          subject: the subject of the evaluation.
          identity: identity of its weights; results of other weights are overwritten.

        Raises:
          UserError: the directory is not writable or contains a damaged results.json.
        """
        self._subject = subject
        self._identity = identity
        self._checkpoint_name = subject.checkpoint_name or "last"
        self._new_sections: dict[str, dict[str, Any]] = {}
        output = subject.output
        self._directory = output / "evaluation"
        self._path = run_files.results_path(output, self._checkpoint_name)
        if processes.is_main():
            files.make_directory(output, "--output")
            run_directory.check_place(output)
            files.make_directory(self._directory, "--output")
            files.remove_unfinished(output)
            run_files.read_results(output, self._checkpoint_name)

    @property
    def new_results(self) -> Results:
        """The results that this object added to the file."""
        return parse(self._new_sections)

    def read_section(self, section: str) -> dict[str, Any]:
        """Returns a section of results.json for the same weights, on every process."""
        content = {}
        if processes.is_main():
            content = run_files.read_results(self._subject.output, self._checkpoint_name) or {}
            if not run_directory.has_weights(content, self._identity):
                content = {}
        return processes.broadcast(content.get(section, {}))

    def file_of(self, name: str, suffix: str) -> epath.Path:
        """Returns the path of an additional file about the data set `name`."""
        prefix = "" if self._checkpoint_name == "last" else f"{self._checkpoint_name}_"
        return self._directory / f"{prefix}{name}{suffix}"

    def add(self, section: str, name: str, summary: dict[str, Any]) -> None:
        """Adds a result to both files."""
        self._new_sections.setdefault(section, {})[name] = summary
        if not processes.is_main():
            return
        output, checkpoint_name = self._subject.output, self._checkpoint_name
        run_directory.record_result(
            output, checkpoint_name, self._identity, name, summary, section=section
        )
        blocks = report_blocks(self._subject, read(output, checkpoint_name) or self.new_results)
        with files.atomic_write(self._path.with_suffix(".md")) as new_file:
            new_file.write_text(tables.markdown_document(_title(self._subject), blocks))

    def add_split(self, name: str, result: Classification, split: Split) -> None:
        """Adds the result of a split and, if there is one, the published accuracy."""
        summary = {"data": split.name, **result.summary()}
        task = suites.TASKS.get(name)
        summary["reported"] = "mean_per_class" if task and task.mean_per_class else "top1"
        weights, figures = self._subject.published or ("", {})
        if name in figures:
            top1, source = figures[name]
            summary["published"] = {"weights": weights, "top1": top1, "source": source}
        self.add("splits", name, summary)

    def print(self, console: Console) -> None:
        """Prints the new results and the paths of the files with all results."""
        blocks = report_blocks(self._subject, self.new_results)
        tables.print_document(console, _title(self._subject), blocks)
        console.say(f"written to {self._path.with_suffix('.md')} and {self._path.name}")


def _title(subject: Subject) -> str:
    step = "" if subject.step is None else f", step {subject.step}"
    best = " (best)" if subject.checkpoint_name == "best" else ""
    return f"{subject.name}{step}{best}"


def report_blocks(subject: Subject, results: Results) -> list[Block]:
    """Builds the report card of a subject from paragraphs and tables."""
    card = subject.card
    title, (height, width) = ARCHITECTURES[card.architecture].title, card.image_size
    blocks: list[Block] = [
        [
            f"{card.variant or title}, {subject.num_params:,} parameters, images of "
            f"{height} x {width}, {card.num_classes:,} classes."
        ]
    ]
    if results.splits:
        blocks += [
            [
                "Intervals are Wilson's; ECE is the expected calibration error in 15 bins; per "
                "class is the mean of the classes' accuracies."
            ],
            _splits_table(results.splits),
            _split_notes(results.splits),
        ]
    for name, summaries in results.sections.items():
        blocks += SECTIONS[name].blocks(summaries)
    return blocks


def _splits_table(results: Mapping[str, SplitResult]) -> Table:
    rows = [_split_row(name, result) for name, result in results.items()]
    columns = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows)]
    return Table(
        [COLUMNS[column] for column in columns],
        [[row[column] for column in columns] for row in rows],
    )


def _split_row(name: str, result: SplitResult) -> list[str]:
    """Returns the cells of COLUMNS."""
    images = f"{result.count:,}"
    if result.labelled not in (None, result.count):
        images = f"{result.labelled:,} of {images}"
    return [
        name,
        images,
        percent(result.top1),
        short_span(result.top1_interval),
        percent(result.top5),
        "" if result.loss is None else f"{result.loss:.4f}",
        "" if result.ece is None else f"{result.ece:.4f}",
        percent(result.mean_per_class),
        percent((result.published or {}).get("top1")),
    ]


def _split_notes(results: Mapping[str, SplitResult]) -> list[str]:
    """Returns a line about the data of each split, then a line about each published accuracy."""
    notes = [f"{name} is {result.data}" for name, result in results.items() if result.data]
    for name, result in results.items():
        if published := result.published:
            origin = f"{published['weights']} ({published['source']})"
            note = f"{name}: {percent(published['top1'])} is published for {origin}"
            if name in suites.TASKS and result.count != suites.TASKS[name].num_images:
                note += f", of {suites.TASKS[name].num_images:,} images"
            notes.append(note)
    return notes


def _fewshot_blocks(summaries: Mapping[str, Any]) -> list[Block]:
    keys = {"train", "test", "count", "results"}
    summaries = {name: value for name, value in summaries.items() if keys <= value.keys()}
    notes = [
        f"{name}: shots from {value['train']}; top-1 on {value['count']:,} images of "
        f"{value['test']}."
        for name, value in summaries.items()
    ]
    return [fewshot.make_table(summaries), notes]


def _transfer_blocks(summaries: Mapping[str, Any]) -> list[Block]:
    keys = {"tasks", "means"}
    return [transfer_table(value) for value in summaries.values() if keys <= value.keys()]


def transfer_table(summary: Mapping[str, Any]) -> Table:
    """Makes the table of `mixer.transfer.Transfer.summary()`: a row per task, then per mean."""
    rows = []
    for name, task in summary["tasks"].items():
        figures = percent(task["top1"]), span(task["top1_interval"])
        rows.append((name, f"{task['count']:,}", *figures, percent(task["mean_per_class"])))
    for group, mean in summary["means"].items():
        count = f"{mean['num_tasks']} tasks" if mean["num_tasks"] > 1 else "1 task"
        if mean["num_tasks"] < mean["of"]:
            count = f"{mean['num_tasks']} of {mean['of']} tasks"
        rows.append((group, count, percent(mean["top1"]), span(mean["top1_interval"]), ""))
    return Table(("task", "test images", "top-1", "interval", "mean per class"), rows)


def _fewshot_figures(summaries: Mapping[str, Any]) -> dict[str, str]:
    figures = {}
    for name, summary in summaries.items():
        for shots in summary["results"]:
            share = f"{percent(shots['mean'])} ({short_span(shots['interval'])})"
            figures[f"{name}, {shots['shots']}-shot"] = share
    return figures


def _linear_probe_figures(summaries: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{name}, linear probe": f"{percent(row['top1'])} ({short_span(row['top1_interval'])})"
        for name, row in summaries.items()
    }


def _omnibenchmark_figures(summaries: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"omnibenchmark, {mean.name} of {mean.extent}": (
            f"{percent(mean.top1)} ({short_span(mean.top1_interval)})"
        )
        for mean in omnibenchmark.means(summaries)
    }


def _throughput_figures(summaries: Mapping[str, Any]) -> dict[str, str]:
    rates = [rate for summary in summaries.values() for rate in summary["rates"]]
    return {
        f"images/s, batch {rate['batch_size']}": f"{rate['images_per_second']:,.3g}"
        for rate in rates
        if rate["images_per_second"] is not None
    }


@dataclasses.dataclass(frozen=True)
class Section:
    """The presentation of a section of results.json.

    Attributes:
      blocks: function from the section's summaries to blocks of the report card.
      figures: function from the section's summaries to the cells of the table that compares
        several weights, by column.
    """

    blocks: Callable[[Mapping[str, Any]], list[Block]]
    figures: Callable[[Mapping[str, Any]], dict[str, str]] = lambda summaries: {}


# The sections of results.json besides "splits".
SECTIONS = {
    "fewshot": Section(_fewshot_blocks, _fewshot_figures),
    "linear_probe": Section(
        lambda summaries: [linear_probe.make_table(summaries), linear_probe.notes(summaries)],
        _linear_probe_figures,
    ),
    "omnibenchmark": Section(
        lambda summaries: [omnibenchmark.make_table(summaries), omnibenchmark.notes(summaries)],
        _omnibenchmark_figures,
    ),
    "throughput": Section(
        lambda summaries: [throughput.make_table(summaries)], _throughput_figures
    ),
    "transfer": Section(_transfer_blocks),
    "training": Section(lambda costs: [[throughput.cost_sentence(c) for c in costs.values()]]),
}


def side_by_side(results: Mapping[str, Results]) -> Table:
    """Makes a table of accuracies and rates with a row per entry, keyed by the weights' name."""
    rows = {name: _figures(weights_results) for name, weights_results in results.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return Table(
        ["weights", *columns],
        [[name, *(row.get(column, "-") for column in columns)] for name, row in rows.items()],
    )


def _figures(results: Results) -> dict[str, str]:
    """Returns every accuracy with its interval: top-1, or mean per class if papers report it."""
    figures = {}
    for name, result in results.splits.items():
        if result.reported == "mean_per_class":
            share, ends = result.mean_per_class, result.mean_per_class_interval
            name += ", per class"
        else:
            share, ends = result.top1, result.top1_interval
        figures[name] = f"{percent(share)} ({short_span(ends)})"
    for name, summaries in results.sections.items():
        figures |= SECTIONS[name].figures(summaries)
    return figures
