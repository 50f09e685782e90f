"""A contest: programs that do the same work take turns, so that a disturbance hits all of them."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mixer import memory
from mixer.models.mlp_mixer import VARIANTS

# The record's model for CIFAR-10 (github.com/omihub777/MLP-Mixer-CIFAR; configs/cifar10.py).
CIFAR = dict(patch_size=4, hidden_dim=128, num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=512)
MODELS = {**VARIANTS, "cifar": CIFAR}


class Failed(Exception):
    """A contestant cannot take part; the message says why, and the others go on."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What all contestants of a contest compute.

    Attributes:
      what: "train" (an update by AdamW, softmax cross-entropy) or "infer" (pixels to logits).
      model: name of the model.
      dimensions: fields of the model for `make_model`.
      image_size: side in pixels.
      num_classes: width of the head.
      batch_size: images a device, which holds them as uint8.
      dtype: of the computation, "float32" or "bfloat16"; trained parameters are float32.
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
      devices: how many work at once.
      compile_seconds: 0 where nothing is compiled.
      memory: peak bytes of a device's memory; None where it is unknown.
    """

    devices: int
    compile_seconds: float
    memory: int | None

    def run(self, seconds: float) -> tuple[int, float]:
        """Runs for about that long; returns the finished steps and the seconds they took."""

    def close(self) -> None:
        """Releases memory and processes."""


@dataclasses.dataclass
class Result:
    """The measurements of a contestant.

    Attributes:
      devices, compile_seconds, memory: of the contestant.
      rounds: seconds a step in each round.
      failure: why the contestant did not take part, else None.
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
    """Prepares contestants one after the other, and lets them take turns.

    Each round begins with another contestant.

    Args:
      prepare: makes a contestant ready: compiled, and warmed up by some steps.
      seconds: of a turn.
      rounds: turns of each contestant.
      say: shows what is being prepared.
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
                one = ready[name]
                results[name] = Result(one.devices, one.compile_seconds)
        for turn in range(rounds):
            names = [name for name in ready if results[name].failure is None]
            start = turn % max(len(names), 1)
            for name in [*names[start:], *names[:start]]:
                try:
                    steps, passed = ready[name].run(seconds)
                    memory.give_back_freed_memory()
                except Failed as error:
                    results[name].failure = str(error)
                    continue
                results[name].rounds.append(passed / steps)
                results[name].memory = ready[name].memory
    finally:
        for one in ready.values():
            one.close()
    return results


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def rates(result: Result, work: float) -> dict[str, float] | None:
    """`spread` of the work a second; None where the contestant did not take part.

    Args:
      result: of a contestant.
      work: of a step, such as images or FLOPs.
    """
    if result.failure is not None:
        return None
    return spread([work / seconds for seconds in result.rounds])


def ratio(one: Result, other: Result) -> dict[str, float] | None:
    """How many times as fast `one` is as `other`, a device and round by round.

    None where one of the two did not take part.
    """
    if one.failure is not None or other.failure is not None:
        return None
    return spread([b / a for a, b in zip(one.rounds, other.rounds, strict=True)])


def as_json(result: Result, images: int, flops: float, limit: float | None) -> dict[str, Any]:
    """Figures of a contestant.

    Args:
      result: of the contestant.
      images: of a step on each device.
      flops: of an image, by the closed form.
      limit: FLOP/s of a large matmul on a device; None: unknown.
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
