"""Writes a run's metrics to `metrics.jsonl` and copies them to TensorBoard's files."""

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
from mixer.errors import reason_of
from mixer.parallel import processes as distributed
from mixer.run_files import read_metrics


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and, through clu, to TensorBoard's files.

    Only process 0 writes. All processes hold the same `rows`, on which the run's decisions depend.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        last_step: int,
        tensorboard: bool,
        warn: Callable[[str], None] = print,
    ):
        """Opens the `metrics.jsonl` of a run that continues after `last_step`.

        Lines of later steps are removed, because the run writes them again. Every process must call
        this. `warn` is called with a line on anything that is left out.
        """
        self._workdir = epath.Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._file = self._tensorboard = None
        self._writes, self._warn = distributed.is_main(), warn
        self._wants_tensorboard = tensorboard and self._writes
        rows = read_metrics(workdir, warn) if self._writes else []
        self.rows = distributed.broadcast([row for row in rows if row["step"] <= last_step])
        # An object store cannot append to an object, so each write replaces `metrics.jsonl`.
        self._in_store = "://" in os.fspath(self._path)
        if not self._writes:
            return
        if self._in_store:
            self._replace(self._path)
        else:
            new_path = self._path.with_name("metrics.jsonl.new")
            self._replace(new_path)
            new_path.replace(self._path)
            self._file = self._path.open("a")
            self._identity = files.identity(self._path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line; `metrics` are scalars such as {"train/loss": 0.3}."""
        numbers = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN. The finite metrics of a skipped update are still useful.
        row = {"step": step, **{k: v for k, v in numbers.items() if math.isfinite(v)}}
        self.rows.append(row)
        self.check()
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        elif self._writes:
            self._replace(self._path)
        if self._wants_tensorboard and self._tensorboard is None:
            with self._tensorboard_errors():
                self._open_tensorboard()
        elif self._tensorboard is not None:
            with self._tensorboard_errors():
                self._tensorboard.write_scalars(step, {k: v for k, v in row.items() if k != "step"})

    def check(self) -> None:
        """Raises UserError if `metrics.jsonl` on disk is no longer the file that is open."""
        if self._file is not None:
            files.check_identity(self._path, self._identity)

    @contextlib.contextmanager
    def _tensorboard_errors(self) -> Iterator[None]:
        """Stops writing TensorBoard's files, with a warning, if they cannot be written.

        The run continues, because `metrics.jsonl` holds the same metrics.
        """
        try:
            yield
        except Exception as error:  # TensorFlow raises exceptions of its own classes
            if not isinstance(error, OSError) and not type(error).__module__.startswith("tensor"):
                raise
            self._warn(
                f"{self._workdir / 'tensorboard'} cannot be written: {reason_of(error)}; the run "
                "continues without it, and metrics.jsonl has all metrics"
            )
            self._tensorboard, self._wants_tensorboard = None, False

    def _replace(self, path: epath.Path) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def _open_tensorboard(self) -> None:
        """Rewrites TensorBoard's files from `rows`, so that they lack the removed steps.

        Runs at the first write, because clu imports TensorFlow, which would delay the first step.
        """
        # TensorBoard's package needs Keras, which program.py disabled for a faster start.
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
        try:
            from clu import metric_writers
        except ImportError:
            self._wants_tensorboard = False  # without TensorFlow, metrics.jsonl is enough
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
            with self._tensorboard_errors():
                self._tensorboard.close()


OUTLIER = 5  # a step is reported if it takes 5 times the median, and 1 s more than the median
MIN_LAPS = 20  # number of timed laps from which the median is used


class Meter:
    """Measures rates since the last log step, excluding evaluations and checkpoints."""

    def __init__(self, global_batch_size: int, start_step: int):
        self._batch_size = global_batch_size
        self.seconds_per_step = 0.0
        self._laps: collections.deque[float] = collections.deque(maxlen=100)
        self._lap: tuple[float, float] | None = None  # time and total data wait at its start
        self._waited = 0.0  # total seconds spent waiting for data
        self.start(start_step)

    def start(self, step: int) -> None:
        """Starts counting after `step`."""
        self._step, self._time, self._paused = step, time.perf_counter(), 0.0
        self._waited_before = self._waited

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time in the block from the rates."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start
        self._lap = None  # do not time the step that contains the pause

    def outlier(self, steps: int = 1) -> str | None:
        """Describes the time of the last `steps` steps if it is far above the median; else None."""
        end, lap = time.perf_counter(), self._lap
        self._lap = end, self._waited
        if lap is None:
            return None
        seconds, waited = end - lap[0], self._waited - lap[1]
        expected = math.inf
        if len(self._laps) >= MIN_LAPS:
            expected = steps * statistics.median(self._laps)
        self._laps.append(seconds / steps)
        if seconds < max(OUTLIER * expected, expected + 1):
            return None
        return (
            f"{seconds:.1f} s instead of the usual {expected:.2f} s; {waited:.1f} s of it was "
            "spent waiting for data"
        )

    def read(self, step: int) -> dict[str, float]:
        """Returns the rates since the last reading, up to the finished `step`; resets the meter."""
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
