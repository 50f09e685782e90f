"""Performs a run's updates: one per program call if batches are streamed, many if resident.

The training loop asks for the next call and runs it. A call makes one update if the batches are
streamed. If the examples are resident on the device, a call makes about half a second of updates.
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
from mixer.data.host_or_device import check_augment_on, stream
from mixer.data.order import Reading
from mixer.data.prefetch import prefetch
from mixer.data.preprocessing.device import make_augment
from mixer.formatting import short
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.training.program import TrainProgram
from mixer.training.state import TrainState

# Target seconds from a call until its end is observed, which happens when two more calls are in
# flight. Longer calls would delay signals, the progress bar and metrics.jsonl.
CALL_SECS = 0.5
MAX_DRAWN = 1 << 17  # examples per call; their positions and epochs take 1 MB
MAX_STEPS = 512

MAX_IN_FLIGHT = 2  # calls in flight

Call = tuple[int, Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]]


class Updates:
    """Makes a run's updates, a few per call, with at most two calls in flight.

    Attributes:
      compiled: the program of a call; None if no update is left.
    """

    def __init__(self, lowered: Any | None):
        self.compiled = lowered and lowered.compile()
        # For each call in flight: its loss, its number of updates and its start time.
        self._in_flight: collections.deque[tuple[jax.Array, int, float]] = collections.deque()

    def next(self, step: int, max_count: int) -> Call:
        """Returns the call after `step`: its update count, at most `max_count`, and its function.

        Waits for data.
        """
        raise NotImplementedError

    def sent(self, loss: jax.Array, count: int, start_secs: float) -> None:
        """Records a dispatched call of `count` updates; waits for the call before the previous one.

        A host that ran further ahead would hold more batches, and wait for data that the device
        does not need yet.

        Args:
          loss: loss of the call.
          count: number of updates of the call.
          start_secs: time.perf_counter() at the call.
        """
        self._in_flight.append((loss, count, start_secs))
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._wait()

    def drain(self) -> None:
        """Waits until no call is in flight."""
        while self._in_flight:
            self._wait()

    def close(self) -> None:
        """Releases the data."""

    def _wait(self) -> None:
        """Waits for the oldest call in flight."""
        loss, count, start_secs = self._in_flight.popleft()
        jax.block_until_ready(loss)
        self.took(count, time.perf_counter() - start_secs)

    def took(self, count: int, seconds: float) -> None:
        """Records the seconds from a call of `count` updates until its end was observed."""


class Streamed(Updates):
    """Makes one update per call, with the next batch of a stream."""

    def __init__(self, lowered: Any, batches: Any, augment: Callable | None):
        super().__init__(lowered)
        self._batches, self._augment = batches, augment

    def next(self, step: int, max_count: int) -> Call:
        """Returns the next call, as `Updates.next` does; it makes one update."""
        # The batch depends only on (seed, step), so it was prefetched.
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
    """Makes many updates per call, with examples that stay on the device."""

    def __init__(
        self, lowered: Any, examples: dict[str, jax.Array], put_order: Callable, max_count: int
    ):
        super().__init__(lowered)
        self._examples, self._put_order, self._max_count = examples, put_order, max_count
        self._length, self._grows = 1, True

    def next(self, step: int, max_count: int) -> Call:
        """Returns the next call; its number of updates doubles until a call takes CALL_SECS."""
        count = min(self._length, self._max_count, max_count)
        order = self._put_order(step, count)
        return count, lambda state: self.compiled(state, self._examples, order, np.int32(count))

    def took(self, count: int, seconds: float) -> None:
        """Records the seconds of a call, and decides whether the next call makes more updates."""
        if not self._grows or count < self._length:
            return
        # Process 0 decides, because all processes must make the same number of updates.
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
    """Compiles the program for the updates after `start_step`.

    Args:
      config: the run's resolved config.
      examples: all training examples, or the reason why training streams them.
      split: the training split.
      program: the run's training program.
      start_step: the current step of the run.
      num_readers: the number of processes that the data order assumes.

    Returns:
      The updates, and a line for the user on where the images are.

    Raises:
      UserError: the config requires ops on the device that the device cannot compute.
      NoRoomError: the compiled update needs more memory than is free.
    """
    # Each process has its own memory, so one of them may have to stream.
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
            line += f"; the device applies {placement.device}"
            augment = make_augment(split.preprocess, placement.host.image_size)
            split = split.with_preprocess(placement.host, image_size=(None, None), keys=True)
        updates = _make_streamed(config, split, augment, program, start_step, num_readers)
    if (analysis := updates.compiled.memory_analysis()) is not None:
        subject = f"the gradients and activations of global_batch_size={config.global_batch_size}"
        memory.check_room(analysis.temp_size_in_bytes, subject)
    return updates, line


def make_resident(
    config: ConfigDict,
    examples: resident.Examples,
    program: TrainProgram,
) -> "Resident":
    """Compiles the updates with examples that stay on the device."""
    mesh = program.mesh
    size = config.global_batch_size
    max_count = min(max(MAX_DRAWN // size, 1), MAX_STEPS)
    order = resident.order_spec(max_count, size, mesh)
    arrays = resident.put(examples, mesh)
    lowered = program.jit_loop(examples.augment).lower(
        program.state, sharding.abstract(arrays), order, jax.ShapeDtypeStruct((), np.int32)
    )
    put_order = functools.partial(
        resident.put_order, seed=config.seed, num_examples=examples.num_examples, spec=order
    )
    return Resident(lowered, arrays, put_order, max_count)


def _make_streamed(config, split, augment, program, start_step, num_readers) -> "Streamed":
    mesh = program.mesh
    index, count = sharding.data_processes(mesh)
    reading = Reading(
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        process_index=index,
        process_count=count,
        num_readers=num_readers,
    )
    batches = prefetch(
        split.train_batches(start_step, reading),
        lambda batch: sharding.put_batch(batch, mesh),
        config.dataset.prefetch_batches,
    )
    batch = sharding.abstract_batch(split.example_spec, config.global_batch_size, mesh)
    compiled = None
    if augment is not None:
        # A separate program for augmentation keeps the update the same as with host augmentation.
        images, keys = batch["image"], batch.pop("augment_key")
        augmented = jax.jit(augment, out_shardings=images.sharding).lower(images, keys)
        compiled = augmented.compile()
        image = augmented.out_info
        batch["image"] = jax.ShapeDtypeStruct(image.shape, image.dtype, sharding=images.sharding)
    return Streamed(program.jit_step().lower(program.state, batch), batches, compiled)


def describe_memory(program: TrainProgram, compiled: Any) -> str:
    """Returns a line on the memory per device of the state and the compiled update."""
    params = sharding.bytes_per_device((program.state.params, program.state.ema_params))
    moments = sharding.bytes_per_device(program.state.opt_state)
    line = f"memory per device: parameters {short(params, 'B')}, optimizer {short(moments, 'B')}"
    analysis = compiled.memory_analysis()
    if analysis is None:  # not every backend reports it
        return line
    return f"{line}, gradients and activations {short(analysis.temp_size_in_bytes, 'B')}"
