"""Folders and label files as they lie on disks: nested, linked, oddly named, changed, hostile."""

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
def made(tmp_path_factory):
    """train/ of 4 and test/ of 2 images a class."""
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
def data(made, tmp_path):
    """A copy of `made` to change."""
    return shutil.copytree(made, tmp_path / "data")


def config_of(data, **values):
    config = tiny_config(dataset__name="folder", dataset__data_dir=str(data), image_size=8)
    config.dataset.update(train_split="train", val_split="", test_split="test")
    config.dataset.update(train_preprocess="decode", eval_preprocess="decode")
    config.dataset.update(values)
    return config


def names_of(split):
    return {split.example_id(place) for place in range(split.num_examples)}


def read_all(split):
    """Labels by image; every image is decoded."""
    count = split.num_examples
    batch = next(split.sequential_batches(start=0, stop=count, batch_size=count))
    labels = (split.class_names[label] for label in batch["label"])
    return {split.example_id(place): label for place, label in enumerate(labels)}


@pytest.fixture
def checked(tmp_path, capsys):
    """A function: config -> what `prepare check` prints, and lists: reasons by example."""

    def check(config):
        output = tmp_path / "list.jsonl"
        prepare.check(config, str(output))
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return capsys.readouterr().out, {row["example"]: row["reason"] for row in rows}

    return check


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# The walker.


def test_walker_reads_below_follows_links_and_ends(tmp_path):
    """Each folder once, and by its own way rather than by a link, however links lead around."""
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
    found = dict(folder.walk(tmp_path / "root"))
    regular = {b"b/1.png", b"b/deep/er/2.PNG", b"c/3.png", b"link/6.png"}
    assert {path for path, fault in found.items() if not fault} == regular
    assert {path: found[path] for path in found.keys() - regular} == {
        b"loop.png": "Too many levels of symbolic links",
        b"c/gone.png": "No such file or directory",
        b"c/pipe.png": "a named pipe, not a regular file",
    }
    with pytest.raises(UserError, match=r"nowhere cannot be read: No such file") as caught:
        dict(folder.walk(tmp_path / "nowhere"))
    one_line(caught)


def test_a_mesh_of_links_is_walked_once(tmp_path):
    """Twelve folders, each with links to all others: 12! ways lead through them."""
    for one in range(12):
        (tmp_path / str(one)).mkdir()
        (tmp_path / str(one) / "x.png").touch()
        for other in range(12):
            (tmp_path / str(one) / f"to{other}").symlink_to(tmp_path / str(other))
    assert len(list(folder.walk(tmp_path))) == 12


# F2: nested images, and runs begun before they were read.


def test_nested_images_are_read_and_told(data, tmp_path, checked):
    bee = data / "train" / "bee"
    (bee / "more" / "yet").mkdir(parents=True)
    (bee / "0.png").rename(bee / "more" / "0.png")
    (bee / "1.png").rename(bee / "more" / "yet" / "1.jpg.png")
    (data / "train" / "cow").rename(tmp_path / "all_nested")
    (data / "train" / "cow").mkdir()
    (tmp_path / "all_nested").rename(data / "train" / "cow" / "2020")
    config = config_of(data)
    splits = run_data.open_splits(config, None)
    labels = read_all(splits.train)
    assert len(labels) == 12 and all(name.split("/")[1] == label for name, label in labels.items())
    assert {"train/bee/more/yet/1.jpg.png", "train/cow/2020/3.png"} < labels.keys()
    assert [line for line in splits.remarks if "6 images" in line and "train/bee/more" in line]
    said, listed = checked(config)
    assert "18 images checked, 0 cannot" in said and not listed
    assert splits.remarks[0] in said


def test_cut_and_fingerprint_are_those_of_older_code(data):
    """The order is by a hash of the names; images that are added move no other one."""
    files = [f"train/{name}/{i}.png" for name in CLASSES for i in range(4)]
    files.sort(key=lambda file: hashlib.blake2b(file.encode(), digest_size=16).digest())
    split = run_data.open_split(config_of(data, train_split="train[:50%]"), "train", None)
    assert [split.example_id(place) for place in range(6)] == files[:6]
    rows = "".join(f"{file}\0{CLASSES.index(file.split('/')[1])}\n" for file in files[:6])
    assert split.fingerprint == hashlib.blake2b(rows.encode(), digest_size=16).hexdigest()


def record_of(splits):
    return json.loads(json.dumps(run_data.data_record(splits, 1)))


def older(record):
    """The record as code before this one wrote it."""
    rows = record["splits"].items()
    old = ("name", "num_examples", "fingerprint")
    splits = {which: {key: split[key] for key in old} for which, split in rows}
    return {key: record[key] for key in ("class_names", "num_readers")} | {"splits": splits}


def test_runs_of_older_code_go_on_with_the_images_they_had(data):
    config = config_of(data)
    before = record_of(run_data.open_splits(config, None))
    run_data.check_same_data(
        "run", older(before), run_data.open_splits(config, None, older(before)).train
    )
    (data / "train" / "bee" / "more").mkdir()
    shutil.copy(data / "train" / "bee" / "0.png", data / "train" / "bee" / "more" / "9.png")
    splits = run_data.open_splits(config, CLASSES, older(before))
    run_data.check_same_data("run", older(before), splits.train)
    assert splits.train.num_examples == 12
    assert (
        "1 images in subfolders of a class folder, such as train/bee/more/9.png, are left out"
        in (splits.remarks[0])
    )
    upgraded = record_of(splits)  # with sizes, and still without the nested image
    assert upgraded["splits"]["train"]["files"]["num_files"] == 12
    again = run_data.open_splits(config, CLASSES, upgraded)
    run_data.check_same_data("run", upgraded, again.train)
    assert again.train.num_examples == 12
    # A run of this code has seen that there was none.
    with pytest.raises(UserError, match=r"12 examples, now .* with 13 "):
        run_data.check_same_data("run", before, run_data.open_splits(config, CLASSES, before).train)


# H7: changed files.


@pytest.fixture(params=["folder", "labels", "several"])
def stored(request, data):
    """A config of the images by their folders, or by a file of labels, one or two an image."""
    if request.param == "folder":
        return config_of(data)
    lines = []
    for file in sorted(data.glob("*/*/*.png")):
        split, name, image = file.parts[-3:]
        labels = [name, "animal"] if request.param == "several" else name
        lines.append({"path": f"{split}/{name}/{image}", "labels": labels, "split": split})
    (data / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(data, label_file=str(data / "labels.jsonl"))
    config.loss = "sigmoid"
    return config


def test_replaced_images_are_named(stored, data):
    record = record_of(run_data.open_splits(stored, None))
    total = sum(file.stat().st_size for file in data.glob("train/*/*.png"))
    assert record["splits"]["train"]["files"]["num_bytes"] == total
    file = data / "train" / "bee" / "2.png"
    old = file.stat().st_size
    Image.new("RGB", (8, 8)).save(file)
    now = total - old + file.stat().st_size
    with pytest.raises(UserError) as caught:
        run_data.check_same_data("run", record, run_data.open_splits(stored, None, record).train)
    message = one_line(caught)
    assert f"{total:,} bytes" in message and f"{now:,}" in message
    assert "train/bee/2.png" in message
    assert ("class 'bee' had 4" in message) == ("class_bytes" in record["splits"]["train"]["files"])
    test = run_data.open_splits(stored, None, record).test
    assert not run_data.describe_change(record["splits"]["test"], test)
    # As many files and bytes, in another order: no file is blamed that has not changed.
    file.write_bytes(bytes(old))
    record = record_of(run_data.open_splits(stored, None))
    other = data / "train" / "bee" / "1.png"
    sizes = file.stat().st_size, other.stat().st_size
    file.write_bytes(bytes(sizes[1] + 3))
    other.write_bytes(bytes(sizes[0] - 3))
    change = run_data.describe_change(
        record["splits"]["train"], run_data.open_splits(stored, None, record).train
    )
    assert "other sizes" in change and "last changed file" not in change


def test_sizes_are_those_of_the_examples_that_are_read(stored, data, tmp_path):
    exclude = tmp_path / "exclude.jsonl"
    exclude.write_text('{"example": "train/cow/1.png"}\n')
    stored.dataset.exclude = str(exclude)
    record = record_of(run_data.open_splits(stored, None))
    (data / "train" / "cow" / "1.png").write_bytes(b"repaired")
    run_data.check_same_data("run", record, run_data.open_splits(stored, None, record).train)


def test_replaced_records_of_a_tfds_set_are_named(tfds_dir, tmp_path):
    copied = shutil.copytree(tfds_dir, tmp_path / "tfds")
    config = tiny_config(copied)
    record = record_of(run_data.open_splits(config, None))
    run_data.check_same_data("run", record, run_data.open_splits(config, None, record).train)
    file = next(copied.rglob("digits-train.tfrecord*"))
    file.write_bytes(file.read_bytes() + file.read_bytes())
    with pytest.raises(
        UserError, match=r"bytes, now .* the last changed file is .*/digits-train.tfrecord"
    ):
        run_data.check_same_data("run", record, run_data.open_splits(config, None, record).train)


# H8: what is not a regular file is never opened.


@pytest.fixture
def irregular(data):
    """A pipe, a device and a socket among the images; gives the socket."""
    os.mkfifo(data / "train" / "bee" / "pipe.jpg")
    (data / "test" / "cow" / "zero.jpg").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    os.chdir(data / "train" / "ant")  # addresses of sockets are short
    listener.bind("s.png")
    os.chdir(before)
    yield {"train/bee/pipe.jpg": "pipe", "test/cow/zero.jpg": "dev", "train/ant/s.png": "socket"}
    listener.close()


def test_irregular_files_are_refused_and_can_be_left_out(irregular, data, tmp_path, checked):
    config = config_of(data)
    with pytest.raises(
        UserError, match=r"2 images .* train/(bee/pipe.jpg|ant/s.png): a "
    ) as caught:
        run_data.open_splits(config, None)
    refused = one_line(caught)
    with pytest.raises(UserError, match=r"test/cow/zero.jpg: a device"):
        run_data.open_split(config, "test", None)
    _, listed = checked(config)
    assert listed.keys() == irregular.keys()
    assert all(irregular[name] in reason for name, reason in listed.items())
    assert any(f"{name}: {reason}" in refused for name, reason in listed.items())
    config.dataset.exclude = str(tmp_path / "list.jsonl")
    splits = run_data.open_splits(config, None)
    assert len(read_all(splits.train)) == 12 and not splits.remarks


def test_irregular_files_of_a_label_file_are_refused(irregular, data, tmp_path, checked):
    lines = [{"path": name, "labels": "x"} for name in (*irregular, "train/ant/0.png", "no.png")]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(data, label_file=str(path), test_split="")
    with pytest.raises(UserError, match=r"3 images .*: a (device|named pipe|socket)"):
        run_data.open_split(config, "train", None)
    _, listed = checked(config)
    assert listed.keys() == {*irregular, "no.png"}


def test_irregular_files_are_not_predicted(irregular, data):
    read = prediction.make_reader("decode", (8, 8))
    images = prediction.list_images([str(data / "train"), str(data / "test" / "cow")])
    results = {os.path.relpath(image, data): read(image) for image in images}
    faults = {
        name: result.reason
        for name, result in results.items()
        if isinstance(result, prediction.Unreadable)
    }
    assert faults.keys() == irregular.keys() and len(results) == 17
    assert all(irregular[name] in reason for name, reason in faults.items())


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_lists_are_regular_files(kind, data, tmp_path):
    path = tmp_path / "list"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    for key in ("label_file", "exclude"):
        with pytest.raises(UserError, match=rf"dataset\.{key}=.*list cannot be read: a .*{kind}"):
            run_data.open_split(config_of(data, **{key: str(path)}), "train", None)
    with pytest.raises(UserError, match=rf"@.*list: the list cannot be read: a .*{kind}"):
        prediction.list_images([f"@{path}"])


# F3, H15: names.


def test_names_that_are_not_utf8(data, tmp_path, checked):
    root = os.fsencode(data)
    for split in (b"train", b"test"):
        os.rename(root + b"/" + split + b"/cow", root + b"/" + split + b"/k\xfche")
    os.rename(root + b"/train/bee/0.png", root + b"/train/bee/caf\xe9.png")
    with open(root + b"/train/k\xfche/bad\xe9.png", "wb") as file:
        file.write(b"no image")
    config = config_of(data)
    _, listed = checked(config)
    bad = r"train/k\xfche/bad\xe9.png"
    assert list(listed) == [bad]
    with pytest.raises(UserError) as caught:
        read_all(run_data.open_split(config, "train", None))
    assert f"{bad}: {listed[bad]}" in one_line(caught)
    config.dataset.exclude = str(tmp_path / "list.jsonl")
    labels = read_all(run_data.open_split(config, "train", None))
    assert labels[r"train/bee/caf\xe9.png"] == "bee" and len(labels) == 12
    assert r"k\xfche" in labels.values()
    # Also as Python writes such names, which is what a user's own script puts into a list.
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"example": os.fsdecode(b"train/bee/caf\xe9.png")})
    )
    assert run_data.open_split(config, "train", None).num_examples == 12
    images = prediction.list_images([str(data / "train" / "bee")])
    read = prediction.make_reader("decode", (8, 8))
    assert (
        len([image for image in images if not isinstance(read(image), prediction.Unreadable)]) == 4
    )


def test_label_files_with_names_that_are_not_utf8(data, tmp_path):
    os.rename(os.fsencode(data) + b"/train/bee/0.png", os.fsencode(data) + b"/train/bee/\xe9.png")
    path = tmp_path / "labels.jsonl"
    lines = [{"path": "train/bee/\udce9.png", "labels": "be\udce9"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    split = run_data.open_split(config_of(data, label_file=str(path)), "train", None)
    assert read_all(split) == {r"train/bee/\xe9.png": "be\udce9"}


def test_a_message_is_one_line_whatever_the_name(data):
    os.rename(data / "train" / "bee" / "0.png", data / "train" / "bee" / "a\n\x1b[31m.tif")
    with pytest.raises(UserError, match=r"a\\n\\x1b\[31m\.tif: TensorFlow cannot decode") as caught:
        run_data.open_split(config_of(data), "train", None)
    one_line(caught)
    assert printable("a\udce9\u2028é\t") == r"a\udce9\u2028é\t"


# F4: what lies beside the splits.


def test_folders_beside_the_splits(data):
    for name in ("__MACOSX/train/bee/._0.png", "@eaDir/train/0.png", "lost+found/a/1.png"):
        (data / name).parent.mkdir(parents=True)
        (data / name).write_bytes(bytes(120))
    (data / "annotations" / "xmls").mkdir(parents=True)
    (data / "annotations" / "xmls" / "0.xml").touch()
    (data / "train" / "stray.png").touch()
    (data / "train" / "bee" / "x.ppm").touch()
    found = folder.scan(str(data))
    assert found.class_names == CLASSES and list(found.files) == ["test", "train"]
    assert ["train/stray.png" in line for line in found.remarks] == [True, False]
    assert "train/bee/x.ppm" in found.remarks[1]
    shutil.copytree(data / "train", data / "backup" / "train")
    with pytest.raises(UserError, match=r"backup/train: the name of a split") as caught:
        folder.scan(str(data))
    one_line(caught)
    shutil.rmtree(data / "backup")
    (data / "train" / "backup").mkdir()
    with pytest.raises(
        UserError, match=r"1 of 4 classes have no image in any split: train/backup;"
    ):
        folder.scan(str(data))


def test_images_without_a_class_are_named(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.png").touch()
    with pytest.raises(UserError, match=r"no images .*<split>/<class>.*cats/1\.png"):
        folder.scan(str(tmp_path))


def test_a_class_may_be_called_train(data):
    for split in ("train", "test"):
        (data / split / "ant").rename(data / split / "train")
    assert folder.scan(str(data)).class_names == ("bee", "cow", "train")


# F5 and the lines on what may not be meant.


def test_classes_are_compared_with_the_training_split(data, tmp_path, checked):
    (data / "test" / "bee").rename(data / "test" / "bees")
    for split, form in (("train", "NFD"), ("test", "NFC")):
        (data / split / "ant").rename(data / split / unicodedata.normalize(form, "\xe4nt"))
    (data / "test" / "cow").rename(data / "test" / "Cow ")
    (tmp_path / "list").write_text(
        '{"example": "train/cow/77.png"}\n{"example": "test/bees/0.png"}'
    )
    config = config_of(data, exclude=str(tmp_path / "list"))
    remarks = run_data.open_splits(config, None).remarks
    assert len(remarks) == 3
    assert "3 of 6 classes have no training image" in remarks[0] and "bees" in remarks[0]
    assert r"'Cow ' and 'cow', 'a\u0308nt' and '\xe4nt'" in remarks[1]
    assert "1 names in dataset.exclude=" in remarks[2] and "train/cow/77.png" in remarks[2]
    said, _ = checked(config)
    assert all(line in said for line in remarks)


def test_label_files_get_the_same_lines(data, tmp_path):
    lines = [{"path": "train/ant/0.png", "labels": "cat"}, {"path": "a.png", "labels": "Cat"}]
    lines.append({"path": "b.png", "labels": ["cat "], "split": "test"})
    (tmp_path / "labels").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "list").write_text('{"example": "c.png"}\n{"example": "b.png"}')
    config = config_of(data, label_file=str(tmp_path / "labels"), test_split="")
    config.dataset.exclude = str(tmp_path / "list")
    remarks = run_data.open_splits(config, None).remarks
    assert ["'cat '" in line or "cat " in line for line in remarks] == [True, True, False]
    assert "1 of 3 classes" in remarks[0] and "'Cat' and 'cat' and 'cat '" in remarks[1]
    assert "c.png" in remarks[2]
    for line in lines:
        line["labels"] = ["cat", "cat "]
    (tmp_path / "labels").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    config.loss = "sigmoid"
    assert len(run_data.open_splits(config, None).remarks) == 2  # alike, and the list


def test_one_class_and_records_that_match_nothing_are_told(data, tfds_dir, tmp_path):
    for split in ("train", "test"):
        shutil.rmtree(data / split / "bee")
        shutil.rmtree(data / split / "cow")
    (line,) = run_data.open_splits(config_of(data), None).remarks
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
def test_exclusion_lists_are_read_by_line(data, tmp_path, line):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"example": "x"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"dataset\.exclude=.*, line 3: expected") as caught:
        pipeline.read_exclusions(str(path))
    one_line(caught)


# F13: the grammar of splits.


def test_splits_may_have_any_name(data):
    for name, new in (("train", "Training Set"), ("test", "train.clean")):
        (data / name).rename(data / new)
    for spec, count in (
        ("Training Set", 12),
        ("Training Set[:50%] + train.clean[1:]", 11),
        ("all", 18),
    ):
        assert (
            run_data.open_split(config_of(data, train_split=spec), "train", None).num_examples
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
def test_specs_that_name_no_split_get_one_line(data, spec):
    with pytest.raises(UserError, match=r"split|empty") as caught:
        run_data.open_split(config_of(data, train_split=spec), "train", None)
    one_line(caught)


def test_a_split_called_all_is_not_all_splits(data):
    (data / "test").rename(data / "all")
    for spec in ("all", "train+all", "all[:1]"):
        with pytest.raises(UserError, match=r"`all` means all complete splits") as caught:
            run_data.open_split(config_of(data, train_split=spec), "train", None)
        one_line(caught)
    assert run_data.open_split(config_of(data), "train", None).num_examples == 12


# F15, and ImageNet's folders.


def test_predict_follows_links(data, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cows").symlink_to(data / "test" / "cow")
    (tmp_path / "photos" / "here").symlink_to(".")
    images = prediction.list_images([str(tmp_path / "photos")])
    assert images == [f"{tmp_path}/photos/cows/{i}.png" for i in range(2)]


def test_imagenet_folder_is_walked_the_same_way(data, tmp_path):
    synsets = imagenet_names.synsets("imagenet1k")[:2]
    (tmp_path / "val" / synsets[0] / "part").mkdir(parents=True)
    shutil.copy(data / "test" / "ant" / "0.png", tmp_path / "val" / synsets[0] / "part" / "a.png")
    (tmp_path / "val" / synsets[1]).symlink_to(data / "test" / "bee")
    (tmp_path / "val" / "__MACOSX").mkdir()
    os.mkfifo(tmp_path / "val" / "__MACOSX" / "x.png")
    options = dict(preprocess="decode", image_size=(8, 8), data_dir=str(tmp_path))
    split = suites.open_task("imagenet_val", **options)
    assert sorted(names_of(split)) == [
        *(f"val/{synsets[0]}/part/a.png", f"val/{synsets[1]}/0.png", f"val/{synsets[1]}/1.png")
    ]
    os.mkfifo(tmp_path / "val" / synsets[0] / "x.png")
    with pytest.raises(UserError, match=f"val/{synsets[0]}/x.png: a named pipe"):
        suites.open_task("imagenet_val", **options)


# F18: addresses.


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
def test_addresses_that_are_not_read_get_one_line(path, hint, tfds_dir):
    for config in (config_of(path), tiny_config(path), config_of(path, label_file=str(tfds_dir))):
        if config.dataset.name == "digits" and len(path) > 1000:
            continue
        with pytest.raises(UserError, match=hint) as caught:
            run_data.open_split(config, "train", None)
        one_line(caught)
        assert "data_dir=" in str(caught.value)


# H19: downloads.


def test_downloads_have_an_end(tmp_path, monkeypatch):
    """A server that takes the connection and says nothing."""
    import requests
    from tensorflow_datasets.core.download import downloader

    monkeypatch.setattr(sources, "READ_SECS", 0.1)
    monkeypatch.setattr(sources, "RETRIES", 1)
    before = requests.adapters.HTTPAdapter, downloader.MAX_RETRIES
    with socket.create_server(("127.0.0.1", 0)) as silent, sources.bounded_downloads():
        load = downloader.get_downloader()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with load.tqdm(), pytest.raises(sources.DOWNLOAD_ERRORS):
            load.download(url, tmp_path).get()
    assert (requests.adapters.HTTPAdapter, downloader.MAX_RETRIES) == before


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    import requests

    class Builder:
        data_dir = str(tmp_path)

        def download_and_prepare(self, **options):
            raise requests.exceptions.ConnectionError("host:\n gone")

    monkeypatch.setattr(sources, "tfds_builder", lambda *args, **options: Builder())
    with pytest.raises(UserError, match=r"mnist could not be prepared in .*: host: gone") as caught:
        prepare.prepare_tfds("mnist", str(tmp_path))
    one_line(caught)


# What `prepare check` finds besides.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(val_split="all[:9%]"), "split 'all"),
        (dict(test_split="tset"), "split 'tset'"),
        (dict(train_preprocess="decode|one_hot(2)"), r"one_hot\(2\).* has 3"),
        (dict(train_split="train[:0]"), "is empty"),
    ],
)
def test_check_says_what_training_would(data, tmp_path, values, message, checked):
    config = config_of(data, **values)
    with pytest.raises(UserError, match=message) as caught:
        run_data.open_splits(config, None)
    with pytest.raises(UserError) as again:
        checked(config)
    assert str(again.value) == str(caught.value)


def test_a_pipe_is_no_source_of_imagenet21k(tmp_path):
    os.mkfifo(tmp_path / "fall11_whole.tar")
    with pytest.raises(UserError, match=r"--source=.*fall11_whole\.tar: a named pipe"):
        prepare.prepare_imagenet21k(str(tmp_path / "fall11_whole.tar"), str(tmp_path), "")


@pytest.mark.slow
def test_a_run_of_older_code_continues_and_is_evaluated(data, tmp_path, capsys):
    from mixer import trainer
    from mixer.evaluation import report
    from mixer.evaluation.subject import open_subject

    workdir = tmp_path / "run"
    config = config_of(data, train_split="train[:75%]", val_split="train[75%:]")
    config.total_steps, config.schedule.warmup_steps, config.checkpoint.keep_best = 2, 1, False
    trainer.train(config, str(workdir))
    record = json.loads((workdir / "data.json").read_text())
    (workdir / "data.json").write_text(json.dumps(older(record)))
    (data / "train" / "bee" / "more").mkdir()
    for i in range(4):
        shutil.copy(data / "train" / "bee" / f"{i}.png", data / "train" / "bee" / "more")
    config.total_steps = 4
    trainer.train(config, str(workdir))
    said = capsys.readouterr().out
    assert "continuing from step 2" in said
    assert "warning: 4 images in subfolders of a class folder, such as train/bee/more/0.png" in said
    again = json.loads((workdir / "data.json").read_text())
    assert again == record | {"subfolders": False}
    opened = [lambda: open_subject(str(workdir), checkpoint_name="last")]
    report.evaluate(opened, report.Options(splits=["val"]))
    assert "differs from the data of the run" not in capsys.readouterr().out
    # Whoever reads a run's own data reads what the run has read.
    record = json.loads((workdir / "data.json").read_text())["splits"]
    own, names = run.read_run(workdir)
    split = run_data.open_own_split(own, "train", names, record)
    assert split.num_examples == record["train"]["num_examples"]
    assert run_data.open_split(own, "train", names).num_examples > split.num_examples
    Image.new("RGB", (8, 8)).save(data / "test" / "bee" / "0.png")
    trainer.train(config, str(workdir))
    said = capsys.readouterr().out
    assert "warning: dataset.test_split" in said and "warning: dataset.val_split" not in said


def test_a_file_that_vanished_is_named_whatever_its_bytes(data):
    file = os.fsencode(data) + b"/train/bee/caf\xe9.png"
    os.rename(os.fsencode(data) + b"/train/bee/0.png", file)
    split = run_data.open_split(config_of(data), "train", None)
    os.unlink(file)
    with pytest.raises(UserError, match=r"cannot use train/bee/caf\\xe9\.png") as caught:
        read_all(split)
    one_line(caught)
