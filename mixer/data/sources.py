"""Where examples are stored, read with TensorFlow: TFDS records and folders of images."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from mixer.data import folder as folder_lib
from mixer.data import order
from mixer.errors import UserError, nearest

# A TFDS split of up to this size is held in memory, encoded as it is on disk, and shuffled whole.
IN_MEMORY_BYTES = 2 << 30
AUTOTUNE = tf.data.AUTOTUNE
Preprocess = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Source:
    """The examples of one split, numbered from 0.

    Attributes:
      name: data set and split, for messages.
      class_names: of the labels, in order.
      kept: (n,) numbers of the examples that are not excluded, ascending.
      fingerprint: changes when the examples or their labels do.
      example_id: from a number to the name that messages and exclusion lists use.
      load: graph function to (encoded image, label): from an example's number or, where there are
        `files`, from its record.
      files: (path, first record, number of records) of each stored file, where records can only be
        read one after the other; empty where any example can be loaded by its number.
    """

    name: str
    class_names: tuple[str, ...]
    kept: np.ndarray
    fingerprint: str
    example_id: Callable[[int], str]
    load: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
    files: tuple[tuple[str, int, int], ...] = ()

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
    instructions = _absolute(spec, {split: len(files) for split, files in folder.files.items()})
    files = [
        file for part in instructions for file in folder.files[part.splitname][part.from_ : part.to]
    ]
    labels = folder.labels(files, class_names)
    digest = hashlib.blake2b(digest_size=16)
    for file, label in zip(files, labels, strict=True):
        digest.update(f"{file}\0{label}\n".encode())
    paths = tf.constant(files, tf.string)
    root, numbers = str(folder.root), tf.constant(labels)

    def load(number):
        path = tf.strings.join([root, paths[number]], "/")
        return tf.io.read_file(path), numbers[number]

    keep = np.array([file not in excluded for file in files], bool)
    return Source(
        name=f"{folder.root} {spec}",
        class_names=tuple(class_names),
        kept=np.flatnonzero(keep),
        fingerprint=digest.hexdigest(),
        example_id=lambda number: files[number],
        load=load,
    )


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
        from mixer.data import digits  # noqa: F401 (registers the builder)
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(
            f"dataset.name={name!r}: neither 'synthetic' nor 'folder' nor known to "
            f"tensorflow-datasets.{nearest(name, ['synthetic', 'folder', *tfds.list_builders()])}"
        ) from None
    except (ValueError, AssertionError, KeyError) as error:  # a version or a config it has not
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"dataset.name={name!r}: {reason}") from None
    if prepared and not builder.is_prepared():
        if name != "digits":
            flag = f" --data_dir={data_dir}" if data_dir else ""
            raise UserError(
                f"dataset {name!r} is not prepared: looked in {builder.data_dir}; prepare it with "
                f"`python -m mixer.tools.prepare tfds {name}{flag}`"
            )
        tfds.disable_progress_bar()
        builder.download_and_prepare()
    return builder


def tfds_source(builder: tfds.core.DatasetBuilder, spec: str, excluded: Collection[str]) -> Source:
    """A split such as "train[:98%]" of a prepared TFDS data set stored as TFRecords."""
    info = builder.info
    image_key, label_key = info.supervised_keys or ("image", "label")
    missing = [key for key in (image_key, label_key) if key not in info.features]
    if missing or not isinstance(info.features[label_key], tfds.features.ClassLabel):
        raise UserError(
            f"dataset {builder.name!r} is no image classification: it has {list(info.features)}"
        )
    if info.file_format != tfds.core.file_adapters.FileFormat.TFRECORD:
        raise UserError(
            f"dataset {builder.name!r} in {builder.data_dir} is stored as "
            f"{info.file_format.value}; only tfrecord is read: prepare it again in that format"
        )
    _absolute(spec, {split: info.splits[split].num_examples for split in info.splits})
    instructions = info.splits[spec].file_instructions
    files = tuple(
        (str(i.filename), i.skip, i.take if i.take > 0 else i.examples_in_shard - i.skip)
        for i in instructions
    )
    ends = np.cumsum([count for _, _, count in files])
    features = info.features
    decoders = {image_key: tfds.decode.SkipDecoding()}

    def parse(record):
        example = features.deserialize_example(record, decoders=decoders)
        return example[image_key], tf.cast(example[label_key], tf.int32)

    def example_id(number):
        file = int(np.searchsorted(ends, number, "right"))
        path, skip, count = files[file]
        return f"{epath.Path(path).name}:{skip + number - (ends[file] - count)}"

    total = int(ends[-1]) if len(ends) else 0
    keep = np.ones(total, bool)
    if excluded:
        keep = np.array([example_id(number) not in excluded for number in range(total)], bool)
    base = sum(info.splits[split].num_examples for split in info.splits)
    bytes_per_example = sum(info.splits[split].num_bytes for split in info.splits) / max(base, 1)
    digest = hashlib.blake2b(f"{info.full_name} {spec} ".encode(), digest_size=16)
    for path, skip, count in files:
        digest.update(f"{epath.Path(path).name} {skip} {count}\n".encode())
    source = Source(
        name=f"{info.full_name} {spec}",
        class_names=tuple(info.features[label_key].names),
        kept=np.flatnonzero(keep),
        fingerprint=digest.hexdigest(),
        example_id=example_id,
        load=parse,
        files=files,
    )
    if total * bytes_per_example > IN_MEMORY_BYTES:
        return source
    try:
        pieces = [_read_piece(*file) for file in files]
    except tf.errors.OpError as error:
        raise UserError(f"{source.name} cannot be read: {first_line(error)}") from None
    records = tf.concat(pieces, 0) if pieces else tf.constant([], tf.string)
    return dataclasses.replace(source, load=lambda number: parse(records[number]), files=())


def _absolute(spec: str, sizes: dict[str, int]) -> list:
    """Parses a split spec with TFDS's own grammar; UserError where it names no split."""
    try:
        instructions = tfds.core.ReadInstruction.from_spec(spec).to_absolute(
            {split: _SplitSize(size) for split, size in sizes.items()}
        )
    except (ValueError, AssertionError, KeyError, AttributeError) as error:
        known = ", ".join(f"{split} ({size:,})" for split, size in sizes.items())
        reason = str(error).splitlines()[0] if str(error) else "not understood"
        raise UserError(
            f"split {spec!r}: {reason}; the splits are {known}, and parts such as train[:90%] "
            "(an empty val_split or test_split means none)"
        ) from None
    return instructions


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

    first = source.first_numbers
    kept = np.zeros(first[-1], bool)
    kept[source.kept] = True
    excluded = {
        file: np.flatnonzero(~kept[first[file] : first[file + 1]])
        for file in np.unique(np.searchsorted(first, np.flatnonzero(~kept), "right") - 1).tolist()
    }

    def groups():
        for group in order.groups(
            start_step,
            file_sizes=[count for _, _, count in source.files],
            excluded=excluded,
            group_size=group_size,
            process_index=process_index,
            process_count=process_count,
            **batch,
        ):
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
        tf.data.Dataset.from_generator(groups, output_signature=signature)
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
    kept = tf.constant(np.isin(np.arange(low, high), numbers))
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
) -> Iterator[dict[str, np.ndarray]]:
    """Preprocesses and batches `examples(0)`; `examples(k)` starts k batches later."""

    def finish(epoch, number, item):
        image, label = source.load(item)
        # The key of an example depends on (seed, epoch, number) and on nothing else.
        key = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
        key = tf.random.experimental.stateless_fold_in(key, number)
        return {"image": preprocess(image, key), "label": label}

    batches = examples(0).map(finish, AUTOTUNE, deterministic=True).batch(batch_size).prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    options.threading.max_intra_op_parallelism = 1
    done = 0
    try:
        for batch in batches.with_options(options).as_numpy_iterator():
            yield batch
            done += 1
    except tf.errors.OpError as error:
        # TensorFlow does not say which image it was: take the batch's examples one by one.
        cause = error
        try:
            for epoch, number, item in examples(done).take(batch_size):
                try:
                    finish(epoch, number, item)
                except tf.errors.OpError as fault:
                    raise unreadable(source, int(number), fault) from None
        except tf.errors.OpError as fault:
            cause = fault
        raise UserError(f"{source.name}: reading failed: {first_line(cause)}") from cause


def unreadable(source: Source, number: int, fault: Exception) -> UserError:
    """The line that names an example that cannot be read or preprocessed."""
    return UserError(
        f"{source.name}: cannot use {source.example_id(number)}: {first_line(fault)}; "
        "`python -m mixer.tools.prepare check` finds all such images and writes a list to leave "
        "them out"
    )


def first_line(error: Exception) -> str:
    """TensorFlow's message without its op names and node traces."""
    text = getattr(error, "message", None) or str(error)
    text = text.replace("{{function_node __wrapped__", "").strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line.split("}}")[-1].split(" [Op:")[0].strip()[:300]


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
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's part of batch `start_step` and of all that follow."""

    def examples(batches: int) -> tf.data.Dataset:
        return _ordered(
            source,
            start_step + batches,
            seed=seed,
            global_batch_size=global_batch_size,
            group_size=group_size,
            process_index=process_index,
            process_count=process_count,
        )

    size = global_batch_size // process_count
    return _batches(source, examples, preprocess, seed=seed, batch_size=size)


def eval_batches(
    source: Source, preprocess: Preprocess, *, start: int, stop: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields kept examples start to stop, in order; the last batch may be short."""

    def examples(batches: int) -> tf.data.Dataset:
        return _sequential(source, min(start + batches * batch_size, stop), stop)

    return _batches(source, examples, preprocess, seed=0, batch_size=batch_size)


def check(source: Source, preprocess: Preprocess) -> Iterator[tuple[int, str | None]]:
    """Preprocesses every example, several at a time; yields (number, fault or None)."""
    key = tf.constant([0, 0], tf.int64)

    def fault(example) -> tuple[int, str | None]:
        _, number, item = example
        try:
            image, _ = source.load(item)
            tf.io.decode_image(image, channels=3, expand_animations=False)  # all of it
            preprocess(image, key)
        except tf.errors.OpError as error:
            return int(number), first_line(error)
        return int(number), None

    examples = iter(_sequential(source, 0, len(source.kept)))
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(examples, 1024)):
            yield from pool.map(fault, chunk)
