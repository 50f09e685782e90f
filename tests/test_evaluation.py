"""Figures of a classification, the report card of runs and files, and what is refused."""

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


def _config(tfds_dir, suite):
    """A run that compiles what `finished_run` compiles."""
    return tiny_config(tfds_dir, eval_suite=suite, eval_every_steps=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tfds_dir):
    """A run on the digits that evaluates the test set at its validation."""
    path = tmp_path_factory.mktemp("trained") / "run"
    trainer.train(_config(tfds_dir, "digits"), path)
    return path


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that run, to write into."""
    return shutil.copytree(trained, tmp_path / "run")


def _evaluate(*paths, **options):
    def opened(path):
        if (path / "config.json").exists():
            return lambda: open_subject(str(path), checkpoint_name="last")
        return lambda: open_subject(str(path), output=str(path.parent / "out"))

    report.evaluate([opened(path) for path in paths], report.Options(**options))


# Figures.


def test_intervals_are_wilsons():
    """Against the roots of the quadratic that the interval solves, and its ends."""
    for hits, count in ((0, 7), (3, 7), (8, 10), (6442, 10_000), (360, 360)):
        low, high = scores.interval(hits, count)
        share, z2 = hits / count, 1.959963984540054**2
        roots = np.roots([1 + z2 / count, -(2 * share + z2 / count), share**2])
        np.testing.assert_allclose([low, high], np.sort(roots.real), atol=1e-9)
    assert scores.interval(0, 0) == (0.0, 1.0)


def test_interval_covers_its_share_of_draws():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.6, 0.97):
        ends = [scores.interval(hits, 200) for hits in rng.binomial(200, share, 2000)]
        covered = np.mean([low <= share <= high for low, high in ends])
        assert 0.92 < covered < 0.985, (share, covered)


def test_interval_of_a_mean_over_classes_covers_its_share_of_draws():
    rng = np.random.default_rng(1)
    shares, counts = rng.uniform(0.5, 1, 30), rng.integers(5, 60, 30)
    covered = []
    for _ in range(500):
        found = rng.binomial(counts, shares) / counts
        low, high = scores.mean_interval(found, counts)
        covered.append(low <= shares.mean() <= high)
    assert 0.92 < np.mean(covered) <= 1.0


def test_calibration_error_by_hand():
    probability = np.array([0.05, 0.95, 0.97, 0.97, 1.0], np.float32)
    hit = np.array([True, True, False, True, True])
    # Bins (0, 1/15], (14/15, 1]: |1 - 0.05| of one image, |3 - 3.89| of four.
    expected = (abs(1 - 0.05) + abs(3 - (0.95 + 0.97 + 0.97 + 1.0))) / 5
    assert scores.calibration_error(probability, hit) == pytest.approx(expected)
    edge = scores.calibration_error(np.array([1 / 15, 1 / 15 + 1e-9]), np.array([True, False]))
    assert edge == pytest.approx((1 - 1 / 15 + 1 / 15) / 2)  # two bins: gaps do not cancel
    assert scores.calibration_error(np.array([]), np.array([])) == 0.0


def _predictions(num_classes=6, size=500, seed=0):
    """Logits of random images, and labels that lack class 4."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([label for label in range(num_classes) if label != 4], size)
    logits = rng.normal(size=(size, num_classes)) + 2 * np.eye(num_classes)[labels]
    return labels.astype(np.int32), logits.astype(np.float32)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_figures_equal_scikit_learns():
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


def test_logits_that_are_not_finite_are_refused(tfds_dir):
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


def test_an_example_that_is_missing_or_twice_is_a_fault(tfds_dir, monkeypatch):
    split = run_data.open_split(tiny_config(tfds_dir), "val", None)
    step = classification.make_eval_step(
        lambda params, image: jnp.zeros((len(image), 10)), losses.softmax, 10
    )
    batching = Batching(sharding.make_mesh({"data": -1}), global_batch_size=60)

    read = type(split).read

    def read_but_one_batch(self, **places):
        return (batch for number, batch in enumerate(read(self, **places)) if number != 1)

    monkeypatch.setattr(type(split), "read", read_but_one_batch)
    with pytest.raises(RuntimeError, match=r"\b60\b"):
        classification.evaluate(step, None, split, batching=batching)


# The schedule, and the command, by the same code.


def _evaluations(workdir):
    """All that was recorded of the last step's evaluation, in one; each number only once."""
    found = {}
    for row in read_metrics(workdir):
        keys = [key for key in row if key.startswith(("val", "digits", "fewshot"))]
        assert not found.keys() & set(keys)
        found |= {key: row[key] for key in keys}
    return found


def test_training_evaluates_what_eval_suite_names(trained):
    row = _evaluations(trained)
    assert 0 <= row["digits/top1"] <= 1 and row["digits_ema/count"] == 360
    results = json.loads((trained / "results.json").read_text())
    assert results["splits"]["digits"]["top1"] == row["digits/top1"]
    assert results["splits"]["test"] == results["splits"]["digits"]  # the same images


@pytest.mark.slow
def test_probes_of_the_schedule_and_an_evaluation_that_was_missed(tmp_path, tfds_dir, capsys):
    path = tmp_path / "run"
    config = _config(tfds_dir, "digits,fewshot")
    trainer.train(config, path)
    before = _evaluations(path)
    assert 0 < before["fewshot/10shot"] <= 1 and 0 < before["fewshot_ema/25shot"] <= 1
    results = json.loads((path / "results.json").read_text())
    assert results["fewshot"]["digits"]["results"][2]["mean"] == before["fewshot/10shot"]
    assert "digits_ema" in results["fewshot"]

    # Killed before the probe; the validation was recorded by then.
    rows = [json.loads(row) for row in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "fewshot/10shot" not in row and "digits/top1" not in row]
    assert 0 < len(kept) < len(rows)
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    trainer.train(config, path)
    assert _evaluations(path) == before

    _evaluate(path, splits=["val"])
    assert "| few-shot probe |" in (path / "results.md").read_text()  # of the training


def test_eval_suite_mistakes_are_refused(tfds_dir):
    def opened(**values):
        config = tiny_config(tfds_dir, model__num_classes=10, **values)
        return suites.open_suite(config, run_data.open_splits(config, None), ("fewshot",))

    tasks, probes = opened(eval_suite="digits,fewshot")
    assert list(tasks) == ["digits"] and probes == ["fewshot"]
    with pytest.raises(UserError, match=r"'digit'.*'digits'"):
        opened(eval_suite="digit")
    with pytest.raises(UserError, match=r"dataset\.val_split"):
        opened(eval_suite="digits", dataset__val_split="")
    synthetic = dict(dataset__name="synthetic", dataset__eval_preprocess="")
    with pytest.raises(UserError, match=r"eval_suite.*8 x 8"):
        opened(eval_suite="digits", **synthetic)
    synthetic["dataset__eval_preprocess"] = "decode"
    with pytest.raises(UserError, match=r"\b10\b.*\b7\b"):
        config = tiny_config(tfds_dir, eval_suite="digits", **synthetic)
        config.model.num_classes = 7
        suites.open_suite(config, run_data.open_splits(config, None), ())


# The report card.


def test_report_card_of_a_run_beside_a_file_that_is_missing(copied, tmp_path, capsys):
    with pytest.raises(UserError, match=r"1 of 2.*nothing\.npz"):
        _evaluate(tmp_path / "nothing.npz", copied, splits=["val", "test"], save_predictions=True)
    out = capsys.readouterr().out
    results = json.loads((copied / "results.json").read_text())
    test = results["splits"]["test"]
    low, high = scores.interval(test["correct"], 360)
    assert test["top1_interval"] == [low, high] and low < test["top1"] < high
    card = (copied / "results.md").read_text()
    for text in (out, card):
        assert f"{test['top1']:.2%}" in text and f"{100 * low:.2f}-{100 * high:.2f}" in text
        assert "test_ema" in text and "device-hours" in text and "Training: 192 images" in text
    for line in card.splitlines():  # tables are whole
        assert not line.startswith("|") or line.endswith("|")

    with np.load(copied / "evaluation" / "test.npz", allow_pickle=False) as saved:
        predictions = dict(saved)
    assert predictions["hit"].sum() == test["correct"]
    assert len(set(predictions["id"].tolist())) == 360
    assert predictions["id"][0].startswith("digits-test.tfrecord-00000-of-00001:0")
    assert predictions["guesses"].shape == (360, 5)
    np.testing.assert_array_equal(
        predictions["hit"], predictions["guesses"][:, 0] == predictions["label"]
    )
    classes = json.loads((copied / "evaluation" / "test.json").read_text())
    assert sum(each["images"] for each in classes["classes"]) == 360
    accuracies = [each["accuracy"] for each in classes["classes"]]
    assert np.mean(accuracies) == pytest.approx(test["mean_per_class"])
    confusion = np.zeros((10, 10), int)
    for label, guess, count in classes["confusion"]:
        confusion[label, guess] = count
    np.testing.assert_array_equal(
        confusion, sk.confusion_matrix(predictions["label"], predictions["guesses"][:, 0])
    )


def test_results_of_another_checkpoint_have_their_own_file(copied):
    before = json.loads((copied / "results.json").read_text())
    opened = [lambda: open_subject(str(copied), checkpoint_name="8")]
    report.evaluate(opened, report.Options(splits=["test"]))
    assert json.loads((copied / "results.json").read_text()) == before
    other = json.loads((copied / "results_8.json").read_text())
    assert other["step"] == 8 and list(other["splits"]) == ["test", "test_ema"]
    assert (copied / "results_8.md").exists() and (copied / "evaluation" / "8_test.json").exists()


def test_results_of_another_step_are_replaced(tmp_path):
    four, eight = {"step": 4}, {"step": 8}
    directory.record_result(tmp_path, "last", four, "val", {"top1": 0.5})
    directory.record_result(tmp_path, "last", four, "test", {"top1": 0.25})
    directory.record_result(tmp_path, "last", four, "digits", {"mean": 1}, section="fewshot")
    (tmp_path / "results.md").write_text("a card of step 4")
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["splits"]) == ["val", "test"] and found["fewshot"]["digits"] == {"mean": 1}
    directory.record_result(tmp_path, "last", eight, "val", {"top1": 0.75})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {"step": 8, "splits": {"val": {"top1": 0.75}}}
    assert not (tmp_path / "results.md").exists()
    elsewhere = {"step": 8, "weights": "another run"}
    directory.record_result(tmp_path, "last", elsewhere, "test", {"top1": 1.0})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {**elsewhere, "splits": {"test": {"top1": 1.0}}}
    directory.record_result(tmp_path, "last", eight, "val", {"top1": 0.75})
    assert "test" not in json.loads((tmp_path / "results.json").read_text())["splits"]


@pytest.mark.slow
def test_results_of_another_file_by_the_same_name_are_replaced(copied, tmp_path):
    from flax import traverse_util

    loaded = loading.read(str(copied), log=lambda line: None)
    arrays = traverse_util.flatten_dict(jax.device_get(loaded.params), sep="/")
    path, out = tmp_path / "w.npz", tmp_path / "out" / "results.json"
    weights.write_file(path, arrays, loaded.card, layout="published")
    _evaluate(path, suite=["digits"])
    config = tiny_config()
    config.update_from_flattened_dict(
        {f"dataset.{key}": value for key, value in run.read_run(copied)[0].dataset.items()}
    )
    arrays["head/bias"] = arrays["head/bias"] + 1
    weights.write_file(path, arrays, loaded.card, layout="published")
    how = dict(config=config, output=str(out.parent))
    report.evaluate([lambda: open_subject(str(path), **how)], report.Options(splits=["val"]))
    assert list(json.loads(out.read_text())["splits"]) == ["digits_val"]


def test_data_of_another_config_does_not_pass_for_the_runs_own(copied):
    before = json.loads((copied / "results.json").read_text())["splits"]["test"]
    config, _ = run.read_run(copied)
    config.dataset.test_split = "train[:50]"
    opened = [lambda: open_subject(str(copied), checkpoint_name="last", config=config)]
    report.evaluate(opened, report.Options(splits=["test"]))
    after = json.loads((copied / "results.json").read_text())["splits"]
    assert after["test"] == before and after["digits_test"]["count"] == 50


@pytest.mark.slow
def test_data_that_has_changed_does_not_pass_for_the_runs_own(copied, capsys):
    before = json.loads((copied / "results.json").read_text())["splits"]["test"]
    data = json.loads((copied / "data.json").read_text())
    data["splits"]["test"]["fingerprint"] = "of other images"
    (copied / "data.json").write_text(json.dumps(data))
    _evaluate(copied, splits=["test"])
    assert "360" in capsys.readouterr().out
    after = json.loads((copied / "results.json").read_text())["splits"]
    assert after["test"] == before and after["digits_test"]["count"] == 360


@pytest.mark.slow
def test_weights_of_a_run_bring_its_data_and_loss(copied, tmp_path, capsys):
    paths = [copied / "checkpoints" / "8", copied / "best"]
    opened = [
        lambda path=path: open_subject(str(path), output=str(tmp_path / path.name))
        for path in paths
    ]
    report.evaluate(opened, report.Options(splits=["test"]), output=str(tmp_path / "both"))
    assert "Comparison" in (tmp_path / "both" / "side_by_side.md").read_text()
    results = json.loads((tmp_path / "8" / "results.json").read_text())
    assert results["splits"]["test"]["count"] == 360 and results["loss"] == "softmax"


def test_a_run_is_evaluated_as_by_its_schedule_and_a_file_as_the_run_it_is_from(
    copied, tmp_path, capsys
):
    """Side by side: the moving average of the run, which is what the file holds, the same bits."""
    before = json.loads((copied / "results.json").read_text())
    loaded = loading.read(str(copied), log=lambda line: None)
    from flax import traverse_util

    arrays = traverse_util.flatten_dict(jax.device_get(loaded.params), sep="/")
    weights.write_file(tmp_path / "digits.npz", arrays, loaded.card, layout="published")
    _evaluate(copied, tmp_path / "digits.npz", suite=["digits"])
    out = capsys.readouterr().out
    assert "Comparison" in out
    run_results = json.loads((copied / "results.json").read_text())
    for name in ("digits", "digits_ema"):
        assert before["splits"][name].items() <= run_results["splits"][name].items()
    assert run_results["step"] == 12
    assert run_results["splits"]["val"] == before["splits"]["val"]
    file_results = json.loads((tmp_path / "out" / "results.json").read_text())
    there, here = run_results["splits"]["digits_ema"], file_results["splits"]["digits"]
    for key in ("correct", "top1", "top5", "ece"):
        assert there[key] == here[key]
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-6)
    assert file_results["weights"].endswith("digits.npz") and "step" not in file_results
    assert (tmp_path / "out" / "results.md").exists()


@pytest.mark.slow
def test_fewshot_and_throughput_of_a_run(copied, capsys, monkeypatch):
    measure = report.throughput.measure
    monkeypatch.setattr(
        report.throughput, "measure", lambda *args, **how: measure(*args, **how, seconds=0.05)
    )
    _evaluate(copied, suite=["fewshot", "throughput"], batch_sizes=(1, 4))
    results = json.loads((copied / "results.json").read_text())
    assert [each["batch_size"] for each in results["throughput"]["model"]["rates"]] == [1, 4]
    assert len(results["fewshot"]["digits"]["results"][0]["accuracies"]) == 3
    assert "images/s per device" in (copied / "results.md").read_text()
    assert "few-shot probe" in capsys.readouterr().out


def test_results_of_older_code_lack_what_it_did_not_record():
    splits = {"val": {"top1": 0.5, "count": 4}, "edited": {"top1": 1.0}}
    saved = results.parse({"step": 3, "splits": splits, "transfer": {"vtab": {"markdown": []}}})
    assert saved.step == 3 and list(saved.splits) == ["val"]
    val = saved.splits["val"]
    assert val.top1_interval == scores.interval(2, 4) and val.mean_per_class is None
    table = results.side_by_side({"old": saved})
    assert table.header == ["weights", "val"] and table.rows == [["old", "50.00% (15.00-85.00)"]]


def test_a_table_is_the_same_in_markdown_html_and_terminal(capsys):
    """Names may hold markup of any of them, or of rich; figures are aligned to the right."""
    table = tables.Table(("a|b", "[b]n"), [("<i>", "1"), ("c\nd", "22")])
    assert tables.markdown(table) == [
        "| a&#124;b | &#91;b&#93;n |",
        "|---|--:|",
        "| &#60;i&#62; | 1 |",
        "| c\\nd | 22 |".replace("\\", "&#92;"),
    ]
    tables.print_table(Console(), table)
    printed = capsys.readouterr().out.split("\n")
    assert [printed[1], *printed[3:5]] == ["| a|b  | [b]n |", "| <i>  |    1 |", "| c\\nd |   22 |"]
    assert "<td>&lt;i&gt;</td><td>1</td>" in tables.html_table(table)
    document = tables.markdown_document("# x", [["one line"], ["two", "lines"], table])
    assert document.startswith("# &#35; x\n\none line\n\ntwo  \nlines  \n\n| a&#124;b")


# Refusals.


def test_sets_of_other_classes_are_refused(tfds_dir):
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


def test_unknown_suites_and_files_without_data_are_refused(copied, tmp_path):
    with pytest.raises(UserError, match=r"'imagnet'.*'imagenet'"):
        _evaluate(copied, suite=["imagnet"])
    with pytest.raises(UserError, match="'cifar10'"):
        _evaluate(copied, suite=["cifar10"], data_dir=str(tmp_path))
    golden = "tests/goldens/mixer_tiny_official.npz"
    opened = [lambda: open_subject(golden, output=str(tmp_path / "out"))]
    with pytest.raises(UserError, match=r"--config.*--suite"):
        report.evaluate(opened, report.Options(splits=["test"]))
    with pytest.raises(UserError, match="32 x 32"):
        report.evaluate(opened, report.Options(suite=["digits"]))


@pytest.mark.slow
def test_the_command_is_a_program(copied):
    done = run_python("evaluate.py", f"--workdir={copied}", "--suite=digits")
    assert str(copied / "results.md") in done.stdout
    done = run_python("evaluate.py", "--workdir=/nowhere", check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_mistakes_of_a_command_line_are_one_line(trained):
    for arguments, message in (
        (["--workdir=/nowhere"], "/nowhere"),
        ([f"--workdir={trained}", "--checkpoint=best", "--tasks=dmlab"], "--tasks"),
        ([f"--workdir={trained}", "--suite=vtab", "--tasks=dmlap"], "--tasks='dmlap'"),
    ):
        done = run_program("evaluate.py", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
