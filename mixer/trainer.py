"""The training run, from a config and a directory to a trained model: read from top to bottom."""

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
    """Trains the model of `config` in `workdir`, or continues the run that `workdir` holds.

    With several processes (`join.initialize`) each calls it with the same arguments; only
    process 0 writes anything but checkpoints. The function is long because a run is one story.

    Args:
      config: every key of `configs/common.py`.
      workdir: the run's directory.
      allow_config_change: whether to continue a run whose saved config has other values.

    Raises:
      UserError: a mistake of the user's, in one line.
      signals.Stopped: SIGTERM or SIGINT arrived; the state is saved.
    """
    with open_run(config, workdir) as run, contextlib.ExitStack() as stack:
        backend.keep_compiled_programs(config.compile_cache_dir, run.path)
        mesh = sharding.make_mesh(config.mesh)

        # Everything that an earlier start of this run has determined is decided here. From here
        # on the config is complete, and saved with the run.
        start = resume.prepare(config, run, mesh, allow_config_change=allow_config_change)
        config, state, step = start.config, start.state, start.step
        regular, final = evaluations.open_evaluators(config, start)
        resume.write(start, run)

        log = TrainLog(config, run, start_step=step, train=start.splits.train)
        stack.enter_context(contextlib.closing(log))
        introduce(config, run, start, log)
        best = evaluations.make_best(config, run, log, start_step=step)
        schedule = evaluations.EvaluationSchedule(regular, run=run, log=log, best=best)

        # A kill may have come between the checkpoint of this step and its evaluation.
        if step:
            run.watch.beat(step, "evaluating")
            schedule.run_missed(state, step)
            run.leave_if_asked(log.say)

        # Compiled ahead of the loop, so that no step includes the time.
        run.watch.beat(step, "compiling")
        updates = resume.compile_updates(start, log.say)
        stack.callback(updates.close)
        profile = stack.enter_context(open_profile(config, run.path, step, warn))
        del start  # and with it the host's copy of the images
        gc.enable()  # train.py turns garbage collection off until here
        log.start()
        while step < config.total_steps:
            # Which batch comes next is a function of (seed, step), so it is on its way already.
            first = step + 1
            run.watch.beat(first, "waiting for data")
            with log.waiting():
                count, update = updates.next(step, next_stop(config, step) - step)

            # Dispatched, not awaited: the device computes while the host goes on, at most two
            # calls ahead. The log fetches the metrics of a log step one call late.
            run.watch.beat(first, "computing")
            called = time.perf_counter()
            with profile.step(first, updates.drain):
                state, metrics = update(state)
            step += count
            updates.sent(metrics["loss"], count, called)
            log.finish_step(first, step, metrics)
            if profile.is_due(step):
                with _drained(updates, log):
                    log.say(profile.end())

            # All processes get the same answer at the same step.
            stop = run.signals.poll()

            # Checkpoint before evaluation: a fault in an evaluator then costs no training. The
            # metrics are written first, so that the record is complete up to every checkpoint.
            if stop or step % config.checkpoint.every_steps == 0 or step == config.total_steps:
                with _drained(updates, log):
                    run.watch.beat(step, "saving")
                    run.checkpoints.save(state)

            # A signal ends an evaluation early; it is still due, and runs when the run continues.
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

        # The end: everything on disk, then the test split and the curves.
        run.watch.beat(step, "saving")
        run.checkpoints.wait()
        run.watch.beat(step, "evaluating")
        evaluations.EvaluationSchedule(final, run=run, log=log, best=None).run_all(state, step)
        run.leave_if_asked(log.say)
        write_curves(run.path, log)
        run.leave_if_asked(log.say)  # for a program that has more to do


def next_stop(config: ConfigDict, step: int) -> int:
    """The next step after which the host has work to do; no call of updates goes beyond it."""
    periods = (config.log_every_steps, config.checkpoint.every_steps, config.eval_every_steps)
    stops = [(step // period + 1) * period for period in periods if period]
    if config.profile_steps:
        first, last = config.profile_steps
        stops += [end for end in (first - 1, last) if end > step]
    return min(*stops, config.total_steps)


@contextlib.contextmanager
def _drained(updates: Updates, log: TrainLog) -> Iterator[None]:
    """Waits for the updates in flight, which is training time; the rates leave out the block."""
    log.write_pending()
    updates.drain()
    with log.paused():
        yield
