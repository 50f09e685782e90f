"""Classification metrics, the report card of runs and weight files, and invalid requests."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from helpers import run_program, run_python, tiny_config
from mixer import trainer
from mixer.console import Console
from mixer.errors import UserError
from mixer.evaluation import classification, report, results, scores, suites, tables
from mixer.evaluation.evaluator import Batching
from mixer.evaluation.subject import open_subject
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.runs import data as run_data
from mixer.runs import directory
from mixer.runs.record import read_metrics
from mixer.training import losses
from mixer.weights import formats as weights
from mixer.weights import load as loading

pytestmark = pytest.mark.usefixtures("no_curves")


def _config(tfds_dir, suite):
    """A config whose programs `finished_run` has compiled too."""
    return tiny_config(tfds_dir, eval_suite=suite, eval_every_steps=None)


@pytest.fixture(scope="module")
def finished_workdir(tmp_path_factory, tfds_dir):
    """A run on the digits whose validation also evaluates the test set."""
    path = tmp_path_factory.mktemp("trained") / "run"
    trainer.train(_config(tfds_dir, "digits"), path)
    return path


@pytest.fixture
def workdir(finished_workdir, tmp_path):
    """A copy of `finished_workdir` that a test may change."""
    return shutil.copytree(finished_workdir, tmp_path / "run")


def _evaluate(*paths, **options):
    def opener(path):
        if (path / "config.json").exists():
            return lambda: open_subject(str(path), checkpoint_name="last")
        return lambda: open_subject(str(path), output=str(path.parent / "out"))

    report.evaluate([opener(path) for path in paths], report.Options(**options))


# Metrics.


def test_interval_is_the_wilson_interval():
    """The bounds are the roots of a quadratic equation; with no images they are 0 and 1."""
    for hits, count in ((0, 7), (3, 7), (8, 10), (6442, 10_000), (360, 360)):
        low, high = scores.interval(hits, count)
        share, z2 = hits / count, 1.959963984540054**2
        roots = np.roots([1 + z2 / count, -(2 * share + z2 / count), share**2])
        np.testing.assert_allclose([low, high], np.sort(roots.real), atol=1e-9)
    assert scores.interval(0, 0) == (0.0, 1.0)


def test_interval_covers_the_true_accuracy():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.6, 0.97):
        intervals = [scores.interval(hits, 200) for hits in rng.binomial(200, share, 2000)]
        coverage = np.mean([low <= share <= high for low, high in intervals])
        assert 0.92 < coverage < 0.985, (share, coverage)


def test_interval_of_a_class_mean_covers_the_true_mean():
    rng = np.random.default_rng(1)
    shares, counts = rng.uniform(0.5, 1, 30), rng.integers(5, 60, 30)
    is_covered = []
    for _ in range(500):
        accuracies = rng.binomial(counts, shares) / counts
        low, high = scores.mean_interval(accuracies, counts)
        is_covered.append(low <= shares.mean() <= high)
    assert 0.92 < np.mean(is_covered) <= 1.0


def test_calibration_error_matches_a_manual_computation():
    probability = np.array([0.05, 0.95, 0.97, 0.97, 1.0], np.float32)
    hit = np.array([True, True, False, True, True])
    # The bin (0, 1/15] contributes |1 - 0.05| (one image), (14/15, 1] |3 - 3.89| (four images).
    expected = (abs(1 - 0.05) + abs(3 - (0.95 + 0.97 + 0.97 + 1.0))) / 5
    assert scores.calibration_error(probability, hit) == pytest.approx(expected)
    edge = scores.calibration_error(np.array([1 / 15, 1 / 15 + 1e-9]), np.array([True, False]))
    # The two gaps are in different bins, so they do not cancel.
    assert edge == pytest.approx((1 - 1 / 15 + 1 / 15) / 2)
    assert scores.calibration_error(np.array([]), np.array([])) == 0.0


def _predictions(num_classes=6, size=500, seed=0):
    """Returns random labels without class 4, and logits that tend to be right."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([label for label in range(num_classes) if label != 4], size)
    logits = rng.normal(size=(size, num_classes)) + 2 * np.eye(num_classes)[labels]
    return labels.astype(np.int32), logits.astype(np.float32)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_metrics_match_scikit_learn():
    labels, logits = _predictions()
    step = classification.make_eval_step(lambda params, image: image, losses.softmax, 6)
    batch = {"image": logits, "label": labels, "index": np.arange(500)}
    columns = jax.device_get(step(None, batch))
    columns.pop("index")
    result = classification.summarize(classification.Predictions(**columns), 6)
    guesses = logits.argmax(axis=1)
    assert result.top1 == sk.accuracy_score(labels, guesses)
    np.testing.assert_array_equal(
        result.confusion, sk.confusion_matrix(labels, guesses, labels=range(6))
    )
    assert result.mean_per_class == pytest.approx(sk.balanced_accuracy_score(labels, guesses))
    assert np.isnan(result.per_class[4]) and np.isfinite(np.delete(result.per_class, 4)).all()
    top5 = sk.top_k_accuracy_score(labels, logits, k=5, labels=range(6))
    assert result.top5 == pytest.approx(top5)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert result.loss == pytest.approx(
        sk.log_loss(labels, probabilities, labels=range(6)), rel=1e-5
    )
    np.testing.assert_allclose(columns["probability"], probabilities.max(axis=1), rtol=1e-5)


def test_non_finite_logits_are_an_error(tfds_dir):
    split = run_data.open_split(tiny_config(tfds_dir), "val", None)
    step = classification.make_eval_step(
        lambda params, image: jnp.zeros((len(image), 10)).at[3].set(params), losses.softmax, 10
    )
    batching = Batching(sharding.make_mesh({"data": -1}), global_batch_size=60)
    with pytest.raises(UserError, match=r"\b3 images.*:3\b"):
        classification.evaluate(step, jnp.nan, split, batching=batching)
    assert classification.evaluate(step, 0.0, split, batching=batching).count == 180
    step = classification.make_eval_step(
        lambda params, image: jnp.zeros((len(image), 10)).at[3].set(params), losses.sigmoid, 10
    )
    with pytest.raises(UserError, match=r"\b3 images"):  # sigmoid(inf) is 1
        classification.evaluate(step, jnp.inf, split, batching=batching)


def test_skipped_batch_is_an_error(tfds_dir, monkeypatch):
    split = run_data.open_split(tiny_config(tfds_dir), "val", None)
    step = classification.make_eval_step(
        lambda params, image: jnp.zeros((len(image), 10)), losses.softmax, 10
    )
    batching = Batching(sharding.make_mesh({"data": -1}), global_batch_size=60)
    original_read = type(split).read

    def skip_batch_1(self, **bounds):
        return (batch for number, batch in enumerate(original_read(self, **bounds)) if number != 1)

    monkeypatch.setattr(type(split), "read", skip_batch_1)
    with pytest.raises(RuntimeError, match=r"\b60\b"):
        classification.evaluate(step, None, split, batching=batching)


# Evaluation during training.


def _evaluations(path):
    """Merges the recorded evaluation metrics; checks that none is recorded twice."""
    metrics = {}
    for row in read_metrics(path):
        keys = [key for key in row if key.startswith(("val", "digits", "fewshot"))]
        assert not metrics.keys() & set(keys)
        metrics |= {key: row[key] for key in keys}
    return metrics


def test_training_evaluates_eval_suite(finished_workdir):
    row = _evaluations(finished_workdir)
    assert 0 <= row["digits/top1"] <= 1 and row["digits_ema/count"] == 360
    results = json.loads((finished_workdir / "results.json").read_text())
    assert results["splits"]["digits"]["top1"] == row["digits/top1"]
    assert results["splits"]["test"] == results["splits"]["digits"]  # the same images


@pytest.mark.slow
def test_resumed_run_repeats_a_missing_few_shot_probe(tmp_path, tfds_dir, capsys):
    path = tmp_path / "run"
    config = _config(tfds_dir, "digits,fewshot")
    trainer.train(config, path)
    expected = _evaluations(path)
    assert 0 < expected["fewshot/10shot"] <= 1 and 0 < expected["fewshot_ema/25shot"] <= 1
    results = json.loads((path / "results.json").read_text())
    assert results["fewshot"]["digits"]["results"][2]["mean"] == expected["fewshot/10shot"]
    assert "digits_ema" in results["fewshot"]

    # As if the run had been killed after the validation and before the probe.
    rows = [json.loads(row) for row in (path / "metrics.jsonl").read_text().splitlines()]
    remaining = [row for row in rows if "fewshot/10shot" not in row and "digits/top1" not in row]
    assert 0 < len(remaining) < len(rows)
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in remaining))
    trainer.train(config, path)
    assert _evaluations(path) == expected

    _evaluate(path, splits=["val"])
    assert "| few-shot probe |" in (path / "results.md").read_text()  # recorded by the training run


def test_invalid_eval_suite_is_an_error(tfds_dir):
    def open_suite(**values):
        config = tiny_config(tfds_dir, model__num_classes=10, **values)
        return suites.open_suite(config, run_data.open_splits(config, None), ("fewshot",))

    tasks, probes = open_suite(eval_suite="digits,fewshot")
    assert list(tasks) == ["digits"] and probes == ["fewshot"]
    with pytest.raises(UserError, match=r"'digit'.*'digits'"):
        open_suite(eval_suite="digit")
    with pytest.raises(UserError, match=r"dataset\.val_split"):
        open_suite(eval_suite="digits", dataset__val_split="")
    synthetic = dict(dataset__name="synthetic", dataset__eval_preprocess="")
    with pytest.raises(UserError, match=r"eval_suite.*8 x 8"):
        open_suite(eval_suite="digits", **synthetic)
    synthetic["dataset__eval_preprocess"] = "decode"
    with pytest.raises(UserError, match=r"\b10\b.*\b7\b"):
        config = tiny_config(tfds_dir, eval_suite="digits", **synthetic)
        config.model.num_classes = 7
        suites.open_suite(config, run_data.open_splits(config, None), ())


# The report card.


@pytest.mark.slow
def test_missing_weight_file_does_not_stop_the_report_of_a_run(workdir, tmp_path, capsys):
    with pytest.raises(UserError, match=r"1 of 2.*nothing\.npz"):
        _evaluate(tmp_path / "nothing.npz", workdir, splits=["val", "test"], save_predictions=True)
    output = capsys.readouterr().out
    results = json.loads((workdir / "results.json").read_text())
    test = results["splits"]["test"]
    low, high = scores.interval(test["correct"], 360)
    assert test["top1_interval"] == [low, high] and low < test["top1"] < high
    card = (workdir / "results.md").read_text()
    for text in (output, card):
        assert f"{test['top1']:.2%}" in text and f"{100 * low:.2f}-{100 * high:.2f}" in text
        assert "test_ema" in text and "device-hours" in text and "Training: 192 images" in text
    for line in card.splitlines():  # no table row is cut off
        assert not line.startswith("|") or line.endswith("|")

    with np.load(workdir / "evaluation" / "test.npz", allow_pickle=False) as file:
        predictions = dict(file)
    assert predictions["hit"].sum() == test["correct"]
    assert len(set(predictions["id"].tolist())) == 360
    assert predictions["id"][0].startswith("digits-test.tfrecord-00000-of-00001:0")
    assert predictions["guesses"].shape == (360, 5)
    np.testing.assert_array_equal(
        predictions["hit"], predictions["guesses"][:, 0] == predictions["label"]
    )
    classes = json.loads((workdir / "evaluation" / "test.json").read_text())
    assert sum(row["images"] for row in classes["classes"]) == 360
    accuracies = [row["accuracy"] for row in classes["classes"]]
    assert np.mean(accuracies) == pytest.approx(test["mean_per_class"])
    confusion = np.zeros((10, 10), int)
    for label, guess, count in classes["confusion"]:
        confusion[label, guess] = count
    np.testing.assert_array_equal(
        confusion, sk.confusion_matrix(predictions["label"], predictions["guesses"][:, 0])
    )


@pytest.mark.slow
def test_results_of_other_checkpoints_get_separate_files(workdir):
    last_results = json.loads((workdir / "results.json").read_text())
    openers = [lambda: open_subject(str(workdir), checkpoint_name="8")]
    report.evaluate(openers, report.Options(splits=["test"]))
    assert json.loads((workdir / "results.json").read_text()) == last_results
    step_8_results = json.loads((workdir / "results_8.json").read_text())
    assert step_8_results["step"] == 8 and list(step_8_results["splits"]) == ["test", "test_ema"]
    assert (workdir / "results_8.md").exists() and (workdir / "evaluation" / "8_test.json").exists()


def test_new_step_or_weights_replace_recorded_results(tmp_path):
    step_4, step_8 = {"step": 4}, {"step": 8}
    directory.record_result(tmp_path, "last", step_4, "val", {"top1": 0.5})
    directory.record_result(tmp_path, "last", step_4, "test", {"top1": 0.25})
    directory.record_result(tmp_path, "last", step_4, "digits", {"mean": 1}, section="fewshot")
    (tmp_path / "results.md").write_text("a card of step 4")
    recorded = json.loads((tmp_path / "results.json").read_text())
    assert list(recorded["splits"]) == ["val", "test"]
    assert recorded["fewshot"]["digits"] == {"mean": 1}
    directory.record_result(tmp_path, "last", step_8, "val", {"top1": 0.75})
    recorded = json.loads((tmp_path / "results.json").read_text())
    assert recorded == {"step": 8, "splits": {"val": {"top1": 0.75}}}
    assert not (tmp_path / "results.md").exists()
    new_weights = {"step": 8, "weights": "another run"}
    directory.record_result(tmp_path, "last", new_weights, "test", {"top1": 1.0})
    recorded = json.loads((tmp_path / "results.json").read_text())
    assert recorded == {**new_weights, "splits": {"test": {"top1": 1.0}}}
    directory.record_result(tmp_path, "last", step_8, "val", {"top1": 0.75})
    assert "test" not in json.loads((tmp_path / "results.json").read_text())["splits"]


@pytest.mark.slow
def test_results_are_replaced_when_a_weight_file_changes(workdir, tmp_path):
    from flax import traverse_util

    loaded = loading.read(str(workdir), log=lambda line: None)
    arrays = traverse_util.flatten_dict(jax.device_get(loaded.params), sep="/")
    path, out = tmp_path / "w.npz", tmp_path / "out" / "results.json"
    weights.write_file(path, arrays, loaded.card, layout="published")
    _evaluate(path, suite=["digits"])
    config = tiny_config()
    config.update_from_flattened_dict(
        {f"dataset.{key}": value for key, value in run.read_run(workdir)[0].dataset.items()}
    )
    arrays["head/bias"] = arrays["head/bias"] + 1
    weights.write_file(path, arrays, loaded.card, layout="published")
    options = dict(config=config, output=str(out.parent))
    report.evaluate([lambda: open_subject(str(path), **options)], report.Options(splits=["val"]))
    assert list(json.loads(out.read_text())["splits"]) == ["digits_val"]


@pytest.mark.slow
def test_results_on_other_data_are_named_after_the_data_set(workdir):
    test_results = json.loads((workdir / "results.json").read_text())["splits"]["test"]
    config, _ = run.read_run(workdir)
    config.dataset.test_split = "train[:50]"
    openers = [lambda: open_subject(str(workdir), checkpoint_name="last", config=config)]
    report.evaluate(openers, report.Options(splits=["test"]))
    splits = json.loads((workdir / "results.json").read_text())["splits"]
    assert splits["test"] == test_results and splits["digits_test"]["count"] == 50


@pytest.mark.slow
def test_results_on_changed_data_are_named_after_the_data_set(workdir, capsys):
    test_results = json.loads((workdir / "results.json").read_text())["splits"]["test"]
    data_record = json.loads((workdir / "data.json").read_text())
    data_record["splits"]["test"]["fingerprint"] = "changed"
    (workdir / "data.json").write_text(json.dumps(data_record))
    _evaluate(workdir, splits=["test"])
    assert "360" in capsys.readouterr().out
    splits = json.loads((workdir / "results.json").read_text())["splits"]
    assert splits["test"] == test_results and splits["digits_test"]["count"] == 360


@pytest.mark.slow
def test_checkpoint_paths_use_the_data_and_loss_of_their_run(workdir, tmp_path, capsys):
    paths = [workdir / "checkpoints" / "8", workdir / "best"]
    openers = [
        lambda path=path: open_subject(str(path), output=str(tmp_path / path.name))
        for path in paths
    ]
    report.evaluate(openers, report.Options(splits=["test"]), output=str(tmp_path / "both"))
    assert "Comparison" in (tmp_path / "both" / "side_by_side.md").read_text()
    results = json.loads((tmp_path / "8" / "results.json").read_text())
    assert results["splits"]["test"]["count"] == 360 and results["loss"] == "softmax"


def test_command_reproduces_the_metrics_of_training_and_of_a_file(workdir, tmp_path, capsys):
    """The file contains the moving average of the run, so both have the same metrics."""
    recorded = json.loads((workdir / "results.json").read_text())
    loaded = loading.read(str(workdir), log=lambda line: None)
    from flax import traverse_util

    arrays = traverse_util.flatten_dict(jax.device_get(loaded.params), sep="/")
    weights.write_file(tmp_path / "digits.npz", arrays, loaded.card, layout="published")
    _evaluate(workdir, tmp_path / "digits.npz", suite=["digits"])
    output = capsys.readouterr().out
    assert "Comparison" in output
    run_results = json.loads((workdir / "results.json").read_text())
    for name in ("digits", "digits_ema"):
        assert recorded["splits"][name].items() <= run_results["splits"][name].items()
    assert run_results["step"] == 12
    assert run_results["splits"]["val"] == recorded["splits"]["val"]
    file_results = json.loads((tmp_path / "out" / "results.json").read_text())
    run_metrics = run_results["splits"]["digits_ema"]
    file_metrics = file_results["splits"]["digits"]
    for key in ("correct", "top1", "top5", "ece"):
        assert run_metrics[key] == file_metrics[key]
    assert file_metrics["loss"] == pytest.approx(run_metrics["loss"], rel=1e-6)
    assert file_results["weights"].endswith("digits.npz") and "step" not in file_results
    assert (tmp_path / "out" / "results.md").exists()


@pytest.mark.slow
def test_report_card_contains_few_shot_probe_and_throughput(workdir, capsys, monkeypatch):
    measure = report.throughput.measure
    monkeypatch.setattr(
        report.throughput,
        "measure",
        lambda *args, **options: measure(*args, **options, seconds=0.05),
    )
    _evaluate(workdir, suite=["fewshot", "throughput"], batch_sizes=(1, 4))
    results = json.loads((workdir / "results.json").read_text())
    assert [rate["batch_size"] for rate in results["throughput"]["model"]["rates"]] == [1, 4]
    assert len(results["fewshot"]["digits"]["results"][0]["accuracies"]) == 3
    assert "images/s per device" in (workdir / "results.md").read_text()
    assert "few-shot probe" in capsys.readouterr().out


def test_results_of_an_older_version_are_read():
    splits = {"val": {"top1": 0.5, "count": 4}, "edited": {"top1": 1.0}}
    old_results = results.parse(
        {"step": 3, "splits": splits, "transfer": {"vtab": {"markdown": []}}}
    )
    assert old_results.step == 3 and list(old_results.splits) == ["val"]
    val = old_results.splits["val"]
    assert val.top1_interval == scores.interval(2, 4) and val.mean_per_class is None
    table = results.side_by_side({"old": old_results})
    assert table.header == ["weights", "val"] and table.rows == [["old", "50.00% (15.00-85.00)"]]


def test_table_is_rendered_in_markdown_html_and_terminal(capsys):
    """Markup in names is escaped, including rich's; figures are aligned to the right."""
    table = tables.Table(("a|b", "[b]n"), [("<i>", "1"), ("c\nd", "22")])
    assert tables.markdown(table) == [
        "| a&#124;b | &#91;b&#93;n |",
        "|---|--:|",
        "| &#60;i&#62; | 1 |",
        "| c\\nd | 22 |".replace("\\", "&#92;"),
    ]
    tables.print_table(Console(), table)
    lines = capsys.readouterr().out.split("\n")
    assert [lines[1], *lines[3:5]] == ["| a|b  | [b]n |", "| <i>  |    1 |", "| c\\nd |   22 |"]
    assert "<td>&lt;i&gt;</td><td>1</td>" in tables.html_table(table)
    document = tables.markdown_document("# x", [["one line"], ["two", "lines"], table])
    assert document.startswith("# &#35; x\n\none line\n\ntwo  \nlines  \n\n| a&#124;b")


# Invalid requests.


def test_data_set_with_other_classes_is_an_error(tfds_dir):
    config = tiny_config(tfds_dir)
    split = run_data.open_split(config, "test", None)
    names = split.class_names
    assert suites.check_classes(split, names, 10) == ""
    assert suites.check_classes(split, None, 10) != ""
    numbers = dataclasses.replace(split, class_names=tuple("abcdefghij"))
    with pytest.raises(UserError, match=r"'a'.*'0'"):
        suites.check_classes(numbers, names, 10)
    with pytest.raises(UserError, match=r"\b10\b.*1,000"):
        suites.check_classes(split, "imagenet1k", 1000)
    with pytest.raises(UserError, match=r"'0'.*'9'"):
        suites.check_classes(split, names[::-1], 10)
    animals = tuple("abcdefghij")
    with pytest.raises(UserError, match=r"'0'.*'a'"):
        suites.check_classes(split, animals, 10)


def test_unknown_suite_or_missing_data_set_is_an_error(workdir, tmp_path):
    with pytest.raises(UserError, match=r"'imagnet'.*'imagenet'"):
        _evaluate(workdir, suite=["imagnet"])
    with pytest.raises(UserError, match="'cifar10'"):
        _evaluate(workdir, suite=["cifar10"], data_dir=str(tmp_path))
    golden = "tests/goldens/mixer_tiny_official.npz"
    openers = [lambda: open_subject(golden, output=str(tmp_path / "out"))]
    with pytest.raises(UserError, match=r"--config.*--suite"):
        report.evaluate(openers, report.Options(splits=["test"]))
    with pytest.raises(UserError, match="32 x 32"):
        report.evaluate(openers, report.Options(suite=["digits"]))


@pytest.mark.slow
def test_evaluate_runs_as_a_program(workdir):
    result = run_python("evaluate.py", f"--workdir={workdir}", "--suite=digits")
    assert str(workdir / "results.md") in result.stdout
    result = run_python("evaluate.py", "--workdir=/nowhere", check=False)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1


def test_invalid_flags_are_one_line_errors(finished_workdir):
    for arguments, message in (
        (["--workdir=/nowhere"], "/nowhere"),
        ([f"--workdir={finished_workdir}", "--checkpoint=best", "--tasks=dmlab"], "--tasks"),
        ([f"--workdir={finished_workdir}", "--suite=vtab", "--tasks=dmlap"], "--tasks='dmlap'"),
    ):
        result = run_program("evaluate.py", *arguments)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
