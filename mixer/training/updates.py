"""What makes a run's updates: one program a batch that streams in, or one program for many updates.

The loop asks either for its next updates and calls what it gets. A source says how many they are:
one of a stream; of examples that stay on the device as many as take about half a second.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from mixer.data import resident
from mixer.data import splits as pipeline
from mixer.data.preprocessing import device as augment
from mixer.errors import UserError
from mixer.parallel import processes as distributed
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.training.optimizer import Schedule
from mixer.training.state import TrainState

# From a call to the end of it, which is seen when two more are made: so that a signal, the bar and
# the record need not wait longer.
CALL_SECS = 0.5
MOST_DRAWN = 1 << 17  # examples a call: a megabyte of places and epochs
MOST_STEPS = 512

Take = tuple[int, Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]]


def open_source(
    config: ConfigDict,
    kept: resident.Examples | str,
    split: pipeline.Split,
    *,
    start_step: int,
    num_readers: int,
    update: tuple[nn.Module, Schedule, optax.GradientTransformation, TrainState],
) -> tuple["Streamed | Resident", str]:
    """Compiles what makes the updates after `start_step`.

    Args:
      config: of the run, resolved.
      kept: the training examples, or why they are streamed.
      split: which they are of.
      start_step: the step that the run is at.
      num_readers: how many processes began to read.
      update: model, schedule, optimizer and abstract state, as `run.jit_train_step` takes them.

    Returns:
      The source, and a line that says where the images are.

    Raises:
      UserError: the config wants on the device what cannot be there.
    """
    # Each process has read the set, and has memory of its own.
    reason = next(filter(None, distributed.gather(kept if isinstance(kept, str) else "")), None)
    if reason is None:
        line = f"training images stay on the device: {kept.about}"
        return open_resident(config, kept, update), line
    line = f"training images are streamed: {reason}"
    split, steps, described = _parted(split, config.dataset.augment_on)
    if steps is not None:
        line += f"; on the device they take {described}"
    return _streamed(config, split, steps, start_step, num_readers, update), line


def _parted(split: pipeline.Split, where: str) -> tuple[pipeline.Split, Callable | None, str]:
    """The split with the steps left to the host, and those that the device takes, if any."""
    # TPUs gather slowly, and their hosts have many cores; a CPU is its own host.
    here = where == "host" or (where == "auto" and jax.default_backend() != "gpu")
    parts = None if here or not split.preprocess else augment.split(split.preprocess)
    if parts is None or parts.device is None:
        return split, None, ""
    host = split.with_steps(parts.host, image_size=(None, None), keys=True)
    size = host.example_spec["image"][0][:2]
    if None not in size:
        return host, augment.make_augment(split.preprocess, size), parts.device
    if where == "device":
        raise UserError(
            f"dataset.augment_on=device: the host's steps {parts.host!r} give images of any size; "
            "end them with resize or a crop, as in decode|resize(64)"
        )
    return split, None, ""


def open_resident(
    config: ConfigDict,
    kept: resident.Examples,
    update: tuple[nn.Module, Schedule, optax.GradientTransformation, TrainState],
) -> "Resident":
    """As `open_source`, of examples that stay on the device."""
    mesh = update[-1].step.sharding.mesh
    size = config.global_batch_size
    most = min(max(MOST_DRAWN // size, 1), MOST_STEPS)
    order = resident.order_spec(most, size, mesh)
    examples = resident.put(kept, mesh)
    lowered = run.jit_train_loop(config, *update, kept.augment).lower(
        update[-1], sharding.abstract(examples), order, jax.ShapeDtypeStruct((), np.int32)
    )
    put_order = functools.partial(
        resident.put_order, seed=config.seed, num_examples=kept.num_examples, spec=order
    )
    return Resident(lowered, examples, put_order, most)


def _streamed(config, split, steps, start_step, num_readers, update) -> "Streamed":
    mesh = update[-1].step.sharding.mesh
    index, count = sharding.data_processes(mesh)
    batches = sharding.prefetch(
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
    if steps is not None:
        # A program of its own: the update is the one that takes whole images from the host.
        images, keys = batch["image"], batch.pop("augment_key")
        augmented = jax.jit(steps, out_shardings=images.sharding).lower(images, keys)
        compiled = augmented.compile()
        found = augmented.out_info
        batch["image"] = jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=images.sharding)
    return Streamed(run.jit_train_step(config, *update).lower(update[-1], batch), batches, compiled)


class Streamed:
    """One update a call, of the next batch of a stream.

    Attributes:
      compiled: the program.
    """

    def __init__(self, lowered: Any, batches: Any, augment: Callable | None):
        self.compiled = lowered.compile()
        self._batches, self._augment = batches, augment

    def take(self, step: int, most: int) -> Take:
        """How many updates come after `step`, and what makes them of a state; waits for data."""
        # The batch is a function of (seed, step), and was on its way before it is asked for.
        batch = next(self._batches)

        def update(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
            if self._augment is not None:
                batch["image"] = self._augment(batch["image"], batch.pop("augment_key"))
            return self.compiled(state, batch)

        return 1, update

    def took(self, count: int, seconds: float) -> None:
        """Does nothing: calls of a stream have one length."""

    def close(self) -> None:
        """Ends the stream."""
        self._batches.close()


class Resident:
    """Many updates a call, of examples that stay on the device.

    Attributes:
      compiled: the program.
    """

    def __init__(
        self, lowered: Any, examples: dict[str, jax.Array], put_order: Callable, most: int
    ):
        self.compiled = lowered.compile()
        self._examples, self._put_order, self._most = examples, put_order, most
        self._length, self._grows = 1, True

    def take(self, step: int, most: int) -> Take:
        """At most `most` updates after `step`, as `Streamed.take`."""
        count = min(self._length, self._most, most)
        order = self._put_order(step, count)
        return count, lambda state: self.compiled(state, self._examples, order, np.int32(count))

    def took(self, count: int, seconds: float) -> None:
        """Notes how long it was from a call of `count` updates until its end was seen."""
        if not self._grows or count < self._length:
            return
        # Process 0 decides: all have to run the same program equally long.
        self._grows = distributed.broadcast(seconds < CALL_SECS)
        if self._grows:
            self._length *= 2

    def close(self) -> None:
        """Does nothing: there is no stream."""
