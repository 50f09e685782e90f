"""The training run, from a config and a directory to a trained model: read from top to bottom."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import psutil
from etils import epath
from ml_collections import ConfigDict

from mixer import (
    checkpoint,
    console,
    losses,
    memory,
    optimizer,
    pictures,
    run,
    sharding,
    train_state,
)
from mixer.errors import UserError
from mixer.evaluation import classification
from mixer.metrics import MetricWriter
from mixer.train_step import make_predict, make_train_step


class Stopped(Exception):
    """The run was asked to end by a signal and has saved its state."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum  # 143 for SIGTERM, 130 for Ctrl-C


def train(config: ConfigDict, workdir: str, *, allow_config_change: bool = False) -> None:
    """Trains, or goes on training, the model of `config` in `workdir`.

    Args:
      config: every key of `configs/common.py`.
      workdir: the run's directory; what it holds is continued.
      allow_config_change: whether to continue a run whose config binds it to other values.

    Raises:
      UserError: a mistake of the user's, in one line.
      Stopped: SIGTERM or SIGINT; the state is saved.
    """
    run.check_config(config)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(catch_signals())
        path = _make_directory(workdir)
        stack.enter_context(checkpoint.locked(path))
        manager = checkpoint.Checkpoints(
            path / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
        )
        best = checkpoint.Checkpoints(path / "best", keep_last=1)
        stack.enter_context(manager)
        stack.enter_context(best)
        _train(config, path, allow_config_change, signals, manager, best)


def _train(
    config: ConfigDict,
    workdir: epath.Path,
    allow_change: bool,
    signals: "Signals",
    manager: checkpoint.Checkpoints,
    best: checkpoint.Checkpoints,
) -> None:
    started = time.perf_counter()

    # What a run in this directory was started with binds this one. The directory of a run that
    # never saved anything binds nothing.
    old = run.read_json(workdir, "config.json") if manager.steps else None
    old_data = run.read_json(workdir, "data.json") if manager.steps else None

    # Mesh, data, model, optimizer.
    memory.keep_freed_memory()
    mesh = sharding.make_mesh(config.mesh)
    eval_batch_size = config.eval_batch_size or config.global_batch_size
    sharding.check_batch_size("global_batch_size", config.global_batch_size, mesh)
    sharding.check_batch_size("eval_batch_size", eval_batch_size, mesh)
    splits = run.open_splits(config, tuple(old_data["class_names"]) if old_data else None)
    model = run.build_model(config, splits.train.class_names)
    config = config.copy_and_resolve_references()
    config.model.update(num_classes=model.num_classes)
    schedule = optimizer.make_schedule(
        peak_lr=config.optimizer.peak_lr, total_steps=config.total_steps, **config.schedule
    )
    options = {key: value for key, value in config.optimizer.items() if key != "peak_lr"}
    tx = optimizer.make_optimizer(schedule, **options)
    image_size = (config.image_size, config.image_size)
    abstract = train_state.abstract_state(model, tx, image_size, mesh)

    # A finished run may be given more steps; anything else that binds it is refused.
    changed = run.changes(old, config.to_dict()) if old else []
    extended = (
        old is not None
        and config.total_steps > old["total_steps"]
        and old["total_steps"] in manager.steps
        and all(line.startswith("total_steps:") for line in changed)
    )
    if changed and not extended and not allow_change:
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(changed)}. Give another "
            "--workdir, or --allow_config_change to continue it with the new values"
        )
    data = run.data_record(splits)
    if old_data and not allow_change:
        _check_same_data(workdir, old_data["splits"]["train"], data["splits"]["train"])

    # The state: restored, or of step 0.
    terminal = None

    def say(line: str) -> None:
        terminal.line(line) if terminal else print(line, flush=True)

    restored = manager.restore_latest(abstract, warn=lambda line: say(f"warning: {line}"))
    if restored:
        state, info = restored
        _warn_of_versions(info["versions"], say)
    else:
        state = train_state.init_state(model, tx, image_size, mesh, config.seed)
        if config.init_from:
            params = checkpoint.restore_params(config.init_from, abstract.params)
            state = train_state.with_params(state, params)
    start_step = int(state.step)
    if start_step > config.total_steps:
        raise UserError(
            f"{workdir} has reached step {start_step}, beyond total_steps={config.total_steps}"
        )
    run.write_json(workdir / "config.json", config.to_dict())
    run.write_json(workdir / "data.json", data)
    writer = MetricWriter(workdir, last_step=start_step, tensorboard=config.tensorboard)
    _introduce(config, workdir, model, abstract, splits, mesh, start_step, extended, say)

    # Compiled before the loop, so that its time is not taken for a step's.
    train_step = jax.jit(
        make_train_step(model, tx, schedule, losses.make_loss(config.loss), seed=config.seed),
        donate_argnums=0,
    )
    eval_step = classification.make_eval_step(
        make_predict(model), losses.make_loss(config.loss), model.num_classes
    )

    def evaluate(split, should_stop=lambda: False):
        return classification.evaluate(
            eval_step,
            state.params,
            split,
            global_batch_size=eval_batch_size,
            mesh=mesh,
            prefetch_batches=config.dataset.prefetch_batches,
            should_stop=should_stop,
        )

    def save() -> None:
        best.wait()  # a checkpoint says that the best one before it is whole
        manager.save(state, {"total_steps": config.total_steps})

    def validate(step: int) -> None:
        """Evaluates on the validation split; keeps the weights if they are the best so far."""
        result = evaluate(splits.val, should_stop=lambda: signals.received is not None)
        if result is None:
            return
        so_far = [row["val/top1"] for row in writer.rows if "val/top1" in row]
        if config.checkpoint.keep_best and result.top1 > max(so_far, default=-1):
            best.delete_after(step)  # of a future that this run has not reached
            best.save(state, {"val/top1": result.top1})
        writer.write(step, _named("val", result))
        say(f"step {step}: {_sentence('validation', result)}")

    def is_due(step: int) -> bool:
        """Whether step ends with an evaluation."""
        every = config.eval_every_steps or config.total_steps
        return splits.val is not None and (step % every == 0 or step == config.total_steps)

    # An evaluation that was due at the checkpoint's step, and that the run did not live to see.
    evaluated = {row["step"] for row in writer.rows if "val/top1" in row}
    if start_step and is_due(start_step) and start_step not in evaluated:
        validate(start_step)

    if start_step < config.total_steps:
        stream = sharding.prefetch(
            splits.train.train_batches(
                start_step=start_step,
                seed=config.seed,
                global_batch_size=config.global_batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            ),
            lambda batch: sharding.put_batch(batch, mesh),
            config.dataset.prefetch_batches,
        )
        terminal = console.Terminal(start_step=start_step, total_steps=config.total_steps)
        meter = Meter(config.global_batch_size)
        pending: tuple[int, Any] | None = None

        def log() -> None:
            """Writes the metrics of the last log step, if they are not written yet."""
            nonlocal pending
            if pending is None:
                return
            step, metrics = pending
            pending = None
            metrics = {f"train/{key}": float(v) for key, v in jax.device_get(metrics).items()}
            if not math.isfinite(metrics["train/loss"]):
                raise UserError(
                    f"the loss is {metrics['train/loss']} at step {step}; the last good checkpoint "
                    f"is {manager.describe_last()}. Try a lower optimizer.peak_lr, a longer "
                    "schedule.warmup_steps or optimizer.grad_clip_norm"
                )
            metrics["train/epoch"] = step * config.global_batch_size / splits.train.num_examples
            metrics.update(meter.read(step))
            writer.write(step, metrics)
            left = (config.total_steps - step) * meter.seconds_per_step
            terminal.log(step, metrics, left)
            manager.check()

        try:
            for step in range(start_step + 1, config.total_steps + 1):
                # The batch is a function of (seed, step), and on its way since two steps ago.
                with meter.waiting():
                    batch = next(stream)

                # Dispatched, not awaited: the device computes while the host goes on.
                state, metrics = train_step(state, batch)
                if step == start_step + 1:
                    jax.block_until_ready(metrics)
                    age = time.time() - psutil.Process().create_time()
                    say(f"first step done {age:.1f} s after the program's start")
                    meter.start(step)
                terminal.step(step)

                # The metrics of a log step are fetched one step late, when they are there.
                log()
                if step % config.log_every_steps == 0 or step == config.total_steps:
                    pending = step, metrics

                # Before the evaluation: a fault there costs no training. The step's own metrics
                # are written first, so that the record is whole up to every checkpoint.
                stop = signals.received is not None
                if stop or step % config.checkpoint.every_steps == 0 or step == config.total_steps:
                    log()
                    with meter.paused():
                        save()

                if not stop and is_due(step):
                    log()
                    with meter.paused():
                        validate(step)
                    stop = signals.received is not None
                    if stop:
                        save()

                if stop:
                    say(f"{signals.name}: saving step {step}")
                    manager.wait()
                    say(f"saved {workdir}/checkpoints/{step}; the same command continues from it")
                    raise Stopped(signals.received)
        finally:
            stream.close()
            terminal.close()
        terminal = None
        seconds = time.perf_counter() - started
        say(f"trained to step {config.total_steps} in {console.duration(seconds)}")
    else:
        say(f"finished already: {workdir} is at step {start_step} of {config.total_steps}")

    # The end: everything whole on disk, the test split, the curves, and where it all is.
    manager.wait()
    best.wait()
    results = {}
    if splits.val is not None:
        row = [row for row in writer.rows if "val/top1" in row][-1]
        results["val"] = {key[4:]: row[key] for key in row if key.startswith("val/")}
    if splits.test is not None:
        result = evaluate(splits.test)
        results["test"] = dataclasses.asdict(result)
        if not any(row["step"] == config.total_steps and "test/top1" in row for row in writer.rows):
            writer.write(config.total_steps, _named("test", result))
        say(_sentence("test", result))
    writer.close()
    run.write_json(workdir / "results.json", {"step": config.total_steps, "splits": results})
    pictures.draw_curves(writer.rows, workdir / "curves.png", workdir.name)
    say(
        f"run: {workdir} (checkpoints/{config.total_steps}, metrics.jsonl, results.json, "
        "curves.png)"
    )


@dataclasses.dataclass
class Signals:
    """The first SIGTERM or SIGINT that has arrived."""

    received: int | None = None

    @property
    def name(self) -> str:
        """SIGTERM or SIGINT."""
        return signal.Signals(self.received).name


@contextlib.contextmanager
def catch_signals() -> Iterator[Signals]:
    """Turns the first SIGTERM or SIGINT into a request to save and leave; a second one ends."""
    signals = Signals()

    def receive(signum: int, frame: Any) -> None:
        del frame
        signals.received = signum
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {each: signal.signal(each, receive) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


class Meter:
    """Rates since the last log step, without the time of evaluations and checkpoints."""

    def __init__(self, global_batch_size: int):
        self._batch_size = global_batch_size
        self.seconds_per_step = 0.0
        self.start(0)

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


def _make_directory(workdir: str) -> epath.Path:
    path = epath.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror or error}") from None
    return path


def _check_same_data(workdir: epath.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if old["fingerprint"] != new["fingerprint"]:
        raise UserError(
            f"the training data has changed since {workdir} was started: {old['name']} with "
            f"{old['num_examples']:,} examples, now {new['name']} with {new['num_examples']:,}. "
            "Bring it back, give another --workdir, or --allow_config_change"
        )


def _warn_of_versions(saved: dict[str, str], say) -> None:
    now = checkpoint.versions()
    other = [f"{key} {saved[key]} -> {now.get(key)}" for key in saved if saved[key] != now.get(key)]
    if other:
        say(
            f"warning: the checkpoint was written by other versions ({', '.join(other)}): the run "
            "goes on, but perhaps not bit for bit"
        )


def _introduce(config, workdir, model, abstract, splits, mesh, start_step, extended, say) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    device = jax.devices()[0]
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    say(f"run {workdir}: {config.total_steps} steps of {config.global_batch_size} images")
    say(
        f"model: {count:,} parameters, {model.num_blocks} blocks, {config.image_size} px, patch "
        f"{model.patch_size}, {model.num_classes} classes"
    )
    say(f"data: {splits.train.name}, {splits.train.num_examples:,} examples")
    say(f"devices: {jax.device_count()} x {device.device_kind} (mesh: {shape})")
    if extended:
        say(
            f"extending the finished run from step {start_step} to {config.total_steps}: the "
            "learning rate follows the schedule of the new length"
        )
    elif start_step:
        say(f"continuing from step {start_step}")
    elif config.init_from:
        say(f"starting from the weights of {config.init_from}")


def _named(prefix: str, result: classification.Classification) -> dict[str, float]:
    values = dataclasses.asdict(result)
    return {f"{prefix}/{key}": values[key] for key in ("top1", "top5", "loss", "count", "correct")}


def _sentence(split: str, result: classification.Classification) -> str:
    return (
        f"{split} accuracy {result.top1:.2%} ({result.correct:,} of {result.count:,}), top-5 "
        f"{result.top5:.2%}, loss {result.loss:.4f}"
    )
