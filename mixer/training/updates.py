"""What makes a run's updates: one program a batch that streams in, or one program for many updates.

The loop asks either for its next updates and calls what it gets. A source says how many they are:
one of a stream; of examples that stay on the device as many as take about half a second.
"""

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mixer import memory
from mixer.data import resident
from mixer.data import splits as pipeline
from mixer.data.placement import check_augment_on, stream
from mixer.data.prefetch import prefetch
from mixer.data.preprocessing.device import make_augment
from mixer.formatting import short
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.training.program import TrainProgram
from mixer.training.state import TrainState

# From a call to the end of it, which is seen when two more are made: so that a signal, the bar and
# the record need not wait longer.
CALL_SECS = 0.5
MOST_DRAWN = 1 << 17  # examples a call: a megabyte of places and epochs
MOST_STEPS = 512

MOST_IN_FLIGHT = 2  # calls

Call = tuple[int, Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]]


class Updates:
    """Makes a run's updates, a few per call, with at most two calls in flight.

    Attributes:
      compiled: the program of a call; None if no update is left.
    """

    def __init__(self, lowered: Any | None):
        self.compiled = lowered and lowered.compile()
        # Of each call in flight: its loss, its number of updates, and when it was made.
        self._in_flight: collections.deque[tuple[jax.Array, int, float]] = collections.deque()

    def next(self, step: int, most: int) -> Call:
        """The call after `step`: its number of updates, `most` or fewer, and the function to call.

        Waits for data.
        """
        raise NotImplementedError

    def sent(self, loss: jax.Array, count: int, called: float) -> None:
        """Notes a dispatched call of `count` updates; waits for the call before the previous one.

        A host further ahead would hold more batches, and wait for data that the device does not
        need yet.

        Args:
          loss: of the call.
          count: its number of updates.
          called: time.perf_counter() when it was made.
        """
        self._in_flight.append((loss, count, called))
        if len(self._in_flight) > MOST_IN_FLIGHT:
            self._wait()

    def drain(self) -> None:
        """Waits until no call is in flight."""
        while self._in_flight:
            self._wait()

    def close(self) -> None:
        """Lets go of the data."""

    def _wait(self) -> None:
        """Waits for the oldest call in flight."""
        loss, count, called = self._in_flight.popleft()
        jax.block_until_ready(loss)
        self.took(count, time.perf_counter() - called)

    def took(self, count: int, seconds: float) -> None:
        """Notes the time from a call of `count` updates until its end was seen."""


class Streamed(Updates):
    """One update per call, of the next batch of a stream."""

    def __init__(self, lowered: Any, batches: Any, augment: Callable | None):
        super().__init__(lowered)
        self._batches, self._augment = batches, augment

    def next(self, step: int, most: int) -> Call:
        """As `Updates.next`, always one update."""
        # The batch is a function of (seed, step), and was on its way before it is asked for.
        batch = next(self._batches)

        def update(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            if self._augment is not None:
                batch["image"] = self._augment(batch["image"], batch.pop("augment_key"))
            return self.compiled(state, batch)

        return 1, update

    def close(self) -> None:
        """Ends the stream."""
        self._batches.close()


class Resident(Updates):
    """Many updates per call, of examples that stay on the device."""

    def __init__(
        self, lowered: Any, examples: dict[str, jax.Array], put_order: Callable, most: int
    ):
        super().__init__(lowered)
        self._examples, self._put_order, self._most = examples, put_order, most
        self._length, self._grows = 1, True

    def next(self, step: int, most: int) -> Call:
        """As `Updates.next`; the number of updates grows until a call takes CALL_SECS."""
        count = min(self._length, self._most, most)
        order = self._put_order(step, count)
        return count, lambda state: self.compiled(state, self._examples, order, np.int32(count))

    def took(self, count: int, seconds: float) -> None:
        """As `Updates.took`; decides whether the next call makes more updates."""
        if not self._grows or count < self._length:
            return
        # Process 0 decides: all processes must run the same program equally long.
        self._grows = distributed.broadcast(seconds < CALL_SECS)
        if self._grows:
            self._length *= 2


def make_updates(
    config: ConfigDict,
    examples: resident.Examples | str,
    split: pipeline.Split,
    program: TrainProgram,
    *,
    start_step: int,
    num_readers: int,
) -> tuple[Updates, str]:
    """Compiles what makes the updates after `start_step`.

    Args:
      config: of the run, resolved.
      examples: all training examples, or why training streams them.
      split: of training.
      program: the run's update.
      start_step: the step that the run is at.
      num_readers: how many processes the order of the data assumes.

    Returns:
      The updates, and a line that says where the images are.

    Raises:
      UserError: the config puts on the device what it cannot compute.
      NoRoomError: the compiled update needs more memory than is free.
    """
    # Each process has read the set, and has memory of its own.
    reasons = distributed.gather(examples if isinstance(examples, str) else "")
    reason = next(filter(None, reasons), None)
    if reason is None:
        line = f"training images stay on the device: {examples.about}"
        updates = make_resident(config, examples, program)
    else:
        check_augment_on(split.preprocess, config.dataset.augment_on)
        placement = stream(
            split.preprocess,
            reason,
            augment_on=config.dataset.augment_on,
            backend=jax.default_backend(),
        )
        line = f"training images are streamed: {reason}"
        augment = None
        if placement.device:
            line += f"; on the device they take {placement.device}"
            augment = make_augment(split.preprocess, placement.host.image_size)
            split = split.with_preprocess(placement.host, image_size=(None, None), keys=True)
        updates = _make_streamed(config, split, augment, program, start_step, num_readers)
    if (analysis := updates.compiled.memory_analysis()) is not None:
        what = f"global_batch_size={config.global_batch_size}: what a step computes with"
        memory.check_room(analysis.temp_size_in_bytes, what)
    return updates, line


def make_resident(
    config: ConfigDict,
    examples: resident.Examples,
    program: TrainProgram,
) -> "Resident":
    """As `make_updates`, of examples that stay on the device."""
    mesh = program.mesh
    size = config.global_batch_size
    most = min(max(MOST_DRAWN // size, 1), MOST_STEPS)
    order = resident.order_spec(most, size, mesh)
    arrays = resident.put(examples, mesh)
    lowered = program.jit_loop(examples.augment).lower(
        program.state, sharding.abstract(arrays), order, jax.ShapeDtypeStruct((), np.int32)
    )
    put_order = functools.partial(
        resident.put_order, seed=config.seed, num_examples=examples.num_examples, spec=order
    )
    return Resident(lowered, arrays, put_order, most)


def _make_streamed(config, split, augment, program, start_step, num_readers) -> "Streamed":
    mesh = program.mesh
    index, count = sharding.data_processes(mesh)
    batches = prefetch(
        split.train_batches(
            start_step=start_step,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            process_index=index,
            process_count=count,
            num_readers=num_readers,
        ),
        lambda batch: sharding.put_batch(batch, mesh),
        config.dataset.prefetch_batches,
    )
    batch = sharding.abstract_batch(split.example_spec, config.global_batch_size, mesh)
    compiled = None
    if augment is not None:
        # A program of its own: the update is the one that takes whole images from the host.
        images, keys = batch["image"], batch.pop("augment_key")
        augmented = jax.jit(augment, out_shardings=images.sharding).lower(images, keys)
        compiled = augmented.compile()
        image = augmented.out_info
        batch["image"] = jax.ShapeDtypeStruct(image.shape, image.dtype, sharding=images.sharding)
    return Streamed(program.jit_step().lower(program.state, batch), batches, compiled)


def describe_memory(program: TrainProgram, compiled: Any) -> str:
    """A line: how much of each device's memory the state and the compiled update take."""
    params = sharding.bytes_per_device((program.state.params, program.state.ema_params))
    moments = sharding.bytes_per_device(program.state.opt_state)
    line = f"memory a device: parameters {short(params, 'B')}, optimizer {short(moments, 'B')}"
    analysis = compiled.memory_analysis()
    if analysis is None:  # not every backend reports it
        return line
    return f"{line}, gradients and activations {short(analysis.temp_size_in_bytes, 'B')}"
