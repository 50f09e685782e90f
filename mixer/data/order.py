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
  (`reader_rows`).

This module does not use TensorFlow, so that every data backend can use it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

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


def process_slice(global_batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns the rows of every global batch that one process reads."""
    size = global_batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def reader_rows(
    global_batch_size: int, process_index: int, process_count: int, num_readers: int
) -> list[tuple[int, slice]]:
    """Returns the parts of every batch that a process reads, in order: (reader, rows of its part).

    With as many processes as readers, each process reads the part of one reader. Both numbers must
    divide the batch size.
    """
    rows = process_slice(global_batch_size, process_index, process_count)
    parts = []
    for reader in range(num_readers):
        part = process_slice(global_batch_size, reader, num_readers)
        start, stop = max(rows.start, part.start), min(rows.stop, part.stop)
        if start < stop:
            parts.append((reader, slice(start - part.start, stop - part.start)))
    return parts


def groups(
    start_step: int,
    *,
    seed: int,
    file_sizes: Sequence[int],
    excluded: dict[int, np.ndarray],
    global_batch_size: int,
    reader: int,
    num_readers: int,
    rows: slice,
    group_size: int,
) -> Iterator[Group]:
    """Yields the groups of one reader from batch `start_step` on, without end.

    Args:
      start_step: the first batch; the first group starts with that batch's first example.
      seed: the run's seed.
      file_sizes: number of records in each file.
      excluded: for each file number, the indices of excluded records.
      global_batch_size: B; a reader supplies B / num_readers examples of each batch.
      reader: number of the reader.
      num_readers: number of readers.
      rows: the required rows among the reader's examples of each batch; groups without a required
        row are skipped.
      group_size: a group ends with the file at which it reaches this many examples.
    """
    files = _Files(file_sizes, excluded)
    total = int(files.kept_counts.sum())
    size = global_batch_size // num_readers

    def supplied(count: int, reader: int) -> int:
        """Returns how many of the run's first `count` examples come from `reader`."""
        batches, remainder = divmod(count, global_batch_size)
        return batches * size + min(max(remainder - reader * size, 0), size)

    first_wanted = start_step * size
    epoch = max((start_step * global_batch_size) // total - 1, 0)
    while supplied((epoch + 1) * total, reader) <= first_wanted:
        epoch += 1
    while True:
        parts = [
            supplied((epoch + 1) * total, r) - supplied(epoch * total, r) for r in range(reader + 1)
        ]
        permuted = np.random.default_rng([seed, epoch]).permutation(len(file_sizes))
        done = supplied(epoch * total, reader)  # examples of earlier epochs and groups
        groups_of_runs = files.cut(permuted, sum(parts[:-1]), sum(parts), group_size)
        for number, runs in enumerate(groups_of_runs):
            count = sum(stop - start for _, start, stop in runs)
            if done + count > first_wanted:
                pieces = files.pieces(runs)
                order = files.permutation(pieces, [seed, epoch, reader, number])
                row = np.arange(done, done + count) % size
                is_wanted = (row >= rows.start) & (row < rows.stop)
                is_wanted[: max(first_wanted - done, 0)] = False  # of earlier batches
                if is_wanted.any():
                    yield Group(epoch, pieces, order[is_wanted])
            done += count
        epoch += 1


class _Files:
    """Files of records, of which some are excluded.

    Attributes:
      kept_counts: (F,) how many records of each file are not excluded.
    """

    def __init__(self, sizes: Sequence[int], excluded: dict[int, np.ndarray]):
        self._sizes = sizes
        self._excluded = {
            file: np.unique(places) for file, places in excluded.items() if len(places)
        }
        self.kept_counts = np.array(
            [size - len(self._excluded.get(file, ())) for file, size in enumerate(sizes)]
        )

    def cut(
        self, permuted: np.ndarray, low: int, high: int, group_size: int
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Cuts kept records low to high of the permuted files into groups.

        A group is a list of (file, start, stop), indices among the file's kept records.
        """
        ends = np.cumsum(self.kept_counts[permuted])
        first, last = np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left")
        runs: list[tuple[int, int, int]] = []
        count = 0
        for i in range(first, min(last, len(permuted) - 1) + 1):
            file, kept_count = int(permuted[i]), int(self.kept_counts[permuted[i]])
            base = int(ends[i]) - kept_count
            start, stop = max(low - base, 0), min(high - base, kept_count)
            if stop > start:
                runs.append((file, start, stop))
                count += stop - start
            if count and (count >= group_size or i >= last):
                yield runs
                runs, count = [], 0

    def pieces(self, runs: list[tuple[int, int, int]]) -> tuple[Piece, ...]:
        """Returns the pieces to read for runs of kept records, from their first to last record."""
        return tuple(
            Piece(file, self._record(file, start), self._record(file, stop - 1) + 1)
            for file, start, stop in runs
        )

    def _record(self, file: int, index: int) -> int:
        """Converts an index among a file's kept records to one among all of its records."""
        if file not in self._excluded:
            return index
        records = np.setdiff1d(np.arange(self._sizes[file]), self._excluded[file])
        return int(records[index])

    def permutation(self, pieces: tuple[Piece, ...], seed: list[int]) -> np.ndarray:
        """Returns a permutation of the kept records in `pieces`."""
        is_kept = [
            ~np.isin(
                np.arange(piece.start, piece.stop),
                self._excluded.get(piece.file, ()),
                assume_unique=True,
            )
            for piece in pieces
        ]
        return np.random.default_rng(seed).permutation(np.flatnonzero(np.concatenate(is_kept)))
