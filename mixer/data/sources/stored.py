"""Where examples are stored, read with TensorFlow: TFDS records and folders of images."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import download_manager, downloader, extractor

from mixer.data import labels as labels_lib
from mixer.data import order
from mixer.data.preprocessing.host import decode
from mixer.data.sources import folder as folder_lib
from mixer.errors import UserError, first_line, nearest
from mixer.files import parse_path

# A TFDS split of up to this size is held in memory, encoded as it is on disk, and shuffled whole.
IN_MEMORY_BYTES = 2 << 30
# The most labels of an image in a larger split: to find the true number would mean to read it all.
MOST_LABELS = 128
# What TFDS's pixels are multiplied by; dSprites' are 0 and 1.
PIXEL_SCALE = {"dsprites": 255}
LABELS_AT_ONCE = 4096
# Waited for in a download: for a connection, and for the next bytes.
CONNECT_SECS, READ_SECS, RETRIES = 10.0, 60.0, 3
# What reading and decoding raise; where a path is no UTF-8, TensorFlow fails to say so.
READ_ERRORS = (tf.errors.OpError, UnicodeDecodeError)
# No network, a file that has moved, is another now or has to be fetched by hand, a full disk, a
# package that is missing.
DOWNLOAD_ERRORS = (
    *(OSError, ImportError, AssertionError, tf.errors.OpError, tfds.download.DownloadError),
    *(extractor.ExtractError, download_manager.NonMatchingChecksumError),
)
# What TFDS's grammar of splits raises for what is none.
SPEC_ERRORS = (
    *(ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError),
    RecursionError,
)
AUTOTUNE = tf.data.AUTOTUNE
Example = dict[str, tf.Tensor]
Preprocess = Callable[[Example, tf.Tensor], Example]


@dataclasses.dataclass(frozen=True)
class Source:
    """The examples of one split, numbered from 0.

    Attributes:
      name: data set and split, for messages.
      class_names: of the labels, in order.
      kept: (n,) numbers of the examples that are not excluded, ascending.
      fingerprint: changes when the examples or their labels do.
      example_id: from a number to the name that messages and exclusion lists use.
      load: graph function to an example: from its number or, where there are `files`, from its
        record. It is {"image": encoded bytes, "label": () int32} or, with `max_labels`,
        {"image", "label": (M,) int32 padded with -1, "label_weight": (M,) float32}.
      files: (path, first record, number of records) of each stored file, where records can only be
        read one after the other; empty where any example can be loaded by its number.
      max_labels: M, where an image has any number of labels; None where each has one.
      labels: (N,) int32 of all N numbers, excluded ones too; None where they are many an image, or
        stored with the images.
      faults: why the files of some numbers must not be opened.
      count_classes: from numbers to how many of them have each class, (C,) int64; None where the
        labels are stored with the images.
      stored: from numbers to the files that hold them.
    """

    name: str
    class_names: tuple[str, ...]
    kept: np.ndarray
    fingerprint: str
    example_id: Callable[[int], str]
    load: Callable[[tf.Tensor], Example]
    files: tuple[tuple[str, int, int], ...] = ()
    max_labels: int | None = None
    labels: np.ndarray | None = None
    faults: Mapping[int, str] = dataclasses.field(default_factory=dict)
    count_classes: Callable[[np.ndarray], np.ndarray] | None = None
    stored: Callable[[np.ndarray], folder_lib.StoredFiles] | None = None

    @property
    def example_spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """What `load` gives: name -> (shape, dtype)."""
        if self.max_labels is None:
            return {"image": ((), "string"), "label": ((), "int32")}
        several = (self.max_labels,)
        return {
            "image": ((), "string"),
            "label": (several, "int32"),
            "label_weight": (several, "float32"),
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
    """The images of a split such as "train[:90%]" of a folder."""
    instructions = absolute(spec, {split: len(files) for split, files in folder.files.items()})
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
        kept=np.flatnonzero(keep),
        fingerprint=digest.hexdigest(),
        example_id=lambda number: folder_lib.decode(files[number]),
        load=load,
        labels=labels,
        faults={i: folder.faults[file] for i, file in enumerate(files) if file in folder.faults},
        count_classes=lambda kept: np.bincount(labels[kept], minlength=len(class_names)),
        stored=lambda kept: folder_lib.StoredFiles(
            folder.root, [files[number] for number in kept], labels[kept], len(class_names)
        ),
    )


def label_file_source(
    listing: folder_lib.LabelFile,
    spec: str,
    class_names: Sequence[str],
    excluded: Collection[str],
) -> Source:
    """The images of a split such as "train[:90%]" of a label file."""
    instructions = absolute(spec, {split: len(rows) for split, rows in listing.splits.items()})
    images = np.concatenate(
        [listing.splits[part.splitname][part.from_ : part.to] for part in instructions]
        or [np.zeros(0, np.int64)]
    )
    counts = np.diff(listing.label_starts)[images]
    firsts = listing.label_starts[images] - (np.cumsum(counts) - counts)
    entries = np.repeat(firsts, counts) + np.arange(counts.sum())  # of the split's images
    numbers = listing.numbers(class_names, entries)
    digest = hashlib.blake2b(digest_size=16)
    for values in (listing.path_hashes[images], counts, numbers[entries], listing.weights[entries]):
        digest.update(values.tobytes())
    most = max(int(counts.max(initial=0)), 1) if listing.several else None
    root, images_tensor = os.fsencode(listing.root), tf.constant(images)
    paths, path_starts, label_starts = _tensors(listing)
    labels, weights = tf.constant(numbers), tf.constant(listing.weights)

    def load(number):
        image = images_tensor[number]
        start, stop = path_starts[image], path_starts[image + 1]
        path = tf.strings.join([root, tf.strings.substr(paths, start, stop - start)], "/")
        start, stop = label_starts[image], label_starts[image + 1]
        if most is None:
            return {"image": tf.io.read_file(path), "label": labels[start]}
        padded = _padded(labels[start:stop], weights[start:stop], most)
        return {"image": tf.io.read_file(path), **padded}

    keep = np.ones(len(images), bool)
    if excluded:
        keep = np.array([listing.path(image) not in excluded for image in images], bool)
    labels_alone = numbers[entries] if most is None else None
    all_paths = folder_lib.LabelledPaths(listing, images)
    sizes = folder_lib.file_sizes(listing.root, all_paths)
    irregular = [] if sizes is None else np.flatnonzero(sizes == folder_lib.IRREGULAR).tolist()
    faults = {
        place: folder_lib.fault_of(os.path.join(root, all_paths[place])) for place in irregular
    }

    def count_classes(kept):
        chosen = np.zeros(len(images), bool)
        chosen[kept] = True
        return np.bincount(numbers[entries][np.repeat(chosen, counts)], minlength=len(class_names))

    def stored(kept):
        paths = folder_lib.LabelledPaths(listing, images[kept])
        alone = None if labels_alone is None else labels_alone[kept]
        known = None if sizes is None else sizes[kept]
        return folder_lib.StoredFiles(listing.root, paths, alone, len(class_names), known)

    return Source(
        name=f"{listing.root} {spec} with {listing.file.name}",
        class_names=tuple(class_names),
        kept=np.flatnonzero(keep),
        fingerprint=digest.hexdigest(),
        example_id=lambda number: listing.path(images[number]),
        load=load,
        max_labels=most,
        labels=labels_alone,
        faults=faults,
        count_classes=count_classes,
        stored=stored,
    )


@functools.lru_cache(maxsize=1)  # its splits share them
def _tensors(listing: folder_lib.LabelFile) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    return tuple(
        tf.constant(each) for each in (listing.paths, listing.path_starts, listing.label_starts)
    )


def _padded(label, weight, most: int) -> dict[str, tf.Tensor]:
    """The labels (n,) of an image and their weights, filled up to (most,)."""
    count = tf.size(label)
    fits = tf.debugging.Assert(count <= most, [count, f"labels, where at most {most} are read"])
    with tf.control_dependencies([fits]):
        room = [[0, tf.maximum(most - count, 0)]]
    return {
        "label": tf.ensure_shape(tf.pad(label, room, constant_values=-1), [most]),
        "label_weight": tf.ensure_shape(tf.pad(weight, room), [most]),
    }


def tfds_builder(name: str, data_dir: str, *, prepared: bool = True) -> tfds.core.DatasetBuilder:
    """Finds a TFDS data set; the digits, which need no download, are prepared here.

    Args:
      name: as TFDS knows it.
      data_dir: where TFDS keeps its data; empty is TFDS's own default.
      prepared: whether it has to be prepared already.

    Raises:
      UserError: no data set has the name, or it is not prepared.
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
            f"dataset.name={name!r}: neither 'synthetic' nor 'folder' nor known to "
            f"tensorflow-datasets.{nearest(name, ['synthetic', 'folder', *tfds.list_builders()])}"
        ) from None
    except (ValueError, KeyError, *DOWNLOAD_ERRORS) as error:  # a version or a config it has not
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"dataset.name={name!r}: {reason}") from None
    if prepared and not builder.is_prepared():
        if name != "digits":
            what = f"tfds {name}"
            if name.startswith("imagenet21k"):
                what = "imagenet21k --source=TAR_OR_FOLDER"
            flag = f" --data_dir={data_dir}" if data_dir else ""
            raise UserError(
                f"dataset {name!r} is not prepared: looked in {builder.data_dir}; prepare it with "
                f"`python -m mixer.tools.prepare {what}{flag}`"
            )
        tfds.disable_progress_bar()
        try:
            builder.download_and_prepare()
        except OSError:
            # Another process of the run was first; what it has made is what this one wanted.
            builder = tfds.builder(name, data_dir=directory)
            if not builder.is_prepared():
                raise
    return builder


@contextlib.contextmanager
def bounded_downloads() -> Iterator[None]:
    """Gives TFDS's downloads time limits: they have none, and try again for minutes."""
    import requests

    adapter, retries = requests.adapters.HTTPAdapter, downloader.MAX_RETRIES

    class Bounded(adapter):
        def send(self, request, *args, timeout=None, **options):
            timeout = timeout or (CONNECT_SECS, READ_SECS)
            return super().send(request, *args, timeout=timeout, **options)

    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(READ_SECS)  # of ftp://
    requests.adapters.HTTPAdapter, downloader.MAX_RETRIES = Bounded, RETRIES
    try:
        yield
    finally:
        requests.adapters.HTTPAdapter, downloader.MAX_RETRIES = adapter, retries
        socket.setdefaulttimeout(waiting)


def tfds_source(
    builder: tfds.core.DatasetBuilder, spec: str, excluded: Collection[str], label_key: str = ""
) -> Source:
    """A split such as "train[:98%]" of a prepared TFDS data set stored as TFRecords.

    Args:
      builder: of the data set.
      spec: the split.
      excluded: names of examples to leave out.
      label_key: a feature with one class or a sequence of classes, or a name of labels.DERIVED;
        empty is the set's own label.

    Raises:
      UserError: no such label or split, another format, files that cannot be read.
    """
    info = builder.info
    image_key, own_label = info.supervised_keys or ("image", "label")
    label_key = label_key or own_label
    _check_keys(builder, image_key, label_key)
    derived = None if label_key in info.features else labels_lib.DERIVED.get(label_key)
    if info.file_format != tfds.core.file_adapters.FileFormat.TFRECORD:
        raise UserError(
            f"dataset {builder.name!r} in {builder.data_dir} is stored as "
            f"{info.file_format.value}; only tfrecord is read: prepare it again in that format"
        )
    absolute(spec, {split: info.splits[split].num_examples for split in info.splits})
    instructions = info.splits[spec].file_instructions
    files = tuple(
        (str(i.filename), i.skip, i.take if i.take > 0 else i.examples_in_shard - i.skip)
        for i in instructions
    )
    shards = sorted({os.fsencode(path) for path, _, _ in files})
    ends = np.cumsum([count for _, _, count in files])
    # Only what is needed is parsed, and the image is left to the preprocessing.
    keys = (image_key, *(derived.features if derived else (label_key,)))
    features = tfds.decode.PartialDecoding(dict.fromkeys(keys, True)).extract_features(
        info.features
    )
    decoders = {image_key: tfds.decode.SkipDecoding()}
    several = (
        derived.several if derived else isinstance(features[label_key], tfds.features.Sequence)
    )
    if derived:
        class_names = derived.class_names
    else:
        class_names = (features[label_key].feature if several else features[label_key]).names

    def parse(record):
        example = features.deserialize_example(record, decoders=decoders)
        label = derived.compute(example) if derived else tf.cast(example[label_key], tf.int32)
        image = example[image_key]
        if builder.name in PIXEL_SCALE:
            image = tf.io.encode_png(tf.io.decode_png(image) * PIXEL_SCALE[builder.name])
        return {"image": image, "label": _checked(label, len(class_names))}

    def parse_several(record, most):
        example = parse(record)
        weight = tf.ones_like(example["label"], tf.float32)
        return {"image": example["image"], **_padded(example["label"], weight, most)}

    def example_id(number):
        file = int(np.searchsorted(ends, number, "right"))
        path, skip, count = files[file]
        return f"{epath.Path(path).name}:{skip + number - (ends[file] - count)}"

    total = int(ends[-1]) if len(ends) else 0
    keep = np.ones(total, bool)
    keep[_numbers(excluded, files)] = False
    base = sum(info.splits[split].num_examples for split in info.splits)
    bytes_per_example = sum(info.splits[split].num_bytes for split in info.splits) / max(base, 1)
    digest = hashlib.blake2b(f"{info.full_name} {spec} ".encode(), digest_size=16)
    if label_key != own_label:
        digest.update(f"{label_key} ".encode())
    for path, skip, count in files:
        digest.update(f"{epath.Path(path).name} {skip} {count}\n".encode())
    source = Source(
        name=f"{info.full_name} {spec}",
        class_names=tuple(class_names),
        kept=np.flatnonzero(keep),
        fingerprint=digest.hexdigest(),
        example_id=example_id,
        load=functools.partial(parse_several, most=MOST_LABELS) if several else parse,
        files=files,
        max_labels=MOST_LABELS if several else None,
        stored=lambda kept: folder_lib.StoredFiles(
            epath.Path(builder.data_dir), shards, None, len(class_names)
        ),
    )
    if total * bytes_per_example > IN_MEMORY_BYTES:
        return source
    try:
        pieces = [_read_piece(*file) for file in files]
    except tf.errors.OpError as error:
        raise UserError(f"{source.name} cannot be read: {first_line(error)}") from None
    records = tf.concat(pieces, 0) if pieces else tf.constant([], tf.string)
    if not several:
        return dataclasses.replace(source, load=lambda number: parse(records[number]), files=())

    def count(record):
        example = features.deserialize_example(record, decoders=decoders)
        return tf.size(derived.compute(example) if derived else example[label_key])

    counts = tf.data.Dataset.from_tensor_slices(records).map(count, AUTOTUNE)
    try:
        most = max([1, *map(int, counts.as_numpy_iterator())])
    except tf.errors.OpError as error:
        raise UserError(f"{source.name}, label {label_key!r}: {first_line(error)}") from None
    return dataclasses.replace(
        source,
        load=lambda number: parse_several(records[number], most),
        files=(),
        max_labels=most,
    )


def unmatched(builder: tfds.core.DatasetBuilder, names: Iterable[str]) -> list[str]:
    """Those of `names` that are no example of a TFDS data set, in any split."""
    files = [
        (str(part.filename), part.skip, part.take)
        for split in builder.info.splits.values()
        for part in split.file_instructions
    ]
    return [name for name in names if not len(_numbers([name], files))]


def _numbers(names: Collection[str], files: Sequence[tuple[str, int, int]]) -> np.ndarray:
    """Numbers of the examples that have these names, such as "digits-00000-of-00001:17"."""
    parts: dict[str, list[tuple[int, int, int]]] = {}  # a split may take several parts of a file
    first = 0
    for path, skip, count in files:
        parts.setdefault(epath.Path(path).name, []).append((first, skip, count))
        first += count
    found = []
    for name in names:
        file, _, place = name.rpartition(":")
        for first, skip, count in parts.get(file, ()):
            if place.isdecimal() and skip <= int(place) < skip + count:
                found.append(first + int(place) - skip)
    return np.array(found, np.int64)


def _check_keys(builder: tfds.core.DatasetBuilder, image_key: str, label_key: str) -> None:
    """Raises UserError where a data set has no such image or label."""
    features = dict(builder.info.features)
    choices = [key for key, feature in features.items() if _is_label(feature)]
    choices += [key for key, each in labels_lib.DERIVED.items() if each.dataset == builder.name]
    is_image = isinstance(features.get(image_key), tfds.features.Image)
    if not is_image or label_key not in choices:
        raise UserError(
            f"dataset {builder.name!r} has no image {image_key!r} with label {label_key!r}; for "
            f"dataset.label_key it has: {', '.join(choices) or 'none'}."
            f"{nearest(label_key, choices)}"
        )


def _is_label(feature) -> bool:
    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    return isinstance(feature, tfds.features.ClassLabel)


def _checked(label, num_classes: int) -> tf.Tensor:
    """`label`, of any shape, as it is; fails in the graph where one is no class."""
    assertion = tf.debugging.Assert(
        tf.reduce_all((label >= 0) & (label < num_classes)),
        ["label", label, f"where the classes are 0 to {num_classes - 1}"],
    )
    with tf.control_dependencies([assertion]):
        return tf.identity(label)


def absolute(spec: str, sizes: dict[str, int]) -> list:
    """Parses a split spec with TFDS's own grammar; UserError where it names no split.

    Unlike there, a split may have any name without "+" and "[", but for "all".
    """
    # Names longer than any other stand for those that the grammar does not take.
    longest = max(map(len, sizes), default=0)
    names = {
        name if re.fullmatch(r"[\w-]+", name) else "x" * (longest + i): name
        for i, name in enumerate(sizes, 1)
    }
    aliases = {name: alias for alias, name in names.items()}
    parts = []
    for part in spec.split("+"):
        name, bracket, rest = part.strip().partition("[")
        parts.append(aliases.get(name, name) + bracket + rest)
    try:
        if any(part.startswith("all[") for part in parts):
            raise ValueError("`all` is all splits whole; write train[:90%]+test[:90%]")
        if "all" in parts and "all" in sizes:
            raise ValueError("`all` is all splits together; rename the split called 'all'")
        instructions = tfds.core.ReadInstruction.from_spec("+".join(parts)).to_absolute(
            {alias: _SplitSize(sizes[name]) for alias, name in names.items()}
        )
    except SPEC_ERRORS as error:
        known = ", ".join(f"{split} ({size:,})" for split, size in sizes.items())
        reason = str(error).splitlines()[0] if str(error) else "not understood"
        for alias, name in names.items():
            reason = reason.replace(alias, name) if alias != name else reason
        odd = [name for name in sizes if "+" in name or "[" in name]
        hint = f"; rename {odd[0]!r}: + and [ have a meaning here" if odd else ""
        raise UserError(
            f"split {spec!r}: {reason}; the splits are {known}, and parts such as train[:90%] "
            f"(an empty val_split or test_split means none){hint}"
        ) from None
    return [dataclasses.replace(part, splitname=names[part.splitname]) for part in instructions]


@dataclasses.dataclass(frozen=True)
class _SplitSize:
    """What TFDS's split grammar wants to know of a split."""

    num_examples: int


def _read_piece(path, start, count) -> tf.Tensor:
    """Records start to start + count of a TFRecord file, (count,) strings."""
    records = tf.data.TFRecordDataset(path, buffer_size=8 << 20).skip(start).take(count)
    batch = records.batch(tf.maximum(tf.cast(count, tf.int64), 1))
    return batch.get_single_element()


def _ordered(
    source: Source,
    start_step: int,
    *,
    seed: int,
    global_batch_size: int,
    group_size: int,
    process_index: int,
    process_count: int,
    num_readers: int,
) -> tf.data.Dataset:
    """This process's examples from `start_step` on: (epoch, number, what `load` takes)."""
    batch = dict(seed=seed, global_batch_size=global_batch_size)
    if not source.files:
        part = order.process_slice(global_batch_size, process_index, process_count)

        def batches():
            for step in itertools.count(start_step):
                epoch, place = order.batch_examples(step, num_examples=len(source.kept), **batch)
                yield epoch[part], source.kept[place[part]]

        signature = (tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int64))
        numbers = tf.data.Dataset.from_generator(batches, output_signature=signature)
        return numbers.map(lambda epoch, number: (epoch, number, number)).unbatch()

    excluded = _excluded(source)

    def read(reader: int, rows: slice) -> tf.data.Dataset:
        groups = functools.partial(
            order.groups,
            start_step,
            file_sizes=[count for _, _, count in source.files],
            excluded=excluded,
            group_size=group_size,
            reader=reader,
            num_readers=num_readers,
            rows=rows,
            **batch,
        )
        return _grouped(source, groups)

    parts = order.reader_rows(global_batch_size, process_index, process_count, num_readers)
    if len(parts) == 1:
        return read(*parts[0])
    # Each batch takes the rows of one reader, then those of the next.
    readers = tuple(read(reader, rows).batch(rows.stop - rows.start) for reader, rows in parts)
    joined = tf.data.Dataset.zip(readers).map(
        lambda *pieces: tuple(tf.concat(each, 0) for each in zip(*pieces, strict=True))
    )
    return joined.unbatch()


def _excluded(source: Source) -> dict[int, np.ndarray]:
    """By the number of its file, the places of the records that are not kept."""
    first = source.first_numbers
    gone = np.ones(first[-1], bool)
    gone[source.kept] = False
    files = np.unique(np.searchsorted(first, np.flatnonzero(gone), "right") - 1)
    return {file: np.flatnonzero(gone[first[file] : first[file + 1]]) for file in files.tolist()}


def _grouped(source: Source, groups: Callable[[], Iterator[order.Group]]) -> tf.data.Dataset:
    """The examples of `groups()`: (epoch, number, record)."""
    first = source.first_numbers

    def described():
        for group in groups():
            yield (
                group.epoch,
                [source.files[piece.file][0] for piece in group.pieces],
                [source.files[piece.file][1] + piece.start for piece in group.pieces],
                [piece.stop - piece.start for piece in group.pieces],
                [first[piece.file] + piece.start for piece in group.pieces],
                group.order,
            )

    def read_group(epoch, paths, starts, counts, numbers, places):
        pieces = tf.data.Dataset.from_tensor_slices((paths, starts, counts))
        records = pieces.map(_read_piece, num_parallel_calls=8, deterministic=True).unbatch()
        records = records.batch(tf.reduce_sum(counts)).get_single_element()
        numbers = tf.repeat(numbers - tf.cumsum(counts, exclusive=True), counts) + tf.range(
            tf.reduce_sum(counts)
        )
        epochs = tf.fill(tf.shape(places), epoch)
        return epochs, tf.gather(numbers, places), tf.gather(records, places)

    vector = tf.TensorSpec([None], tf.int64)
    signature = (
        tf.TensorSpec([], tf.int64),
        tf.TensorSpec([None], tf.string),
        vector,
        vector,
        vector,
        vector,
    )
    return (
        tf.data.Dataset.from_generator(described, output_signature=signature)
        .map(read_group)
        .prefetch(1)  # the next group is read while this one is trained on
        .unbatch()
    )


def _sequential(source: Source, start: int, stop: int) -> tf.data.Dataset:
    """Kept examples start to stop, in order: (epoch 0, number, what `load` takes)."""
    numbers = source.kept[start:stop]
    if not source.files:
        return tf.data.Dataset.from_tensor_slices((np.zeros_like(numbers), numbers, numbers))
    low, high = (int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else (0, 0)
    first = source.first_numbers
    pieces = [
        (path, skip + max(low - begin, 0), min(high, end) - max(low, begin))
        for (path, skip, _), begin, end in zip(source.files, first, first[1:], strict=False)
        if min(high, end) > max(low, begin)
    ]
    paths = tf.constant([path for path, _, _ in pieces], tf.string)
    starts, counts = (tf.constant([piece[i] for piece in pieces], tf.int64) for i in (1, 2))
    kept = np.zeros(high - low, bool)
    kept[numbers - low] = True
    kept = tf.constant(kept)
    return (
        tf.data.Dataset.from_tensor_slices((paths, starts, counts))
        .flat_map(lambda path, start, count: tf.data.TFRecordDataset(path).skip(start).take(count))
        .enumerate()
        .filter(lambda place, record: kept[place])
        .map(lambda place, record: (tf.constant(0, tf.int64), place + low, record))
    )


def _batches(
    source: Source,
    examples: Callable[[int], tf.data.Dataset],
    preprocess: Preprocess,
    *,
    seed: int,
    batch_size: int,
    with_keys: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Preprocesses and batches `examples(0)`; `examples(k)` starts k batches later."""

    def finish(epoch, number, item):
        # The key of an example depends on (seed, epoch, number) and on nothing else.
        key = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
        key = tf.random.experimental.stateless_fold_in(key, number)
        example = preprocess(source.load(item), key)
        if with_keys:  # for the steps that the device takes; each half's little end comes first
            example["augment_key"] = tf.reshape(tf.bitcast(key, tf.uint32), [4])
        return example

    batches = examples(0).map(finish, AUTOTUNE, deterministic=True).batch(batch_size).prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    options.threading.max_intra_op_parallelism = 1
    done = 0
    try:
        for batch in batches.with_options(options).as_numpy_iterator():
            yield batch
            done += 1
    except READ_ERRORS as error:
        # TensorFlow does not say which image it was: take the batch's examples one by one.
        cause = error
        try:
            for epoch, number, item in examples(done).take(batch_size):
                try:
                    finish(epoch, number, item)
                except READ_ERRORS as fault:
                    raise unreadable(source, int(number), fault) from None
        except READ_ERRORS as fault:
            cause = fault
        raise UserError(f"{source.name}: reading failed: {_reason(cause)}") from cause


def _reason(fault: Exception) -> str:
    if isinstance(fault, UnicodeDecodeError):  # of TensorFlow's message
        fault = ValueError(folder_lib.decode(fault.object))
    return first_line(fault)


def unreadable(source: Source, number: int, fault: Exception) -> UserError:
    """The line that names an example that cannot be read or preprocessed."""
    return UserError(
        f"{source.name}: cannot use {folder_lib.displayed(source.example_id(number))}: "
        f"{_reason(fault)}; "
        "`python -m mixer.tools.prepare check` finds all such images and writes a list to leave "
        "them out"
    )


def train_batches(
    source: Source,
    preprocess: Preprocess,
    *,
    start_step: int,
    seed: int,
    global_batch_size: int,
    group_size: int,
    process_index: int,
    process_count: int,
    num_readers: int | None = None,
    with_keys: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's part of batch `start_step` and of all that follow.

    `num_readers` is the number of processes that the run was begun with, this one's if None; it
    makes no difference where any example can be loaded by its number. `with_keys` adds the keys of
    the examples, "augment_key" (n, 4) uint32.
    """

    def examples(batches: int) -> tf.data.Dataset:
        return _ordered(
            source,
            start_step + batches,
            seed=seed,
            global_batch_size=global_batch_size,
            group_size=group_size,
            process_index=process_index,
            process_count=process_count,
            num_readers=num_readers or process_count,
        )

    size = global_batch_size // process_count
    return _batches(source, examples, preprocess, seed=seed, batch_size=size, with_keys=with_keys)


def eval_batches(
    source: Source, preprocess: Preprocess, *, start: int, stop: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields kept examples start to stop, in order; the last batch may be short."""

    def examples(batches: int) -> tf.data.Dataset:
        return _sequential(source, min(start + batches * batch_size, stop), stop)

    return _batches(source, examples, preprocess, seed=0, batch_size=batch_size)


def labels(source: Source) -> np.ndarray:
    """The labels of the kept examples in order, as `load` gives them; no image is decoded.

    They are (n,) int32, or (n, M), -1 where an image has fewer. Records that can only be read one
    after the other are all read.
    """
    if source.labels is not None:
        return source.labels[source.kept]

    def label_alone(example: Example, key: tf.Tensor) -> Example:
        return {"label": example["label"]}

    batches = eval_batches(
        source, label_alone, start=0, stop=len(source.kept), batch_size=LABELS_AT_ONCE
    )
    return np.concatenate([batch["label"] for batch in batches])


def stored_bytes(source: Source) -> int:
    """About what the kept images take as they are stored, judged by some of them.

    Any example can be loaded by its number.
    """
    places = np.linspace(0, len(source.kept) - 1, 64).astype(int)
    sizes = []
    for number in source.kept[places].tolist():
        try:
            sizes.append(len(source.load(tf.constant(number))["image"].numpy()))
        except READ_ERRORS as fault:
            raise unreadable(source, number, fault) from None
    return int(np.mean(sizes) * len(source.kept))


def check(source: Source, preprocess: Preprocess) -> Iterator[tuple[int, str | None]]:
    """Preprocesses every example, several at a time; yields (number, fault or None)."""
    key = tf.constant([0, 0], tf.int64)

    def fault(element) -> tuple[int, str | None]:
        _, number, item = element
        if int(number) in source.faults:
            return int(number), source.faults[int(number)]
        try:
            example = source.load(item)
            # All of it, where a crop would decode its window only.
            decode(example["image"])
            preprocess(example, key)
        except READ_ERRORS as error:
            return int(number), _reason(error)
        return int(number), None

    elements = iter(_sequential(source, 0, len(source.kept)))
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(elements, 1024)):
            yield from pool.map(fault, chunk)
