"""The training run, from a config and a directory to a trained model: read from top to bottom."""

import collections
import contextlib
import dataclasses
import gc
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from mixer import console, files, formatting, memory, run_files
from mixer.data import resident
from mixer.data.preprocessing.spec import pixel_range
from mixer.errors import UserError, first_line
from mixer.evaluation import classification, fewshot, suites
from mixer.parallel import backend, sharding, signals
from mixer.parallel import processes as distributed
from mixer.runs import config as run
from mixer.runs import curves
from mixer.runs import profile as profiling
from mixer.runs.record import Meter, MetricWriter
from mixer.training import losses, optimizer
from mixer.training import state as train_state
from mixer.training import updates as stepping
from mixer.training.step import make_predict
from mixer.weights import checkpoint, published
from mixer.weights import load as loading

SHOT = "10shot"  # of the few-shot probe, the one by which it is known to be in the record


def train(config: ConfigDict, workdir: str, *, allow_config_change: bool = False) -> None:
    """Trains, or goes on training, the model of `config` in `workdir`.

    With several processes (`distributed.initialize`) each calls it with the same arguments; only
    process 0 writes what is not a checkpoint.

    Args:
      config: every key of `configs/common.py`.
      workdir: the run's directory; what it holds is continued.
      allow_config_change: whether to continue a run whose config binds it to other values.

    Raises:
      UserError: a mistake of the user's, in one line.
      signals.Stopped: SIGTERM or SIGINT arrived; the state is saved.
    """
    with distributed.watch(stall_secs=config.stall_secs, tell=_warn) as watch:
        backend.check_settings()
        backend.start()
        run.check_config(config)
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
                _train(config, path, allow_config_change, watch, caught, checkpoints, best)
            finally:
                watch.beat(0, "leaving")


def _train(
    config: ConfigDict,
    workdir: epath.Path,
    allow_config_change: bool,
    watch: distributed.Watch,
    caught: signals.Signals,
    checkpoints: checkpoint.Checkpoints,
    best: checkpoint.Checkpoints,
) -> None:
    # What this directory's run was begun with binds it. A run that never saved binds nothing.
    old_config = old_data = None
    if checkpoints.steps:
        old_config, old_data = run.read_begun(workdir, allow_config_change=allow_config_change)
    run_files.read_results(workdir, "last")  # is added to at the end; damage is told now

    _keep_compiled_programs(config.compile_cache_dir, workdir)
    mesh = sharding.make_mesh(config.mesh)
    _, data_count = sharding.data_processes(mesh)
    eval_batch_size = config.eval_batch_size or config.global_batch_size
    run.check_batch_size(config, mesh)
    sharding.check_batch_size("eval_batch_size", eval_batch_size, mesh)

    # What the first weights decide, and what of the data's steps comes of that.
    config = config.copy_and_resolve_references()
    found = None if old_config else run.find_initial(config)
    config.init_from = published.shown(config.init_from)  # without secrets, as it is saved
    run.resolve_model(config, found, old_config)
    run.resolve_permutation(config)

    run.check_same_everywhere(config.to_dict() | checkpoint.versions(), "settings and versions")

    # The data is opened by a thread: importing TensorFlow takes seconds, in which the model's
    # first program is compiled, where the config says how many classes there are.
    with ThreadPoolExecutor(1, "data") as thread:
        class_names = tuple(old_data["class_names"]) if old_data else None
        opening = thread.submit(
            run.open_splits, config.copy_and_resolve_references(), class_names, old_data
        )
        if config.model.num_classes is None:
            config.model.num_classes = len(opening.result().train.class_names)
        sized = opening.result().train.num_examples if run.needs_epochs(config) else None
        run.resolve_lengths(config, sized)
        model = run.build_model(config)
        loss_fn = losses.make_loss(config.loss)
        schedule, tx = run.build_optimizer(config)
        image_size = (config.image_size, config.image_size)
        ema = bool(config.optimizer.ema_decay)
        kinds = dict(ema=ema, skips=config.nan_policy == "skip")
        abstract = train_state.abstract_state(model, tx, image_size, mesh, **kinds)

        # Parameters, optimizer state and gradients of this host's devices; activations come on top.
        num_bytes = sharding.bytes_per_device((abstract, abstract.params))
        num_bytes *= jax.local_device_count()
        what = f"training {_count(abstract):,} parameters for {config.image_size} px"
        if config.init_image_size not in (None, config.image_size):
            what += f", from weights for {config.init_image_size} px,"
        memory.check_room(num_bytes, what)
        for key, size in (
            ("global_batch_size", config.global_batch_size),
            ("eval_batch_size", eval_batch_size),
        ):
            memory.check_batch(
                key,
                size,
                side=config.image_size,
                num_classes=model.num_classes,
                prefetch_batches=config.dataset.prefetch_batches,
            )

        # A finished run may be given more steps; any other change of what binds it is refused.
        extended = (
            old_config is not None
            and config.total_steps > old_config["total_steps"] in checkpoints.steps
        )
        if old_config and not allow_config_change:
            if extended:
                old_config["total_steps"] = config.total_steps
                for key in ("warmup_steps", "cooldown_steps"):
                    old_config["schedule"][key] = config.schedule[key]
            run.check_same_config(workdir, old_config, config)

        # The state: restored, or of step 0. A small set is read meanwhile, which stays on the
        # device.
        restored = checkpoints.restore_latest(abstract, warn=_warn)
        start_step = int(restored[0].step) if restored else 0

        def read() -> resident.Examples | str:
            split = opening.result().train
            if old_data and not allow_config_change:
                run.check_same_data(workdir, old_data, split)
            # Steps on the host and on a device are the same, but not every device rounds alike.
            streamed = old_data is not None and not old_data.get("on_device", True)
            if streamed and config.dataset.on_device == "auto":
                return "the run was begun so"
            return resident.read(
                split,
                mode=config.dataset.on_device,
                num_drawn=config.total_steps * config.global_batch_size,
                augment_on=config.dataset.augment_on,
                should_stop=lambda: caught.received is not None,
            )

        if start_step < config.total_steps:
            reading = thread.submit(read)
        if restored:
            state, info = restored
            _warn_of_versions(info["versions"])
        else:
            state = train_state.init_state(model, tx, image_size, mesh, config.seed, **kinds)
            if found:
                params, how = loading.initial_params(
                    found,
                    state.params,
                    image_size=image_size,
                    class_names=opening.result().train.class_names,
                    head=config.init_head,
                    resize=config.init_resize,
                )
                average = jax.tree.map(jnp.copy, params) if ema else None
                state = state.replace(params=params, ema_params=average)
                _say(f"first weights: {config.init_from}: {found.about}; {how}")
                if model.gelu != found.card.gelu:
                    _warn(f"those weights are for GELU {found.card.gelu}; model.gelu={model.gelu}")
                seen = pixel_range(config.dataset.train_preprocess)
                if seen != found.card.value_range:
                    _warn(
                        f"those weights are for pixels in {list(found.card.value_range)}, and "
                        f"dataset.train_preprocess gives them in {list(seen)}"
                    )
        splits = opening.result()
    _leave_if_asked(caught, checkpoints, _say)
    if config.dataset.on_device != "off":
        kept = {key: resident.remember(getattr(splits, key)) for key in ("val", "test")}
        splits = dataclasses.replace(splits, **kept)
    run.check_classes(config, splits.train.class_names)
    further = suites.open_further(config, splits)
    if config.dataset.on_device != "off":
        kept = {name: resident.remember(split) for name, split in further.splits.items()}
        further = dataclasses.replace(further, splits=kept)
    # The order of a set that is read file by file depends on how many processes began the run.
    num_readers = old_data.setdefault("num_readers", 1) if old_data else data_count
    if config.global_batch_size % num_readers:
        num_readers = data_count
        _warn("the batch size has changed: the data order is new, this epoch may repeat examples")
    data = run.data_record(splits, num_readers)
    if start_step < config.total_steps:
        data["on_device"] = not isinstance(reading.result(), str)
    elif old_data and "on_device" in old_data:  # it may be given more steps
        data["on_device"] = old_data["on_device"]
    if old_data and not allow_config_change:
        run.check_same_data(workdir, old_data, splits.train)
    for which, split in (("val", splits.val), ("test", splits.test)):
        old = old_data and split and old_data["splits"].get(which)
        if old and (change := run.data_change(old, split)):
            _warn(f"dataset.{which}_split has other data than this run's results so far: {change}")
    if start_step > config.total_steps:
        raise UserError(
            f"{workdir} has reached step {start_step}, beyond total_steps={config.total_steps}"
        )
    fingerprints = {
        which: {"fingerprint": split["fingerprint"], "sizes": split.get("files", {}).get("sizes")}
        for which, split in data["splits"].items()
    }
    run.check_same_everywhere(fingerprints, "data")
    distributed.barrier("reading of the run")
    run.write_json(workdir / "config.json", config.to_dict())
    run.write_json(workdir / "data.json", data)
    writer = MetricWriter(workdir, last_step=start_step, tensorboard=config.tensorboard, warn=_warn)
    terminal = console.Terminal(start_step=start_step, total_steps=config.total_steps)
    _introduce(config, workdir, model, abstract, splits, mesh, terminal.line)
    if start_step:
        terminal.line(f"continuing from step {start_step}")
        if splits.train.order_depends_on_readers and num_readers != data_count:
            terminal.line(
                f"the data order is that of {num_readers} process(es), with which the run was "
                f"begun, read by {data_count}"
            )
    if extended:
        terminal.line("the finished run is extended: its schedule is now that of the new length")

    # Evaluation, by schedule and at the end the same code as evaluate.py's.
    predict = make_predict(model, mesh)
    eval_step = classification.make_eval_step(predict, loss_fn, model.num_classes)

    def evaluate(state: train_state.TrainState, which: str, split) -> dict[str, Any] | None:
        """Results of the parameters, and of their average as `which` + "_ema" where there is one.

        None where a signal has ended it early.
        """
        results = {}
        for name, params in ((which, state.params), (f"{which}_ema", state.ema_params)):
            if params is not None:
                results[name] = classification.evaluate(
                    eval_step,
                    params,
                    split,
                    global_batch_size=eval_batch_size,
                    mesh=mesh,
                    prefetch_batches=config.dataset.prefetch_batches,
                    should_stop=caught.poll,
                )
                if results[name] is None:
                    return None
        return results

    # The best so far belongs to the best checkpoint: the record may be cut, or be gone.
    judged = "val_ema/top1" if ema else "val/top1"
    highest = best_so_far(best, judged, writer.rows) if start_step else -1.0

    def validate(state: train_state.TrainState, step: int) -> None:
        """Evaluates on the validation split and what `eval_suite` names; keeps the best weights.

        Each result is recorded before the next is begun, which may fail. What a signal has left out
        is due still, and will be run when the run continues.
        """
        for which, split in {"val": splits.val, **further.splits}.items():
            results = evaluate(state, which, split)
            if results is None:
                return
            if which == "val" and config.checkpoint.keep_best:
                keep_if_best(state, step, results[judged.partition("/")[0]].top1)
            record(step, results)
            for line in _sentences(which, results):
                terminal.line(f"step {step}: {line}")
        for name, result in (probe(state) or {}).items():
            if not any(row["step"] == step and f"{name}/{SHOT}" in row for row in writer.rows):
                writer.write(step, _probed(name, result))
            which = name.replace("fewshot", run.data_name(config))
            run.record_result(
                workdir, "last", {"step": step}, which, result.summary(), section="fewshot"
            )
            shares = ", ".join(
                f"{key}: {value:.2%}" for key, value in _probed(name, result).items()
            )
            terminal.line(f"step {step}: {shares}")

    def keep_if_best(state: train_state.TrainState, step: int, accuracy: float) -> None:
        nonlocal highest
        if accuracy > highest:
            # Others of this step and beyond are of a run that was here before.
            best.delete_after(step - 1)
            best.save(state, value={judged: accuracy})
            best.wait()  # the line that tells of the evaluation says that it is whole
            highest = accuracy

    def probe(state: train_state.TrainState) -> dict[str, fewshot.FewShot] | None:
        """The few-shot probe, where `eval_suite` has it; None where a signal has ended it."""
        if further.fewshot is None:
            return {}
        results = {}
        for name, params in (("fewshot", state.params), ("fewshot_ema", state.ema_params)):
            if params is not None:
                results[name] = fewshot.evaluate(
                    model,
                    params,
                    *further.fewshot,
                    global_batch_size=eval_batch_size,
                    mesh=mesh,
                    prefetch_batches=config.dataset.prefetch_batches,
                    should_stop=caught.poll,
                )
                if results[name] is None:
                    return None
        return results

    def record(step: int, results: dict[str, Any]) -> None:
        """Enters results in the record, unless they are in it, and in results.json."""
        if not any(row["step"] == step and f"{min(results)}/top1" in row for row in writer.rows):
            rows = (_named(name, result) for name, result in results.items())
            writer.write(step, {key: value for row in rows for key, value in row.items()})
        for name, result in results.items():
            run.record_result(workdir, "last", {"step": step}, name, result.summary())

    def evaluation_is_due(step: int) -> bool:
        every = config.eval_every_steps or config.total_steps
        return splits.val is not None and (step % every == 0 or step == config.total_steps)

    # An evaluation that was due at the checkpoint's step, and that the run did not live to see.
    keys = [f"{which}/top1" for which in ("val", *further.splits)]
    keys += ["fewshot/" + SHOT] * (further.fewshot is not None)
    there = {key for row in writer.rows if row["step"] == start_step for key in row}
    if start_step and evaluation_is_due(start_step) and not there.issuperset(keys):
        watch.beat(start_step, "evaluating")
        validate(state, start_step)
        _leave_if_asked(caught, checkpoints, terminal.line)

    if start_step == config.total_steps:
        gc.enable()  # as below
        terminal.line(f"finished already: {workdir} is at step {start_step}")
    else:
        # Compiled ahead, so that its time is taken for no step's; a stream's first batches are on
        # their way meanwhile.
        watch.beat(start_step, "compiling")
        started = time.perf_counter()
        source, where = stepping.open_source(
            config,
            reading.result(),
            splits.train,
            start_step=start_step,
            num_readers=num_readers,
            update=(model, schedule, tx, abstract),
        )
        _check_step(config, source.compiled)
        del reading  # and with it the host's copy of the images
        terminal.line(where)
        seconds = time.perf_counter() - started
        terminal.line(f"{_memory_line(abstract, source.compiled)}; compiled in {seconds:.1f} s")
        gc.enable()  # the start is over, for which train.py has turned it off
        state = _loop(
            config,
            state,
            source,
            workdir=workdir,
            epoch_size=splits.train.num_examples,
            watch=watch,
            writer=writer,
            terminal=terminal,
            checkpoints=checkpoints,
            caught=caught,
            validate=validate,
            evaluation_is_due=evaluation_is_due,
        )

    # The end: everything whole on disk, the test split, the curves, and where it all is.
    watch.beat(config.total_steps, "saving")
    checkpoints.wait()
    watch.beat(config.total_steps, "evaluating")
    for which, split in (("val", splits.val), ("test", splits.test)):
        if split is None or (which == "val" and start_step < config.total_steps):
            continue  # none, or evaluated by the loop at its last step
        results = evaluate(state, which, split)
        _leave_if_asked(caught, checkpoints, terminal.line)
        record(config.total_steps, results)
        for line in _sentences(which, results):
            terminal.line(line)
    writer.close()
    if distributed.is_main():
        curves.draw_curves(writer.rows, workdir / "curves.png", workdir.name)
    terminal.line(
        f"run: {workdir} (checkpoints/{config.total_steps}, metrics.jsonl, results.json, "
        "curves.png)"
    )
    _leave_if_asked(caught, checkpoints, terminal.line)  # for a program that has more to do


def _loop(
    config: ConfigDict,
    state: train_state.TrainState,
    source: stepping.Streamed | stepping.Resident,
    *,
    workdir: epath.Path,
    epoch_size: int,
    watch: distributed.Watch,
    writer: MetricWriter,
    terminal: console.Terminal,
    checkpoints: checkpoint.Checkpoints,
    caught: signals.Signals,
    validate: Callable,
    evaluation_is_due: Callable,
) -> train_state.TrainState:
    """Updates `state` until the run is complete; raises Stopped when a signal ends it."""
    start_step, started = int(state.step), time.perf_counter()
    meter = Meter(config.global_batch_size, start_step)
    if config.profile_steps and not start_step < config.profile_steps[1] <= config.total_steps:
        _warn(
            f"profile_steps={tuple(config.profile_steps)}: this start runs steps {start_step + 1} "
            f"to {config.total_steps}"
        )
    profile = profiling.Profile(config.profile_steps, workdir)
    in_flight: collections.deque[tuple[jax.Array, int, float]] = collections.deque()
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def log() -> None:
        """Writes the metrics of the last log step, if they are not written yet."""
        nonlocal pending
        if pending is None:
            return
        (step, metrics), pending = pending, None
        metrics = {f"train/{key}": float(v) for key, v in jax.device_get(metrics).items()}
        _check_finite(config, step, metrics, checkpoints)
        metrics["train/epoch"] = step * config.global_batch_size / epoch_size
        metrics.update(meter.read(step))
        writer.write(step, metrics)
        terminal.log(step, metrics, (config.total_steps - step) * meter.seconds_per_step)
        checkpoints.check()

    terminal.start()
    step = start_step
    with contextlib.closing(source), contextlib.closing(terminal), contextlib.closing(profile):
        while step < config.total_steps:
            first = step + 1
            watch.beat(first, "waiting for data")
            with meter.waiting():
                count, update = source.take(step, next_stop(config, step) - step)
            step += count

            # Dispatched, not awaited: the device computes while the host goes on, two calls ahead
            # at most. A host further ahead would hold more batches and wait for data that the
            # device has no need of yet.
            watch.beat(first, "computing")
            called = time.perf_counter()
            with profile.step(first, (loss for loss, *_ in in_flight)):
                state, metrics = update(state)
            in_flight.append((metrics["loss"], count, called))
            if len(in_flight) > 2:
                loss, done, since = in_flight.popleft()
                jax.block_until_ready(loss)
                source.took(done, time.perf_counter() - since)
            terminal.step(step)
            if outlier := meter.outlier(count):
                terminal.line(f"{_steps(first, step)} took {outlier}")
            if profile.is_due(step):
                with meter.paused():
                    terminal.line(profile.end(loss for loss, *_ in in_flight))
            if first == start_step + 1:
                jax.block_until_ready(metrics)
                age = time.time() - psutil.Process().create_time()
                terminal.line(f"first step done {age:.1f} s after the program's start")
                if step % config.log_every_steps and step < config.total_steps:
                    meter.start(step)  # the first batch's way is no part of the rate

            # A log step's metrics are fetched one step late, when the device is done with them.
            log()
            if step % config.log_every_steps == 0 or step == config.total_steps:
                pending = step, metrics
                if metrics["loss"].is_ready():  # a CPU's, or the next call would count with it
                    log()

            # Checkpoint before evaluation: a fault there costs no training. The step's own
            # metrics come first, so that the record is whole up to every checkpoint.
            stop = caught.poll()
            if stop or step % config.checkpoint.every_steps == 0 or step == config.total_steps:
                log()
                jax.block_until_ready(metrics)  # what is under way counts as training
                watch.beat(step, "saving")
                with meter.paused():
                    checkpoints.save(state)
                in_flight.clear()  # they are done

            if not stop and evaluation_is_due(step):
                log()
                jax.block_until_ready(metrics)
                watch.beat(step, "evaluating")
                with meter.paused():
                    validate(state, step)
                    if caught.poll():
                        stop = True
                        checkpoints.save(state)
                in_flight.clear()

            if stop:
                terminal.line(f"{caught.name}: saving step {step}")
                _leave_if_asked(caught, checkpoints, terminal.line)
    seconds = formatting.duration(time.perf_counter() - started)
    terminal.line(f"trained to step {config.total_steps} in {seconds}")
    return state


def next_stop(config: ConfigDict, step: int) -> int:
    """The next step after which the host has something to do, where no call goes beyond."""
    every = (config.log_every_steps, config.checkpoint.every_steps, config.eval_every_steps)
    stops = [(step // steps + 1) * steps for steps in every if steps]
    if config.profile_steps:
        first, last = config.profile_steps
        stops += [end for end in (first - 1, last) if end > step]
    return min(*stops, config.total_steps)


def _steps(first: int, last: int) -> str:
    return f"step {last}" if first == last else f"steps {first} to {last}"


def _leave_if_asked(
    caught: signals.Signals, checkpoints: checkpoint.Checkpoints, say: Callable[[str], None]
) -> None:
    """Raises Stopped where a signal has arrived, once the last checkpoint is whole on disk."""
    if caught.poll():
        checkpoints.wait()
        if checkpoints.steps:
            say(f"saved {checkpoints.describe_last()}; the same command continues from it")
        else:
            say(f"{caught.name}: nothing is to be saved before the first step")
        raise signals.Stopped(caught.received)


def _check_finite(
    config: ConfigDict, step: int, metrics: dict[str, float], checkpoints: checkpoint.Checkpoints
) -> None:
    """Raises UserError where a loss that is not finite, or the number of such, ends the run."""
    skips = config.nan_policy == "skip"
    if skips and metrics["train/skipped_steps"] <= config.max_skipped_steps:
        return
    if not skips and math.isfinite(metrics["train/loss"]):
        return
    what = f"the loss is {metrics['train/loss']} at step {step}"
    if skips:
        what = (
            f"{metrics['train/skipped_steps']:.0f} updates up to step {step} were not finite and "
            f"left out, more than max_skipped_steps={config.max_skipped_steps}"
        )
    raise UserError(
        f"{what}; the last good checkpoint is {checkpoints.describe_last()}. Try a lower "
        "optimizer.peak_lr, a longer schedule.warmup_steps or optimizer.grad_clip_norm"
    )


@contextlib.contextmanager
def _directory(workdir: str) -> Iterator[epath.Path]:
    """Makes the run's directory, which all processes have to see, and holds it."""
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
            run.check_place(path)
            files.remove_unfinished(path)
        distributed.check_shared(path)
        yield path


def _keep_compiled_programs(directory: str, workdir: epath.Path) -> None:
    """Turns JAX's compilation cache on, unless its own variable has done so."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    if directory == "auto":
        here = jax.default_backend() == "cpu"
        directory = _directory_of_cpu() if here else os.fspath(workdir / "compiled")
        if here and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.reset_cache()  # an earlier run of this program may have had another
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory) or None)


def _directory_of_cpu() -> str:
    """Where programs for this kind of CPU are kept, for all runs; empty where that cannot be.

    What XLA compiles for a CPU holds for CPUs of its features alone.
    """
    try:
        with open("/proc/cpuinfo") as file:
            kind = next(line for line in file if line.startswith(("flags", "Features")))
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = os.path.join(root, "mlp_mixer", f"compiled-{zlib.crc32(kind.encode()):08x}")
        os.makedirs(path, exist_ok=True)
        os.utime(path)  # fails where nobody may write
    except (OSError, StopIteration):  # not Linux, or a home that nobody may write to
        return ""
    return path


def _memory_line(abstract: train_state.TrainState, train_step: Any) -> str:
    """What the state and the compiled step take of each device's memory."""
    params = sharding.bytes_per_device((abstract.params, abstract.ema_params))
    moments = sharding.bytes_per_device(abstract.opt_state)
    line = (
        f"memory a device: parameters {formatting.short(params, 'B')}, optimizer "
        f"{formatting.short(moments, 'B')}"
    )
    analysis = train_step.memory_analysis()
    if analysis is None:  # not every backend has it
        return line
    return f"{line}, gradients and activations {formatting.short(analysis.temp_size_in_bytes, 'B')}"


def _check_step(config: ConfigDict, compiled: Any) -> None:
    """Raises NoRoomError where the compiled step computes with more memory than is free."""
    analysis = compiled.memory_analysis()
    if analysis is not None:
        what = f"global_batch_size={config.global_batch_size}: what a step computes with"
        memory.check_room(analysis.temp_size_in_bytes, what)


def _say(line: str) -> None:
    print(line, flush=True)


def _warn(line: str) -> None:
    _say(f"warning: {line}")


def _warn_of_versions(saved: dict[str, str]) -> None:
    now = checkpoint.versions()
    other = [f"{key} {saved[key]} -> {now.get(key)}" for key in saved if saved[key] != now.get(key)]
    if other:
        _warn(
            f"the checkpoint was written by other versions ({', '.join(other)}): the run goes on, "
            "but perhaps not bit for bit"
        )


def _count(state: train_state.TrainState) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def _introduce(config, workdir, model, abstract, splits, mesh, say) -> None:
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    say(f"run {workdir}: {config.total_steps} steps of {config.global_batch_size} images")
    say(
        f"model: {_count(abstract):,} parameters, {model.num_blocks} blocks, {config.image_size} "
        f"px, patch {model.patch_size}, {model.num_classes} classes"
    )
    say(f"data: {splits.train.name}, {splits.train.num_examples:,} examples")
    for line in splits.remarks:
        say(f"warning: {line}")
    processes = f" in {jax.process_count()} processes" * (jax.process_count() > 1)
    kind = jax.devices()[0].device_kind
    say(f"devices: {jax.device_count()} x {kind}{processes} (mesh: {shape})")
    if mesh.shape["data"] < mesh.size:
        for line in sharding.describe_rules(mesh, abstract.params):
            say(line)
    if line := optimizer.describe_average(config.optimizer.ema_decay, config.total_steps):
        _warn(line)
    for line in optimizer.describe_multipliers(abstract.params, config.optimizer.lr_multipliers):
        say(line)


def _named(prefix: str, result: classification.Classification) -> dict[str, float]:
    """The numbers of a result, as the record has them."""
    summary = result.summary().items()
    return {f"{prefix}/{key}": value for key, value in summary if isinstance(value, int | float)}


def _probed(prefix: str, result: fewshot.FewShot) -> dict[str, float]:
    """Mean accuracies of the few-shot probe, such as {"fewshot/5shot": 0.61}."""
    return {f"{prefix}/{each.shots}shot": each.mean for each in result.results}


def _sentences(which: str, results: dict[str, classification.Classification]) -> Iterator[str]:
    """A line for the parameters, and one for their average, on the set called `which`."""
    for name, result in results.items():
        split = {"val": "validation"}.get(which, which) + " (average)" * (name != which)
        yield (
            f"{split} accuracy {result.top1:.2%} ({result.correct:,} of {result.labelled:,}), "
            f"top-5 {result.top5:.2%}, loss {result.loss:.4f}"
        )


def best_so_far(
    best: checkpoint.Checkpoints, judged: str, rows: Sequence[dict[str, float]]
) -> float:
    """The value by which the best checkpoint was kept; -1 where there is none.

    One of older code does not say it: it is in the record then, or else the best there is.
    """
    if not best.steps:
        return -1.0
    try:
        value = best.read_info(best.steps[-1]).get("value", {})
    except checkpoint.DamagedError as error:
        _warn(f"{error}; the next evaluation takes its place")
        return -1.0
    if judged not in value:
        there = [row for row in rows if judged in row]
        of_step = [row for row in there if row["step"] == best.steps[-1]]
        value = {judged: max((row[judged] for row in of_step or there), default=-1.0)}
    return value[judged]
