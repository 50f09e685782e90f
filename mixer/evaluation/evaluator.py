"""The interface of the evaluators of a training run, and their results."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Batching:
    """The batches in which an evaluation puts images on the devices.

    Attributes:
      mesh: mesh of the devices over which each batch is sharded.
      global_batch_size: images per batch, over all devices.
      prefetch_batches: number of batches to prefetch to the devices.
    """

    mesh: Mesh
    global_batch_size: int
    prefetch_batches: int = 2


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings that all evaluators of a run share.

    Attributes:
      model: the model whose parameters are evaluated.
      batching: the batches of images.
      every_steps: number of updates between evaluations; None: only after the last update.
      total_steps: number of updates of the run; all evaluators are due after the last one.
    """

    model: nn.Module
    batching: Batching
    every_steps: int | None
    total_steps: int


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one evaluator for one set of parameters.

    Attributes:
      dataset: the evaluated data, such as "val", "imagenet_real" or "cifar10".
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


class Evaluator(abc.ABC):
    """One evaluator of a run; `evaluation/schedule.py` runs it when it is due.

    Attributes:
      name: name of the data set or probe, such as "val" or "fewshot": the prefix of its metrics.
      key: a key of `Result.metrics` that is in metrics.jsonl once the evaluator has run.
      section: section of results.json.
      dataset: the evaluated data, which names the results in that section.
    """

    name: str
    key: str
    section: str

    def __init__(self, dataset: str, setup: Setup):
        """Takes the name of the evaluated data and the settings of the run."""
        self.dataset, self._setup = dataset, setup

    @abc.abstractmethod
    def evaluate(self, params: Any, should_stop: Callable[[], bool]) -> Any | None:
        """Evaluates one set of parameters.

        Returns:
          A result with a `summary()` for results.json; None if `should_stop` returned True.
        """

    @abc.abstractmethod
    def metrics(self, result: Any) -> dict[str, float]:
        """Returns the numbers for metrics.jsonl, by key without the prefix."""

    @abc.abstractmethod
    def line(self, result: Any, suffix: str) -> str:
        """Returns the line for the terminal; `suffix` is "_ema" for the moving average, else ""."""

    def is_due(self, step: int) -> bool:
        """Whether the evaluator runs after update `step`."""
        every_steps = self._setup.every_steps
        is_regular = bool(every_steps and step % every_steps == 0)
        return is_regular or step == self._setup.total_steps

    def run(
        self, params: Any, ema_params: Any | None, should_stop: Callable[[], bool]
    ) -> list[Result] | None:
        """Evaluates the parameters and, if there is one, their moving average.

        Returns:
          One result per set of parameters; None if `should_stop` returned True: the evaluator is
          then still due.
        """
        results = []
        for weights, suffix, values in (("params", "", params), ("ema", "_ema", ema_params)):
            if values is None:
                continue
            result = self.evaluate(values, should_stop)
            if result is None:
                return None
            metrics = self.metrics(result)
            results.append(
                Result(
                    dataset=self.dataset,
                    weights=weights,
                    section=self.section,
                    name=f"{self.dataset}{suffix}",
                    metrics={f"{self.name}{suffix}/{key}": metrics[key] for key in metrics},
                    summary=result.summary(),
                    line=self.line(result, suffix),
                )
            )
        return results
