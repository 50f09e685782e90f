"""An open run directory: its lock, its checkpoints, and the signals that end the run."""

import contextlib
import dataclasses
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mixer import files, run_files
from mixer.errors import UserError
from mixer.parallel import backend, signals, watchdog
from mixer.parallel import processes as distributed
from mixer.runs import config as run_config
from mixer.weights import checkpoint

# Directories and files of a run directory; nothing else may have these names.
DIRECTORIES = ("checkpoints", "best", "damaged", "tensorboard", "profile", "evaluation")
FILES = ("config.json", "data.json", "metrics.jsonl", "results.json", "results.md", "curves.png")


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run directory that this process has locked.

    Attributes:
      path: the directory, which every process can see.
      checkpoints: the run's checkpoints.
      best: the checkpoint with the best validation accuracy.
      signals: handlers of SIGTERM and Ctrl-C, which make the run save and stop.
      watch: records what this process is doing, so that a stall can be explained.
    """

    path: epath.Path
    checkpoints: checkpoint.Checkpoints
    best: checkpoint.Checkpoints
    signals: signals.Signals
    watch: watchdog.Watch

    def leave_if_asked(self, say: Callable[[str], None]) -> None:
        """Raises signals.Stopped after a signal, when the last checkpoint is on disk."""
        if not self.signals.poll():
            return
        self.checkpoints.wait()
        if self.checkpoints.steps:
            description = self.checkpoints.describe_last()
            say(f"saved {description}; the same command continues from it")
        else:
            say(f"{self.signals.name}: no checkpoint saved, as the run has not finished a step")
        raise signals.Stopped(self.signals.received)


@contextlib.contextmanager
def open_run(config: ConfigDict, workdir: str) -> Iterator[OpenRun]:
    """Opens a run directory for training, on every process of the run.

    Raises:
      UserError: the config is invalid, or the directory cannot be used.
    """
    with watchdog.watch(stall_secs=config.stall_secs, tell=warn) as watch:
        backend.check_settings()
        backend.start()
        run_config.check_config(config)
        with (
            _lock_directory(workdir) as path,
            signals.catch() as stop_signals,
            checkpoint.Checkpoints(
                path / "checkpoints",
                keep_last=config.checkpoint.keep_last,
                keep_every_steps=config.checkpoint.keep_every_steps,
            ) as checkpoints,
            checkpoint.Checkpoints(path / "best", keep_last=1) as best,
        ):
            try:
                yield OpenRun(path, checkpoints, best, stop_signals, watch)
            finally:
                watch.beat(0, "leaving")


@contextlib.contextmanager
def _lock_directory(workdir: str) -> Iterator[epath.Path]:
    """Creates and locks the run's directory, and checks that every process can see it."""
    path = files.parse_path("--workdir", workdir)
    checkpoint.check_name(path, writes=True)
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            files.make_directory(workdir, "--workdir")
            stack.enter_context(lock(path))
            check_place(path)
            files.remove_unfinished(path)
        distributed.check_shared(path)
        yield path


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Locks the run directory for this process; the OS releases the lock when the process ends.

    Raises:
      UserError: another process holds the lock.
    """
    if "://" in str(workdir):  # an object store has no locks
        yield
        return
    path = workdir / ".lock"
    with contextlib.ExitStack() as stack:
        with files.storage_errors(path, f"{path} cannot be locked"):
            # O_NONBLOCK, because opening a pipe would otherwise wait for a reader.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
            stack.callback(os.close, descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path} is not a regular file; remove it")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 64).decode(errors="replace") or "unknown"
                raise UserError(
                    f"{workdir} is in use by another process (pid {owner}); wait for it, or pass "
                    "another --workdir"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield


def check_place(workdir: epath.Path) -> None:
    """Raises UserError if a path that a run writes exists with the wrong type."""
    if "://" in os.fspath(workdir):
        return
    for names, has_type, noun in (
        (DIRECTORIES, os.path.isdir, "directory"),
        (FILES, os.path.isfile, "regular file"),
    ):
        for path in (workdir / name for name in names):
            if os.path.lexists(path) and not has_type(path):
                raise UserError(f"{path} is not a {noun}, which a run needs there; move it away")


def record_result(
    directory: epath.PathLike,
    name: str,
    weights: Mapping[str, Any],
    entry: str,
    result: dict[str, Any],
    *,
    section: str = "splits",
) -> epath.Path:
    """Adds a result to `results.json`, or to `results_<name>.json` if `name` is not "last".

    Other results of the same weights are kept, and results of other weights are deleted. Only
    process 0 writes.

    Args:
      directory: a run, or another directory for results.
      name: "last", "best" or the number of a step.
      weights: identity of the weights, such as {"step": 2000}, which is saved in the file.
      entry: key of the result, such as "val".
      result: values that JSON can represent.
      section: section of the file: "splits", or the section of another evaluation.
    """
    path = run_files.results_path(directory, name)
    if not distributed.is_main():
        return path
    weights = json.loads(json.dumps(weights))
    old = run_files.read_results(directory, name) or {}
    if not has_weights(old, weights):
        old = weights
        path.with_suffix(".md").unlink(missing_ok=True)  # it describes the old results
    run_files.write_json(path, {**old, section: {**old.get(section, {}), entry: result}})
    return path


def has_weights(results: Mapping[str, Any], weights: Mapping[str, Any]) -> bool:
    """Returns whether a results.json is of `weights`, as passed to `record_result`."""
    weights = {"weights": None, **json.loads(json.dumps(weights))}
    return {key: results.get(key) for key in weights} == weights


def say(line: str) -> None:
    """Prints a line before the progress bar exists."""
    print(line, flush=True)


def warn(line: str) -> None:
    """Prints a warning."""
    say(f"warning: {line}")
