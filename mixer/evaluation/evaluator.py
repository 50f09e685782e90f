"""The interface of the evaluators of a training run, and their results."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one evaluator for one set of parameters.

    Attributes:
      dataset: the evaluated data, such as "val", "imagenet_real" or "fewshot".
      weights: "params", or "ema" for their moving average.
      section: section of results.json: "splits", "fewshot" or "linear_probe".
      name: the key in that section, such as "val_ema".
      metrics: numbers for metrics.jsonl by their full key, such as {"val_ema/top1": 0.61}.
      summary: the entry in results.json, with values that JSON can represent.
      line: one line for the terminal.
    """

    dataset: str
    weights: str
    section: str
    name: str
    metrics: Mapping[str, float]
    summary: Mapping[str, Any]
    line: str


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings that all evaluators of a run share.

    Attributes:
      model: the model whose parameters are evaluated.
      mesh: mesh of the devices.
      loss_fn: the run's loss, (logits, labels) -> one value per example.
      global_batch_size: images per evaluation batch, over all devices.
      prefetch_batches: number of batches to prefetch to the devices.
      every_steps: number of updates between evaluations; None: only after the last update.
      total_steps: number of updates of the run; all evaluators are due after the last one.
    """

    model: nn.Module
    mesh: Mesh
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array]
    global_batch_size: int
    prefetch_batches: int
    every_steps: int | None
    total_steps: int

    def is_due(self, step: int) -> bool:
        """Whether the evaluators of the validation schedule run after update `step`."""
        return step == self.total_steps or bool(self.every_steps and step % self.every_steps == 0)


def parameter_sets(params: Any, ema_params: Any | None) -> list[tuple[str, str, Any]]:
    """Returns (weights, suffix of names, parameters) for each set of parameters."""
    sets = [("params", "", params)]
    return sets if ema_params is None else [*sets, ("ema", "_ema", ema_params)]


class Evaluator(Protocol):
    """One evaluator in one file; `evaluation/schedule.py` runs it when it is due.

    Attributes:
      name: name of the data set or probe, such as "val" or "fewshot".
      key: a key of `Result.metrics` that is in metrics.jsonl once the evaluator has run.
    """

    name: str
    key: str

    def is_due(self, step: int) -> bool:
        """Whether the evaluator runs after update `step`."""

    def run(
        self, params: Any, ema_params: Any | None, should_stop: Callable[[], bool]
    ) -> list[Result] | None:
        """Evaluates the parameters and, if there is one, their moving average.

        Returns:
          One result per set of parameters; None if `should_stop` returned True: the evaluator is
          then still due.
        """
