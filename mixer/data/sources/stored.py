"""Loads stored examples with TensorFlow: TFDS records and folders of images."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import download_manager, downloader, extractor

from mixer.data import labels as labels_lib
from mixer.data.sources import folder as folder_lib
from mixer.data.sources.label_file import LabelFile, LabelledPaths
from mixer.errors import UserError, first_line, nearest
from mixer.files import parse_path

# A TFDS split of up to this size is kept in memory, still encoded, and shuffled globally.
IN_MEMORY_BYTES = 2 << 30
# Maximum labels per image in a larger split; finding the true maximum would read the whole split.
MAX_LABELS = 128
# Factors for TFDS's pixel values; those of dSprites are 0 and 1.
PIXEL_SCALE = {"dsprites": 255}
# Limits of a download: seconds to connect, seconds until the next bytes, and retries.
CONNECT_SECS, READ_SECS, RETRIES = 10.0, 60.0, 3
# Exceptions for no network, a file that has moved or changed or needs a manual download, a full
# disk, or a missing package.
DOWNLOAD_ERRORS = (
    *(OSError, ImportError, AssertionError, tf.errors.OpError, tfds.download.DownloadError),
    *(extractor.ExtractError, download_manager.NonMatchingChecksumError),
)
# Exceptions that TFDS's split grammar raises for an invalid spec.
SPEC_ERRORS = (
    *(ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError),
    RecursionError,
)
Example = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Source:
    """The examples of one split, numbered from 0.

    Attributes:
      name: data set and split, for messages.
      class_names: class names in label order.
      kept_numbers: (n,) numbers of the examples that are not excluded, ascending.
      fingerprint: a hash that changes when the examples or their labels change.
      example_id: maps a number to the name that messages and exclusion lists use.
      load: graph function from an example's number, or from its record if there are `files`, to the
        example: {"image": encoded bytes, or (H, W, `channels`) uint8 if the data set stores arrays,
        "label": () int32} or, with `max_labels`,
        {"image", "label": (M,) int32 padded with -1, "label_weight": (M,) float32}.
      files: (path, first record, number of records) of each stored file, if records can only be
        read sequentially; empty if any example can be loaded by its number.
      max_labels: M, if an image may have any number of labels; None if each has one.
      labels: (N,) int32 for all N numbers, including excluded ones; None if images have several
        labels, or if labels are stored with the images.
      faults: for some numbers, the reason why the file must not be opened.
      count_classes: maps numbers to how many of them have each class, (C,) int64; None if labels
        are stored with the images.
      stored: maps numbers to the files that hold them.
      channels: number of channels of images that are stored as arrays; None for encoded images.
    """

    name: str
    class_names: tuple[str, ...]
    kept_numbers: np.ndarray
    fingerprint: str
    example_id: Callable[[int], str]
    load: Callable[[tf.Tensor], Example]
    files: tuple[tuple[str, int, int], ...] = ()
    max_labels: int | None = None
    labels: np.ndarray | None = None
    faults: Mapping[int, str] = dataclasses.field(default_factory=dict)
    count_classes: Callable[[np.ndarray], np.ndarray] | None = None
    stored: Callable[[np.ndarray], folder_lib.StoredFiles] | None = None
    channels: int | None = None

    @property
    def example_spec(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        """The arrays that `load` returns: name -> (shape, dtype)."""
        image = ((), "string") if self.channels is None else ((None, None, self.channels), "uint8")
        if self.max_labels is None:
            return {"image": image, "label": ((), "int32")}
        shape = (self.max_labels,)
        return {
            "image": image,
            "label": (shape, "int32"),
            "label_weight": (shape, "float32"),
        }

    @property
    def first_numbers(self) -> np.ndarray:
        """Number of the first example of each file."""
        return np.cumsum([0, *(count for _, _, count in self.files)])


def folder_source(
    folder: folder_lib.ImageFolder,
    spec: str,
    class_names: Sequence[str],
    excluded: Collection[str],
) -> Source:
    """Returns the images of a split such as "train[:90%]" of a folder."""
    sizes = {split: len(files) for split, files in folder.files.items()}
    instructions = absolute(spec, sizes, folder.hint)
    files = [
        file for part in instructions for file in folder.files[part.splitname][part.from_ : part.to]
    ]
    labels = folder.labels(files, class_names)
    digest = hashlib.blake2b(digest_size=16)
    for file, label in zip(files, labels, strict=True):
        digest.update(file + f"\0{label}\n".encode())
    paths = tf.constant(files, tf.string)
    root, numbers = os.fsencode(folder.root), tf.constant(labels)

    def load(number):
        path = tf.strings.join([root, paths[number]], "/")
        return {"image": tf.io.read_file(path), "label": numbers[number]}

    keep = np.array([folder_lib.decode(file) not in excluded for file in files], bool)
    return Source(
        name=f"{folder.root} {spec}",
        class_names=tuple(class_names),
        kept_numbers=np.flatnonzero(keep),
        fingerprint=digest.hexdigest(),
        example_id=lambda number: folder_lib.decode(files[number]),
        load=load,
        labels=labels,
        faults={i: folder.faults[file] for i, file in enumerate(files) if file in folder.faults},
        count_classes=lambda indices: np.bincount(labels[indices], minlength=len(class_names)),
        stored=lambda indices: folder_lib.StoredFiles(
            folder.root, [files[index] for index in indices], labels[indices], len(class_names)
        ),
    )


def label_file_source(
    listing: LabelFile,
    spec: str,
    class_names: Sequence[str],
    excluded: Collection[str],
) -> Source:
    """Returns the images of a split such as "train[:90%]" of a label file."""
    instructions = absolute(spec, {split: len(rows) for split, rows in listing.splits.items()})
    images = np.concatenate(
        [listing.splits[part.splitname][part.from_ : part.to] for part in instructions]
        or [np.zeros(0, np.int64)]
    )
    counts = np.diff(listing.label_starts)[images]
    firsts = listing.label_starts[images] - (np.cumsum(counts) - counts)
    entries = np.repeat(firsts, counts) + np.arange(counts.sum())  # indices of the split's labels
    numbers = listing.numbers(class_names, entries)
    digest = hashlib.blake2b(digest_size=16)
    for values in (listing.path_hashes[images], counts, numbers[entries], listing.weights[entries]):
        digest.update(values.tobytes())
    max_labels = max(int(counts.max(initial=0)), 1) if listing.several else None
    root, images_tensor = os.fsencode(listing.root), tf.constant(images)
    paths, path_starts, label_starts = _tensors(listing)
    labels, weights = tf.constant(numbers), tf.constant(listing.weights)

    def load(number):
        image = images_tensor[number]
        start, stop = path_starts[image], path_starts[image + 1]
        path = tf.strings.join([root, tf.strings.substr(paths, start, stop - start)], "/")
        start, stop = label_starts[image], label_starts[image + 1]
        if max_labels is None:
            return {"image": tf.io.read_file(path), "label": labels[start]}
        padded = _pad(labels[start:stop], weights[start:stop], max_labels)
        return {"image": tf.io.read_file(path), **padded}

    is_read = np.ones(len(images), bool)
    if excluded:
        is_read = np.array([listing.path(image) not in excluded for image in images], bool)
    single_labels = numbers[entries] if max_labels is None else None
    all_paths = LabelledPaths(listing, images)
    sizes = folder_lib.file_sizes(listing.root, all_paths)
    irregular = [] if sizes is None else np.flatnonzero(sizes == folder_lib.IRREGULAR).tolist()
    faults = {
        index: folder_lib.fault_of(os.path.join(root, all_paths[index])) for index in irregular
    }

    def count_classes(indices):
        is_counted = np.zeros(len(images), bool)
        is_counted[indices] = True
        labels = numbers[entries][np.repeat(is_counted, counts)]
        return np.bincount(labels, minlength=len(class_names))

    def stored(indices):
        paths = LabelledPaths(listing, images[indices])
        classes = None if single_labels is None else single_labels[indices]
        known_sizes = None if sizes is None else sizes[indices]
        return folder_lib.StoredFiles(listing.root, paths, classes, len(class_names), known_sizes)

    return Source(
        name=f"{listing.root} {spec} with {listing.file.name}",
        class_names=tuple(class_names),
        kept_numbers=np.flatnonzero(is_read),
        fingerprint=digest.hexdigest(),
        example_id=lambda number: listing.path(images[number]),
        load=load,
        max_labels=max_labels,
        labels=single_labels,
        faults=faults,
        count_classes=count_classes,
        stored=stored,
    )


@functools.lru_cache(maxsize=1)  # all splits of a label file share the tensors
def _tensors(listing: LabelFile) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    return tuple(
        tf.constant(values) for values in (listing.paths, listing.path_starts, listing.label_starts)
    )


def _pad(label, weight, length: int) -> dict[str, tf.Tensor]:
    """Pads the labels (n,) of an image and their weights to (length,)."""
    count = tf.size(label)
    fits = tf.debugging.Assert(count <= length, [count, f"labels; expected at most {length}"])
    with tf.control_dependencies([fits]):
        padding = [[0, tf.maximum(length - count, 0)]]
    return {
        "label": tf.ensure_shape(tf.pad(label, padding, constant_values=-1), [length]),
        "label_weight": tf.ensure_shape(tf.pad(weight, padding), [length]),
    }


def tfds_builder(name: str, data_dir: str, *, prepared: bool = True) -> tfds.core.DatasetBuilder:
    """Finds a TFDS data set; prepares the digits, which need no download.

    Args:
      name: TFDS name of the data set.
      data_dir: TFDS's data directory; "" is TFDS's default.
      prepared: whether the data set must already be prepared.

    Raises:
      UserError: no data set has this name, or it is not prepared.
    """
    if name == "digits":
        from mixer.data.sources import digits  # noqa: F401 (registers the builder)
    if name.startswith("imagenet21k"):
        from mixer.data.imagenet import imagenet21k  # noqa: F401
    directory = os.fspath(parse_path("data_dir", data_dir)) if data_dir else None
    try:
        builder = tfds.builder(name, data_dir=directory)
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(
            f"dataset.name={name!r}; expected 'synthetic', 'folder' or a name known to "
            f"tensorflow-datasets.{nearest(name, ['synthetic', 'folder', *tfds.list_builders()])}"
        ) from None
    except (ValueError, KeyError, *DOWNLOAD_ERRORS) as error:  # an unknown version or config
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"dataset.name={name!r}: {reason}") from None
    if prepared and not builder.is_prepared():
        if name != "digits":
            arguments = f"tfds {name}"
            if name.startswith("imagenet21k"):
                arguments = "imagenet21k --source=TAR_OR_FOLDER"
            flag = f" --data_dir={data_dir}" if data_dir else ""
            raise UserError(
                f"dataset {name!r} is not prepared in {builder.data_dir}; prepare it with "
                f"`python -m mixer.tools.prepare {arguments}{flag}`"
            )
        tfds.disable_progress_bar()
        try:
            builder.download_and_prepare()
        except OSError:
            # Another process of the run may have prepared the same data first.
            builder = tfds.builder(name, data_dir=directory)
            if not builder.is_prepared():
                raise
    return builder


@contextlib.contextmanager
def bounded_downloads() -> Iterator[None]:
    """Sets time limits for TFDS's downloads, which would otherwise hang or retry for minutes."""
    import requests

    adapter, retries = requests.adapters.HTTPAdapter, downloader.MAX_RETRIES

    class Bounded(adapter):
        def send(self, request, *args, timeout=None, **options):
            timeout = timeout or (CONNECT_SECS, READ_SECS)
            return super().send(request, *args, timeout=timeout, **options)

    old_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(READ_SECS)  # for ftp://
    requests.adapters.HTTPAdapter, downloader.MAX_RETRIES = Bounded, RETRIES
    try:
        yield
    finally:
        requests.adapters.HTTPAdapter, downloader.MAX_RETRIES = adapter, retries
        socket.setdefaulttimeout(old_timeout)


@dataclasses.dataclass(frozen=True)
class _Parser:
    """Parses only the required features from the records of a TFDS data set.

    Attributes:
      features: the required features, as TFDS deserializes them; images stay encoded, if they are.
      image_key, label_key: names of the image and the label.
      derived: the computed label; None if the label is stored.
      scale: factor for the pixel values; None: unchanged.
    """

    features: tfds.features.FeaturesDict
    image_key: str
    label_key: str
    derived: labels_lib.Derived | None
    scale: int | None

    @property
    def has_several(self) -> bool:
        """Whether an image may have several labels or none."""
        if self.derived:
            return self.derived.several
        return isinstance(self.features[self.label_key], tfds.features.Sequence)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        if self.derived:
            return tuple(self.derived.class_names)
        feature = self.features[self.label_key]
        return tuple((feature.feature if self.has_several else feature).names)

    def parse(self, record: tf.Tensor) -> Example:
        """Returns the image's encoded bytes or array, and its label () or labels (n,), int32."""
        is_encoded = isinstance(self.features[self.image_key], tfds.features.Image)
        decoders = {self.image_key: tfds.decode.SkipDecoding()} if is_encoded else {}
        example = self.features.deserialize_example(record, decoders=decoders)
        label = self.derived.compute(example) if self.derived else example[self.label_key]
        image = example[self.image_key]
        if self.scale is not None:
            image = tf.io.encode_png(tf.io.decode_png(image) * self.scale)
        return {"image": image, "label": tf.cast(label, tf.int32)}

    def load(self, record: tf.Tensor) -> Example:
        """Returns an example with one label; fails in the graph if the label is not a class."""
        example = self.parse(record)
        return {**example, "label": _check_label(example["label"], len(self.class_names))}

    def load_several(self, record: tf.Tensor, length: int) -> Example:
        """Returns an example with up to `length` labels of weight 1."""
        example = self.load(record)
        weight = tf.ones_like(example["label"], tf.float32)
        return {"image": example["image"], **_pad(example["label"], weight, length)}

    def count_labels(self, record: tf.Tensor) -> tf.Tensor:
        """Returns the number of labels of an example."""
        return tf.size(self.parse(record)["label"])


def _make_parser(builder: tfds.core.DatasetBuilder, image_key: str, label_key: str) -> _Parser:
    features = builder.info.features
    derived = None if label_key in features else labels_lib.DERIVED.get(label_key)
    keys = (image_key, *(derived.features if derived else (label_key,)))
    features = tfds.decode.PartialDecoding(dict.fromkeys(keys, True)).extract_features(features)
    return _Parser(features, image_key, label_key, derived, PIXEL_SCALE.get(builder.name))


def tfds_source(
    builder: tfds.core.DatasetBuilder, spec: str, excluded: Collection[str], label_key: str = ""
) -> Source:
    """Returns a split such as "train[:98%]" of a prepared TFDS data set stored as TFRecords.

    Args:
      builder: builder of the data set.
      spec: the split.
      excluded: names of examples to leave out.
      label_key: a feature with one class or a sequence of classes, or a name in labels.DERIVED; ""
        is the default label of the data set.

    Raises:
      UserError: the label or split does not exist, the format is not TFRecord, or a file cannot be
        read.
    """
    info = builder.info
    image_key, own_label = info.supervised_keys or ("image", "label")
    label_key = label_key or own_label
    _check_keys(builder, image_key, label_key)
    if info.file_format != tfds.core.file_adapters.FileFormat.TFRECORD:
        raise UserError(
            f"dataset {builder.name!r} in {builder.data_dir} is stored as "
            f"{info.file_format.value}; expected tfrecord: prepare it again in that format"
        )
    absolute(spec, {split: info.splits[split].num_examples for split in info.splits})
    files = tuple(
        (str(i.filename), i.skip, i.take if i.take > 0 else i.examples_in_shard - i.skip)
        for i in info.splits[spec].file_instructions
    )
    parser = _make_parser(builder, image_key, label_key)
    first_numbers = np.cumsum([0, *(count for _, _, count in files)])
    total = int(first_numbers[-1])
    is_read = np.ones(total, bool)
    is_read[_numbers(excluded, files)] = False

    def example_id(number: int) -> str:
        file = int(np.searchsorted(first_numbers, number, "right")) - 1
        path, skip, _ = files[file]
        return f"{epath.Path(path).name}:{skip + number - first_numbers[file]}"

    digest = hashlib.blake2b(f"{info.full_name} {spec} ".encode(), digest_size=16)
    if label_key != own_label:
        digest.update(f"{label_key} ".encode())
    for path, skip, count in files:
        digest.update(f"{epath.Path(path).name} {skip} {count}\n".encode())
    shards = sorted({os.fsencode(path) for path, _, _ in files})
    load_several = functools.partial(parser.load_several, length=MAX_LABELS)
    source = Source(
        name=f"{info.full_name} {spec}",
        class_names=parser.class_names,
        kept_numbers=np.flatnonzero(is_read),
        fingerprint=digest.hexdigest(),
        example_id=example_id,
        load=load_several if parser.has_several else parser.load,
        files=files,
        max_labels=MAX_LABELS if parser.has_several else None,
        stored=lambda indices: folder_lib.StoredFiles(
            epath.Path(builder.data_dir), shards, None, len(parser.class_names)
        ),
        channels=_array_channels(info.features[image_key]),
    )
    num_bytes, num_examples = (
        sum(getattr(info.splits[split], field) for split in info.splits)
        for field in ("num_bytes", "num_examples")
    )
    if total * num_bytes / max(num_examples, 1) > IN_MEMORY_BYTES:
        return source
    return _hold_in_memory(source, parser)


def _hold_in_memory(source: Source, parser: _Parser) -> Source:
    """Returns the source with its encoded records in memory, to load examples by number."""
    try:
        pieces = [read_piece(*file) for file in source.files]
    except tf.errors.OpError as error:
        raise UserError(f"{source.name} cannot be read: {first_line(error)}") from None
    records = tf.concat(pieces, 0) if pieces else tf.constant([], tf.string)
    if not parser.has_several:
        return dataclasses.replace(source, load=lambda n: parser.load(records[n]), files=())
    dataset = tf.data.Dataset.from_tensor_slices(records)
    counts = dataset.map(parser.count_labels, tf.data.AUTOTUNE).as_numpy_iterator()
    try:
        length = max([1, *map(int, counts)])
    except tf.errors.OpError as error:
        raise UserError(f"{source.name}, label {parser.label_key!r}: {first_line(error)}") from None
    return dataclasses.replace(
        source,
        load=lambda number: parser.load_several(records[number], length),
        files=(),
        max_labels=length,
    )


def unmatched(builder: tfds.core.DatasetBuilder, names: Iterable[str]) -> list[str]:
    """Returns the names that match no example in any split of a TFDS data set."""
    files = [
        (str(part.filename), part.skip, part.take)
        for split in builder.info.splits.values()
        for part in split.file_instructions
    ]
    return [name for name in names if not len(_numbers([name], files))]


def _numbers(names: Collection[str], files: Sequence[tuple[str, int, int]]) -> np.ndarray:
    """Returns the numbers of the examples with names such as "digits-00000-of-00001:17"."""
    parts: dict[str, list[tuple[int, int, int]]] = {}  # a split may take several parts of a file
    first = 0
    for path, skip, count in files:
        parts.setdefault(epath.Path(path).name, []).append((first, skip, count))
        first += count
    numbers = []
    for name in names:
        file, _, index = name.rpartition(":")
        for first, skip, count in parts.get(file, ()):
            if index.isdecimal() and skip <= int(index) < skip + count:
                numbers.append(first + int(index) - skip)
    return np.array(numbers, np.int64)


def _check_keys(builder: tfds.core.DatasetBuilder, image_key: str, label_key: str) -> None:
    """Raises UserError if a data set lacks the image or the label."""
    features = dict(builder.info.features)
    choices = [key for key, feature in features.items() if _is_label(feature)]
    choices += [
        key for key, derived in labels_lib.DERIVED.items() if derived.dataset == builder.name
    ]
    image = features.get(image_key)
    is_array = type(image) is tfds.features.Tensor and len(image.shape) == 3
    if is_array and (image.np_dtype != np.uint8 or image.shape[-1] is None):
        raise UserError(
            f"dataset {builder.name!r}: {image_key!r} has arrays of {image.np_dtype} and shape "
            f"{image.shape}; expected uint8 (H, W, channels)"
        )
    if not (is_array or isinstance(image, tfds.features.Image)) or label_key not in choices:
        raise UserError(
            f"dataset {builder.name!r} has no image {image_key!r} with label {label_key!r}; "
            f"expected one of these in dataset.label_key: {', '.join(choices) or 'none'}."
            f"{nearest(label_key, choices)}"
        )


def _array_channels(feature: tfds.features.FeatureConnector) -> int | None:
    """Returns the number of channels of images that are stored as arrays; None: encoded images."""
    return None if isinstance(feature, tfds.features.Image) else feature.shape[-1]


def _is_label(feature) -> bool:
    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    return isinstance(feature, tfds.features.ClassLabel)


def _check_label(label, num_classes: int) -> tf.Tensor:
    """Returns `label`, of any shape; fails in the graph if a value is not a class."""
    assertion = tf.debugging.Assert(
        tf.reduce_all((label >= 0) & (label < num_classes)),
        ["label", label, f"where the classes are 0 to {num_classes - 1}"],
    )
    with tf.control_dependencies([assertion]):
        return tf.identity(label)


def absolute(spec: str, sizes: dict[str, int], hint: str = "") -> list:
    """Parses a split spec with TFDS's own grammar.

    A split may have any name without "+" and "[" except "all". TFDS allows fewer names.

    Args:
      spec: the split.
      sizes: number of examples of each split.
      hint: the end of the error for an invalid spec.

    Raises:
      UserError: the spec is not a valid split.
    """
    # Replace names that the grammar rejects with aliases that are longer than every name.
    longest = max(map(len, sizes), default=0)
    names = {
        name if re.fullmatch(r"[\w-]+", name) else "x" * (longest + i): name
        for i, name in enumerate(sizes, 1)
    }
    aliases = {name: alias for alias, name in names.items()}
    parts = []
    for part in spec.split("+"):
        name, bracket, range_text = part.strip().partition("[")
        parts.append(aliases.get(name, name) + bracket + range_text)
    try:
        if any(part.startswith("all[") for part in parts):
            raise ValueError("`all` means all complete splits; write train[:90%]+test[:90%]")
        if "all" in parts and "all" in sizes:
            raise ValueError("`all` means all complete splits; rename the split called 'all'")
        instructions = tfds.core.ReadInstruction.from_spec("+".join(parts)).to_absolute(
            {alias: SimpleNamespace(num_examples=sizes[name]) for alias, name in names.items()}
        )
    except SPEC_ERRORS as error:
        choices = ", ".join(f"{split} ({size:,})" for split, size in sizes.items())
        reason = str(error).splitlines()[0] if str(error) else "not understood"
        for alias, name in names.items():
            reason = reason.replace(alias, name) if alias != name else reason
        bad_names = [name for name in sizes if "+" in name or "[" in name]
        if bad_names:
            hint += f"; rename {bad_names[0]!r}: + and [ are part of the split syntax"
        raise UserError(
            f"split {spec!r}: {reason}; expected one of the splits {choices}, or a part such as "
            f"train[:90%] (an empty val_split or test_split stands for no split){hint}"
        ) from None
    return [dataclasses.replace(part, splitname=names[part.splitname]) for part in instructions]


def read_piece(path, start, count) -> tf.Tensor:
    """Reads the records start to start + count of a TFRecord file, (count,) strings."""
    records = tf.data.TFRecordDataset(path, buffer_size=8 << 20).skip(start).take(count)
    batch = records.batch(tf.maximum(tf.cast(count, tf.int64), 1))
    return batch.get_single_element()
