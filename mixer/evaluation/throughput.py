"""Inference throughput of a model on these devices, and the cost of a run's training."""

import collections
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from mixer import formatting, memory
from mixer.errors import check_number
from mixer.evaluation.tables import Table
from mixer.models import layers
from mixer.models.modules import check_image_size
from mixer.models.registry import architecture_of, dimensions, option_values
from mixer.parallel import sharding
from mixer.training.step import make_predict

BATCH_SIZES = (1, 8, 64, 512)  # images per device
WINDOWS = 5  # number of time windows; each gives one measurement of the rate
MAX_CALLS_IN_FLIGHT = 2
# Images per second per TPUv3 core in inference at PUBLISHED_SIZE: table 3 of the paper.
PUBLISHED_RATES = {
    "S/32": 11489,
    "S/16": 3994,
    "B/32": 4208,
    "B/16": 1384,
    "L/32": 1314,
    "L/16": 419,
    "H/14": 194,
}
PUBLISHED_SIZE = (224, 224)


def measure(
    model: nn.Module,
    params: Any,
    image_size: tuple[int, int],
    *,
    batch_sizes: Sequence[int],
    mesh: Mesh,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Measures images per second, from uint8 pixels on the devices to logits.

    The measurement excludes reading, decoding and transfer of images, and compilation; the program
    runs twice before the first window. Two batches are in flight, so that no device waits for the
    host; every window ends when all its results are ready. Each process has its own clock.

    Args:
      model: the model.
      params: its parameters, on every device of the mesh.
      image_size: (H, W).
      batch_sizes: images per device; the global batch is this times the devices along "data".
      mesh: mesh of the devices.
      seconds: duration for each batch size, divided into WINDOWS windows.

    Returns:
      The result as JSON: "image_size", (H, W); "dtype" of the computation; "device", the kind of
      the devices; "devices", their number; "variant" of the model, or None; "published", the
      paper's rate, or None; and "rates", for each batch size in images/s of one device:
      "images_per_second", the median over the windows, and "low" and "high", the rates of the
      slowest and the fastest window. All three are None if the batch does not fit into memory.

    Raises:
      UserError: a batch size is below 1, or the patch size does not divide the image size.
    """
    check_image_size(image_size, model.patch_size)
    for batch_size in batch_sizes:
        check_number("batch_size", batch_size, minimum=1, integer=True)
    predict = jax.jit(
        make_predict(model, mesh),
        out_shardings=sharding.batch_sharding(mesh),
        compiler_options=layers.compiler_options(jax.default_backend()),
    )
    rates = []
    for batch_size in batch_sizes:
        shape = (batch_size * sharding.batch_shards(mesh), *image_size, model.in_channels)
        try:
            windows = _windows(predict, params, shape, mesh, seconds)
        except (memory.NoRoomError, jax.errors.JaxRuntimeError) as error:
            is_full = isinstance(error, memory.NoRoomError) or "RESOURCE_EXHAUSTED" in str(error)
            if not is_full:
                raise
            windows = []
        device_rates = [rate / mesh.size for rate in windows]
        rates.append(
            {
                "batch_size": batch_size,
                "images_per_second": statistics.median(device_rates) if device_rates else None,
                "low": min(device_rates, default=None),
                "high": max(device_rates, default=None),
            }
        )
    architecture = architecture_of(model)
    variants = architecture.variants
    variant = next((name for name in variants if variants[name] == dimensions(model)), None)
    is_in_paper = (
        architecture.name == "mixer" and option_values(model) == architecture.default_options
    )
    return {
        "image_size": tuple(image_size),
        "dtype": model.dtype,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "rates": rates,
        "variant": variant,
        "published": published_rate(variant, image_size) if is_in_paper else None,
    }


def published_rate(variant: str | None, image_size: tuple[int, int]) -> int | None:
    """Returns the paper's images/s of a Mixer per TPUv3 core; None if the paper has no rate."""
    return PUBLISHED_RATES.get(variant) if tuple(image_size) == PUBLISHED_SIZE else None


def _windows(
    predict: Callable, params: Any, shape: tuple[int, ...], mesh: Mesh, seconds: float
) -> list[float]:
    """Measures images per second of all devices together in each window."""
    batch_sharding = sharding.batch_sharding(mesh)
    abstract = jax.ShapeDtypeStruct(shape, "uint8", sharding=batch_sharding)
    description = f"a batch of {shape[0]:,} images"
    memory.check_room(math.prod(shape), description)  # the compiler can crash on absurd shapes
    compiled = predict.lower(params, abstract).compile()
    analysis = compiled.memory_analysis()
    if analysis is not None:  # some backends have no memory analysis
        sizes = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        memory.check_room(sizes + math.prod(shape), description)
    images = jax.jit(functools.partial(_pixels, shape), out_shardings=batch_sharding)()

    def call() -> jax.Array:
        return compiled(params, images)

    for _ in range(2):
        jax.block_until_ready(call())
    windows = [run_for(call, seconds / WINDOWS) for _ in range(WINDOWS)]
    return [calls * shape[0] / duration for calls, duration in windows]


def run_for(call: Callable[[], Any], seconds: float) -> tuple[int, float]:
    """Calls a function repeatedly, at least once, with at most MAX_CALLS_IN_FLIGHT calls in flight.

    Args:
      call: function that starts a computation and returns its arrays.
      seconds: time after which no further call is made.

    Returns:
      The number of calls, and the seconds until all their results are ready.
    """
    in_flight: collections.deque[Any] = collections.deque()
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        in_flight.append(call())
        calls += 1
        if len(in_flight) > MAX_CALLS_IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
    jax.block_until_ready(list(in_flight))
    return calls, time.perf_counter() - start


def _pixels(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(jax.random.key(0), shape, "uint8")


def make_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Makes a table with a row per batch size from results of `measure` by name."""
    rows = []
    for name, summary in summaries.items():
        height, width = summary["image_size"]
        model = f"{name}, {height} x {width}, {summary['dtype']}"
        devices = f"{summary['devices']} x {summary['device']}"
        paper_rate = summary["published"]
        paper_text = "" if paper_rate is None else f"{paper_rate:,} ({summary['variant']})"
        for rate in summary["rates"]:
            figures = "does not fit into memory", ""
            if rate["images_per_second"] is not None:
                low_to_high = f"{_number(rate['low'])} to {_number(rate['high'])}"
                figures = _number(rate["images_per_second"]), low_to_high
            rows.append((model, f"{rate['batch_size']:,}", *figures, devices, paper_text))
    header = "throughput", "batch per device", "images/s per device", "lowest to highest", "devices"
    return Table((*header, "paper, TPUv3 core"), rows)


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def core_hours(
    rows: Sequence[Mapping[str, float]], global_batch_size: int
) -> dict[str, Any] | None:
    """Computes the cost of a run's training from its metrics.jsonl.

    Each log step has the rate since the previous log step, of all devices and per device; their
    ratio is the number of devices. The cost is therefore also correct for a run that was resumed on
    other devices. If a run is resumed, the updates between its last log step and the checkpoint
    count at the rate of the next log step.

    Args:
      rows: rows that `run_files.read_metrics` returns.
      global_batch_size: global batch size of the run.

    Returns:
      The cost as JSON: "images", the number of training images, repeats included; "seconds" of
      training, excluding evaluation, checkpoints, start-up, compilation and updates that were lost
      when the run was killed; "devices", the smallest and the largest number of devices in use;
      "device_hours" and "device_days", sums of devices times duration: on TPUv3 cores, the latter
      are the paper's core-days. None if the log has no rates.
    """
    seconds = device_seconds = 0.0
    last_step, counts = 0, []
    for row in rows:
        rate = row.get("perf/images_per_second", 0)
        rate_per_device = row.get("perf/images_per_second_per_device", 0)
        if rate <= 0 or rate_per_device <= 0:
            continue
        counts.append(round(rate / rate_per_device))
        duration = (row["step"] - last_step) * global_batch_size / rate
        seconds += duration
        device_seconds += duration * counts[-1]
        last_step = row["step"]
    if not counts:
        return None
    return {
        "images": last_step * global_batch_size,
        "seconds": seconds,
        "devices": (min(counts), max(counts)),
        "device_hours": device_seconds / 3600,
        "device_days": device_seconds / 86400,
    }


def cost_sentence(cost: Mapping[str, Any]) -> str:
    """Formats the result of `core_hours` as a sentence."""
    low, high = cost["devices"]
    devices = f"{low} device{'s' * (low > 1)}" if low == high else f"{low} to {high} devices"
    return (
        f"Training: {cost['images']:,} images in {formatting.duration(cost['seconds'])} on "
        f"{devices}, without evaluations and checkpoints: {cost['device_hours']:.3g} "
        f"device-hours ({cost['device_days']:.3g} device-days; the paper reports core-days of "
        "TPUv3)."
    )
