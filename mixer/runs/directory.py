"""An open run directory: its lock, its checkpoints, and the signals that end the run."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from etils import epath
from ml_collections import ConfigDict

from mixer import files
from mixer.parallel import backend, signals, watchdog
from mixer.parallel import processes as distributed
from mixer.runs import config as run_config
from mixer.weights import checkpoint


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
            last = self.checkpoints.describe_last()
            say(f"saved {last}; the same command continues from it")
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
    """Creates and locks the run's directory, and checks that every process can see it."""
    path = files.parse_path("--workdir", workdir)
    checkpoint.check_name(path, writes=True)
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            files.make_directory(workdir, "--workdir")
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
