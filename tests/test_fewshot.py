"""The few-shot probe, compared with scikit-learn, and on several devices and processes."""

import dataclasses
import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import Ridge

from helpers import ROOT, environment, tiny_config
from mixer.data import splits as pipeline
from mixer.data.order import Reading
from mixer.data.sources import stored as sources
from mixer.errors import UserError
from mixer.evaluation import fewshot, tables
from mixer.evaluation.evaluator import Batching
from mixer.parallel import sharding
from mixer.runs import data as run_data
from mixer.training import program
from mixer.training import state as train_state

L2 = 2.0**10


def _features(count, dim, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    features = rng.normal(size=(count, dim)) + rng.normal(size=(num_classes, dim))[labels]
    return features.astype(np.float32), labels.astype(np.int32)


def _design(features, mean, deviation):
    scaled_features = (features.astype(np.float64) - mean) / deviation
    return np.hstack([scaled_features, np.full((len(scaled_features), 1), 100.0)])


def _reference(features, labels, num_classes):
    """Fits scikit-learn's probe; returns a function that scores features, and its weights."""
    mean, deviation = features.mean(0, np.float64), features.std(0, np.float64) + 1e-5
    probe = Ridge(alpha=L2, fit_intercept=False)
    probe.fit(_design(features, mean, deviation), 2.0 * np.eye(num_classes)[labels] - 1)
    return lambda x: probe.predict(_design(x, mean, deviation)), probe.coef_.T


@pytest.mark.parametrize(
    "count", [200, 33, 32, 12], ids=["many", "dimensions", "dimensions - 1", "few"]
)
def test_probe_matches_ridge_regression_of_scikit_learn(count):
    """Covers more, as many and fewer examples than dimensions (32 features and a constant)."""
    features, labels = _features(count, 32, 4)
    scores, weights = _reference(features, labels, 4)
    probe = fewshot.fit(features, labels, L2, 4)
    assert probe.weights.dtype == np.float64 and np.abs(weights).max() > 1e-3
    np.testing.assert_allclose(probe.weights, weights, rtol=1e-6, atol=1e-9)
    x = _features(50, 32, 4, seed=1)[0]
    guesses = scores(x).argmax(1)
    np.testing.assert_array_equal(probe.classify(x), guesses)
    assert len(set(guesses)) > 1


def test_probe_of_two_images_matches_a_manual_computation():
    """The standardised features are -s and s; the targets average 0, so the bias is 0."""
    features, labels = np.array([[0], [2]], np.float32), np.array([0, 1], np.int32)
    probe = fewshot.fit(features, labels, L2, 2)
    s = 1 / (1 + 1e-5)
    w = -2 * s / (2 * s**2 + 1024)
    np.testing.assert_allclose(probe.mean, [1])
    np.testing.assert_allclose(probe.deviation, [1 + 1e-5])
    np.testing.assert_allclose(probe.weights, [[w, -w], [0, 0]], rtol=1e-9, atol=1e-15)


def test_drawn_images_match_the_authors_protocol():
    labels = np.random.default_rng(5).integers(0, 4, 60)
    rng = np.random.default_rng(2)
    permutations = [rng.permutation(np.flatnonzero(labels == label)) for label in range(4)]
    for shots in (1, 5, 100):
        draws = fewshot.draw(labels, 4, shots, seed=2)
        for draw, permutation in zip(draws, permutations, strict=True):
            np.testing.assert_array_equal(draw, permutation[:shots])


def test_interval_combines_the_variances_of_draws_and_images():
    hits = np.arange(96) < 48  # the interval adds two hits and two misses: 50 of 100
    image_half_width = 1.959964 * 0.5 / 10
    hits_by_draw = np.stack([hits] * 3)
    for identical_draws in (hits[None], hits_by_draw):
        assert fewshot.interval(identical_draws) == pytest.approx(
            (0.5 - image_half_width, 0.5 + image_half_width)
        )
    hits_by_draw[0, 48:50], hits_by_draw[2, 46:48] = True, False  # 50, 48 and 46 hits
    variance = np.append(hits_by_draw.mean(0), [0, 0, 1, 1]).var() / 100
    draw_half_width = 4.302653 * 2 / 96 / 3**0.5
    half_width = (1.959964**2 * variance + draw_half_width**2) ** 0.5
    assert fewshot.interval(hits_by_draw) == pytest.approx((0.5 - half_width, 0.5 + half_width))
    low, high = fewshot.interval(np.ones((3, 20), bool))
    assert high == 1 and 0.8 < low < 1  # only 20 images


# Labels and parts of splits.


def _write_folder(directory, count=12, splits=("train", "test"), classes=("ape", "bee", "cow")):
    rng = np.random.default_rng(0)
    for split in splits:
        for i, name in enumerate(classes):
            (directory / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 160, (8, 8, 3)) + 40 * i
                path = directory / split / name / f"{number:02}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)


def _folder_config(directory, **values):
    config = tiny_config(dataset__name="folder", dataset__data_dir=str(directory))
    config.dataset.update(train_split="train", val_split="", test_split="test")
    config.dataset.update(train_preprocess="decode", eval_preprocess="decode", **values)
    return config


@pytest.fixture(
    params=[
        *("groups", "synthetic"),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("memory", "folder", "several", "labels")
        ),
    ]
)
def split(request, tfds_dir, tmp_path, monkeypatch):
    """A test split, once for each way of reading."""
    if request.param in ("memory", "groups"):
        if request.param == "groups":
            monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
        config = tiny_config(tfds_dir, dataset__test_split="test[:40]+validation[10:]")
        return run_data.open_split(config, "test", None)
    if request.param == "synthetic":
        return run_data.open_split(tiny_config(), "test", None)
    pipeline.forget_listings()
    _write_folder(tmp_path)
    config = _folder_config(tmp_path)
    if request.param != "folder":
        (tmp_path / "labels").write_text(
            "\n".join(
                json.dumps({"path": f"test/bee/{i:02}.png", "split": "test", "labels": labels})
                for i in range(12)
                for labels in [[i % 3, 3][: 1 + (request.param == "several" and i % 2)]]
            )
        )
        config.dataset.label_file = str(tmp_path / "labels")
        config.loss = "sigmoid"
    else:
        exclude = tmp_path / "exclude"
        exclude.write_text('{"example": "test/bee/03.png"}')
        config.dataset.exclude = str(exclude)
    return run_data.open_split(config, "test", None)


def _read_all(split):
    count = split.num_examples
    return next(split.sequential_batches(start=0, stop=count, batch_size=count))


def test_selected_examples_match_the_full_split(split):
    full_batch = _read_all(split)
    labels = split.labels()
    assert labels.dtype == np.int32 and labels.shape[1:] == (2,) * split.multi_label
    np.testing.assert_array_equal(labels, full_batch["label"])
    indices = np.array([9, 3, 4, 3])
    part = split.select(indices)
    assert part.num_examples == 3 and part.fingerprint != split.fingerprint
    np.testing.assert_array_equal(part.labels(), labels[[3, 4, 9]])
    for name, values in _read_all(part).items():
        np.testing.assert_array_equal(values, full_batch[name][[3, 4, 9]])
    assert [part.example_id(i) for i in range(3)] == [split.example_id(i) for i in (3, 4, 9)]
    last_example = part.select(np.array([2]))
    assert _read_all(last_example)["image"].tobytes() == full_batch["image"][9].tobytes()
    batch = next(part.train_batches(0, Reading(seed=0, global_batch_size=9)))
    images = sorted(image.tobytes() for image in batch["image"])
    assert images == sorted(full_batch["image"][i].tobytes() for i in (3, 4, 9) for _ in range(3))


# The evaluation.


def _model(num_classes=10):
    """Returns a tiny model, random parameters, and their mesh."""
    config = tiny_config(model__num_blocks=1)
    config.model.num_classes = num_classes
    model = program.build_model(config)
    mesh = sharding.make_mesh({"data": -1})
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        train_state.abstract_params(model, (8, 8), mesh),
    )
    return model, params, mesh


def _evaluate(model, params, mesh, train, test, batch=64, **values):
    return fewshot.evaluate(
        model,
        params,
        (train, test),
        batching=Batching(mesh, global_batch_size=batch),
        **values,
    )


def test_result_matches_the_protocol_run_with_scikit_learn():
    train, test = (run_data.open_split(tiny_config(), name, None) for name in ("train", "test"))
    model, params, mesh = _model()
    result = _evaluate(model, params, mesh, train, test, shots=(1, 8))
    assert fewshot.evaluate.__kwdefaults__["shots"] == (1, 5, 10, 25)

    def features(split):
        images = _read_all(split)["image"].astype(np.float32) / 127.5 - 1
        return np.asarray(jax.jit(model.apply)({"params": params}, images)[1]["pre_logits"])

    x, x_test = features(train), features(test)
    labels, test_labels = _read_all(train)["label"], _read_all(test)["label"]
    for shots in result.results:
        accuracies = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            by_class = [rng.permutation(np.flatnonzero(labels == k)) for k in range(10)]
            shot_indices = np.concatenate([indices[: shots.shots] for indices in by_class])
            scores, _ = _reference(x[shot_indices], labels[shot_indices], 10)
            accuracies.append(np.mean(scores(x_test).argmax(1) == test_labels))
        assert shots.accuracies == pytest.approx(accuracies, abs=1e-12)
        assert shots.mean == pytest.approx(np.mean(accuracies))
        assert shots.std == pytest.approx(np.std(accuracies, ddof=1))
        assert shots.interval[0] < shots.mean < shots.interval[1]
        assert (shots.examples, shots.short_classes) == (10 * shots.shots, 0)
    assert 0.15 < result.results[0].mean < result.results[1].mean < 1
    assert (result.count, result.num_classes, result.l2) == (256, 10, 1024)
    summary = json.loads(json.dumps(result.summary()))
    lines = tables.markdown(fewshot.make_table({"synthetic": summary}))
    assert len(lines) == 4 and "| synthetic | 8 | 80 |" in lines[3]


def test_only_drawn_images_are_read(tmp_path):
    _write_folder(tmp_path)
    for number in range(3, 12):
        (tmp_path / "train" / "cow" / f"{number:02}.png").unlink()
    pipeline.forget_listings()
    splits = [
        run_data.open_split(_folder_config(tmp_path), name, None) for name in ("train", "test")
    ]
    labels = splits[0].labels()
    assert np.bincount(labels).tolist() == [12, 12, 3]
    indices = np.concatenate(
        [np.concatenate(fewshot.draw(labels, 3, 5, seed)) for seed in range(2)]
    )
    names = {splits[0].example_id(index) for index in indices}
    assert 13 <= len(names) < 27
    for path in (tmp_path / "train").rglob("*.png"):
        if str(path.relative_to(tmp_path)) not in names:
            path.unlink()
    result = _evaluate(*_model(3), *splits, shots=(3, 5), seeds=2, batch=16)
    assert [shots.examples for shots in result.results] == [9, 13]
    assert [shots.short_classes for shots in result.results] == [0, 1]
    (tmp_path / min(names)).unlink()
    with pytest.raises(UserError, match=min(names)):
        _evaluate(*_model(3), *splits, shots=(3, 5), seeds=2, batch=16)


def test_single_draw_has_no_deviation_and_can_be_stopped():
    train, test = (run_data.open_split(tiny_config(), name, None) for name in ("train", "test"))
    tiny = _model()
    shots_result = _evaluate(*tiny, train, test, shots=(1,), seeds=1).results[0]
    assert shots_result.std is None and len(shots_result.accuracies) == 1
    assert shots_result.interval[0] < shots_result.mean
    table = fewshot.make_table({"a": {"results": [dataclasses.asdict(shots_result)]}})
    assert table.rows[0][5] == ""
    # Stops at the first batch, in the test split, and between two probes.
    for num_calls in (0, 2, 6):
        answers = iter([False] * num_calls + [True] * 100)
        result = _evaluate(*tiny, train, test, shots=(1, 2), should_stop=lambda: next(answers))  # noqa: B023
        assert result is None


def test_unusable_splits_and_features_are_one_line_errors(tmp_path):
    tiny = _model()
    train, test = (run_data.open_split(tiny_config(), name, None) for name in ("train", "test"))
    cases = {
        "10.*10": (
            train,
            dataclasses.replace(test, class_names=tuple("abcdefghij")),
        ),
        "test": (train, dataclasses.replace(test, multi_label=True)),
        "9 of its 10.*0": (
            train.select(np.flatnonzero(train.labels() == 4)),
            test,
        ),
        "train.*only": tuple(
            dataclasses.replace(split, class_names=("only",)) for split in (train, test)
        ),
    }
    for message, splits in cases.items():
        with pytest.raises(UserError, match=message) as error:
            _evaluate(*tiny, *splits)
        assert "\n" not in str(error.value)
    model, params, mesh = tiny
    nan_params = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(UserError, match=r"\b29 images.*train:"):
        _evaluate(model, nan_params, mesh, train, test, shots=(1,))


# Several devices and processes.

# Runs the probe and classifies 201 images: on one and on eight devices, or as one of two processes.
# It does not import TensorFlow.
WORKER = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from helpers import tiny_config
from mixer.training import losses, program, state as train_state
from mixer.runs import data as run_data
from mixer.parallel import sharding
from mixer.evaluation import classification, fewshot
from mixer.evaluation.evaluator import Batching
from mixer.training.step import make_predict

counts = (1, 8)
if len(sys.argv) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2,
        process_id=int(sys.argv[1]))
    counts = (2,)
    assert (jax.device_count(), jax.local_device_count()) == (2, 1)
config = tiny_config(model__num_blocks=1)
config.model.num_classes = 10
model = program.build_model(config)
train, test = (run_data.open_split(config, name, None) for name in ("train", "test"))
test = test.select(np.arange(201))
results = []
for count in counts:
    axes = {"data": -1, "fsdp": 4 if count == 8 else 1}
    mesh = sharding.make_mesh(axes, jax.devices()[:count])
    predict = make_predict(model, mesh)
    step = classification.make_eval_step(predict, losses.make_loss("softmax"), 10)
    options = dict(batching=Batching(mesh, global_batch_size=16))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype("float32"), leaf.sharding),
        train_state.abstract_params(model, (8, 8), mesh))
    for layer in ("pre_head_layer_norm", "head"):  # otherwise every guess is the same class
        params[layer]["bias"] *= 0
    probe = fewshot.evaluate(model, params, (train, test), shots=(3,), seeds=2, **options)
    result = classification.evaluate(step, params, test, **options)
    predictions = result.predictions
    results.append(dict(probe=probe.summary(), correct=result.correct, count=result.count,
        guesses=predictions.guesses[:, 0].tolist(), loss=predictions.loss.tolist()))
print(json.dumps(results))
"""


def _start_worker(*arguments, **extra):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _results(*workers):
    """Waits for the workers and returns the results that each has printed."""
    try:
        outputs = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (stdout, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, stdout + errors
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


@pytest.fixture(scope="module")
def devices():
    """The results on one device and on eight."""
    worker = _start_worker(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    (results,) = _results(worker)
    return results


def _assert_same(result, expected):
    assert result["probe"] == expected["probe"]
    assert (result["correct"], result["count"]) == (expected["correct"], 201)
    assert result["guesses"] == expected["guesses"] and len(set(result["guesses"])) > 1
    np.testing.assert_allclose(result["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_give_the_same_result_as_one(devices):
    expected, result = devices
    _assert_same(result, expected)
    assert expected["probe"]["results"][0]["mean"] > 0.15


@pytest.mark.slow
def test_two_processes_give_the_same_result_as_one(devices):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    for (result,) in _results(*(_start_worker(index, port) for index in range(2))):
        _assert_same(result, devices[0])
