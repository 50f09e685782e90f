"""Metrics of a run: `metrics.jsonl` is the record, TensorBoard a copy of it."""

import collections
import contextlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import jax
from etils import epath

from mixer import files
from mixer.errors import UserError, first_line
from mixer.parallel import processes as distributed
from mixer.run_files import read_metrics


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and, through clu, to TensorBoard's files.

    Process 0 alone writes; the others hold the same `rows`, from which the run takes decisions.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        last_step: int,
        tensorboard: bool,
        warn: Callable[[str], None] = print,
    ):
        """Opens the record of a run that goes on after `last_step`.

        Lines of later steps, which that run will write again, are cut. With several processes, all
        call this. `warn` gets a line on what is left out.
        """
        self._workdir = epath.Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._file = self._tensorboard = None
        self._writes, self._warn = distributed.is_main(), warn
        self._wants_tensorboard = tensorboard and self._writes
        rows = read_metrics(workdir, warn) if self._writes else []
        self.rows = distributed.broadcast([row for row in rows if row["step"] <= last_step])
        # An object store has whole objects only: there each write replaces the record.
        self._in_store = "://" in os.fspath(self._path)
        if not self._writes:
            return
        if self._in_store:
            self._replace(self._path)
        else:
            new = self._path.with_name("metrics.jsonl.new")
            self._replace(new)
            new.replace(self._path)
            self._file = self._path.open("a")
            self._identity = files.identity(self._path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line; `metrics` are scalars such as {"train/loss": 0.3}."""
        numbers = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN; of a step that was left out the others are of use.
        row = {"step": step, **{k: v for k, v in numbers.items() if math.isfinite(v)}}
        self.rows.append(row)
        self.check()
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        elif self._writes:
            self._replace(self._path)
        if self._wants_tensorboard and self._tensorboard is None:
            with self._copying():
                self._open_tensorboard()
        elif self._tensorboard is not None:
            with self._copying():
                self._tensorboard.write_scalars(step, {k: v for k, v in row.items() if k != "step"})

    def check(self) -> None:
        """Raises UserError where the record on disk is not the file that is written to."""
        if self._file is None or (now := files.identity(self._path)) == self._identity:
            return
        what = "is gone" if now is None else "is another file than it was"
        raise UserError(
            f"{self._path} {what}: it was removed or replaced while the run was writing to it; "
            "the run cannot go on there"
        )

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Gives up TensorBoard's files, with a line, where they cannot be written.

        They are a copy; the record is not.
        """
        try:
            yield
        except Exception as error:  # TensorFlow has exceptions of its own for each kind
            if not isinstance(error, OSError) and not type(error).__module__.startswith("tensor"):
                raise
            reason = getattr(error, "strerror", None) or first_line(error)
            self._warn(
                f"{self._workdir / 'tensorboard'} cannot be written: {reason}; the run goes on "
                "without it, metrics.jsonl has everything"
            )
            self._tensorboard, self._wants_tensorboard = None, False

    def _replace(self, path: epath.Path) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def _open_tensorboard(self) -> None:
        """Starts TensorBoard's files from the record, so that they hold nothing that was cut.

        Done at the first write: clu imports TensorFlow, which the first step need not wait for.
        """
        # TensorBoard's package wants Keras, which program.py has kept out of the start.
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
        try:
            from clu import metric_writers
        except ImportError:
            self._wants_tensorboard = False  # no TensorFlow here: metrics.jsonl has it all
            return
        directory = self._workdir / "tensorboard"
        if directory.exists():
            directory.rmtree() if self._in_store else shutil.rmtree(directory)
        self._tensorboard = metric_writers.SummaryWriter(os.fspath(directory))
        for row in self.rows:
            scalars = {name: value for name, value in row.items() if name != "step"}
            self._tensorboard.write_scalars(row["step"], scalars)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            with self._copying():
                self._tensorboard.close()


OUTLIER = 5  # times the median: a step that took so long, and a second more than it, is told
STEPS_BEFORE = 20  # of which the median is taken at least


class Meter:
    """Rates since the last log step, without the time of evaluations and checkpoints."""

    def __init__(self, global_batch_size: int, start_step: int):
        self._batch_size = global_batch_size
        self.seconds_per_step = 0.0
        self._laps: collections.deque[float] = collections.deque(maxlen=100)
        self._lap: tuple[float, float] | None = None  # at its start: the time, and time waited
        self._waited = 0.0  # for data, ever
        self.start(start_step)

    def start(self, step: int) -> None:
        """Starts counting after `step`."""
        self._step, self._time, self._paused = step, time.perf_counter(), 0.0
        self._waited_before = self._waited

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start
        self._lap = None  # the step in which it lies is not timed

    def outlier(self, steps: int = 1) -> str | None:
        """What the steps that end now took, where that is far more than those before them did."""
        now, started = time.perf_counter(), self._lap
        self._lap = now, self._waited
        if started is None:
            return None
        seconds, waited = now - started[0], self._waited - started[1]
        usual = math.inf
        if len(self._laps) >= STEPS_BEFORE:
            usual = steps * statistics.median(self._laps)
        self._laps.append(seconds / steps)
        if seconds < max(OUTLIER * usual, usual + 1):
            return None
        return (
            f"{seconds:.1f} s, where {usual:.2f} s are usual; {waited:.1f} s of it it waited for "
            "data"
        )

    def read(self, step: int) -> dict[str, float]:
        """Rates from the last reading to now, `step` being done; starts counting anew."""
        seconds = max(time.perf_counter() - self._time - self._paused, 1e-9)
        self.seconds_per_step = seconds / max(step - self._step, 1)
        rate = max(step - self._step, 1) * self._batch_size / seconds
        share = min((self._waited - self._waited_before) / seconds, 1.0)
        self.start(step)
        return {
            "perf/images_per_second": rate,
            "perf/images_per_second_per_device": rate / jax.device_count(),
            "perf/data_wait_share": share,
        }
