"""Measures the input pipeline on this host, on generated photographs."""

import dataclasses
import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import psutil
from ml_collections import ConfigDict

from mixer import sizes
from mixer.console import Console
from mixer.data.order import Reading
from mixer.data.preprocessing import device as augment
from mixer.data.preprocessing.spec import parse
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation.tables import Table, print_table
from mixer.models import flops
from mixer.models.registry import architecture_of, dimensions, option_values
from mixer.parallel import sharding
from mixer.tools.benchmark import cases, jax_side, photographs, report, turns
from mixer.training import program

BATCH_SIZE = 256  # images per batch of the input
HOST_PART = "training, host's steps"
DEVICE_PART = "training, device's steps"
DECODING = "decoding alone"
STEP = "training step"


class Stream:
    """A program (see turns.py) that reads batches of a pipeline."""

    devices, compile_seconds, memory = 1, 0.0, None

    def __init__(self, batches: Iterator[Any], busy: list[float]):
        """Fills the pipeline's buffers.

        Args:
          batches: batches of the pipeline.
          busy: list to which each turn appends the number of busy cores.
        """
        self._batches, self._busy = batches, busy
        for _ in itertools.islice(batches, 2):
            pass

    def run(self, seconds: float) -> tuple[int, float]:
        """Runs as `Program.run` specifies; batches in the buffers are not timed."""
        next(self._batches)
        next(self._batches)
        start, cpu_start, count = time.perf_counter(), time.process_time(), 0
        while count == 0 or time.perf_counter() - start < seconds:
            next(self._batches)
            count += 1
        duration = time.perf_counter() - start
        self._busy.append((time.process_time() - cpu_start) / duration)
        return count, duration

    def close(self) -> None:
        """Stops the threads of the pipeline."""
        del self._batches


def preprocessings(train: str, evaluation: str) -> dict[str, str]:
    """Returns the preprocessing that `measure_rates` measures, by name.

    The result has HOST_PART if the device can run the last ops of the training preprocessing, and
    "evaluation" if the config has evaluation preprocessing.
    """
    specs = {"training": train}
    parts = parse(train).parts
    if parts.device:
        specs[HOST_PART] = str(parts.host)
    return specs | ({"evaluation": evaluation} if evaluation else {})


def measure(
    config: ConfigDict,
    *,
    batch_size: int,
    step_rate: float | None,
    seconds: float,
    rounds: int,
    output: str | None,
) -> None:
    """Measures the input pipeline of a config and compares it with the training step.

    Args:
      config: config of the run; its lengths are not resolved yet.
      batch_size: images per device and training step.
      step_rate: images/s of a device in training; None: measure it.
      seconds: duration of a turn.
      rounds: turns of each program.
      output: JSON file; None: do not write a file.

    Raises:
      UserError: the config has no preprocessing.
    """
    dataset = config.dataset
    if not dataset.train_preprocess:
        raise UserError("dataset.train_preprocess is empty; expected the ops to measure")
    config.model.num_classes = config.model.num_classes or 1000
    model = program.build_model(config)
    specs = preprocessings(dataset.train_preprocess, dataset.eval_preprocess)
    record = report.Record("input", output)
    for name, spec in specs.items():
        record.console.say(f"{name}: {spec}")
    on_device: dict[str, Callable[[], turns.Program]] = {}
    if step_rate is None:
        on_device[STEP] = functools.partial(training_step, model, config.image_size, batch_size)
    if HOST_PART in specs:
        on_device[DEVICE_PART] = functools.partial(
            device_part, dataset.train_preprocess, config.image_size, batch_size
        )
    figures = measure_rates(
        specs,
        config.image_size,
        on_device,
        step_batch_size=batch_size,
        seconds=seconds,
        rounds=rounds,
        say=record.console.say,
    )
    _show_rates(record.console, figures)
    if failure := figures.get("step_failure"):
        record.console.say(f"the training step: {failure}")
    else:
        measured_rate = figures["step_per_device"]
        step = (measured_rate["median"], "measured") if measured_rate else (step_rate, "given")
        evaluation = evaluation_rate(model, config.image_size, step[0])
        figures["feeds"] = _show_feeds(record.console, figures, step, evaluation)
    record.write(figures)


def _show_rates(console: Console, figures: dict[str, Any]) -> None:
    rates = figures["images_per_second"]
    rows = [
        (
            name,
            report.number(rate["median"]),
            report.span(rate),
            f"{rate['median'] / rates[DECODING]['median']:.1%}",
            f"{figures['cores_busy'][name]:.2f}",
        )
        for name, rate in rates.items()
    ]
    header = ("", "images/s", "lowest to highest", "share of decoding rate", "cores busy")
    print_table(console, Table(header, rows))
    if rate := figures["device_part_per_device"]:
        console.say(
            f"{DEVICE_PART}: {report.number(rate['median'])} images/s per device "
            f"({report.span(rate)})"
        )
    elif failure := figures.get("device_part_failure"):
        console.say(f"{DEVICE_PART}: {failure}")
    start, end = figures["memory_gib"]
    console.say(f"memory {start:.2f} GiB at the start, {end:.2f} at the end")


def _show_feeds(
    console: Console, figures: dict[str, Any], step: tuple[float, str], evaluation: float
) -> dict[str, Any]:
    """Prints how many devices each preprocessing can feed; returns the results.

    Args:
      console: console of the lines.
      figures: the result of `measure_rates`.
      step: images/s of a device in training, and the source of this rate.
      evaluation: images/s of a device in evaluation.
    """
    num_devices, feeds = jax.local_device_count(), {}
    for name in figures["preprocess"]:
        demand, source = step
        if name == "evaluation":
            demand, source = evaluation, "estimated from FLOPs"
        elif name == HOST_PART and (device_part := figures["device_part_per_device"]):
            # The device runs its preprocessing and the training step one after the other.
            demand = 1 / (1 / demand + 1 / device_part["median"])
            source += ", including the device's steps"
        result = sufficiency(figures["images_per_second"][name]["median"], demand, num_devices)
        feeds[name] = result | {"images_per_second_per_device": demand}
        wait = result["wait_share"]
        console.say(
            f"{name}: feeds {result['devices']:.3g} devices at {report.number(demand)} images/s "
            f"each ({source}); the {num_devices} of this host would "
            + (f"wait {wait:.0%} of the time" if wait else "not wait")
        )
    return feeds


def measure_rates(
    specs: dict[str, str],
    image_size: sizes.Size,
    on_device: dict[str, Callable[[], turns.Program]],
    *,
    step_batch_size: int,
    seconds: float,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures preprocessing, in turns with decoding alone and with programs on the devices.

    Decoding alone reads and decodes the same crop windows of the same files as "training".

    Args:
      specs: preprocessing by name; "training" is the config's.
      image_size: size in pixels after the preprocessing.
      on_device: functions that make STEP and DEVICE_PART, as far as they are measured.
      step_batch_size: images per device and step.
      seconds: duration of a turn.
      rounds: turns of each program.
      say: prints a line that describes the photographs.

    Returns:
      Images/s of each program as JSON (for the step "step_per_device", for the device's part
      "device_part_per_device"), and the memory in GiB.
    """
    from mixer.data.sources import folder
    from mixer.data.sources import stored as sources
    from mixer.data.stored_split import make_split

    size = sizes.pair(image_size)
    with tempfile.TemporaryDirectory(prefix="mixer_benchmark_") as root:
        stored = photographs.size_for(image_size)
        mean_bytes = photographs.write(Path(root) / "train" / "photograph", stored)
        scan = folder.scan(root)
        source = sources.folder_source(scan, "train", scan.class_names, ())
        say(
            f"{photographs.COUNT} photographs of {stored[1]} x {stored[0]}, "
            f"{mean_bytes / 1000:.3g} kB on average, {os.cpu_count()} cores"
        )

        splits = {name: make_split(source, spec, image_size=size) for name, spec in specs.items()}
        decoding = decoding_alone(specs["training"])
        splits[DECODING] = dataclasses.replace(splits["training"], function=decoding)
        busy: dict[str, list[float]] = {name: [] for name in splits}
        makers: dict[str, Callable[[], turns.Program]] = {
            name: functools.partial(_open_stream, split, busy[name])
            for name, split in splits.items()
        }
        memory = [_memory()]
        results = turns.take_turns(makers | on_device, seconds=seconds, rounds=rounds)
        memory.append(_memory())
    figures: dict[str, Any] = {
        "images_per_second": {name: turns.rates(results[name], BATCH_SIZE) for name in splits},
        "preprocess": specs,
        "photograph_bytes": mean_bytes,
        "cores": os.cpu_count(),
        "cores_busy": {name: statistics.median(cores) for name, cores in busy.items()},
        "memory_gib": memory,
        "step_per_device": None,
        "device_part_per_device": None,
    }
    for name, key in ((STEP, "step"), (DEVICE_PART, "device_part")):
        if name in results:
            figures[f"{key}_per_device"] = turns.rates(results[name], step_batch_size)
            figures[f"{key}_failure"] = results[name].failure
    return figures


def _open_stream(split: Split, busy: list[float]) -> Stream:
    return Stream(split.train_batches(0, Reading(seed=0, global_batch_size=BATCH_SIZE)), busy)


@jax_side.convert_device_errors()
def device_part(spec: str, image_size: sizes.Size, batch_size: int) -> jax_side.JaxProgram:
    """Prepares the ops of `spec` that a device can compute, on one device.

    The images already have the final size.
    """
    parsed, size = parse(spec), sizes.pair(image_size)
    ops = augment.make_augment(parsed, size)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, *size, parsed.channels), np.uint8)
    keys = rng.integers(0, 1 << 32, (batch_size, 4), np.uint32)
    images, keys = jax.device_put((images, keys), jax.local_devices()[0])
    return jax_side.compile_call(jax.jit(ops), images, keys, devices=1)


def training_step(model: nn.Module, image_size: sizes.Size, batch_size: int) -> jax_side.JaxProgram:
    """Prepares the training of a model on all devices.

    Args:
      model: model of the config.
      image_size: size in pixels.
      batch_size: images per device.
    """
    case = cases.Case(
        measurement="train",
        model="",
        dimensions={
            "name": architecture_of(model).name,
            "in_channels": model.in_channels,
            **dimensions(model),
            **option_values(model),
        },
        image_size=image_size,
        num_classes=model.num_classes,
        batch_size=batch_size,
        dtype=model.dtype,
        gelu=model.gelu,
    )
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    return jax_side.prepare_train("ours", case, mesh)


def sufficiency(input_rate: float, step_rate: float, devices: int) -> dict[str, float]:
    """Computes how many devices an input pipeline can feed.

    Args:
      input_rate: images/s of the input pipeline.
      step_rate: images/s of a device in training or inference.
      devices: number of devices of this host.

    Returns:
      "devices": the number of devices that the pipeline can feed; "wait_share": the share of time
      that the devices of this host wait for it.
    """
    num_fed = input_rate / step_rate
    return {"devices": num_fed, "wait_share": max(0.0, 1 - num_fed / devices)}


def evaluation_rate(model: nn.Module, image_size: sizes.Size, step_rate: float) -> float:
    """Estimates images/s of a device in evaluation: forward pass at the FLOP/s of training."""
    size = sizes.pair(image_size)
    return step_rate * flops.train_flops(model, size) / flops.forward_flops(model, size)


def decoding_alone(spec: str) -> Callable:
    """Returns preprocessing that stops after decoding, and whose image is only the shape."""
    import tensorflow as tf

    from mixer.data.preprocessing import host as preprocess

    call = parse(spec).calls[0]
    options = {key: value for key, value in call.arguments.items() if key != "size"}

    def run(example, key):
        if call.op.name == "inception_crop":
            key = tf.random.experimental.stateless_fold_in(key, 0)
            pixels = preprocess.inception_window(example["image"], key, **options)
        else:
            pixels = preprocess.decode(example["image"], **options)
        return {"image": tf.shape(pixels)}

    return run


def _memory() -> float:
    return psutil.Process().memory_info().rss / 2**30
