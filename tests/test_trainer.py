import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from helpers import (
    ROOT,
    assert_close,
    assert_same_bits,
    environment,
    final_state,
    read_reproducible_metrics,
    run_program,
    run_python,
    tiny_config,
)
from mixer import trainer
from mixer.errors import UserError
from mixer.evaluation import classification
from mixer.parallel import sharding
from mixer.runs import record as metrics
from mixer.runs.record import read_metrics
from mixer.training import updates as stepping

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished run, to continue or to damage."""
    return shutil.copytree(finished_run, tmp_path / "finished")


@pytest.fixture
def unfinished_run(run_copy):
    """A copy of the finished run that has stopped at step 8 of 12."""
    shutil.rmtree(run_copy / "checkpoints" / "12")
    return run_copy


def _assert_same_record(workdir, expected):
    rows, expected = read_reproducible_metrics(workdir), read_reproducible_metrics(expected)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-6)


def test_finished_run_directory_has_every_file(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {"checkpoints", "best", "config.json", "data.json", "metrics.jsonl"}
    assert "results.json" in names
    steps = [path.name for path in sorted((finished_run / "checkpoints").iterdir())]
    assert steps == ["12", "8"]
    data = json.loads((finished_run / "data.json").read_text())
    assert data["class_names"] == [str(digit) for digit in range(10)]
    assert data["splits"]["train"]["num_examples"] == 1257
    results = json.loads((finished_run / "results.json").read_text())
    assert results["step"] == 12 and results["splits"]["test"]["count"] == 360
    assert results["splits"]["val"]["count"] == 180
    config = json.loads((finished_run / "config.json").read_text())
    assert config["model"]["num_classes"] == 10


def test_metrics_are_recorded_at_every_log_step(finished_run):
    rows = read_metrics(finished_run)
    logged = [row["step"] for row in rows if "train/loss" in row]
    assert logged == [2, 4, 6, 8, 10, 12]
    for row in rows:
        if "train/loss" in row:
            assert {"train/accuracy", "train/grad_norm", "train/param_norm"} <= set(row)
            assert {"train/learning_rate", "perf/images_per_second_per_device"} <= set(row)
            assert 0 <= row["perf/data_wait_share"] <= 1 and row["perf/images_per_second"] > 0
            assert row["train/epoch"] == pytest.approx(row["step"] * 16 / 1257)
    assert [row["step"] for row in rows if "val/top1" in row] == [6, 12]
    assert [row["step"] for row in rows if "test/top1" in row] == [12]


@pytest.mark.slow
def test_restart_runs_the_evaluation_that_crashed(tmp_path, tfds_dir, finished_run, monkeypatch):
    """A fault in an evaluator loses no training, and the next start runs the evaluation."""
    config = tiny_config(tfds_dir, checkpoint__every_steps=6)

    def fail(*args, **kwargs):
        raise RuntimeError("no evaluation today")

    with monkeypatch.context() as patch:
        patch.setattr(classification, "evaluate", fail)
        with pytest.raises(RuntimeError, match="no evaluation today"):
            trainer.train(config, tmp_path)
    assert (tmp_path / "checkpoints" / "6").is_dir()
    trainer.train(config, tmp_path)
    assert_close(final_state(tmp_path), final_state(finished_run))
    _assert_same_record(tmp_path, finished_run)


def test_restart_skips_a_damaged_newest_checkpoint(run_copy, tfds_dir, finished_run, capsys):
    shutil.rmtree(run_copy / "checkpoints" / "12" / "state" / "d")
    trainer.train(tiny_config(tfds_dir), run_copy)
    out = capsys.readouterr().out
    assert "12 is damaged" in out and "continuing from step 8" in out
    assert_close(final_state(run_copy), final_state(finished_run))
    _assert_same_record(run_copy, finished_run)


def test_partial_last_line_of_the_metrics_is_dropped(run_copy, finished_run):
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "train/lo')
    assert len(read_metrics(run_copy)) == len(read_metrics(finished_run))
    writer = metrics.MetricWriter(run_copy, last_step=6, tensorboard=False)
    writer.write(8, {"train/loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_metrics(run_copy)] == [2, 4, 6, 6, 8]


def _tensorboard(workdir):
    """(step, value) of each tag in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return {
        tag: [
            (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }


@pytest.mark.slow
def test_tensorboard_matches_the_metrics_after_a_restart(tmp_path):
    config = tiny_config(tensorboard=True, checkpoint__every_steps=8)
    trainer.train(config, tmp_path)
    (tmp_path / "checkpoints" / "12").rename(tmp_path / "removed")
    trainer.train(config, tmp_path)  # from step 8 again
    actual = _tensorboard(tmp_path)
    for tag in ("train/loss", "val/top1", "train/learning_rate", "test/top1"):
        expected = [(row["step"], row[tag]) for row in read_metrics(tmp_path) if tag in row]
        np.testing.assert_allclose(actual[tag], expected, rtol=1e-6)


def test_finished_run_only_evaluates(run_copy, tfds_dir, capsys):
    saved_state = final_state(run_copy)
    trainer.train(tiny_config(tfds_dir), run_copy)
    out = capsys.readouterr().out
    assert "finished" in out and re.search(r"test accuracy \d+\.\d+% \(\d+ of 360\)", out)
    assert_same_bits(final_state(run_copy), saved_state)


@pytest.mark.slow
def test_finished_run_can_be_extended(run_copy, tfds_dir, capsys):
    trainer.train(tiny_config(tfds_dir, total_steps=14), run_copy)
    assert "continuing from step 12\n" in capsys.readouterr().out
    assert int(final_state(run_copy)["step"]) == 14


@pytest.mark.parametrize(
    "change",
    [
        dict(model__hidden_dim=32),
        dict(total_steps=6),
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                dict(optimizer__peak_lr=1e-2),
                dict(global_batch_size=8),
                dict(seed=1),
                dict(schedule__decay="linear"),
                dict(dataset__train_split="validation"),
            )
        ),
    ],
    ids=str,
)
def test_changed_config_is_refused_by_key(run_copy, tfds_dir, change):
    key = re.escape(next(iter(change)).replace("__", "."))
    with pytest.raises(UserError, match=rf"{key}: .* -> .*--allow_config_change"):
        trainer.train(tiny_config(tfds_dir, **change), run_copy)


@pytest.mark.slow
def test_longer_unfinished_run_is_refused_and_allowed_on_request(unfinished_run, tfds_dir):
    config = tiny_config(tfds_dir, total_steps=14)
    with pytest.raises(UserError, match=r"total_steps: 12 -> 14"):
        trainer.train(config, unfinished_run)
    trainer.train(config, unfinished_run, allow_config_change=True)
    assert int(final_state(unfinished_run)["step"]) == 14


@pytest.mark.slow
def test_intervals_may_change_and_the_best_checkpoint_survives(unfinished_run, tfds_dir):
    config = tiny_config(tfds_dir, log_every_steps=1, eval_every_steps=1)
    config.checkpoint.update(every_steps=2, keep_last=1)
    trainer.train(config, unfinished_run)
    assert [path.name for path in (unfinished_run / "checkpoints").iterdir()] == ["12"]
    rows = [row for row in read_metrics(unfinished_run) if "val_ema/top1" in row]
    assert [row["step"] for row in rows] == [6, 8, 9, 10, 11, 12]
    tops = {row["step"]: row["val_ema/top1"] for row in rows}
    best = max(tops, key=lambda step: (tops[step], -step))
    assert [path.name for path in (unfinished_run / "best").iterdir()] == [str(best)]


@pytest.mark.slow
def test_new_run_initializes_from_the_weights_of_another(finished_run, tfds_dir, tmp_path):
    init_from = str(finished_run)
    config = tiny_config(tfds_dir, init_from=init_from, optimizer__peak_lr=0.0, total_steps=2)
    config.schedule.warmup_steps = 0
    trainer.train(config, tmp_path)
    assert_same_bits(final_state(tmp_path)["params"], final_state(finished_run)["ema_params"])
    config = tiny_config(tfds_dir, init_from=init_from, model__hidden_dim=8)
    with pytest.raises(UserError, match=r"stem/bias: .*\(16,\).*\(8,\)"):
        trainer.train(config, tmp_path / "other")


@pytest.mark.slow
def test_lengths_in_epochs_and_examples_become_steps(tmp_path):
    """2,048 synthetic images, batch 16: 128 steps an epoch."""
    config = tiny_config(total_steps=None, total_epochs=0.0625, eval_every_steps=None)
    config.update(eval_every_epochs=0.03125, log_every_steps=1)
    config.schedule.update(warmup_steps=None, warmup_examples=33)
    trainer.train(config, tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "val/top1" in row] == [4, 8]
    saved_config = json.loads((tmp_path / "config.json").read_text())
    assert saved_config["total_steps"] == 8 and saved_config["total_epochs"] == 0.0625
    assert saved_config["schedule"]["warmup_steps"] == 2
    assert saved_config["schedule"]["cooldown_steps"] == 0
    rates = [row["train/learning_rate"] for row in rows if "train/loss" in row]
    np.testing.assert_allclose(rates[:3], [0, 1.5e-3, 3e-3], rtol=1e-6)
    config.total_epochs = 0.125  # a finished run, extended, its warm-up with it
    config.schedule.warmup_examples = 66
    trainer.train(config, tmp_path)
    assert int(final_state(tmp_path)["step"]) == 16


@pytest.mark.slow
def test_ema_and_parameters_are_both_evaluated(run_copy):
    from mixer.evaluation import report
    from mixer.evaluation.subject import open_subject

    (row,) = (row for row in read_metrics(run_copy) if row["step"] == 12 and "val/top1" in row)
    assert row["val_ema/loss"] != row["val/loss"] and row["val_ema/count"] == 180
    results = json.loads((run_copy / "results.json").read_text())["splits"]
    assert set(results) == {"val", "val_ema", "test", "test_ema"}
    subjects = [lambda: open_subject(str(run_copy), checkpoint_name="last")]
    report.evaluate(subjects, report.Options(splits=["test"]))
    new_results = json.loads((run_copy / "results.json").read_text())["splits"]
    for name, result in results.items():
        assert {key: new_results[name][key] for key in result} == result
    assert new_results["test_ema"]["loss"] != new_results["test"]["loss"]


def test_diverging_run_stops_and_names_peak_lr(tmp_path):
    config = _small(optimizer__peak_lr=1e30, optimizer__grad_clip_norm=0.0)
    config.optimizer.name = "sgd"
    with pytest.raises(UserError, match=r"(nan|NaN|inf).*peak_lr"):
        trainer.train(config, tmp_path)


def _small(**values):
    """A run on synthetic data whose program compiles quickly."""
    values = {"model__num_blocks": 1, "model__dropout": 0.0, "dataset__test_split": "", **values}
    return tiny_config(**values)


def _remove_from_checkpoint(directory, keys):
    """Removes entries that are None from a saved state, as older versions saved it."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(directory)
        for key in keys:
            assert state.pop(key) is None
        shutil.rmtree(directory)
        checkpointer.save(directory, state)


@pytest.mark.slow
def test_run_of_an_older_version_continues(unfinished_run, tfds_dir):
    """Its checkpoints lack a newer entry of the state."""
    _remove_from_checkpoint(unfinished_run / "checkpoints" / "8" / "state", ["skipped"])
    trainer.train(tiny_config(tfds_dir), unfinished_run)
    state = final_state(unfinished_run)
    assert int(state["step"]) == 12 and state["skipped"] is None
    assert not (unfinished_run / "damaged").exists()


@pytest.mark.slow
def test_moment_dtypes_and_nan_policy_may_change(tmp_path):
    trainer.train(_small(total_steps=4), tmp_path)
    _remove_from_checkpoint(tmp_path / "checkpoints" / "4" / "state", ["skipped", "ema_params"])
    config = _small(total_steps=8, nan_policy="skip")
    config.optimizer.update(momentum_dtype="bfloat16", variance_dtype="bfloat16")
    with pytest.raises(UserError, match=r"optimizer.momentum_dtype.*--allow_config_change"):
        trainer.train(config, tmp_path)
    trainer.train(config, tmp_path, allow_config_change=True)
    state = final_state(tmp_path)
    assert int(state["step"]) == 8 and int(state["skipped"]) == 0
    assert not (tmp_path / "damaged").exists()
    trainer.train(_small(total_steps=10), tmp_path, allow_config_change=True)
    assert final_state(tmp_path)["skipped"] is None and not (tmp_path / "damaged").exists()


def test_non_finite_updates_are_skipped_up_to_the_limit(tmp_path, monkeypatch):
    """The images of the third and fourth batch are infinite."""
    _spoil_batches(monkeypatch, {2, 3})
    config = _small(nan_policy="skip", max_skipped_steps=2, total_steps=6)
    trainer.train(config, tmp_path / "two")
    rows = [row for row in read_metrics(tmp_path / "two") if "train/skipped_steps" in row]
    assert [row["train/skipped_steps"] for row in rows] == [0, 2, 2]
    assert "train/loss" not in rows[1] and rows[2]["train/loss"] > 0  # of steps 4 and 6
    state = final_state(tmp_path / "two")
    assert int(state["skipped"]) == 2 and int(state["step"]) == 6
    config.max_skipped_steps = 1
    monkeypatch.undo()
    _spoil_batches(monkeypatch, {2, 3})
    with pytest.raises(UserError, match=r"max_skipped_steps=1"):
        trainer.train(config, tmp_path / "one")


def _spoil_batches(monkeypatch, indices):
    """Makes the images of the run's batches at `indices` infinite."""
    put_batch, count = sharding.put_batch, itertools.count()

    def put_spoilt(batch, mesh):
        image = batch["image"].astype(np.float32) / 127.5 - 1
        if "mask" not in batch and next(count) in indices:
            image[:] = np.inf
        return put_batch({**batch, "image": image}, mesh)

    def spec(*args):
        return {**abstract(*args), "image": jax.ShapeDtypeStruct((16, 8, 8, 3), "float32")}

    abstract = sharding.abstract_batch
    monkeypatch.setattr(sharding, "put_batch", put_spoilt)
    monkeypatch.setattr(sharding, "abstract_batch", spec)


@pytest.mark.slow
def test_profile_is_written(tmp_path, capsys):
    trainer.train(_small(total_steps=6, profile_steps=(3, 4)), tmp_path)
    assert "profile of steps 3 to 4" in capsys.readouterr().out
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    trainer.train(_small(total_steps=8, profile_steps=(3, 4)), tmp_path)  # extended
    assert "warning: profile_steps=(3, 4)" in capsys.readouterr().out


@pytest.mark.slow
def test_second_start_reads_programs_from_the_compile_cache(tmp_path):
    code = f"""
import sys
sys.path.insert(0, "tests")
import jax
from helpers import tiny_config
from mixer import trainer
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
config = tiny_config(compile_cache_dir={str(tmp_path / "compiled")!r}, total_steps=int(sys.argv[1]))
trainer.train(config, {str(tmp_path / "run")!r})
print("hits", events.count("/jax/compilation_cache/cache_hits"))
"""
    hits = []
    for steps in (4, 4):
        process = run_python("-c", code, steps, JAX_COMPILATION_CACHE_DIR="")
        hits.append(int(process.stdout.split()[-1]))
    assert list((tmp_path / "compiled").iterdir()) and hits[1] > hits[0]


def test_slow_step_is_reported_with_its_duration(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    meter = metrics.Meter(16, 0)
    lines = []
    for step in range(60):
        if step == 30:
            with meter.waiting():
                clock[0] += 4.0  # a starved input
        if step == 40:
            with meter.paused():
                clock[0] += 50.0  # an evaluation does not count
        clock[0] += 5.0 if step == 50 else 0.5
        lines.append(meter.outlier())
    assert [step for step, line in enumerate(lines) if line] == [30, 50]
    assert all(secs in lines[30] for secs in ("4.5 s", "0.50 s", "4.0 s"))
    assert "5.0 s" in lines[50] and "0.0 s" in lines[50]


@pytest.mark.slow
@pytest.mark.parametrize("due", ["eval_every_steps", "checkpoint__every_steps"])
def test_meter_pauses_only_after_the_updates_finish(tmp_path, monkeypatch, due):
    """An evaluation or a checkpoint between two log steps starts after the updates finish."""
    times = dict(total_steps=6, log_every_steps=6, eval_every_steps=6, checkpoint__every_steps=6)
    config = _small(image_size=64, global_batch_size=256, **(times | {due: 3}))
    next_call, losses = stepping.Streamed.next, []

    def record_next(self, step, max_count):
        count, update = next_call(self, step, max_count)

        def record_loss(state):
            state, metrics = update(state)
            losses.append(metrics["loss"])
            return state, metrics

        return count, record_loss

    @contextlib.contextmanager
    def paused(self):
        assert all(loss.is_ready() for loss in losses)
        pauses.append(len(losses))
        yield

    pauses = []
    monkeypatch.setattr(stepping.Streamed, "next", record_next)
    monkeypatch.setattr(metrics.Meter, "paused", paused)
    trainer.train(config, tmp_path)
    assert pauses[0] < pauses[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(total_steps=0), "total_steps.* 0"),
        (dict(seed=1 << 32), "seed=4294967296"),
        (dict(seed=-1), "seed=-1"),
        (dict(total_steps=None), "total_steps, total_epochs"),
        (dict(total_epochs=2.0), "total_steps=12.*total_epochs=2.0"),
        (dict(schedule__cooldown_epochs=-1.0), r"cooldown_epochs=-1\.0"),
        (dict(total_steps=None, total_epochs=float("inf")), "total_epochs=inf"),
        (dict(dataset__label_key="x"), "label_key='x'.*'synthetic'"),
        (dict(optimizer__accumulate_steps=3), "accumulate_steps=3 .*=16"),
        (dict(optimizer__ema_decay=1.0), r"ema_decay=1\.0.*below 1$"),
        (dict(label_smoothing=1.5), r"label_smoothing=1\.5.*below 1$"),
        (dict(nan_policy="ignore"), "nan_policy='ignore'.*stop, skip"),
        (dict(profile_steps=(5, 3)), r"profile_steps=\(5, 3\)"),
        (dict(stall_secs=-1), "stall_secs=-1"),
        (dict(model__remat="all"), "model.remat.*'all'.*none, dots, full"),
        (dict(optimizer__variance_dtype="bf16"), "optimizer.variance_dtype='bf16'"),
        (dict(optimizer__peak_lr=float("nan")), "peak_lr=nan"),
        (dict(optimizer__lr_multipliers=(("hed/.*", 0.0),)), "'hed/.*'"),
        (dict(mixup__cutmix_prob=0.5), "cutmix_alpha"),
        (dict(global_batch_size=None), "global_batch_size=None"),
        (dict(mesh__data=3), r"'data': 3, .* 1 device"),
        (dict(schedule__warmup_steps=12), r"warmup_steps=12"),
        (dict(model__num_classes=11, dataset__name="digits"), "num_classes=11.* 10"),
        (dict(image_size=9), "patch size 2 .* 9.*8 or 10"),
        (dict(dataset__name=""), "dataset.name"),
        (dict(dataset__train_split=""), "train_split"),
        (dict(loss="hinge"), "loss='hinge'"),
    ],
    ids=str,
)
def test_invalid_config_is_refused_before_training(tmp_path, tfds_dir, values, message):
    config = tiny_config(tfds_dir if values.get("dataset__name") == "digits" else None, **values)
    with pytest.raises(UserError, match=message):
        trainer.train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*"))


# train.py and evaluate.py as a user runs them.


@pytest.fixture(scope="module")
def command(tmp_path_factory, tfds_dir):
    """A run without --workdir from another directory: it is in runs/<config name> there."""
    cwd, config = tmp_path_factory.mktemp("command"), tmp_path_factory.mktemp("configs") / "tiny.py"
    values = f"{str(tfds_dir)!r}, log_every_steps=4"
    config.write_text(
        f"import helpers\n\ndef get_config():\n    return helpers.tiny_config({values})"
    )
    process = run_program("train.py", f"--config={config}", cwd=cwd)
    assert process.returncode == 0 and process.stderr == ""
    return cwd / "runs" / "tiny", process.stdout


@pytest.mark.slow
def test_plain_output_ends_with_accuracy_and_run_directory(command):
    path, out = command
    assert "\x1b" not in out and "\r" not in out
    lines = out.splitlines()
    assert re.match(r"test accuracy \d+\.\d\d% \(\d+ of 360\)", lines[-3])
    assert lines[-2].startswith("test (average) accuracy")
    assert lines[-1].startswith("run: runs/tiny") and path.is_dir()
    assert any(re.match(r"step 8/12 .*images/s .*data wait .*memory .*left", li) for li in lines)


@pytest.mark.slow
def test_evaluate_prints_a_table_and_writes_json(command):
    path, out = command
    process = run_program("evaluate.py", "--workdir=runs/tiny", cwd=path.parent.parent)
    accuracy = re.search(r"test accuracy (\d+\.\d\d%)", out)[1]
    assert accuracy in process.stdout and "360" in process.stdout and "180" in process.stdout
    results = json.loads((path / "results.json").read_text())["splits"]
    assert f"{results['test']['top1']:.2%}" == accuracy
    assert results["test"]["count"] == 360 and results["val"]["count"] == 180
    np.testing.assert_allclose(results["test"]["top1"], results["test"]["correct"] / 360)


@pytest.mark.slow
def test_evaluate_as_a_process(command):
    path, _ = command
    best = run_python("evaluate.py", f"--workdir={path}", "--checkpoint=best", "--split=val")
    assert "best" in best.stdout and "Traceback" not in best.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir"),
        (["--workdir=/nowhere"], "/nowhere"),
        (["--workdir=/nowhere", "--split=tset"], "tset"),
    ],
)
def test_evaluate_mistakes(arguments, message):
    process = run_program("evaluate.py", *arguments)
    assert process.returncode == 2 and message in process.stderr
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.slow
def test_progress_bar_at_a_terminal(tmp_path, tfds_dir):
    import pty

    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config=tests/tiny_digits.py", f"--workdir={tmp_path}"],
        cwd=ROOT,
        env=environment(TFDS_DIR=str(tfds_dir), TERM="xterm-256color", COLUMNS="200"),
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    out = b""
    while True:
        try:
            out += os.read(master, 65536)
        except OSError:  # the process has closed the terminal
            break
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.decode())
    assert re.search(r"training .*40/40 loss \d.* accuracy .*images/s .*data wait .* left", text)
    assert re.search(r"test accuracy \d+", text) and "Traceback" not in text
