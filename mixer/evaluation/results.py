"""results.json, which holds every result of some weights, and results.md, which shows them."""

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
from mixer.parallel import processes
from mixer.runs import config as run

Interval = tuple[float, float]
# Columns of the table of splits; a column without any value is not shown.
COLUMNS = (
    *("set", "images", "top-1", "95 % interval", "top-5", "loss", "ECE", "per class"),
    "published",
)


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """The result of one split in results.json; shares are in 0..1, intervals of 95 %.

    A value is None if the code that wrote the file did not record it, and `mean_per_class` also if
    images have several labels.

    Attributes:
      count: number of images.
      top1: share of the labelled images.
      top1_interval: its interval.
      labelled, top5, loss, ece, mean_per_class, mean_per_class_interval: as of `Classification`.
      data: name of the split.
      reported: "top1" or "mean_per_class", the figure that papers report for the set.
      published: what others report: {"weights", "top1", "source"}.
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
    """What a results.json holds.

    Attributes:
      step: of the checkpoint; None for weights that are no run's.
      splits: by name, such as "val" or "test_ema".
      sections: all other sections by name, such as "fewshot"; each holds summaries by name.
    """

    step: int | None
    splits: Mapping[str, SplitResult]
    sections: Mapping[str, Mapping[str, Any]]


def read(directory: epath.PathLike, checkpoint_name: str) -> Results | None:
    """The results in a directory of the checkpoint of that name; None if there are none.

    Raises:
      UserError: the file is damaged.
    """
    saved = run_files.read_results(directory, checkpoint_name)
    return None if saved is None else parse(saved)


def parse(saved: Mapping[str, Any]) -> Results:
    """The content of a results.json. Splits that lack a count or an accuracy are left out."""
    splits = {
        name: _split_result(value)
        for name, value in saved.get("splits", {}).items()
        if {"count", "top1"} <= value.keys()
    }
    sections = {name: saved[name] for name in SECTIONS if name in saved}
    return Results(saved.get("step"), splits, sections)


def _split_result(value: Mapping[str, Any]) -> SplitResult:
    names = [field.name for field in dataclasses.fields(SplitResult)]
    fields = {name: value[name] for name in names if name in value}
    for name in ("top1_interval", "mean_per_class_interval"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    wilson = scores.interval(value["top1"] * value["count"], value["count"])
    return SplitResult(**{"top1_interval": wilson, **fields})


class ReportCard:
    """results.json and results.md of one subject. Process 0 alone writes them."""

    def __init__(self, subject: Subject, identity: Mapping[str, Any]):
        """Checks that the results can be written, before anything is computed.

        Args:
          subject: whose results these are.
          identity: of its weights; results of other weights are replaced.

        Raises:
          UserError: the directory cannot be written, or holds a damaged results.json.
        """
        self._subject = subject
        self._identity = identity
        self._checkpoint_name = subject.checkpoint_name or "last"
        self._new: dict[str, dict[str, Any]] = {}
        output = subject.output
        self._directory = output / "evaluation"
        self._path = run_files.results_path(output, self._checkpoint_name)
        if processes.is_main():
            files.make_directory(output, "--output")
            run.check_place(output)
            files.make_directory(self._directory, "--output")
            files.remove_unfinished(output)
            run_files.read_results(output, self._checkpoint_name)

    @property
    def new(self) -> Results:
        """The results that were added, without those that the file had."""
        return parse(self._new)

    def recorded(self, section: str) -> dict[str, Any]:
        """What a section of results.json holds for the same weights, on every process."""
        content = {}
        if processes.is_main():
            content = run_files.read_results(self._subject.output, self._checkpoint_name) or {}
            if not run.has_weights(content, self._identity):
                content = {}
        return processes.broadcast(content.get(section, {}))

    def file_of(self, name: str, suffix: str) -> epath.Path:
        """The path of a further file about the data set `name`."""
        prefix = "" if self._checkpoint_name == "last" else f"{self._checkpoint_name}_"
        return self._directory / f"{prefix}{name}{suffix}"

    def add(self, section: str, name: str, summary: dict[str, Any]) -> None:
        """Adds a result to both files."""
        self._new.setdefault(section, {})[name] = summary
        if not processes.is_main():
            return
        output, checkpoint_name = self._subject.output, self._checkpoint_name
        run.record_result(output, checkpoint_name, self._identity, name, summary, section=section)
        blocks = report_blocks(self._subject, read(output, checkpoint_name) or self.new)
        with files.whole(self._path.with_suffix(".md")) as new:
            new.write_text(tables.markdown_document(_title(self._subject), blocks))

    def add_split(self, name: str, result: Classification, split: Split) -> None:
        """Adds the result of a split, and what others report for it."""
        summary = {"data": split.name, **result.summary()}
        task = suites.TASKS.get(name)
        summary["reported"] = "mean_per_class" if task and task.mean_per_class else "top1"
        weights, figures = self._subject.published or ("", {})
        if name in figures:
            top1, source = figures[name]
            summary["published"] = {"weights": weights, "top1": top1, "source": source}
        self.add("splits", name, summary)

    def print(self, console: Console) -> None:
        """Prints the new results, and where all are."""
        blocks = report_blocks(self._subject, self.new)
        tables.print_document(console, _title(self._subject), blocks)
        console.say(f"written to {self._path.with_suffix('.md')} and {self._path.name}")


def _title(subject: Subject) -> str:
    step = "" if subject.step is None else f", step {subject.step}"
    best = " (best)" if subject.checkpoint_name == "best" else ""
    return f"{subject.name}{step}{best}"


def report_blocks(subject: Subject, results: Results) -> list[Block]:
    """The report card of a subject, as paragraphs and tables."""
    card = subject.card
    height, width = card.image_size
    blocks: list[Block] = [
        [
            f"{card.variant or 'MLP-Mixer'}, {subject.num_params:,} parameters, images of "
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
    shown = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    return Table(
        [COLUMNS[place] for place in shown], [[row[place] for place in shown] for row in rows]
    )


def _split_row(name: str, result: SplitResult) -> list[str]:
    """The cells of COLUMNS."""
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
    """A line per split about its data, then one per published figure about its origin."""
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


def _linear_probe_blocks(summaries: Mapping[str, Any]) -> list[Block]:
    header, *rows = linear_probe.table(summaries)
    return [Table(header, rows), linear_probe.notes(summaries)]


def _omnibenchmark_blocks(summaries: Mapping[str, Any]) -> list[Block]:
    header, *rows = omnibenchmark.table(summaries)
    return [Table(header, rows), omnibenchmark.notes(summaries)]


def _transfer_blocks(summaries: Mapping[str, Any]) -> list[Block]:
    keys = {"tasks", "means"}
    return [transfer_table(value) for value in summaries.values() if keys <= value.keys()]


def transfer_table(summary: Mapping[str, Any]) -> Table:
    """The table of `mixer.transfer.Transfer.summary()`: a row per task, then one per mean."""
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


def _training_blocks(costs: Mapping[str, Any]) -> list[Block]:
    return [[throughput.cost_sentence(cost) for cost in costs.values()]]


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
    """How a section of results.json is shown.

    Attributes:
      blocks: from the section's summaries to the blocks of the report card.
      figures: from them to the figures of the table that compares weights, by column.
    """

    blocks: Callable[[Mapping[str, Any]], list[Block]]
    figures: Callable[[Mapping[str, Any]], dict[str, str]] = lambda summaries: {}


# The sections of results.json besides "splits".
SECTIONS = {
    "fewshot": Section(_fewshot_blocks, _fewshot_figures),
    "linear_probe": Section(_linear_probe_blocks, _linear_probe_figures),
    "omnibenchmark": Section(_omnibenchmark_blocks, _omnibenchmark_figures),
    "throughput": Section(
        lambda summaries: [throughput.make_table(summaries)], _throughput_figures
    ),
    "transfer": Section(_transfer_blocks),
    "training": Section(_training_blocks),
}


def side_by_side(results: Mapping[str, Results]) -> Table:
    """A row of accuracies and rates for each of several weights, by their names."""
    rows = {name: _figures(each) for name, each in results.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return Table(
        ["weights", *columns],
        [[name, *(row.get(column, "-") for column in columns)] for name, row in rows.items()],
    )


def _figures(results: Results) -> dict[str, str]:
    """Accuracy and interval of everything: top-1, or the mean per class where papers report it."""
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
