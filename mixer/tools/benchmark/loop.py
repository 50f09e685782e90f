"""Training on images that stay on the device, as a config's run does it, without the run."""

import collections
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mixer import memory
from mixer.data import resident
from mixer.data.placement import place
from mixer.data.preprocessing.device import make_augment
from mixer.data.preprocessing.spec import Specification, parse
from mixer.errors import UserError
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.benchmark.jax_side import IN_FLIGHT, may_fail, memory_of
from mixer.training import state as train_state
from mixer.training import updates as stepping

WARM_UP_CALLS = 12  # in which their length grows


class Loop:
    """A contestant (see contest.py) whose step is an update of the global batch."""

    def __init__(self, source: stepping.Resident, state: Any, *, devices: int, seconds: float):
        """Warms it up; `seconds` is what it took to compile."""
        self._source, self._state, self._step = source, state, 0
        self.devices, self.compile_seconds = devices, seconds
        self.memory = memory_of(source.compiled)
        for _ in range(WARM_UP_CALLS):
            self.run(0.0)

    @may_fail
    def run(self, seconds: float) -> tuple[int, float]:
        """As `Contestant.run`, the host being two calls ahead, as in training."""
        in_flight: collections.deque[tuple[jax.Array, int, float]] = collections.deque()
        first, start = self._step, time.perf_counter()

        def finish() -> None:
            loss, count, since = in_flight.popleft()
            jax.block_until_ready(loss)
            self._source.took(count, time.perf_counter() - since)

        while self._step == first or time.perf_counter() - start < seconds:
            called = time.perf_counter()
            count, update = self._source.take(self._step, stepping.MOST_STEPS)
            self._state, metrics = update(self._state)
            self._step += count
            in_flight.append((metrics["loss"], count, called))
            if len(in_flight) > IN_FLIGHT:
                finish()
        while in_flight:
            finish()
        return self._step - first, time.perf_counter() - start

    def close(self) -> None:
        """Lets go of the arrays."""
        del self._source, self._state


def prepare(config: ConfigDict, num_examples: int) -> Loop:
    """The loop of a config's training, on so many images of noise.

    Args:
      config: of the run, resolved.
      num_examples: images that lie on the device, of the config's size.

    Raises:
      UserError: its images cannot stay on the device.
      Failed: it does not fit into memory.
    """
    dataset, size = config.dataset, (config.image_size, config.image_size)
    spec = parse(dataset.train_preprocess) if dataset.train_preprocess else Specification()
    placement = place(
        spec,
        mode="off" if dataset.on_device == "off" else "on",
        augment_on=dataset.augment_on,
        backend=jax.default_backend(),
        num_processes=1,
        num_examples=num_examples,
        num_drawn=num_examples,
        measure=lambda: None,
    )
    if not placement.on_device:
        raise UserError(
            f"a run of this config streams its images: {placement.reason}; see "
            "python -m mixer.tools.benchmark data"
        )
    mesh = sharding.make_mesh(config.mesh)
    run.check_batch_size(config, mesh)
    steps = make_augment(spec, size) if placement.device else None
    return _prepare(config, num_examples, steps, mesh)


@may_fail
def _prepare(config: ConfigDict, num_examples: int, steps: Callable | None, mesh: Mesh) -> Loop:
    size = (config.image_size, config.image_size)
    memory.check_room(3 * num_examples * size[0] * size[1], f"{num_examples:,} images")
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (num_examples, *size, 3), np.uint8),
        "label": rng.integers(0, config.model.num_classes, num_examples, np.int32),
    }
    if steps is not None:
        arrays["number"] = np.arange(num_examples, dtype=np.uint32)
    model = run.build_model(config)
    schedule, tx = run.build_optimizer(config)
    kinds = dict(ema=bool(config.optimizer.ema_decay), skips=config.nan_policy == "skip")
    abstract = train_state.abstract_state(model, tx, size, mesh, **kinds)
    state = train_state.init_state(model, tx, size, mesh, config.seed, **kinds)
    kept = resident.Examples(arrays, steps, "")
    start = time.perf_counter()
    source = stepping.open_resident(config, kept, (model, schedule, tx, abstract))
    seconds = time.perf_counter() - start
    return Loop(source, state, devices=mesh.size, seconds=seconds)
