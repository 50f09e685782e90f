"""Transfer: fine-tunes the same weights on several tasks, one run per task, and tabulates them.

Each task is an ordinary run (mixer/trainer.py), so the same command resumes after an interruption:
it reads the results of the finished runs and resumes the run that was stopped.
"""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from mixer.runs import data as run_data
from mixer.training import program
from mixer.weights import checkpoint, load


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The accuracy on a task's test split. Accuracies are in 0..1; intervals are at 95 %.

    Attributes:
      name: name of the task.
      count: number of test images.
      top1: top-1 accuracy.
      top1_interval: Wilson score interval (low, high).
      mean_per_class: mean of the per-class accuracies; None if images have several labels.
      mean_per_class_interval: its interval (low, high), or None.
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
class Transfer:
    """The accuracies of the finished tasks.

    Attributes:
      tasks: the finished tasks, in the order of `requested`.
      requested: the names of all requested tasks.
      groups: names of tasks by group; they need not have been requested.
    """

    tasks: tuple[TaskResult, ...]
    requested: tuple[str, ...]
    groups: Mapping[str, Sequence[str]]

    def means(self) -> dict[str, dict[str, Any]]:
        """Computes the mean of each group with finished tasks, and the "mean" of all tasks.

        All tasks are the tasks of the groups and the requested tasks. If one group has all of them,
        "mean" would repeat its mean and is omitted.

        Returns:
          By group: "num_tasks", the number of finished tasks, which have equal weights; "of", the
          number of tasks in the group; "top1", the mean in 0..1; and "top1_interval", its 95 %
          interval (low, high). The interval covers the sampling of the test images but not the
          seed: another seed may give another mean.
        """
        groups = dict(self.groups)
        all_names = {*self.requested, *(name for names in groups.values() for name in names)}
        if all_names not in map(set, groups.values()):
            groups["mean"] = tuple(all_names)
        means = {}
        for group, names in groups.items():
            if tasks := [task for task in self.tasks if task.name in names]:
                shares = np.array([task.top1 for task in tasks])
                counts = np.array([task.count for task in tasks])
                means[group] = {
                    "num_tasks": len(tasks),
                    "of": len(names),
                    "top1": float(shares.mean()),
                    "top1_interval": scores.mean_interval(shares, counts),
                }
        return means

    def summary(self) -> dict[str, Any]:
        """Returns tasks, means and the names of unfinished tasks, for transfer.json."""
        tasks = {task.name: dataclasses.asdict(task) for task in self.tasks}
        return {
            "tasks": tasks,
            "means": self.means(),
            "unfinished": [name for name in self.requested if name not in tasks],
        }

    def markdown(self) -> list[str]:
        """Returns the lines of a Markdown table with a row per task, then a row per mean."""
        return tables.markdown(results.transfer_table(self.summary()))


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, the config of its run and the directory of the run."""

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
    """Fine-tunes on every unfinished task, and returns the accuracies of all tasks.

    The run of a task is in `directory`/NAME, with "_" instead of "/" in its name. After each task
    the results are written to `directory`/transfer.json.

    Args:
      tasks: the config of each task, by name; `init_from` specifies the weights.
      directory: directory of the runs; existing runs are resumed.
      groups: names of tasks by group; a mean is computed for each group, also if `tasks` lacks some
        of its tasks.
      say: prints a line when a task starts and when it ends.
      train_examples: number of training images that each task must have (1,000 in VTAB-1k); None:
        any number.

    Raises:
      UserError: before the first training, if data is not prepared (the message lists all of it) or
        has another number of training images, weights are missing or do not match, or a task was
        started with another config; later, if the training of a task fails.
      signals.Stopped: SIGTERM or SIGINT arrived; the state of the current task is saved.
    """
    directory = files.make_directory(directory, "--output")
    runs = [
        Task(name, config, directory / name.replace("/", "_")) for name, config in tasks.items()
    ]
    task_results = _read_results(runs)
    unfinished_tasks = [task for task in runs if task.name not in task_results]
    images_left = {}
    if unfinished_tasks:
        say(f"checking weights and data of {len(unfinished_tasks)} tasks")
        images_left = _check_all(unfinished_tasks, train_examples)

    seconds, images_seen = 0.0, 0
    for number, task in enumerate(runs, 1):
        title = f"task {number} of {len(runs)}: {task.name}"
        if task.name in task_results:
            say(f"{title}: {_sentence(task_results[task.name])}, already finished")
            continue
        hint = ""
        if images_seen:
            num_images = sum(images_left[name] for name in tasks if name not in task_results)
            hint = f", about {formatting.duration(seconds / images_seen * num_images)} left"
        say(f"{title}: starting{hint}")
        start = time.monotonic()
        task_results[task.name] = _train(task)
        duration = time.monotonic() - start
        seconds, images_seen = seconds + duration, images_seen + images_left[task.name]
        _record(directory, task_results, tasks, groups)
        say(f"{title}: {_sentence(task_results[task.name])}, took {formatting.duration(duration)}")
    return _record(directory, task_results, tasks, groups)


def _record(
    directory: epath.Path,
    task_results: Mapping[str, TaskResult],
    requested: Iterable[str],
    groups: Mapping[str, Sequence[str]],
) -> Transfer:
    """Writes the results of the finished tasks to transfer.json, and returns them."""
    requested = tuple(requested)
    finished_tasks = tuple(task_results[name] for name in requested if name in task_results)
    transfer = Transfer(finished_tasks, requested, groups)
    run.write_json(directory / "transfer.json", transfer.summary())
    return transfer


def _read_results(tasks: Sequence[Task]) -> dict[str, TaskResult]:
    """Reads the results of the finished runs; raises UserError if a config has changed."""
    task_results = {}
    for task in tasks:
        with _naming(task.name):
            run.check_config(task.config)
            _check_same_config(task)
            if result := _read_result(task):
                task_results[task.name] = result
    return task_results


def _train(task: Task) -> TaskResult:
    """Starts or resumes the run of a task, and returns its result."""
    with _naming(task.name):
        trainer.train(task.config, task.workdir)
    # Free the compiled programs and the images of this task.
    gc.collect()
    jax.clear_caches()
    return _read_result(task)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Prefixes the message of a UserError with the name of the task."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _read_result(task: Task) -> TaskResult | None:
    """Reads the result of a run; returns None if the run is not finished or not evaluated."""
    saved = results.read(task.workdir, "last")
    config, data = run_files.read_config(task.workdir), run_files.read_data(task.workdir)
    if not (saved and config and data) or saved.step != config["total_steps"]:
        return None
    test = saved.splits.get("test")
    if test is None:
        return None  # the trainer evaluates a finished run that has no result
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
    """Raises UserError if the task's directory contains a run with another config."""
    saved_config, data = run_files.read_config(task.workdir), run_files.read_data(task.workdir)
    if saved_config is not None:
        run.check_trained(task.workdir, saved_config)
    if saved_config is None or data is None:
        return
    if checkpoint.last_step(task.workdir) is None and results.read(task.workdir, "last") is None:
        return  # a run without a checkpoint can be restarted with any config
    config = run.resolve(task.config, initial=None, saved_config=saved_config)
    run.resolve_data(config, len(data["class_names"]), data["splits"]["train"]["num_examples"])
    if changed := run.changes(saved_config, config.to_dict()):
        raise UserError(
            f"{task.workdir} contains a run with another config: {'; '.join(changed)}; expected "
            "the same config (choose another directory, or remove the run)"
        )


def _check_all(tasks: Sequence[Task], train_examples: int | None) -> dict[str, int]:
    """Checks all tasks before training; returns the number of images that each task has left."""
    _check_prepared(tasks)
    weights = _find_weights(tasks)
    images_left = {}
    for task in tasks:
        with _naming(task.name):
            initial = weights.get(_weights_key(task.config))
            images_left[task.name] = _check(task, initial, train_examples)
        gc.collect()  # a split can occupy 2 GiB
    return images_left


def _check_prepared(tasks: Sequence[Task]) -> None:
    """Raises UserError with the `prepare` command of every missing TFDS data set."""
    datasets = {
        (task.config.dataset.name, task.config.dataset.data_dir): None
        for task in tasks
        if task.config.dataset.name not in ("folder", "synthetic", "digits")
    }
    if not datasets:
        return
    from mixer.data.sources import stored as sources

    commands = [
        f"`python -m mixer.tools.prepare tfds {name}{data_dir and f' --data_dir={data_dir}'}`"
        for name, data_dir in datasets
        if not sources.tfds_builder(name, data_dir, prepared=False).is_prepared()
    ]
    if commands:
        sets = "set is" if len(commands) == 1 else "sets are"
        raise UserError(f"{len(commands)} data {sets} not prepared: {', '.join(commands)}")


def _find_weights(tasks: Sequence[Task]) -> dict[tuple[str, str], load.StoredWeights | None]:
    """Finds the initial weights of runs without a checkpoint, by `_weights_key`."""
    weights: dict[tuple[str, str], load.StoredWeights | None] = {}
    for task in tasks:
        key = _weights_key(task.config)
        if key not in weights and checkpoint.last_step(task.workdir) is None:
            with _naming(task.name):
                weights[key] = run.find_initial(task.config)
    return weights


def _weights_key(config: ConfigDict) -> tuple[str, str]:
    """Returns the keys of a config that identify its initial weights; a size may be a list."""
    return config.init_from, str(config.init_image_size)


def _check(task: Task, initial: load.StoredWeights | None, train_examples: int | None) -> int:
    """Opens a task's data and builds its model; returns the number of images left to train on.

    Raises:
      UserError: the data or the model is invalid, or the number of training images is wrong.
    """
    last_step = checkpoint.last_step(task.workdir)
    saved_config = None if last_step is None else run_files.read_config(task.workdir)
    config = run.resolve(task.config, initial=initial, saved_config=saved_config)
    splits = run_data.open_splits(config, None)
    if splits.test is None:
        raise UserError("dataset.test_split is empty; expected a test split")
    count = splits.train.num_examples
    if train_examples not in (None, count):
        raise UserError(f"{splits.train.name} has {count:,} images; expected {train_examples:,}")
    run.resolve_data(config, len(splits.train.class_names), count)
    run_data.check_classes(config, splits.train.class_names)
    program.build_optimizer(config)
    program.build_model(config)
    return (config.total_steps - (last_step or 0)) * config.global_batch_size


def _sentence(result: TaskResult) -> str:
    accuracy = f"{percent(result.top1)} ({span(result.top1_interval)})"
    return f"{accuracy} of {result.count:,} test images"
