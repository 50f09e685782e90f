"""Batches for training and evaluation, by the config's `dataset`.

TensorFlow is imported only where the data needs it: synthetic data runs without.
"""

import collections
import dataclasses
import functools
import itertools
import json
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mixer.data.sources import folder as folder_lib
from mixer.data.sources import synthetic
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
        uint32 too, the examples' keys as mixer/data/philox.py takes them.
      stored_bytes: () -> about how many bytes have to be decoded to read all images once.
      stored: () -> the files that hold the examples; None: there are none.
      class_counts: () -> how many examples have each class, (C,) int64; None: to know it, all would
        have to be read.
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
    stored: Callable[[], folder_lib.StoredFiles | None] = lambda: None
    class_counts: Callable[[], np.ndarray | None] = lambda: None


class Unusable(UserError):
    """Some images of a split cannot be used, by what is known before they are read."""


def open_split(
    dataset: Any,
    spec: str,
    preprocess: str,
    *,
    image_size: tuple[int, int],
    num_classes: int | None,
    class_names: tuple[str, ...] | None = None,
    subfolders: bool = True,
) -> Split:
    """Opens split `spec` of the data set that a config names.

    Args:
      dataset: the config's `dataset`.
      spec: such as "train" or "train[:98%]".
      preprocess: the steps that each image takes.
      image_size: (H, W) of the images that come out.
      num_classes: the config's; the synthetic set has that many (10 where it is None).
      class_names: those of the run; None takes the data set's own.
      subfolders: as of `folder.scan`.

    Raises:
      UserError: no such data set or split, an empty one, other classes than the run's.
    """
    for key, of, fits in (
        ("label_file", "folder", dataset.name == "folder"),
        ("label_key", "a TFDS set", dataset.name not in ("folder", "synthetic")),
        ("exclude", "stored images", dataset.name != "synthetic"),
    ):
        if dataset[key] and not fits:
            raise UserError(
                f"dataset.{key}={dataset[key]!r} is for {of}; dataset.name is {dataset.name!r}"
            )
    if dataset.name == "synthetic":
        split = _open_synthetic(spec, image_size, num_classes or 10)
    else:
        source = open_source(dataset, spec, class_names, num_classes, subfolders=subfolders)
        split = _prepare(source, dataset, preprocess, image_size)
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


def _prepare(source, dataset, preprocess: str, image_size: tuple[int, int]) -> Split:
    """A split of what a source holds, with its preprocessing."""
    import tensorflow as tf

    from mixer.data.preprocessing.host import make_preprocess, output_spec
    from mixer.data.sources import stored as sources

    tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's alone
    steps = make_preprocess(preprocess, image_size)
    if faults := sorted(source.faults.keys() & set(source.kept.tolist())):
        raise Unusable(
            f"{source.name} holds {len(faults):,} images that cannot be used, such as "
            f"{folder_lib.displayed(source.example_id(faults[0]))}: {source.faults[faults[0]]}; "
            f"accepted are regular files in {folder_lib.ACCEPTED}; leave others out with the list "
            "that `python -m mixer.tools.prepare check` writes"
        )
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
            stored=functools.cache(lambda: part.stored(kept)),
            class_counts=lambda: part.count_classes and part.count_classes(kept),
        )

    return split(source.kept, fingerprint, preprocess, steps, example_spec)


def open_source(
    dataset,
    spec: str,
    class_names: tuple[str, ...] | None = None,
    num_classes: int | None = None,
    *,
    subfolders: bool = True,
):
    """Opens the stored examples of a split, without preprocessing."""
    from mixer.data.sources import stored as sources

    excluded = read_exclusions(dataset.exclude)
    if dataset.name != "folder":
        builder = sources.tfds_builder(dataset.name, dataset.data_dir)
        return sources.tfds_source(builder, spec, excluded, dataset.label_key)
    if dataset.label_file:
        listing = _read_label_file(dataset.label_file, dataset.data_dir)
        names = listing.names(num_classes) if class_names is None else class_names
        return sources.label_file_source(listing, spec, names, excluded)
    folder = scan(dataset.data_dir, subfolders)
    names = folder.class_names if class_names is None else class_names
    return sources.folder_source(folder, spec, names, excluded)


def open_listing(
    listing: folder_lib.LabelFile,
    preprocess: str,
    *,
    image_size: tuple[int, int],
    class_names: tuple[str, ...],
) -> Split:
    """Opens all images of a label file that is read already.

    Args:
      listing: the label file, which has one split.
      preprocess: the steps that each image takes.
      image_size: (H, W) of the images that come out.
      class_names: of the labels, in order.
    """
    from mixer.data.sources import stored as sources

    (spec,) = listing.splits
    source = sources.label_file_source(listing, spec, class_names, frozenset())
    source = dataclasses.replace(source, name=str(listing.file))
    dataset = ConfigDict({"exclude": "", "shuffle_group_size": 1})
    return _prepare(source, dataset, preprocess, image_size)


@functools.lru_cache(maxsize=1)
def scan(root: str, subfolders: bool) -> folder_lib.ImageFolder:
    """As `folder.scan`, once for all splits."""
    return folder_lib.scan(root, subfolders=subfolders)


@functools.lru_cache(maxsize=1)
def _read_label_file(file: str, root: str) -> folder_lib.LabelFile:
    return folder_lib.read_label_file(file, root)


def forget_listings() -> None:
    """Lets folders and label files be read anew: they may have changed since the last run."""
    scan.cache_clear()
    _read_label_file.cache_clear()


def has_subfolders(dataset) -> bool:
    """Whether a folder of images has some in folders of a class folder."""
    if dataset.name != "folder" or dataset.label_file:
        return False
    return scan(dataset.data_dir, True).nested > 0


def remarks(dataset, train: Split, *, subfolders: bool = True) -> list[str]:
    """Lines on what may not be as the user meant it: nothing stands in the way of training.

    Args:
      dataset: the config's `dataset`.
      train: the split to train on.
      subfolders: as of `folder.scan`.
    """
    show = folder_lib.listed
    lines = []
    if dataset.name == "folder" and not dataset.label_file:
        lines += scan(dataset.data_dir, subfolders).remarks
    names = train.class_names
    counts = train.class_counts()
    if counts is not None and (missing := np.flatnonzero(counts == 0).tolist()):
        lines.append(
            f"{len(missing):,} of {len(names):,} classes have no training image ({train.name}): "
            f"{show(names[label] for label in missing)}"
        )
    if dataset.name == "folder":
        alike = collections.defaultdict(list)
        for name in names:
            alike["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
        if groups := [" and ".join(map(ascii, same)) for same in alike.values() if len(same) > 1]:
            lines.append(
                f"classes that differ by case, blanks or Unicode form alone: {show(groups)}"
            )
    if len(names) == 1:
        lines.append(f"the data has one class, {show(names)}: every answer is right")
    if unmatched := _unmatched(dataset, subfolders):
        lines.append(
            f"{len(unmatched):,} names in dataset.exclude={dataset.exclude} match no example: "
            f"{show(unmatched)}"
        )
    return lines


def _unmatched(dataset, subfolders: bool) -> list[str]:
    """Names of the exclusion list that are no example of any split, sorted."""
    excluded = read_exclusions(dataset.exclude)
    if not excluded:
        return []
    if dataset.name != "folder":
        from mixer.data.sources import stored as sources

        builder = sources.tfds_builder(dataset.name, dataset.data_dir)
        return sorted(sources.unmatched(builder, excluded))
    if dataset.label_file:
        listing = _read_label_file(dataset.label_file, dataset.data_dir)
        return sorted(excluded.difference(map(listing.path, range(len(listing.lines)))))
    files = itertools.chain(*scan(dataset.data_dir, subfolders).files.values())
    return sorted(excluded.difference(map(folder_lib.decode, files)))


def read_exclusions(path: str) -> frozenset[str]:
    """Names of the examples that a list made by `prepare check` leaves out."""
    if not path:
        return frozenset()
    file = folder_lib.find_file("dataset.exclude", path)
    names = set()
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            # As `example_id` has the name, where the list has Python's form of other bytes.
            names.add(folder_lib.decode(folder_lib.encode(json.loads(line)["example"])))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"dataset.exclude={path}, line {number}: expected "
                '{"example": "train/cat/1.jpg"}, as `prepare check` writes it'
            ) from None
    return frozenset(names)


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
