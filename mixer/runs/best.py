"""The best checkpoint of a run: the weights with the highest validation accuracy so far."""

from collections.abc import Mapping, Sequence

from mixer.runs.directory import warn
from mixer.training.state import TrainState
from mixer.weights import checkpoint


class Best:
    """Keeps the checkpoint with the highest accuracy, and saves the accuracy in it.

    Attributes:
      key: key of the metric: "val/top1", or "val_ema/top1" if the run averages its parameters.
    """

    def __init__(self, checkpoints: checkpoint.Checkpoints, key: str, highest: float):
        self.key = key
        self._checkpoints, self._highest = checkpoints, highest

    def keep_if_higher(self, state: TrainState, step: int, accuracy: float) -> None:
        """Saves `state`, the state after `step`, if its accuracy is the highest so far."""
        if accuracy <= self._highest:
            return
        # Checkpoints of this and later steps belong to an earlier run in this directory.
        self._checkpoints.delete_after(step - 1)
        self._checkpoints.save(state, value={self.key: accuracy})
        self._checkpoints.wait()  # the evaluation's log line implies that the state is on disk
        self._highest = accuracy


def read_highest(
    checkpoints: checkpoint.Checkpoints, key: str, rows: Sequence[Mapping[str, float]]
) -> float:
    """Returns the accuracy of the best checkpoint; -1 if there is no checkpoint.

    Older code did not save the accuracy in the checkpoint. The result is then the value in the row
    of the checkpoint's step (`rows` are those of metrics.jsonl), or else the highest value.
    """
    if not checkpoints.steps:
        return -1.0
    step = checkpoints.steps[-1]
    try:
        value = checkpoint.read_info(checkpoints.directory / str(step)).get("value", {})
    except checkpoint.DamagedError as error:
        warn(f"{error}; the next evaluation replaces it")
        return -1.0
    if key in value:
        return value[key]
    all_rows = [row for row in rows if key in row]
    step_rows = [row for row in all_rows if row["step"] == step]
    return max((row[key] for row in step_rows or all_rows), default=-1.0)
