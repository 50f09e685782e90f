"""Profiles selected steps of a run, for xprof and TensorBoard."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from etils import epath
from ml_collections import ConfigDict


class Profile:
    """Profiles the steps `first` to `last`; every process writes its own files to RUN/profile."""

    def __init__(self, steps: tuple[int, int] | tuple[()], workdir: epath.Path):
        self._first, self._last = steps or (0, -1)
        self._first_traced = None  # the first step that was traced
        self._directory = workdir / "profile"
        self._tracing = False

    def step(self, step: int, drain: Callable[[], None]) -> contextlib.AbstractContextManager:
        """Returns a context for the dispatch of a step; calls `drain` before it starts to trace."""
        if not self._first <= step <= self._last:
            return contextlib.nullcontext()
        if not self._tracing:
            drain()
            jax.profiler.start_trace(self._directory)
            self._tracing, self._first_traced = True, step
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def is_due(self, step: int) -> bool:
        """Returns whether tracing ends with this step."""
        return self._tracing and step == self._last

    def end(self) -> str:
        """Stops tracing, after the steps have finished; returns a line with the profile's path."""
        self.close()
        return (
            f"profile of steps {self._first_traced} to {self._last}: {self._directory} (xprof, or "
            "TensorBoard with its plugin)"
        )

    def close(self) -> None:
        """Stops tracing, even if the run ends before the last traced step."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


@contextlib.contextmanager
def open_profile(
    config: ConfigDict, workdir: epath.Path, start_step: int, warn: Callable[[str], None]
) -> Iterator[Profile]:
    """Yields the profile of `config.profile_steps`; tracing stops at the end of the block."""
    steps = config.profile_steps
    if (
        steps
        and start_step < config.total_steps
        and not start_step < steps[1] <= config.total_steps
    ):
        warn(
            f"profile_steps={tuple(steps)}: this start runs steps {start_step + 1} to "
            f"{config.total_steps}"
        )
    with contextlib.closing(Profile(steps, workdir)) as profile:
        yield profile
