"""Transfer: the same weights fine-tuned on several tasks, one run each, and their table.

Each task is an ordinary run (mixer/trainer.py), so the same command continues the whole: it reads
the finished runs, and continues the run that was stopped.
"""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mixer import files, formatting, run_files, trainer
from mixer.errors import UserError
from mixer.evaluation import results, scores, tables
from mixer.evaluation.tables import percent, span
from mixer.runs import config as run
from mixer.training import program
from mixer.weights import checkpoint, load

RECORD = "transfer.json"


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's accuracy on the whole of its test split. Shares are in 0..1, intervals of 95 %.

    Attributes:
      name: of the task.
      count: number of test images.
      top1: share of the test images.
      top1_interval: (low, high), Wilson's.
      mean_per_class: mean of the classes' accuracies; None if images have several labels.
      mean_per_class_interval: likewise.
      train_examples: number of training images.
      steps: number of updates.
    """

    name: str
    count: int
    top1: float
    top1_interval: tuple[float, float]
    mean_per_class: float | None
    mean_per_class_interval: tuple[float, float] | None
    train_examples: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean accuracy of a group of tasks, all of the same weight.

    Attributes:
      num_tasks: number of the finished tasks, over which the mean is.
      of: number of tasks in the group.
      top1: the mean, in 0..1.
      top1_interval: (low, high) of 95 %, which covers the draw of the test images and not the
        seed: another seed may give another mean.
    """

    num_tasks: int
    of: int
    top1: float
    top1_interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The accuracies of the finished tasks.

    Attributes:
      tasks: the finished tasks, in the order of `asked`.
      asked: the names of all requested tasks.
      groups: names of tasks by group, which need not have been requested.
    """

    tasks: tuple[TaskResult, ...]
    asked: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]

    def mean(self, names: Sequence[str]) -> Mean | None:
        """The mean over the finished tasks among `names`; None if there is none."""
        chosen = [task for task in self.tasks if task.name in names]
        if not chosen:
            return None
        shares = np.array([task.top1 for task in chosen])
        counts = np.array([task.count for task in chosen])
        interval = scores.mean_interval(shares, counts)
        return Mean(len(chosen), len(names), float(shares.mean()), interval)

    def means(self) -> dict[str, Mean]:
        """The mean of each group that has finished tasks, and the "mean" of all tasks.

        All tasks are the groups' and the requested ones; if one group has all of them, its mean is
        not repeated.
        """
        groups = dict(self.groups)
        all_names = {*self.asked, *(name for names in groups.values() for name in names)}
        if all_names not in map(set, groups.values()):
            groups["mean"] = tuple(all_names)
        means = {group: self.mean(names) for group, names in groups.items()}
        return {group: mean for group, mean in means.items() if mean is not None}

    def summary(self) -> dict[str, Any]:
        """Tasks, means and the names of unfinished tasks, for transfer.json."""
        finished = {task.name: dataclasses.asdict(task) for task in self.tasks}
        return {
            "tasks": finished,
            "means": {group: dataclasses.asdict(mean) for group, mean in self.means().items()},
            "unfinished": [name for name in self.asked if name not in finished],
        }

    def markdown(self) -> list[str]:
        """The lines of a table with a row per task, then one per mean."""
        return tables.markdown(results.transfer_table(self.summary()))


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, the config of its run and the run's directory."""

    name: str
    config: ConfigDict
    workdir: epath.Path


def fine_tune(
    tasks: Mapping[str, ConfigDict],
    directory: epath.PathLike,
    *,
    groups: Mapping[str, Sequence[str]],
    say: Callable[[str], None],
    train_examples: int | None = None,
) -> Transfer:
    """Fine-tunes on every task that is not finished yet, and reads the accuracies of all.

    A task's run is in `directory`/NAME, with "_" for "/" in its name. The results so far are
    written to `directory`/transfer.json after each task.

    Args:
      tasks: the config of each, by name; their weights are its `init_from`.
      directory: of the runs; runs that it holds are continued.
      groups: names of tasks over which means are taken, whether or not `tasks` has them.
      say: prints a line when a task begins and when it ends.
      train_examples: number of training images that each task must have (1,000 in VTAB-1k); None:
        any number.

    Raises:
      UserError: before the first training: data that is not prepared (all of it is listed) or not
        of that size, weights that are missing or do not fit, a task that was begun with another
        config. Later: whatever ends the training of a task.
      signals.Stopped: SIGTERM or SIGINT arrived; the state of the current task is saved.
    """
    directory = files.make_directory(directory, "--output")
    runs = [
        Task(name, config, directory / name.replace("/", "_")) for name, config in tasks.items()
    ]
    finished = _read_finished(runs)
    unfinished = [task for task in runs if task.name not in finished]
    images_left = {}
    if unfinished:
        say(f"checking weights and data of {len(unfinished)} tasks")
        images_left = _check_all(unfinished, train_examples)

    def record() -> Transfer:
        done = tuple(finished[name] for name in tasks if name in finished)
        transfer = Transfer(done, tuple(tasks), {name: tuple(groups[name]) for name in groups})
        run.write_json(directory / RECORD, transfer.summary())
        return transfer

    seconds, images_seen = 0.0, 0
    for number, task in enumerate(runs, 1):
        title = f"task {number} of {len(runs)}: {task.name}"
        if task.name in finished:
            say(f"{title}: {_sentence(finished[task.name])}, done before")
            continue
        hint = ""
        if images_seen:
            left = sum(images_left[other] for other in tasks if other not in finished)
            hint = f", about {formatting.duration(seconds / images_seen * left)} left"
        say(f"{title}: begins{hint}")
        started = time.monotonic()
        finished[task.name] = _train(task)
        passed = time.monotonic() - started
        seconds, images_seen = seconds + passed, images_seen + images_left[task.name]
        record()
        say(f"{title}: {_sentence(finished[task.name])}, took {formatting.duration(passed)}")
    return record()


def _read_finished(tasks: Sequence[Task]) -> dict[str, TaskResult]:
    """The results of the finished runs; UserError if a run has another config than its task."""
    finished = {}
    for task in tasks:
        with _naming(task.name):
            run.check_config(task.config)
            _check_same_config(task)
            if result := _read_result(task):
                finished[task.name] = result
    return finished


def _train(task: Task) -> TaskResult:
    """Trains, or continues, the run of a task."""
    with _naming(task.name):
        trainer.train(task.config, task.workdir)
    # The next task needs none of the compiled programs and the images of this one.
    gc.collect()
    jax.clear_caches()
    return _read_result(task)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts a task's name in front of an error's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _read_result(task: Task) -> TaskResult | None:
    """The result of a finished run; None for a run that is not finished or not evaluated."""
    saved = results.read(task.workdir, "last")
    config, data = run_files.read_config(task.workdir), run_files.read_data(task.workdir)
    if not (saved and config and data) or saved.step != config["total_steps"]:
        return None
    test = saved.splits.get("test")
    if test is None:
        return None  # training, once more, evaluates the finished run
    return TaskResult(
        name=task.name,
        count=test.count,
        top1=test.top1,
        top1_interval=test.top1_interval,
        mean_per_class=test.mean_per_class,
        mean_per_class_interval=test.mean_per_class_interval,
        train_examples=data["splits"]["train"]["num_examples"],
        steps=saved.step,
    )


def _check_same_config(task: Task) -> None:
    """Raises UserError if the task's directory holds a run with another config."""
    old, data = run_files.read_config(task.workdir), run_files.read_data(task.workdir)
    if old is not None:
        run.check_trained(task.workdir, old)
    if old is None or data is None:
        return
    if checkpoint.last_step(task.workdir) is None and results.read(task.workdir, "last") is None:
        return  # a run that never saved a step binds nothing
    config = run.resolve(task.config, initial=None, saved_config=old)
    run.resolve_data(config, len(data["class_names"]), data["splits"]["train"]["num_examples"])
    if changed := run.changes(old, config.to_dict()):
        raise UserError(
            f"{task.workdir} holds a run with another config: {'; '.join(changed)}. One table has "
            "one config: give another directory, or remove this run"
        )


def _check_all(tasks: Sequence[Task], train_examples: int | None) -> dict[str, int]:
    """Checks everything that could end one of the trainings; the images that each has left."""
    _check_prepared(tasks)
    weights = _find_weights(tasks)
    images_left = {}
    for task in tasks:
        with _naming(task.name):
            found = weights[task.config.init_from, task.config.init_image_size]
            images_left[task.name] = _check(task, found, train_examples)
        gc.collect()  # a split may hold 2 GiB
    return images_left


def _check_prepared(tasks: Sequence[Task]) -> None:
    """Raises UserError that lists the preparing command of every TFDS set that is missing."""
    stored = {
        (task.config.dataset.name, task.config.dataset.data_dir): None
        for task in tasks
        if task.config.dataset.name not in ("folder", "synthetic", "digits")
    }
    if not stored:
        return
    from mixer.data.sources import stored as sources

    missing = [
        f"`python -m mixer.tools.prepare tfds {name}{data_dir and f' --data_dir={data_dir}'}`"
        for name, data_dir in stored
        if not sources.tfds_builder(name, data_dir, prepared=False).is_prepared()
    ]
    if missing:
        sets = "set is" if len(missing) == 1 else "sets are"
        raise UserError(f"{len(missing)} data {sets} not prepared: {', '.join(missing)}")


def _find_weights(tasks: Sequence[Task]) -> dict[tuple[str, int | None], load.StoredWeights | None]:
    """The first weights by (init_from, init_image_size), each found once.

    A run that has a checkpoint no longer needs its first weights.
    """
    weights: dict[tuple[str, int | None], load.StoredWeights | None] = {}
    for task in tasks:
        key = task.config.init_from, task.config.init_image_size
        is_needed = checkpoint.last_step(task.workdir) is None
        if weights.get(key) is None:
            with _naming(task.name):
                weights[key] = run.find_initial(task.config) if is_needed else None
    return weights


def _check(task: Task, found: load.StoredWeights | None, train_examples: int | None) -> int:
    """Opens a task's data and builds its model; returns the number of images it has left.

    Raises:
      UserError: data or a model that training would refuse, or data of another size.
    """
    last_step = checkpoint.last_step(task.workdir)
    old = None if last_step is None else run_files.read_config(task.workdir)
    config = run.resolve(task.config, initial=found, saved_config=old)
    splits = run.open_splits(config, None)
    if splits.test is None:
        raise UserError("dataset.test_split is empty; the table is of test splits")
    count = splits.train.num_examples
    if train_examples not in (None, count):
        raise UserError(f"{splits.train.name} has {count:,} images; expected {train_examples:,}")
    run.resolve_data(config, len(splits.train.class_names), count)
    run.check_classes(config, splits.train.class_names)
    program.build_optimizer(config)
    program.build_model(config)
    return (config.total_steps - (last_step or 0)) * config.global_batch_size


def _sentence(result: TaskResult) -> str:
    accuracy = f"{percent(result.top1)} ({span(result.top1_interval)})"
    return f"{accuracy} of {result.count:,} test images"
