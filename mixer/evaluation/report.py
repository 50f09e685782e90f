"""The report card of weights, as `evaluate.py` makes it: tables, `results.json`, `results.md`."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mixer import checkpoint, files, loading, losses, metrics, published, run, sharding
from mixer.data import pipeline
from mixer.errors import UserError
from mixer.evaluation import classification, fewshot, scores, suites, throughput
from mixer.model import MlpMixer
from mixer.train_state import abstract_params
from mixer.train_step import make_predict

# What --suite names besides the sets of `suites`, and evaluates on the data given or the run's own.
FEWSHOT, THROUGHPUT = "fewshot", "throughput"
BATCH_SIZE = 64  # images at once, of weights whose run is not known


@dataclasses.dataclass(frozen=True)
class Subject:
    """Weights that are evaluated.

    Attributes:
      name: as it was given: a run, a file, an address or a short name.
      model: of them. num_classes: width of its head.
      params: by suffix of the results' names, "" or "_ema", a function that reads them.
      num_params: how many.
      variant: such as "B/16"; None: other dimensions.
      image_size: (H, W). preprocess: the steps that make such images; None: not known.
      class_names: in label order, or the name of a list; None: not known.
      loss: softmax or sigmoid. batch_size: images at once, over all devices.
      config: of the data that is evaluated on where no suite says it; None: there is none.
      output: directory of the results. checkpoint_name: last, best or a step; step: its number.
      published: what others found for them.
    """

    name: str
    model: MlpMixer
    num_classes: int
    params: dict[str, Callable[[], Any]]
    num_params: int
    variant: str | None
    image_size: tuple[int, int]
    preprocess: str | None
    class_names: str | tuple[str, ...] | None
    loss: str
    batch_size: int
    config: ConfigDict | None
    output: epath.Path
    checkpoint_name: str
    step: int | None
    published: tuple[str, dict[str, tuple[float, str]]] | None


def open_run(
    workdir: str,
    mesh: Mesh | None,
    *,
    checkpoint_name: str = "last",
    config: ConfigDict | None = None,
    output: str | None = None,
) -> tuple[Subject, Mesh]:
    """The weights of a run, to be evaluated on its own data or that of another config.

    A run that keeps a moving average of its parameters has a second result for each set, "val_ema".

    Args:
      workdir: the run.
      mesh: of the devices; None: the run's own.
      checkpoint_name: "last", "best" or a step's number.
      config: whose data and loss take the place of the run's; its image size is the run's.
      output: directory of the results; None: the run.

    Raises:
      UserError: no such run or checkpoint.
    """
    own, class_names = run.read_run(workdir)
    directory = checkpoint.find_named(workdir, checkpoint_name)
    mesh = mesh or sharding.make_mesh(own.mesh)
    model = run.build_model(own)
    size = (own.image_size, own.image_size)
    abstract = abstract_params(model, size, mesh)
    items = {"": "params"} | ({"_ema": "ema_params"} if own.optimizer.ema_decay else {})
    if config is not None and config.image_size != own.image_size:
        raise UserError(
            f"--config has image_size={config.image_size}, and {workdir} is for "
            f"{own.image_size}; --weights={workdir} grows it to another size"
        )
    data = own if config is None else config

    def reader(item: str) -> Callable[[], Any]:
        return lambda: checkpoint.restore_params(directory, abstract, item=item)

    subject = Subject(
        name=str(workdir),
        model=model,
        num_classes=model.num_classes,
        params={suffix: reader(item) for suffix, item in items.items()},
        num_params=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)),
        variant=own.model.variant,
        image_size=size,
        preprocess=data.dataset.eval_preprocess,
        class_names=class_names,
        loss=data.loss,
        batch_size=data.eval_batch_size or data.global_batch_size,
        config=data,
        output=epath.Path(output or workdir),
        checkpoint_name=checkpoint_name,
        step=int(directory.name),
        published=None,
    )
    return subject, mesh


def open_weights(
    path: str,
    mesh: Mesh | None,
    *,
    config: ConfigDict | None = None,
    preprocess: str | None = None,
    output: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Subject, Mesh]:
    """Weights from a file, an address or a published checkpoint's short name.

    Args:
      path: as `mixer.load` takes it.
      mesh: of the devices; None: all of them.
      config: of the data to evaluate on, its image size and its loss; None: softmax, for the
        weights' own size.
      preprocess: steps in place of the config's or the weights' own.
      output: directory of the results; None: runs/evaluate_<name>.
      say: gets a line on what the weights are.
    """
    mesh = mesh or sharding.make_mesh({"data": -1})
    size = None if config is None else config.image_size
    loaded = loading.read(
        path,
        image_size=size,
        resize="grow" if config is None else config.init_resize,
        dtype=None if config is None else config.model.dtype,
        mesh=mesh,
        log=say,
    )
    card = loaded.card
    steps = card.preprocess if config is None else config.dataset.eval_preprocess
    plain = re.sub(r"[^\w.-]+", "_", str(path).rpartition("://")[2]).strip("_.")
    subject = Subject(
        name=str(path),
        model=loaded.model,
        num_classes=card.num_classes,
        params={"": lambda: loaded.params},
        num_params=sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
        variant=card.variant,
        image_size=card.image_size,
        preprocess=preprocess or steps,
        class_names=card.class_names,
        loss="softmax" if config is None else config.loss,
        batch_size=(
            BATCH_SIZE * mesh.shape["data"]
            if config is None
            else config.eval_batch_size or config.global_batch_size
        ),
        config=config,
        output=epath.Path(output or f"runs/evaluate_{plain}"),
        checkpoint_name="last",
        step=None,
        published=published.expected(path, variant=card.variant, num_classes=card.num_classes),
    )
    return subject, mesh


def evaluate_run(
    workdir: str,
    *,
    checkpoint_name: str,
    splits: Sequence[str],
    data_dir: str | None = None,
    label_file: str | None = None,
) -> None:
    """Evaluates the weights of a run on `splits` ("train", "val", "test") of its config.

    Args:
      workdir: the run.
      checkpoint_name: "last", "best" or a step's number.
      splits: those that the config does not name are left out.
      data_dir: where the data is now, None where it was in training.
      label_file: likewise of the file of labels.

    Raises:
      UserError: no such run or checkpoint, or data that is not there or not the run's.
    """
    subject, mesh = open_run(workdir, None, checkpoint_name=checkpoint_name)
    evaluate(
        [lambda: (subject, mesh)], splits=splits, data_dir=data_dir or "", label_file=label_file
    )


def evaluate(
    subjects: Sequence[Callable[[], tuple[Subject, Mesh]]],
    *,
    splits: Sequence[str] = (),
    suite: Sequence[str] = (),
    data_dir: str = "",
    label_file: str | None = None,
    save_predictions: bool = False,
) -> None:
    """Evaluates weights, one after the other; prints a table of each, and of all beside each other.

    Args:
      subjects: functions that open them, called one at a time: only one's weights are in memory.
      splits: those of the subjects' configs, where no suite is given.
      suite: names of sets and groups of `suites`, "fewshot" and "throughput".
      data_dir: where the data is; "": where the config says, or TFDS's own default.
      label_file: likewise of the file of labels.
      save_predictions: whether to write evaluation/<set>.npz too, what was said of every image.

    Raises:
      UserError: data that is not there, or not of the weights' classes.
    """
    console = _console()
    names = suites.expand(suite, others=(FEWSHOT, THROUGHPUT))
    rows: list[tuple[str, dict[str, dict[str, Any]]]] = []
    for open_subject in subjects:
        subject, mesh = open_subject()
        sharding.check_batch_size("eval_batch_size", subject.batch_size, mesh)
        if subject.config is not None:
            if data_dir:
                subject.config.dataset.data_dir = data_dir
            if label_file is not None:
                subject.config.dataset.label_file = label_file

        def say(text: str) -> None:
            console.print(text, markup=False)

        card = _Card(subject)
        opened = _open(subject, names, splits, data_dir, say)
        for which, result in _classify(subject, mesh, opened, console):
            split = opened[which.removesuffix("_ema")]
            card.add_split(which, result, split)
            _write_classes(card.directory / f"{card.prefix}{which}.json", result, split)
            if save_predictions:
                path = card.directory / f"{card.prefix}{which}.npz"
                classification.write_predictions(path, result.predictions, split)
                say(f"predictions: {path}")
        if FEWSHOT in names:
            _fewshot(subject, mesh, data_dir, card, console)
        if THROUGHPUT in names:
            params = next(iter(subject.params.values()))()
            measured = throughput.measure(
                subject.model,
                params,
                subject.image_size,
                batch_sizes=throughput.BATCH_SIZES,
                mesh=mesh,
            )
            card.add(THROUGHPUT, subject.variant or "model", measured.summary())
        card.add_cost()
        _print(console, markdown(subject, card.new))
        say(f"written to {card.write_markdown()} and {card.path.name}")
        rows.append((subject.name, card.new))
        del subject, opened, card
    if len(rows) > 1:
        console.print(_side_by_side(rows))


class _Card:
    """What is known of one subject: `results.json`, to which evaluations are added."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self.new: dict[str, dict[str, Any]] = {}
        subject.output.mkdir(parents=True, exist_ok=True)
        self.directory = subject.output / "evaluation"
        self.prefix = "" if subject.checkpoint_name == "last" else f"{subject.checkpoint_name}_"
        self.path = run.results_path(subject.output, subject.checkpoint_name)

    def add(self, section: str, name: str, value: dict[str, Any]) -> None:
        """Enters a result; those of other weights that the file had are gone."""
        self.new.setdefault(section, {})[name] = value
        self.path = run.record_result(
            self._subject.output,
            self._subject.checkpoint_name,
            self._subject.step,
            name,
            value,
            section=section,
            weights=self._subject.name if self._subject.step is None else None,
        )

    def add_split(
        self, which: str, result: classification.Classification, split: pipeline.Split
    ) -> None:
        """Enters the result of a split, and what others found."""
        value = {"data": split.name, **result.summary()}
        task = suites.TASKS.get(which)
        value["reported"] = "mean_per_class" if task and task.mean_per_class else "top1"
        if self._subject.published and which in self._subject.published[1]:
            name, figures = self._subject.published
            value["published"] = {
                "weights": name,
                "top1": figures[which][0],
                "source": figures[which][1],
            }
        self.add("splits", which, value)

    def add_cost(self) -> None:
        """Enters what the training took, from the run's own log."""
        config = self._subject.config
        if self._subject.step is None or config is None:
            return
        rows = metrics.read_metrics(self._subject.name)
        rows = [row for row in rows if row["step"] <= self._subject.step]
        cost = throughput.core_hours(rows, global_batch_size=_trained_batch(self._subject))
        if cost is not None:
            self.add("training", "cost", cost.summary())

    def write_markdown(self) -> epath.Path:
        """Writes results.md, the whole card, from results.json."""
        path = self.path.with_suffix(".md")
        results = json.loads(self.path.read_text()) if self.path.exists() else {}
        with files.whole(path) as new:
            new.write_text(markdown(self._subject, results))
        return path


def _trained_batch(subject: Subject) -> int:
    config, _ = run.read_run(subject.name)
    return config.global_batch_size


def _open(
    subject: Subject,
    names: Sequence[str],
    splits: Sequence[str],
    data_dir: str,
    say: Callable[[str], None],
) -> dict[str, pipeline.Split]:
    """The splits to classify, by name. All are opened before the first is evaluated."""
    opened: dict[str, pipeline.Split] = {}
    tasks = [name for name in names if name in suites.TASKS]
    if tasks:
        suites.check_preprocess(subject.name, subject.preprocess, subject.image_size)
    if not names:
        if subject.config is None:
            raise UserError(
                f"{subject.name} says nothing of data: give --suite=NAME (one of "
                f"{', '.join((*suites.GROUPS, *suites.TASKS))}) or --config=FILE"
            )
        config = subject.config
        own = subject.class_names if isinstance(subject.class_names, tuple) else None
        for which in splits:
            split = run.open_split(config, which, own if subject.step is not None else None)
            if split is not None:
                opened[which] = split
        if not opened:
            raise UserError(f"the config of {subject.name} names no split {' or '.join(splits)}")
    missing = [name for name in tasks if not suites.is_prepared(name, data_dir)]
    if tasks and len(missing) < len(tasks) and len(tasks) > 1:
        for name in missing:
            say(f"{name}: left out, its data is not here ({suites.TASKS[name].dataset})")
        tasks = [name for name in tasks if name not in missing]
    for name in tasks:
        opened[name] = suites.open_task(
            name,
            preprocess=subject.preprocess,
            image_size=subject.image_size,
            data_dir=data_dir,
        )
    for split in opened.values():
        note = suites.check_classes(split, subject.class_names, subject.num_classes)
        if note:
            say(f"{subject.name}: {note}")
    return opened


def _classify(
    subject: Subject, mesh: Mesh, opened: dict[str, pipeline.Split], console: Console
) -> Iterator[tuple[str, classification.Classification]]:
    """(name, result) of every split, by every set of parameters."""
    if not opened:
        return
    eval_step = classification.make_eval_step(
        make_predict(subject.model), losses.make_loss(subject.loss), subject.num_classes
    )
    prefetch = subject.config.dataset.prefetch_batches if subject.config is not None else 2
    # No larger than the largest set asks for, so that a small one is not mostly filling.
    shards, largest = mesh.shape["data"], max(split.num_examples for split in opened.values())
    batch_size = min(subject.batch_size, -(-largest // shards) * shards)
    for suffix, read in subject.params.items():
        params = read()
        for which, split in opened.items():
            with _progress(console, f"{which}{suffix}", split.num_examples) as progress:
                result = classification.evaluate(
                    eval_step,
                    params,
                    split,
                    global_batch_size=batch_size,
                    mesh=mesh,
                    prefetch_batches=prefetch,
                    should_stop=lambda progress=progress: progress(batch_size),
                )
            yield which + suffix, result


@contextlib.contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], bool]]:
    """A bar at a terminal, nothing anywhere else.

    Yields what moves it by a number of images; it returns False: an evaluation need not stop.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(count: int) -> bool:
            speed = bar.tasks[0].speed
            rate = f"{speed:,.0f} images/s" if speed else ""
            bar.update(task, advance=min(count, total - bar.tasks[0].completed), rate=rate)
            return False

        yield advance


def _fewshot(subject: Subject, mesh: Mesh, data_dir: str, card: _Card, console: Console) -> None:
    """Adds the few-shot probe on the subject's own data, or on the authors' sets."""
    for name, (train, test) in _fewshot_data(subject, data_dir).items():
        for suffix, read in subject.params.items():
            with console.status(f"few-shot probe on {name}{suffix}"):
                result = fewshot.evaluate(
                    subject.model,
                    read(),
                    train,
                    test,
                    mesh=mesh,
                    global_batch_size=subject.batch_size,
                    prefetch_batches=2,
                )
            card.add(FEWSHOT, name + suffix, result.summary())


def _fewshot_data(
    subject: Subject, data_dir: str
) -> dict[str, tuple[pipeline.Split, pipeline.Split]]:
    config = subject.config
    if config is not None:
        which = "test" if config.dataset.test_split else "val"
        train, test = (run.open_split(config, each, None) for each in ("train", which))
        if test is None:
            raise UserError("the few-shot probe needs dataset.test_split or dataset.val_split")
        return {config.dataset.name: (train, test)}
    return suites.open_fewshot(subject.image_size, data_dir)


def _write_classes(
    path: epath.Path, result: classification.Classification, split: pipeline.Split
) -> None:
    """Writes accuracy and interval of every class, and the confusions that were made."""
    if result.mean_per_class is None:
        return  # several labels an image: no class is its own
    hits = result.confusion.diagonal()
    images = result.confusion.sum(axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = [
        {
            "name": name,
            "images": int(count),
            "accuracy": float(hit / count) if count else None,
            "interval": scores.interval(int(hit), int(count)),
        }
        for name, hit, count in zip(split.class_names, hits, images, strict=True)
    ]
    rows, columns = result.confusion.nonzero()
    cells = [
        [int(row), int(column), int(result.confusion[row, column])]
        for row, column in zip(rows, columns, strict=True)
    ]
    lines = ",\n".join(f"  {json.dumps(each)}" for each in classes)
    triples = ",\n".join(f"  {json.dumps(cell)}" for cell in cells)
    with files.whole(path) as new:
        new.write_text(
            f'{{"data": {json.dumps(split.name)},\n"classes": [\n{lines}\n],\n'
            f'"confusion": [\n{triples}\n]}}\n'
        )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _interval(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{100 * value[0]:.2f}-{100 * value[1]:.2f}"


COLUMNS = ("set", "images", "top-1", "of 95 %", "top-5", "loss", "ECE", "per class", "published")


def _row(name: str, result: dict[str, Any]) -> list[str]:
    """The cells of COLUMNS."""
    images = f"{result['count']:,}"
    if result["labelled"] != result["count"]:
        images = f"{result['labelled']:,} of {images}"
    published = result.get("published", {})
    return [
        name,
        images,
        _percent(result["top1"]),
        _interval(result["top1_interval"]),
        _percent(result["top5"]),
        f"{result['loss']:.4f}",
        f"{result['ece']:.4f}",
        _percent(result["mean_per_class"]),
        _percent(published.get("top1")),
    ]


def _notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """What the published figures are of, a line each."""
    return [
        f"{name}: {_percent(known['top1'])} is published for {known['weights']} ({known['source']})"
        for name, result in results.items()
        if (known := result.get("published"))
    ]


def _shown(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The columns that have a value anywhere, and the cells of each result's row."""
    cells = [_row(name, result) for name, result in results.items()]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    return [COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in cells]


def _title(subject: Subject) -> str:
    step = "" if subject.step is None else f", step {subject.step}"
    return f"{subject.name}{step}"


# What results.json has besides the splits, and the lines of a card that it makes.
SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    FEWSHOT: fewshot.markdown,
    THROUGHPUT: throughput.markdown,
    "transfer": lambda tables: [line for each in tables.values() for line in each["markdown"]],
    "training": lambda costs: [throughput.cost_sentence(cost) for cost in costs.values()],
}


def markdown(subject: Subject, results: dict[str, Any]) -> str:
    """The report card, from what results.json holds."""
    height, width = subject.image_size
    lines = [
        f"# {_title(subject)}",
        "",
        f"{subject.variant or 'MLP-Mixer'}, {subject.num_params:,} parameters, images of "
        f"{height} x {width}, {subject.num_classes:,} classes. Intervals are Wilson's of 95 %; ECE "
        "is the expected calibration error in 15 bins; per class is the mean of the classes' "
        "accuracies.",
    ]
    if splits := results.get("splits"):
        # What was recorded before results had all of these is shown as far as it goes.
        whole = {name: each for name, each in splits.items() if "top1_interval" in each}
        columns, rows = _shown(whole)
        lines += ["", _line(columns), "|---" * len(columns) + "|", *map(_line, rows), ""]
        lines += [f"{name} is {each['data']}.  " for name, each in whole.items() if "data" in each]
        lines += [f"{note}.  " for note in _notes(whole)]
    for section, made in SECTIONS.items():
        if section in results:
            lines += ["", *made(results[section])]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _print(console: Console, text: str) -> None:
    """Prints Markdown, its tables drawn."""
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if not is_table:
            console.print("\n".join(line.strip() for line in lines), markup=False)
            continue
        header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        table = Table(*header)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)


def _console() -> Console:
    """stdout; where that is no terminal, as wide as the tables are."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200
    return console


def add_transfer(subject: Subject, name: str, result: Any) -> None:
    """Enters the table of a suite that fine-tunes, prints it and says where it is.

    Args:
      subject: the weights that were fine-tuned.
      name: "vtab" or "transfer".
      result: a `mixer.transfer.Transfer`.
    """
    console, card = _console(), _Card(subject)
    card.add("transfer", name, result.summary() | {"markdown": result.markdown()})
    _print(console, markdown(subject, card.new))
    console.print(f"written to {card.write_markdown()} and {card.path.name}", markup=False)


def _side_by_side(rows: Sequence[tuple[str, dict[str, dict[str, Any]]]]) -> Table:
    """A row for each of (weights, sections of results)."""
    cells = [_cells(sections) for _, sections in rows]
    names = dict.fromkeys(name for each in cells for name in each)
    table = Table("weights", *names, title="Side by side: top-1 and its interval of 95 %")
    for (weights, _), each in zip(rows, cells, strict=True):
        table.add_row(Text(weights), *(each.get(name, "-") for name in names))
    return table


def _cells(sections: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Accuracy and interval of everything: top-1, or the mean per class where papers have that."""
    cells = {}
    for name, result in sections.get("splits", {}).items():
        key = result["reported"]
        name += ", per class" * (key != "top1")
        cells[name] = f"{_percent(result[key])} ({_interval(result[key + '_interval'])})"
    for name, result in sections.get(FEWSHOT, {}).items():
        for shots in result["results"]:
            share = f"{_percent(shots['mean'])} ({_interval(shots['interval'])})"
            cells[f"{name}, {shots['shots']}-shot"] = share
    return cells
