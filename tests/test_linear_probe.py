"""The linear probe, compared with scikit-learn and its optimality condition, and OmniBenchmark."""

import dataclasses
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from scipy import special
from sklearn.linear_model import LogisticRegression

from helpers import run_program, run_python, tiny_config
from mixer import run_files, trainer
from mixer.errors import UserError
from mixer.evaluation import linear_probe, logistic, omnibenchmark
from mixer.evaluation.evaluator import Batching, Setup
from mixer.models.mlp_mixer import MlpMixer
from mixer.parallel import sharding
from mixer.runs import data as run_data
from mixer.training import state as train_state

COUNT, WIDTH, CLASSES = 300, 12, 4
DIMENSIONS = dict(patch_size=2, hidden_dim=16, num_blocks=1, tokens_mlp_dim=8)
DIMENSIONS |= dict(channels_mlp_dim=24, num_classes=10)


def _features(seed=0):
    """Returns features far from the origin, with standard deviations from 1e-3 to 1, and labels."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, WIDTH))
    rotation, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(COUNT) % CLASSES
    features = (rng.normal(size=(COUNT, WIDTH)) + centres[labels]) * np.logspace(0, -3, WIDTH)
    return (features @ rotation + 5).astype(np.float32), labels.astype(np.int32)


def _fit(features, labels, penalty):
    mesh = sharding.make_mesh({"data": -1})
    fitter = logistic.Fitter(features, labels, CLASSES, mesh=mesh, penalty=penalty)
    return {lam: fitter.fit(lam) for lam in sorted(linear_probe.LAMBDAS, reverse=True)}


def _objective(fit, features, labels):
    """Returns the mean cross-entropy and its gradients for weights (centred features) and bias."""
    logits = features.astype(np.float64) @ fit.weights + fit.bias
    log_softmax = logits - special.logsumexp(logits, axis=1, keepdims=True)
    loss = -log_softmax[np.arange(len(labels)), labels].mean()
    error = (np.exp(log_softmax) - np.eye(CLASSES)[labels]) / len(labels)
    centred_features = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    return loss, centred_features.T @ error, error.sum(axis=0)


def test_squared_penalty_reaches_the_optimum_of_scikit_learn():
    features, labels = _features()
    test_features = _features(seed=1)[0].astype(np.float64)
    fits = _fit(features, labels, "squared")
    for lam, fit in fits.items():
        assert fit.converged and 0 < fit.iterations < 100
        loss, weight_grads, bias_grads = _objective(fit, features, labels)
        objective = loss + lam / 2 * np.sum(fit.weights**2)
        assert fit.objective == pytest.approx(objective, rel=1e-9)
        penalty_grads = lam * fit.weights
        residual = np.linalg.norm(weight_grads + penalty_grads) / np.linalg.norm(penalty_grads)
        assert residual < logistic.TOLERANCE
        np.testing.assert_allclose(bias_grads, 0, atol=1e-4)
        reference = LogisticRegression(C=1 / (lam * COUNT), solver="newton-cholesky", tol=1e-10)
        reference.fit(features.astype(np.float64), labels)
        probabilities = reference.predict_proba(features.astype(np.float64))
        optimum = -np.log(probabilities[np.arange(COUNT), labels]).mean()
        optimum += lam / 2 * np.sum(reference.coef_**2)
        assert objective == pytest.approx(optimum, abs=1e-6)
        logits = test_features @ fit.weights + fit.bias
        low, high = np.sort(logits, axis=1)[:, -2:].T
        assert np.all(
            (logits.argmax(axis=1) == reference.predict(test_features)) | (high - low < 1e-2)
        )


def test_norm_penalty_satisfies_its_optimality_condition(monkeypatch):
    """The gradients of loss and penalty cancel; if W = 0, the loss gradient is at most lam long."""
    monkeypatch.setattr(logistic, "CHUNK_VALUES", 125 * WIDTH)  # three chunks, the last one partial
    features, labels = _features()
    fits = _fit(features, labels, "norm")
    zeros = {lam for lam, fit in fits.items() if not fit.weights.any()}
    assert 1.0 in zeros and not zeros & {1e-5, 1e-4, 3e-4, 1e-3, 1e-2} and len(fits) == 7
    for lam, fit in fits.items():
        assert fit.converged
        loss, weight_grads, bias_grads = _objective(fit, features, labels)
        norm = np.linalg.norm(fit.weights)
        assert fit.objective == pytest.approx(loss + lam * norm, rel=1e-9)
        np.testing.assert_allclose(bias_grads, 0, atol=1e-2 * lam)
        if lam in zeros:
            assert np.linalg.norm(weight_grads) <= lam and fit.iterations == 0
            np.testing.assert_allclose(np.exp(fit.bias), 1 / CLASSES)
        else:
            residual = weight_grads + lam * fit.weights / norm
            assert np.linalg.norm(residual) < logistic.TOLERANCE * lam


# The probe of a model.


@pytest.fixture(scope="module")
def tiny():
    """A tiny model, random parameters, and their mesh."""
    model, mesh = MlpMixer(**DIMENSIONS), sharding.make_mesh({"data": -1})
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        train_state.abstract_params(model, (8, 8), mesh),
    )
    return model, params, mesh


def _setup(model, mesh):
    return Setup(
        model=model,
        batching=Batching(mesh, global_batch_size=64),
        every_steps=5,
        total_steps=12,
    )


def _evaluator(splits, model, mesh):
    """The evaluator of a run with `eval_suite=linear_probe`."""
    train = run_data.open_split(tiny_config(), "train", splits.train.class_names)
    setup = _setup(model, mesh)
    return linear_probe.LinearProbeEvaluator("synthetic", train, splits.val, setup)


def test_evaluator_holds_out_training_images_and_can_be_stopped(tiny):
    model, params, mesh = tiny
    splits = run_data.open_splits(tiny_config(), None)
    probe = _evaluator(splits, model, mesh)
    assert [step for step in range(1, 13) if probe.is_due(step)] == [5, 10, 12]
    (result,) = probe.run(params, None, lambda: False)
    assert (result.dataset, result.weights, result.section) == ("synthetic", "params", probe.name)
    assert result.name == "synthetic" and probe.key in result.metrics
    summary = json.loads(json.dumps(result.summary))
    count, num_held_out = splits.train.num_examples, summary["validation_count"]
    assert summary["train_count"] == count - num_held_out and num_held_out <= count / 10
    assert (summary["test"], summary["count"]) == (splits.val.name, splits.val.num_examples)
    assert summary["penalty"] == "squared" and len(summary["path"]) == 7
    # Among the penalties with the best validation accuracy, the strongest wins.
    best = max(summary["path"], key=lambda fit: (fit["validation_top1"], fit["lam"]))
    assert summary["lam"] == best["lam"] == result.metrics["linear_probe/lam"]
    assert summary["on_edge"] == (best["lam"] in (1e-5, 1))
    low, high = summary["top1_interval"]
    assert 0.15 < low < summary["top1"] < high and result.metrics[probe.key] == summary["top1"]
    assert f"{summary['top1']:.2%}" in result.line and "not converged" not in result.line
    table = linear_probe.make_table({"synthetic": summary})
    (row,) = table.rows
    assert row[0] == "synthetic" and row[table.header.index("top-1")] == f"{summary['top1']:.2%}"
    (note,) = linear_probe.notes({"synthetic": summary})
    assert f"{summary['train_count']:,}" in note
    for num_calls in (0, 20):  # stops at the first batch, in the optimizer
        answers = iter([False] * num_calls + [True] * 100)
        assert probe.run(params, params, lambda: next(answers)) is None  # noqa: B023


@pytest.mark.slow
def test_moving_average_gets_a_separate_result(tiny):
    model, params, mesh = tiny
    probe = _evaluator(run_data.open_splits(tiny_config(), None), model, mesh)
    average = jax.tree.map(lambda leaf: leaf * 0.5, params)
    params_result, ema_result = probe.run(params, average, lambda: False)
    assert (ema_result.weights, ema_result.name) == ("ema", "synthetic_ema")
    assert "linear_probe_ema/top1" in ema_result.metrics
    assert params_result.summary["path"] != ema_result.summary["path"]


@pytest.mark.slow
def test_run_records_the_probe_at_validation(tmp_path, tfds_dir):
    config = tiny_config(tfds_dir, eval_suite="linear_probe", eval_every_steps=None)
    trainer.train(config, tmp_path / "run")
    (row,) = (row for row in run_files.read_metrics(tmp_path / "run") if "linear_probe/lam" in row)
    results = run_files.read_results(tmp_path / "run", "last")["linear_probe"]
    assert row["step"] == 12 and row["linear_probe/top1"] == results["digits"]["top1"]
    assert row["linear_probe_ema/top1"] == results["digits_ema"]["top1"]


def test_unusable_splits_are_one_line_errors():
    train, test = (run_data.open_split(tiny_config(), name, None) for name in ("train", "test"))
    one_per_class = train.select(np.unique(train.labels(), return_index=True)[1])
    renamed_test = dataclasses.replace(test, class_names=tuple("abcdefghij"))
    for message, splits in {
        "test_split": (train, None, None),
        "synthetic test.*several": (train, train, dataclasses.replace(test, multi_label=True)),
        "10.*10": (train, None, renamed_test),
        "synthetic train.*one class": (
            train.select(np.flatnonzero(train.labels() == 4)),
            None,
            test,
        ),
        "synthetic train.*one image": (one_per_class, None, test),
    }.items():
        with pytest.raises(UserError, match=message) as error:
            linear_probe.assign(*splits)
        assert "\n" not in str(error.value)


def test_one_tenth_of_each_class_is_held_out():
    train = run_data.open_split(tiny_config(), "train", None)
    fit_split, held_out_split = linear_probe.hold_out(train)
    counts = np.bincount(train.labels(), minlength=10)
    np.testing.assert_array_equal(np.bincount(held_out_split.labels(), minlength=10), counts // 10)
    names = [
        {split.example_id(i) for i in range(split.num_examples)}
        for split in (fit_split, held_out_split)
    ]
    assert not names[0] & names[1] and sum(map(len, names)) == train.num_examples
    second_split = linear_probe.hold_out(train)[1]
    assert second_split.fingerprint == held_out_split.fingerprint


# Several devices and processes.

# Fits both penalties and evaluates 201 test images: on one and on eight devices, or as one of two
# processes. It does not import TensorFlow.
WORKER = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from helpers import tiny_config
from mixer.evaluation import linear_probe, logistic
from mixer.evaluation.evaluator import Batching
from mixer.models.mlp_mixer import MlpMixer
from mixer.parallel import sharding
from mixer.runs import data as run_data
from mixer.training import state as train_state

counts = (1, 8)
if len(sys.argv) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2,
        process_id=int(sys.argv[1]))
    counts = (2,)
model = MlpMixer(patch_size=2, hidden_dim=16, num_blocks=1, tokens_mlp_dim=8,
    channels_mlp_dim=24, num_classes=10)
train, test = (run_data.open_split(tiny_config(), name, None) for name in ("train", "test"))
splits = linear_probe.assign(train, None, test.select(np.arange(201)))
logistic.CHUNK_VALUES = 6400
results = []
for count in counts:
    axes = {"data": -1, "fsdp": 4 if count == 8 else 1}
    mesh = sharding.make_mesh(axes, jax.devices()[:count])
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype("float32"), leaf.sharding),
        train_state.abstract_params(model, (8, 8), mesh))
    batching = Batching(mesh, global_batch_size=16)
    for penalty in ("squared", "norm"):
        result = linear_probe.evaluate(model, params, splits, penalty=penalty, batching=batching)
        results.append(result.summary())
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def devices():
    """The results of both penalties on one device, and on eight."""
    result = run_python("-c", WORKER, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    results = json.loads(result.stdout.splitlines()[-1])
    return results[:2], results[2:]


def _assert_same(results, expected):
    """Compares all results except the residuals, which may differ by rounding."""
    for result, reference in zip(results, expected, strict=True):
        for fit, reference_fit in zip(result["path"], reference["path"], strict=True):
            assert fit["converged"] and reference_fit["converged"]
            assert fit["validation_top1"] == reference_fit["validation_top1"]
        assert {**result, "path": ()} == {**reference, "path": ()} and result["top1"] > 0.15


@pytest.mark.slow
def test_eight_devices_give_the_same_result_as_one(devices):
    _assert_same(*devices)


@pytest.mark.slow
def test_two_processes_give_the_same_result_as_one(devices):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_python, "-c", WORKER, index, port) for index in range(2)]
    for future in runs:
        _assert_same(devices[0], json.loads(future.result().stdout.splitlines()[-1]))


# OmniBenchmark.


def _write_realms(root, counts, seed=0):
    """Writes images whose brightness depends on the class, and annotation files.

    Args:
      root: the directory of the realms.
      counts: {realm: number of classes}.
      seed: the seed of the random pixels.
    """
    rng = np.random.default_rng(seed)
    for realm, classes in counts.items():
        for split, count in (("train", 8), ("val", 4), ("test", 5)):
            folder = root / realm / split / "images"
            folder.mkdir(parents=True)
            lines = []
            for number in range(count * classes):
                label = number % classes
                pixels = rng.integers(0, 120, (9, 11, 3)) + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
                lines.append(f"{split}/images/{number}.png {label}\n")
            (root / realm / f"{split}.txt").write_text("".join(lines))


def _open_realms(root, *names, preprocess=None):
    lines = []
    realms = omnibenchmark.open_realms(
        str(root), names, image_size=(8, 8), preprocess=preprocess, say=lines.append
    )
    return realms, lines


def test_realms_are_read_from_annotation_files(tmp_path):
    _write_realms(tmp_path, {"bird": 3, "others": 2})
    lines = (tmp_path / "bird" / "train.txt").read_text()
    (tmp_path / "bird" / "train.txt").write_text(f"\n{lines}train/images/0.png 4\n")
    (tmp_path / "readme").mkdir()
    realms, (message,) = _open_realms(tmp_path)
    assert list(realms) == ["bird", "others"]
    assert "20" in message and "aircraft" in message and "bird" not in message
    train, val, test = realms["bird"]
    assert [split.num_examples for split in (train, val, test)] == [25, 12, 15]
    assert train.class_names == ("0", "1", "2", "3", "4")
    assert train.labels().tolist() == [*[0, 1, 2] * 8, 4]  # two lines may list the same path
    assert test.example_id(3) == "test/images/3.png"
    batch = next(test.sequential_batches(start=0, stop=15, batch_size=15))
    assert batch["image"].shape == (15, 8, 8, 3) and batch["label"].tolist() == [0, 1, 2] * 5
    assert list(_open_realms(tmp_path, "others")[0]) == ["others"]
    # The ops after cropping are those of the model's own preprocessing.
    ops = omnibenchmark.preprocessing((8, 8), "decode|resize(8)|value_range(0, 1)")
    assert ops == (
        "decode|resize_small(8, method='bicubic', antialias=True)|central_crop(8)|value_range(0, 1)"
    )
    assert "resize((8, 4)" in omnibenchmark.preprocessing((8, 4), None)


def test_unusable_realms_are_one_line_errors(tmp_path):
    _write_realms(tmp_path, {"bird": 2, "car": 2})
    file = tmp_path / "bird" / "val.txt"
    lines = file.read_text()
    for text, message in {
        "a.png": r"bird/val\.txt, line 2: 'a.png'",
        "a.png x": r"line 2: 'a.png x'.*class number",
        "/a.png 1": r"line 2",
        "a.png -1": r"line 2",
        f"a.png {1 << 20}": r"line 2.*1048576",
        "val/images/none.png 1": r"bird/val\.txt, line 2: .*bird/val/images/none\.png",
        "val/images 1": r"line 2: .*bird/val/images.*folder",
    }.items():
        file.write_text(f"\n{text}\n{lines}")
        with pytest.raises(UserError, match=message) as error:
            _open_realms(tmp_path)
        assert "\n" not in str(error.value)
    file.write_text("\n")
    with pytest.raises(UserError, match=r"bird/val\.txt lists no images"):
        _open_realms(tmp_path)
    file.unlink()
    (tmp_path / "car" / "test.txt").unlink()
    with pytest.raises(UserError, match=r"bird/val\.txt, .*car/test\.txt"):
        _open_realms(tmp_path)
    with pytest.raises(UserError, match=r"--tasks='care'.*'car'"):
        _open_realms(tmp_path, "care")
    with pytest.raises(UserError, match="none is not a folder"):
        _open_realms(tmp_path / "none")
    with pytest.raises(UserError, match="contains no realms"):
        _open_realms(tmp_path / "bird")
    with pytest.raises(UserError, match="--data_dir is missing"):
        _open_realms("")


@pytest.fixture(scope="module")
def weights_file(tiny, tmp_path_factory):
    """An npz file with the weights of the tiny model."""
    _, params, _ = tiny
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **traverse_util.flatten_dict(params, sep="/"))
    return path


def _results(output):
    return json.loads((output / "results.json").read_text())["omnibenchmark"]


def _evaluate_suite(weights_file, root, output, *arguments):
    paths = f"--weights={weights_file}", f"--data_dir={root}", f"--output={output}"
    return run_program("evaluate.py", "--suite=omnibenchmark", *paths, *arguments)


@pytest.mark.slow
def test_interrupted_suite_resumes_with_the_remaining_realms(tmp_path, weights_file, monkeypatch):
    """The first run fails after one of two realms; the second computes the other."""
    root, output = tmp_path / "realms", tmp_path / "out"
    _write_realms(root, {"all": 3, "bird": 3})
    evaluate, penalties = linear_probe.evaluate, []

    def evaluate_once(*arguments, **options):
        if penalties:
            raise UserError("interrupted")
        penalties.append(options["penalty"])
        return evaluate(*arguments, **options)

    monkeypatch.setattr(linear_probe, "evaluate", evaluate_once)
    assert _evaluate_suite(weights_file, root, output).returncode == 2
    first_results = _results(output)
    assert list(first_results) == ["all"] and penalties == ["norm"]
    monkeypatch.setattr(linear_probe, "evaluate", evaluate)
    result = _evaluate_suite(weights_file, root, output)
    assert result.returncode == 0, result.stderr
    results = _results(output)
    assert list(results) == ["all", "bird"] and results["all"] == first_results["all"]
    assert re.search(r"realm 1 of 2: all: .*already recorded", result.stdout)
    assert re.findall(r"realm (. of 2: \w+): .* took ", result.stdout) == ["2 of 2: bird"]
    top1 = [summary["top1"] for summary in results.values()]
    assert all(0.5 < share <= 1 for share in top1)
    card = (output / "results.md").read_text()
    assert f"| mean | 2 realms | {np.mean(top1):.2%} |" in card
    assert "20 of the benchmark's 21" in result.stdout and "20 of the benchmark's 21" in card


@pytest.mark.slow
def test_realm_with_changed_images_is_recomputed(tmp_path, weights_file):
    root, output = tmp_path / "realms", tmp_path / "out"
    _write_realms(root, {"animals": 3, "bird": 3, "car": 3})
    assert _evaluate_suite(weights_file, root, output).returncode == 0
    first_results = _results(output)
    file = root / "bird" / "val.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    result = _evaluate_suite(weights_file, root, output, "--tasks=bird,car")
    assert re.search(r"realm 1 of 2: bird: .* took ", result.stdout)
    assert re.search(r"realm 2 of 2: car: .*already recorded", result.stdout)
    results = _results(output)
    assert results["bird"]["validation_count"] == 11
    assert results["animals"] == first_results["animals"]


def test_damaged_result_is_named_in_the_error(tmp_path):
    for section, value in {"linear_probe": {"lam": 1}, "omnibenchmark": {"realm": 3}}.items():
        (tmp_path / "results.json").write_text(json.dumps({section: {"digits": value}}))
        with pytest.raises(UserError, match=rf"results\.json: {section}\.digits\."):
            run_files.read_results(tmp_path, "last")


@pytest.mark.slow
def test_report_card_of_a_run_contains_the_probe(finished_run, tmp_path):
    result = run_program(
        "evaluate.py",
        f"--workdir={finished_run}",
        "--suite=linear_probe",
        f"--output={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    section = json.loads((tmp_path / "results.json").read_text())["linear_probe"]
    assert list(section) == ["digits", "digits_ema"]
    for name, summary in section.items():
        assert f"| {name} | 360 | {summary['top1']:.2%} |" in (tmp_path / "results.md").read_text()
        # The run has a validation split.
        assert "test" in summary["test"] and "validation" in summary["validation"]
        assert summary["top1"] > 0.5 and summary["mean_per_class"] > 0.5


def test_tasks_flag_without_a_suite_of_tasks_is_an_error():
    for flags in (["--suite=fewshot"], ["--suite=omnibenchmark,vtab"]):
        result = run_program("evaluate.py", "--weights=none.npz", "--tasks=bird", *flags)
        assert result.returncode == 2 and "--tasks" in result.stderr
