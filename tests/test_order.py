import itertools

import numpy as np
import pytest

from mixer.data import order


def _examples(steps, **settings):
    pairs = [order.batch_examples(step, **settings) for step in steps]
    return np.concatenate([epoch for epoch, _ in pairs]), np.concatenate([e for _, e in pairs])


def test_every_example_once_an_epoch_and_batches_run_across_its_end():
    settings = dict(seed=3, num_examples=37, global_batch_size=8)
    epoch, example = _examples(range(14), **settings)  # 112 places: three epochs and a piece
    for e in range(3):
        mine = example[e * 37 : (e + 1) * 37]
        assert sorted(mine) == list(range(37))
        assert set(epoch[e * 37 : (e + 1) * 37]) == {e}
    assert list(example[:37]) != list(example[37:74])
    assert list(_examples(range(14), **{**settings, "seed": 4})[1]) != list(example)


def test_a_batch_larger_than_the_set_spans_several_epochs():
    epoch, example = order.batch_examples(0, seed=0, num_examples=3, global_batch_size=8)
    assert list(epoch) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(example[:3]) == sorted(example[3:6]) == [0, 1, 2]


FILES = (5, 9, 1, 12, 7, 3, 8, 8, 2, 6)
FIRST = np.cumsum((0, *FILES))
EXCLUDED = {1: np.array([0, 8]), 2: np.array([0]), 4: np.array([3])}
TOTAL = sum(FILES) - 4


def _part(start_step, steps, reading, reader, rows, group_size, numbers):
    """(epoch, example number) of those rows of one reader's part of `steps` batches."""
    found, size = [], rows.stop - rows.start
    for group in order.groups(
        start_step,
        reading,
        reader=reader,
        rows=rows,
        file_starts=FIRST,
        numbers=numbers,
        group_size=group_size,
    ):
        read = np.concatenate(
            [FIRST[piece.file] + np.arange(piece.start, piece.stop) for piece in group.pieces]
        )
        found += [(group.epoch, int(number)) for number in read[group.order]]
        if len(found) >= steps * size:
            return [found[step * size : (step + 1) * size] for step in range(steps)]


def _read(
    start_step,
    steps,
    process_index=0,
    process_count=1,
    num_readers=None,
    batch=6,
    seed=5,
    group_size=10,
):
    """(epoch, example number) of one process's examples of `steps` batches, by batch."""
    reading = order.Reading(
        seed=seed,
        global_batch_size=batch,
        process_index=process_index,
        process_count=process_count,
        num_readers=num_readers,
    )
    parts = [
        _part(start_step, steps, reading, reader, rows, group_size, np.array(_kept()))
        for reader, rows in reading.parts
    ]
    return [list(itertools.chain(*pieces)) for pieces in zip(*parts, strict=True)]


def _read_all(start_step, steps, process_count, **settings):
    """The global batches, of processes side by side."""
    rows = [_read(start_step, steps, p, process_count, **settings) for p in range(process_count)]
    return [list(itertools.chain(*parts)) for parts in zip(*rows, strict=True)]


def _kept():
    gone = {FIRST[file] + place for file, places in EXCLUDED.items() for place in places}
    return [number for number in range(sum(FILES)) if number not in gone]


def _assert_each_once(batches, epochs):
    by_epoch = {
        epoch: [number for _, number in pairs]
        for epoch, pairs in itertools.groupby(
            sorted(itertools.chain(*batches)), key=lambda pair: pair[0]
        )
    }
    assert len(by_epoch) == epochs
    for numbers in by_epoch.values():
        assert sorted(numbers) == _kept()


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_groups_hold_every_example_once_an_epoch_over_all_processes(process_count):
    # Twelve epochs of batches of 6.
    _assert_each_once(_read_all(0, TOTAL * 2, process_count), 12)


@pytest.mark.parametrize("process_count", [1, 2])
def test_groups_can_be_entered_at_any_step(process_count):
    for process in range(process_count):
        whole = _read(0, 40, process, process_count)
        for step in range(0, 40, 3):
            assert _read(step, 40 - step, process, process_count) == whole[step:], step


def test_the_order_of_groups_is_the_one_that_runs_have_begun_with():
    """Bit for bit: a run that goes on with this code had it before."""
    numbers = [number for _, number in itertools.chain(*_read(0, 4, 1, 2))]
    assert numbers == [27, 24, 31, 33, 26, 22, 28, 32, 25, 29, 23, 1]


@pytest.mark.parametrize(
    ("process_index", "process_count", "num_readers", "expected"),
    [
        (1, 2, 2, [(1, slice(0, 12))]),  # all of its own reader's
        (1, 2, 4, [(2, slice(0, 6)), (3, slice(0, 6))]),
        (5, 8, 4, [(2, slice(3, 6))]),
        (1, 3, 4, [(1, slice(2, 6)), (2, slice(0, 4))]),
    ],
)
def test_parts_of_the_readers_cover_a_batch(process_index, process_count, num_readers, expected):
    reading = order.Reading(
        seed=0,
        global_batch_size=24,
        process_index=process_index,
        process_count=process_count,
        num_readers=num_readers,
    )
    assert reading.parts == expected


@pytest.mark.parametrize("process_count", [1, 2, 3, 8])
def test_the_order_stays_when_the_number_of_processes_changes(process_count):
    """Four readers, read by any number of processes from any step on."""
    settings = dict(num_readers=4, batch=24)
    begun = _read_all(0, 12, 4, **settings)  # five epochs
    for step in range(12):
        assert _read_all(step, 12 - step, process_count, **settings) == begun[step:], step


def test_an_epoch_holds_every_example_once_when_the_processes_change_in_its_middle():
    settings = dict(num_readers=4, batch=24)
    # 57 examples: 19 batches of 24 are eight epochs, and no change of these falls between two.
    changes = ((0, 5, 4), (5, 6, 2), (11, 1, 8), (12, 4, 3), (16, 3, 1))
    assert TOTAL * 8 == 19 * 24
    batches = [
        batch
        for start, steps, count in changes
        for batch in _read_all(start, steps, count, **settings)
    ]
    _assert_each_once(batches, 8)


def test_groups_do_not_open_earlier_files_and_differ_by_epoch_and_seed():
    group = next(
        order.groups(
            7,
            order.Reading(seed=5, global_batch_size=6),
            reader=0,
            rows=slice(0, 6),
            file_starts=FIRST,
            numbers=np.arange(sum(FILES)),
            group_size=10,
        )
    )
    # 42 of 61 examples are done: what is opened are at most the files of one group.
    assert sum(piece.stop - piece.start for piece in group.pieces) < 10 + max(FILES)
    epochs = [
        [n for e, n in itertools.chain(*_read(0, 60, seed=seed)) if e == epoch]
        for seed in (5, 6)
        for epoch in (0, 1)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_group_is_shuffled_whole():
    """One large file: its examples come in no order of their own."""
    group = next(
        order.groups(
            0,
            order.Reading(seed=0, global_batch_size=10),
            reader=0,
            rows=slice(0, 10),
            file_starts=np.array([0, 1000]),
            numbers=np.arange(1000),
            group_size=100,
        )
    )
    assert sorted(group.order) == list(range(1000))
    assert abs(np.corrcoef(group.order, np.arange(1000))[0, 1]) < 0.1
