"""What the input pipeline delivers on this host, on photographs made here."""

import dataclasses
import functools
import io
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

from mixer.data.preprocessing import device as augment
from mixer.data.preprocessing.spec import parse
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.models import flops
from mixer.parallel import sharding
from mixer.tools.benchmark import contest, jax_side, report
from mixer.training import program

PHOTOGRAPHS = 1024  # 110 MB, so that disk and page cache play no part
PHOTOGRAPH_BYTES = 110_000  # ImageNet's mean
PHOTOGRAPH_SIZE = (375, 500)  # its usual one
SMALL = 64  # pixels; sets of such images are stored at their size
HOST_PART = "training, host's steps"
DEVICE_PART = "training, device's steps"
DECODING = "decoding alone"
STEP = "training step"


class Stream:
    """Batches of a pipeline as a contestant of `mixer.tools.benchmark.contest`."""

    devices, compile_seconds, memory = 1, 0.0, None

    def __init__(self, batches: Iterator[Any], busy: list[float]):
        """Fills the pipeline's buffers.

        Args:
          batches: of the pipeline.
          busy: gets the number of cores that were busy, turn by turn.
        """
        self._batches, self._busy = batches, busy
        for _ in itertools.islice(batches, 2):
            pass

    def run(self, seconds: float) -> tuple[int, float]:
        """As `Contestant.run`; batches that were ready or begun before do not count."""
        next(self._batches)
        next(self._batches)
        start, used, count = time.perf_counter(), time.process_time(), 0
        while count == 0 or time.perf_counter() - start < seconds:
            next(self._batches)
            count += 1
        passed = time.perf_counter() - start
        self._busy.append((time.process_time() - used) / passed)
        return count, passed

    def close(self) -> None:
        """Ends the pipeline's threads."""
        del self._batches


def preprocessings(train: str, evaluation: str) -> dict[str, str]:
    """Names and steps of what `measure_rates` measures.

    HOST_PART is among them where the device can take the last steps of the training's, and
    "evaluation" where the config has steps for it.
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
    """Measures the input pipeline of a config beside its training step.

    Args:
      config: of the run, resolved but for its lengths.
      batch_size: images a device and training step.
      step_rate: images/s that a device trains on; None: it is measured.
      seconds: of a turn.
      rounds: turns of each contestant.
      output: file of JSON; None: none.

    Raises:
      UserError: the config has no preprocessing.
    """
    dataset = config.dataset
    if not dataset.train_preprocess:
        raise UserError("dataset.train_preprocess is empty; expected the steps to measure")
    config.model.num_classes = config.model.num_classes or 1000
    model = program.build_model(config)
    specs = preprocessings(dataset.train_preprocess, dataset.eval_preprocess)
    record = report.Record("input", output)
    for name, spec in specs.items():
        record.say(f"{name}: {spec}")
    figures = measure_rates(
        specs,
        config.image_size,
        training_step(model, config.image_size, batch_size) if step_rate is None else None,
        device_part(dataset.train_preprocess, config.image_size, batch_size),
        batch_size=256,
        step_batch_size=batch_size,
        seconds=seconds,
        rounds=rounds,
        say=record.say,
    )
    _show_rates(record, figures)
    measured = figures["step_per_device"]
    if step_rate is None and measured is None:
        record.say(f"the training step: {figures['step_failure']}")
    else:
        source = "given" if measured is None else "measured"
        rate = step_rate if measured is None else measured["median"]
        evaluation = evaluation_rate(model, config.image_size, rate)
        needs = _needs(figures, specs, (rate, source), evaluation)
        figures["feeds"] = _show_feeds(record, figures["images_per_second"], needs)
    record.write(figures)


def _show_rates(record: report.Record, figures: dict[str, Any]) -> None:
    table = report.make_table(
        record.console, "", "images/s", "lowest to highest", "of decoding", "cores busy"
    )
    rates = figures["images_per_second"]
    for name, rate in rates.items():
        table.add_row(
            name,
            report.number(rate["median"]),
            f"{report.number(rate['lowest'])} to {report.number(rate['highest'])}",
            f"{rate['median'] / rates[DECODING]['median']:.1%}",
            f"{figures['cores_busy'][name]:.2f}",
        )
    record.console.print(table)
    if rate := figures["device_part_per_device"]:
        record.say(
            f"{DEVICE_PART}: {report.number(rate['median'])} images/s on a device "
            f"({report.number(rate['lowest'])} to {report.number(rate['highest'])})"
        )
    elif figures.get("device_part_failure"):
        record.say(f"{DEVICE_PART}: {figures['device_part_failure']}")
    start, end = figures["memory_gib"]
    record.say(f"memory {start:.2f} GiB at the start, {end:.2f} at the end")


def _needs(
    figures: dict[str, Any], specs: dict[str, str], step: tuple[float, str], evaluation: float
) -> dict[str, tuple[float, str]]:
    """Images/s that a device takes of each preprocessing, and where the number comes from."""
    rate, source = step
    needs = {name: step for name in specs}
    if HOST_PART in needs and (device := figures["device_part_per_device"]):
        both = 1 / (1 / rate + 1 / device["median"])  # one after the other
        needs[HOST_PART] = both, f"{source}, with its own steps"
    if "evaluation" in needs:
        needs["evaluation"] = evaluation, "estimated by FLOPs"
    return needs


def _show_feeds(
    record: report.Record, rates: dict[str, Any], needs: dict[str, tuple[float, str]]
) -> dict[str, Any]:
    """Says for how many devices each preprocessing suffices; returns the figures."""
    devices, figures = jax.local_device_count(), {}
    for name, (needed, source) in needs.items():
        feeds = sufficiency(rates[name]["median"], needed, devices)
        figures[name] = feeds | {"images_per_second_per_device": needed}
        wait = feeds["wait_share"]
        record.say(
            f"{name}: feeds {feeds['devices']:.3g} devices at {report.number(needed)} images/s "
            f"each ({source}); the {devices} of this host would "
            + (f"wait {wait:.0%} of the time" if wait else "not wait")
        )
    return figures


def measure_rates(
    specs: dict[str, str],
    image_size: int,
    step: Callable[[], contest.Contestant] | None,
    device_part: Callable[[], contest.Contestant] | None,
    *,
    batch_size: int,
    step_batch_size: int,
    seconds: float,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Has preprocessings take turns with decoding alone, and with the training step.

    Decoding alone reads and decodes the same windows of the same files as "training".

    Args:
      specs: preprocessings by name; "training" is the config's.
      image_size: side in pixels that they end with.
      step: makes a training step; None leaves it out.
      device_part: makes the device's share of the preprocessing; None leaves it out.
      batch_size: images a batch of the input.
      step_batch_size: images a device and step.
      seconds: of a turn.
      rounds: how many turns each has.
      say: is told what the photographs are.

    Returns:
      Images/s of each, as JSON has it ("step_per_device": of the step, "device_part_per_device"),
      and the memory in GiB.
    """
    from mixer.data.sources import folder
    from mixer.data.sources import stored as sources
    from mixer.data.stored_split import make_split

    size = (image_size, image_size)
    with tempfile.TemporaryDirectory(prefix="mixer_benchmark_") as root:
        stored = PHOTOGRAPH_SIZE if image_size > SMALL else size
        mean_bytes = write_photographs(Path(root) / "train" / "photograph", stored)
        photographs = folder.scan(root)
        source = sources.folder_source(photographs, "train", photographs.class_names, ())
        say(
            f"{PHOTOGRAPHS} photographs of {stored[1]} x {stored[0]}, "
            f"{mean_bytes / 1000:.3g} kB on average, {os.cpu_count()} cores"
        )

        splits = {name: make_split(source, spec, image_size=size) for name, spec in specs.items()}
        decoding = decoding_alone(specs["training"])
        splits[DECODING] = dataclasses.replace(splits["training"], function=decoding)
        busy: dict[str, list[float]] = {name: [] for name in splits}
        makers: dict[str, Callable[[], contest.Contestant]] = {
            name: functools.partial(_open_stream, split, batch_size, busy[name])
            for name, split in splits.items()
        }
        makers |= {name: make for name, make in ((STEP, step), (DEVICE_PART, device_part)) if make}
        memory = [_memory()]
        results = contest.compete(makers, seconds=seconds, rounds=rounds)
        memory.append(_memory())
    figures: dict[str, Any] = {
        "images_per_second": {name: contest.rates(results[name], batch_size) for name in splits},
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
            figures[f"{key}_per_device"] = contest.rates(results[name], step_batch_size)
            figures[f"{key}_failure"] = results[name].failure
    return figures


def _open_stream(split: Split, batch_size: int, busy: list[float]) -> Stream:
    batches = split.train_batches(
        start_step=0, seed=0, global_batch_size=batch_size, process_index=0, process_count=1
    )
    return Stream(batches, busy)


def device_part(
    spec: str, image_size: int, batch_size: int
) -> Callable[[], contest.Contestant] | None:
    """A function that makes the contestant that takes the last steps of `spec` on one device.

    None where a device could take none. Its images are of the size that the steps end with.
    """
    parsed = parse(spec)
    if not parsed.parts.device:
        return None
    steps = augment.make_augment(parsed, (image_size, image_size))

    @jax_side.may_fail
    def prepare() -> contest.Contestant:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8)
        keys = rng.integers(0, 1 << 32, (batch_size, 4), np.uint32)
        images, keys = jax.device_put((images, keys), jax.local_devices()[0])
        program, seconds, size = jax_side.compile_for(jax.jit(steps), images, keys)
        return jax_side.Program(
            lambda: program(images, keys), devices=1, compile_seconds=seconds, memory=size
        )

    return prepare


def training_step(model: nn.Module, image_size: int, batch_size: int) -> Callable[[], Any]:
    """A function that makes the contestant that trains a model, on all devices at once.

    Args:
      model: of the config.
      image_size: side in pixels.
      batch_size: images a device.
    """
    dimensions = {name: getattr(model, name) for name in contest.CIFAR}
    case = contest.Case(
        what="train",
        model="",
        dimensions=dimensions,
        image_size=image_size,
        num_classes=model.num_classes,
        batch_size=batch_size,
        dtype=model.dtype,
        gelu=model.gelu,
    )
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    return lambda: jax_side.prepare_train("ours", case, mesh)


def sufficiency(input_rate: float, step_rate: float, devices: int) -> dict[str, float]:
    """For how many devices an input suffices.

    Args:
      input_rate: images/s that it delivers.
      step_rate: images/s that a device trains on or predicts.
      devices: of this host.

    Returns:
      "devices": so many are fed; "wait_share": of a step's time that this host's would wait.
    """
    fed = input_rate / step_rate
    return {"devices": fed, "wait_share": max(0.0, 1 - fed / devices)}


def evaluation_rate(model: nn.Module, image_size: int, step_rate: float) -> float:
    """Images/s of a device in evaluation, estimated: the training step's FLOP/s, forward alone."""
    size = (image_size, image_size)
    return step_rate * flops.train_flops(model, size) / flops.forward_flops(model, size)


def decoding_alone(spec: str) -> Callable:
    """As `make_preprocess(spec, ...)`, but it stops after decoding; only the shape comes out."""
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


def write_photographs(directory: Path, size: tuple[int, int] = PHOTOGRAPH_SIZE) -> float:
    """Writes JPEGs of a size (H, W), random windows of scikit-learn's two photographs.

    Those of PHOTOGRAPH_SIZE have a quality such that they have ImageNet's mean size, others 95.

    Returns:
      Mean size in bytes.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images  # 427 x 640
    rng = np.random.default_rng(0)
    height, width = size

    def encode(quality: int) -> list[bytes]:
        files = []
        for picture in windows:
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=quality)
            files.append(encoded.getvalue())
        return files

    def window(number: int) -> Image.Image:
        top, left = rng.integers(427 - height + 1), rng.integers(640 - width + 1)
        pixels = photographs[number % 2][top : top + height, left : left + width]
        return Image.fromarray(pixels[:, :: rng.choice((-1, 1))])

    quality = 95
    if size == PHOTOGRAPH_SIZE:
        windows = [window(number) for number in range(16)]
        quality = min(
            range(80, 100), key=lambda q: abs(np.mean([*map(len, encode(q))]) - PHOTOGRAPH_BYTES)
        )
    windows = [window(number) for number in range(PHOTOGRAPHS)]
    directory.mkdir(parents=True)
    files = encode(quality)
    for number, content in enumerate(files):
        (directory / f"{number:04}.jpg").write_bytes(content)
    return float(np.mean([len(content) for content in files]))
