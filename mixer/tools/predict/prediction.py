"""Predicts classes and features of images, for `python -m mixer.tools.predict`."""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.table import Table
from rich.text import Text

from mixer import files
from mixer.data.imagenet import names as imagenet_names
from mixer.data.preprocessing import images as image_files
from mixer.data.preprocessing.spec import parse, with_channels
from mixer.data.sources import folder
from mixer.errors import UserError, check_choice, first_line, printable
from mixer.models import layers, microbatches
from mixer.sizes import RGB_CHANNELS
from mixer.training.step import normalize
from mixer.weights.card import Card
from mixer.weights.load import Loaded


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
      image: path of the image.
      classes: (k,) labels, the most probable first.
      probabilities: (k,) float32 probabilities of `classes`.
      features: float32 values of the requested layer; None if no layer was requested.
    """

    image: str
    classes: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, and the reason."""

    image: str
    reason: str


def list_images(arguments: Iterable[str]) -> list[str]:
    """Lists the paths of the images in the arguments, in the order of the arguments.

    Args:
      arguments: files, folders (searched recursively by `folder.walk` for names with an image
        extension, sorted) and "@FILE", a list with one file or folder per line.

    Raises:
      UserError: there are no arguments, a path does not exist, or a folder contains no image.
    """
    images: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            images += _images_at(argument, "")
            continue
        try:
            list_file = Path(argument[1:]).expanduser()
            if fault := folder.fault_of(list_file):
                raise OSError(None, fault)
            text = list_file.read_text("utf-8", "surrogateescape")
        except OSError as error:
            raise UserError(f"{argument}: the list cannot be read: {error.strerror}") from None
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                images += _images_at(line.strip(), f"{argument} line {number}: ")
    if not images:
        raise UserError("no images; expected files, folders or @list.txt with one path per line")
    return images


def _images_at(name: str, prefix: str) -> list[str]:
    path = os.path.expanduser(name)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f"{prefix}{printable(name)[:200]}: no such file or folder")
        return [path]
    images = [
        os.path.join(path, os.fsdecode(file))
        for file, _ in folder.walk(path)
        if folder.ending(file) in folder.LISTED.union(folder.RARE)
    ]
    if not images:
        raise UserError(f"{prefix}{printable(name)}: the folder contains no images")
    return sorted(images)


def names_of(card: Card) -> tuple[str, ...] | None:
    """Returns the class names of a card in label order; None if they are unknown."""
    if isinstance(card.class_names, str):
        return imagenet_names.class_names(card.class_names)
    return card.class_names


def predict(
    loaded: Loaded,
    images: Sequence[str],
    *,
    preprocess: str | None,
    top: int,
    batch_size: int,
    layer: str | None = None,
) -> Iterator[Prediction | Unreadable]:
    """Predicts images from files; reads the next images while the model computes.

    Probabilities are the softmax of the logits. They have the order of the logits, also for weights
    that were trained with a sigmoid loss; the probability of a single class under such weights is
    the sigmoid of its logit.

    Args:
      loaded: the model and its parameters.
      images: paths of the images.
      preprocess: preprocessing (mixer/data/preprocessing/host.py). uint8 pixels are mapped to
        [-1, 1]; floats (after `value_range`) are passed to the model unchanged.
      top: number of classes per image; all classes if the model has fewer.
      batch_size: images per batch; the last batch is padded, so that all batches run one program.
      layer: key of the model's `out`, to return its values too.

    Returns:
      A `Prediction` or an `Unreadable` for each image, in order.

    Raises:
      UserError: the preprocessing is unknown or gives another image size than that of the weights,
        or the layer is unknown.
    """
    card = loaded.card
    _check_request(card, preprocess, layer)
    preprocess = with_channels(preprocess, card.in_channels)
    parse(preprocess, card.image_size, channels=card.in_channels)
    batch_size = min(batch_size, len(images))
    compute = _make_compute(loaded.model, min(top, card.num_classes), layer)
    read = make_reader(preprocess, card.image_size)
    results = _read_ahead(read, images, 2 * batch_size)
    return _predictions(functools.partial(compute, loaded.params), results, batch_size)


def _check_request(card: Card, preprocess: str | None, layer: str | None) -> None:
    """Raises UserError if preprocessing or layer are unknown, or classes need a missing head.

    Image files have 1 or 3 channels; weights for another number of channels are an error too.
    """
    if card.in_channels not in (1, RGB_CHANNELS):
        raise UserError(
            f"{card.source} takes images of {card.in_channels} channels; image files have 1 (grey) "
            "or 3 (RGB); apply the model to arrays with mixer.load"
        )
    height, width = card.image_size
    if not preprocess:
        example = f"decode|resize(({height}, {width}))"
        if height == width:
            example = f"decode|resize_small({height * 8 // 7})|central_crop({height})"
        raise UserError(
            f"{card.source}: the preprocessing to {height} x {width} is unknown; pass it, as in "
            f"--preprocess='{example}'"
        )
    if layer is not None:
        blocks = [f"block_{i}" for i in range(card.num_blocks)]
        check_choice("--layer", layer, ("stem", *blocks, "pre_logits", "logits"))
    if not card.num_classes and layer in (None, "logits"):
        raise UserError(
            f"{card.source} has no head to predict classes; pass --features=OUT.npz to write the "
            "features of --layer=pre_logits or another layer"
        )


def _make_compute(model: nn.Module, top: int, layer: str | None) -> Callable:
    """Returns the compiled `(params, pixels) -> (classes, probabilities[, layer])`."""
    options = layers.compiler_options(jax.default_backend())

    @functools.partial(jax.jit, compiler_options=options)
    def compute(params: Any, pixels: jax.Array) -> tuple[jax.Array, ...]:
        def predict_images(pixels: jax.Array) -> tuple[jax.Array, ...]:
            logits, out = model.apply({"params": params}, normalize(pixels))
            # Sort by the logits, because several small probabilities can round to 0.
            best, classes = jax.lax.top_k(logits, top)
            probabilities = jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
            return classes, probabilities, *([out[layer].astype(jnp.float32)] if layer else [])

        return microbatches.map_images(model, predict_images, pixels)

    return compute


def _predictions(
    compute: Callable, results: Iterable[tuple[str, np.ndarray] | Unreadable], batch_size: int
) -> Iterator[Prediction | Unreadable]:
    """Yields the predictions in the order of the images, computed in batches of one size."""
    batch = []
    for result in results:
        if isinstance(result, Unreadable):
            yield result
            continue
        batch.append(result)
        if len(batch) == batch_size:
            yield from _predict_batch(compute, batch, batch_size)
            batch = []
    if batch:
        yield from _predict_batch(compute, batch, batch_size)


def _predict_batch(
    compute: Callable, batch: Sequence[tuple[str, np.ndarray]], batch_size: int
) -> Iterator[Prediction]:
    """Yields the predictions of a batch, which is padded to `batch_size`."""
    pixels = np.zeros((batch_size, *batch[0][1].shape), batch[0][1].dtype)
    pixels[: len(batch)] = [image_pixels for _, image_pixels in batch]
    classes, probabilities, *features = jax.device_get(compute(pixels))
    for i, (image, _) in enumerate(batch):
        values = features[0][i] if features else None
        yield Prediction(image, classes[i], probabilities[i], values)


def _read_ahead(read: Callable, images: Iterable[str], count: int) -> Iterator:
    """Yields `read(image)` for each image in order, reading up to `count` images ahead."""
    pool = ThreadPoolExecutor(thread_name_prefix="read")
    try:
        queue = iter(images)
        futures = collections.deque(pool.submit(read, i) for i in itertools.islice(queue, count))
        while futures:
            result = futures.popleft().result()
            futures.extend(pool.submit(read, image) for image in itertools.islice(queue, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def make_reader(
    preprocess: str, image_size: tuple[int, int]
) -> Callable[[str], tuple[str, np.ndarray] | Unreadable]:
    """Returns a thread-safe function `path -> (path, pixels (H, W, channels)) | Unreadable`.

    Pixels are uint8 or float32. Files that `preprocessing.decoding.decode` accepts are preprocessed
    as they are; Pillow reads all others, and their pixels are preprocessed as a BMP file.
    """
    import tensorflow as tf

    from mixer.data.preprocessing.host import make_preprocess

    tf.config.set_visible_devices([], "GPU")  # only JAX uses the accelerator
    steps = make_preprocess(preprocess, image_size)

    def pixels(data):
        example = {"image": data, "label": tf.constant(0)}  # `one_hot` needs a label
        return steps(example, tf.zeros([2], tf.int64))["image"]

    traced = tf.function(pixels).get_concrete_function(tf.TensorSpec([], tf.string))

    def read(path: str) -> tuple[str, np.ndarray] | Unreadable:
        try:
            if fault := folder.fault_of(path):
                return Unreadable(path, fault)
            data = Path(path).read_bytes()
        except OSError as error:
            return Unreadable(path, error.strerror)
        with contextlib.suppress(tf.errors.OpError):  # on failure try Pillow, which has a reason
            return path, traced(tf.constant(data)).numpy()
        try:
            picture = tf.constant(as_bmp(data))
        except UnidentifiedImageError:
            return Unreadable(path, "not an image, or a format that Pillow does not read")
        except Exception as error:  # on damaged files Pillow raises exceptions of any type
            return Unreadable(path, first_line(error))
        with contextlib.suppress(tf.errors.OpError):
            return path, traced(picture).numpy()
        try:  # repeat eagerly, because the error message of a graph has no reason
            return path, pixels(picture).numpy()
        except tf.errors.OpError as error:
            size = re.search(r"tensor input \[(\d+),(\d+),\d+\] is not compatible", str(error))
            if not size:
                return Unreadable(path, first_line(error))
            height, width = image_size
            return Unreadable(
                path,
                f"its size after {preprocess!r} is {size[1]} x {size[2]}; expected {height} x "
                f"{width} (pass --preprocess='decode|resize(({height}, {width}))')",
            )

    return read


def as_bmp(data: bytes) -> bytes:
    """Converts an image that Pillow reads to a BMP file of its upright RGB pixels, losslessly.

    Raises:
      Exception: any exception of `mixer.data.preprocessing.images.pixels`.
    """
    file = io.BytesIO()
    Image.fromarray(image_files.pixels(data, image_files.READ)).save(file, "BMP")
    return file.getvalue()


def as_json(prediction: Prediction, names: Sequence[str] | None) -> dict[str, Any]:
    """Returns the content of a line of --json; names are None if class names are unknown."""
    return {
        "image": prediction.image,
        "top": [
            {
                "class": int(label),
                "name": names and names[label],
                # The shortest decimal that rounds to the same float32.
                "probability": float(str(probability)),
            }
            for label, probability in zip(prediction.classes, prediction.probabilities, strict=True)
        ],
    }


def as_table(predictions: Iterable[Prediction], names: Sequence[str] | None) -> Table:
    """Makes a table with a row per image and class, and a column of class names if known."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("probability", justify="right")
    table.add_column("class", justify="right")
    if names is not None:
        table.add_column("name", overflow="fold")
    for prediction in predictions:
        image = printable(prediction.image)
        for row in as_json(prediction, names)["top"]:
            name = row["name"] and printable(row["name"])
            cells = [image, f"{row['probability']:.1%}", str(row["class"]), name]
            table.add_row(*(Text(cell) for cell in cells if cell is not None))
            image = ""
        table.add_section()
    return table


def write_features(path: str, features: np.ndarray, images: Sequence[str]) -> None:
    """Writes an npz file atomically; replaces an existing file.

    Args:
      path: path of the file.
      features: (n, ...) float32, saved as "features".
      images: n paths, saved as "images", an array of strings of fixed-width Unicode.
    """
    with files.atomic_write(path) as new_path, new_path.open("wb") as file:
        np.savez(file, features=features, images=np.array(images, np.str_))
