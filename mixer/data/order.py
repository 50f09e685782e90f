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
        mine = epoch == e
        example[mine] = _permutation(seed, int(e), num_examples)[place[mine]]
    return epoch, example


def process_slice(global_batch_size: int, process_index: int, process_count: int) -> slice:
    """The part of every global batch that one process reads."""
    size = global_batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def reader_rows(
    global_batch_size: int, process_index: int, process_count: int, num_readers: int
) -> list[tuple[int, slice]]:
    """What one process takes of every batch: (reader, rows of that reader's part), in order.

    With as many processes as readers that is all of its own reader's part. Both numbers divide
    the batch size.
    """
    mine = process_slice(global_batch_size, process_index, process_count)
    found = []
    for reader in range(num_readers):
        part = process_slice(global_batch_size, reader, num_readers)
        start, stop = max(mine.start, part.start), min(mine.stop, part.stop)
        if start < stop:
            found.append((reader, slice(start - part.start, stop - part.start)))
    return found


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
    none = np.empty(0, np.int64)
    dropped = {file: np.unique(places) for file, places in excluded.items() if len(places)}
    kept = np.array([n - len(dropped.get(f, none)) for f, n in enumerate(file_sizes)])
    total = int(kept.sum())
    size = global_batch_size // num_readers

    def supplied(g: int, reader: int) -> int:
        """How many of the run's first g examples come from `reader`."""
        batches, rest = divmod(g, global_batch_size)
        return batches * size + min(max(rest - reader * size, 0), size)

    def raw_place(file: int, place: int) -> int:
        """Turns a place among a file's kept records into one among all of its records."""
        if file not in dropped:
            return place
        left = np.setdiff1d(np.arange(file_sizes[file]), dropped[file])
        return int(left[place]) if place < len(left) else file_sizes[file]

    wanted = start_step * size
    epoch = max((start_step * global_batch_size) // total - 1, 0)
    while supplied((epoch + 1) * total, reader) <= wanted:
        epoch += 1
    while True:
        parts = [
            supplied((epoch + 1) * total, r) - supplied(epoch * total, r) for r in range(reader + 1)
        ]
        low, high = sum(parts[:-1]), sum(parts)  # this reader's part of the permuted files
        files = np.random.default_rng([seed, epoch]).permutation(len(file_sizes))
        ends = np.cumsum(kept[files])
        done = supplied(epoch * total, reader)  # examples of earlier epochs and groups
        first, last = np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left")
        runs: list[tuple[int, int, int]] = []  # (file, start, stop) among its kept records
        count = number = 0
        for i in range(first, min(last, len(files) - 1) + 1):
            file = int(files[i])
            base = int(ends[i] - kept[file])
            start, stop = max(low - base, 0), min(high - base, int(kept[file]))
            if stop > start:
                runs.append((file, start, stop))
                count += stop - start
            if count and (count >= group_size or i >= last):
                if done + count > wanted:
                    pieces = tuple(
                        Piece(file, raw_place(file, start), raw_place(file, stop - 1) + 1)
                        for file, start, stop in runs
                    )
                    order = _group_order(pieces, dropped, [seed, epoch, reader, number])
                    row = np.arange(done, done + count) % size
                    mine = (row >= rows.start) & (row < rows.stop)
                    mine[: max(wanted - done, 0)] = False  # of earlier batches
                    if mine.any():
                        yield Group(epoch, pieces, order[mine])
                done += count
                number += 1
                runs, count = [], 0
        epoch += 1


def _group_order(pieces, dropped, seed) -> np.ndarray:
    """A permutation of the records of `pieces` that are not dropped."""
    keep = [
        ~np.isin(np.arange(p.start, p.stop), dropped.get(p.file, ()), assume_unique=True)
        for p in pieces
    ]
    return np.random.default_rng(seed).permutation(np.flatnonzero(np.concatenate(keep)))
