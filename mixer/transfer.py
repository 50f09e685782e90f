"""Transfer: the same weights fine-tuned on several tasks, one run each, and their table.

Each task is an ordinary run (mixer/trainer.py), so the whole is continued as a run is: what is
finished is read, what was stopped goes on.
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
from mixer.weights import checkpoint
from mixer.weights import load as loading

RECORD = "transfer.json"


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's accuracy on the whole of its test split. Shares are in 0..1, intervals of 95 %.

    Attributes:
      name: of the task.
      count: images of the test split.
      top1: share of them.
      top1_interval: (low, high), Wilson's.
      mean_per_class: mean of the classes' accuracies, None where images have several labels.
      mean_per_class_interval: likewise.
      train_examples: images that were trained on.
      steps: updates.
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
    """The mean accuracy of some tasks, each of the same weight.

    Attributes:
      num_tasks: how many it is over.
      of: how many there are.
      top1: the mean, in 0..1.
      top1_interval: (low, high) of 95 %. The tasks are independent, and only the number of their
        test images is in it: another seed may give another mean.
    """

    num_tasks: int
    of: int
    top1: float
    top1_interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The accuracies of the tasks that are finished.

    Attributes:
      tasks: in the order asked for.
      asked: the names of all that were asked for.
      groups: names of tasks by group; of these too, some may not have been asked for.
    """

    tasks: tuple[TaskResult, ...]
    asked: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]

    def mean(self, names: Sequence[str]) -> Mean | None:
        """The mean over those of `names` that are finished, None where none is."""
        chosen = [task for task in self.tasks if task.name in names]
        if not chosen:
            return None
        shares = np.array([task.top1 for task in chosen])
        counts = np.array([task.count for task in chosen])
        interval = scores.mean_interval(shares, counts)
        return Mean(len(chosen), len(names), float(shares.mean()), interval)

    def means(self) -> dict[str, Mean]:
        """The mean of each group that has finished tasks, and the "mean" of all tasks.

        All tasks are the groups' and those asked for; the last mean is left out where it is that of
        a group.
        """
        rows = dict(self.groups)
        every = {*self.asked, *(name for names in rows.values() for name in names)}
        if every not in map(set, rows.values()):
            rows["mean"] = tuple(every)
        found = {group: self.mean(names) for group, names in rows.items()}
        return {group: mean for group, mean in found.items() if mean is not None}

    def summary(self) -> dict[str, Any]:
        """Tasks, group means and what is missing, as JSON has them."""
        finished = {task.name: dataclasses.asdict(task) for task in self.tasks}
        return {
            "tasks": finished,
            "means": {group: dataclasses.asdict(mean) for group, mean in self.means().items()},
            "unfinished": [name for name in self.asked if name not in finished],
        }

    def markdown(self) -> list[str]:
        """The lines of a table with a row per task, then one per mean."""
        return tables.markdown(results.transfer_table(self.summary()))


def fine_tune(
    tasks: Mapping[str, ConfigDict],
    directory: epath.PathLike,
    *,
    groups: Mapping[str, Sequence[str]],
    say: Callable[[str], None],
    train_examples: int | None = None,
) -> Transfer:
    """Fine-tunes on every task that is not finished yet, and reads the accuracies of all.

    A task's run is in `directory`/NAME, with "_" for "/" in its name. After each task the results
    so far are written to `directory`/transfer.json.

    Args:
      tasks: the config of each, by name; their weights are its `init_from`.
      directory: of the runs; what it holds is continued.
      groups: names of tasks over which means are taken, whether `tasks` has them or not.
      say: gets a line as a task begins and as it ends.
      train_examples: how many images each task has to train on (1,000 in VTAB-1k); None: any
        number.

    Raises:
      UserError: before the first training: data that is not prepared (all of it is listed) or not
        of that size, weights that are not there or cannot be taken, a task that was begun with
        another config. Later: whatever ends the training of a task.
      signals.Stopped: SIGTERM or SIGINT arrived; the state of the task under way is saved.
    """
    directory = files.make_directory(directory, "--output")
    workdirs = {name: directory / name.replace("/", "_") for name in tasks}
    finished, unfinished = {}, {}
    for name, config in tasks.items():
        with _naming(name):
            run.check_config(config)
            _check_same_config(workdirs[name], config)
            if result := _read(name, workdirs[name]):
                finished[name] = result
            else:
                unfinished[name] = config
    images_left = {}
    if unfinished:
        say(f"checking weights and data of {len(unfinished)} tasks")
        images_left = _check_all(unfinished, workdirs, train_examples)

    seconds, images_seen = 0.0, 0
    for number, (name, config) in enumerate(tasks.items(), 1):
        place = f"task {number} of {len(tasks)}: {name}"
        if name in finished:
            say(f"{place}: {_sentence(finished[name])}, done before")
            continue
        hint = ""
        if images_seen:
            left = sum(images_left[other] for other in tasks if other not in finished)
            hint = f", about {formatting.duration(seconds / images_seen * left)} left"
        say(f"{place}: begins{hint}")
        begun = time.monotonic()
        with _naming(name):
            trainer.train(config, workdirs[name])
        seconds += time.monotonic() - begun
        images_seen += images_left[name]
        # What a task has compiled and read is of no use to the next.
        gc.collect()
        jax.clear_caches()
        finished[name] = _read(name, workdirs[name])
        run.write_json(directory / RECORD, _gather(tasks, groups, finished).summary())
        took = formatting.duration(time.monotonic() - begun)
        say(f"{place}: {_sentence(finished[name])}, took {took}")
    result = _gather(tasks, groups, finished)
    run.write_json(directory / RECORD, result.summary())
    return result


def _gather(tasks, groups, finished: Mapping[str, TaskResult]) -> Transfer:
    return Transfer(
        tasks=tuple(finished[name] for name in tasks if name in finished),
        asked=tuple(tasks),
        groups={group: tuple(names) for group, names in groups.items()},
    )


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts a task's name before what a user is told."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _read(name: str, workdir: epath.Path) -> TaskResult | None:
    """The result of a finished run; None for a run that is not finished or not evaluated."""
    saved = results.read(workdir, "last")
    config, data = run_files.read_config(workdir), run_files.read_data(workdir)
    if not (saved and config and data) or saved.step != config["total_steps"]:
        return None
    test = saved.splits.get("test")
    if test is None:
        return None  # the run is finished, and evaluates once more
    return TaskResult(
        name=name,
        count=test.count,
        top1=test.top1,
        top1_interval=test.top1_interval,
        mean_per_class=test.mean_per_class,
        mean_per_class_interval=test.mean_per_class_interval,
        train_examples=data["splits"]["train"]["num_examples"],
        steps=saved.step,
    )


def _check_same_config(workdir: epath.Path, config: ConfigDict) -> None:
    """Raises UserError where `workdir` holds a run of another config."""
    old = run_files.read_config(workdir)
    if old is not None:
        run.check_trained(workdir, old)
    data = run_files.read_data(workdir)
    if old is None or data is None:
        return
    if checkpoint.last_step(workdir) is None and results.read(workdir, "last") is None:
        return  # what never saved binds nothing
    new = _resolved(config, None, old)
    if new.model.num_classes is None:
        new.model.num_classes = len(data["class_names"])
    run.resolve_lengths(new, data["splits"]["train"]["num_examples"])
    if changed := run.changes(old, new.to_dict()):
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(changed)}. One table has one "
            "config: give another directory, or remove this run"
        )


def _check_all(
    tasks: Mapping[str, ConfigDict],
    workdirs: Mapping[str, epath.Path],
    train_examples: int | None,
) -> dict[str, int]:
    """Finds at once what would end one of the trainings; how many images each has left."""
    _check_prepared(tasks)
    weights = _find_weights(tasks, workdirs)
    images_left = {}
    for name, config in tasks.items():
        with _naming(name):
            found = weights[config.init_from, config.init_image_size]
            images_left[name] = _check(config, workdirs[name], found, train_examples)
        gc.collect()  # a split may hold 2 GiB
    return images_left


def _check_prepared(tasks: Mapping[str, ConfigDict]) -> None:
    """Raises UserError that lists every TFDS set that is not prepared, by the command for it."""
    stored = {
        (config.dataset.name, config.dataset.data_dir): None
        for config in tasks.values()
        if config.dataset.name not in ("folder", "synthetic", "digits")
    }
    if not stored:
        return
    from mixer.data.sources import stored as sources

    missing = [
        f"`python -m mixer.tools.prepare tfds {name}{f' --data_dir={where}' if where else ''}`"
        for name, where in stored
        if not sources.tfds_builder(name, where, prepared=False).is_prepared()
    ]
    if missing:
        sets = "set is" if len(missing) == 1 else "sets are"
        raise UserError(f"{len(missing)} data {sets} not prepared: {', '.join(missing)}")


def _find_weights(
    tasks: Mapping[str, ConfigDict], workdirs: Mapping[str, epath.Path]
) -> dict[tuple[str, int | None], loading.Found | None]:
    """What the tasks start from, by (init_from, init_image_size), each found once.

    A task that has begun needs its first weights no more.
    """
    found: dict[tuple[str, int | None], loading.Found | None] = {}
    for name, config in tasks.items():
        key = config.init_from, config.init_image_size
        needed = checkpoint.last_step(workdirs[name]) is None
        if found.get(key) is None:
            with _naming(name):
                found[key] = run.find_initial(config) if needed else None
    return found


def _resolved(
    config: ConfigDict, found: loading.Found | None, old: dict[str, Any] | None
) -> ConfigDict:
    """The config with what its first weights decide, as the trainer resolves it."""
    config = config.copy_and_resolve_references()
    run.resolve_model(config, found, old)
    run.resolve_permutation(config)
    return config


def _check(
    config: ConfigDict,
    workdir: epath.Path,
    found: loading.Found | None,
    train_examples: int | None,
) -> int:
    """Opens a task's data and builds its model; returns how many images it has still to train on.

    Raises:
      UserError: data or model that training would refuse, or data of another size.
    """
    done = checkpoint.last_step(workdir)
    old = None if done is None else run_files.read_config(workdir)
    config = _resolved(config, found, old)
    splits = run.open_splits(config, None)
    if splits.test is None:
        raise UserError("dataset.test_split is empty; the table is of test splits")
    count = splits.train.num_examples
    if train_examples not in (None, count):
        raise UserError(f"{splits.train.name} has {count:,} images, where {train_examples:,} fit")
    if config.model.num_classes is None:
        config.model.num_classes = len(splits.train.class_names)
    run.check_classes(config, splits.train.class_names)
    run.resolve_lengths(config, count)
    run.build_optimizer(config)
    run.build_model(config)
    return (config.total_steps - (done or 0)) * config.global_batch_size


def _sentence(result: TaskResult) -> str:
    accuracy = f"{percent(result.top1)} ({span(result.top1_interval)})"
    return f"{accuracy} of {result.count:,} test images"
