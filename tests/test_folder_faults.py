"""Unusual image folders and label files: nested, linked, changed, irregular, oddly named."""

import hashlib
import json
import os
import shutil
import socket
import unicodedata

import numpy as np
import pytest
from PIL import Image

from helpers import tiny_config
from mixer.data import splits as pipeline
from mixer.data.imagenet import names as imagenet_names
from mixer.data.sources import folder
from mixer.data.sources import stored as sources
from mixer.errors import UserError, printable
from mixer.evaluation import suites
from mixer.runs import config as run
from mixer.runs import data as run_data
from mixer.tools import prepare
from mixer.tools.predict import prediction

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """An image folder with 4 training and 2 test images per class."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("made")
    for split, count in (("train", 4), ("test", 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def data(dataset, tmp_path):
    """A copy of `dataset` that a test may change."""
    return shutil.copytree(dataset, tmp_path / "data")


def folder_config(data, **values):
    config = tiny_config(dataset__name="folder", dataset__data_dir=str(data), image_size=8)
    config.dataset.update(train_split="train", val_split="", test_split="test")
    config.dataset.update(train_preprocess="decode", eval_preprocess="decode")
    config.dataset.update(values)
    return config


def example_ids(split):
    return {split.example_id(place) for place in range(split.num_examples)}


def read_all(split):
    """Decodes every image and returns a dict from example id to class name."""
    count = split.num_examples
    batch = next(split.sequential_batches(start=0, stop=count, batch_size=count))
    labels = (split.class_names[label] for label in batch["label"])
    return {split.example_id(place): label for place, label in enumerate(labels)}


@pytest.fixture
def check_images(tmp_path, capsys):
    """A function that runs `prepare check` and returns its output and its {example: reason}."""

    def check(config):
        output = tmp_path / "list.jsonl"
        prepare.check(config, str(output))
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return capsys.readouterr().out, {row["example"]: row["reason"] for row in rows}

    return check


def one_line_message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# The walker.


def test_walker_follows_links_and_terminates(tmp_path):
    """Each folder is walked once, by its real path if it has one under the root."""
    for name in ("b/1.png", "b/deep/er/2.PNG", "c/3.png", ".git/4.png", "__MACOSX/._5.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    (tmp_path / "root" / "@eaDir" / "3.png").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "6.png").touch()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "root" / "b")
    (tmp_path / "root" / "b" / "up").symlink_to("..")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "loop.png").symlink_to("loop.png")
    (tmp_path / "root" / "c" / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "root" / "c" / "pipe.png")
    faults = dict(folder.walk(tmp_path / "root"))
    regular_files = {b"b/1.png", b"b/deep/er/2.PNG", b"c/3.png", b"link/6.png"}
    assert {path for path, fault in faults.items() if not fault} == regular_files
    assert {path: faults[path] for path in faults.keys() - regular_files} == {
        b"loop.png": "Too many levels of symbolic links",
        b"c/gone.png": "No such file or directory",
        b"c/pipe.png": "a named pipe, not a regular file",
    }
    with pytest.raises(UserError, match=r"nowhere cannot be read: No such file") as error:
        dict(folder.walk(tmp_path / "nowhere"))
    one_line_message(error)


def test_folders_that_link_to_each_other_are_walked_once(tmp_path):
    """Twelve folders, each with links to all of them, have over 12! paths."""
    for name in range(12):
        (tmp_path / str(name)).mkdir()
        (tmp_path / str(name) / "x.png").touch()
        for target in range(12):
            (tmp_path / str(name) / f"to{target}").symlink_to(tmp_path / str(target))
    assert len(list(folder.walk(tmp_path))) == 12


# Nested images, and runs of older versions, which ignored them.


def test_nested_images_are_read_and_reported(data, tmp_path, check_images):
    bee = data / "train" / "bee"
    (bee / "more" / "yet").mkdir(parents=True)
    (bee / "0.png").rename(bee / "more" / "0.png")
    (bee / "1.png").rename(bee / "more" / "yet" / "1.jpg.png")
    (data / "train" / "cow").rename(tmp_path / "all_nested")
    (data / "train" / "cow").mkdir()
    (tmp_path / "all_nested").rename(data / "train" / "cow" / "2020")
    config = folder_config(data)
    splits = run_data.open_splits(config, None)
    labels = read_all(splits.train)
    assert len(labels) == 12 and all(name.split("/")[1] == label for name, label in labels.items())
    assert {"train/bee/more/yet/1.jpg.png", "train/cow/2020/3.png"} < labels.keys()
    assert [line for line in splits.remarks if "6 images" in line and "train/bee/more" in line]
    output, reasons = check_images(config)
    assert "18 images checked, 0 cannot" in output and not reasons
    assert splits.remarks[0] in output


def test_example_order_and_fingerprint_match_older_versions(data):
    """Examples are sorted by a hash of their names, so added images do not reorder the others."""
    files = [f"train/{name}/{i}.png" for name in CLASSES for i in range(4)]
    files.sort(key=lambda file: hashlib.blake2b(file.encode(), digest_size=16).digest())
    split = run_data.open_split(folder_config(data, train_split="train[:50%]"), "train", None)
    assert [split.example_id(place) for place in range(6)] == files[:6]
    rows = "".join(f"{file}\0{CLASSES.index(file.split('/')[1])}\n" for file in files[:6])
    assert split.fingerprint == hashlib.blake2b(rows.encode(), digest_size=16).hexdigest()


def make_record(splits):
    return json.loads(json.dumps(run_data.data_record(splits, 1)))


def old_record(record):
    """Returns `record` in the format of older versions."""
    rows = record["splits"].items()
    old_keys = ("name", "num_examples", "fingerprint")
    splits = {name: {key: split[key] for key in old_keys} for name, split in rows}
    return {key: record[key] for key in ("class_names", "num_readers")} | {"splits": splits}


def test_run_of_an_older_version_keeps_its_images(data):
    config = folder_config(data)
    record = make_record(run_data.open_splits(config, None))
    run_data.check_same_data(
        "run", old_record(record), run_data.open_splits(config, None, old_record(record)).train
    )
    (data / "train" / "bee" / "more").mkdir()
    shutil.copy(data / "train" / "bee" / "0.png", data / "train" / "bee" / "more" / "9.png")
    splits = run_data.open_splits(config, CLASSES, old_record(record))
    run_data.check_same_data("run", old_record(record), splits.train)
    assert splits.train.num_examples == 12
    assert (
        "1 images in subfolders of a class folder, such as train/bee/more/9.png, are left out"
        in (splits.remarks[0])
    )
    new_record = make_record(splits)  # has file sizes and no nested image
    assert new_record["splits"]["train"]["files"]["num_files"] == 12
    new_splits = run_data.open_splits(config, CLASSES, new_record)
    run_data.check_same_data("run", new_record, new_splits.train)
    assert new_splits.train.num_examples == 12
    # A record of this version counts nested images, so a new one is a change.
    with pytest.raises(UserError, match=r"12 examples, now .* with 13 "):
        run_data.check_same_data("run", record, run_data.open_splits(config, CLASSES, record).train)


# Changed files.


@pytest.fixture(params=["folder", "labels", "several"])
def stored_config(request, data):
    """A config that labels images by class folder, or by a label file with one or two labels."""
    if request.param == "folder":
        return folder_config(data)
    rows = []
    for file in sorted(data.glob("*/*/*.png")):
        split, name, image = file.parts[-3:]
        labels = [name, "animal"] if request.param == "several" else name
        rows.append({"path": f"{split}/{name}/{image}", "labels": labels, "split": split})
    (data / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    config = folder_config(data, label_file=str(data / "labels.jsonl"))
    config.loss = "sigmoid"
    return config


def test_replaced_image_is_named_in_the_error(stored_config, data):
    record = make_record(run_data.open_splits(stored_config, None))
    total = sum(file.stat().st_size for file in data.glob("train/*/*.png"))
    assert record["splits"]["train"]["files"]["num_bytes"] == total
    file = data / "train" / "bee" / "2.png"
    old_size = file.stat().st_size
    Image.new("RGB", (8, 8)).save(file)
    new_total = total - old_size + file.stat().st_size
    with pytest.raises(UserError) as error:
        run_data.check_same_data(
            "run", record, run_data.open_splits(stored_config, None, record).train
        )
    message = one_line_message(error)
    assert f"{total:,} bytes" in message and f"{new_total:,}" in message
    assert "train/bee/2.png" in message
    assert ("class 'bee' had 4" in message) == ("class_bytes" in record["splits"]["train"]["files"])
    test = run_data.open_splits(stored_config, None, record).test
    assert not run_data.describe_change(record["splits"]["test"], test)
    # Two files of a class trade sizes: all totals are unchanged, so no file is named.
    file.write_bytes(bytes(old_size))
    record = make_record(run_data.open_splits(stored_config, None))
    sibling = data / "train" / "bee" / "1.png"
    sizes = file.stat().st_size, sibling.stat().st_size
    file.write_bytes(bytes(sizes[1] + 3))
    sibling.write_bytes(bytes(sizes[0] - 3))
    change = run_data.describe_change(
        record["splits"]["train"], run_data.open_splits(stored_config, None, record).train
    )
    assert "other sizes" in change and "last changed file" not in change


def test_recorded_sizes_ignore_excluded_images(stored_config, data, tmp_path):
    exclude = tmp_path / "exclude.jsonl"
    exclude.write_text('{"example": "train/cow/1.png"}\n')
    stored_config.dataset.exclude = str(exclude)
    record = make_record(run_data.open_splits(stored_config, None))
    (data / "train" / "cow" / "1.png").write_bytes(b"repaired")
    run_data.check_same_data("run", record, run_data.open_splits(stored_config, None, record).train)


def test_replaced_tfds_records_are_named_in_the_error(tfds_dir, tmp_path):
    data_dir = shutil.copytree(tfds_dir, tmp_path / "tfds")
    config = tiny_config(data_dir)
    record = make_record(run_data.open_splits(config, None))
    run_data.check_same_data("run", record, run_data.open_splits(config, None, record).train)
    file = next(data_dir.rglob("digits-train.tfrecord*"))
    file.write_bytes(file.read_bytes() + file.read_bytes())
    with pytest.raises(
        UserError, match=r"bytes, now .* the last changed file is .*/digits-train.tfrecord"
    ):
        run_data.check_same_data("run", record, run_data.open_splits(config, None, record).train)


# Irregular files are never opened: reading a pipe or a device would block.


@pytest.fixture
def irregular_files(data):
    """Adds a pipe, a device and a socket to the images; a dict from name to kind."""
    os.mkfifo(data / "train" / "bee" / "pipe.jpg")
    (data / "test" / "cow" / "zero.jpg").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    directory = os.getcwd()
    os.chdir(data / "train" / "ant")  # the path of a socket is limited to about 100 bytes
    listener.bind("s.png")
    os.chdir(directory)
    yield {"train/bee/pipe.jpg": "pipe", "test/cow/zero.jpg": "dev", "train/ant/s.png": "socket"}
    listener.close()


def test_irregular_files_are_an_error_unless_excluded(
    irregular_files, data, tmp_path, check_images
):
    config = folder_config(data)
    with pytest.raises(UserError, match=r"2 images .* train/(bee/pipe.jpg|ant/s.png): a ") as error:
        run_data.open_splits(config, None)
    message = one_line_message(error)
    with pytest.raises(UserError, match=r"test/cow/zero.jpg: a device"):
        run_data.open_split(config, "test", None)
    _, reasons = check_images(config)
    assert reasons.keys() == irregular_files.keys()
    assert all(irregular_files[name] in reason for name, reason in reasons.items())
    assert any(f"{name}: {reason}" in message for name, reason in reasons.items())
    config.dataset.exclude = str(tmp_path / "list.jsonl")
    splits = run_data.open_splits(config, None)
    assert len(read_all(splits.train)) == 12 and not splits.remarks


def test_irregular_files_in_a_label_file_are_an_error(
    irregular_files, data, tmp_path, check_images
):
    lines = [
        {"path": name, "labels": "x"} for name in (*irregular_files, "train/ant/0.png", "no.png")
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = folder_config(data, label_file=str(path), test_split="")
    with pytest.raises(UserError, match=r"3 images .*: a (device|named pipe|socket)"):
        run_data.open_split(config, "train", None)
    _, reasons = check_images(config)
    assert reasons.keys() == {*irregular_files, "no.png"}


def test_predict_does_not_open_irregular_files(irregular_files, data):
    reader = prediction.make_reader("decode", (8, 8))
    images = prediction.list_images([str(data / "train"), str(data / "test" / "cow")])
    results = {os.path.relpath(image, data): reader(image) for image in images}
    faults = {
        name: result.reason
        for name, result in results.items()
        if isinstance(result, prediction.Unreadable)
    }
    assert faults.keys() == irregular_files.keys() and len(results) == 17
    assert all(irregular_files[name] in reason for name, reason in faults.items())


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_list_that_is_not_a_regular_file_is_an_error(kind, data, tmp_path):
    path = tmp_path / "list"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    for key in ("label_file", "exclude"):
        with pytest.raises(UserError, match=rf"dataset\.{key}=.*list cannot be read: a .*{kind}"):
            run_data.open_split(folder_config(data, **{key: str(path)}), "train", None)
    with pytest.raises(UserError, match=rf"@.*list: the list cannot be read: a .*{kind}"):
        prediction.list_images([f"@{path}"])


# File names.


def test_file_names_that_are_not_utf8_are_supported(data, tmp_path, check_images):
    root = os.fsencode(data)
    for split in (b"train", b"test"):
        os.rename(root + b"/" + split + b"/cow", root + b"/" + split + b"/k\xfche")
    os.rename(root + b"/train/bee/0.png", root + b"/train/bee/caf\xe9.png")
    with open(root + b"/train/k\xfche/bad\xe9.png", "wb") as file:
        file.write(b"no image")
    config = folder_config(data)
    _, reasons = check_images(config)
    broken_file = r"train/k\xfche/bad\xe9.png"
    assert list(reasons) == [broken_file]
    with pytest.raises(UserError) as error:
        read_all(run_data.open_split(config, "train", None))
    assert f"{broken_file}: {reasons[broken_file]}" in one_line_message(error)
    config.dataset.exclude = str(tmp_path / "list.jsonl")
    labels = read_all(run_data.open_split(config, "train", None))
    assert labels[r"train/bee/caf\xe9.png"] == "bee" and len(labels) == 12
    assert r"k\xfche" in labels.values()
    # Python's own form of such names is accepted too: scripts of users write it.
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"example": os.fsdecode(b"train/bee/caf\xe9.png")})
    )
    assert run_data.open_split(config, "train", None).num_examples == 12
    images = prediction.list_images([str(data / "train" / "bee")])
    reader = prediction.make_reader("decode", (8, 8))
    results = [reader(image) for image in images]
    assert sum(not isinstance(result, prediction.Unreadable) for result in results) == 4


def test_label_file_may_contain_names_that_are_not_utf8(data, tmp_path):
    os.rename(os.fsencode(data) + b"/train/bee/0.png", os.fsencode(data) + b"/train/bee/\xe9.png")
    path = tmp_path / "labels.jsonl"
    lines = [{"path": "train/bee/\udce9.png", "labels": "be\udce9"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    split = run_data.open_split(folder_config(data, label_file=str(path)), "train", None)
    assert read_all(split) == {r"train/bee/\xe9.png": "be\udce9"}


def test_control_characters_in_names_are_escaped_in_messages(data):
    os.rename(data / "train" / "bee" / "0.png", data / "train" / "bee" / "a\n\x1b[31m.tif")
    with pytest.raises(UserError, match=r"a\\n\\x1b\[31m\.tif: TensorFlow cannot decode") as error:
        run_data.open_split(folder_config(data), "train", None)
    one_line_message(error)
    assert printable("a\udce9\u2028é\t") == r"a\udce9\u2028é\t"


# Other files next to the splits.


def test_folders_next_to_the_splits_are_ignored_or_reported(data):
    for name in ("__MACOSX/train/bee/._0.png", "@eaDir/train/0.png", "lost+found/a/1.png"):
        (data / name).parent.mkdir(parents=True)
        (data / name).write_bytes(bytes(120))
    (data / "annotations" / "xmls").mkdir(parents=True)
    (data / "annotations" / "xmls" / "0.xml").touch()
    (data / "train" / "stray.png").touch()
    (data / "train" / "bee" / "x.ppm").touch()
    listing = folder.scan(str(data))
    assert listing.class_names == CLASSES and list(listing.files) == ["test", "train"]
    assert ["train/stray.png" in line for line in listing.remarks] == [True, False]
    assert "train/bee/x.ppm" in listing.remarks[1]
    shutil.copytree(data / "train", data / "backup" / "train")
    with pytest.raises(UserError, match=r"backup/train: the name of a split") as error:
        folder.scan(str(data))
    one_line_message(error)
    shutil.rmtree(data / "backup")
    (data / "train" / "backup").mkdir()
    with pytest.raises(
        UserError, match=r"1 of 4 classes have no image in any split: train/backup;"
    ):
        folder.scan(str(data))


def test_images_without_a_class_folder_are_an_error(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    with pytest.raises(UserError, match=r"no images .*<split>/<class>.*(train|test)/1\.png"):
        folder.scan(str(tmp_path))


def test_class_may_be_called_train(data):
    for split in ("train", "test"):
        (data / split / "ant").rename(data / split / "train")
    assert folder.scan(str(data)).class_names == ("bee", "cow", "train")


# Warnings about likely mistakes.


def test_suspicious_class_names_are_reported(data, tmp_path, check_images):
    (data / "test" / "bee").rename(data / "test" / "bees")
    for split, form in (("train", "NFD"), ("test", "NFC")):
        (data / split / "ant").rename(data / split / unicodedata.normalize(form, "\xe4nt"))
    (data / "test" / "cow").rename(data / "test" / "Cow ")
    (tmp_path / "list").write_text(
        '{"example": "train/cow/77.png"}\n{"example": "test/bees/0.png"}'
    )
    config = folder_config(data, exclude=str(tmp_path / "list"))
    remarks = run_data.open_splits(config, None).remarks
    assert len(remarks) == 3
    assert "3 of 6 classes have no training image" in remarks[0] and "bees" in remarks[0]
    assert r"'Cow ' and 'cow', 'a\u0308nt' and '\xe4nt'" in remarks[1]
    assert "1 names in dataset.exclude=" in remarks[2] and "train/cow/77.png" in remarks[2]
    output, _ = check_images(config)
    assert all(line in output for line in remarks)


def test_suspicious_class_names_in_a_label_file_are_reported(data, tmp_path):
    lines = [{"path": "train/ant/0.png", "labels": "cat"}, {"path": "a.png", "labels": "Cat"}]
    lines.append({"path": "b.png", "labels": ["cat "], "split": "test"})
    (tmp_path / "labels").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "list").write_text('{"example": "c.png"}\n{"example": "b.png"}')
    config = folder_config(data, label_file=str(tmp_path / "labels"), test_split="")
    config.dataset.exclude = str(tmp_path / "list")
    remarks = run_data.open_splits(config, None).remarks
    assert ["'cat '" in line or "cat " in line for line in remarks] == [True, True, False]
    assert "1 of 3 classes" in remarks[0] and "'Cat' and 'cat' and 'cat '" in remarks[1]
    assert "c.png" in remarks[2]
    for line in lines:
        line["labels"] = ["cat", "cat "]
    (tmp_path / "labels").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    config.loss = "sigmoid"
    remarks = run_data.open_splits(config, None).remarks
    assert len(remarks) == 2  # similar names, unmatched exclusion


def test_single_class_and_unmatched_exclusions_are_reported(data, tfds_dir, tmp_path):
    for split in ("train", "test"):
        shutil.rmtree(data / split / "bee")
        shutil.rmtree(data / split / "cow")
    (line,) = run_data.open_splits(folder_config(data), None).remarks
    assert "one class, ant" in line
    names = ["digits-test.tfrecord-00000-of-00001:0", "digits-test.tfrecord-00000-of-00001:360"]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({"example": name}) + "\n" for name in names))
    (line,) = run_data.open_splits(tiny_config(tfds_dir, dataset__exclude=str(path)), None).remarks
    assert "1 names" in line and names[1] in line and names[0] not in line
    with pytest.raises(UserError, match=r"dataset.exclude='x' is for stored images"):
        run_data.open_split(tiny_config(dataset__exclude="x"), "train", None)


@pytest.mark.parametrize(
    "line", ["[1]", "7", "null", '{"example": 7}', '{"example": ["a"]}', "{", "[" * 9999, "\xff"]
)
def test_malformed_exclusion_line_is_named_in_the_error(data, tmp_path, line):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"example": "x"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"dataset\.exclude=.*, line 3: expected") as error:
        pipeline.read_exclusions(str(path))
    one_line_message(error)


# The syntax of splits.


def test_split_may_have_any_name(data):
    for name, new_name in (("train", "Training Set"), ("test", "train.clean")):
        (data / name).rename(data / new_name)
    for spec, count in (
        ("Training Set", 12),
        ("Training Set[:50%] + train.clean[1:]", 11),
        ("all", 18),
    ):
        assert (
            run_data.open_split(folder_config(data, train_split=spec), "train", None).num_examples
            == count
        )


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "all[:90%]",
            "all[0]",
            "train[:",
            "train[]",
            "train[::2]",
            "train[a:b]",
            "train[:1shard]",
        ),
        *("train[:999%]", "train[99:]", "train++test", "+", "[", "train[:5]x", "train/bee", "none"),
        *("train[:" + "9" * 5000 + "]", "train[1e3:]", "train[%:]", "+".join(["train"] * 5000)),
        *("train[:0%]", "train[5:2]"),
    ],
)
def test_invalid_split_specs_are_one_line_errors(data, spec):
    with pytest.raises(UserError, match=r"split|empty") as error:
        run_data.open_split(folder_config(data, train_split=spec), "train", None)
    one_line_message(error)


def test_split_called_all_is_ambiguous(data):
    (data / "test").rename(data / "all")
    for spec in ("all", "train+all", "all[:1]"):
        with pytest.raises(UserError, match=r"`all` means all complete splits") as error:
            run_data.open_split(folder_config(data, train_split=spec), "train", None)
        one_line_message(error)
    assert run_data.open_split(folder_config(data), "train", None).num_examples == 12


# Links in folders for prediction, and ImageNet's folder.


def test_predict_follows_symbolic_links(data, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cows").symlink_to(data / "test" / "cow")
    (tmp_path / "photos" / "here").symlink_to(".")
    images = prediction.list_images([str(tmp_path / "photos")])
    assert images == [f"{tmp_path}/photos/cows/{i}.png" for i in range(2)]


def test_imagenet_folder_may_be_nested_and_contain_links(data, tmp_path):
    synsets = imagenet_names.synsets("imagenet1k")[:2]
    (tmp_path / "val" / synsets[0] / "part").mkdir(parents=True)
    shutil.copy(data / "test" / "ant" / "0.png", tmp_path / "val" / synsets[0] / "part" / "a.png")
    (tmp_path / "val" / synsets[1]).symlink_to(data / "test" / "bee")
    (tmp_path / "val" / "__MACOSX").mkdir()
    os.mkfifo(tmp_path / "val" / "__MACOSX" / "x.png")
    options = dict(preprocess="decode", image_size=(8, 8), data_dir=str(tmp_path))
    split = suites.open_task("imagenet_val", **options)
    assert sorted(example_ids(split)) == [
        *(f"val/{synsets[0]}/part/a.png", f"val/{synsets[1]}/0.png", f"val/{synsets[1]}/1.png")
    ]
    os.mkfifo(tmp_path / "val" / synsets[0] / "x.png")
    with pytest.raises(UserError, match=f"val/{synsets[0]}/x.png: a named pipe"):
        suites.open_task("imagenet_val", **options)


# URLs and malformed paths.


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("file:///data/pets", "use data_dir=/data/pets|use dataset.data_dir=/data/pets"),
        ("http://host/pets", "http:// is not supported"),
        ("gs://", "expected a bucket"),
        ("a\0b", "null character"),
        ("x" * 5000, "File name too long|is not a folder"),
    ],
)
def test_unsupported_data_dirs_are_one_line_errors(path, hint, tfds_dir):
    for config in (
        folder_config(path),
        tiny_config(path),
        folder_config(path, label_file=str(tfds_dir)),
    ):
        if config.dataset.name == "digits" and len(path) > 1000:
            continue
        with pytest.raises(UserError, match=hint) as error:
            run_data.open_split(config, "train", None)
        one_line_message(error)
        assert "data_dir=" in str(error.value)


# Downloads.


def test_download_from_a_silent_server_times_out(tmp_path, monkeypatch):
    """The server accepts the connection and never answers."""
    import requests
    from tensorflow_datasets.core.download import downloader

    monkeypatch.setattr(sources, "READ_SECS", 0.1)
    monkeypatch.setattr(sources, "RETRIES", 1)
    settings = requests.adapters.HTTPAdapter, downloader.MAX_RETRIES
    with socket.create_server(("127.0.0.1", 0)) as server, sources.bounded_downloads():
        downloads = downloader.get_downloader()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        with downloads.tqdm(), pytest.raises(sources.DOWNLOAD_ERRORS):
            downloads.download(url, tmp_path).get()
    assert (requests.adapters.HTTPAdapter, downloader.MAX_RETRIES) == settings


def test_failed_download_is_a_one_line_error(tmp_path, monkeypatch):
    import requests

    class Builder:
        data_dir = str(tmp_path)

        def download_and_prepare(self, **options):
            raise requests.exceptions.ConnectionError("host:\n gone")

    monkeypatch.setattr(sources, "tfds_builder", lambda *args, **options: Builder())
    with pytest.raises(UserError, match=r"mnist could not be prepared in .*: host: gone") as error:
        prepare.prepare_tfds("mnist", str(tmp_path))
    one_line_message(error)


# `prepare check`, ImageNet-21k, and runs of older versions.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(val_split="all[:9%]"), "split 'all"),
        (dict(test_split="tset"), "split 'tset'"),
        (dict(train_preprocess="decode|one_hot(2)"), r"one_hot\(2\).* has 3"),
        (dict(train_split="train[:0]"), "is empty"),
    ],
)
def test_check_reports_the_same_config_errors_as_training(
    data, tmp_path, values, message, check_images
):
    config = folder_config(data, **values)
    with pytest.raises(UserError, match=message) as training_error:
        run_data.open_splits(config, None)
    with pytest.raises(UserError) as check_error:
        check_images(config)
    assert str(check_error.value) == str(training_error.value)


def test_imagenet21k_source_cannot_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "fall11_whole.tar")
    with pytest.raises(UserError, match=r"--source=.*fall11_whole\.tar: a named pipe"):
        prepare.prepare_imagenet21k(str(tmp_path / "fall11_whole.tar"), str(tmp_path), "")


@pytest.mark.slow
def test_run_of_an_older_version_is_resumed_and_evaluated(data, tmp_path, capsys):
    from mixer import trainer
    from mixer.evaluation import report
    from mixer.evaluation.subject import open_subject

    workdir = tmp_path / "run"
    config = folder_config(data, train_split="train[:75%]", val_split="train[75%:]")
    config.total_steps, config.schedule.warmup_steps, config.checkpoint.keep_best = 2, 1, False
    trainer.train(config, str(workdir))
    data_record = json.loads((workdir / "data.json").read_text())
    (workdir / "data.json").write_text(json.dumps(old_record(data_record)))
    (data / "train" / "bee" / "more").mkdir()
    for i in range(4):
        shutil.copy(data / "train" / "bee" / f"{i}.png", data / "train" / "bee" / "more")
    config.total_steps = 4
    trainer.train(config, str(workdir))
    output = capsys.readouterr().out
    assert "continuing from step 2" in output
    warning = "warning: 4 images in subfolders of a class folder, such as train/bee/more/0.png"
    assert warning in output
    new_record = json.loads((workdir / "data.json").read_text())
    assert new_record == data_record | {"subfolders": False}
    subjects = [lambda: open_subject(str(workdir), checkpoint_name="last")]
    report.evaluate(subjects, report.Options(splits=["val"]))
    assert "differs from the data of the run" not in capsys.readouterr().out
    # `open_own_split` ignores images that were added after the run.
    data_record = json.loads((workdir / "data.json").read_text())["splits"]
    run_config, names = run.read_run(workdir)
    split = run_data.open_own_split(run_config, "train", names, data_record)
    assert split.num_examples == data_record["train"]["num_examples"]
    assert run_data.open_split(run_config, "train", names).num_examples > split.num_examples
    Image.new("RGB", (8, 8)).save(data / "test" / "bee" / "0.png")
    trainer.train(config, str(workdir))
    output = capsys.readouterr().out
    assert "warning: dataset.test_split" in output and "warning: dataset.val_split" not in output


def test_vanished_file_with_a_name_that_is_not_utf8_is_named(data):
    file = os.fsencode(data) + b"/train/bee/caf\xe9.png"
    os.rename(os.fsencode(data) + b"/train/bee/0.png", file)
    split = run_data.open_split(folder_config(data), "train", None)
    os.unlink(file)
    with pytest.raises(UserError, match=r"cannot use train/bee/caf\\xe9\.png") as error:
        read_all(split)
    one_line_message(error)
