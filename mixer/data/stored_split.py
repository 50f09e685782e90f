"""Reads, preprocesses and batches the stored examples of a split with TensorFlow."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from mixer.data import order
from mixer.data.preprocessing.decoding import decode
from mixer.data.preprocessing.host import make_preprocess, output_spec
from mixer.data.preprocessing.spec import Specification, parse
from mixer.data.sources import folder
from mixer.data.sources.stored import Example, Source, read_piece
from mixer.data.splits import Batches, Split
from mixer.errors import UserError, first_line, printable
from mixer.sizes import RGB_CHANNELS

# Exceptions of reading and decoding. TensorFlow raises UnicodeDecodeError while it reports an error
# about a path that is not UTF-8.
READ_ERRORS = (tf.errors.OpError, UnicodeDecodeError)
LABELS_AT_ONCE = 4096
AUTOTUNE = tf.data.AUTOTUNE


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StoredSplit(Split):
    """A split of a `Source`.

    Attributes:
      source: the source of the examples.
      function: the preprocessing function, (example, key) -> example.
      group_size: as in `order.groups`.
      with_keys: whether training batches have "augment_key".
    """

    source: Source
    function: Callable[[Example, tf.Tensor], Example]
    group_size: int
    with_keys: bool = False

    def train_batches(self, start_step: int, reading: order.Reading) -> Batches:
        """As `Split.train_batches`."""
        return self._batches(
            lambda batches: self._read_in_train_order(start_step + batches, reading),
            seed=reading.seed,
            batch_size=reading.global_batch_size // reading.process_count,
            with_keys=self.with_keys,
        )

    def read(self, *, start: int, stop: int, batch_size: int) -> Batches:
        """As `Split.read`."""

        def examples(batches: int) -> tf.data.Dataset:
            return self._read_sequentially(min(start + batches * batch_size, stop), stop)

        return self._batches(examples, seed=0, batch_size=batch_size)

    def with_preprocess(
        self, spec: Specification, *, image_size: tuple[int | None, int | None], keys: bool = False
    ) -> "StoredSplit":
        """As `Split.with_preprocess`."""
        function = make_preprocess(spec, image_size)
        example_spec = output_spec(function, self.source.example_spec)
        if keys:
            example_spec["augment_key"] = ((4,), "uint32")
        return dataclasses.replace(
            self,
            preprocess=spec,
            function=function,
            example_spec=example_spec,
            with_keys=keys,
            cache=None,
        )

    def example_id(self, place: int) -> str:
        """As `Split.example_id`."""
        return self.source.example_id(int(self.numbers[place]))

    def labels(self) -> np.ndarray:
        """As `Split.labels`; reads all records if labels are stored with the images."""
        if self.source.labels is not None:
            return self.source.labels[self.numbers]
        only_labels = dataclasses.replace(
            self, function=lambda example, key: {"label": example["label"]}
        )
        batches = only_labels.read(start=0, stop=self.num_examples, batch_size=LABELS_AT_ONCE)
        return np.concatenate([batch["label"] for batch in batches])

    def stored_bytes(self) -> int:
        """As `Split.stored_bytes`, from 64 images; requires that examples are loaded by number."""
        places = np.linspace(0, self.num_examples - 1, 64).astype(int)
        sizes = []
        for number in self.numbers[places].tolist():
            try:
                image = self.source.load(tf.constant(number))["image"].numpy()
                sizes.append(len(image) if self.source.channels is None else image.nbytes)
            except READ_ERRORS as fault:
                raise self._unreadable(number, fault) from None
        return int(np.mean(sizes) * self.num_examples)

    @functools.cached_property
    def stored(self) -> folder.StoredFiles:
        """As `Split.stored`."""
        return self.source.stored(self.numbers)

    def class_counts(self) -> np.ndarray | None:
        """As `Split.class_counts`."""
        return self.source.count_classes and self.source.count_classes(self.numbers)

    def check(self) -> Iterator[tuple[int, str | None]]:
        """Preprocesses every example in threads; yields (number, fault or None)."""
        key = tf.constant([0, 0], tf.int64)
        faults = self.source.faults

        def fault(element) -> tuple[int, str | None]:
            _, number, item = element
            if int(number) in faults:
                return int(number), faults[int(number)]
            try:
                example = self.source.load(item)
                # Decode the complete image; a crop would decode only its window.
                decode(example["image"], channels=self.preprocess.channels)
                self.function(example, key)
            except READ_ERRORS as error:
                return int(number), _reason(error)
            return int(number), None

        elements = iter(self._read_sequentially(0, self.num_examples))
        with ThreadPoolExecutor() as pool:
            while chunk := list(itertools.islice(elements, 1024)):
                yield from pool.map(fault, chunk)

    # The following methods return data sets of (epoch, number, argument of `source.load`).

    def _read_in_train_order(self, start_step: int, reading: order.Reading) -> tf.data.Dataset:
        """Returns this process's training examples from batch `start_step` on."""
        if not self.source.files:
            return self._read_by_number(start_step, reading)

        def read(reader: int, rows: slice) -> tf.data.Dataset:
            groups = functools.partial(
                order.groups,
                start_step,
                reading,
                reader=reader,
                rows=rows,
                file_starts=self.source.first_numbers,
                numbers=self.numbers,
                group_size=self.group_size,
            )
            return self._read_groups(groups)

        if len(reading.parts) == 1:
            return read(*reading.parts[0])
        # Each batch takes the rows of one reader, then those of the next.
        readers = tuple(
            read(reader, rows).batch(rows.stop - rows.start) for reader, rows in reading.parts
        )
        joined = tf.data.Dataset.zip(readers).map(
            lambda *pieces: tuple(tf.concat(column, 0) for column in zip(*pieces, strict=True))
        )
        return joined.unbatch()

    def _read_by_number(self, start_step: int, reading: order.Reading) -> tf.data.Dataset:
        def batches():
            for step in itertools.count(start_step):
                epoch, places = reading.examples(step, self.num_examples)
                yield epoch, self.numbers[places]

        signature = (tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int64))
        numbers = tf.data.Dataset.from_generator(batches, output_signature=signature)
        return numbers.map(lambda epoch, number: (epoch, number, number)).unbatch()

    def _read_groups(self, groups: Callable[[], Iterator[order.Group]]) -> tf.data.Dataset:
        """Returns the examples of the groups that `groups()` yields."""
        first, files = self.source.first_numbers, self.source.files

        def described():
            for group in groups():
                yield (
                    group.epoch,
                    [files[piece.file][0] for piece in group.pieces],
                    [files[piece.file][1] + piece.start for piece in group.pieces],
                    [piece.stop - piece.start for piece in group.pieces],
                    [first[piece.file] + piece.start for piece in group.pieces],
                    group.order,
                )

        def read_group(epoch, paths, starts, counts, numbers, places):
            pieces = tf.data.Dataset.from_tensor_slices((paths, starts, counts))
            records = pieces.map(read_piece, num_parallel_calls=8, deterministic=True).unbatch()
            records = records.batch(tf.reduce_sum(counts)).get_single_element()
            numbers = tf.repeat(numbers - tf.cumsum(counts, exclusive=True), counts) + tf.range(
                tf.reduce_sum(counts)
            )
            epochs = tf.fill(tf.shape(places), epoch)
            return epochs, tf.gather(numbers, places), tf.gather(records, places)

        vector = tf.TensorSpec([None], tf.int64)
        strings = tf.TensorSpec([None], tf.string)
        signature = (tf.TensorSpec([], tf.int64), strings, *[vector] * 4)
        return (
            tf.data.Dataset.from_generator(described, output_signature=signature)
            .map(read_group)
            .prefetch(1)  # read the next group while training uses this one
            .unbatch()
        )

    def _read_sequentially(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns the examples at places start to stop, in order, as epoch 0."""
        source, numbers = self.source, self.numbers[start:stop]
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
        is_required = np.zeros(high - low, bool)
        is_required[numbers - low] = True
        is_required = tf.constant(is_required)

        def records(path, start, count):
            return tf.data.TFRecordDataset(path).skip(start).take(count)

        return (
            tf.data.Dataset.from_tensor_slices((paths, starts, counts))
            .flat_map(records)
            .enumerate()
            .filter(lambda place, record: is_required[place])
            .map(lambda place, record: (tf.constant(0, tf.int64), place + low, record))
        )

    def _batches(
        self,
        examples: Callable[[int], tf.data.Dataset],
        *,
        seed: int,
        batch_size: int,
        with_keys: bool = False,
    ) -> Batches:
        """Preprocesses and batches `examples(0)`; `examples(k)` must start k batches later."""

        def finish(epoch, number, item):
            # The key of an example depends only on (seed, epoch, number).
            key = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
            key = tf.random.experimental.stateless_fold_in(key, number)
            example = self.function(self.source.load(item), key)
            if with_keys:  # for the device's ops; the low word of each half comes first
                example["augment_key"] = tf.reshape(tf.bitcast(key, tf.uint32), [4])
            return example

        batches = (
            examples(0).map(finish, AUTOTUNE, deterministic=True).batch(batch_size).prefetch(2)
        )
        options = tf.data.Options()
        options.deterministic = True
        options.threading.max_intra_op_parallelism = 1
        count = 0
        try:
            for batch in batches.with_options(options).as_numpy_iterator():
                yield batch
                count += 1
        except READ_ERRORS as error:
            # TensorFlow does not report which image failed: process the batch's examples singly.
            cause = error
            try:
                for epoch, number, item in examples(count).take(batch_size):
                    try:
                        finish(epoch, number, item)
                    except READ_ERRORS as fault:
                        raise self._unreadable(int(number), fault) from None
            except READ_ERRORS as fault:
                cause = fault
            raise UserError(f"{self.source.name}: reading failed: {_reason(cause)}") from cause

    def _unreadable(self, number: int, fault: Exception) -> UserError:
        """Returns the error for an example that cannot be read or preprocessed."""
        return UserError(
            f"{self.source.name}: cannot use "
            f"{printable(self.source.example_id(number))}: {_reason(fault)}; "
            "`python -m mixer.tools.prepare check` finds all such images and writes a list that "
            "excludes them"
        )


def make_split(
    source: Source,
    preprocess: str | Specification,
    *,
    image_size: tuple[int | None, int | None],
    group_size: int = 1,
) -> StoredSplit:
    """Makes a split of all examples of a source that are not excluded.

    Args:
      source: the source of the examples.
      preprocess: the ops that are applied to each image.
      image_size: required (H, W) of the preprocessed images; None: any.
      group_size: as in `order.groups`.

    Raises:
      UserError: as in `spec.parse`, or the images cannot have the channels of the specification.
    """
    spec = parse(preprocess, image_size)
    _check_channels(source, spec)
    function = make_preprocess(spec, image_size)
    return StoredSplit(
        name=source.name,
        class_names=source.class_names,
        fingerprint=source.fingerprint,
        numbers=source.kept_numbers,
        example_spec=output_spec(function, source.example_spec),
        preprocess=spec,
        multi_label=source.max_labels is not None,
        order_depends_on_readers=bool(source.files),
        source=source,
        function=function,
        group_size=group_size,
    )


def _check_channels(source: Source, spec: Specification) -> None:
    """Raises UserError if the images of a source cannot have the channels of a specification."""
    if source.channels is None and spec.channels not in (1, RGB_CHANNELS):
        raise UserError(
            f"{source.name} has image files, which are decoded to 1 (grey) or 3 (RGB) channels; "
            f"model.in_channels={spec.channels} needs a TFDS set of uint8 arrays"
        )
    if source.channels not in (None, spec.channels):
        raise UserError(
            f"{source.name} has images of {source.channels} channel(s); expected "
            f"model.in_channels={spec.channels}"
        )


def _reason(fault: Exception) -> str:
    if isinstance(fault, UnicodeDecodeError):  # from TensorFlow's own message
        fault = ValueError(folder.decode(fault.object))
    return first_line(fault)
