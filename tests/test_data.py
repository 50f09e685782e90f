"""Splits: reading order, image folders, unreadable images, exclusions and evaluation batches."""

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
    """A folder of small images with three file extensions, whose test split lacks a class."""
    rng = np.random.default_rng(0)
    for split, classes, count in (("train", CLASSES, 10), ("test", CLASSES[1:], 4)):
        for label in classes:
            directory = tmp_path / split / label
            directory.mkdir(parents=True)
            for i in range(count):
                extension = (".jpg", ".JPEG", ".png")[i % 3]
                pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(directory / f"{i:04}{extension}")
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


def _take(
    split, count, start_step=0, batch=16, process_index=0, process_count=1, seed=0, **options
):
    reading = order.Reading(
        seed=seed,
        global_batch_size=batch,
        process_index=process_index,
        process_count=process_count,
        **options,
    )
    stream = split.train_batches(start_step, reading)
    return list(itertools.islice(stream, count))


def _take_all(split, count, process_count, **settings):
    """Returns the global batches that several processes read together."""
    process_batches = [
        _take(split, count, process_index=p, process_count=process_count, **settings)
        for p in range(process_count)
    ]
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*process_batches, strict=True)
    ]


def _read_all(split):
    count = split.num_examples
    return next(split.sequential_batches(start=0, stop=count, batch_size=count))


def _rows(images):
    return sorted(image.tobytes() for image in images)


def _assert_same_batches(actual, expected):
    assert len(actual) == len(expected)
    for batch, expected_batch in zip(actual, expected, strict=True):
        assert batch.keys() == expected_batch.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], expected_batch[key])


# The digits.


def test_digits_are_a_fixed_split_of_the_scans(tfds_dir):
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
        batch = _read_all(split)
        images = np.round(scans.images[rows] * 255 / 16).astype(np.uint8)
        expected = sorted((scans.target[r], i.tobytes()) for r, i in zip(rows, images, strict=True))
        pairs = zip(batch["label"], batch["image"], strict=True)
        actual = sorted((label, image[..., 0].tobytes()) for label, image in pairs)
        assert actual == expected


@pytest.fixture(
    params=["groups", "synthetic"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("memory", "folder")]
)
def train_split(request, tfds_dir, image_folder, monkeypatch):
    """A training split, once for each way of reading."""
    if request.param == "groups":
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    if request.param == "folder":
        return run_data.open_split(_folder_config(image_folder), "train", None, augment=True)
    if request.param == "synthetic":
        return run_data.open_split(tiny_config(), "train", None)
    config = _digits_config(tfds_dir, dataset__shuffle_group_size=150)
    config.dataset.train_split = "train[:20%]+validation"
    return run_data.open_split(config, "train", None, augment=True)


def test_batches_from_step_k_match_those_streamed_from_0(train_split):
    """The comparison covers images, augmentation and labels, and the end of an epoch."""
    steps = train_split.num_examples // 16 + 3
    batches = _take(train_split, steps)
    assert batches[0]["image"].shape == (16, 8, 8, 3) and batches[0]["image"].dtype == np.uint8
    assert batches[0]["label"].dtype == np.int32
    for start in (1, steps - 2):
        _assert_same_batches(_take(train_split, steps - start, start_step=start), batches[start:])
    seed_1_batches = _take(train_split, 2, seed=1)
    assert any(
        (a["image"] != b["image"]).any() for a, b in zip(seed_1_batches, batches[:2], strict=True)
    )


def test_two_processes_read_the_same_batches_as_one(train_split, request):
    if train_split.order_depends_on_readers:
        parts = [_take(train_split, 25, process_index=p, process_count=2) for p in (0, 1)]
        images_0, images_1 = (
            {i.tobytes() for batch in part for i in batch["image"]} for part in parts
        )
        assert len(images_0) > 150 and len(images_0 & images_1) < 5  # a few scans are identical
    # The order depends on the number of readers only if examples are read from several files.
    assert train_split.order_depends_on_readers == ("groups" in request.node.callspec.id)
    readers = 1 if train_split.order_depends_on_readers else 2
    batches = _take_all(train_split, 4, 2, num_readers=readers)
    _assert_same_batches(batches, _take(train_split, 4, num_readers=1))


@pytest.fixture(scope="module")
def eight_files(tmp_path_factory):
    """A TFDS directory with eight files per split of the digits."""
    import tensorflow_datasets as tfds

    from mixer.data.sources import digits

    path = tmp_path_factory.mktemp("eight_files")
    builder = digits.Digits(data_dir=str(path))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=8))
    return path


@pytest.fixture
def sharded_config(eight_files, monkeypatch):
    """A config that reads the digits from `eight_files` instead of memory."""
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    return _digits_config(eight_files, dataset__shuffle_group_size=100)


def test_order_is_kept_when_the_number_of_processes_changes(sharded_config):
    """A run started by four processes reads the same batches if three resume it."""
    sharded_config.dataset.train_split = "train[:30%]"
    split = run_data.open_split(sharded_config, "train", None)
    settings = dict(batch=48, seed=2, num_readers=4)
    expected = _take_all(split, 9, 4, **settings)  # an epoch is 7.9 batches
    epoch = np.concatenate([batch["image"] for batch in expected])[: split.num_examples]
    assert _rows(epoch) == _rows(_read_all(split)["image"])
    batches = _take_all(split, 2, 3, start_step=7, **settings)
    _assert_same_batches(batches, expected[7:])


@pytest.mark.parametrize(
    ("process_index", "process_count"), [(0, 1), pytest.param(2, 8, marks=pytest.mark.slow)]
)
def test_resumed_run_opens_only_the_files_it_needs(
    sharded_config, tmp_path, process_index, process_count
):
    """Starts at step 70 after deleting all files except those that its shuffle groups need."""
    config = sharded_config
    shutil.copytree(config.dataset.data_dir, tmp_path / "tfds")
    config.dataset.data_dir = str(tmp_path / "tfds")
    info = sources.tfds_builder("digits", config.dataset.data_dir).info.splits["train"]
    split = run_data.open_split(config, "train", None, augment=True)
    settings = dict(process_index=process_index, process_count=process_count, num_readers=2)
    expected = _take(split, 2, start_step=70, **settings)
    required_files = set()
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
        # The group of step 70, and the next one, which is prefetched.
        required_files |= {
            piece.file for group in itertools.islice(groups, 2) for piece in group.pieces
        }
    files = info.filepaths
    assert len(required_files) < len(files)
    for number, path in enumerate(files):
        if number not in required_files:
            path.unlink()
    _assert_same_batches(_take(split, 2, start_step=70, **settings), expected)


# Folders.


def test_folder_finds_all_classes_and_image_extensions(image_folder):
    for split in ("train", "test"):  # no images in train/ant
        (image_folder / split / "ant").mkdir()
    for extension in ("bmp", "GIF", "webp"):
        Image.new("RGB", (12, 12)).save(image_folder / "test" / "ant" / f"1.{extension}")
    listing = folder.scan(str(image_folder))
    assert listing.class_names == ("ant", *CLASSES) and not listing.faults
    assert {split: len(files) for split, files in listing.files.items()} == {
        "train": 30,
        "test": 11,
    }
    split = run_data.open_split(_folder_config(image_folder), "test", None)
    batch = next(split.sequential_batches(start=0, stop=11, batch_size=11))
    assert not batch["image"][batch["label"] == 0].any() and sum(batch["label"] == 0) == 3


def test_class_without_images_is_an_error(image_folder):
    (image_folder / "train" / "fox").mkdir()
    (image_folder / "test" / "fox").mkdir()
    with pytest.raises(UserError, match=r"test/fox, train/fox"):
        folder.scan(str(image_folder))


def test_unsupported_image_format_is_an_error_at_the_start(image_folder, tmp_path):
    from mixer.tools import prepare

    Image.new("RGB", (12, 12)).save(image_folder / "train" / "cat" / "a.tif")
    config = _folder_config(image_folder)
    with pytest.raises(UserError, match=r"train/cat/a\.tif.*\.jpg") as error:
        run_data.open_split(config, "train", None, augment=True)
    assert "\n" not in str(error.value)
    prepare.check(config, str(tmp_path / "list.jsonl"))
    config.dataset.exclude = str(tmp_path / "list.jsonl")
    assert run_data.open_split(config, "train", None, augment=True).num_examples == 30


def test_folder_labels_use_the_class_order_of_the_run(image_folder):
    split = run_data.open_split(_folder_config(image_folder), "test", ("ant", "bee", *CLASSES))
    batch = next(split.sequential_batches(start=0, stop=8, batch_size=8))
    assert sorted(batch["label"]) == [3] * 4 + [4] * 4


def test_part_of_a_folder_split_contains_every_class(image_folder):
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
def test_invalid_dataset_settings_are_one_line_errors(image_folder, values, message):
    with pytest.raises(UserError, match=message) as error:
        run_data.open_split(_folder_config(image_folder, **values), "train", None, augment=True)
    assert "\n" not in str(error.value)


def test_invalid_synthetic_split_or_classes_are_errors():
    with pytest.raises(UserError, match="validation"):
        run_data.open_split(tiny_config(dataset__train_split="valid"), "train", None)
    with pytest.raises(UserError, match="classes"):
        run_data.open_split(tiny_config(), "train", ("a", "b"))


def test_folder_with_an_unknown_class_is_an_error(image_folder):
    with pytest.raises(UserError, match="eel"):
        run_data.open_split(_folder_config(image_folder), "train", ("cat", "dog"))


# Unreadable images.


def test_unreadable_image_is_named_and_can_be_excluded(image_folder, tmp_path):
    from mixer.tools import prepare

    truncated_file = image_folder / "train" / "dog" / "0003.jpg"
    truncated_file.write_bytes(truncated_file.read_bytes()[:100])
    empty_file = image_folder / "test" / "eel" / "0001.JPEG"
    empty_file.write_bytes(b"")
    config = _folder_config(image_folder)
    with pytest.raises(UserError, match=r"train/dog/0003\.jpg") as error:
        _take(run_data.open_split(config, "train", None, augment=True), 8)
    assert "\n" not in str(error.value)

    output = tmp_path / "exclude.jsonl"
    prepare.check(config, str(output))
    names = [json.loads(line)["example"] for line in output.read_text().splitlines()]
    assert names == ["test/eel/0001.JPEG", "train/dog/0003.jpg"]

    full_split = run_data.open_split(config, "train", None, augment=True)
    config.dataset.exclude = str(output)
    reduced_split = run_data.open_split(config, "train", None, augment=True)
    assert (full_split.num_examples, reduced_split.num_examples) == (30, 29)
    assert full_split.fingerprint != reduced_split.fingerprint
    _take(reduced_split, 8)

    user_name = "train/cat/0000.jpg"  # `check` keeps names that a user has added
    output.write_text(output.read_text() + json.dumps({"example": user_name}) + "\n")
    prepare.check(config, str(output))
    new_names = [json.loads(line)["example"] for line in output.read_text().splitlines()]
    assert new_names == sorted([*names, user_name])


def test_image_of_the_wrong_size_is_named_in_the_error(image_folder):
    config = _folder_config(image_folder, train_preprocess="decode")
    with pytest.raises(UserError, match=r"train/.*12.*8"):
        _take(run_data.open_split(config, "train", None, augment=True), 1)


def test_vanished_file_is_named_in_the_error(image_folder):
    split = run_data.open_split(_folder_config(image_folder), "train", None, augment=True)
    (image_folder / "train" / "cat" / "0000.jpg").unlink()
    with pytest.raises(UserError, match=r"cat/0000\.jpg"):
        _take(split, 8)


@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tfds_records_can_be_excluded(tfds_dir, tmp_path, grouped, monkeypatch):
    if grouped:
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    config = _digits_config(tfds_dir, dataset__train_split="validation")
    _check_exclusion(config, tmp_path, (0, 17, 179))


def test_tfds_records_of_several_files_can_be_excluded(sharded_config, tmp_path):
    """Excludes records by file and index from a split that uses parts of several files."""
    config = sharded_config
    config.dataset.train_split = "train[10%:30%]+train[50%:60%]"
    split = run_data.open_split(config, "train", None)
    names = [split.example_id(index) for index in range(split.num_examples)]
    files = [name.rpartition(":")[0] for name in names]
    first_records = [files.index(file) for file in sorted({*files})]
    _check_exclusion(config, tmp_path, sorted({*first_records, 5, len(names) - 1}))


def _check_exclusion(config, tmp_path, indices):
    full_split = run_data.open_split(config, "train", None)
    rows = _read_all(full_split)["image"]
    ids = [full_split.example_id(i) for i in range(full_split.num_examples)]
    file, _, _ = ids[0].rpartition(":")
    names = [*(ids[index] for index in indices), f"{file}:9999", f"x{file}:0", file, f"{file}:"]
    path = tmp_path / "exclude.jsonl"
    path.write_text("".join(json.dumps({"example": name}) + "\n" for name in names))
    config.dataset.exclude = str(path)
    split = run_data.open_split(config, "train", None)
    assert split.num_examples == len(rows) - len(indices)
    remaining = np.delete(rows, indices, axis=0)
    np.testing.assert_array_equal(_read_all(split)["image"], remaining)
    count = split.num_examples
    epoch = np.concatenate([b["image"] for b in _take(split, 2, batch=-(-count // 2))])[:count]
    assert _rows(epoch) == _rows(remaining)


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
def test_evaluation_reads_each_example_once(tfds_dir, process_count, grouped, monkeypatch):
    if grouped:
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    split = run_data.open_split(_digits_config(tfds_dir), "val", None)
    images, counts, indices = [], [], []
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
            images += [i.tobytes() for i in batch["image"][batch["mask"] > 0]]
            indices += batch["index"][batch["mask"] > 0].tolist()
            assert np.all(batch["index"][batch["mask"] == 0] == -1)
            assert not batch["image"][batch["mask"] == 0].any()
    assert len(set(counts)) == 1
    expected = _read_all(split)["image"]
    assert images == [expected[index].tobytes() for index in indices]
    assert indices == list(range(180))


@pytest.mark.parametrize(
    ("source", "num_examples", "process_count", "expected"),
    [
        ("files", 10, 3, [[2, 2], [2, 2], [2, 0]]),
        pytest.param("files", 3, 4, [[1], [1], [1], [0]], marks=pytest.mark.slow),
        ("synthetic", 10, 3, [[2, 2], [2, 2], [2, 0]]),
        ("synthetic", 3, 4, [[1], [1], [1], [0]]),
        ("synthetic", 5, 3, [[2], [2], [1]]),
    ],
)
def test_every_process_evaluates_the_same_number_of_batches(
    tfds_dir, source, num_examples, process_count, expected, monkeypatch
):
    """Each process reads batches of 2; some processes have fewer examples than others, or none."""
    if source == "files":
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    config = tiny_config(None if source == "synthetic" else tfds_dir)
    split = run_data.open_split(config, "test", None).select(np.arange(num_examples))
    counts, indices = [], []
    for process in range(process_count):
        batches = list(
            split.eval_batches(
                global_batch_size=2 * process_count,
                process_index=process,
                process_count=process_count,
            )
        )
        assert all(batch["image"].shape == (2, 8, 8, 3) for batch in batches)
        counts.append([int(batch["mask"].sum()) for batch in batches])
        indices += [int(i) for batch in batches for i in batch["index"] if i >= 0]
    assert counts == expected
    assert indices == list(range(num_examples))


def test_prefetch_keeps_the_order_raises_errors_and_can_be_closed():
    assert list(prefetch(iter(range(10)), lambda x: x * 2, 3)) == list(range(0, 20, 2))

    def failing_source():
        yield 1
        raise UserError("the second batch")

    stream = prefetch(failing_source(), lambda x: x, 2)
    assert next(stream) == 1
    with pytest.raises(UserError, match="the second batch"):
        next(stream)
    endless = prefetch(iter(int, 1), lambda x: x, 2)
    next(endless)
    endless.close()
