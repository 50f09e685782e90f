"""What every evaluator of a training run has in common."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Result:
    """What one evaluator found for one set of parameters.

    Attributes:
      dataset: the evaluated data, such as "val", "imagenet_real" or "fewshot".
      weights: "params", or "ema" for their moving average.
      section: of results.json: "splits", "fewshot" or "linear_probe".
      name: the key in that section, such as "val_ema".
      metrics: numbers for metrics.jsonl by their full key, such as {"val_ema/top1": 0.61}.
      summary: what results.json holds, values that JSON can hold.
      line: one line for the terminal.
    """

    dataset: str
    weights: str
    section: str
    name: str
    metrics: Mapping[str, float]
    summary: Mapping[str, Any]
    line: str


class Evaluator(Protocol):
    """One evaluator in one file; `evaluation/schedule.py` runs it when it is due.

    Attributes:
      name: of the data set or probe, such as "val" or "fewshot".
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
          One result per set of parameters; None if `should_stop` ended it, so that it is still due.
        """
