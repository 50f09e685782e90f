"""Label files, images with several labels, derived labels, and their evaluation."""

import itertools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from helpers import assert_same_bits, tiny_config
from mixer.data import labels
from mixer.data.order import Reading
from mixer.data.sources import stored as sources
from mixer.data.sources.label_file import read_label_file
from mixer.data.stored_split import make_split
from mixer.errors import UserError
from mixer.evaluation import classification
from mixer.evaluation.evaluator import Batching
from mixer.parallel import sharding
from mixer.runs import data as run_data
from mixer.training import losses

LINES = [
    {"path": "a/0.png", "labels": ["dog", "animal"], "weights": [0.75, 1.0]},
    {"path": "a/1.png", "labels": ["cat"]},
    {"path": "b/2.png", "labels": []},
    {"path": "b/3.png", "labels": ["eel", "animal", "fish"], "split": "test"},
    {"path": "b/4.png", "labels": "zebra", "split": "train"},
]
NAMES = ("animal", "cat", "dog", "eel", "fish", "zebra")
# {label: weight} of image i
IMAGE_LABELS = {
    0: {2: 0.75, 0: 1.0},
    1: {1: 1.0},
    2: {},
    3: {3: 1.0, 0: 1.0, 4: 1.0},
    4: {5: 1.0},
}


def _config(directory, lines, **values):
    """A config with five images, where image i has brightness 10 * i, and a label file."""
    for i in range(5):
        path = directory / ("a" if i < 2 else "b") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(path)
    file = directory / "labels.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(text) + "\n")
    config = tiny_config(loss="sigmoid", dataset__name="folder", dataset__data_dir=str(directory))
    config.dataset.update(
        label_file=str(file), train_preprocess="decode", eval_preprocess="decode", val_split=""
    )
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def _labels_by_image(batch):
    """Returns {image number: {label: weight}} for a batch with several labels per image."""
    numbers = batch["image"][:, 0, 0, 0] // 10
    labels_by_image = {}
    for number, label, weight in zip(numbers, batch["label"], batch["label_weight"], strict=True):
        assert not weight[label < 0].any()
        labels_by_image[int(number)] = dict(zip(label[label >= 0], weight[label >= 0], strict=True))
    return labels_by_image


# Label files.


def test_batches_contain_labels_and_weights(tmp_path):
    config = _config(tmp_path, LINES)
    splits = run_data.open_splits(config, None)
    assert splits.train.class_names == splits.test.class_names == NAMES
    assert splits.train.multi_label and splits.train.num_examples == 4
    for split, max_labels, images in ((splits.train, 2, (0, 1, 2, 4)), (splits.test, 3, (3,))):
        assert split.example_spec == {
            "image": ((8, 8, 3), "uint8"),
            "label": ((max_labels,), "int32"),
            "label_weight": ((max_labels,), "float32"),
        }
        count = len(images)
        batch = next(split.sequential_batches(start=0, stop=count, batch_size=count))
        assert {key: (value.shape[1:], value.dtype.name) for key, value in batch.items()} == (
            split.example_spec
        )
        assert _labels_by_image(batch) == {i: IMAGE_LABELS[i] for i in images}
    stream = splits.train.train_batches(0, Reading(seed=0, global_batch_size=4))
    for batch in itertools.islice(stream, 3):
        assert _labels_by_image(batch) == {i: IMAGE_LABELS[i] for i in (0, 1, 2, 4)}


def test_dense_labels_match_the_label_file(tmp_path):
    config = _config(tmp_path, LINES, dataset__val_split="train")
    split = run_data.open_split(config, "val", None)
    batch = next(split.sequential_batches(start=0, stop=4, batch_size=4))
    rows = losses.dense_labels({k: jnp.asarray(v) for k, v in batch.items()}, len(NAMES))
    for number, row in zip(batch["image"][:, 0, 0, 0] // 10, rows, strict=True):
        expected = np.zeros(len(NAMES))
        for label, weight in IMAGE_LABELS[int(number)].items():
            expected[label] = weight
        np.testing.assert_array_equal(row, expected)
    config.dataset.eval_preprocess = "decode|one_hot(6)"
    split = run_data.open_split(config, "val", None)
    assert split.multi_label and split.example_spec["label"] == ((6,), "float32")
    dense = next(split.sequential_batches(start=0, stop=4, batch_size=4))
    assert dense.keys() == {"image", "label"}
    np.testing.assert_array_equal(dense["label"], rows)


def test_one_label_per_image_is_single_label_classification(tmp_path):
    lines = [{"path": line["path"], "labels": [i % 3]} for i, line in enumerate(LINES)]
    lines[0]["labels"] = 0
    split = run_data.open_split(_config(tmp_path, lines), "train", None)
    assert split.class_names == ("0", "1", "2") and not split.multi_label
    batch = next(split.sequential_batches(start=0, stop=5, batch_size=5))
    assert batch.keys() == {"image", "label"} and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] // 10 % 3)


def test_numeric_labels_use_the_class_count_of_the_model(tmp_path):
    lines = [{"path": line["path"], "labels": [7]} for line in LINES]
    config = _config(tmp_path, lines, model__num_classes=18291)
    assert len(run_data.open_split(config, "train", None).class_names) == 18291
    config.model.num_classes = 7
    with pytest.raises(UserError, match=r"labels\.jsonl, line 1.*\b7\b"):
        run_data.open_split(config, "train", None)


def test_labels_use_the_class_order_of_the_run(tmp_path):
    config = _config(tmp_path, LINES, dataset__test_split="test")
    names = ("bee", *NAMES[::-1])
    split = run_data.open_split(config, "test", names)
    batch = next(split.sequential_batches(start=0, stop=1, batch_size=1))
    assert sorted(names[i] for i in batch["label"][0]) == ["animal", "eel", "fish"]
    with pytest.raises(UserError, match=r"line 4.*'eel'.*cat, animal"):
        run_data.open_split(config, "test", ("cat", "animal"))


def test_order_and_fingerprint_do_not_depend_on_line_order(tmp_path):
    listings = []
    for name, lines in (("one", LINES), ("two", LINES[::-1]), ("three", LINES[1:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        listings.append(read_label_file(str(path), str(tmp_path)))
    paths = [[listing.path(image) for image in listing.splits["train"]] for listing in listings]
    assert paths[0] == paths[1] and set(paths[0]) - set(paths[2]) == {"a/0.png"}
    assert [path for path in paths[0] if path != "a/0.png"] == paths[2]
    fingerprints = [
        sources.label_file_source(listing, "train", NAMES, ()).fingerprint for listing in listings
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_image_in_a_label_file_can_be_excluded(tmp_path):
    exclude = tmp_path / "exclude.jsonl"
    exclude.write_text('{"example": "b/2.png"}\n')
    config = _config(tmp_path, LINES, dataset__exclude=str(exclude))
    split = run_data.open_split(config, "train", None)
    batch = next(split.sequential_batches(start=0, stop=3, batch_size=3))
    assert _labels_by_image(batch) == {i: IMAGE_LABELS[i] for i in (0, 1, 4)}


def test_missing_image_is_named_in_the_error(tmp_path):
    config = _config(tmp_path, [{"path": "nowhere.png", "labels": "cat"}])
    split = run_data.open_split(config, "train", None)
    with pytest.raises(UserError, match=r"nowhere\.png"):
        next(split.sequential_batches(start=0, stop=1, batch_size=1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": "c.png", "labels": ["cat"]', "line 3"),
        ("[1, 2]", "line 3"),
        (b"\xff\xfe{}", "line 3"),
        ({"labels": ["cat"]}, "line 3.*'path'"),
        ({"path": "c.png"}, "line 3.*'labels'"),
        ({"path": "c.png", "labels": ["cat"], "weight": [1]}, "line 3.*'weight'.*'weights'"),
        ({"path": "/c.png", "labels": ["cat"]}, "line 3.*'/c.png'"),
        ({"path": "\ud800.png", "labels": ["cat"]}, "line 3"),
        ({"path": "c.png", "labels": [3]}, "line 3.*labels"),
        ({"path": "c.png", "labels": ["cat", 3]}, r"line 3.*\['cat', 3\]"),
        ({"path": "c.png", "labels": [True]}, r"line 3.*\[True\]"),
        ({"path": "c.png", "labels": None}, "line 3.*None"),
        ({"path": "c.png", "labels": [-1]}, r"line 3.*\[-1\]"),
        ({"path": "c.png", "labels": ["cat", "cat"]}, r"line 3.*\['cat', 'cat'\]"),
        ({"path": "c.png", "labels": ["cat"], "weights": [1, 1]}, "line 3.*2 weights.*1 labels"),
        ({"path": "c.png", "labels": ["cat"], "weights": [1.5]}, r"line 3.*weights.*1\.5"),
        ('{"path": "c.png", "labels": ["cat"], "weights": [NaN]}', "line 3.*weights.*nan"),
        ({"path": "c.png", "labels": ["cat"], "split": "a b"}, "line 3.*'a b'"),
        ({"path": "a/0.png", "labels": []}, r"line 3.*'a/0\.png'.*line 1"),
    ],
)
def test_malformed_label_line_is_named_in_the_error(tmp_path, line, message):
    path = tmp_path / "labels.jsonl"
    if isinstance(line, dict):
        line = json.dumps(line)
    if isinstance(line, str):
        line = line.encode()
    path.write_bytes(json.dumps(LINES[0]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=message) as error:
        read_label_file(str(path), str(tmp_path))
    assert "\n" not in str(error.value)


def test_unusable_label_files_and_splits_are_errors(tmp_path):
    config = _config(tmp_path, LINES)
    for values, message in (
        (dict(label_file=str(tmp_path / "no.jsonl")), "no.jsonl"),
        (dict(data_dir="/nowhere"), "data_dir=/nowhere"),
        (dict(train_split="validation"), "'validation'.*train.*test"),
        (dict(train_split="train[:0]"), r"train\[:0\]"),
        (dict(name="digits"), "label_file=.*'digits'"),
    ):
        wrong_config = config.copy_and_resolve_references()
        wrong_config.dataset.update(values)
        with pytest.raises(UserError, match=message):
            run_data.open_split(wrong_config, "train", None)
    label_file = tmp_path / "empty.jsonl"
    label_file.write_text('\n{"path": "a/0.png", "labels": []}\n')
    with pytest.raises(UserError, match=r"empty\.jsonl"):
        read_label_file(str(label_file), str(tmp_path))
    label_file.write_text('{"path": "a/0.png", "labels": [1871234567]}')
    with pytest.raises(UserError, match=r"line 1.*1,871,234,567"):
        read_label_file(str(label_file), str(tmp_path)).names(None)


# TFDS sets.


def _build(directory, name, features, examples, supervised_keys=None):
    """Prepares a TFDS data set called `name` whose training split is `examples`."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=supervised_keys,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    Tiny.name = name
    builder = Tiny(data_dir=str(directory))
    builder.download_and_prepare()
    return builder


def _read(source, count, spec="decode", size=8):
    split = make_split(source, spec, image_size=(size, size))
    return next(split.sequential_batches(start=0, stop=count, batch_size=count))


def _image(value=0, size=8, channels=3):
    return np.full((size, size, channels), value, np.uint8)


@pytest.mark.parametrize("in_memory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tfds_sequence_feature_gives_several_labels(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(sources, "MAX_LABELS", 5)
    expected = [[2, 0], [1], [], [0, 1, 2]]
    features = {
        "image": tfds.features.Image(shape=(8, 8, 3)),
        "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "b", "c"])),
        "kind": tfds.features.ClassLabel(num_classes=2),
    }
    examples = [{"image": _image(), "tags": tags, "kind": i % 2} for i, tags in enumerate(expected)]
    builder = _build(tmp_path, "tiny_tags", features, examples)
    source = sources.tfds_source(builder, "train", (), "tags")
    assert source.class_names == ("a", "b", "c") and source.max_labels == (3 if in_memory else 5)
    batch = _read(source, 4)
    for label, weight, tags in zip(batch["label"], batch["label_weight"], expected, strict=True):
        assert label[: len(tags)].tolist() == tags and (label[len(tags) :] == -1).all()
        np.testing.assert_array_equal(weight, np.arange(len(label)) < len(tags))
    kind_source = sources.tfds_source(builder, "train", (), "kind")
    assert kind_source.max_labels is None and kind_source.fingerprint != source.fingerprint
    np.testing.assert_array_equal(_read(kind_source, 4)["label"], [0, 1, 0, 1])
    with pytest.raises(UserError, match=r"'tag'.*tags, kind"):
        sources.tfds_source(builder, "train", (), "tag")
    if not in_memory:
        monkeypatch.setattr(sources, "MAX_LABELS", 2)
        limited_source = sources.tfds_source(builder, "train", (), "tags")
        with pytest.raises(UserError, match=r"tfrecord.*:3\b.*\b3\b.*\b2\b"):
            _read(limited_source, 4)


def test_label_out_of_range_is_named_in_the_error(tmp_path):
    """The test split of ImageNet has labels of -1."""
    features = {
        "image": tfds.features.Image(shape=(8, 8, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    examples = [{"image": _image(), "label": label} for label in (0, 2, -1)]
    source = sources.tfds_source(_build(tmp_path, "tiny_labels", features, examples), "train", ())
    with pytest.raises(UserError, match=r":2\b.*-1\b") as error:
        _read(source, 3)
    assert "\n" not in str(error.value)
    faults = dict(make_split(source, "decode", image_size=(8, 8)).check())
    assert faults[0] is None and faults[1] is None and "label -1" in faults[2]


def test_error_for_unprepared_imagenet21k_names_the_command(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "mixer.data.imagenet.imagenet21k", types.ModuleType("stand_in")
    )
    builder = types.SimpleNamespace(is_prepared=lambda: False, data_dir="/nowhere/imagenet21k")
    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: builder)
    with pytest.raises(UserError, match=r"prepare imagenet21k.*--data_dir=/nowhere"):
        sources.tfds_builder("imagenet21k/fall11", "/nowhere")


# Derived labels, compared with NumPy.


def _reference(name, example):
    """Computes the derived label of an example in NumPy."""
    if name == "clevr_count":
        return len(example["objects"]["size"]) - 3
    if name == "clevr_distance":
        nearest = np.min(example["objects"]["pixel_coords"][:, 2])
        return int(sum(nearest > edge for edge in (8, 8.5, 9, 9.5, 10)))
    if name == "kitti_distance":
        objects = zip(example["objects"]["type"], example["objects"]["location"], strict=True)
        depths = [location[2] for kind, location in objects if kind in (0, 1, 2)]
        if not depths:
            return 3
        return int(sum(min(depths) > edge for edge in (8, 20)))
    if name == "dsprites_position":
        return int(np.floor(example["label_x_position"] / 2))
    if name == "dsprites_orientation":
        return int(np.floor(example["label_orientation"] / 2.5))
    return int(example["label" + name.removeprefix("smallnorb")])


def _mock_examples(name):
    rng = np.random.default_rng(0)
    if name.startswith("clevr"):
        edges = [7.9, 8.0, 8.2, 8.5, 9.0, 9.3, 9.75, 10.0, 12.0]
        for count, edge in zip((3, 4, 5, 6, 7, 8, 9, 10, 3), edges, strict=True):
            depths = np.full((count, 3), edge, np.float32)
            depths[1:, 2] += rng.uniform(0, 3, count - 1)
            yield {"objects": {"size": np.zeros(count, np.int64), "pixel_coords": depths}}
    elif name.startswith("kitti"):
        for kinds in ([0, 3], [5], [1, 2, 7], [], [2], [3, 4], [6, 0]):
            for scale in (8.0, 20.0, 60.0):
                locations = rng.uniform(0, scale, (len(kinds), 3)).astype(np.float32)
                locations[:1, 2] = scale
                yield {"objects": {"type": np.array(kinds, np.int64), "location": locations}}
    else:
        feature = labels.DERIVED[name].features[0]
        num_values = dict(
            label_x_position=32, label_orientation=40, label_azimuth=18, label_elevation=9
        )
        for value in range(num_values[feature]):
            yield {feature: np.int64(value)}


# test_suites.py tests the label of ImageNet-ReaL.
@pytest.mark.parametrize("name", [name for name in labels.DERIVED if name != "real_label"])
def test_derived_label_matches_the_definition_of_the_benchmark(name):
    derived_label = labels.DERIVED[name]
    num_classes = dict(clevr_count=8, clevr_distance=6, kitti_distance=4, dsprites_position=16)
    num_classes.update(dsprites_orientation=16, smallnorb_azimuth=18, smallnorb_elevation=9)
    assert (
        len(derived_label.class_names) == num_classes[name] == len(set(derived_label.class_names))
    )
    compute, computed_labels = tf.function(derived_label.compute, reduce_retracing=True), set()
    for example in _mock_examples(name):
        label = compute(jax.tree.map(tf.constant, example))
        assert label.dtype == tf.int32 and label.shape == ()
        assert int(label) == _reference(name, example), example
        computed_labels.add(int(label))
    assert computed_labels == set(range(num_classes[name]))


def test_scene_without_annotations_gets_an_invalid_label():
    """The scenes in the test split of CLEVR have no annotations."""
    objects = {"size": np.zeros(0, np.int64), "pixel_coords": np.zeros((0, 3), np.float32)}
    for name in ("clevr_count", "clevr_distance"):
        label = int(labels.DERIVED[name].compute({"objects": jax.tree.map(tf.constant, objects)}))
        assert not 0 <= label < len(labels.DERIVED[name].class_names)


def test_tfds_data_set_gets_a_derived_label(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(8, 8, 3)),
        "objects": tfds.features.Sequence(
            {
                "type": tfds.features.ClassLabel(num_classes=8),
                "location": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            }
        ),
    }
    examples = [{"image": _image(), **example} for example in _mock_examples("kitti_distance")]
    builder = _build(tmp_path, "kitti", features, examples)
    source = sources.tfds_source(builder, "train", (), "kitti_distance")
    assert source.class_names == labels.DERIVED["kitti_distance"].class_names
    expected = [_reference("kitti_distance", example) for example in examples]
    np.testing.assert_array_equal(_read(source, len(expected))["label"], expected)
    with pytest.raises(UserError, match=r"'label'.*kitti_distance"):
        sources.tfds_source(builder, "train", ())
    with pytest.raises(UserError, match="'clevr_count'"):
        sources.tfds_source(builder, "train", (), "clevr_count")


def test_dsprites_pixels_are_scaled_to_255(tmp_path):
    """TFDS stores dSprites pixels as 0 and 1, so they are scaled to 0 and 255."""
    features = {
        "image": tfds.features.Image(shape=(64, 64, 1)),
        "label_x_position": tfds.features.ClassLabel(num_classes=32),
    }
    sprite = (np.arange(64 * 64).reshape(64, 64, 1) % 3 == 0).astype(np.uint8)
    builder = _build(tmp_path, "dsprites", features, [{"image": sprite, "label_x_position": 31}])
    batch = _read(sources.tfds_source(builder, "train", (), "dsprites_position"), 1, size=64)
    assert batch["label"].tolist() == [15]
    np.testing.assert_array_equal(batch["image"][0], np.repeat(sprite * 255, 3, -1))


# Evaluation.


def _dense(label, weight, num_classes):
    rows = np.zeros((len(label), num_classes), np.float32)
    for row, classes, values in zip(rows, label, weight, strict=True):
        row[classes[classes >= 0]] = values[classes >= 0]
    return rows


def test_guess_is_correct_if_it_is_one_of_the_labels():
    rng = np.random.default_rng(0)
    size, num_classes = 200, 12
    label = np.where(
        rng.random((size, 3)) < 0.5,
        rng.permuted(np.tile(np.arange(12), (size, 1)), axis=1)[:, :3],
        -1,
    )
    weight = np.where(label >= 0, rng.choice([0.25, 1.0], (size, 3)), 0)
    logits = rng.normal(size=(size, num_classes)).astype(np.float32)
    mask = (np.arange(size) < 180).astype(np.float32)
    rows = _dense(label, weight, num_classes)
    step = classification.make_eval_step(lambda params, image: image, losses.sigmoid, num_classes)
    index = np.where(mask > 0, np.arange(size), -1)
    batch = {"image": logits, "label": label.astype(np.int32), "mask": mask, "index": index}
    columns = step(None, {**batch, "label_weight": weight.astype(np.float32)})
    valid_columns = {name: np.asarray(columns[name])[:180] for name in columns}

    guesses = np.argsort(-logits, axis=1)[:180]
    label_sets = [set(row[row >= 0]) for row in label[:180]]
    top1 = sum(row[0] in members for row, members in zip(guesses, label_sets, strict=True))
    top5 = sum(
        bool(set(row[:5]) & members) for row, members in zip(guesses, label_sets, strict=True)
    )
    loss = np.sum(np.logaddexp(0, logits) - rows * logits, axis=1)[:180]
    num_labelled = sum(map(bool, label_sets))
    assert 0 < num_labelled < 180
    assert [valid_columns[name].sum() for name in ("labelled", "hit", "hit5")] == [
        num_labelled,
        top1,
        top5,
    ]
    np.testing.assert_allclose(valid_columns["loss"], loss, rtol=1e-5)
    np.testing.assert_array_equal(valid_columns["guesses"], guesses[:, :5])
    np.testing.assert_allclose(
        valid_columns["probability"], 1 / (1 + np.exp(-logits[:180].max(axis=1))), rtol=1e-5
    )
    expected_label = [min(members) if len(members) == 1 else -1 for members in label_sets]
    np.testing.assert_array_equal(valid_columns["label"], expected_label)


def test_three_label_formats_give_the_same_metrics():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50, 7)).astype(np.float32)
    label = rng.integers(0, 7, 50).astype(np.int32)
    step = classification.make_eval_step(lambda params, image: image, losses.softmax, 7)
    batch = {"image": logits, "mask": np.ones(50, np.float32), "index": np.arange(50)}
    expected = step(None, {**batch, "label": label})
    np.testing.assert_array_equal(expected["hit"], logits.argmax(1) == label)
    np.testing.assert_array_equal(expected["label"], label)
    one_hot = np.eye(7, dtype=np.float32)[label]
    assert_same_bits(step(None, {**batch, "label": one_hot}), expected)
    padded = np.stack([label, np.full(50, -1, np.int32)], 1)
    weight = (padded >= 0).astype(np.float32)
    assert_same_bits(step(None, {**batch, "label": padded, "label_weight": weight}), expected)
    unlabelled_columns = step(None, {**batch, "label": jnp.full((50, 7), 0.01)})
    assert not np.any(unlabelled_columns["labelled"]) and not np.any(unlabelled_columns["hit"])
    smoothed_columns = step(None, {**batch, "label": 0.9 * one_hot + 0.01})  # label smoothing
    assert_same_bits({**smoothed_columns, "loss": expected["loss"]}, expected)


def test_accuracy_ignores_images_without_labels(tmp_path):
    """The model always predicts class 0, "animal"; one of four images has no label."""
    config = _config(tmp_path, LINES)
    split = run_data.open_split(config, "train", None)
    step = classification.make_eval_step(
        lambda params, image: jnp.tile(params, (len(image), 1)), losses.sigmoid, len(NAMES)
    )
    result = classification.evaluate(
        step,
        jnp.arange(6.0, 0.0, -1.0),
        split,
        batching=Batching(sharding.make_mesh({"data": -1}), global_batch_size=8),
    )
    assert (result.count, result.labelled, result.correct) == (4, 3, 1)
    assert result.top1 == 1 / 3 and result.top5 == 2 / 3  # "zebra" is the sixth guess


def test_softmax_with_several_labels_is_an_error(tmp_path):
    config = _config(tmp_path, LINES)
    config.loss = "softmax"
    with pytest.raises(UserError, match="loss=sigmoid"):
        run_data.open_split(config, "train", None)


def test_one_hot_with_the_wrong_class_count_is_an_error(tmp_path):
    lines = [{"path": line["path"], "labels": i % 3} for i, line in enumerate(LINES)]
    config = _config(tmp_path, lines)
    spec = config.dataset.train_preprocess
    config.dataset.train_preprocess = f"{spec}|one_hot(5)"
    with pytest.raises(UserError, match=r"one_hot.*\b5\b.*\b3\b"):
        run_data.open_split(config, "train", None, augment=True)
    config.dataset.train_preprocess = f"{spec}|one_hot(3)"
    split = run_data.open_split(config, "train", None, augment=True)
    assert split.example_spec["label"] == ((3,), "float32")
