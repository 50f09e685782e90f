"""The evaluation schedule of a training run: runs due and missed evaluators, records results."""

import functools
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from mixer.data import resident
from mixer.data.splits import Split
from mixer.evaluation import classification, fewshot, linear_probe, suites
from mixer.evaluation.evaluator import Batching, Evaluator, Result, Setup
from mixer.runs import data as run_data
from mixer.runs import directory
from mixer.runs.best import Best, read_highest
from mixer.runs.directory import OpenRun
from mixer.runs.log import TrainLog
from mixer.runs.resume import Start
from mixer.training.state import TrainState
from mixer.training.step import make_predict

# The probes of `eval_suite`: functions (name of the data, train, val, setup) -> evaluator.
PROBES: dict[str, Callable[[str, Split, Split, Setup], Evaluator]] = {
    "fewshot": fewshot.FewShotEvaluator,
    "linear_probe": linear_probe.LinearProbeEvaluator,
}


class EvaluationSchedule:
    """Runs evaluators when they are due, and records their results.

    Each result is written to results.json first and to metrics.jsonl last, before the next
    evaluator starts: if the key of an evaluator is in metrics.jsonl, the evaluator has run.
    """

    def __init__(
        self, evaluators: Sequence[Evaluator], *, run: OpenRun, log: TrainLog, best: Best | None
    ):
        """Takes the evaluators of a run; `best` saves weights with the highest accuracy."""
        self._evaluators, self._open_run, self._log, self._best = evaluators, run, log, best

    def is_due(self, step: int) -> bool:
        """Whether an evaluator is due after update `step`."""
        return any(evaluator.is_due(step) for evaluator in self._evaluators)

    def run(self, state: TrainState, step: int) -> None:
        """Runs the evaluators that are due after update `step`.

        An evaluator that a signal interrupts is still due, and runs when training is resumed.
        """
        due_evaluators = [evaluator for evaluator in self._evaluators if evaluator.is_due(step)]
        self._run(due_evaluators, state, step, f"step {step}: ")

    def run_missed(self, state: TrainState, step: int) -> None:
        """Runs the evaluators that were due at `step` but had not run when training stopped."""
        keys = self._keys_at(step)
        missed_evaluators = [
            evaluator
            for evaluator in self._evaluators
            if evaluator.is_due(step) and evaluator.key not in keys
        ]
        self._run(missed_evaluators, state, step, f"step {step}: ")

    def run_all(self, state: TrainState, step: int) -> None:
        """Runs all evaluators on the final state."""
        self._run(self._evaluators, state, step, "")

    def _run(
        self, evaluators: Sequence[Evaluator], state: TrainState, step: int, prefix: str
    ) -> None:
        for evaluator in evaluators:
            results = evaluator.run(state.params, state.ema_params, self._open_run.signals.poll)
            if results is None:
                return
            self._record(evaluator, results, state, step)
            for result in results:
                self._log.say(f"{prefix}{result.line}")

    def _record(
        self, evaluator: Evaluator, results: Sequence[Result], state: TrainState, step: int
    ) -> None:
        metrics = {key: value for result in results for key, value in result.metrics.items()}
        if self._best and self._best.key in metrics:
            self._best.keep_if_higher(state, step, metrics[self._best.key])
        for result in results:
            directory.record_result(
                self._open_run.path,
                "last",
                {"step": step},
                result.name,
                result.summary,
                section=result.section,
            )
        if evaluator.key not in self._keys_at(step):
            self._log.writer.write(step, metrics)

    def _keys_at(self, step: int) -> set[str]:
        """Returns the keys that metrics.jsonl has for `step`."""
        return {key for row in self._log.writer.rows if row["step"] == step for key in row}


def open_evaluators(config: ConfigDict, start: Start) -> tuple[list[Evaluator], list[Evaluator]]:
    """Opens the evaluators of a run.

    Returns:
      The evaluators that run at each validation, and those that run at the end. For a run that has
      already finished, the latter include the validation split.

    Raises:
      UserError: a name in `eval_suite` is unknown, or its data does not match the run.
    """
    program, splits = start.program, start.splits
    setup = Setup(
        model=program.model,
        batching=Batching(
            mesh=program.mesh,
            global_batch_size=config.eval_batch_size or config.global_batch_size,
            prefetch_batches=config.dataset.prefetch_batches,
        ),
        every_steps=config.eval_every_steps,
        total_steps=config.total_steps,
    )
    predict = make_predict(program.model, program.mesh)
    eval_step = classification.make_eval_step(
        predict, program.step.loss_fn, program.model.num_classes
    )
    classify = functools.partial(classification.SplitEvaluator, setup=setup, eval_step=eval_step)
    tasks, probes = suites.open_suite(config, splits, tuple(PROBES))
    if config.dataset.on_device != "off":
        tasks = {name: resident.remember(split) for name, split in tasks.items()}
    evaluators: list[Evaluator] = []
    final_evaluators: list[Evaluator] = []
    if splits.val is not None:
        evaluators.append(classify("val", splits.val))
        evaluators += [classify(name, split) for name, split in tasks.items()]
        if probes:
            # Open the training split again, without augmentation.
            train = run_data.open_split(
                config, "train", splits.train.class_names, subfolders=splits.subfolders
            )
            dataset = run_data.data_name(config)
            evaluators += [PROBES[name](dataset, train, splits.val, setup) for name in probes]
        if start.step == config.total_steps:
            final_evaluators.append(evaluators[0])
    if splits.test is not None:
        final_evaluators.append(classify("test", splits.test))
    return evaluators, final_evaluators


def make_best(config: ConfigDict, run: OpenRun, log: TrainLog, *, start_step: int) -> Best | None:
    """Makes the object that saves the best weights; None if the config does not ask for them."""
    if not config.checkpoint.keep_best:
        return None
    key = "val_ema/top1" if config.optimizer.ema_decay else "val/top1"
    highest = read_highest(run.best, key, log.writer.rows) if start_step else -1.0
    return Best(run.best, key, highest)
