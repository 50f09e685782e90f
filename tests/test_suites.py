"""Tests the ImageNet suite on mock data, the ReaL labels and the published accuracies."""

import io
import json
import re

import jax
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from flax import traverse_util
from PIL import Image

from helpers import run_program
from mixer.data import labels
from mixer.data.imagenet import names as imagenet_names
from mixer.data.imagenet import real as imagenet_real
from mixer.errors import UserError
from mixer.evaluation import report, suites
from mixer.evaluation.subject import open_subject
from mixer.models.registry import make_model
from mixer.weights import formats as weights
from mixer.weights import published
from mixer.weights.card import Card

SIZE = 16
PREPROCESS = f"decode|resize_small({SIZE * 8 // 7}, method='area')|central_crop({SIZE})"
# Numbers (from 1) of the validation images, unsorted. Image 1 has no ReaL label, image 2 has two.
VALIDATION = (7, 2, 1, 50_000, 3, 31_337, 4, 5, 6, 12)


def _jpeg(seed, side=40):
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    weights_file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side + 8)).save(weights_file, "JPEG")
    return weights_file.getvalue()


def _label(number):
    return number * 37 % 1000


def _prepare(name, data_dir, splits):
    """Writes a TFDS set {split: [(file name, label), ...]}; the file name seeds the image."""
    builder = tfds.builder(name, data_dir=str(data_dir))
    builder.data_path.mkdir(parents=True, exist_ok=True)
    infos = []
    for split, examples in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=builder.data_path,
            dataset_name=builder.name,
            split=split,
            filetype_suffix="tfrecord",
        )
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        with tf.io.TFRecordWriter(str(path)) as writer:
            for file_name, label in examples:
                image = io.BytesIO(_jpeg(sum(file_name.encode())))
                example = {"file_name": file_name, "image": image, "label": label}
                features = builder.info.features
                writer.write(features.serialize_example(features.encode_example(example)))
        infos.append(tfds.core.SplitInfo(split, [len(examples)], 1 << 20, template))
    builder.info.set_splits(tfds.core.SplitDict(infos))
    builder.info.write_to_directory(builder.data_path)


def _file_name(number):
    return f"ILSVRC2012_val_{number:08}.JPEG"


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A TFDS directory with imagenet2012 and imagenet_v2."""
    path = tmp_path_factory.mktemp("imagenet")
    train = [(f"n01440764_{i}.JPEG", i % 1000) for i in range(300)]
    validation = [(_file_name(number), _label(number)) for number in VALIDATION]
    _prepare("imagenet2012", path, {"train": train, "validation": validation})
    v2 = [(f"{i}/{i}.jpeg", i * 100) for i in range(5)]
    _prepare("imagenet_v2/matched-frequency", path, {"test": v2})
    return path


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Weights of a small model with the classes of ImageNet-1k and a random head."""
    dims = dict(patch_size=8, hidden_dim=8, num_blocks=1, tokens_mlp_dim=4, channels_mlp_dim=8)
    model = make_model(num_classes=1000, **dims)
    images = np.zeros((1, SIZE, SIZE, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    arrays = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    rng = np.random.default_rng(0)
    arrays["head/kernel"] = rng.normal(size=(8, 1000)).astype(np.float32)
    card = Card(
        architecture="mixer",
        variant=None,
        dimensions=dims,
        num_classes=1000,
        image_size=(SIZE, SIZE),
        gelu="tanh",
        preprocess=PREPROCESS,
        class_names="imagenet1k",
        source="a test",
    )
    path = tmp_path_factory.mktemp("weights") / "small.npz"
    weights.write_file(path, arrays, card, layout="published")
    return path


def _evaluate(weights_file, output, **options):
    subjects = [lambda: open_subject(str(weights_file), output=str(output))]
    report.evaluate(subjects, report.Options(save_predictions=True, **options))
    results = json.loads((output / "results.json").read_text())["splits"]
    predictions = {}
    for name in results:
        with np.load(output / "evaluation" / f"{name}.npz", allow_pickle=False) as archive:
            predictions[name] = dict(archive)
    return results, predictions


# ReaL.


def test_real_labels_match_the_paper():
    """The paper gives labels for 46,837 of the 50,000 images."""
    values, starts = imagenet_real.labels()
    counts = np.diff(starts)
    assert len(counts) == 50_000 and np.sum(counts > 0) == 46_837
    assert len(values) == 57_553 and counts.max() == 9
    assert values.min() == 0 and values.max() == 999
    assert [imagenet_real.image_labels(image) for image in range(5)] == [
        [],
        [970, 795],
        [230, 231],
        [809],
        [516, 850],
    ]


def test_image_number_is_read_from_the_file_name():
    assert imagenet_real.image_number("val/n01440764/ILSVRC2012_val_00000293.JPEG") == 292
    for name in ("293.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG"):
        assert imagenet_real.image_number(name) is None


def test_real_labels_of_an_unknown_file_are_an_error():
    assert labels.imagenet_real({"file_name": _file_name(2)}).numpy().tolist() == [970, 795]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"n01440764_10026\.JPEG"):
        labels.imagenet_real({"file_name": "n01440764_10026.JPEG"})


# The suite.


@pytest.mark.slow
def test_imagenet_suite_evaluates_its_four_sets(imagenet, weights_file, tmp_path, capsys):
    results, predictions = _evaluate(
        weights_file, tmp_path, suite=["imagenet"], data_dir=str(imagenet)
    )
    assert list(results) == ["imagenet_val", "imagenet_minival", "imagenet_real", "imagenet_v2"]
    assert [results[name]["count"] for name in results] == [10, 3, 10, 5]
    np.testing.assert_array_equal(
        predictions["imagenet_val"]["label"], [_label(number) for number in VALIDATION]
    )
    np.testing.assert_array_equal(predictions["imagenet_minival"]["label"], [297, 298, 299])
    np.testing.assert_array_equal(predictions["imagenet_v2"]["label"], [0, 100, 200, 300, 400])

    # ReaL scores the same predictions: any of an image's labels is a hit, and images without a
    # label do not count.
    real_predictions, guesses = predictions["imagenet_real"], predictions["imagenet_val"]["guesses"]
    np.testing.assert_array_equal(real_predictions["guesses"], guesses)
    sets = [set(imagenet_real.image_labels(number - 1)) for number in VALIDATION]
    np.testing.assert_array_equal(
        real_predictions["labelled"], [bool(image_labels) for image_labels in sets]
    )
    hits = [guess in image_labels for guess, image_labels in zip(guesses[:, 0], sets, strict=True)]
    np.testing.assert_array_equal(real_predictions["hit"], hits)
    result = results["imagenet_real"]
    assert result["labelled"] == sum(map(bool, sets)) < 10
    assert result["top1"] == sum(hits) / result["labelled"]
    assert result["mean_per_class"] is None
    assert not (tmp_path / "evaluation" / "imagenet_real.json").exists()
    assert f"{result['labelled']} of 10" in capsys.readouterr().out


def test_real_split_has_all_labels_of_each_image(imagenet):
    options = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(imagenet))
    split = suites.open_task("imagenet_real", **options)
    assert split.multi_label and split.class_names == imagenet_names.synsets("imagenet1k")
    (batch,) = split.sequential_batches(start=0, stop=10, batch_size=10)
    for row, number in zip(batch["label"], VALIDATION, strict=True):
        assert row[row >= 0].tolist() == imagenet_real.image_labels(number - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder `val` with the validation images, one folder per synset."""
    path, synsets = tmp_path_factory.mktemp("folder"), imagenet_names.synsets("imagenet1k")
    for number in VALIDATION:
        image = path / "val" / synsets[_label(number)] / _file_name(number)
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(_jpeg(sum(_file_name(number).encode())))
    return path


@pytest.mark.slow
def test_folder_of_validation_images_matches_tfds(folder, imagenet, weights_file, tmp_path, capsys):
    """A folder gives the same results as TFDS, in any order of images."""
    results, predictions = _evaluate(
        weights_file, tmp_path / "a", suite=["imagenet"], data_dir=str(folder)
    )
    assert list(results) == ["imagenet_val", "imagenet_real"]
    assert "imagenet_v2: " in capsys.readouterr().out
    tfds_results, _ = _evaluate(
        weights_file,
        tmp_path / "b",
        suite=["imagenet_val", "imagenet_real"],
        data_dir=str(imagenet),
    )
    for name, result in results.items():
        for key in ("count", "labelled", "correct", "top5"):
            assert result[key] == tfds_results[name][key]
        assert result["loss"] == pytest.approx(tfds_results[name]["loss"], rel=1e-6)
    names = {name.rpartition("/")[2] for name in predictions["imagenet_val"]["id"].tolist()}
    assert names == {_file_name(number) for number in VALIDATION}


def test_flat_folder_has_only_real_labels(folder, tmp_path, monkeypatch):
    options = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(tmp_path))
    images = sorted(folder.rglob("*.JPEG"), key=lambda path: path.name)
    for image in images:
        (tmp_path / image.name).write_bytes(image.read_bytes())
    split = suites.open_task("imagenet_real", **options)
    assert split.num_examples == 10
    with pytest.raises(UserError, match="synset"):
        suites.open_task("imagenet_val", **options)
    with pytest.raises(UserError, match=r"imagenet_v2.*TFDS"):
        suites.open_task("imagenet_v2", **options)

    # Without numbers in their names, a complete set is identified by its order.
    for index, image in enumerate(images):
        (tmp_path / image.name).rename(tmp_path / f"image_{index}.png")
    with pytest.raises(UserError, match=r"10 .*50,000"):
        suites.open_task("imagenet_real", **options)
    (tmp_path / "image_9.png").rename(tmp_path / "image_10.png")
    monkeypatch.setattr(imagenet_real, "NUM_IMAGES", 10)
    with pytest.raises(UserError, match="length"):
        suites.open_task("imagenet_real", **options)
    (tmp_path / "image_10.png").rename(tmp_path / "image_9.png")
    split = suites.open_task("imagenet_real", **options)
    (batch,) = split.sequential_batches(start=0, stop=10, batch_size=10)
    expected = [imagenet_real.image_labels(index) for index in range(10)]
    by_name = {split.example_id(index): batch["label"][index] for index in range(10)}
    for index, labels_of_image in enumerate(expected):
        row = by_name[f"image_{index}.png"]
        assert row[row >= 0].tolist() == labels_of_image


def test_unnumbered_images_in_class_folders_have_no_real_labels(folder, tmp_path, monkeypatch):
    """Sorting images in class folders does not give the order of the set."""
    monkeypatch.setattr(imagenet_real, "NUM_IMAGES", 2)
    for index, name in enumerate(("n01440764", "n01443537")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{index}.JPEG").write_bytes(_jpeg(index))
    options = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(tmp_path))
    with pytest.raises(UserError, match="number"):
        suites.open_task("imagenet_real", **options)
    assert suites.open_task("imagenet_val", **options).num_examples == 2


def test_duplicate_image_is_an_error(tmp_path):
    (tmp_path / "n01440764").mkdir()
    for path in (tmp_path, tmp_path / "n01440764"):
        (path / _file_name(5)).write_bytes(_jpeg(5))
    options = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"image 5 .*twice"):
        suites.open_task("imagenet_real", **options)


def test_real_alone_saves_multi_label_predictions(imagenet, weights_file, tmp_path):
    _, predictions = _evaluate(
        weights_file, tmp_path, suite=["imagenet_real"], data_dir=str(imagenet)
    )
    assert (predictions["imagenet_real"]["label"] >= 0).sum() < 10
    assert not (tmp_path / "evaluation" / "imagenet_real.json").exists()


def test_corrupt_empty_and_missing_sets_are_errors(folder, tmp_path):
    options = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(tmp_path))
    with pytest.raises(UserError, match="no images"):
        suites.open_task("imagenet_real", **options)
    (tmp_path / _file_name(2)).write_bytes(b"no image")
    split = suites.open_task("imagenet_real", **options)
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000002\.JPEG"):
        list(split.sequential_batches(start=0, stop=1, batch_size=1))
    with pytest.raises(UserError, match="/none"):
        suites.open_task("imagenet_real", **options | dict(data_dir=str(tmp_path / "none")))


def test_truncated_records_are_an_error(imagenet, tmp_path):
    import shutil

    data_dir = shutil.copytree(imagenet, tmp_path / "tfds")
    (record,) = data_dir.rglob("imagenet2012-validation.tfrecord*")
    record.write_bytes(record.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"imagenet2012"):
        suites.open_task(
            "imagenet_val", preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(data_dir)
        )


def test_every_task_is_a_tfds_set_with_the_expected_features():
    for task in suites.TASKS.values():
        if task.dataset == "digits":
            continue
        builder = tfds.builder(task.dataset, data_dir="/nowhere")
        features = builder.info.features
        assert features["label"].num_classes in (10, 37, 100, 102, 1000)
        if task.classes:
            assert tuple(features["label"].names) == imagenet_names.synsets(task.classes)
        if task.label_key:
            assert "file_name" in features
    for dataset, *_ in suites.FEWSHOT.values():
        assert tfds.builder(dataset, data_dir="/nowhere").info.features["label"].num_classes > 1


def test_only_prepared_few_shot_sets_are_probed(imagenet, monkeypatch):
    """Only ImageNet is prepared, with 300 training images instead of 65,000."""
    monkeypatch.setitem(suites.FEWSHOT, "imagenet", ("imagenet2012", "train[:200]", "validation"))
    probes = suites.open_fewshot((SIZE, SIZE), str(imagenet))
    (train, test) = probes["imagenet"]
    assert list(probes) == ["imagenet"] and (train.num_examples, test.num_examples) == (200, 10)
    assert train.example_spec["image"][0] == (SIZE, SIZE, 3)
    with pytest.raises(UserError, match=r"caltech101, "):
        suites.open_fewshot((SIZE, SIZE), "/nowhere")


# Published accuracies.


@pytest.mark.parametrize(
    ("source", "num_classes", "name"),
    [
        ("B/16-i1k", 1000, "B/16-i1k"),
        (published.CHECKPOINTS["L/16-i1k"].url, 1000, "L/16-i1k"),
        ("weights/Mixer-B_16.npz", 1000, "B/16-i1k"),
        ("sam/Mixer-B_16.npz", 1000, "B/16-sam"),
        ("weights/Mixer-B_16.npz", 21843, None),
        ("weights/Mixer-B_16.npz", 10, None),
        ("B/16-i21k", 21843, None),
        ("mine.npz", 1000, None),
        (
            "hf://timm/mixer_b16_224.miil_in21k_ft_in1k",
            1000,
            "mixer_b16_224.miil_in21k_ft_in1k",
        ),
        ("jx_mixer_b16_224-76587d61.safetensors", 1000, "mixer_b16_224.goog_in21k_ft_in1k"),
    ],
)
def test_published_accuracies_are_looked_up_by_source(source, num_classes, name):
    variant = "L/16" if "L_16" in source or "L/16" in source else "B/16"
    expected = published.find_accuracies(source, variant=variant, num_classes=num_classes)
    assert (expected and expected[0]) == name
    if expected:
        assert 0.7 < expected[1]["imagenet_val"][0] < 0.9


def test_results_include_the_published_accuracies(
    imagenet, weights_file, tmp_path, monkeypatch, capsys
):
    expected = ("B/16-i1k", published.ACCURACIES["B/16-i1k"])
    monkeypatch.setattr(published, "find_accuracies", lambda source, **kwargs: expected)
    results, _ = _evaluate(weights_file, tmp_path, suite=["imagenet"], data_dir=str(imagenet))
    assert results["imagenet_val"]["published"]["top1"] == 0.7644
    assert "published" not in results["imagenet_v2"]
    for text in (capsys.readouterr().out, (tmp_path / "results.md").read_text()):
        assert re.search(r"imagenet_val: 76.44% .*B/16-i1k .*50,000 images", text)
        assert "82.36%" in text


def test_published_accuracies_refer_to_known_weights_and_tasks():
    for name, figures in published.ACCURACIES.items():
        assert name in published.CHECKPOINTS or name.startswith("mixer_")
        assert set(figures) <= set(suites.TASKS)


@pytest.mark.slow
def test_file_name_of_published_weights_is_recognised(imagenet, tmp_path):
    """The file name Mixer-B_16.npz implies preprocessing and adds the paper's accuracies."""
    model = make_model(variant="B/16", num_classes=1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    rng = np.random.default_rng(0)
    arrays = {
        name: 0.02 * rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in traverse_util.flatten_dict(shapes["params"], sep="/").items()
    }
    np.savez(tmp_path / "Mixer-B_16.npz", **arrays)
    result = run_program(
        "evaluate.py",
        f"--weights={tmp_path / 'Mixer-B_16.npz'}",
        "--suite=imagenet",
        f"--data_dir={imagenet}",
        f"--output={tmp_path / 'out'}",
    )
    assert "76.44%" in result.stdout and "82.36%" in result.stdout
    assert "imagenet1k" in result.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())["splits"]
    assert [row["count"] for row in results.values()] == [10, 3, 10, 5]
