"""The order in which training reads a set: a function of (seed, step) that can be entered anywhere.

Example number g of a run (g = step * batch size + place in the batch) is example `g mod n` of epoch
`g div n`, where n is the size of the set: batches run across the ends of epochs and nothing is
dropped. Every epoch is a permutation of its own. With several processes each takes its own
contiguous rows of every batch, so an epoch still holds each example once.

Two ways to find the permutation, by what the storage can do:

- `batch_examples`: any example can be read by its number (image folders, small sets held in
  memory). The permutation is global, and the same for any number of processes.
- `groups`: records lie one behind the other in large files. Readers, each of which supplies its own
  rows of every batch, share the files: per epoch these are permuted and each reader takes a
  contiguous run of them; a run of whole files is cut into groups, and a group is read and shuffled
  whole. Files before the one wanted are never opened. This order depends on the number of readers,
  which is that of the processes a run begins with. It stays when the run goes on with another
  number of processes: a process reads what supplies its rows (`reader_rows`).

TensorFlow-free, so that every backend of the data can use it.
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
    """Records that are read together and shuffled whole.

    Attributes:
      epoch: the epoch the group belongs to.
      pieces: what to read, in this order.
      order: places in the records so read, in the order of training; excluded ones do not appear.
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
    """Returns (epoch, example number) of each place in batch `step`: two (B,) int64 arrays."""
    start = step * global_batch_size
    epoch, place = np.divmod(np.arange(start, start + global_batch_size), num_examples)
    example = np.empty_like(place)
    for e in np.unique(epoch):
        in_epoch = epoch == e
        example[in_epoch] = _permutation(seed, int(e), num_examples)[place[in_epoch]]
    return epoch, example


def process_slice(global_batch_size: int, process_index: int, process_count: int) -> slice:
    """The part of every global batch that one process reads."""
    size = global_batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def reader_rows(
    global_batch_size: int, process_index: int, process_count: int, num_readers: int
) -> list[tuple[int, slice]]:
    """The parts of every batch that one process reads: (reader, rows of its part), in order.

    With as many processes as readers, a process reads all of its own reader's part. Both numbers
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
    """Yields, without end, the groups of one reader from batch `start_step` on.

    Args:
      start_step: first batch wanted; the first group starts with that batch's first example.
      seed: of the run.
      file_sizes: number of records in each file.
      excluded: by file number, the places of records that are left out.
      global_batch_size: B; a reader supplies B / num_readers examples of each batch.
      reader: which one.
      num_readers: of how many.
      rows: those of the reader's examples of each batch that are wanted; groups without one are
        left out.
      group_size: a group is closed by the file with which it reaches this many examples.
    """
    files = _Files(file_sizes, excluded)
    total = int(files.kept_counts.sum())
    size = global_batch_size // num_readers

    def supplied(count: int, reader: int) -> int:
        """How many of the run's first `count` examples come from `reader`."""
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

        Each is a list of (file, start, stop), places among the file's kept records.
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
        """Pieces to read for runs of kept records, each from its first to its last record."""
        return tuple(
            Piece(file, self._record(file, start), self._record(file, stop - 1) + 1)
            for file, start, stop in runs
        )

    def _record(self, file: int, place: int) -> int:
        """Turns a place among a file's kept records into one among all of its records."""
        if file not in self._excluded:
            return place
        records = np.setdiff1d(np.arange(self._sizes[file]), self._excluded[file])
        return int(records[place])

    def permutation(self, pieces: tuple[Piece, ...], seed: list[int]) -> np.ndarray:
        """A permutation of the kept records among those of `pieces`."""
        is_kept = [
            ~np.isin(
                np.arange(piece.start, piece.stop),
                self._excluded.get(piece.file, ()),
                assume_unique=True,
            )
            for piece in pieces
        ]
        return np.random.default_rng(seed).permutation(np.flatnonzero(np.concatenate(is_kept)))
