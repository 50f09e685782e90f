"""An open run directory: its lock, its checkpoints, and the signals that end the run."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

from etils import epath
from ml_collections import ConfigDict

from mixer import files
from mixer.errors import UserError, first_line
from mixer.parallel import backend, signals, watchdog
from mixer.parallel import processes as distributed
from mixer.runs import config as run_config
from mixer.weights import checkpoint


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run directory that this program holds the lock of.

    Attributes:
      path: the directory, which every process sees.
      checkpoints: of the run.
      best: the checkpoint with the best validation accuracy.
      signals: SIGTERM and Ctrl-C, which ask the run to save and leave.
      watch: notes what this process does, so that a stall can be explained.
    """

    path: epath.Path
    checkpoints: checkpoint.Checkpoints
    best: checkpoint.Checkpoints
    signals: signals.Signals
    watch: watchdog.Watch

    def leave_if_asked(self, say: Callable[[str], None]) -> None:
        """Raises signals.Stopped if a signal has arrived, once the last checkpoint is on disk."""
        if not self.signals.poll():
            return
        self.checkpoints.wait()
        if self.checkpoints.steps:
            last = self.checkpoints.describe_last()
            say(f"saved {last}; the same command continues from it")
        else:
            say(f"{self.signals.name}: nothing is to be saved before the first step")
        raise signals.Stopped(self.signals.received)


@contextlib.contextmanager
def open_run(config: ConfigDict, workdir: str) -> Iterator[OpenRun]:
    """Opens a run directory for training, on every process of the run.

    Raises:
      UserError: a wrong config, or a directory that cannot be used.
    """
    with watchdog.watch(stall_secs=config.stall_secs, tell=warn) as watch:
        backend.check_settings()
        backend.start()
        run_config.check_config(config)
        with (
            _directory(workdir) as path,
            signals.catch() as caught,
            checkpoint.Checkpoints(
                path / "checkpoints",
                keep_last=config.checkpoint.keep_last,
                keep_every_steps=config.checkpoint.keep_every_steps,
            ) as checkpoints,
            checkpoint.Checkpoints(path / "best", keep_last=1) as best,
        ):
            try:
                yield OpenRun(path, checkpoints, best, caught, watch)
            finally:
                watch.beat(0, "leaving")


@contextlib.contextmanager
def _directory(workdir: str) -> Iterator[epath.Path]:
    """Makes the run's directory, checks that every process sees it, and holds its lock."""
    path = files.parse_path("--workdir", workdir)
    checkpoint.check_name(path, writes=True)
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            try:
                path.mkdir(parents=True, exist_ok=True)
            except Exception as error:
                if not isinstance(error, OSError) and "://" not in os.fspath(workdir):
                    raise  # an object store's client has exceptions of its own
                reason = getattr(error, "strerror", None) or first_line(error)
                raise UserError(f"--workdir={workdir} cannot be made: {reason}") from None
            stack.enter_context(checkpoint.locked(path))
            run_config.check_place(path)
            files.remove_unfinished(path)
        distributed.check_shared(path)
        yield path


def say(line: str) -> None:
    """Prints a line before the progress bar exists."""
    print(line, flush=True)


def warn(line: str) -> None:
    """Prints a warning."""
    say(f"warning: {line}")
