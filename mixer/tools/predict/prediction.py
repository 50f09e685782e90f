"""Classes and features of pictures: the logic of `python -m mixer.tools.predict`."""

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
from mixer.data.sources import folder
from mixer.errors import UserError, check_choice, first_line
from mixer.models import layers, microbatches
from mixer.training.step import normalize
from mixer.weights.card import Card
from mixer.weights.load import Loaded


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of an image.

    Attributes:
      image: path.
      classes: (k,) labels, the most probable first.
      probabilities: (k,) float32, theirs.
      features: float32, the layer that was asked for; None: none was.
    """

    image: str
    classes: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, and why."""

    image: str
    reason: str


def list_images(arguments: Iterable[str]) -> list[str]:
    """Paths of the images that the arguments name, in their order.

    Args:
      arguments: files, folders (the images below as `folder.walk` finds them, known by their
        endings, sorted) and "@FILE", which holds a path of either kind a line.

    Raises:
      UserError: nothing is given or there, or a folder holds no image.
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
        raise UserError("no images: give files, folders, or @list.txt with a path a line")
    return images


def _images_at(name: str, place: str) -> list[str]:
    path = os.path.expanduser(name)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f"{place}{folder.displayed(name)[:200]}: no such file or folder")
        return [path]
    images = [
        os.path.join(path, os.fsdecode(file))
        for file, _ in folder.walk(path)
        if folder.ending(file) in folder.LISTED.union(folder.RARE)
    ]
    if not images:
        raise UserError(f"{place}{folder.displayed(name)}: the folder holds no images")
    return sorted(images)


def names_of(card: Card) -> tuple[str, ...] | None:
    """The class names of a card in label order; None: they are not known."""
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
    """Predicts images from files, several being read while others are computed.

    A probability is the softmax of the logits. Its order is that of the logits, so with weights
    that were trained by a sigmoid loss it is their order too; how sure these are of a class by
    itself is the sigmoid of its logit.

    Args:
      loaded: what computes.
      images: paths.
      preprocess: steps of mixer/data/preprocessing/host.py. Their uint8 pixels are mapped to
        [-1, 1]; their floats (after `value_range`) are the model's input as they are.
      top: number of classes to tell of each; all of them if the model has fewer.
      batch_size: images computed at once; the last batch is padded, so that one program serves all.
      layer: a name of the model's `out`, to get its values too.

    Returns:
      For each image in turn a `Prediction`, or what is wrong with it.

    Raises:
      UserError: no steps are known, they do not give the weights' image size, or an unknown layer.
    """
    card = loaded.card
    _check_request(card, preprocess, layer)
    batch_size = min(batch_size, len(images))
    compute = _make_compute(loaded.model, min(top, card.num_classes), layer)
    read = make_reader(preprocess, card.image_size)
    results = _ahead(read, images, 2 * batch_size)
    return _predictions(functools.partial(compute, loaded.params), results, batch_size)


def _check_request(card: Card, preprocess: str | None, layer: str | None) -> None:
    """Raises UserError for unknown steps or layers, and for classes of weights without a head."""
    height, width = card.image_size
    if not preprocess:
        example = f"decode|resize(({height}, {width}))"
        if height == width:
            example = f"decode|resize_small({height * 8 // 7})|central_crop({height})"
        raise UserError(
            f"{card.source}: how images are to be made {height} x {width} is not known; say it, as "
            f"in --preprocess='{example}'"
        )
    if layer is not None:
        blocks = [f"block_{i}" for i in range(card.num_blocks)]
        check_choice("--layer", layer, ("stem", *blocks, "pre_logits", "logits"))
    if not card.num_classes and layer in (None, "logits"):
        raise UserError(
            f"{card.source} has no head, which tells classes; --features=OUT.npz gets features, "
            "of --layer=pre_logits or another"
        )


def _make_compute(model: nn.Module, top: int, layer: str | None) -> Callable:
    """Returns the compiled `(params, pixels) -> (classes, probabilities[, layer])`."""
    options = layers.compiler_options(jax.default_backend())

    @functools.partial(jax.jit, compiler_options=options)
    def compute(params: Any, pixels: jax.Array) -> tuple[jax.Array, ...]:
        def of_part(pixels: jax.Array) -> tuple[jax.Array, ...]:
            logits, out = model.apply({"params": params}, normalize(pixels))
            # Ordered by the logits: small probabilities may all be 0.
            best, classes = jax.lax.top_k(logits, top)
            probabilities = jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
            return classes, probabilities, *([out[layer].astype(jnp.float32)] if layer else [])

        return microbatches.map_images(model, of_part, pixels)

    return compute


def _predictions(
    compute: Callable, results: Iterable[tuple[str, np.ndarray] | Unreadable], batch_size: int
) -> Iterator[Prediction | Unreadable]:
    """The predictions in the order of the images, computed in batches of one size."""
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
    """The predictions of a batch, which is padded to `batch_size`."""
    pixels = np.zeros((batch_size, *batch[0][1].shape), batch[0][1].dtype)
    pixels[: len(batch)] = [image_pixels for _, image_pixels in batch]
    classes, probabilities, *features = jax.device_get(compute(pixels))
    for i, (image, _) in enumerate(batch):
        values = features[0][i] if features else None
        yield Prediction(image, classes[i], probabilities[i], values)


def _ahead(read: Callable, images: Iterable[str], count: int) -> Iterator:
    """`read` of each image in turn, `count` of them being begun before they are asked for."""
    pool = ThreadPoolExecutor(thread_name_prefix="read")
    try:
        rest = iter(images)
        begun = collections.deque(pool.submit(read, i) for i in itertools.islice(rest, count))
        while begun:
            result = begun.popleft().result()
            begun.extend(pool.submit(read, image) for image in itertools.islice(rest, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def make_reader(
    preprocess: str, image_size: tuple[int, int]
) -> Callable[[str], tuple[str, np.ndarray] | Unreadable]:
    """Returns `path -> (path, pixels (H, W, 3))`, uint8 or float32, or what is wrong with it.

    What `preprocessing.decoding.decode` takes goes through the steps as it is; anything else
    is handed to them as the BMP of what Pillow reads. It may be called in several threads.
    """
    import tensorflow as tf

    from mixer.data.preprocessing.host import make_preprocess

    tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's alone
    steps = make_preprocess(preprocess, image_size)

    def pixels(data):
        example = {"image": data, "label": tf.constant(0)}  # a label for `one_hot`
        return steps(example, tf.zeros([2], tf.int64))["image"]

    traced = tf.function(pixels).get_concrete_function(tf.TensorSpec([], tf.string))

    def read(path: str) -> tuple[str, np.ndarray] | Unreadable:
        try:
            if fault := folder.fault_of(path):
                return Unreadable(path, fault)
            data = Path(path).read_bytes()
        except OSError as error:
            return Unreadable(path, error.strerror)
        with contextlib.suppress(tf.errors.OpError):  # then Pillow may read it, or says why not
            return path, traced(tf.constant(data)).numpy()
        try:
            picture = tf.constant(as_bmp(data))
        except UnidentifiedImageError:
            return Unreadable(path, "no image, or of a format that Pillow does not read")
        except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
            return Unreadable(path, first_line(error))
        with contextlib.suppress(tf.errors.OpError):
            return path, traced(picture).numpy()
        try:  # again, step by step: the message of a graph does not say what was wrong
            return path, pixels(picture).numpy()
        except tf.errors.OpError as error:
            made = re.search(r"tensor input \[(\d+),(\d+),3\] is not compatible", str(error))
            if not made:
                return Unreadable(path, first_line(error))
            height, width = image_size
            return Unreadable(
                path,
                f"the steps {preprocess!r} make {made[1]} x {made[2]} of it, and the weights are "
                f"for {height} x {width}; give --preprocess='decode|resize(({height}, {width}))'",
            )

    return read


def as_bmp(data: bytes) -> bytes:
    """Any image that Pillow reads here as the BMP of its upright RGB pixels, which loses nothing.

    Raises:
      Exception: as `mixer.data.preprocessing.images.pixels`.
    """
    file = io.BytesIO()
    Image.fromarray(image_files.pixels(data, image_files.READ)).save(file, "BMP")
    return file.getvalue()


def as_json(prediction: Prediction, names: Sequence[str] | None) -> dict[str, Any]:
    """What a line of --json holds; a name is None where the names are not known."""
    return {
        "image": prediction.image,
        "top": [
            {
                "class": int(label),
                "name": names and names[label],
                # The shortest that is the same float32.
                "probability": float(str(probability)),
            }
            for label, probability in zip(prediction.classes, prediction.probabilities, strict=True)
        ],
    }


def as_table(predictions: Iterable[Prediction], names: Sequence[str] | None) -> Table:
    """A rich table: a line for each of an image's classes, a column of names if they are known."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("probability", justify="right")
    table.add_column("class", justify="right")
    if names is not None:
        table.add_column("name", overflow="fold")
    for prediction in predictions:
        image = folder.displayed(prediction.image)
        for row in as_json(prediction, names)["top"]:
            name = row["name"] and folder.displayed(row["name"])
            cells = [image, f"{row['probability']:.1%}", str(row["class"]), name]
            table.add_row(*(Text(cell) for cell in cells if cell is not None))
            image = ""
        table.add_section()
    return table


def write_features(path: str, features: np.ndarray, images: Sequence[str]) -> None:
    """Writes an npz file, whole or not at all; a file of that name is replaced.

    Args:
      path: of the file.
      features: (n, ...) float32, saved as "features".
      images: n paths, saved as "images", an array of strings that loads without unpickling.
    """
    with files.whole(path) as new, new.open("wb") as file:
        np.savez(file, features=features, images=np.array(images, np.str_))
