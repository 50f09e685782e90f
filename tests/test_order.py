import itertools

import numpy as np
import pytest

from mixer.data import order


def _examples(steps, **settings):
    pairs = [order.batch_examples(step, **settings) for step in steps]
    epochs, examples = zip(*pairs, strict=True)
    return np.concatenate(epochs), np.concatenate(examples)


def test_each_epoch_has_every_example_and_batches_may_span_two():
    settings = dict(seed=3, num_examples=37, global_batch_size=8)
    epoch, example = _examples(range(14), **settings)  # 112 examples: three epochs and a part
    for number in range(3):
        epoch_examples = example[number * 37 : (number + 1) * 37]
        assert sorted(epoch_examples) == list(range(37))
        assert set(epoch[number * 37 : (number + 1) * 37]) == {number}
    assert list(example[:37]) != list(example[37:74])
    assert list(_examples(range(14), **{**settings, "seed": 4})[1]) != list(example)


def test_batch_larger_than_the_set_spans_several_epochs():
    epoch, example = order.batch_examples(0, seed=0, num_examples=3, global_batch_size=8)
    assert list(epoch) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(example[:3]) == sorted(example[3:6]) == [0, 1, 2]


FILES = (5, 9, 1, 12, 7, 3, 8, 8, 2, 6)
FIRST = np.cumsum((0, *FILES))
EXCLUDED = {1: np.array([0, 8]), 2: np.array([0]), 4: np.array([3])}
TOTAL = sum(FILES) - 4


def _part(start_step, steps, reading, reader, rows, group_size, included):
    """Returns, by batch, the (epoch, example number) of one reader's rows of `steps` batches."""
    examples, size = [], rows.stop - rows.start
    for group in order.groups(
        start_step,
        reading,
        reader=reader,
        rows=rows,
        file_starts=FIRST,
        numbers=included,
        group_size=group_size,
    ):
        numbers = np.concatenate(
            [FIRST[piece.file] + np.arange(piece.start, piece.stop) for piece in group.pieces]
        )
        examples += [(group.epoch, int(number)) for number in numbers[group.order]]
        if len(examples) >= steps * size:
            return [examples[step * size : (step + 1) * size] for step in range(steps)]


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
    """Returns, by batch, the (epoch, example number) that one process reads for `steps` batches."""
    reading = order.Reading(
        seed=seed,
        global_batch_size=batch,
        process_index=process_index,
        process_count=process_count,
        num_readers=num_readers,
    )
    parts = [
        _part(start_step, steps, reading, reader, rows, group_size, np.array(_included_numbers()))
        for reader, rows in reading.parts
    ]
    return [list(itertools.chain(*pieces)) for pieces in zip(*parts, strict=True)]


def _read_all(start_step, steps, process_count, **settings):
    """Returns the global batches, which join the examples of all processes."""
    rows = [_read(start_step, steps, p, process_count, **settings) for p in range(process_count)]
    return [list(itertools.chain(*parts)) for parts in zip(*rows, strict=True)]


def _included_numbers():
    excluded = {FIRST[file] + index for file, indices in EXCLUDED.items() for index in indices}
    return [number for number in range(sum(FILES)) if number not in excluded]


def _assert_complete_epochs(batches, epochs):
    by_epoch = {
        epoch: [number for _, number in pairs]
        for epoch, pairs in itertools.groupby(
            sorted(itertools.chain(*batches)), key=lambda pair: pair[0]
        )
    }
    assert len(by_epoch) == epochs
    for numbers in by_epoch.values():
        assert sorted(numbers) == _included_numbers()


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_processes_together_read_each_example_once_per_epoch(process_count):
    _assert_complete_epochs(_read_all(0, TOTAL * 2, process_count), 12)  # batches of 6


@pytest.mark.parametrize("process_count", [1, 2])
def test_groups_can_start_at_any_step(process_count):
    for process in range(process_count):
        batches = _read(0, 40, process, process_count)
        for step in range(0, 40, 3):
            assert _read(step, 40 - step, process, process_count) == batches[step:], step


def test_order_of_groups_is_unchanged_for_existing_runs():
    """Pins the order, so that runs started by older code resume with the same examples."""
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
def test_order_is_independent_of_the_number_of_processes(process_count):
    """Four readers may be shared by any number of processes, from any step on."""
    settings = dict(num_readers=4, batch=24)
    batches = _read_all(0, 12, 4, **settings)  # five epochs
    for step in range(12):
        assert _read_all(step, 12 - step, process_count, **settings) == batches[step:], step


def test_changing_processes_within_an_epoch_loses_no_example():
    settings = dict(num_readers=4, batch=24)
    # (first step, steps, processes). 19 batches of 24 are eight epochs of 57 examples, and every
    # change of processes falls inside an epoch.
    changes = ((0, 5, 4), (5, 6, 2), (11, 1, 8), (12, 4, 3), (16, 3, 1))
    assert TOTAL * 8 == 19 * 24
    batches = [
        batch
        for start, steps, count in changes
        for batch in _read_all(start, steps, count, **settings)
    ]
    _assert_complete_epochs(batches, 8)


def test_groups_skip_earlier_files_and_differ_by_epoch_and_seed():
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
    # Step 7 starts after 42 of 61 examples: only the files of one group may be opened.
    assert sum(piece.stop - piece.start for piece in group.pieces) < 10 + max(FILES)
    epochs = [
        tuple(n for e, n in itertools.chain(*_read(0, 60, seed=seed)) if e == epoch)
        for seed in (5, 6)
        for epoch in (0, 1)
    ]
    assert len(set(epochs)) == 4


def test_whole_group_is_shuffled():
    """Examples of one large file come in random order."""
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
