"""Profiles of chosen steps of a run, for xprof and TensorBoard."""

import contextlib
from collections.abc import Iterable

import jax
from etils import epath


class Profile:
    """The profile of the steps `first` to `last`, each process its own, under RUN/profile."""

    def __init__(self, steps: tuple[int, int] | tuple[()], workdir: epath.Path):
        self._first, self._last = steps or (0, -1)
        self._from = None  # the first step that was traced
        self._directory = workdir / "profile"
        self._tracing = False

    def step(self, step: int, in_flight: Iterable[jax.Array]) -> contextlib.AbstractContextManager:
        """Around the dispatch of a step; tracing begins once earlier steps are done."""
        if not self._first <= step <= self._last:
            return contextlib.nullcontext()
        if not self._tracing:
            jax.block_until_ready(list(in_flight))
            jax.profiler.start_trace(self._directory)
            self._tracing, self._from = True, step
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def is_due(self, step: int) -> bool:
        """Whether tracing ends with this step."""
        return self._tracing and step == self._last

    def end(self, in_flight: Iterable[jax.Array]) -> str:
        """Ends tracing once the steps are done; returns a line that says where the profile is."""
        jax.block_until_ready(list(in_flight))
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
