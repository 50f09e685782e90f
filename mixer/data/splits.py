"""The splits of the data set that a config names, and their batches.

TensorFlow is imported only for stored data; synthetic data does not need it.
"""

import abc
import collections
import dataclasses
import functools
import itertools
import json
import unicodedata
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mixer.data import order
from mixer.data.preprocessing.spec import Specification, parse
from mixer.data.sources import class_order, synthetic
from mixer.data.sources import folder as folder_lib
from mixer.data.sources.label_file import LabelFile, read_label_file
from mixer.errors import UserError, check_choice, printable
from mixer.sizes import RGB_CHANNELS

Batches = Iterator[dict[str, np.ndarray]]
# All splits of a folder or label file share one listing, until `forget_listings` is called.
_scan = functools.lru_cache(maxsize=1)(folder_lib.scan)
_read_label_file = functools.lru_cache(maxsize=1)(read_label_file)


class Cache:
    """Keeps batches that have been read, by range of places (start, stop)."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def batches(self, split: "Split", *, start: int, stop: int, batch_size: int) -> Batches:
        """Yields the same batches as `split.read`, which is called only for missing ranges."""
        if (start, stop) in self._arrays:
            arrays = self._arrays[start, stop]
            for low in range(0, stop - start, batch_size):
                yield {name: values[low : low + batch_size] for name, values in arrays.items()}
            return
        batches = []
        for batch in split.read(start=start, stop=stop, batch_size=batch_size):
            batches.append(batch)
            if sum(len(batch["label"]) for batch in batches) == stop - start:
                self._arrays[start, stop] = {
                    name: np.concatenate([batch[name] for batch in batches]) for name in batch
                }
            yield batch


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Split(abc.ABC):
    """One split of a data set, ready to be read.

    A place is an example's position in the split, 0 to num_examples - 1.

    Attributes:
      name: data set and split, for messages.
      class_names: class names in label order.
      fingerprint: a hash that changes when the examples or their labels change.
      numbers: (num_examples,) int64, ascending: for each place, the example's number among all
        stored examples. Random ops use the key stateless_fold_in([seed, epoch], number).
      example_spec: the arrays of one example in a batch: name -> (shape, dtype), such as
        {"image": ((224, 224, 3), "uint8"), "label": ((), "int32")}. If images may have several
        labels, the label is (M,), padded with -1, and there is a "label_weight" ((M,), "float32").
      preprocess: the ops that are applied to each image; empty for synthetic images.
      multi_label: whether an image may have several labels, or none.
      order_depends_on_readers: whether the training order depends on `num_readers`.
      cache: keeps the batches of `sequential_batches`; None: each call reads.
    """

    name: str
    class_names: tuple[str, ...]
    fingerprint: str
    numbers: np.ndarray
    example_spec: dict[str, tuple[tuple[int | None, ...], str]]
    preprocess: Specification = dataclasses.field(default_factory=Specification)
    multi_label: bool = False
    order_depends_on_readers: bool = False
    cache: Cache | None = None

    @property
    def num_examples(self) -> int:
        """Number of examples in the split, without excluded examples."""
        return len(self.numbers)

    @abc.abstractmethod
    def train_batches(self, start_step: int, reading: order.Reading) -> Batches:
        """Yields this process's rows of the batches from `start_step` on, without end.

        Args:
          start_step: the first batch.
          reading: the training order, and this process's part of each batch.

        Returns:
          Batches with an array (n, *shape) for each entry of `example_spec`.
        """

    @abc.abstractmethod
    def read(self, *, start: int, stop: int, batch_size: int) -> Batches:
        """Reads the examples at places start to stop; the last batch may be smaller."""

    @abc.abstractmethod
    def example_id(self, place: int) -> str:
        """Returns the example's name in messages, exclusion lists and saved predictions."""

    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """Returns the labels before preprocessing, (num_examples,) int32; decodes no image.

        With `multi_label`, the shape is (num_examples, M), padded with -1.
        """

    def with_preprocess(
        self, spec: Specification, *, image_size: tuple[int | None, int | None], keys: bool = False
    ) -> "Split":
        """Returns the same examples with other ops; synthetic images have no ops and do not change.

        Args:
          spec: the ops.
          image_size: (H, W) of the preprocessed images; None: any.
          keys: whether training batches also have "augment_key" (n, 4) uint32, the examples' keys
            in the form of mixer/data/philox.py.
        """
        del spec, image_size, keys
        return self

    def stored_bytes(self) -> int:
        """Estimates the number of encoded bytes of all images."""
        return 0

    @property
    def stored(self) -> folder_lib.StoredFiles | None:
        """The files that hold the examples; None if there are none."""
        return None

    def class_counts(self) -> np.ndarray | None:
        """Returns the number of examples of each class, (C,) int64.

        Returns None if that would require reading all examples.
        """
        return None

    def select(self, places: np.ndarray) -> "Split":
        """Returns a split of the examples at `places`, without duplicates, in ascending order."""
        numbers = self.numbers[np.unique(places)]
        fingerprint = f"{self.fingerprint} {_fingerprint_suffix(numbers)}"
        return dataclasses.replace(self, numbers=numbers, fingerprint=fingerprint, cache=None)

    def sequential_batches(self, *, start: int, stop: int, batch_size: int) -> Batches:
        """Reads as `read` does, from the cache if possible."""
        if self.cache is None:
            return self.read(start=start, stop=stop, batch_size=batch_size)
        return self.cache.batches(self, start=start, stop=stop, batch_size=batch_size)

    def eval_batches(
        self, *, global_batch_size: int, process_index: int, process_count: int
    ) -> Batches:
        """Yields the whole split once, as the same number of full batches on every process.

        Each process reads its own range of places. Padding rows have mask 0.

        Returns:
          Batches of global_batch_size / process_count examples, with "mask" (n,) float32 and
          "index" (n,) int32, the place of each example in the split; -1 if the mask is 0.
        """
        size = global_batch_size // process_count
        per_process = -(-self.num_examples // process_count)
        start = min(process_index * per_process, self.num_examples)
        stop = min(start + per_process, self.num_examples)
        batches = self.sequential_batches(start=start, stop=stop, batch_size=size)
        template = None
        for _ in range(-(-per_process // size)):
            batch = next(batches, None)
            if batch is None:
                if template is None:  # this process has no example; take the first one's shapes
                    template = next(self.sequential_batches(start=0, stop=1, batch_size=1))
                batch = {key: value[:0] for key, value in template.items()}
            template = batch
            count = len(batch["label"])
            filled = {
                key: np.pad(value, [(0, size - count)] + [(0, 0)] * (value.ndim - 1))
                for key, value in batch.items()
            }
            is_example = np.arange(size) < count
            filled["mask"] = is_example.astype(np.float32)
            filled["index"] = np.where(is_example, start + np.arange(size), -1).astype(np.int32)
            start += count
            yield filled


def _fingerprint_suffix(numbers: np.ndarray) -> str:
    """Returns the end of the fingerprint for a subset of a split."""
    return f"kept {zlib.crc32(numbers.tobytes())}"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticSplit(Split):
    """A split of synthetic images.

    Attributes:
      spec: name of the split.
      image_shape: (H, W, channels).
    """

    spec: str
    image_shape: tuple[int, int, int]

    def train_batches(self, start_step: int, reading: order.Reading) -> Batches:
        """As `Split.train_batches`; the order does not depend on the readers."""
        for step in itertools.count(start_step):
            _, places = reading.examples(step, self.num_examples)
            yield self._batch(places)

    def read(self, *, start: int, stop: int, batch_size: int) -> Batches:
        """As `Split.read`."""
        places = np.arange(start, stop)
        for low in range(0, len(places), batch_size):
            yield self._batch(places[low : low + batch_size])

    def _batch(self, places: np.ndarray) -> dict[str, np.ndarray]:
        labels = self.labels()[places]
        ids = synthetic.split_ids(self.spec)[self.numbers[places]]
        return {"image": synthetic.make_images(ids, labels, self.image_shape), "label": labels}

    def example_id(self, place: int) -> str:
        """As `Split.example_id`."""
        return f"{self.spec}:{self.numbers[place]}"

    def labels(self) -> np.ndarray:
        """As `Split.labels`."""
        ids = synthetic.split_ids(self.spec)[self.numbers]
        return synthetic.labels(ids, len(self.class_names))


class Unusable(UserError):
    """The listing of a split contains images that cannot be used."""


def open_split(
    dataset: Any,
    spec: str,
    preprocess: str,
    *,
    image_size: tuple[int, int],
    num_classes: int | None,
    channels: int = RGB_CHANNELS,
    class_names: tuple[str, ...] | None = None,
    subfolders: bool = True,
) -> Split:
    """Opens a split of the data set that a config names.

    Args:
      dataset: the config's `dataset`.
      spec: the split, such as "train" or "train[:98%]".
      preprocess: the specification of the ops that are applied to each image.
      image_size: (H, W) of the preprocessed images.
      num_classes: the config's number of classes, which synthetic data uses; None means 10.
      channels: number of channels of the images, which the preprocessing must produce.
      class_names: the run's class names; None: those of the data set.
      subfolders: as in `folder.scan`.

    Raises:
      UserError: the data set or split does not exist or is empty, or its classes are not the run's.
    """
    for key, owner, is_owner in (
        ("label_file", "folder", dataset.name == "folder"),
        ("class_order", "folder", dataset.name == "folder" or dataset.class_order == "sorted"),
        ("label_key", "a TFDS set", dataset.name not in ("folder", "synthetic")),
        ("exclude", "stored images", dataset.name != "synthetic"),
    ):
        if dataset[key] and not is_owner:
            raise UserError(
                f"dataset.{key}={dataset[key]!r} is only for {owner}; "
                f"dataset.name is {dataset.name!r}"
            )
    if dataset.name == "synthetic":
        split = _open_synthetic(spec, (*image_size, channels), num_classes or 10)
    else:
        parse(preprocess, channels=channels)
        source = open_source(dataset, spec, class_names, num_classes, subfolders=subfolders)
        split = _open_stored(source, preprocess, image_size, dataset.shuffle_group_size)
        if dataset.exclude:
            fingerprint = f"{split.fingerprint} {_fingerprint_suffix(source.kept_numbers)}"
            split = dataclasses.replace(split, fingerprint=fingerprint)
    if not split.num_examples:
        raise UserError(f"{split.name} is empty; expected at least one example")
    if class_names is not None and split.class_names != tuple(class_names):
        raise UserError(
            f"{split.name} has {len(split.class_names)} classes "
            f"({folder_lib.listed(split.class_names)}); expected the run's {len(class_names)} "
            f"({folder_lib.listed(class_names)})"
        )
    return split


def _open_synthetic(spec: str, image_shape: tuple[int, int, int], num_classes: int) -> Split:
    check_choice("split", spec, synthetic.SPLITS, "synthetic data")
    return SyntheticSplit(
        name=f"synthetic {spec}",
        class_names=tuple(str(label) for label in range(num_classes)),
        fingerprint=f"synthetic {spec} {num_classes}",
        numbers=np.arange(len(synthetic.split_ids(spec))),
        example_spec={"image": (image_shape, "uint8"), "label": ((), "int32")},
        spec=spec,
        image_shape=image_shape,
    )


def _open_stored(
    source, preprocess: str, image_size: tuple[int, int], group_size: int = 1
) -> Split:
    """Opens a split of a source with preprocessing."""
    import tensorflow as tf

    from mixer.data.stored_split import make_split

    tf.config.set_visible_devices([], "GPU")  # only JAX uses the accelerator
    split = make_split(source, preprocess, image_size=image_size, group_size=group_size)
    if faults := sorted(source.faults.keys() & set(source.kept_numbers.tolist())):
        raise Unusable(
            f"{source.name} contains {len(faults):,} images that cannot be used, such as "
            f"{printable(source.example_id(faults[0]))}: {source.faults[faults[0]]}; "
            f"expected regular files in the formats {folder_lib.ACCEPTED} (exclude the others with "
            "the list that `python -m mixer.tools.prepare check` writes)"
        )
    shape, dtype = split.example_spec["label"]
    if dtype == "float32" and shape != (len(source.class_names),):
        raise UserError(
            f"preprocessing {preprocess!r}: one_hot has {shape[0]} classes, but {source.name} "
            f"has {len(source.class_names)}"
        )
    return split


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
    names = class_names
    if names is None:
        names = classes_in_data(dataset, num_classes, subfolders=subfolders)
    if dataset.label_file:
        listing = _read_label_file(dataset.label_file, dataset.data_dir)
        return sources.label_file_source(listing, spec, names, excluded)
    folder = _scan(dataset.data_dir, subfolders=subfolders)
    return sources.folder_source(folder, spec, names, excluded)


def classes_in_data(
    dataset, num_classes: int | None = None, *, subfolders: bool = True
) -> tuple[str, ...]:
    """Returns the class names of a folder or label file, in the order of dataset.class_order."""
    are_numbers = False
    if dataset.label_file:
        listing = _read_label_file(dataset.label_file, dataset.data_dir)
        names, are_numbers = listing.names(num_classes), listing.class_names is None
    else:
        names = _scan(dataset.data_dir, subfolders=subfolders).class_names
    return class_order.arrange(dataset.class_order, names, are_numbers=are_numbers)


def has_named_classes(dataset) -> bool:
    """Returns whether the data is a folder or label file with names of classes, not numbers."""
    if dataset.name != "folder":
        return False
    if not dataset.label_file:
        return True
    return _read_label_file(dataset.label_file, dataset.data_dir).class_names is not None


def split_names(dataset) -> list[str]:
    """Returns the names of the splits that a data set has."""
    if dataset.name == "synthetic":
        return list(synthetic.SPLITS)
    if dataset.name != "folder":
        from mixer.data.sources import stored as sources

        return list(sources.tfds_builder(dataset.name, dataset.data_dir).info.splits)
    if dataset.label_file:
        return list(_read_label_file(dataset.label_file, dataset.data_dir).splits)
    return list(_scan(dataset.data_dir, subfolders=True).files)


def layout_hint(dataset) -> str:
    """Returns why the layout of a folder is not `<class>/<image>`, if it looks like it; else ""."""
    if dataset.name != "folder" or dataset.label_file:
        return ""
    return _scan(dataset.data_dir, subfolders=True).hint


def open_listing(
    listing: LabelFile,
    preprocess: str,
    *,
    image_size: tuple[int, int],
    class_names: tuple[str, ...],
) -> Split:
    """Opens all images of a label file that has already been read.

    Args:
      listing: the content of the label file, which has one split.
      preprocess: the specification of the ops that are applied to each image.
      image_size: (H, W) of the preprocessed images.
      class_names: class names in label order.
    """
    from mixer.data.sources import stored as sources

    (spec,) = listing.splits
    source = sources.label_file_source(listing, spec, class_names, frozenset())
    source = dataclasses.replace(source, name=str(listing.file))
    return _open_stored(source, preprocess, image_size)


def forget_listings() -> None:
    """Makes the next call read folders and label files again, because they may have changed."""
    _scan.cache_clear()
    _read_label_file.cache_clear()


def has_subfolders(dataset) -> bool:
    """Returns whether a folder of images has images in subfolders of a class folder."""
    if dataset.name != "folder" or dataset.label_file:
        return False
    return _scan(dataset.data_dir, subfolders=True).nested > 0


def remarks(dataset, train: Split, *, subfolders: bool = True) -> list[str]:
    """Returns lines for the user on possible mistakes in the data that do not prevent training.

    Args:
      dataset: the config's `dataset`.
      train: the training split.
      subfolders: as in `folder.scan`.
    """
    show = folder_lib.listed
    lines = []
    if dataset.name == "folder" and not dataset.label_file:
        lines += _scan(dataset.data_dir, subfolders=subfolders).remarks
    names = train.class_names
    counts = train.class_counts()
    if counts is not None and (missing := np.flatnonzero(counts == 0).tolist()):
        lines.append(
            f"{len(missing):,} of {len(names):,} classes have no training image ({train.name}): "
            f"{show(names[label] for label in missing)}"
        )
    if dataset.name == "folder":
        variants = collections.defaultdict(list)
        for name in names:
            variants["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
        if groups := [
            " and ".join(map(ascii, group)) for group in variants.values() if len(group) > 1
        ]:
            lines.append(
                f"classes that differ only by case, blanks or Unicode form: {show(groups)}"
            )
    if len(names) == 1:
        lines.append(f"the data has only one class, {show(names)}: every prediction is correct")
    if unmatched := _unmatched(dataset, subfolders):
        lines.append(
            f"{len(unmatched):,} names in dataset.exclude={dataset.exclude} match no example: "
            f"{show(unmatched)}"
        )
    return lines


def _unmatched(dataset, subfolders: bool) -> list[str]:
    """Returns the sorted names of the exclusion list that match no example of any split."""
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
    files = itertools.chain(*_scan(dataset.data_dir, subfolders=subfolders).files.values())
    return sorted(excluded.difference(map(folder_lib.decode, files)))


def read_exclusions(path: str) -> frozenset[str]:
    """Returns the names of the excluded examples from a list that `prepare check` wrote.

    Raises:
      UserError: the file cannot be read, or a line is invalid.
    """
    if not path:
        return frozenset()
    file = folder_lib.find_file("dataset.exclude", path)
    names = set()
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            # The list escapes bytes that are not UTF-8; `example_id` returns them decoded.
            names.add(folder_lib.decode(folder_lib.encode(json.loads(line)["example"])))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"dataset.exclude={path}, line {number}: expected "
                '{"example": "train/cat/1.jpg"}, as `prepare check` writes it'
            ) from None
    return frozenset(names)
