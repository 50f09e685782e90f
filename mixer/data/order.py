"""The order in which training reads a set: a function of (seed, step) that can be entered anywhere.

Example number g of a run (g = step * batch size + place in the batch) is example `g mod n` of epoch
`g div n`, where n is the size of the set: batches run across the ends of epochs and nothing is
dropped. Every epoch is a permutation of its own. With several processes each reads its own
contiguous part of every batch, so an epoch still holds each example once.

Two ways to find the permutation, by what the storage can do:

- `batch_examples`: any example can be read by its number (image folders, small sets held in
  memory). The permutation is global, and the same for any number of processes.
- `groups`: records lie one behind the other in large files. Per epoch the files are permuted and
  each process takes a contiguous run of them; runs of whole files are cut into groups, and a group
  is read and shuffled whole. Files before the one wanted are never opened. This order depends on
  the number of processes.

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


def groups(
    start_step: int,
    *,
    seed: int,
    file_sizes: Sequence[int],
    excluded: dict[int, np.ndarray],
    global_batch_size: int,
    process_index: int,
    process_count: int,
    group_size: int,
) -> Iterator[Group]:
    """Yields, without end, the groups that one process reads from batch `start_step` on.

    Args:
      start_step: first batch wanted; the first group starts with that batch's first example.
      seed: of the run.
      file_sizes: number of records in each file.
      excluded: by file number, the places of records that are left out.
      global_batch_size: B; this process reads B / process_count examples of each batch.
      process_index: which process this is.
      process_count: of how many.
      group_size: a group is closed by the file with which it reaches this many examples.
    """
    none = np.empty(0, np.int64)
    dropped = {file: np.unique(places) for file, places in excluded.items() if len(places)}
    kept = np.array([n - len(dropped.get(f, none)) for f, n in enumerate(file_sizes)])
    total = int(kept.sum())
    size = global_batch_size // process_count

    def mine_before(g: int, process: int) -> int:
        """How many of the run's first g examples belong to `process`."""
        batches, rest = divmod(g, global_batch_size)
        return batches * size + min(max(rest - process * size, 0), size)

    def raw_place(file: int, place: int) -> int:
        """Turns a place among a file's kept records into one among all of its records."""
        if file not in dropped:
            return place
        left = np.setdiff1d(np.arange(file_sizes[file]), dropped[file])
        return int(left[place]) if place < len(left) else file_sizes[file]

    wanted = start_step * size
    epoch = max((start_step * global_batch_size) // total - 1, 0)
    while mine_before((epoch + 1) * total, process_index) <= wanted:
        epoch += 1
    while True:
        before = [
            mine_before((epoch + 1) * total, p) - mine_before(epoch * total, p)
            for p in range(process_index + 1)
        ]
        low, high = sum(before[:-1]), sum(before)  # this process's part of the permuted files
        files = np.random.default_rng([seed, epoch]).permutation(len(file_sizes))
        ends = np.cumsum(kept[files])
        done = mine_before(epoch * total, process_index)  # examples read in earlier epochs
        first, last = np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left")
        pieces: list[Piece] = []
        count = number = 0
        for i in range(first, min(last, len(files) - 1) + 1):
            file = int(files[i])
            base = int(ends[i] - kept[file])
            start, stop = max(low - base, 0), min(high - base, int(kept[file]))
            if stop > start:
                pieces.append(Piece(file, raw_place(file, start), raw_place(file, stop - 1) + 1))
                count += stop - start
            if count and (count >= group_size or i >= last):
                if done + count > wanted:
                    order = _group_order(pieces, dropped, [seed, epoch, process_index, number])
                    yield Group(epoch, tuple(pieces), order[max(wanted - done, 0) :])
                done += count
                number += 1
                pieces, count = [], 0
        epoch += 1


def _group_order(pieces, dropped, seed) -> np.ndarray:
    """A permutation of the records of `pieces` that are not dropped."""
    keep = [
        ~np.isin(np.arange(p.start, p.stop), dropped.get(p.file, ()), assume_unique=True)
        for p in pieces
    ]
    return np.random.default_rng(seed).permutation(np.flatnonzero(np.concatenate(keep)))
