"""Measures training on device-resident images with a config, without creating a run."""

import datetime
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mixer import memory, sizes
from mixer.data import resident
from mixer.data.host_or_device import place
from mixer.data.preprocessing.device import make_augment
from mixer.data.preprocessing.spec import Specification, parse
from mixer.errors import UserError
from mixer.models import flops
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.benchmark import limit, report, turns
from mixer.tools.benchmark.jax_side import convert_device_errors, memory_of
from mixer.training import program
from mixer.training import updates as stepping

WARM_UP_CALLS = 12  # calls in which the number of updates per call grows


class Loop:
    """A program (see turns.py) whose step is an update of the global batch."""

    def __init__(self, updates: stepping.Updates, state: Any, *, devices: int, seconds: float):
        """Warms the loop up; `seconds` is the compile time."""
        self._updates, self._state, self._step = updates, state, 0
        self.devices, self.compile_seconds = devices, seconds
        self.memory = memory_of(updates.compiled)
        for _ in range(WARM_UP_CALLS):
            self.run(0.0)

    @convert_device_errors()
    def run(self, seconds: float) -> tuple[int, float]:
        """Runs updates as `Program.run` specifies, with two calls in flight as in training."""
        first_step, start = self._step, time.perf_counter()
        while self._step == first_step or time.perf_counter() - start < seconds:
            call_time = time.perf_counter()
            count, update = self._updates.next(self._step, stepping.MAX_STEPS)
            self._state, metrics = update(self._state)
            self._step += count
            self._updates.sent(metrics["loss"], count, call_time)
        self._updates.drain()
        return self._step - first_step, time.perf_counter() - start

    def close(self) -> None:
        """Releases the arrays."""
        del self._updates, self._state


def measure(
    config: ConfigDict, *, num_examples: int, seconds: float, rounds: int, output: str | None
) -> None:
    """Measures the training of a config on device-resident images.

    Args:
      config: config of the run; its lengths are not resolved yet.
      num_examples: images on the device, of the config's size.
      seconds: duration of a turn.
      rounds: turns of the loop and of the matmul.
      output: JSON file; None: do not write a file.
    """
    run.resolve_data(config, 10, num_examples)
    model = program.build_model(config)
    record = report.Record("loop", output)
    makers: dict[str, Callable[[], turns.Program]] = {"loop": lambda: prepare(config, num_examples)}
    with record.console.status("") as status:
        results = turns.take_turns(
            makers | limit.makers(model.dtype), seconds=seconds, rounds=rounds, say=status.update
        )
    matmul = limit.take_figures(results)
    per_image = flops.train_flops(model, sizes.pair(config.image_size))
    images = config.global_batch_size / results["loop"].devices
    loop = turns.as_json(results["loop"], images, per_image, matmul["limit"])
    figures = {
        "matmul": matmul,
        "flops_per_image": per_image,
        "contestants": {"loop": loop},
        "ours_is_times": {},
        "total_steps": config.total_steps,
    }
    record.console.say(
        f"training, {model.dtype}, {num_examples:,} images of {sizes.text(config.image_size)} px "
        f"on the device, batches of {config.global_batch_size}, {config.dataset.train_preprocess}"
    )
    record.show(figures)
    if "failure" not in loop:
        duration = datetime.timedelta(
            seconds=round(config.total_steps * loop["seconds_per_step"]["median"])
        )
        record.console.say(
            f"the run's {config.total_steps:,} updates take {duration} at this rate, without "
            "evaluation and checkpoints"
        )
    record.write(figures)


@convert_device_errors()
def prepare(config: ConfigDict, num_examples: int) -> Loop:
    """Prepares the training loop of a config on random images.

    Args:
      config: resolved config of the run.
      num_examples: images on the device, of the config's size.

    Raises:
      UserError: the images cannot stay on the device.
      ProgramError: the loop does not fit into memory.
    """
    dataset, size = config.dataset, sizes.pair(config.image_size)
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
    shape = (num_examples, *size, config.model.in_channels)
    memory.check_room(math.prod(shape), f"{num_examples:,} images")
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, config.model.num_classes, num_examples, np.int32),
    }
    if steps is not None:
        arrays["number"] = np.arange(num_examples, dtype=np.uint32)
    train_program = program.make_program(config, mesh)
    state = train_program.init_state()
    examples = resident.Examples(arrays, steps, "")
    start = time.perf_counter()
    updates = stepping.make_resident(config, examples, train_program)
    seconds = time.perf_counter() - start
    return Loop(updates, state, devices=mesh.size, seconds=seconds)
