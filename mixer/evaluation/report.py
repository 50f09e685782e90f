"""The report card of weights, as `evaluate.py` makes it: tables, `results.json`, `results.md`."""

import contextlib
import dataclasses
import html
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mixer import files, run_files
from mixer.data import splits as pipeline
from mixer.errors import UserError
from mixer.evaluation import (
    classification,
    fewshot,
    linear_probe,
    omnibenchmark,
    scores,
    suites,
    throughput,
)
from mixer.formatting import in_markdown
from mixer.models.mlp_mixer import VARIANTS, MlpMixer, check_image_size
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.training import losses
from mixer.training.state import abstract_params
from mixer.training.step import make_predict
from mixer.weights import checkpoint, published
from mixer.weights import fetch as remote
from mixer.weights import formats as weights
from mixer.weights import load as loading

# What --suite names besides the sets of `suites`, and evaluates on the data given or the run's own.
FEWSHOT, THROUGHPUT = "fewshot", "throughput"
LINEAR_PROBE, OMNIBENCHMARK = "linear_probe", "omnibenchmark"
PROBES = (FEWSHOT, LINEAR_PROBE, OMNIBENCHMARK)
BATCH_SIZE = 64  # images at once, of weights whose run is not known


@dataclasses.dataclass(frozen=True)
class Subject:
    """Weights that are evaluated.

    Attributes:
      name: a run, a file, an address without its query, or a short name. path: as it was given.
      model: of them. num_classes: width of its head.
      params: by suffix of the results' names, "" or "_ema", a function that reads them.
      num_params: how many.
      variant: such as "B/16"; None: other dimensions.
      image_size: (H, W). preprocess: the steps that make such images; None: not known.
      class_names: in label order, or the name of a list; None: not known.
      loss: softmax or sigmoid. batch_size: images at once, over all devices.
      config: of the data that is evaluated on where no suite says it; None: there is none.
      own_data: whether that is the data of the run that the weights are of. data: what the run's
        data.json says of each of its splits.
      output: directory of the results. checkpoint_name: last, best or a step; step: its number.
      identity: what results.json says the weights are; results of others are not added to.
      published: what others found for them, as they come.
    """

    name: str
    path: str
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
    own_data: bool
    data: dict[str, dict[str, Any]] | None
    output: epath.Path
    checkpoint_name: str
    step: int | None
    identity: dict[str, Any]
    published: tuple[str, dict[str, tuple[float, str]]] | None


def open_run(
    workdir: str,
    *,
    checkpoint_name: str = "last",
    config: ConfigDict | None = None,
    output: str | None = None,
) -> tuple[Subject, Mesh]:
    """The weights of a run, for its own data or that of another config; and their mesh.

    A run that keeps a moving average of its parameters has a second result for each set, "val_ema".

    Args:
      workdir: the run.
      checkpoint_name: "last", "best" or a step's number.
      config: whose data and loss take the place of the run's; its image size is the run's.
      output: directory of the results; None: the run.

    Raises:
      UserError: no such run or checkpoint.
    """
    workdir = files.parse_path("--workdir", workdir)
    output = files.parse_path("--output", output) if output else workdir
    own, class_names = run.read_run(workdir)
    directory = checkpoint.find_named(workdir, checkpoint_name)
    mesh = sharding.make_mesh({"data": -1})  # the devices that it was trained on may not be here
    model = run.build_model(own)
    size = (own.image_size, own.image_size)
    abstract = abstract_params(model, size, mesh)
    items = {"": "params"} | ({"_ema": "ema_params"} if own.optimizer.ema_decay else {})
    if config is not None and config.image_size != own.image_size:
        raise UserError(
            f"--config has image_size={config.image_size}, and {workdir} is for "
            f"{own.image_size}; --weights={workdir} grows it to another size"
        )
    data = own
    if config is not None:
        data = config.copy_and_resolve_references()
        data.model.update({name: getattr(model, name) for name in weights.DIMENSIONS})
        run.resolve_permutation(data)
    identity = {"step": int(directory.name)}
    if output != workdir:
        identity |= {"weights": str(directory)}

    def reader(item: str) -> Callable[[], Any]:
        return lambda: checkpoint.restore_params(directory, abstract, item=item)

    subject = Subject(
        name=str(workdir),
        path=str(workdir),
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
        own_data=config is None,
        data=None if config is not None else run_files.read_data(workdir)["splits"],
        output=output,
        checkpoint_name=checkpoint_name,
        step=int(directory.name),
        identity=identity,
        published=None,
    )
    return subject, mesh


def open_weights(
    path: str,
    *,
    config: ConfigDict | None = None,
    preprocess: str | None = None,
    output: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Subject, Mesh]:
    """Weights from a file, an address, a short name or a run; and their mesh.

    Args:
      path: as `mixer.load` takes it. Of a run, or a step of one, the data and the loss are the
        run's where there is no `config`.
      config: of the data to evaluate on, its image size and its loss; None: softmax, for the
        weights' own size.
      preprocess: steps in place of the config's or the weights' own.
      output: directory of the results; None: runs/evaluate_<name>.
      say: gets a line on what the weights are.
    """
    if output:
        output = files.parse_path("--output", output)
    mesh = sharding.make_mesh({"data": -1})
    own, own_data = config is None and preprocess is None, False
    if config is None and remote.is_directory(path):
        workdir = checkpoint.find_step(path).parent.parent
        if run_files.is_trained(run_files.read_config(workdir) or {}):
            (config, _), own_data = run.read_run(workdir), True
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
    if config is not None and not own_data:
        config = config.copy_and_resolve_references()
        config.model.update({name: getattr(card, name) for name in weights.DIMENSIONS})
        run.resolve_permutation(config)
    if config is not None and preprocess is not None:
        config.dataset.eval_preprocess = preprocess
    steps = card.preprocess if config is None else config.dataset.eval_preprocess
    name = published.shown(path)
    plain = re.sub(r"[^\w.-]+", "_", name.rpartition("://")[2]).strip("_.")
    arrays = traverse_util.flatten_dict(loaded.params, sep="/")
    checksum = weights.checksum(
        lambda name: np.asarray(arrays[name]), {name: each.shape for name, each in arrays.items()}
    )
    loss = "softmax" if config is None else config.loss
    subject = Subject(
        name=name,
        path=str(path),
        model=loaded.model,
        num_classes=card.num_classes,
        params={"": lambda: loaded.params},
        num_params=sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
        variant=card.variant,
        image_size=card.image_size,
        preprocess=preprocess or steps,
        class_names=card.class_names,
        loss=loss,
        batch_size=(
            BATCH_SIZE * sharding.batch_shards(mesh)
            if config is None
            else config.eval_batch_size or config.global_batch_size
        ),
        config=config,
        own_data=own_data,
        data=None,
        output=epath.Path(output or f"runs/evaluate_{plain}"),
        checkpoint_name="last",
        step=None,
        identity={
            "weights": name,
            "checksum": checksum,
            "preprocess": preprocess or steps,
            "loss": loss,
        },
        published=(
            published.expected(path, variant=card.variant, num_classes=card.num_classes)
            if own
            else None
        ),
    )
    return subject, mesh


def evaluate(
    subjects: Sequence[Callable[[], tuple[Subject, Mesh]]],
    *,
    splits: Sequence[str] = (),
    suite: Sequence[str] = (),
    data_dir: str = "",
    label_file: str | None = None,
    save_predictions: bool = False,
    batch_sizes: Sequence[int] = throughput.BATCH_SIZES,
    realms: Sequence[str] = (),
    output: str | None = None,
) -> None:
    """Evaluates weights, one after the other; prints a table of each, and of all beside each other.

    Args:
      subjects: functions that open them, called one at a time: only one's weights are in memory.
      splits: those of the subjects' configs, where no suite is given.
      suite: names of sets and groups of `suites`, PROBES and "throughput".
      data_dir: where the data is; "": where the config says, or TFDS's own default.
      label_file: likewise of the file of labels.
      save_predictions: whether to write evaluation/<set>.npz too, what was said of every image.
      batch_sizes: of "throughput", images a device.
      realms: of "omnibenchmark"; none: all that `data_dir` has.
      output: directory for side_by_side.md, the table of several weights; None: it is not written.

    Raises:
      UserError: data that is not there, or not of the weights' classes. Of several weights the
        others are evaluated all the same.
    """
    console = _console()
    if output is not None and distributed.is_main():
        files.make_output_directory("--output", output)
    names = suites.expand(suite, others=(*PROBES, THROUGHPUT))
    done: list[tuple[str, dict[str, dict[str, Any]]]] = []
    failed: list[str] = []
    for open_subject in subjects:
        subject = None
        try:
            subject, mesh = open_subject()
            options = dict(splits=splits, data_dir=data_dir, label_file=label_file)
            options |= dict(save_predictions=save_predictions, batch_sizes=batch_sizes)
            options |= dict(realms=realms)
            done.append((subject.name, _evaluate(subject, mesh, names, console, **options)))
        except UserError as error:
            if len(subjects) == 1 or jax.process_count() > 1:
                raise  # other processes may be in the midst of this one
            failed.append(f"{subject.name}: {error}" if subject else str(error))
    if len(done) > 1:
        table = _side_by_side(done)
        console.print()
        _print(console, "\n".join(table))
        if output is not None and distributed.is_main():
            path = epath.Path(output).expanduser() / "side_by_side.md"
            path.write_text("\n".join(table) + "\n")
            console.print(f"written to {path}", markup=False)
    if failed:
        raise UserError(f"{len(failed)} of {len(subjects)} not evaluated: {'; '.join(failed)}")


def _evaluate(
    subject: Subject,
    mesh: Mesh,
    names: Sequence[str],
    console: Console,
    *,
    splits: Sequence[str],
    data_dir: str,
    label_file: str | None,
    save_predictions: bool,
    batch_sizes: Sequence[int],
    realms: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Evaluates one subject, as `evaluate` says; the results by section."""
    # The run's batch may be of other devices than these.
    shards = sharding.batch_shards(mesh)
    subject = dataclasses.replace(subject, batch_size=-(-subject.batch_size // shards) * shards)
    if subject.config is not None:
        if data_dir:
            subject.config.dataset.data_dir = data_dir
        if label_file is not None:
            subject.config.dataset.label_file = label_file

    def say(text: str) -> None:
        console.print(text, markup=False)

    # All data is opened before any is evaluated.
    opened = _open(subject, names, splits, data_dir, say)
    probed = _fewshot_data(subject, data_dir) if FEWSHOT in names else {}
    linear = _linear_probe_data(subject, data_dir) if LINEAR_PROBE in names else {}
    opened_realms = {}
    if OMNIBENCHMARK in names:
        opened_realms = omnibenchmark.open_realms(
            data_dir,
            realms,
            image_size=subject.image_size,
            preprocess=subject.preprocess,
            say=say,
        )
    card = _Card(subject)
    for which, result in _classify(subject, mesh, opened, console):
        split = opened[which.removesuffix("_ema")]
        card.add_split(which, result, split)
        _write_classes(card.directory / f"{card.prefix}{which}.json", result, split)
        if save_predictions and jax.process_index() == 0:
            path = card.directory / f"{card.prefix}{which}.npz"
            classification.write_predictions(path, result.predictions, split)
            say(f"predictions: {path}")
    _fewshot(subject, mesh, probed, card, console)
    _linear_probe(subject, mesh, linear, card, console)
    _omnibenchmark(subject, mesh, opened_realms, card, say)
    if THROUGHPUT in names:
        params = next(iter(subject.params.values()))()
        with console.status("throughput"):
            measured = throughput.measure(
                subject.model, params, subject.image_size, batch_sizes=batch_sizes, mesh=mesh
            )
        card.add(THROUGHPUT, subject.variant or "model", measured.summary())
    card.add_cost(say)
    _print(console, markdown(subject, card.new))
    say(f"written to {card.path.with_suffix('.md')} and {card.path.name}")
    return card.new


class _Card:
    """What is known of one subject: `results.json`, to which evaluations are added."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self.new: dict[str, dict[str, Any]] = {}
        self.directory = subject.output / "evaluation"
        if distributed.is_main():
            files.make_output_directory("--output", subject.output)
            run.check_place(subject.output)
            files.make_output_directory("--output", self.directory)
            files.remove_unfinished(subject.output)
            run_files.read_results(subject.output, subject.checkpoint_name)
        self.prefix = "" if subject.checkpoint_name == "last" else f"{subject.checkpoint_name}_"
        self.path = run_files.results_path(subject.output, subject.checkpoint_name)

    def add(self, section: str, name: str, value: dict[str, Any]) -> None:
        """Enters a result; those of other weights that the file had are gone."""
        self.new.setdefault(section, {})[name] = value
        if jax.process_index():
            return  # the first process writes
        subject = self._subject
        run.record_result(
            subject.output, subject.checkpoint_name, subject.identity, name, value, section=section
        )
        with files.whole(self.path.with_suffix(".md")) as new:
            results = run_files.read_results(subject.output, subject.checkpoint_name)
            new.write_text(markdown(subject, results or self.new))

    def recorded(self, section: str) -> dict[str, Any]:
        """What a section of results.json holds for the same weights, on every process."""
        subject, content = self._subject, {}
        if distributed.is_main():
            content = run_files.read_results(subject.output, subject.checkpoint_name) or {}
            if not run.is_of(content, subject.identity):
                content = {}
        return distributed.broadcast(content.get(section, {}))

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

    def add_cost(self, say: Callable[[str], None]) -> None:
        """Enters what the training took, from the run's own log."""
        config = self._subject.config
        if self._subject.step is None or config is None:
            return
        rows = run_files.read_metrics(self._subject.name, say)
        rows = [row for row in rows if row["step"] <= self._subject.step]
        cost = throughput.core_hours(rows, global_batch_size=_trained_batch(self._subject))
        if cost is not None:
            self.add("training", "cost", cost.summary())


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
                f"{subject.name} says nothing of data: give --config=FILE or --suite=NAME, one of "
                f"{', '.join((*suites.GROUPS, *PROBES, THROUGHPUT, *suites.TASKS))}"
            )
        config = subject.config
        names = subject.class_names if subject.own_data else None
        for which in splits:
            split = run.open_own_split(config, which, names, subject.data)
            if split is None:
                continue
            # "val" and "test" of a run are those of its training.
            known = (subject.data or {}).get(which)
            if known and (change := run.data_change(known, split)):
                say(
                    f"{split.name} is not what the run was trained with: {split.num_examples:,} "
                    f"images, and {known['num_examples']:,} then ({change}); its result is "
                    f"{run.data_name(config)}_{which}"
                )
                known = None
            own = subject.own_data and (known or not subject.data)
            opened[which if own else f"{run.data_name(config)}_{which}"] = split
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
    predict = make_predict(subject.model, mesh)
    loss_fn = losses.make_loss(subject.loss)
    eval_step = classification.make_eval_step(predict, loss_fn, subject.num_classes)
    prefetch = subject.config.dataset.prefetch_batches if subject.config is not None else 2
    # No larger than the largest set asks for, so that a small one is not mostly filling.
    shards, largest = (
        sharding.batch_shards(mesh),
        max(split.num_examples for split in opened.values()),
    )
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
        TextColumn("{task.description}", markup=False),
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


def _fewshot(
    subject: Subject,
    mesh: Mesh,
    data: dict[str, tuple[pipeline.Split, pipeline.Split]],
    card: _Card,
    console: Console,
) -> None:
    """Adds the few-shot probe on each of `data`."""
    for name, (train, test) in data.items():
        for suffix, read in subject.params.items():
            with console.status(Text(f"few-shot probe on {name}{suffix}")):
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
    """Training and test split of the subject's data; without it, of the authors' sets."""
    config = subject.config
    if config is not None:
        which = "test" if config.dataset.test_split else "val"
        train, test = (run.open_split(config, each, None) for each in ("train", which))
        if test is None:
            raise UserError("the few-shot probe needs dataset.test_split or dataset.val_split")
        fewshot.check(train, test)
        return {run.data_name(config): (train, test)}
    return suites.open_fewshot(subject.image_size, data_dir)


def _linear_probe(
    subject: Subject,
    mesh: Mesh,
    data: dict[str, linear_probe.Splits],
    card: _Card,
    console: Console,
) -> None:
    """Adds the linear probe on each of `data`."""
    for name, splits in data.items():
        for suffix, read in subject.params.items():
            with console.status(Text(f"linear probe on {name}{suffix}")):
                result = linear_probe.evaluate(
                    subject.model,
                    read(),
                    splits,
                    penalty="squared",
                    mesh=mesh,
                    global_batch_size=subject.batch_size,
                    prefetch_batches=2,
                )
            card.add(LINEAR_PROBE, name + suffix, result.summary())


def _linear_probe_data(subject: Subject, data_dir: str) -> dict[str, linear_probe.Splits]:
    """The splits of the subject's data; without it, of the few-shot probe's sets."""
    if subject.config is not None:
        return {run.data_name(subject.config): linear_probe.open_splits(subject.config)}
    sets = suites.open_fewshot(subject.image_size, data_dir)
    return {name: linear_probe.assign(train, None, test) for name, (train, test) in sets.items()}


def _omnibenchmark(
    subject: Subject,
    mesh: Mesh,
    realms: dict[str, linear_probe.Splits],
    card: _Card,
    say: Callable[[str], None],
) -> None:
    """Adds the linear probe on each realm. A realm that is recorded is not computed again."""
    if not realms:
        return
    results = omnibenchmark.evaluate(
        subject.model,
        {suffix: read() for suffix, read in subject.params.items()},
        realms,
        card.recorded(OMNIBENCHMARK),
        mesh=mesh,
        global_batch_size=subject.batch_size,
        prefetch_batches=2,
        say=say,
    )
    for name, summary in results:
        card.add(OMNIBENCHMARK, name, summary)


def _write_classes(
    path: epath.Path, result: classification.Classification, split: pipeline.Split
) -> None:
    """Writes accuracy and interval of every class, and the confusions that were made."""
    if result.mean_per_class is None or jax.process_index():
        return  # several labels an image: no class is its own
    said = result.predictions
    hits, images = scores.per_class(said.label, said.hit, len(split.class_names))
    classes = [
        {
            "name": name,
            "images": int(count),
            "accuracy": float(hit / count) if count else None,
            "interval": scores.interval(int(hit), int(count)),
        }
        for name, hit, count in zip(split.class_names, hits, images, strict=True)
    ]
    cells = scores.confusions(said.label, said.guesses[:, 0]).tolist()
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


COLUMNS = (
    "set",
    "images",
    "top-1",
    "95 % interval",
    "top-5",
    "loss",
    "ECE",
    "per class",
    "published",
)


# What a result needs to have a row, beside those of COLUMNS that may be empty.
SHOWN = {"count", "labelled", "top1", "top1_interval", "top5", "loss", "ece", "mean_per_class"}


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
    notes = []
    for name, result in results.items():
        if known := result.get("published"):
            share, of = _percent(known["top1"]), f"{known['weights']} ({known['source']})"
            notes.append(f"{name}: {share} is published for {of}")
            if name in suites.TASKS and result["count"] != suites.TASKS[name].num_images:
                notes[-1] += f", of {suites.TASKS[name].num_images:,} images"
    return notes


def _shown(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The columns that have a value anywhere, and the cells of each result's row."""
    cells = [_row(name, result) for name, result in results.items()]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    return [COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in cells]


def _title(subject: Subject) -> str:
    step = "" if subject.step is None else f", step {subject.step}"
    best = " (best)" if subject.checkpoint_name == "best" else ""
    return f"{subject.name}{step}{best}"


def _fewshot_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    keys = {"train", "test", "count", "results"}
    results = {name: each for name, each in results.items() if each.keys() >= keys}
    lines = [*fewshot.markdown(results), ""]
    for name, result in results.items():
        line = (
            f"{name}: shots from {result['train']}; top-1 on {result['count']:,} images of "
            f"{result['test']}"
        )
        lines.append(f"{in_markdown(line)}.  ")
    return lines


def _table_lines(module: Any, summaries: dict[str, Any]) -> list[str]:
    """The lines of the module's table and notes."""
    header, *rows = module.table(summaries)
    table = [_line(header), "|---" * len(header) + "|", *map(_line, rows), ""]
    return table + [f"{in_markdown(note)}.  " for note in module.notes(summaries)]


# What results.json has besides the splits, and the lines of a card that it makes.
SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    FEWSHOT: _fewshot_lines,
    LINEAR_PROBE: lambda summaries: _table_lines(linear_probe, summaries),
    OMNIBENCHMARK: lambda summaries: _table_lines(omnibenchmark, summaries),
    THROUGHPUT: throughput.markdown,
    "transfer": lambda tables: [line for each in tables.values() for line in each["markdown"]],
    "training": lambda costs: [throughput.cost_sentence(cost) for cost in costs.values()],
}


def markdown(subject: Subject, results: dict[str, Any]) -> str:
    """The report card, from what results.json holds."""
    height, width = subject.image_size
    lines = [
        f"# {in_markdown(_title(subject))}",
        "",
        f"{subject.variant or 'MLP-Mixer'}, {subject.num_params:,} parameters, images of "
        f"{height} x {width}, {subject.num_classes:,} classes.",
    ]
    # What was recorded before results had all of these is left out.
    splits = results.get("splits", {}).items()
    if whole := {name: each for name, each in splits if each.keys() >= SHOWN}:
        columns, rows = _shown(whole)
        lines += [
            "",
            "Intervals are Wilson's; ECE is the expected calibration error in 15 bins; per class "
            "is the mean of the classes' accuracies.",
        ]
        lines += ["", _line(columns), "|---" * len(columns) + "|", *map(_line, rows), ""]
        notes = [f"{name} is {each['data']}" for name, each in whole.items() if "data" in each]
        lines += [f"{in_markdown(note)}.  " for note in (*notes, *_notes(whole))]
    for section, made in SECTIONS.items():
        if section in results:
            lines += ["", *made(results[section])]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(in_markdown, cells))} |"


def _print(console: Console, text: str) -> None:
    """Prints Markdown, its tables drawn."""
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if not is_table:
            text = html.unescape("\n".join(line.strip() for line in lines))
            console.print(text, markup=False)
            continue
        header, _, *rows = (
            [html.unescape(cell.strip()) for cell in line.split("|")[1:-1]] for line in lines
        )
        table = Table()
        for name in header:
            table.add_column(Text(name), overflow="fold")
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
    written = f"written to {card.path.with_suffix('.md')} and {card.path.name}"
    console.print(written, markup=False)


def measure_variants(
    names: Sequence[str], *, batch_sizes: Sequence[int], image_size: int, output: str
) -> None:
    """The throughput of the paper's models, with random weights: a table here and JSON.

    Args:
      names: such as "B/16".
      batch_sizes: images a device.
      image_size: side in pixels.
      output: directory of results.json.

    Raises:
      UserError: no such variant, or a patch that does not divide the images.
    """
    console, directory = _console(), files.make_output_directory("--output", output)
    mesh = sharding.make_mesh({"data": -1})
    size = (image_size, image_size)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--variants={name}: one of {', '.join(VARIANTS)}")
        check_image_size(size, VARIANTS[name]["patch_size"])
    found: dict[str, dict[str, Any]] = {}
    measured = throughput.measure_variants(
        names, image_size=size, dtype="float32", batch_sizes=batch_sizes, mesh=mesh
    )
    for name, result in measured:
        found[name] = result.summary()
        console.print(f"measured {name}")
        identity = {"weights": "random"}
        path = run.record_result(directory, "last", identity, name, found[name], section=THROUGHPUT)
    _print(console, "\n".join(throughput.markdown(found)))
    console.print(f"written to {path}", markup=False)


def _side_by_side(rows: Sequence[tuple[str, dict[str, dict[str, Any]]]]) -> list[str]:
    """Lines of a Markdown table with a row for each of (weights, sections of results)."""
    cells = [_cells(sections) for _, sections in rows]
    names = list(dict.fromkeys(name for each in cells for name in each))
    lines = ["Side by side: top-1 with its interval of 95 %, images/s a device.", ""]
    lines += [_line(["weights", *names]), "|---" * (len(names) + 1) + "|"]
    for (of, _), each in zip(rows, cells, strict=True):
        lines.append(_line([of, *(each.get(name, "-") for name in names)]))
    return lines


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
    for name, result in sections.get(LINEAR_PROBE, {}).items():
        share = f"{_percent(result['top1'])} ({_interval(result['top1_interval'])})"
        cells[f"{name}, linear probe"] = share
    for mean in omnibenchmark.means(sections.get(OMNIBENCHMARK, {})):
        name = f"omnibenchmark, {mean.extent}" + ", average" * (mean.weights == "ema")
        cells[name] = f"{_percent(mean.top1)} ({_interval(mean.top1_interval)})"
    for result in sections.get(THROUGHPUT, {}).values():
        for rate in result["rates"]:
            if rate["images_per_second"] is not None:
                rates = f"{rate['images_per_second']:,.3g}"
                cells[f"images/s, batch {rate['batch_size']}"] = rates
    return cells
