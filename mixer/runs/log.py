"""Logs a training run to the terminal and to metrics.jsonl, and measures its rates."""

import math
import time

import jax
import psutil
from etils import epath
from ml_collections import ConfigDict

from mixer import console, formatting, sizes
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.models import placement
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.runs import curves
from mixer.runs.directory import OpenRun, warn
from mixer.runs.record import Meter, MetricWriter
from mixer.runs.resume import Start
from mixer.training import optimizer


class TrainLog:
    """Terminal output, metrics and rates of one start of a run.

    Attributes:
      writer: writer of metrics.jsonl; `writer.rows` holds all rows so far.
    """

    def __init__(self, config: ConfigDict, run: OpenRun, *, start_step: int, train: Split):
        """Opens the log of a run that continues after `start_step` on the split `train`."""
        self._config, self._run, self._start_step = config, run, start_step
        self._epoch_size = train.num_examples
        self.writer = MetricWriter(
            run.path, last_step=start_step, tensorboard=config.tensorboard, warn=warn
        )
        self._console = console.RunConsole()
        self._bar = console.ProgressBar(
            self._console,
            "training",
            total=config.total_steps,
            completed=start_step,
            transient=False,
        )
        self._meter = Meter(config.global_batch_size, start_step)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self.say = self._console.say
        self.waiting, self.paused = self._meter.waiting, self._meter.paused

    def start(self) -> None:
        """Shows the progress bar and starts the clock of the rates."""
        self._start_secs = time.perf_counter()
        self._meter.start(self._start_step)
        if self._start_step < self._config.total_steps:
            self._bar.start()

    def finish_step(self, first: int, last: int, metrics: dict[str, jax.Array]) -> None:
        """Logs that the updates `first` to `last` are dispatched; `metrics` are those of `last`.

        The metrics of a log step are written one call late, when the device has finished them.
        """
        self._bar.show(last)
        if outlier := self._meter.outlier(last - first + 1):
            steps = f"step {last}" if first == last else f"steps {first} to {last}"
            self.say(f"{steps} took {outlier}")
        is_log_step = last % self._config.log_every_steps == 0 or last == self._config.total_steps
        if first == self._start_step + 1:
            jax.block_until_ready(metrics)
            age = time.time() - psutil.Process().create_time()
            self.say(f"first step finished {age:.1f} s after the program started")
            if not is_log_step:
                self._meter.start(last)  # the first step includes loading the first batch
        self.write_pending()
        if is_log_step:
            self._pending = last, metrics
            if metrics["loss"].is_ready():  # true on a CPU; waiting would add the next call's time
                self.write_pending()

    def write_pending(self) -> None:
        """Writes the metrics of the last log step unless they have been written.

        Raises:
          UserError: the loss is not finite, or too many updates were skipped.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        metrics = {f"train/{key}": float(v) for key, v in jax.device_get(metrics).items()}
        self._check_finite(step, metrics)
        metrics["train/epoch"] = step * self._config.global_batch_size / self._epoch_size
        metrics.update(self._meter.read(step))
        self.writer.write(step, metrics)
        self._show(step, metrics)
        self._run.checkpoints.check()

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a log step after the bar, or as a line if there is no terminal."""
        status = (
            f"loss {metrics['train/loss']:.4f}  accuracy {metrics['train/accuracy']:.1%}  "
            f"{metrics['perf/images_per_second']:,.0f} images/s  "
            f"data wait {metrics['perf/data_wait_share']:.1%}  {_memory()}"
        )
        if metrics.get("train/skipped_steps"):
            status += f"  skipped {metrics['train/skipped_steps']:.0f}"
        self._bar.show(step, status)
        if not self._console.is_terminal:
            total_steps = self._config.total_steps
            seconds_left = (total_steps - step) * self._meter.seconds_per_step
            duration = formatting.duration(seconds_left)
            self.say(f"step {step}/{total_steps}  {status}  left {duration}")

    def finish(self) -> None:
        """Ends the progress bar after the last update."""
        self._bar.stop()
        if self._start_step == self._config.total_steps:
            self.say(f"already finished: {self._run.path} is at step {self._start_step}")
        else:
            seconds = formatting.duration(time.perf_counter() - self._start_secs)
            self.say(f"trained to step {self._config.total_steps} in {seconds}")

    def close(self) -> None:
        """Ends the progress bar and closes metrics.jsonl."""
        self._bar.stop()
        self.writer.close()

    def _check_finite(self, step: int, metrics: dict[str, float]) -> None:
        """Raises UserError if the loss is not finite, or too many updates were skipped."""
        config, skips = self._config, self._config.nan_policy == "skip"
        if skips and metrics["train/skipped_steps"] <= config.max_skipped_steps:
            return
        if not skips and math.isfinite(metrics["train/loss"]):
            return
        problem = f"the loss is {metrics['train/loss']} at step {step}"
        if skips:
            problem = (
                f"{metrics['train/skipped_steps']:.0f} updates up to step {step} were skipped "
                "because they were not finite, more than "
                f"max_skipped_steps={config.max_skipped_steps}"
            )
        raise UserError(
            f"{problem}; last good checkpoint: {self._run.checkpoints.describe_last()}. Try a "
            "lower optimizer.peak_lr or a longer schedule.warmup_steps, or set "
            "optimizer.grad_clip_norm"
        )


def _memory() -> str:
    """Returns the peak memory of the first device if it reports one, else this process's memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return f"device memory {stats['peak_bytes_in_use'] / 2**30:.1f} GiB"
    return f"memory {psutil.Process().memory_info().rss / 2**30:.1f} GiB"


def introduce(config: ConfigDict, run: OpenRun, start: Start, log: TrainLog) -> None:
    """Prints the run, its model, data and devices, and the step at which it resumes."""
    program, train = start.program, start.splits.train
    model, mesh, params = program.model, program.mesh, program.state.params
    log.say(f"run {run.path}: {config.total_steps} steps of {config.global_batch_size} images")
    log.say(
        f"model: {program.num_params:,} parameters, {model.num_blocks} blocks, "
        f"{sizes.text(config.image_size)} px, patch {sizes.text(model.patch_size)}, "
        f"{model.num_classes} classes"
    )
    log.say(f"data: {train.name}, {train.num_examples:,} examples")
    if start.splits.choice:
        log.say(start.splits.choice)
    for line in start.splits.remarks:
        log.say(f"warning: {line}")
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    processes = f" in {jax.process_count()} processes" * (jax.process_count() > 1)
    kind = jax.devices()[0].device_kind
    log.say(f"devices: {jax.device_count()} x {kind}{processes} (mesh: {shape})")
    if mesh.shape["data"] < mesh.size:
        for line in placement.describe_rules(mesh, params):
            log.say(line)
    if line := optimizer.describe_average(config.optimizer.ema_decay, config.total_steps):
        warn(line)
    for line in optimizer.describe_multipliers(params, config.optimizer.lr_multipliers):
        log.say(line)
    if start.step:
        log.say(f"continuing from step {start.step}")
        _, num_processes = sharding.data_processes(mesh)
        if train.order_depends_on_readers and start.num_readers != num_processes:
            log.say(
                f"the data order is that of the {start.num_readers} process(es) that started the "
                f"run; {num_processes} read the data now"
            )
    if start.is_extended:
        log.say("the finished run is extended: its schedule now has the new length")


def write_curves(workdir: epath.Path, log: TrainLog) -> None:
    """Draws the run's curves and prints the paths of its files."""
    if distributed.is_main():
        curves.draw_curves(log.writer.rows, workdir / "curves.png", workdir.name)
    last_step = log.writer.rows[-1]["step"] if log.writer.rows else 0
    log.say(f"run: {workdir} (checkpoints/{last_step}, metrics.jsonl, results.json, curves.png)")
