"""ImageNet's sets on mock data of the right form, ReaL's labels, and the published figures."""

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
# Numbers, from 1, of the validation images, in no order: 1 has no label of ReaL, 2 has two.
VALIDATION = (7, 2, 1, 50_000, 3, 31_337, 4, 5, 6, 12)


def _jpeg(seed, side=40):
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side + 8)).save(file, "JPEG")
    return file.getvalue()


def _label(number):
    return number * 37 % 1000


def _prepare(name, data_dir, splits):
    """Writes a TFDS set {split: [(file name, label), ...]}; the name makes the image."""
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
    """TFDS's directory with imagenet2012 and imagenet_v2 in it."""
    path = tmp_path_factory.mktemp("imagenet")
    train = [(f"n01440764_{i}.JPEG", i % 1000) for i in range(300)]
    validation = [(_file_name(number), _label(number)) for number in VALIDATION]
    _prepare("imagenet2012", path, {"train": train, "validation": validation})
    v2 = [(f"{i}/{i}.jpeg", i * 100) for i in range(5)]
    _prepare("imagenet_v2/matched-frequency", path, {"test": v2})
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of a small model with ImageNet-1k's classes and a random head."""
    dims = dict(patch_size=8, hidden_dim=8, num_blocks=1, tokens_mlp_dim=4, channels_mlp_dim=8)
    model = make_model(num_classes=1000, **dims)
    params = model.init(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))["params"]
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


def _evaluate(file, output, **options):
    opened = [lambda: open_subject(str(file), output=str(output))]
    report.evaluate(opened, report.Options(save_predictions=True, **options))
    results = json.loads((output / "results.json").read_text())["splits"]
    predictions = {}
    for name in results:
        with np.load(output / "evaluation" / f"{name}.npz", allow_pickle=False) as saved:
            predictions[name] = dict(saved)
    return results, predictions


# ReaL.


def test_real_labels_are_those_of_the_paper():
    """46,837 of the 50,000 images have labels."""
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


def test_image_numbers():
    assert imagenet_real.image_number("val/n01440764/ILSVRC2012_val_00000293.JPEG") == 292
    for name in ("293.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG"):
        assert imagenet_real.image_number(name) is None


def test_real_label_of_a_file_that_is_none_of_the_set_is_named():
    assert labels.imagenet_real({"file_name": _file_name(2)}).numpy().tolist() == [970, 795]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"n01440764_10026\.JPEG"):
        labels.imagenet_real({"file_name": "n01440764_10026.JPEG"})


# The suite.


def test_imagenet_suite(imagenet, file, tmp_path, capsys):
    results, predictions = _evaluate(file, tmp_path, suite=["imagenet"], data_dir=str(imagenet))
    assert list(results) == ["imagenet_val", "imagenet_minival", "imagenet_real", "imagenet_v2"]
    assert [results[name]["count"] for name in results] == [10, 3, 10, 5]
    np.testing.assert_array_equal(
        predictions["imagenet_val"]["label"], [_label(number) for number in VALIDATION]
    )
    np.testing.assert_array_equal(predictions["imagenet_minival"]["label"], [297, 298, 299])
    np.testing.assert_array_equal(predictions["imagenet_v2"]["label"], [0, 100, 200, 300, 400])

    # ReaL: the same guesses; a hit is any of the labels, images without any do not count.
    real, guesses = predictions["imagenet_real"], predictions["imagenet_val"]["guesses"]
    np.testing.assert_array_equal(real["guesses"], guesses)
    sets = [set(imagenet_real.image_labels(number - 1)) for number in VALIDATION]
    np.testing.assert_array_equal(real["labelled"], [bool(each) for each in sets])
    hits = [guess in each for guess, each in zip(guesses[:, 0], sets, strict=True)]
    np.testing.assert_array_equal(real["hit"], hits)
    found = results["imagenet_real"]
    assert found["labelled"] == sum(map(bool, sets)) < 10
    assert found["top1"] == sum(hits) / found["labelled"]
    assert found["mean_per_class"] is None
    assert not (tmp_path / "evaluation" / "imagenet_real.json").exists()
    assert f"{found['labelled']} of 10" in capsys.readouterr().out


def test_real_counts_a_guess_that_is_any_of_the_labels(imagenet):
    how = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(imagenet))
    split = suites.open_task("imagenet_real", **how)
    assert split.multi_label and split.class_names == imagenet_names.synsets("imagenet1k")
    (batch,) = split.sequential_batches(start=0, stop=10, batch_size=10)
    for row, number in zip(batch["label"], VALIDATION, strict=True):
        assert row[row >= 0].tolist() == imagenet_real.image_labels(number - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The validation images in folders named by their synsets, in a folder `val`."""
    path, synsets = tmp_path_factory.mktemp("folder"), imagenet_names.synsets("imagenet1k")
    for number in VALIDATION:
        image = path / "val" / synsets[_label(number)] / _file_name(number)
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(_jpeg(sum(_file_name(number).encode())))
    return path


def test_folder_of_validation_images(folder, imagenet, file, tmp_path, capsys):
    """As from TFDS, whatever the order."""
    results, predictions = _evaluate(file, tmp_path / "a", suite=["imagenet"], data_dir=str(folder))
    assert list(results) == ["imagenet_val", "imagenet_real"]
    assert "imagenet_v2: " in capsys.readouterr().out
    there, _ = _evaluate(
        file,
        tmp_path / "b",
        suite=["imagenet_val", "imagenet_real"],
        data_dir=str(imagenet),
    )
    for name, result in results.items():
        for key in ("count", "labelled", "correct", "top5"):
            assert result[key] == there[name][key]
        assert result["loss"] == pytest.approx(there[name]["loss"], rel=1e-6)
    names = {name.rpartition("/")[2] for name in predictions["imagenet_val"]["id"].tolist()}
    assert names == {_file_name(number) for number in VALIDATION}


def test_flat_folder_has_real_labels_only(folder, tmp_path, monkeypatch):
    how = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(tmp_path))
    images = sorted(folder.rglob("*.JPEG"), key=lambda path: path.name)
    for image in images:
        (tmp_path / image.name).write_bytes(image.read_bytes())
    split = suites.open_task("imagenet_real", **how)
    assert split.num_examples == 10
    with pytest.raises(UserError, match="synset"):
        suites.open_task("imagenet_val", **how)
    with pytest.raises(UserError, match=r"imagenet_v2.*TFDS"):
        suites.open_task("imagenet_v2", **how)

    # Renamed, they are known by their order, if all are there.
    for place, image in enumerate(images):
        (tmp_path / image.name).rename(tmp_path / f"image_{place}.png")
    with pytest.raises(UserError, match=r"10 .*50,000"):
        suites.open_task("imagenet_real", **how)
    (tmp_path / "image_9.png").rename(tmp_path / "image_10.png")
    monkeypatch.setattr(imagenet_real, "NUM_IMAGES", 10)
    with pytest.raises(UserError, match="length"):
        suites.open_task("imagenet_real", **how)
    (tmp_path / "image_10.png").rename(tmp_path / "image_9.png")
    monkeypatch.setattr(imagenet_real, "NUM_IMAGES", 10)
    split = suites.open_task("imagenet_real", **how)
    (batch,) = split.sequential_batches(start=0, stop=10, batch_size=10)
    wanted = [imagenet_real.image_labels(place) for place in range(10)]
    by_name = {split.example_id(place): batch["label"][place] for place in range(10)}
    for place, labels_of_image in enumerate(wanted):
        row = by_name[f"image_{place}.png"]
        assert row[row >= 0].tolist() == labels_of_image


def test_images_in_folders_without_numbers_have_no_real_labels(folder, tmp_path, monkeypatch):
    """Their order by name is not that of the set."""
    monkeypatch.setattr(imagenet_real, "NUM_IMAGES", 2)
    for place, name in enumerate(("n01440764", "n01443537")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{place}.JPEG").write_bytes(_jpeg(place))
    how = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(tmp_path))
    with pytest.raises(UserError, match="number"):
        suites.open_task("imagenet_real", **how)
    assert suites.open_task("imagenet_val", **how).num_examples == 2


def test_an_image_twice_is_refused(tmp_path):
    (tmp_path / "n01440764").mkdir()
    for path in (tmp_path, tmp_path / "n01440764"):
        (path / _file_name(5)).write_bytes(_jpeg(5))
    how = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"image 5 .*twice"):
        suites.open_task("imagenet_real", **how)


def test_predictions_of_several_labels_alone(imagenet, file, tmp_path):
    _, predictions = _evaluate(file, tmp_path, suite=["imagenet_real"], data_dir=str(imagenet))
    assert (predictions["imagenet_real"]["label"] >= 0).sum() < 10
    assert not (tmp_path / "evaluation" / "imagenet_real.json").exists()


def test_corrupt_and_empty_sets_are_refused(folder, tmp_path):
    how = dict(preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(tmp_path))
    with pytest.raises(UserError, match="no images"):
        suites.open_task("imagenet_real", **how)
    (tmp_path / _file_name(2)).write_bytes(b"no image")
    split = suites.open_task("imagenet_real", **how)
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000002\.JPEG"):
        list(split.sequential_batches(start=0, stop=1, batch_size=1))
    with pytest.raises(UserError, match="/none"):
        suites.open_task("imagenet_real", **how | dict(data_dir=str(tmp_path / "none")))


def test_truncated_records_are_refused(imagenet, tmp_path):
    import shutil

    data_dir = shutil.copytree(imagenet, tmp_path / "tfds")
    (record,) = data_dir.rglob("imagenet2012-validation.tfrecord*")
    record.write_bytes(record.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"imagenet2012"):
        suites.open_task(
            "imagenet_val", preprocess=PREPROCESS, image_size=(SIZE, SIZE), data_dir=str(data_dir)
        )


def test_every_named_set_is_one_of_tfds():
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


def test_the_few_shot_sets_that_are_here_are_probed(imagenet, monkeypatch):
    """All but ImageNet are missing, and of its training split 300 images are there, not 65,000."""
    monkeypatch.setitem(suites.FEWSHOT, "imagenet", ("imagenet2012", "train[:200]", "validation"))
    opened = suites.open_fewshot((SIZE, SIZE), str(imagenet))
    (train, test) = opened["imagenet"]
    assert list(opened) == ["imagenet"] and (train.num_examples, test.num_examples) == (200, 10)
    assert train.example_spec["image"][0] == (SIZE, SIZE, 3)
    with pytest.raises(UserError, match=r"caltech101, "):
        suites.open_fewshot((SIZE, SIZE), "/nowhere")


# Published figures.


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
def test_published_figures_are_found(source, num_classes, name):
    variant = "L/16" if "L_16" in source or "L/16" in source else "B/16"
    found = published.find_accuracies(source, variant=variant, num_classes=num_classes)
    assert (found and found[0]) == name
    if found:
        assert 0.7 < found[1]["imagenet_val"][0] < 0.9


def test_published_figures_stand_beside_ours(imagenet, file, tmp_path, monkeypatch, capsys):
    known = ("B/16-i1k", published.ACCURACIES["B/16-i1k"])
    monkeypatch.setattr(published, "find_accuracies", lambda source, **of: known)
    results, _ = _evaluate(file, tmp_path, suite=["imagenet"], data_dir=str(imagenet))
    assert results["imagenet_val"]["published"]["top1"] == 0.7644
    assert "published" not in results["imagenet_v2"]
    for text in (capsys.readouterr().out, (tmp_path / "results.md").read_text()):
        assert re.search(r"imagenet_val: 76.44% .*B/16-i1k .*50,000 images", text)
        assert "82.36%" in text


def test_every_published_figure_is_of_a_known_set():
    for name, figures in published.ACCURACIES.items():
        assert name in published.CHECKPOINTS or name.startswith("mixer_")
        assert set(figures) <= set(suites.TASKS)


@pytest.mark.slow
def test_a_file_by_a_published_name(imagenet, tmp_path):
    """Mixer-B_16.npz of random values: its own preprocessing, and the paper's figures beside."""
    model = make_model(variant="B/16", num_classes=1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    rng = np.random.default_rng(0)
    arrays = {
        name: 0.02 * rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in traverse_util.flatten_dict(shapes["params"], sep="/").items()
    }
    np.savez(tmp_path / "Mixer-B_16.npz", **arrays)
    done = run_program(
        "evaluate.py",
        f"--weights={tmp_path / 'Mixer-B_16.npz'}",
        "--suite=imagenet",
        f"--data_dir={imagenet}",
        f"--output={tmp_path / 'out'}",
    )
    assert "76.44%" in done.stdout and "82.36%" in done.stdout
    assert "imagenet1k" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())["splits"]
    assert [result["count"] for result in results.values()] == [10, 3, 10, 5]
