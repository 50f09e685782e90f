"""Console output: lines of text, and a progress bar on a terminal."""

import os
import sys

import jax
import psutil
import rich.console
import rich.progress

from mixer import formatting

FILE_WIDTH = 1000  # characters per line in a file or a pipe, so that no table is wrapped


class Console(rich.console.Console):
    """A terminal, file or pipe; prints text literally, without markup."""

    def __init__(self, *, stderr: bool = False):
        super().__init__(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)
        if not self.is_terminal:
            self.width = FILE_WIDTH

    def say(self, text: str) -> None:
        """Prints text, above the progress bar if there is one."""
        self.print(text, markup=False)


class ProgressBar(rich.progress.Progress):
    """The progress bar of one task, which is shown only on a terminal.

    The bar is shown inside a `with` block, or between `start` and `stop`; a `transient` bar is
    removed at the end.
    """

    def __init__(
        self,
        console: Console,
        description: str,
        *,
        total: int,
        completed: int = 0,
        transient: bool = True,
        redirect_stdout: bool = True,
        is_shown: bool = True,
    ):
        super().__init__(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}", markup=False),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=transient,
            redirect_stdout=redirect_stdout,
            disable=not (console.is_terminal and is_shown),
        )
        self._task = self.add_task(description, total=total, completed=completed, status="")

    def show(self, completed: int, status: str | None = None) -> None:
        """Moves the bar, and replaces the status after it unless `status` is None."""
        fields = {} if status is None else {"status": status}
        self.update(self._task, completed=completed, **fields)

    def count(self, items: int, unit: str) -> None:
        """Moves the bar by `items`, and shows the rate in `unit` per second."""
        (task,) = self.tasks
        rate = f"{task.speed:,.0f} {unit}/s" if task.speed else ""
        self.show(min(task.completed + items, task.total), rate)


class _RunConsole(Console):
    """A console that survives a closed pipe, such as `tee` after Ctrl-C, until the run is saved."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminal:
    """Shows the progress of a training run of `total_steps` updates from `start_step` on."""

    def __init__(self, *, start_step: int, total_steps: int):
        self._console = _RunConsole()
        self._total = total_steps
        self._bar = ProgressBar(
            self._console, "training", total=total_steps, completed=start_step, transient=False
        )

    def start(self) -> None:
        """Shows the bar."""
        self._bar.start()

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.say(text)

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._bar.show(step)

    def log(self, step: int, metrics: dict[str, float], seconds_left: float) -> None:
        """Shows the metrics of a log step after the bar, or as a line if there is no terminal."""
        status = (
            f"loss {metrics['train/loss']:.4f}  accuracy {metrics['train/accuracy']:.1%}  "
            f"{metrics['perf/images_per_second']:,.0f} images/s  "
            f"data wait {metrics['perf/data_wait_share']:.1%}  {memory()}"
        )
        if metrics.get("train/skipped_steps"):
            status += f"  skipped {metrics['train/skipped_steps']:.0f}"
        self._bar.show(step, status)
        if not self._console.is_terminal:
            self.line(
                f"step {step}/{self._total}  {status}  left {formatting.duration(seconds_left)}"
            )

    def close(self) -> None:
        """Ends the bar."""
        self._bar.stop()


def memory() -> str:
    """Returns the peak memory of the first device if it reports one, else this process's memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return f"device memory {stats['peak_bytes_in_use'] / 2**30:.1f} GiB"
    return f"memory {psutil.Process().memory_info().rss / 2**30:.1f} GiB"
