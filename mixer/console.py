"""Console output: lines of text, and a progress bar on a terminal."""

import os
import sys

import rich.console
import rich.progress

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


class RunConsole(Console):
    """A console that survives a closed pipe, such as `tee` after Ctrl-C, until the run is saved."""

    def on_broken_pipe(self) -> None:
        """Discards all further output; rich calls this method."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
