"""The best checkpoint of a run: the weights with the highest validation accuracy so far."""

from collections.abc import Mapping, Sequence

from mixer.runs.directory import warn
from mixer.training.state import TrainState
from mixer.weights import checkpoint


class Best:
    """Keeps the state with the highest accuracy; the accuracy is saved with the checkpoint.

    Attributes:
      key: of the metric, "val/top1", or "val_ema/top1" if the run averages its parameters.
    """

    def __init__(self, checkpoints: checkpoint.Checkpoints, key: str, highest: float):
        self.key = key
        self._checkpoints, self._highest = checkpoints, highest

    def keep_if_higher(self, state: TrainState, step: int, accuracy: float) -> None:
        """Saves `state`, the state after `step`, if its accuracy is the highest so far."""
        if accuracy <= self._highest:
            return
        # Checkpoints of this step and beyond belong to an earlier run in this directory.
        self._checkpoints.delete_after(step - 1)
        self._checkpoints.save(state, value={self.key: accuracy})
        self._checkpoints.wait()  # the log line of the evaluation implies that it is on disk
        self._highest = accuracy


def best_so_far(
    checkpoints: checkpoint.Checkpoints, key: str, rows: Sequence[Mapping[str, float]]
) -> float:
    """The accuracy of the best checkpoint; -1 if there is no checkpoint.

    Older code did not save it with the checkpoint. It is then the value of the checkpoint's step
    in `rows`, the run's record, or else the highest value there.
    """
    if not checkpoints.steps:
        return -1.0
    step = checkpoints.steps[-1]
    try:
        value = checkpoints.read_info(step).get("value", {})
    except checkpoint.DamagedError as error:
        warn(f"{error}; the next evaluation takes its place")
        return -1.0
    if key in value:
        return value[key]
    evaluated = [row for row in rows if key in row]
    of_step = [row for row in evaluated if row["step"] == step]
    return max((row[key] for row in of_step or evaluated), default=-1.0)
