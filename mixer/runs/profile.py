"""Profiles of chosen steps of a run, for xprof and TensorBoard."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from etils import epath
from ml_collections import ConfigDict


class Profile:
    """The profile of the steps `first` to `last`, each process its own, under RUN/profile."""

    def __init__(self, steps: tuple[int, int] | tuple[()], workdir: epath.Path):
        self._first, self._last = steps or (0, -1)
        self._from = None  # the first step that was traced
        self._directory = workdir / "profile"
        self._tracing = False

    def step(self, step: int, drain: Callable[[], None]) -> contextlib.AbstractContextManager:
        """Around the dispatch of a step; waits for earlier steps with `drain`, then traces."""
        if not self._first <= step <= self._last:
            return contextlib.nullcontext()
        if not self._tracing:
            drain()
            jax.profiler.start_trace(self._directory)
            self._tracing, self._from = True, step
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def is_due(self, step: int) -> bool:
        """Whether tracing ends with this step."""
        return self._tracing and step == self._last

    def end(self) -> str:
        """Ends tracing, once the steps are done; returns a line that says where the profile is."""
        self.close()
        return (
            f"profile of steps {self._from} to {self._last}: {self._directory} (xprof, or "
            "TensorBoard with its plugin)"
        )

    def close(self) -> None:
        """Ends tracing, also where the run ends before its last step."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


@contextlib.contextmanager
def open_profile(
    config: ConfigDict, workdir: epath.Path, start_step: int, warn: Callable[[str], None]
) -> Iterator[Profile]:
    """The profile of `config.profile_steps`, which ends with the block at the latest."""
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
