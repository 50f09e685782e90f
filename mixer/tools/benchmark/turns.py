"""Runs programs that do the same work in turns, so that a disturbance affects all of them."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mixer import memory


class ProgramError(Exception):
    """A program cannot run; the message has the reason, and the other programs continue."""


class Program(Protocol):
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
    """The measurements of a program.

    Attributes:
      devices, compile_seconds, memory: attributes of the program.
      rounds: seconds per step in each round.
      failure: the reason why the program failed; None if it did not.
    """

    devices: int = 1
    compile_seconds: float = 0.0
    memory: int | None = None
    rounds: list[float] = dataclasses.field(default_factory=list)
    failure: str | None = None


def take_turns(
    makers: Mapping[str, Callable[[], Program]],
    *,
    seconds: float,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Result]:
    """Prepares programs one after the other, then runs them in turns.

    Each round starts with a different program.

    Args:
      makers: functions that return a compiled and warmed-up program, by name.
      seconds: duration of a turn.
      rounds: turns of each program.
      say: prints the name of the program in preparation.
    """
    programs: dict[str, Program] = {}
    results: dict[str, Result] = {}
    try:
        for name, make in makers.items():
            say(f"preparing {name}")
            try:
                programs[name] = make()
                memory.give_back_freed_memory()  # the next program may need it
            except ProgramError as error:
                results[name] = Result(failure=str(error))
            else:
                results[name] = Result(programs[name].devices, programs[name].compile_seconds)
        for turn in range(rounds):
            names = [name for name in programs if results[name].failure is None]
            start = turn % max(len(names), 1)
            for name in [*names[start:], *names[:start]]:
                try:
                    steps, duration = programs[name].run(seconds)
                    memory.give_back_freed_memory()
                except ProgramError as error:
                    results[name].failure = str(error)
                    continue
                results[name].rounds.append(duration / steps)
                results[name].memory = programs[name].memory
    finally:
        for program in programs.values():
            program.close()
    return results


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median, minimum and maximum."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def rates(result: Result, work: float) -> dict[str, float] | None:
    """Returns the `spread` of the work per second; None if the program failed.

    Args:
      result: result of a program.
      work: work per step, such as images or FLOPs.
    """
    if result.failure is not None:
        return None
    return spread([work / seconds for seconds in result.rounds])


def ratio(result: Result, baseline: Result) -> dict[str, float] | None:
    """Returns the `spread` of the speed per device relative to `baseline`, round by round.

    The result is None if one of the two programs failed.
    """
    if result.failure is not None or baseline.failure is not None:
        return None
    return spread([b / a for a, b in zip(result.rounds, baseline.rounds, strict=True)])


def as_json(result: Result, images: int, flops: float, limit: float | None) -> dict[str, Any]:
    """Returns the results of a program as JSON.

    Args:
      result: result of the program.
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
