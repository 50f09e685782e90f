"""Metrics of a run: `metrics.jsonl` is the record, TensorBoard a copy of it."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`: {"step": k, "train/loss": ...}, in order.

    A last line that was cut off by a crash is left out.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and, through clu, to TensorBoard's files."""

    def __init__(self, workdir: epath.Path, *, last_step: int, tensorboard: bool):
        """Opens the record of a run that goes on after `last_step`.

        Lines of later steps, which that run will write again, are cut.
        """
        self._workdir = epath.Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self.rows = [row for row in read_metrics(workdir) if row["step"] <= last_step]
        new = self._path.with_name("metrics.jsonl.new")
        new.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        new.replace(self._path)
        self._file = self._path.open("a")
        self._tensorboard = None
        self._wants_tensorboard = tensorboard

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line; `metrics` are scalars such as {"train/loss": 0.3}."""
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wants_tensorboard and self._tensorboard is None:
            self._open_tensorboard()
        elif self._tensorboard is not None:
            self._tensorboard.write_scalars(step, metrics)

    def _open_tensorboard(self) -> None:
        """Starts TensorBoard's files from the record, so that they hold nothing that was cut.

        Done at the first write: clu imports TensorFlow, which the first step need not wait for.
        """
        try:
            from clu import metric_writers
        except ImportError:
            self._wants_tensorboard = False  # no TensorFlow here: metrics.jsonl has it all
            return
        directory = self._workdir / "tensorboard"
        if directory.exists():
            directory.rmtree() if "://" in str(directory) else shutil.rmtree(directory)
        self._tensorboard = metric_writers.SummaryWriter(os.fspath(directory))
        for row in self.rows:
            scalars = {name: value for name, value in row.items() if name != "step"}
            self._tensorboard.write_scalars(row["step"], scalars)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class Meter:
    """Rates since the last log step, without the time of evaluations and checkpoints."""

    def __init__(self, global_batch_size: int, start_step: int):
        self._batch_size = global_batch_size
        self.seconds_per_step = 0.0
        self.start(start_step)

    def start(self, step: int) -> None:
        """Starts counting after `step`."""
        self._step, self._time, self._waited, self._paused = step, time.perf_counter(), 0.0, 0.0

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

    def read(self, step: int) -> dict[str, float]:
        """Rates from the last reading to now, `step` being done; starts counting anew."""
        seconds = max(time.perf_counter() - self._time - self._paused, 1e-9)
        self.seconds_per_step = seconds / max(step - self._step, 1)
        rate = max(step - self._step, 1) * self._batch_size / seconds
        share = min(self._waited / seconds, 1.0)
        self.start(step)
        return {
            "perf/images_per_second": rate,
            "perf/images_per_second_per_device": rate / jax.device_count(),
            "perf/data_wait_share": share,
        }
