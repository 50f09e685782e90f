"""What a person sees of a run: a progress bar at a terminal, plain lines anywhere else."""

import os
import sys

import jax
import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mixer import formatting


class _Console(Console):
    """A console whose reader may go away, as `tee` does at Ctrl-C, before the run is saved."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminal:
    """Shows the progress of `total_steps` updates from `start_step` on."""

    def __init__(self, *, start_step: int, total_steps: int):
        self._console = _Console(highlight=False, soft_wrap=True)
        self._total = total_steps
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, status="")

    def start(self) -> None:
        """Shows the bar."""
        if self._bar:
            self._bar.start()

    def line(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, markup=False)

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: dict[str, float], seconds_left: float) -> None:
        """Shows the metrics of a log step."""
        status = (
            f"loss {metrics['train/loss']:.4f}  accuracy {metrics['train/accuracy']:.1%}  "
            f"{metrics['perf/images_per_second']:,.0f} images/s  "
            f"data wait {metrics['perf/data_wait_share']:.1%}  {memory()}"
        )
        if metrics.get("train/skipped_steps"):
            status += f"  skipped {metrics['train/skipped_steps']:.0f}"
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        else:
            self.line(
                f"step {step}/{self._total}  {status}  left {formatting.duration(seconds_left)}"
            )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar:
            self._bar.stop()


def memory() -> str:
    """Peak memory of the first device where it reports one, else what this process holds."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return f"device memory {stats['peak_bytes_in_use'] / 2**30:.1f} GiB"
    return f"memory {psutil.Process().memory_info().rss / 2**30:.1f} GiB"
