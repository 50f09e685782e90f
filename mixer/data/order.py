"""The order in which training reads a data set: a function of (seed, step) with random access.

Example number g of a run (g = step * batch size + index in the batch) is example `g mod n` of epoch
`g div n`, where n is the size of the data set: batches span the ends of epochs, and no example is
dropped. Every epoch has its own permutation. Each process takes its own contiguous rows of every
batch, so an epoch contains each example once for any number of processes.

The storage determines one of two kinds of permutation:

- `batch_examples`: any example can be read by its number (image folders, small data sets in
  memory). The permutation is global, and the same for any number of processes.
- `groups`: records are stored sequentially in large files. Readers share the files, and each reader
  supplies its own rows of every batch. In each epoch the files are permuted, and each reader takes
  a contiguous sequence of them, which is cut into groups. A group is read and shuffled as a unit.
  Files before the first required file are never opened. This order depends on the number of
  readers, which is the number of processes at the first start of the run. It does not change when
  the run resumes with another number of processes: a process reads what supplies its rows
  (`Reading.parts`).

This module does not use TensorFlow, so that every data backend can use it.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Piece:
    """Records `start` to `stop` of file number `file`."""

    file: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Records that are read together and shuffled as a unit.

    Attributes:
      epoch: the epoch that the group belongs to.
      pieces: the pieces to read, in this order.
      order: indices into the records of the pieces, in training order, without excluded records.
    """

    epoch: int
    pieces: tuple[Piece, ...]
    order: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The training order of a run, and the part of each batch that one process reads.

    Attributes:
      seed: the run's seed.
      global_batch_size: number of examples in a batch, over all processes.
      process_index: index of the process.
      process_count: number of processes; it divides the batch size.
      num_readers: number of processes that the run started with; it divides the batch size too.
        None: `process_count`.
    """

    seed: int
    global_batch_size: int
    process_index: int = 0
    process_count: int = 1
    num_readers: int | None = None

    @property
    def rows(self) -> slice:
        """The rows of every batch that the process reads."""
        size = self.global_batch_size // self.process_count
        return slice(self.process_index * size, (self.process_index + 1) * size)

    def examples(self, step: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the epochs and numbers of the process's examples, as from `batch_examples`."""
        epoch, example = batch_examples(
            step,
            seed=self.seed,
            num_examples=num_examples,
            global_batch_size=self.global_batch_size,
        )
        return epoch[self.rows], example[self.rows]

    @property
    def reader_size(self) -> int:
        """Number of examples of every batch that one reader supplies."""
        return self.global_batch_size // (self.num_readers or self.process_count)

    @property
    def parts(self) -> list[tuple[int, slice]]:
        """The parts of every batch that the process reads: (reader, rows of the reader's part).

        With as many processes as readers, each process reads the part of one reader.
        """
        parts = []
        for reader in range(self.num_readers or self.process_count):
            first = reader * self.reader_size
            start = max(self.rows.start - first, 0)
            stop = min(self.rows.stop - first, self.reader_size)
            if start < stop:
                parts.append((reader, slice(start, stop)))
        return parts


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_examples(
    step: int, *, seed: int, num_examples: int, global_batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epoch and the number of each example in batch `step`: two (B,) int64 arrays."""
    start = step * global_batch_size
    epoch, place = np.divmod(np.arange(start, start + global_batch_size), num_examples)
    example = np.empty_like(place)
    for e in np.unique(epoch):
        in_epoch = epoch == e
        example[in_epoch] = _permutation(seed, int(e), num_examples)[place[in_epoch]]
    return epoch, example


def groups(
    start_step: int,
    reading: Reading,
    *,
    reader: int,
    rows: slice,
    file_starts: np.ndarray,
    numbers: np.ndarray,
    group_size: int,
) -> Iterator[Group]:
    """Yields the groups of one reader from batch `start_step` on, without end.

    Args:
      start_step: the first batch; the first group starts with that batch's first example.
      reading: the training order.
      reader: number of the reader.
      rows: the required rows among the reader's examples of each batch; groups without a required
        row are skipped.
      file_starts: (F + 1,) number of the first record of each of the F files, and of all records.
      numbers: (n,) numbers of the records that are not excluded, ascending.
      group_size: a group ends with the file at which it reaches this many examples.
    """
    kept_starts = np.searchsorted(numbers, file_starts)
    total = len(numbers)
    seed, size, batch_size = reading.seed, reading.reader_size, reading.global_batch_size

    def supplied(count: int, reader: int) -> int:
        """Returns how many of the run's first `count` examples come from `reader`."""
        batches, remainder = divmod(count, batch_size)
        return batches * size + min(max(remainder - reader * size, 0), size)

    first_required = start_step * size
    epoch = max((start_step * batch_size) // total - 1, 0)
    while supplied((epoch + 1) * total, reader) <= first_required:
        epoch += 1
    while True:
        parts = [
            supplied((epoch + 1) * total, r) - supplied(epoch * total, r) for r in range(reader + 1)
        ]
        permuted = np.random.default_rng([seed, epoch]).permutation(len(file_starts) - 1)
        num_earlier = supplied(epoch * total, reader)  # examples in earlier epochs and groups
        groups_of_runs = _cut(kept_starts, permuted, sum(parts[:-1]), sum(parts), group_size)
        for number, runs in enumerate(groups_of_runs):
            count = sum(stop - start for _, start, stop in runs)
            if num_earlier + count > first_required:
                pieces, indices = [], []
                for file, start, stop in runs:
                    records = numbers[start:stop] - file_starts[file]
                    indices.append(records - records[0] + sum(p.stop - p.start for p in pieces))
                    pieces.append(Piece(file, int(records[0]), int(records[-1]) + 1))
                rng = np.random.default_rng([seed, epoch, reader, number])
                order = rng.permutation(np.concatenate(indices))
                row = np.arange(num_earlier, num_earlier + count) % size
                is_required = (row >= rows.start) & (row < rows.stop)
                is_required[: max(first_required - num_earlier, 0)] = (
                    False  # rows of earlier batches
                )
                if is_required.any():
                    yield Group(epoch, tuple(pieces), order[is_required])
            num_earlier += count
        epoch += 1


def _cut(
    kept_starts: np.ndarray, permuted: np.ndarray, low: int, high: int, group_size: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts kept records low to high of the permuted files into groups.

    A group is a list of (file, start, stop); file f has kept records kept_starts[f] to
    kept_starts[f + 1].
    """
    ends = np.cumsum(np.diff(kept_starts)[permuted])
    first, last = np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left")
    runs: list[tuple[int, int, int]] = []
    count = 0
    for i in range(first, min(last, len(permuted) - 1) + 1):
        file = int(permuted[i])
        kept_start, kept_stop = int(kept_starts[file]), int(kept_starts[file + 1])
        shift = kept_stop - int(ends[i])  # from a place in the permuted order to a kept record
        start, stop = max(low + shift, kept_start), min(high + shift, kept_stop)
        if stop > start:
            runs.append((file, start, stop))
            count += stop - start
        if count and (count >= group_size or i >= last):
            yield runs
            runs, count = [], 0
