"""Batches for training and evaluation, by the config's `dataset`.

TensorFlow is imported only where the data needs it: synthetic data runs without.
"""

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from mixer.data import folder as folder_lib
from mixer.data import synthetic
from mixer.errors import UserError, nearest

Batches = Iterator[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set, ready to be read.

    Attributes:
      name: data set and split, for messages.
      num_examples: how many examples are read (excluded ones are not counted).
      class_names: of the labels, in order.
      fingerprint: changes when the examples or their labels do.
      example_spec: of one example as batched: name -> (shape, dtype), such as
        {"image": ((224, 224, 3), "uint8"), "label": ((), "int32")}; labels of several an image are
        (M,), -1 where it has fewer, with "label_weight" ((M,), "float32").
      multi_label: whether an image may have several labels, or none.
      order_depends_on_readers: whether the order of training depends on `num_readers`.
      train_batches: (start_step=, seed=, global_batch_size=, process_index=, process_count=,
        num_readers=) -> endless batches of this process's examples from batch `start_step` on:
        arrays (n, *shape) of what `example_spec` names. `num_readers` is the number of processes
        that the run was begun with, `process_count` where it is left out. Both divide the batch.
      sequential_batches: (start=, stop=, batch_size=) -> examples start to stop in order, the last
        batch short.
      example_id: from an example's place in that order to the name that messages, exclusion lists
        and saved predictions use.
      labels: () -> (num_examples,) int32 in that order, before preprocessing, no image being
        decoded; (num_examples, M), -1 where an image has fewer, with `multi_label`.
      select: (places) -> a split of the examples at those places, each once, in ascending order.
      preprocess: the steps that each image takes; empty where the images take none.
      numbers: (num_examples,) int64, what the key of the example at each place is made with:
        random steps take stateless_fold_in([seed, epoch], number).
      with_steps: (preprocess, image_size=, keys=) -> the same examples through other steps; sides
        of `image_size` may be None: any. With `keys`, training batches have "augment_key" (n, 4)
        uint32 too, the examples' keys as mixer/philox.py takes them.
      stored_bytes: () -> about how many bytes have to be decoded to read all images once.
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...]
    fingerprint: str
    example_spec: dict[str, tuple[tuple[int, ...], str]]
    multi_label: bool
    order_depends_on_readers: bool
    train_batches: Callable[..., Batches]
    sequential_batches: Callable[..., Batches]
    example_id: Callable[[int], str]
    labels: Callable[[], np.ndarray]
    select: Callable[[np.ndarray], "Split"]
    preprocess: str
    numbers: np.ndarray
    with_steps: Callable[..., "Split"]
    stored_bytes: Callable[[], int]


def open_split(
    dataset: Any,
    spec: str,
    preprocess: str,
    *,
    image_size: tuple[int, int],
    num_classes: int | None,
    class_names: tuple[str, ...] | None = None,
) -> Split:
    """Opens split `spec` of the data set that a config names.

    Args:
      dataset: the config's `dataset`.
      spec: such as "train" or "train[:98%]".
      preprocess: the steps that each image takes.
      image_size: (H, W) of the images that come out.
      num_classes: the config's; the synthetic set has that many (10 where it is None).
      class_names: those of the run; None takes the data set's own.

    Raises:
      UserError: no such data set or split, an empty one, other classes than the run's.
    """
    for key, of, fits in (
        ("label_file", "folder", dataset.name == "folder"),
        ("label_key", "a TFDS set", dataset.name not in ("folder", "synthetic")),
    ):
        if dataset[key] and not fits:
            raise UserError(
                f"dataset.{key}={dataset[key]!r} is for {of}; dataset.name is {dataset.name!r}"
            )
    if dataset.name == "synthetic":
        split = _open_synthetic(spec, image_size, num_classes or 10)
    else:
        split = _open_stored(dataset, spec, preprocess, image_size, num_classes, class_names)
    if not split.num_examples:
        raise UserError(f"{split.name} is empty: no examples are left in this split")
    if class_names is not None and split.class_names != tuple(class_names):
        raise UserError(
            f"{split.name} has other classes than the run: {_brief(split.class_names)} and not "
            f"{_brief(class_names)}"
        )
    return split


def _brief(names) -> str:
    return f"{len(names)} ({', '.join(itertools.islice(names, 3))}, ...)"


def _open_synthetic(spec: str, image_size: tuple[int, int], num_classes: int) -> Split:
    if spec not in synthetic.SPLITS:
        raise UserError(
            f"split {spec!r}: synthetic data has {', '.join(synthetic.SPLITS)}."
            f"{nearest(spec, synthetic.SPLITS)}"
        )
    task = dict(num_classes=num_classes, image_size=image_size)
    ids = synthetic.split_ids(spec)

    def split(kept: np.ndarray, fingerprint: str) -> Split:
        def sequential(*, start: int, stop: int, batch_size: int) -> Batches:
            return synthetic.eval_batches(ids[kept[start:stop]], batch_size=batch_size, **task)

        return Split(
            name=f"synthetic {spec}",
            num_examples=len(kept),
            class_names=tuple(str(label) for label in range(num_classes)),
            fingerprint=fingerprint,
            example_spec={"image": ((*image_size, 3), "uint8"), "label": ((), "int32")},
            multi_label=False,
            order_depends_on_readers=False,
            train_batches=functools.partial(synthetic.train_batches, ids[kept], **task),
            sequential_batches=sequential,
            example_id=lambda place: f"{spec}:{kept[place]}",
            labels=lambda: synthetic.labels(ids[kept], num_classes),
            select=lambda places: split(*_selected(kept, places, fingerprint)),
            preprocess="",
            numbers=kept,
            with_steps=lambda preprocess, **how: split(kept, fingerprint),
            stored_bytes=lambda: 0,
        )

    return split(np.arange(len(ids)), f"synthetic {spec} {num_classes}")


def _selected(kept: np.ndarray, places: np.ndarray, fingerprint: str) -> tuple[np.ndarray, str]:
    """What is kept of `kept`, and the fingerprint of that."""
    kept = kept[np.unique(places)]
    return kept, f"{fingerprint} kept {zlib.crc32(kept.tobytes())}"


def _open_stored(dataset, spec, preprocess, image_size, num_classes, class_names) -> Split:
    import tensorflow as tf

    from mixer.data import sources
    from mixer.data.preprocess import make_preprocess, output_spec

    tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's alone
    steps = make_preprocess(preprocess, image_size)
    source = open_source(dataset, spec, class_names, num_classes)
    if dataset.name == "folder" and not dataset.label_file:
        _check_decodable(_scan(dataset.data_dir), read_exclusions(dataset.exclude))
    example_spec = output_spec(steps, source.example_spec)
    shape, dtype = example_spec["label"]
    if dtype == "float32" and shape != (len(source.class_names),):
        raise UserError(
            f"preprocessing {preprocess!r}: one_hot gives {shape[0]} classes, but {source.name} "
            f"has {len(source.class_names)}"
        )
    fingerprint = source.fingerprint
    if dataset.exclude:
        fingerprint += f" kept {zlib.crc32(source.kept.tobytes())}"

    def split(kept, fingerprint, preprocess, steps, example_spec, keys=False) -> Split:
        part = dataclasses.replace(source, kept=kept)

        def select(places: np.ndarray) -> Split:
            here = preprocess, steps, example_spec, keys
            return split(*_selected(kept, places, fingerprint), *here)

        def with_steps(preprocess: str, *, image_size: tuple, keys: bool = False) -> Split:
            steps = make_preprocess(preprocess, image_size)
            example_spec = output_spec(steps, source.example_spec)
            if keys:
                example_spec["augment_key"] = ((4,), "uint32")
            return split(kept, fingerprint, preprocess, steps, example_spec, keys)

        return Split(
            name=part.name,
            num_examples=len(kept),
            class_names=part.class_names,
            fingerprint=fingerprint,
            example_spec=example_spec,
            multi_label=part.max_labels is not None,
            order_depends_on_readers=bool(part.files),
            train_batches=functools.partial(
                sources.train_batches,
                part,
                steps,
                group_size=dataset.shuffle_group_size,
                with_keys=keys,
            ),
            sequential_batches=functools.partial(sources.eval_batches, part, steps),
            example_id=lambda place: part.example_id(int(kept[place])),
            labels=functools.partial(sources.labels, part),
            select=select,
            preprocess=preprocess,
            numbers=kept,
            with_steps=with_steps,
            stored_bytes=functools.partial(sources.stored_bytes, part),
        )

    return split(source.kept, fingerprint, preprocess, steps, example_spec)


def open_source(
    dataset,
    spec: str,
    class_names: tuple[str, ...] | None = None,
    num_classes: int | None = None,
):
    """Opens the stored examples of a split, without preprocessing."""
    from mixer.data import sources

    excluded = read_exclusions(dataset.exclude)
    if dataset.name != "folder":
        builder = sources.tfds_builder(dataset.name, dataset.data_dir)
        return sources.tfds_source(builder, spec, excluded, dataset.label_key)
    if dataset.label_file:
        listing = _read_label_file(dataset.label_file, dataset.data_dir)
        names = listing.names(num_classes) if class_names is None else class_names
        return sources.label_file_source(listing, spec, names, excluded)
    folder = _scan(dataset.data_dir)
    names = folder.class_names if class_names is None else class_names
    return sources.folder_source(folder, spec, names, excluded)


@functools.lru_cache(maxsize=1)
def _scan(root: str) -> folder_lib.ImageFolder:
    return folder_lib.scan(root)


@functools.lru_cache(maxsize=1)
def _read_label_file(file: str, root: str) -> folder_lib.LabelFile:
    return folder_lib.read_label_file(file, root)


def forget_listings() -> None:
    """Lets folders and label files be read anew: they may have changed since the last run."""
    _scan.cache_clear()
    _read_label_file.cache_clear()


def _check_decodable(folder: folder_lib.ImageFolder, excluded: frozenset[str]) -> None:
    left = [file for file in folder.undecodable if file not in excluded]
    if left:
        raise UserError(
            f"{folder.root} holds {len(left):,} images that TensorFlow cannot decode, such as "
            f"{left[0]}; convert them (accepted: {', '.join(folder_lib.ENDINGS)}), or leave them "
            "out with the list that `python -m mixer.tools.prepare check` writes"
        )


def read_exclusions(path: str) -> frozenset[str]:
    """Names of the examples that a list made by `prepare check` leaves out."""
    if not path:
        return frozenset()
    try:
        lines = epath.Path(path).read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise UserError(
            f"dataset.exclude={path} cannot be read: {reason}; `prepare check` writes such a list"
        ) from None
    try:
        return frozenset(json.loads(line)["example"] for line in lines if line.strip())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'dataset.exclude={path}: each line must be like {{"example": "train/cat/1.jpg"}} '
            f"({error})"
        ) from None


def eval_batches(
    split: Split, *, global_batch_size: int, process_index: int, process_count: int
) -> Batches:
    """Yields a whole split once: every process the same number of full batches.

    Each process reads its own run of the examples; what fills the last batches up has mask 0.

    Returns:
      Batches of global_batch_size / process_count examples, with "mask" (n,) float32 and "index"
      (n,) int32, each one's place in the split; -1 where the mask is 0.
    """
    size = global_batch_size // process_count
    per_process = -(-split.num_examples // process_count)
    start = min(process_index * per_process, split.num_examples)
    stop = min(start + per_process, split.num_examples)
    batches = split.sequential_batches(start=start, stop=stop, batch_size=size)
    template = None
    for _ in range(-(-per_process // size)):
        batch = next(batches, None)
        if batch is None:
            if template is None:  # no example of its own: the shapes come from the first one
                template = next(split.sequential_batches(start=0, stop=1, batch_size=1))
            batch = {key: value[:0] for key, value in template.items()}
        template = batch
        count = len(batch["label"])
        filled = {
            key: np.pad(value, [(0, size - count)] + [(0, 0)] * (value.ndim - 1))
            for key, value in batch.items()
        }
        there = np.arange(size) < count
        filled["mask"] = there.astype(np.float32)
        filled["index"] = np.where(there, start + np.arange(size), -1).astype(np.int32)
        start += count
        yield filled
