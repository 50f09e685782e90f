"""Runs programs that do the same work in turns, so that a disturbance affects all of them."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mixer import memory
from mixer.models.registry import ARCHITECTURES

# The reference recipe's model for CIFAR-10: github.com/omihub777/MLP-Mixer-CIFAR,
# configs/cifar10.py.
CIFAR = dict(patch_size=4, hidden_dim=128, num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=512)
# The models of --models, as fields for `make_model`. The names of other architectures' models have
# the architecture as a prefix.
MODELS = {"cifar": CIFAR}
for _name, _entry in ARCHITECTURES.items():
    for _variant, _dimensions in _entry.variants.items():
        if _name == "mixer":
            MODELS[_variant] = _dimensions
        else:
            MODELS[f"{_name}-{_variant}"] = {"name": _name, **_dimensions}


class Failed(Exception):
    """A contestant cannot run; the message has the reason, and the other contestants continue."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The computation of all contestants of a contest.

    Attributes:
      what: "train" (an AdamW update with softmax cross-entropy) or "infer" (pixels to logits).
      model: name of the model.
      dimensions: fields of the model for `make_model`.
      image_size: side in pixels.
      num_classes: number of classes.
      batch_size: images per device; they are on the device as uint8.
      dtype: dtype of the computation, "float32" or "bfloat16"; trained parameters are float32.
      gelu: "tanh" or "erf".
    """

    what: str
    model: str
    dimensions: Mapping[str, int]
    image_size: int
    num_classes: int
    batch_size: int
    dtype: str
    gelu: str


class Contestant(Protocol):
    """A program that is ready to run.

    Attributes:
      devices: number of devices in use.
      compile_seconds: compile time; 0 if nothing is compiled.
      memory: peak bytes of device memory; None if unknown.
    """

    devices: int
    compile_seconds: float
    memory: int | None

    def run(self, seconds: float) -> tuple[int, float]:
        """Runs for about `seconds`; returns the number of finished steps and their duration."""

    def close(self) -> None:
        """Releases memory and processes."""


@dataclasses.dataclass
class Result:
    """The measurements of a contestant.

    Attributes:
      devices, compile_seconds, memory: attributes of the contestant.
      rounds: seconds per step in each round.
      failure: the reason why the contestant failed; None if it did not.
    """

    devices: int = 1
    compile_seconds: float = 0.0
    memory: int | None = None
    rounds: list[float] = dataclasses.field(default_factory=list)
    failure: str | None = None


def compete(
    prepare: Mapping[str, Callable[[], Contestant]],
    *,
    seconds: float,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Result]:
    """Prepares contestants one after the other, then runs them in turns.

    Each round starts with a different contestant.

    Args:
      prepare: functions that return a compiled and warmed-up contestant, by name.
      seconds: duration of a turn.
      rounds: turns of each contestant.
      say: prints the name of the contestant in preparation.
    """
    ready: dict[str, Contestant] = {}
    results: dict[str, Result] = {}
    try:
        for name, make in prepare.items():
            say(f"preparing {name}")
            try:
                ready[name] = make()
                memory.give_back_freed_memory()  # the next contestant may need it
            except Failed as error:
                results[name] = Result(failure=str(error))
            else:
                contestant = ready[name]
                results[name] = Result(contestant.devices, contestant.compile_seconds)
        for turn in range(rounds):
            names = [name for name in ready if results[name].failure is None]
            start = turn % max(len(names), 1)
            for name in [*names[start:], *names[:start]]:
                try:
                    steps, duration = ready[name].run(seconds)
                    memory.give_back_freed_memory()
                except Failed as error:
                    results[name].failure = str(error)
                    continue
                results[name].rounds.append(duration / steps)
                results[name].memory = ready[name].memory
    finally:
        for contestant in ready.values():
            contestant.close()
    return results


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median, minimum and maximum."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def rates(result: Result, work: float) -> dict[str, float] | None:
    """Returns the `spread` of the work per second; None if the contestant failed.

    Args:
      result: result of a contestant.
      work: work per step, such as images or FLOPs.
    """
    if result.failure is not None:
        return None
    return spread([work / seconds for seconds in result.rounds])


def ratio(result: Result, baseline: Result) -> dict[str, float] | None:
    """Returns the `spread` of the speed per device relative to `baseline`, round by round.

    The result is None if one of the two contestants failed.
    """
    if result.failure is not None or baseline.failure is not None:
        return None
    return spread([b / a for a, b in zip(result.rounds, baseline.rounds, strict=True)])


def as_json(result: Result, images: int, flops: float, limit: float | None) -> dict[str, Any]:
    """Returns the results of a contestant as JSON.

    Args:
      result: result of the contestant.
      images: images per step and device.
      flops: FLOPs per image, by the closed form.
      limit: FLOP/s of a large matmul on a device; None if unknown.
    """
    if result.failure is not None:
        return {"failure": result.failure}
    per_device = rates(result, images)
    achieved = rates(result, images * flops)
    return {
        "devices": result.devices,
        "images_per_second": {k: v * result.devices for k, v in per_device.items()},
        "images_per_second_per_device": per_device,
        "seconds_per_step": spread(result.rounds),
        "flops_per_second_per_device": achieved,
        "share_of_matmul": achieved["median"] / limit if limit else None,
        "memory_bytes_per_device": result.memory,
        "compile_seconds": result.compile_seconds,
        "rounds_seconds_per_step": result.rounds,
    }
