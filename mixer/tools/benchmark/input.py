"""What the input pipeline delivers on this host, on photographs made here."""

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

from mixer.data.preprocessing import device as augment
from mixer.data.preprocessing import spec as steps_lib
from mixer.models import flops
from mixer.parallel import sharding
from mixer.tools.benchmark import contest, jax_side

PHOTOGRAPHS = 1024  # 110 MB, so that disk and page cache play no part
PHOTOGRAPH_BYTES = 110_000  # ImageNet's mean
PHOTOGRAPH_SIZE = (375, 500)  # its usual one
SMALL = 64  # pixels; sets of such images are stored at their size
HOST_PART = "training, host's steps"
DEVICE_PART = "training, device's steps"
DECODING = "decoding alone"
STEP = "training step"


class Stream:
    """Batches of a pipeline as a contestant of `mixer.tools.benchmark.contest`.

    Attributes:
      busy: cores that were busy in each turn.
    """

    devices, compile_seconds, memory = 1, 0.0, None

    def __init__(self, batches: Iterator[Any]):
        self._batches = batches
        self.busy: list[float] = []
        for _ in itertools.islice(batches, 2):  # buffers are filled
            pass

    def run(self, seconds: float) -> tuple[int, float]:
        """As `Contestant.run`; what lay ready, and what was begun before, is not counted."""
        next(self._batches)
        next(self._batches)
        start, used, count = time.perf_counter(), time.process_time(), 0
        while count == 0 or time.perf_counter() - start < seconds:
            next(self._batches)
            count += 1
        passed = time.perf_counter() - start
        self.busy.append((time.process_time() - used) / passed)
        return count, passed

    def close(self) -> None:
        """Ends the pipeline's threads."""
        del self._batches


def preprocessings(train: str, evaluation: str) -> dict[str, str]:
    """Names and steps of what `measure` measures.

    HOST_PART is among them where the device can take the last steps of the training's, and
    "evaluation" where the config has steps for it.
    """
    specs = {"training": train}
    parts = augment.split(train)
    if parts.device:
        specs[HOST_PART] = parts.host
    return specs | ({"evaluation": evaluation} if evaluation else {})


def measure(
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
    from mixer.data.preprocessing import host as preprocess
    from mixer.data.sources import folder
    from mixer.data.sources import stored as sources

    size = (image_size, image_size)
    steps = {name: preprocess.make_preprocess(spec, size) for name, spec in specs.items()}
    steps[DECODING] = decoding_alone(specs["training"])
    with tempfile.TemporaryDirectory(prefix="mixer_benchmark_") as root:
        stored = PHOTOGRAPH_SIZE if image_size > SMALL else size
        mean_bytes = write_photographs(Path(root) / "train" / "photograph", stored)
        photographs = folder.scan(root)
        source = sources.folder_source(photographs, "train", photographs.class_names, ())
        say(
            f"{PHOTOGRAPHS} photographs of {stored[1]} x {stored[0]}, "
            f"{mean_bytes / 1000:.3g} kB on average, {os.cpu_count()} cores"
        )

        streams: dict[str, Stream] = {}

        def open_stream(name: str) -> Stream:
            batches = sources.train_batches(
                source,
                steps[name],
                start_step=0,
                seed=0,
                global_batch_size=batch_size,
                group_size=1,
                process_index=0,
                process_count=1,
            )
            streams[name] = Stream(batches)
            return streams[name]

        prepare: dict[str, Callable[[], contest.Contestant]] = {
            name: lambda name=name: open_stream(name) for name in steps
        }
        prepare |= {name: make for name, make in ((STEP, step), (DEVICE_PART, device_part)) if make}
        memory = [_memory()]
        results = contest.compete(prepare, seconds=seconds, rounds=rounds)
        memory.append(_memory())
    figures: dict[str, Any] = {
        "images_per_second": {name: contest.rates(results[name], batch_size) for name in steps},
        "preprocess": specs,
        "photograph_bytes": mean_bytes,
        "cores": os.cpu_count(),
        "cores_busy": {name: statistics.median(stream.busy) for name, stream in streams.items()},
        "memory_gib": memory,
        "step_per_device": None,
        "device_part_per_device": None,
    }
    for name, key in ((STEP, "step"), (DEVICE_PART, "device_part")):
        if name in results:
            figures[f"{key}_per_device"] = contest.rates(results[name], step_batch_size)
            figures[f"{key}_failure"] = results[name].failure
    return figures


def device_part(
    spec: str, image_size: int, batch_size: int
) -> Callable[[], contest.Contestant] | None:
    """A function that makes the contestant that takes the last steps of `spec` on one device.

    None where a device could take none. Its images are of the size that the steps end with.
    """
    if augment.split(spec).device is None:
        return None
    steps = augment.make_augment(spec, (image_size, image_size))

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

    step = steps_lib.parse(spec)[0]
    options = {key: value for key, value in step.arguments.items() if key != "size"}

    def run(example, key):
        if step.name == "inception_crop":
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
