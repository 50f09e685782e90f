"""Measures how fast this machine is at what a run needs.

  python -m mixer.tools.benchmark data --config=configs/mixer_b16_i1k.py --seconds=60

`data`: images a second of the config's training preprocessing, on photographs of 500 x 375 pixels
made here, beside a loop that reads and decodes the same windows of the same files and does nothing
else. The two take turns; the table has medians, and memory at the start and at the end.
"""

import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from absl import flags

from mixer import cli
from mixer.errors import UserError

SECONDS = flags.DEFINE_integer("seconds", 60, "data: length of the measurement.", lower_bound=10)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "data: images a batch.", lower_bound=1)

PHOTOGRAPHS = 1024  # 110 MB, so that disk and page cache play no part
PHOTOGRAPH_BYTES = 110_000  # ImageNet's mean
ROUND_SECONDS = 10


def main(argv: list[str]) -> None:
    """Runs the measurement that the arguments name."""
    if argv[1:] != ["data"]:
        raise UserError(
            f"{' '.join(argv[1:]) or 'no measurement'}: expected `data --config=...`; see "
            "python -m mixer.tools.benchmark --help"
        )
    data(cli.config(), seconds=SECONDS.value, batch_size=BATCH_SIZE.value)


def data(config, *, seconds: int, batch_size: int) -> None:
    """Measures the training preprocessing of `config` and prints a table."""
    from rich.console import Console
    from rich.table import Table

    from mixer.data import folder, preprocess, sources

    spec = config.dataset.train_preprocess
    size = (config.image_size, config.image_size)
    contestants = {
        "preprocessing": preprocess.make_preprocess(spec, size),
        "decoding alone": decoding_alone(spec),
    }
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="mixer_benchmark_") as root:
        mean_bytes = write_photographs(Path(root) / "train" / "photograph")
        photographs = folder.scan(root)
        source = sources.folder_source(photographs, "train", photographs.class_names, ())

        def batches(steps) -> Iterator:
            return sources.train_batches(
                source,
                steps,
                start_step=0,
                seed=0,
                global_batch_size=batch_size,
                group_size=1,
                process_index=0,
                process_count=1,
            )

        console.print(
            f"{spec}: {PHOTOGRAPHS} photographs of 500 x 375, {mean_bytes / 1000:.0f} kB on "
            f"average, {os.cpu_count()} cores, {seconds} s"
        )
        streams = {name: batches(steps) for name, steps in contestants.items()}
        for stream in streams.values():
            for _ in itertools.islice(stream, 2):  # buffers are filled
                pass
        rates: dict[str, list[float]] = {name: [] for name in streams}
        busy: list[float] = []
        memory = [_memory()]
        order = list(streams)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name in order:
                rate, cores = _round(streams[name], batch_size)
                rates[name].append(rate)
                if name == "preprocessing":
                    busy.append(cores)
            order.reverse()
            memory.append(_memory())
        table = Table("", "images/s", "lowest to highest", "share")
        best = statistics.median(rates["decoding alone"])
        for name, values in rates.items():
            table.add_row(
                name,
                f"{statistics.median(values):.0f}",
                f"{min(values):.0f} to {max(values):.0f}",
                f"{statistics.median(values) / best:.1%}",
            )
        console.print(table)
        console.print(
            f"cores busy while preprocessing: {statistics.median(busy):.2f} of {os.cpu_count()}; "
            f"memory {memory[0]:.2f} GiB at the start, {memory[1]:.2f} after the first round, "
            f"{memory[-1]:.2f} at the end"
        )


def decoding_alone(spec: str):
    """As `make_preprocess(spec, ...)`, but it stops after decoding; only the shape comes out."""
    import tensorflow as tf

    from mixer.data import preprocess

    step, _, options = preprocess.parse_step(spec.split("|")[0], spec)
    options.pop("size", None)

    def run(example, key):
        if step is preprocess.inception_crop:
            key = tf.random.experimental.stateless_fold_in(key, 0)
            pixels = preprocess.inception_window(example["image"], key, **options)
        else:
            pixels = preprocess.decode(example["image"])
        return {"image": tf.shape(pixels)}

    return run


def _round(stream: Iterator, batch_size: int) -> tuple[float, float]:
    """Images a second and cores busy over a round of a stream."""
    next(stream)  # what lay ready, and what was begun before the other's round
    next(stream)
    start, used, count = time.perf_counter(), time.process_time(), 0
    while (seconds := time.perf_counter() - start) < ROUND_SECONDS:
        next(stream)
        count += batch_size
    return count / seconds, (time.process_time() - used) / seconds


def _memory() -> float:
    return psutil.Process().memory_info().rss / 2**30


def write_photographs(directory: Path) -> float:
    """Writes JPEGs of 500 x 375 pixels, random windows of scikit-learn's two photographs.

    Their quality is chosen so that they have ImageNet's mean size.

    Returns:
      Mean size in bytes.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images  # 427 x 640
    rng = np.random.default_rng(0)

    def encode(quality: int) -> list[bytes]:
        files = []
        for picture in windows:
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=quality)
            files.append(encoded.getvalue())
        return files

    def window(number: int) -> Image.Image:
        top, left = rng.integers(427 - 375 + 1), rng.integers(640 - 500 + 1)
        pixels = photographs[number % 2][top : top + 375, left : left + 500]
        return Image.fromarray(pixels[:, :: rng.choice((-1, 1))])

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


if __name__ == "__main__":
    cli.run(main)
