"""The training run, from a config and a run directory to a trained model."""

import contextlib
import gc
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from mixer.evaluation import schedule as evaluations
from mixer.parallel import backend, sharding
from mixer.runs import resume
from mixer.runs.directory import open_run, warn
from mixer.runs.log import TrainLog, introduce, write_curves
from mixer.runs.profile import open_profile
from mixer.training.updates import Updates


def train(config: ConfigDict, workdir: str, *, allow_config_change: bool = False) -> None:
    """Trains the model of `config` in `workdir`, or resumes the run in `workdir`.

    With several processes (`join.initialize`), each process calls the function with the same
    arguments. All processes write the checkpoints; process 0 writes all other files.

    Args:
      config: a config with every key of `configs/common.py`.
      workdir: directory of the run.
      allow_config_change: whether to resume a run whose saved config has other values.

    Raises:
      UserError: the config, the data or the directory is invalid.
      signals.Stopped: SIGTERM or SIGINT arrived; the state is saved.
    """
    with open_run(config, workdir) as run, contextlib.ExitStack() as stack:
        backend.keep_compiled_programs(config.compile_cache_dir, run.path)
        mesh = sharding.make_mesh(config.mesh)

        # Apply what an earlier start of this run has fixed. From here on the config is complete,
        # and saved with the run.
        start = resume.prepare(config, run, mesh, allow_config_change=allow_config_change)
        config, state, step = start.config, start.state, start.step
        evaluators, final_evaluators = evaluations.open_evaluators(config, start)
        resume.write(start, run)

        log = TrainLog(config, run, start_step=step, train=start.splits.train)
        stack.enter_context(contextlib.closing(log))
        introduce(config, run, start, log)
        best = evaluations.make_best(config, run, log, start_step=step)
        schedule = evaluations.EvaluationSchedule(evaluators, run=run, log=log, best=best)

        # The run may have been killed between the checkpoint of this step and its evaluation.
        if step:
            run.watch.beat(step, "evaluating")
            schedule.run_missed(state, step)
            run.leave_if_asked(log.say)

        # Compile before the loop, so that no step includes the compile time.
        run.watch.beat(step, "compiling")
        updates = resume.compile_updates(start, log.say)
        stack.callback(updates.close)
        profile = stack.enter_context(open_profile(config, run.path, step, warn))
        del start  # frees the host's copy of the images
        gc.enable()  # train.py turns garbage collection off until here
        log.start()
        while step < config.total_steps:
            # The next batch is a function of (seed, step), so it is already being prefetched.
            first_step = step + 1
            run.watch.beat(first_step, "waiting for data")
            with log.waiting():
                count, update = updates.next(step, next_stop(config, step) - step)

            # Do not wait for the result: the host runs at most two calls ahead of the device. The
            # log fetches the metrics of a log step one call late.
            run.watch.beat(first_step, "computing")
            call_time = time.perf_counter()
            with profile.step(first_step, updates.drain):
                state, metrics = update(state)
            step += count
            updates.sent(metrics["loss"], count, call_time)
            log.finish_step(first_step, step, metrics)
            if profile.is_due(step):
                with _drained(updates, log):
                    log.say(profile.end())

            # All processes get the same answer at the same step.
            stop = run.signals.poll()

            # Save before evaluating, so that an error in an evaluator costs no training. Metrics
            # are written before that, so that metrics.jsonl is complete up to every checkpoint.
            if stop or step % config.checkpoint.every_steps == 0 or step == config.total_steps:
                with _drained(updates, log):
                    run.watch.beat(step, "saving")
                    run.checkpoints.save(state)

            # A signal interrupts an evaluation; it stays due, and runs when the run is resumed.
            if not stop and schedule.is_due(step):
                with _drained(updates, log):
                    run.watch.beat(step, "evaluating")
                    schedule.run(state, step)
                    if stop := run.signals.poll():
                        run.checkpoints.save(state)

            if stop:
                log.say(f"{run.signals.name}: saving step {step}")
                run.leave_if_asked(log.say)
        log.finish()

        # Wait until the last checkpoint is on disk, then evaluate the test split.
        run.watch.beat(step, "saving")
        run.checkpoints.wait()
        run.watch.beat(step, "evaluating")
        schedule = evaluations.EvaluationSchedule(final_evaluators, run=run, log=log, best=None)
        schedule.run_all(state, step)
        run.leave_if_asked(log.say)
        write_curves(run.path, log)
        run.leave_if_asked(log.say)  # a caller such as transfer must not start another run


def next_stop(config: ConfigDict, step: int) -> int:
    """Returns the next step at which the host has work to do; no call may run past it."""
    periods = (config.log_every_steps, config.checkpoint.every_steps, config.eval_every_steps)
    stops = [(step // period + 1) * period for period in periods if period]
    if config.profile_steps:
        first, last = config.profile_steps
        stops += [end for end in (first - 1, last) if end > step]
    return min(*stops, config.total_steps)


@contextlib.contextmanager
def _drained(updates: Updates, log: TrainLog) -> Iterator[None]:
    """Waits for the updates in flight; excludes the time of the block from the rates.

    The wait itself counts as training time.
    """
    log.write_pending()
    updates.drain()
    with log.paused():
        yield
