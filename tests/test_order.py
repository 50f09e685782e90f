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


def _read(start_step, steps, process_index=0, process_count=1, batch=6, seed=5, group_size=10):
    """(epoch, example number) of one process's examples of `steps` batches."""
    found = []
    for group in order.groups(
        start_step,
        seed=seed,
        file_sizes=FILES,
        excluded=EXCLUDED,
        global_batch_size=batch,
        process_index=process_index,
        process_count=process_count,
        group_size=group_size,
    ):
        read = np.concatenate(
            [FIRST[piece.file] + np.arange(piece.start, piece.stop) for piece in group.pieces]
        )
        found += [(group.epoch, int(number)) for number in read[group.order]]
        if len(found) >= steps * batch // process_count:
            return found[: steps * batch // process_count]


def _kept():
    gone = {FIRST[file] + place for file, places in EXCLUDED.items() for place in places}
    return [number for number in range(sum(FILES)) if number not in gone]


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_groups_hold_every_example_once_an_epoch_over_all_processes(process_count):
    steps = TOTAL * 2  # twelve epochs of batches of 6
    found = [
        pair for process in range(process_count) for pair in _read(0, steps, process, process_count)
    ]
    by_epoch = {
        epoch: [number for _, number in pairs]
        for epoch, pairs in itertools.groupby(sorted(found), key=lambda pair: pair[0])
    }
    assert len(by_epoch) == 12
    for numbers in by_epoch.values():
        assert sorted(numbers) == _kept()


@pytest.mark.parametrize("process_count", [1, 2])
def test_groups_can_be_entered_at_any_step(process_count):
    for process in range(process_count):
        whole = _read(0, 40, process, process_count)
        size = 6 // process_count
        for step in range(0, 40, 3):
            rest = _read(step, 40 - step, process, process_count)
            assert rest == whole[step * size :], step


def test_groups_do_not_open_earlier_files_and_differ_by_epoch_and_seed():
    group = next(
        order.groups(
            7,
            seed=5,
            file_sizes=FILES,
            excluded={},
            global_batch_size=6,
            process_index=0,
            process_count=1,
            group_size=10,
        )
    )
    # 42 of 61 examples are done: what is opened are at most the files of one group.
    assert sum(piece.stop - piece.start for piece in group.pieces) < 10 + max(FILES)
    epochs = [
        [n for e, n in _read(0, 60, seed=seed) if e == epoch] for seed in (5, 6) for epoch in (0, 1)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_group_is_shuffled_whole():
    """One large file: its examples come in no order of their own."""
    group = next(
        order.groups(
            0,
            seed=0,
            file_sizes=[1000],
            excluded={},
            global_batch_size=10,
            process_index=0,
            process_count=1,
            group_size=100,
        )
    )
    assert sorted(group.order) == list(range(1000))
    assert abs(np.corrcoef(group.order, np.arange(1000))[0, 1]) < 0.1
