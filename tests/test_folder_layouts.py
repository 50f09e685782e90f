"""Folders `<class>/<image>`, CSV and metadata files, the choice of splits, class order, balance."""

import collections
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers import assert_same_bits, final_state, run_program, tiny_config
from mixer import trainer
from mixer.data import splits as pipeline
from mixer.data.sources import folder
from mixer.errors import UserError
from mixer.runs import data as run_data
from mixer.tools.inspect import data as inspect_data
from mixer.training import losses
from mixer.weights.load import read

pytestmark = pytest.mark.usefixtures("no_curves")

# The first images of `made`.
PINNED = [b"class2/16.png", b"class1/33.png", b"class1/2.png", b"class2/2.png", b"class1/1.png"]
COUNTS = {"class1": 40, "class2": 20, "class10": 10}


def write_images(root, names, seed=0):
    """Images of 8 x 8 pixels; the class, if it is part of the name, sets their brightness."""
    rng = np.random.default_rng(seed)
    for name in names:
        base = 80 * next((i for i, label in enumerate(COUNTS) if f"{label}/" in name), 0)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(base, base + 80, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A flat folder of three uneven classes."""
    root = tmp_path_factory.mktemp("flat")
    write_images(root, [f"{name}/{i}.png" for name, count in COUNTS.items() for i in range(count)])
    return root


@pytest.fixture
def flat(made, tmp_path):
    """A copy of `made` to change."""
    return shutil.copytree(made, tmp_path / "flat")


def config_of(data, **values):
    config = tiny_config(dataset__name="folder", dataset__data_dir=str(data))
    config.dataset.update(train_split="auto", val_split="auto", test_split="auto")
    config.dataset.update(train_preprocess="decode", eval_preprocess="decode")
    config.dataset.update(values)
    return config


def examples_of(split):
    return [split.example_id(place) for place in range(split.num_examples)]


def specs_of(config):
    return tuple(config.dataset[key] for key in run_data.SPLIT_KEYS)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# The layout <class>/<image>.


def test_flat_folder_is_cut_by_class(made):
    """Every class has the same share of every part, to one image; the parts share no image."""
    config = config_of(made, train_split="train[:75%]", val_split="train[75%:90%]")
    config.dataset.test_split = "train[90%:]"
    splits = run_data.open_splits(config, None)
    assert splits.train.class_names == ("class1", "class10", "class2") and not splits.remarks
    all_names = []
    for split, share in ((splits.train, 0.75), (splits.val, 0.15), (splits.test, 0.1)):
        names = examples_of(split)
        counts = collections.Counter(name.split("/")[0] for name in names)
        for name, count in COUNTS.items():
            assert abs(counts[name] - share * count) <= 1, (name, share)
        all_names += names
        batch = next(split.sequential_batches(start=0, stop=len(names), batch_size=len(names)))
        classes = [split.class_names[label] for label in batch["label"]]
        assert classes == [name.split("/")[0] for name in names]
    assert len(all_names) == len(set(all_names)) == 70


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 7, 300), (3,) * 40, (1000, 1), (5, 6, 7)])
@pytest.mark.parametrize("percent", [50, 80, 90, 99])
def test_every_cut_has_the_share_of_every_class(sizes, percent):
    images = [f"{label}/{i}".encode() for label, size in enumerate(sizes) for i in range(size)]
    length = round(len(images) * percent / 100)
    part = folder._stratified(images)[:length]
    counts = collections.Counter(int(image.split(b"/")[0]) for image in part)
    for label, size in enumerate(sizes):
        assert abs(counts[label] - size * percent / 100) <= 2
    assert folder._stratified(images[::-1])[:length] == part  # independent of the order of files


def test_cut_of_a_flat_folder_is_pinned(made):
    """By hashes of the names: the same on every machine, and in every later version."""
    names = folder.scan(str(made)).files["train"]
    assert names[:5] == PINNED


def test_an_added_image_moves_at_most_two_others_across_a_cut(made):
    images = folder.scan(str(made)).files["train"]
    for percent in (50, 80, 90):
        part = set(images[: round(len(images) * percent / 100)])
        for name in (b"class1/new.png", b"class2/a.png", b"class10/9999.png", b"new/1.png"):
            new = folder._stratified([*images, name])
            moved_images = part ^ set(new[: round(len(new) * percent / 100)]) - {name}
            assert len(moved_images) <= 2


def test_layout_with_splits_wins(flat):
    """One image in a folder of a class makes the layout <split>/<class>, as it always has."""
    write_images(flat, ["class2/more/1.png"])
    with pytest.raises(UserError, match=r"train.*class2/more/1\.png .*class1/0\.png") as caught:
        run_data.open_split(config_of(flat, train_split="train[:80%]"), "train", None)
    one_line(caught)
    with pytest.raises(UserError, match=r"dataset.train_split .*class2/more/1\.png"):
        run_data.open_splits(config_of(flat), None)


def test_empty_class_of_a_flat_folder_is_refused(flat):
    (flat / "class3").mkdir()
    (flat / "class3" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"1 of 4 classes have no images .*class3") as caught:
        run_data.open_splits(config_of(flat), None)
    one_line(caught)


def test_faults_of_a_flat_folder_are_named(flat, tmp_path):
    (flat / "class1" / "a.tif").touch()
    (flat / "class1" / "a.ppm").touch()
    (flat / "stray.png").touch()
    config = config_of(flat, train_split="train", val_split="", test_split="")
    with pytest.raises(UserError, match=r"class1/a\.tif"):
        run_data.open_split(config, "train", None)
    remarks = folder.scan(str(flat)).remarks
    assert ["stray.png" in line for line in remarks] == [True, False]
    assert "class1/a.ppm" in remarks[1]
    (tmp_path / "list").write_text('{"example": "class1/a.tif"}\n{"example": "class1/7.png"}\n')
    config.dataset.exclude = str(tmp_path / "list")
    assert run_data.open_split(config, "train", None).num_examples == 69


# Splits that are chosen.


@pytest.mark.parametrize(
    ("names", "specs"),
    [
        ((), ("train[:80%]", "train[80%:90%]", "train[90%:]")),
        (("train",), ("train[:80%]", "train[80%:90%]", "train[90%:]")),
        (("train", "test"), ("train[:90%]", "train[90%:]", "test")),
        (("train", "val"), ("train", "val", "")),
        (("train", "valid", "test"), ("train", "valid", "test")),
        (("train", "validation", "test", "extra"), ("train", "validation", "test")),
    ],
)
def test_splits_are_chosen_by_what_is_there(made, tmp_path, names, specs):
    for name in names:
        shutil.copytree(made, tmp_path / "data" / name)
    config = config_of(tmp_path / "data" if names else made)
    splits = run_data.open_splits(config, None)
    assert specs_of(config) == specs == tuple(splits.specs.values())
    assert all(spec in splits.choice for spec in specs) and "\n" not in splits.choice
    assert run_data.choose_splits(config) == ""  # nothing is left to choose


def test_splits_that_the_user_sets_stay(made):
    for values, specs in (
        (dict(test_split=""), ("train[:90%]", "train[90%:]", "")),
        (dict(val_split=""), ("train[:90%]", "", "train[90%:]")),
        (dict(train_split="train"), ("train", "", "")),
    ):
        config = config_of(made, **values)
        assert run_data.choose_splits(config) and specs_of(config) == specs


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("photos", "test"), "dataset.train_split .*(photos, test|test, photos)"),
        (("train", "val", "valid"), "dataset.val_split=auto.* val and valid"),
    ],
)
def test_splits_that_are_not_clear_are_refused(made, tmp_path, names, message):
    for name in names:
        shutil.copytree(made, tmp_path / "data" / name)
    with pytest.raises(UserError, match=message) as caught:
        run_data.open_splits(config_of(tmp_path / "data"), None)
    one_line(caught)


def test_data_without_a_training_split_is_evaluated(made, tmp_path):
    shutil.copytree(made, tmp_path / "data" / "test")
    config = config_of(tmp_path / "data")
    assert run_data.open_split(config, "test", None).num_examples == 70
    assert run_data.open_split(config, "val", None) is None


def test_splits_of_other_data_are_chosen_too(tfds_dir):
    for config in (tiny_config(), tiny_config(tfds_dir)):
        config.dataset.update(train_split="auto", val_split="auto")
        run_data.open_splits(config, None)
        assert specs_of(config) == ("train", "validation", "test")


# CSV and metadata files.

ROWS = [
    *(("class1/0.png", "cat", "train"), ("class2/0.png", "dog", "train")),
    *(("class2/1.png", "dog", "test"), ("class1/1.png", "cat", "")),
]


def write_csv(path, header, rows):
    path.write_text("\n".join([header, *map(",".join, rows)]) + "\n")
    return str(path)


def test_csv_of_paths_and_labels(made, tmp_path):
    file = write_csv(tmp_path / "labels.csv", "path,label,split", ROWS)
    config = config_of(made, label_file=file, val_split="", train_split="train")
    splits = run_data.open_splits(config, None)
    assert splits.train.class_names == ("cat", "dog") and not splits.train.multi_label
    assert set(examples_of(splits.train)) == {row[0] for row in ROWS} - {"class2/1.png"}
    assert examples_of(splits.test) == ["class2/1.png"] and splits.test.labels().tolist() == [1]
    # The same as jsonl: the same order, and a run continues with either.
    lines = [{"path": p, "labels": label, "split": s or "train"} for p, label, s in ROWS]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.dataset.label_file = str(tmp_path / "labels.jsonl")
    jsonl_splits = run_data.open_splits(config, None)
    assert jsonl_splits.train.fingerprint == splits.train.fingerprint


def test_csv_may_be_quoted_and_lie_beside_the_images(flat):
    (flat / "a,b.png").write_bytes((flat / "class1" / "0.png").read_bytes())
    text = '\ufefflabel,path\r\n"big\ncat","a,b.png"\r\n\r\n"dog ""x""",class2/0.png\r\n'
    (flat / "Labels.CSV").write_bytes(text.encode())
    config = config_of("", label_file=str(flat / "Labels.CSV"), val_split="", test_split="")
    split = run_data.open_splits(config, None).train
    assert specs_of(config)[0] == "train"
    assert split.class_names == ("big\ncat", 'dog "x"')
    batch = next(split.sequential_batches(start=0, stop=2, batch_size=2))
    assert sorted(batch["label"]) == [0, 1]


def test_labels_of_csv_are_numbers_if_all_are(made, tmp_path):
    rows = [(f"class1/{i}.png", str(label)) for i, label in enumerate((10, 2, 0))]
    file = write_csv(tmp_path / "labels.csv", "path,label", rows)
    config = config_of(made, label_file=file, train_split="train", val_split="", test_split="")
    split = run_data.open_split(config, "train", None)
    assert len(split.class_names) == 11
    assert sorted(split.labels().tolist()) == [0, 2, 10]
    write_csv(tmp_path / "labels.csv", "path,label", [*rows, ("class1/9.png", "x")])
    pipeline.forget_listings()
    assert run_data.open_split(config, "train", None).class_names == ("0", "10", "2", "x")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_metadata_of_hugging_face(made, tmp_path, ending):
    """Other columns are ignored; the first folder of a path is its split if it is named so."""
    for split in ("train", "test"):
        shutil.copytree(made, tmp_path / split)
    rows = [
        ("train/class1/0.png", "cat"),
        ("test/class2/0.png", "dog"),
        ("train/class2/0.png", "dog"),
    ]
    file = tmp_path / f"metadata.{ending}"
    if ending == "csv":
        write_csv(
            file, "file_name,text,label", [(name, "a picture", label) for name, label in rows]
        )
    else:
        lines = [{"file_name": name, "label": label, "text": "x"} for name, label in rows]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of("", label_file=str(file), val_split="")
    splits = run_data.open_splits(config, None)
    assert specs_of(config) == ("train", "", "test")
    assert splits.train.num_examples == 2 and examples_of(splits.test) == ["test/class2/0.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1.*''.*path,label"),
        ("a.png,cat\n", "line 1.*'a.png,cat'.*path,label"),
        ("path;label\na.png;cat\n", "line 1.*'path;label'"),
        ("path,label,weight\n", "line 1.*weight"),
        ("path,label,path\n", "line 1.*'path,label,path'"),
        ("path,labels\na.png,cat\n", "line 1.*'path,labels'"),
        ("path,label\na.png,cat\n\nb.png\n", "line 4.*1 values.*2 columns"),
        ("path,label\na.png,\n", "line 2.*'a.png' has no label"),
        ("path,label\n,cat\n", "line 2.*path ''"),
        ("path,label\n/a.png,cat\n", "line 2.*'/a.png'"),
        ("path,label,split\na.png,cat,a b\n", "line 2.*'a b'"),
        ('path,label\n"a.png,cat\n', "line 2"),
        ("path,label\na.png,99999999999\n", "line 2.*99999999999"),
        ("path,label\na.png,cat\na.png,dog\n", "line 3.*'a.png' is already in line 2"),
        ("path,label\n", "0 images"),
        ("file_name,text\na.png,cat\n", "line 1.*'file_name,text'"),
    ],
)
def test_faults_of_a_csv_are_told_by_line(made, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    config = config_of(made, label_file=str(tmp_path / "labels.csv"), train_split="train")
    with pytest.raises(UserError, match="dataset.label_file=.*" + message) as caught:
        run_data.open_split(config, "train", None)
    one_line(caught)


def test_metadata_without_labels_is_refused(made, tmp_path):
    file = tmp_path / "metadata.jsonl"
    file.write_text('{"file_name": "class1/0.png", "text": "a cat"}\n')
    with pytest.raises(UserError, match=r"dataset.label_file=.*line 1: 'label'"):
        run_data.open_split(config_of(made, label_file=str(file)), "train", None)


# The order of the classes.


def write_order(tmp_path, *names):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(names) + "\n\n")
    return str(path)


def test_classes_in_natural_order_and_in_that_of_a_file(made, tmp_path):
    config = config_of(made, class_order="natural")
    assert run_data.open_splits(config, None).train.class_names == tuple(COUNTS)
    names = ("class10", "unseen", "class1", "class2")
    config = config_of(made, class_order=write_order(tmp_path, *names))
    splits = run_data.open_splits(config, None)
    assert splits.train.class_names == splits.val.class_names == names
    assert np.array_equal(splits.train.class_counts(), [8, 0, 32, 16])
    assert any("unseen" in line for line in splits.remarks)


def test_class_order_of_label_files(made, tmp_path):
    file = write_csv(tmp_path / "labels.csv", "path,label,split", ROWS)
    order = write_order(tmp_path, "dog", "cow", "cat")
    config = config_of(made, label_file=file, train_split="train", class_order=order)
    assert run_data.open_split(config, "train", None).class_names == ("dog", "cow", "cat")
    write_csv(tmp_path / "labels.csv", "path,label", [("class1/0.png", "2"), ("class2/0.png", "0")])
    pipeline.forget_listings()
    split = run_data.open_split(config, "train", None)
    assert split.class_names == ("dog", "cow", "cat") and sorted(split.labels()) == [0, 2]
    write_csv(tmp_path / "labels.csv", "path,label", [("class1/0.png", "3")])
    pipeline.forget_listings()
    with pytest.raises(UserError, match=r"line 2: label 3 .* 3 classes dog, cow, cat"):
        run_data.open_split(config, "train", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"class1\nclass2\n", "lacks 1 of 3 classes of the data: class10"),
        (b"class1\n\nclass2\nclass10", "line 2.*blank"),
        (b"class1\nclass2\nclass1\nclass10", "line 3: 'class1' is already in line 1"),
    ],
)
def test_faults_of_a_class_file_get_one_line(made, tmp_path, content, message):
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        UserError, match=f"dataset.class_order={re.escape(str(path))}.*{message}"
    ) as caught:
        run_data.open_splits(config_of(made, class_order=str(path)), None)
    one_line(caught)


def test_class_order_is_for_folders():
    with pytest.raises(UserError, match=r"dataset.class_order='natural'.*'synthetic'"):
        run_data.open_splits(tiny_config(dataset__class_order="natural"), None)


# Uneven classes.


def test_weights_of_classes():
    counts = np.array([90, 9, 0, 1])
    for balance in (0.25, 1.0):
        weights = losses.class_weights(counts, balance).astype(np.float64)
        assert weights[2] == 1
        np.testing.assert_allclose((weights * counts).sum(), 100, rtol=1e-6)
        np.testing.assert_allclose(weights[1] / weights[0], 10**balance, rtol=1e-6)
    np.testing.assert_allclose(weights[[0, 1, 3]], 100 / (3 * counts[[0, 1, 3]]), rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_weighted_loss_is_its_formula(name):
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(5, 4)) * 3, np.array([0.5, 3, 1, 7], np.float32)
    labels = rng.uniform(size=(5, 4)).astype(np.float32)  # soft, as after mixup
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -(weights * labels * log_p).sum(-1)
    if name == "sigmoid":
        p = 1 / (1 + np.exp(-logits))
        expected = -(weights * labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(-1)
    loss = losses.make_loss(name, weights)(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    ones = losses.make_loss(name, np.ones(4, np.float32))(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(ones, losses.make_loss(name)(jnp.array(logits), labels), rtol=1e-6)


@pytest.mark.parametrize(("name", "loss"), [("softmax", "softmax"), ("sigmoid", "sigmoid")])
def test_weights_equal_repeated_images(name, loss):
    """The term of a label with weight 3 is that of three images with this label."""
    labels = jax.nn.one_hot(jnp.array([0, 1]), 2)
    logits = jnp.array([[0.3, -1.0], [0.8, 0.1]])
    weights = np.array([1, 3], np.float32)
    fn = losses.make_loss(loss, weights)
    plain = losses.make_loss(loss)
    extra = 2 * plain(logits, labels) * jnp.array([0, 1])
    if loss == "sigmoid":  # the terms of absent labels are not repeated
        extra += jnp.array([0, 2]) * jax.nn.log_sigmoid(-logits[:, 0])
    np.testing.assert_allclose(fn(logits, labels), plain(logits, labels) + extra, rtol=1e-6)


def train_config(data, **values):
    config = config_of(data, on_device="off")
    config.update(class_balance=1.0, total_steps=6, log_every_steps=1)
    config.model.update(num_blocks=1, stoch_depth=0.0, dropout=0.0)
    config.checkpoint.every_steps = 3
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config.lock()


@pytest.fixture(scope="module")
def balanced_run(made, tmp_path_factory):
    """A run with balanced classes, streamed and never stopped."""
    workdir = tmp_path_factory.mktemp("balanced") / "run"
    trainer.train(train_config(made), str(workdir))
    return workdir


@pytest.mark.slow
def test_balance_changes_the_update(made, balanced_run, tmp_path):
    trainer.train(train_config(made, class_balance=0.0), str(tmp_path / "run"))
    balanced_params, plain_params = (
        final_state(run)["params"] for run in (balanced_run, tmp_path / "run")
    )
    assert not np.array_equal(balanced_params["head"]["bias"], plain_params["head"]["bias"])
    saved_config = json.loads((balanced_run / "config.json").read_text())
    assert (
        saved_config["dataset"]["train_split"] == "train[:80%]"
        and saved_config["class_balance"] == 1
    )


@pytest.mark.slow
def test_balanced_run_is_the_same_resumed_and_resident(made, balanced_run, tmp_path):
    trainer.train(train_config(made, **{"dataset.on_device": "on"}), str(tmp_path / "resident"))
    assert_same_bits(final_state(balanced_run), final_state(tmp_path / "resident"))
    resumed = shutil.copytree(balanced_run, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "6")
    trainer.train(train_config(made), str(resumed))
    assert_same_bits(final_state(balanced_run), final_state(resumed))


@pytest.mark.slow
def test_a_resumed_run_keeps_its_splits(made, tmp_path):
    """A split that is added later does not change what "auto" has chosen."""
    shutil.copytree(made, tmp_path / "data" / "train")
    run = tmp_path / "run"
    trainer.train(train_config(tmp_path / "data", total_steps=3), str(run))
    shutil.copytree(made, tmp_path / "data" / "test")
    trainer.train(train_config(tmp_path / "data", total_steps=4), str(run))
    saved_config = json.loads((run / "config.json").read_text())
    assert saved_config["total_steps"] == 4
    assert saved_config["dataset"]["train_split"] == "train[:80%]"
    assert saved_config["dataset"]["test_split"] == "train[90%:]"
    with pytest.raises(UserError, match=r"dataset.train_split: 'train\[:80%\]' -> 'train'"):
        trainer.train(train_config(made, **{"dataset.train_split": "train"}), str(run))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_balance_outside_of_its_range_is_refused(value):
    from mixer.runs import config as run

    with pytest.raises(UserError, match=rf"class_balance={value}; expected"):
        run.check_config(tiny_config(class_balance=value))


def test_balance_counts_the_labels_of_a_stored_set(tfds_dir):
    config = tiny_config(tfds_dir, class_balance=1.0)
    split = run_data.open_split(config, "train", None)
    weights = run_data.class_weights(config, split)
    counts = np.bincount(split.labels(), minlength=10)
    np.testing.assert_allclose(weights, counts.sum() / (10 * counts), rtol=1e-6)


# Weights with more classes than the data.


@pytest.mark.slow
def test_part_of_the_classes_is_evaluated(made, balanced_run, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(made / "class2", part / "class2")
    shutil.copytree(made / "class1", part / "class1")
    arguments = [f"--config.dataset.data_dir={part}", "--config.dataset.test_split=train"]
    result = run_program(
        "evaluate.py",
        f"--weights={balanced_run}",
        "--config=configs/folder.py:res=8,patch=2",
        *arguments,
        "--config.dataset.val_split=",
        "--config.dataset.eval_preprocess=decode",
        f"--output={tmp_path / 'out'}",
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (split,) = results["splits"].values()
    assert split["count"] == split["labelled"] == 60
    (file,) = (tmp_path / "out" / "evaluation").glob("*.json")
    rows = json.loads(file.read_text())["classes"]
    assert [(row["name"], row["images"]) for row in rows] == [
        ("class1", 40),
        ("class10", 0),
        ("class2", 20),
    ]
    assert split["mean_per_class"] == np.mean([rows[0]["accuracy"], rows[2]["accuracy"]])


@pytest.mark.slow
def test_part_of_the_classes_is_drawn(made, balanced_run, tmp_path):
    """`inspect` takes a folder without splits as a whole."""
    shutil.copytree(made / "class2", tmp_path / "part" / "class2")
    loaded = read(str(balanced_run), log=lambda line: None)
    split = inspect_data.open_split(None, loaded, None, str(tmp_path / "part"), None)
    assert split.class_names == ("class1", "class10", "class2") and split.num_examples == 20
    assert set(split.labels().tolist()) == {2}


@pytest.mark.slow
def test_classes_that_the_weights_lack_are_named(made, balanced_run, tmp_path):
    renamed_data = shutil.copytree(made, tmp_path / "other")
    (renamed_data / "class2").rename(renamed_data / "fox")
    result = run_program(
        "evaluate.py",
        f"--weights={balanced_run}",
        "--config=configs/folder.py:res=8,patch=2",
        f"--config.dataset.data_dir={renamed_data}",
        f"--output={tmp_path / 'out'}",
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "fox" in result.stderr and "class10" in result.stderr
