import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers import tiny_config
from mixer.data import order
from mixer.data.prefetch import prefetch
from mixer.data.sources import folder
from mixer.data.sources import stored as sources
from mixer.errors import UserError
from mixer.runs import data as run_data

CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def image_folder(tmp_path):
    """train/ and test/ of small images in all spellings of the endings; test/ lacks a class."""
    rng = np.random.default_rng(0)
    for split, classes, count in (("train", CLASSES, 10), ("test", CLASSES[1:], 4)):
        for label in classes:
            directory = tmp_path / split / label
            directory.mkdir(parents=True)
            for i in range(count):
                ending = (".jpg", ".JPEG", ".png")[i % 3]
                pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(directory / f"{i:04}{ending}")
            (directory / "notes.txt").write_text("no image")
            (directory / ".hidden.jpg").write_text("no image")
    return tmp_path


def _folder_config(path, **values):
    config = tiny_config(dataset__name="folder", dataset__data_dir=str(path), image_size=8)
    config.dataset.update(
        train_preprocess="decode|random_crop(8)", eval_preprocess="decode|resize(8)"
    )
    config.dataset.update(train_split="train", val_split="", test_split="test")
    config.dataset.update({k.replace("__", "."): v for k, v in values.items()})
    return config


def _digits_config(tfds_dir, **values):
    return tiny_config(tfds_dir, **values)


def _take(split, count, start_step=0, batch=16, process_index=0, process_count=1, seed=0, **more):
    reading = order.Reading(
        seed=seed,
        global_batch_size=batch,
        process_index=process_index,
        process_count=process_count,
        **more,
    )
    stream = split.train_batches(start_step, reading)
    return list(itertools.islice(stream, count))


def _take_all(split, count, process_count, **settings):
    """The global batches, of processes side by side."""
    parts = [
        _take(split, count, process_index=p, process_count=process_count, **settings)
        for p in range(process_count)
    ]
    return [
        {key: np.concatenate([part[key] for part in rows]) for key in rows[0]}
        for rows in zip(*parts, strict=True)
    ]


def _whole(split):
    count = split.num_examples
    return next(split.sequential_batches(start=0, stop=count, batch_size=count))


def _rows(images):
    return sorted(image.tobytes() for image in images)


def _assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# The digits.


def test_digits_are_the_fixed_split_of_the_scans(tfds_dir):
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.default_rng(123).permutation(1797)
    config = _digits_config(tfds_dir)
    config.dataset.train_preprocess = "decode"
    splits = run_data.open_splits(config, None)
    for split, rows in (
        (splits.test, order[:360]),
        (splits.val, order[360:540]),
        (splits.train, order[540:]),
    ):
        assert split.num_examples == len(rows)
        whole = next(split.sequential_batches(start=0, stop=len(rows), batch_size=len(rows)))
        wanted = np.round(scans.images[rows] * 255 / 16).astype(np.uint8)
        wanted = sorted((scans.target[r], i.tobytes()) for r, i in zip(rows, wanted, strict=True))
        pairs = zip(whole["label"], whole["image"], strict=True)
        found = sorted((label, image[..., 0].tobytes()) for label, image in pairs)
        assert found == wanted


@pytest.fixture(
    params=["memory", "groups", pytest.param("folder", marks=pytest.mark.slow), "synthetic"]
)
def train_split(request, tfds_dir, image_folder, monkeypatch):
    """A split for each way of reading."""
    if request.param == "groups":
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    if request.param == "folder":
        return run_data.open_split(_folder_config(image_folder), "train", None, augment=True)
    if request.param == "synthetic":
        return run_data.open_split(tiny_config(), "train", None)
    config = _digits_config(tfds_dir, dataset__shuffle_group_size=300)
    config.dataset.train_split = "train[:40%]+validation"
    return run_data.open_split(config, "train", None, augment=True)


def test_batch_k_is_the_same_streamed_from_0_and_from_k(train_split):
    """Images, augmentation and labels, across the end of an epoch too."""
    steps = train_split.num_examples // 16 + 3
    whole = _take(train_split, steps)
    assert whole[0]["image"].shape == (16, 8, 8, 3) and whole[0]["image"].dtype == np.uint8
    assert whole[0]["label"].dtype == np.int32
    for start in (1, steps - 2):
        _assert_same(_take(train_split, steps - start, start_step=start), whole[start:])
    other = _take(train_split, 2, seed=1)
    assert any((a["image"] != b["image"]).any() for a, b in zip(other, whole, strict=False))


def test_two_processes_read_the_batches_of_one(train_split, request):
    if train_split.order_depends_on_readers:
        parts = [_take(train_split, 25, process_index=p, process_count=2) for p in (0, 1)]
        one, two = ({i.tobytes() for batch in part for i in batch["image"]} for part in parts)
        assert len(one) > 150 and len(one & two) < 5  # a few scans are nearly blank twins
    # Only in sets of files does it matter how many processes the run was begun with.
    assert train_split.order_depends_on_readers == ("groups" in request.node.callspec.id)
    readers = 1 if train_split.order_depends_on_readers else 2
    together = _take_all(train_split, 4, 2, num_readers=readers)
    _assert_same(together, _take(train_split, 4, num_readers=1))


@pytest.fixture(scope="module")
def eight_files(tmp_path_factory):
    """A TFDS directory with the digits in eight files a split."""
    import tensorflow_datasets as tfds

    from mixer.data.sources import digits

    path = tmp_path_factory.mktemp("eight_files")
    builder = digits.Digits(data_dir=str(path))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=8))
    return path


@pytest.fixture
def sharded(eight_files, monkeypatch):
    """Their config; they are read as files."""
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    return _digits_config(eight_files, dataset__shuffle_group_size=100)


def test_examples_stay_when_the_number_of_processes_changes(sharded):
    """Begun by four processes, gone on by others, across the end of an epoch too."""
    split = run_data.open_split(sharded, "train", None)
    settings = dict(batch=48, seed=2, num_readers=4)
    begun = _take_all(split, 27, 4, **settings)  # an epoch is 26.2 batches
    epoch = np.concatenate([batch["image"] for batch in begun])[: split.num_examples]
    assert _rows(epoch) == _rows(_whole(split)["image"])
    for start, process_count in ((7, 2), (25, 3)):
        again = _take_all(split, 2, process_count, start_step=start, **settings)
        _assert_same(again, begun[start : start + 2])


@pytest.mark.parametrize(
    ("process_index", "process_count"), [(0, 1), pytest.param(2, 8, marks=pytest.mark.slow)]
)
def test_files_before_the_step_are_not_opened(sharded, tmp_path, process_index, process_count):
    """A run begun by two processes: the files but those of the step's groups are deleted."""
    config = sharded
    shutil.copytree(config.dataset.data_dir, tmp_path / "tfds")
    config.dataset.data_dir = str(tmp_path / "tfds")
    info = sources.tfds_builder("digits", config.dataset.data_dir).info.splits["train"]
    split = run_data.open_split(config, "train", None, augment=True)
    settings = dict(process_index=process_index, process_count=process_count, num_readers=2)
    whole = _take(split, 2, start_step=70, **settings)
    needed = set()
    reading = order.Reading(seed=0, global_batch_size=16, **settings)
    for reader, rows in reading.parts:
        groups = order.groups(
            70,
            reading,
            reader=reader,
            rows=rows,
            file_starts=np.cumsum([0, *info.shard_lengths]),
            numbers=np.arange(info.num_examples),
            group_size=100,
        )
        # The one of the step, and the next, which is read ahead.
        needed |= {piece.file for group in itertools.islice(groups, 2) for piece in group.pieces}
    files = info.filepaths
    assert len(needed) < len(files)
    for number, path in enumerate(files):
        if number not in needed:
            path.unlink()
    _assert_same(_take(split, 2, start_step=70, **settings), whole)


# Folders.


def test_folder_lists_classes_over_all_splits_and_images_of_any_case(image_folder):
    for split in ("train", "test"):  # without images in train/
        (image_folder / split / "ant").mkdir()
    for ending in ("bmp", "GIF", "webp"):
        Image.new("RGB", (12, 12)).save(image_folder / "test" / "ant" / f"1.{ending}")
    found = folder.scan(str(image_folder))
    assert found.class_names == ("ant", *CLASSES) and not found.faults
    assert {split: len(files) for split, files in found.files.items()} == {"train": 30, "test": 11}
    split = run_data.open_split(_folder_config(image_folder), "test", None)
    batch = next(split.sequential_batches(start=0, stop=11, batch_size=11))
    assert not batch["image"][batch["label"] == 0].any() and sum(batch["label"] == 0) == 3


def test_class_without_any_image_is_refused(image_folder):
    (image_folder / "train" / "fox").mkdir()
    (image_folder / "test" / "fox").mkdir()
    with pytest.raises(UserError, match=r"test/fox, train/fox"):
        folder.scan(str(image_folder))


def test_image_that_cannot_be_decoded_is_told_before_the_run(image_folder, tmp_path):
    from mixer.tools import prepare

    Image.new("RGB", (12, 12)).save(image_folder / "train" / "cat" / "a.tif")
    config = _folder_config(image_folder)
    with pytest.raises(UserError, match=r"train/cat/a\.tif.*\.jpg") as caught:
        run_data.open_split(config, "train", None, augment=True)
    assert "\n" not in str(caught.value)
    prepare.check(config, str(tmp_path / "list.jsonl"))
    config.dataset.exclude = str(tmp_path / "list.jsonl")
    assert run_data.open_split(config, "train", None, augment=True).num_examples == 30


def test_folder_labels_are_the_runs_own(image_folder):
    split = run_data.open_split(_folder_config(image_folder), "test", ("ant", "bee", *CLASSES))
    batch = next(split.sequential_batches(start=0, stop=8, batch_size=8))
    assert sorted(batch["label"]) == [3] * 4 + [4] * 4


def test_folder_parts_are_fair_samples(image_folder):
    config = _folder_config(image_folder)
    config.dataset.update(train_split="train[:80%]", val_split="train[80%:]")
    splits = run_data.open_splits(config, None)
    assert (splits.train.num_examples, splits.val.num_examples) == (24, 6)
    labels = next(splits.train.sequential_batches(start=0, stop=24, batch_size=24))["label"]
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(data_dir="/nowhere"), "dataset.data_dir=/nowhere"),
        (dict(train_split="trian"), "'trian'.*train"),
        (dict(train_split="train[:0]"), r"train\[:0\]"),
        (dict(name="cifar1O"), "cifar1O.*'cifar10'"),
        (dict(name="cifar10"), "cifar10.*mixer.tools.prepare"),
        (dict(train_preprocess="decode|flip"), "'flip'.*flip_lr"),
        (dict(train_preprocess="flip_lr"), "decode"),
        (dict(train_preprocess="decode|resize"), "resize.*'size'"),
        (dict(train_preprocess="decode|resize(8"), r"resize\(8"),
        (dict(exclude="/nowhere.jsonl"), "/nowhere.jsonl"),
        (dict(data_dir=""), "dataset.data_dir"),
        (dict(train_preprocess="decode|resize(7)"), "image_size=8"),
        (dict(name="digits", data_dir="/tmp/none", train_split="train[:1shard]"), "split"),
        (dict(name="mnist:9.9.9"), "mnist:9.9.9"),
        (dict(label_key="label"), "label_key='label'"),
    ],
)
def test_mistakes_get_one_line(image_folder, values, message):
    with pytest.raises(UserError, match=message) as caught:
        run_data.open_split(_folder_config(image_folder, **values), "train", None, augment=True)
    assert "\n" not in str(caught.value)


def test_synthetic_split_and_classes_are_checked():
    with pytest.raises(UserError, match="validation"):
        run_data.open_split(tiny_config(dataset__train_split="valid"), "train", None)
    with pytest.raises(UserError, match="classes"):
        run_data.open_split(tiny_config(), "train", ("a", "b"))


def test_class_of_the_folder_that_the_run_lacks_is_refused(image_folder):
    with pytest.raises(UserError, match="eel"):
        run_data.open_split(_folder_config(image_folder), "train", ("cat", "dog"))


# Unreadable images.


def test_unreadable_image_stops_by_name_and_can_be_excluded(image_folder, tmp_path):
    from mixer.tools import prepare

    bad = image_folder / "train" / "dog" / "0003.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    empty = image_folder / "test" / "eel" / "0001.JPEG"
    empty.write_bytes(b"")
    config = _folder_config(image_folder)
    with pytest.raises(UserError, match=r"train/dog/0003\.jpg") as caught:
        _take(run_data.open_split(config, "train", None, augment=True), 8)
    assert "\n" not in str(caught.value)

    output = tmp_path / "exclude.jsonl"
    prepare.check(config, str(output))
    listed = [json.loads(line)["example"] for line in output.read_text().splitlines()]
    assert listed == ["test/eel/0001.JPEG", "train/dog/0003.jpg"]

    before = run_data.open_split(config, "train", None, augment=True)
    config.dataset.exclude = str(output)
    after = run_data.open_split(config, "train", None, augment=True)
    assert (before.num_examples, after.num_examples) == (30, 29)
    assert before.fingerprint != after.fingerprint
    _take(after, 8)

    mine = "train/cat/0000.jpg"  # nothing is wrong with it
    output.write_text(output.read_text() + json.dumps({"example": mine}) + "\n")
    prepare.check(config, str(output))
    again = [json.loads(line)["example"] for line in output.read_text().splitlines()]
    assert again == sorted([*listed, mine])


def test_image_of_another_size_is_named(image_folder):
    config = _folder_config(image_folder, train_preprocess="decode")
    with pytest.raises(UserError, match=r"train/.*12.*8"):
        _take(run_data.open_split(config, "train", None, augment=True), 1)


def test_file_that_vanished_is_named(image_folder):
    split = run_data.open_split(_folder_config(image_folder), "train", None, augment=True)
    (image_folder / "train" / "cat" / "0000.jpg").unlink()
    with pytest.raises(UserError, match=r"cat/0000\.jpg"):
        _take(split, 8)


@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_records_can_be_excluded(tfds_dir, tmp_path, grouped, monkeypatch):
    if grouped:
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    config = _digits_config(tfds_dir, dataset__train_split="validation")
    _check_exclusion(config, tmp_path, (0, 17, 179))


def test_records_of_several_files_can_be_excluded(sharded, tmp_path):
    """By file and place, of the parts of files that a split takes."""
    config = sharded
    config.dataset.train_split = "train[10%:30%]+train[50%:60%]"
    whole = run_data.open_split(config, "train", None)
    names = [whole.example_id(place) for place in range(whole.num_examples)]
    files = [name.rpartition(":")[0] for name in names]
    firsts = [files.index(file) for file in sorted({*files})]
    _check_exclusion(config, tmp_path, sorted({*firsts, 5, len(names) - 1}))


def _check_exclusion(config, tmp_path, places):
    whole = run_data.open_split(config, "train", None)
    rows, ids = _whole(whole)["image"], [whole.example_id(i) for i in range(whole.num_examples)]
    file, _, _ = ids[0].rpartition(":")
    listed = [*(ids[place] for place in places), f"{file}:9999", f"x{file}:0", file, f"{file}:"]
    path = tmp_path / "exclude.jsonl"
    path.write_text("".join(json.dumps({"example": name}) + "\n" for name in listed))
    config.dataset.exclude = str(path)
    split = run_data.open_split(config, "train", None)
    assert split.num_examples == len(rows) - len(places)
    kept = np.delete(rows, places, axis=0)
    np.testing.assert_array_equal(_whole(split)["image"], kept)
    count = split.num_examples
    epoch = np.concatenate([b["image"] for b in _take(split, 2, batch=-(-count // 2))])[:count]
    assert _rows(epoch) == _rows(kept)


# Evaluation.


@pytest.mark.parametrize(
    ("grouped", "process_count"),
    [
        (False, 1),
        (True, 7),
        *[
            pytest.param(grouped, count, marks=pytest.mark.slow)
            for grouped, count in ((False, 2), (False, 7), (True, 1), (True, 2))
        ],
    ],
)
def test_evaluation_sees_each_example_once(tfds_dir, process_count, grouped, monkeypatch):
    if grouped:
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    split = run_data.open_split(_digits_config(tfds_dir), "val", None)
    seen, counts, places = [], [], []
    for process in range(process_count):
        batches = list(
            split.eval_batches(
                global_batch_size=14 * process_count,
                process_index=process,
                process_count=process_count,
            )
        )
        counts.append(len(batches))
        for batch in batches:
            assert batch["image"].shape == (14, 8, 8, 3)
            seen += [i.tobytes() for i in batch["image"][batch["mask"] > 0]]
            places += batch["index"][batch["mask"] > 0].tolist()
            assert np.all(batch["index"][batch["mask"] == 0] == -1)
            assert not batch["image"][batch["mask"] == 0].any()
    assert len(set(counts)) == 1
    whole = next(split.sequential_batches(start=0, stop=180, batch_size=180))["image"]
    assert seen == [whole[place].tobytes() for place in places]
    assert places == list(range(180))


@pytest.mark.parametrize(
    ("stored", "num_examples", "process_count", "counts"),
    [
        ("files", 10, 3, [[2, 2], [2, 2], [2, 0]]),
        pytest.param("files", 3, 4, [[1], [1], [1], [0]], marks=pytest.mark.slow),
        ("synthetic", 10, 3, [[2, 2], [2, 2], [2, 0]]),
        ("synthetic", 3, 4, [[1], [1], [1], [0]]),
        ("synthetic", 5, 3, [[2], [2], [1]]),
    ],
)
def test_every_process_evaluates_the_same_number_of_batches(
    tfds_dir, stored, num_examples, process_count, counts, monkeypatch
):
    """Batches of 2 a process; some processes have fewer examples than others, or none."""
    if stored == "files":
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    config = tiny_config(None if stored == "synthetic" else tfds_dir)
    split = run_data.open_split(config, "test", None).select(np.arange(num_examples))
    found, places = [], []
    for process in range(process_count):
        batches = list(
            split.eval_batches(
                global_batch_size=2 * process_count,
                process_index=process,
                process_count=process_count,
            )
        )
        assert all(batch["image"].shape == (2, 8, 8, 3) for batch in batches)
        found.append([int(batch["mask"].sum()) for batch in batches])
        places += [int(i) for batch in batches for i in batch["index"] if i >= 0]
    assert found == counts
    assert places == list(range(num_examples))


def test_prefetch_keeps_order_passes_faults_on_and_can_be_closed():
    assert list(prefetch(iter(range(10)), lambda x: x * 2, 3)) == list(range(0, 20, 2))

    def broken():
        yield 1
        raise UserError("the second batch")

    stream = prefetch(broken(), lambda x: x, 2)
    assert next(stream) == 1
    with pytest.raises(UserError, match="the second batch"):
        next(stream)
    endless = prefetch(iter(int, 1), lambda x: x, 2)
    next(endless)
    endless.close()
