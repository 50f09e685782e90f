"""Tests damaged and unexpected files in a run directory: one error line, and no work is lost."""

import contextlib
import errno
import html
import io
import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import common
from helpers import run_program, tiny_config
from mixer import files, formatting, run_files, trainer
from mixer.errors import UserError
from mixer.evaluation import report, sweeps
from mixer.evaluation.subject import open_subject
from mixer.runs import config as run
from mixer.runs import curves
from mixer.runs import record as metrics
from mixer.runs.best import read_highest
from mixer.runs.log import TrainLog
from mixer.tools.inspect import page, pictures
from mixer.tools.predict import prediction
from mixer.training.state import TrainState
from mixer.weights import checkpoint
from mixer.weights import load as loading


def _config(**values):
    values = dict(total_steps=4, eval_every_steps=2, checkpoint__every_steps=2) | values
    values = dict(model__num_blocks=1, model__stoch_depth=0.0, model__dropout=0.0) | values
    config = tiny_config(**values)
    config.model.num_classes = 10
    return config


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A run of four steps with two checkpoints; tests must not modify it."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw_curves", lambda *_: None)
        trainer.train(_config(), path)
    return path


@pytest.fixture
def run_copy(trained_run, tmp_path):
    """A copy of `trained_run` that a test may modify."""
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


def _files(directory):
    """Returns the content of every file but the lock, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# JSON files.


def _set_key(key, value):
    """Returns a function that sets the key a.b.c of a JSON file; a value of `...` deletes it."""

    def edit(path):
        *groups, leaf_key = key.split(".")
        values = parent = json.loads(path.read_text())
        for group in groups:
            parent = parent[group]
        if value is ...:
            del parent[leaf_key]
        else:
            parent[leaf_key] = value
        path.write_text(json.dumps(values))

    return edit


def _write_content(content):
    return lambda path: path.write_bytes(content)


def _make_directory(path):
    path.unlink()
    path.mkdir()


def _make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def _link_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE = {
    "list": _write_content(b"[1, 2]"),
    "number": _write_content(b"3"),
    "string": _write_content(b'"text"'),
    "null": _write_content(b"null"),
    "empty": _write_content(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "deep": _write_content(b"[" * 100_000),
    "deep and closed": _write_content(b'{"splits": ' * 400 + b"0" + b"}" * 400),
    "long number": _write_content(b'{"seed": ' + b"9" * 5000 + b"}"),
    "not UTF-8": _write_content(b'{"loss": "\xff\xfe"}'),
    "zeros": _write_content(bytes(100)),
    "directory": _make_directory,
    "pipe": _make_pipe,
    "device": _link_device,
}
EDITS = {
    "config.json": [
        ("model", 3),
        ("model", ...),
        ("model.hidden_dim", "16"),
        ("model.num_blocks", 2.5),
        ("model.num_classes", ...),
        ("model.gelu", "relu"),
        ("model.dropout", 7),
        ("dataset", []),
        ("dataset.name", None),
        ("dataset.eval_preprocess", {"a": 1}),
        ("image_size", -8),
        ("image_size", True),
        ("loss", "mse"),
        ("total_steps", "4"),
        ("total_steps", ...),
        ("optimizer", None),
        ("optimizer.peak_lr", "high"),
        ("optimizer.ema_decay", float("nan")),
        ("optimizer.lr_multipliers", [["a"]]),
        ("schedule.warmup_steps", 10**400),
        ("profile_steps", ["a"]),
        ("tensorboard", 1),
        ("seed", ...),
    ],
    "data.json": [
        ("class_names", "imagenet"),
        ("class_names", [["a"]] * 10),
        ("class_names", [None] * 10),
        ("class_names", list(range(10))),
        ("class_names", ...),
        ("splits", 3),
        ("splits", ...),
        ("splits.train", None),
        ("splits.train.fingerprint", 3),
        ("splits.train.num_examples", "many"),
        ("splits.train.files", {"num_files": 3}),
        ("num_readers", 0),
        ("on_device", "yes"),
    ],
    "results.json": [
        ("step", "4"),
        ("splits", [1]),
        ("splits.val", 3),
        ("splits.val.top1", None),
        ("splits.val.top1_interval", [0.1]),
        ("splits.test.count", -1),
        ("fewshot", {"digits": {"results": [{"shots": 1}]}}),
        ("throughput", {"S/32": {"rates": 3}}),
        ("training", 3),
    ],
}
READERS = {
    "config.json": run.read_run,
    "data.json": run.read_run,
    "results.json": lambda workdir: run_files.read_results(workdir, "last"),
}


@pytest.mark.parametrize("name", EDITS)
def test_invalid_run_file_is_an_error_with_file_key_and_value(trained_run, tmp_path, name):
    """The error is one line with the file, the key and the value."""
    for file in EDITS:
        shutil.copy(trained_run / file, tmp_path)
    content = (tmp_path / name).read_bytes()
    cases = [(damage_name, damage_file, None, None) for damage_name, damage_file in DAMAGE.items()]
    cases += [
        (f"{key}={value!r:.20}", _set_key(key, value), key, value) for key, value in EDITS[name]
    ]
    for case, damage_file, key, value in cases:
        damage_file(tmp_path / name)
        with pytest.raises(UserError) as error_info:
            READERS[name](tmp_path)
        line = str(error_info.value)
        assert f"{tmp_path / name}" in line and "\n" not in line and len(line) < 500, case
        assert key is None or key in line, (case, line)
        if key and isinstance(value, str | int | type(None)) and value != 10**400:
            assert repr(value) in line, (case, line)
        if (tmp_path / name).is_dir():
            (tmp_path / name).rmdir()
        else:
            (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content)
        READERS[name](tmp_path)


def _evaluate(workdir):
    subjects = [lambda: open_subject(str(workdir), checkpoint_name="last")]
    report.evaluate(subjects, report.Options(splits=["val"]))


def test_programs_report_a_damaged_run_in_one_line(run_copy):
    """Every program that opens a run reports a damaged file and leaves the run unchanged."""
    options = dict(
        weights=None, checkpoint_name="last", output=None, split_name=None, data_dir=None
    )
    programs = (
        lambda: trainer.train(_config(), run_copy),
        lambda: _evaluate(run_copy),
        lambda: page.write(workdirs=[str(run_copy)], image_size=None, log=print, **options),
        lambda: loading.find(str(run_copy), log=print),
        lambda: open_subject(str(run_copy)),
    )
    for name in EDITS:
        content = (run_copy / name).read_text()
        (run_copy / name).write_text('{"model": 3, "splits": 3, "total_steps": 4}')
        files_before = _files(run_copy)
        for program in programs[:2] if name == "results.json" else programs:
            with pytest.raises(UserError, match=name):
                program()
        files_after = _files(run_copy)
        assert {key: files_after[key] for key in files_before} == files_before
        (run_copy / name).write_text(content)
    result = run_program("evaluate.py", f"--workdir={run_copy}/none")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "not a run" in result.stderr


def test_class_names_must_match_num_classes(run_copy):
    _set_key("class_names", ["a", "b"])(run_copy / "data.json")
    with pytest.raises(UserError, match=r"model.num_classes=10.* 2 class_names"):
        run.read_run(run_copy)


def _leaves(schema, prefix=""):
    for key, value in schema.items():
        value = value.schema if isinstance(value, run_files.AddedKey) else value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_schema_matches_the_configs_and_completes_older_runs(trained_run):
    saved_config = json.loads((trained_run / "config.json").read_text())
    assert set(_leaves(run_files.CONFIG)) == set(_leaves(common.base().to_dict()))
    old_keys = saved_config.keys() - {"mixup", "stall_secs"}
    old_config = {key: saved_config[key] for key in old_keys}
    for group, key in (("optimizer", "ema_decay"), ("dataset", "label_file"), ("mesh", "fsdp")):
        del old_config[group][key]
    config = run_files.complete(old_config)
    assert config["mixup"] == saved_config["mixup"] and config["stall_secs"] == 120
    assert config["optimizer"]["ema_decay"] == 0.0 and config["mesh"]["fsdp"] == 1
    assert "mixup" not in old_config  # the original is compared on resume


def test_damaged_metrics_lines_are_skipped_with_a_warning(tmp_path):
    lines = [b'{"step": 1, "train/loss": 1.0}', b'{"step": 2, "tr', b"[3]", b'"text"', b"null"]
    lines += [b'{"step": "4"}', b'{"train/loss": 1}', b'{"step": -1}', b'{"step": 5, "a": [1]}']
    lines += [
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": true}',
        b"",
    ]
    lines += [b'{"step": 6, "train/loss": NaN, "train/accuracy": 0.5}', b'{"step": 8, "a": 2}']
    record = tmp_path / "metrics.jsonl"
    record.write_bytes(b"\n".join(lines) + b'\n{"step": 9, "tra')
    warnings = []
    rows = run_files.read_metrics(tmp_path, warnings.append)
    assert rows[0] == {"step": 1, "train/loss": 1.0}
    assert rows[1:] == [{"step": 6, "train/accuracy": 0.5}, {"step": 8, "a": 2}]
    assert len(warnings) == 1 and f"{record}: line 2" in warnings[0] and "11 more" in warnings[0]
    record.unlink()
    record.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is a directory"):
        run_files.read_metrics(tmp_path)


# Unexpected entries in a run directory.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("checkpoints", "file"),
        ("best", "file"),
        ("damaged", "file"),
        ("tensorboard", "link"),
        ("curves.png", "directory"),
        ("metrics.jsonl", "directory"),
        ("results.md", "directory"),
        (".lock", "directory"),
        (".lock", "device"),
        (".lock", "pipe"),
    ],
)
def test_run_path_of_the_wrong_type_is_an_error(tmp_path, name, kind):
    path = tmp_path / name
    make = {
        "file": path.touch,
        "directory": path.mkdir,
        "link": lambda: path.symlink_to("nowhere"),
        "device": lambda: path.symlink_to("/dev/null"),
        "pipe": lambda: os.mkfifo(path),
    }
    make[kind]()
    with pytest.raises(UserError, match=name):
        trainer.train(_config(), tmp_path)


def test_only_step_numbers_are_checkpoint_names(run_copy):
    for name in ("²", "١٠", "007", "-3", "3.5", "notes"):
        (run_copy / "checkpoints" / name).mkdir()
    (run_copy / "checkpoints" / "9").touch()
    (run_copy / "state").mkdir()
    for name in ("last", "4"):
        assert checkpoint.find_named(run_copy, name).name == "4"
    for name in ("²", "١٠", "007", "9"):
        with pytest.raises(UserError, match=f"--checkpoint={name}"):
            checkpoint.find_named(run_copy, name)
    assert checkpoint.last_step(run_copy) == 4 and checkpoint.last_step(run_copy / "none") is None


def test_unfinished_files_of_dead_writers_are_removed(tmp_path):
    dead_process = subprocess.Popen([sys.executable, "-c", ""])
    dead_process.wait()
    for name in (f".config.json.{dead_process.pid}.new", f".results.json.{os.getpid()}.new"):
        (tmp_path / name).touch()
    other_names = {
        f".config.json.{os.getppid()}.new",
        "config.json.new",
        ".x.new",
        ".x.5000000000.new",
    }
    for name in other_names:
        (tmp_path / name).touch()
    files.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == other_names


# Checkpoints.


def _state(step):
    return TrainState(jnp.int32(step), {"a": jnp.full((4, 4), step, jnp.float32)}, ())


ABSTRACT = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _state(0)
)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A directory with two checkpoints; tests must not modify it."""
    path = tmp_path_factory.mktemp("saved") / "run"
    with checkpoint.Checkpoints(path / "checkpoints", keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(_state(step))
        checkpoints.wait()
    return path


def _restore(path):
    """Returns the restored step and the warnings."""
    lines = []
    with checkpoint.Checkpoints(path / "checkpoints", keep_last=2) as checkpoints:
        return int(checkpoints.restore_latest(ABSTRACT, lines.append)[0].step), lines


@pytest.mark.parametrize(
    "name", ["a\\b", "$\\frac{", "[0]", "run[1]", "lr=*", "what?", "a\nb", "a\x1bb", "caf\udce9"]
)
def test_paths_that_orbax_misreads_are_rejected_before_writing(tmp_path, name):
    workdir = f"{tmp_path}/{name}/run"
    for write in (
        lambda: trainer.train(_config(), workdir),
        lambda: checkpoint.Checkpoints(f"{workdir}/checkpoints", keep_last=1),
    ):
        with pytest.raises(UserError) as error_info:
            write()
        assert str(error_info.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_run_in_a_path_that_orbax_misreads_is_not_damaged(saved_run, tmp_path):
    for name, is_readable in (("a\\b", False), ("caf\udce9", False), ("[0]", True), ("x*", True)):
        path = tmp_path / name
        shutil.copytree(saved_run, path)
        with (
            contextlib.nullcontext()
            if is_readable
            else pytest.raises(UserError, match="whose name")
        ):
            checkpoint.restore_params(path, ABSTRACT.params)
        assert sorted(entry.name for entry in path.iterdir()) == ["checkpoints"]


@pytest.mark.parametrize(
    ("error", "is_user_error"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (ValueError("NOT_FOUND: Error reading [os_error_code='5']"), True),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), True),
        (KeyError(8), False),
        (AssertionError(), False),
        (RuntimeError("a bug in this program"), False),
    ],
    ids=str,
)
def test_faults_outside_the_checkpoint_move_nothing(
    saved_run, tmp_path, monkeypatch, error, is_user_error
):
    """Faults of the machine are user errors and bugs propagate; neither moves a checkpoint."""
    shutil.copytree(saved_run, tmp_path / "run")

    def fail(*args, **kwargs):
        if is_user_error:
            raise Exception("a message from Orbax") from error
        raise error

    if is_user_error or isinstance(error, RuntimeError):
        monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointer, "restore", fail)
    else:
        monkeypatch.setattr(checkpoint, "fingerprint", fail)
    files_before = _files(tmp_path / "run")
    with pytest.raises(UserError if is_user_error else type(error)) as error_info:
        _restore(tmp_path / "run")
    assert not isinstance(error_info.value, checkpoint.DamagedError)
    assert not is_user_error or "could not be read" in str(error_info.value)
    assert _files(tmp_path / "run") == files_before


def test_missing_jax_backend_is_not_checkpoint_damage(saved_run, tmp_path, monkeypatch):
    shutil.copytree(saved_run, tmp_path / "run")

    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match=r"JAX finds no .*JAX_PLATFORMS=cpu"):
        checkpoint.restore_params(tmp_path / "run", ABSTRACT.params)


@pytest.mark.parametrize("content", ["[1]", '{"init_timestamp_nsecs": "x"}', "[" * 9999])
def test_orbax_timestamp_file_may_be_invalid(saved_run, tmp_path, content):
    shutil.copytree(saved_run, tmp_path / "run")
    (tmp_path / "run/checkpoints/2/_CHECKPOINT_METADATA").write_text(content)
    assert _restore(tmp_path / "run") == (2, [])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("info/metadata", '{"step": 2, "checksums": {"step": "x"}, "versions": {}}'),
        ("state/_METADATA", '{"tree_metadata": 3}'),
        ("state/manifest.ocdbt", ""),
    ],
)
def test_damaged_checkpoint_is_moved_aside(saved_run, tmp_path, file, content):
    shutil.copytree(saved_run, tmp_path / "run")
    (tmp_path / "run/checkpoints/2" / file).write_text(content)
    step, lines = _restore(tmp_path / "run")
    assert step == 1 and len(lines) == 1 and "checkpoints/2 is damaged" in lines[0]
    assert [path.name for path in (tmp_path / "run/damaged").iterdir()] == ["2-1"]


_WRITES = {"os.mkdir": 0, "os.rename": 1, "open": 0}  # audit event: index of its path argument
_watch = {"directory": None, "first_failure": 0, "errno": 0, "operations": []}


def _full_disk(event, arguments):
    """Audit hook that makes writes fail from `first_failure` on; hooks cannot be removed."""
    # Python still calls the hook at exit, after it has set the names of this module to None.
    if _watch is None or _watch["directory"] is None or event not in _WRITES:
        return
    path = arguments[_WRITES[event]]
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
        return
    if _watch["directory"] in str(path):
        _watch["operations"].append(event)
        if len(_watch["operations"]) >= _watch["first_failure"]:
            raise OSError(_watch["errno"], os.strerror(_watch["errno"]), str(path))


@contextlib.contextmanager
def _failing_writes(directory, number, first_failure=1):
    """Makes every write below `directory` fail with an errno, from operation `first_failure` on."""
    if not _watch.setdefault("is_installed", False):
        sys.addaudithook(_full_disk)
        _watch["is_installed"] = True
    _watch.update(
        directory=str(directory), first_failure=first_failure, errno=number, operations=[]
    )
    try:
        yield
    finally:
        _watch["directory"] = None


def test_full_disk_ends_a_save_with_the_reason(saved_run, tmp_path):
    """Covers the writes made by Python, and checks that no Orbax thread is left waiting."""
    for first_failure in (1, 2, 4, 100):
        path, reason = tmp_path / str(first_failure), None
        shutil.copytree(saved_run, path)
        try:
            with (
                checkpoint.Checkpoints(path / "checkpoints", keep_last=2) as checkpoints,
                _failing_writes(path, errno.ENOSPC, first_failure),
            ):
                checkpoints.save(_state(3))
                checkpoints.wait()
        except UserError as error:
            reason = str(error)
        if first_failure == 100:
            break
        assert "No space left on device" in reason
        assert f"last complete checkpoint: {path}/checkpoints/" in reason
        assert checkpoint.last_step(path) in (2, 3)
    assert reason is None and checkpoint.last_step(path) == 3
    threads = threading.enumerate()
    assert not [thread for thread in threads if type(thread).__module__[:5] == "orbax"]


# Files that disappear during a run.


@pytest.mark.parametrize("fate", ["removed", "replaced"])
def test_missing_metrics_or_checkpoints_are_an_error(tmp_path, fate):
    """The error comes at the next log step, or when the next checkpoint is saved or finished."""
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep_last=2) as checkpoints:
        writer = metrics.MetricWriter(tmp_path, last_step=0, tensorboard=False)
        writer.write(1, {"train/loss": 1.0})
        checkpoints.save(_state(1))
        checkpoints.wait()
        for name in ("metrics.jsonl", "checkpoints"):
            moved_path = (tmp_path / name).rename(tmp_path / f"{name}.aside")
            if fate == "replaced":
                (shutil.copytree if moved_path.is_dir() else shutil.copy)(
                    moved_path, tmp_path / name
                )
        problem = "is gone" if fate == "removed" else "is a different"
        for action, name in (
            (lambda: writer.write(2, {"train/loss": 1.0}), "metrics.jsonl"),
            (writer.check, "metrics.jsonl"),
            (checkpoints.check, "checkpoints"),
            (lambda: checkpoints.save(_state(2)), "checkpoints"),
            (checkpoints.wait, "checkpoints"),
        ):
            with pytest.raises(UserError, match=f"{name} {problem}"):
                action()
    assert (tmp_path / "metrics.jsonl").exists() == (fate == "replaced")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "checkpoints", "metrics.jsonl"])
def test_run_ends_if_its_directory_disappears(tmp_path, monkeypatch, name):
    original_step = TrainLog.finish_step

    def finish_step(log, first, last, metrics):
        if last == 2:
            (tmp_path / "run" / name).rename(tmp_path / "aside")
        original_step(log, first, last, metrics)

    monkeypatch.setattr(TrainLog, "finish_step", finish_step)
    with pytest.raises(UserError, match=f"{name} is gone"):
        trainer.train(_config(log_every_steps=1, checkpoint__every_steps=4), tmp_path / "run")


def test_missing_last_checkpoint_is_an_error(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep_last=2) as checkpoints:
        checkpoints.save(_state(1))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "checkpoints" / "1")
        with pytest.raises(UserError, match="checkpoints/1 is gone"):
            checkpoints.wait()


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_run_without_config_or_data_file_is_an_error(run_copy, name):
    (run_copy / name).unlink()
    files_before = _files(run_copy)
    with pytest.raises(UserError, match=rf"{name} is missing.*--allow_config_change"):
        trainer.train(_config(seed=7), run_copy)
    with pytest.raises(UserError, match=f"not a run: it has no {name}"):
        run.read_run(run_copy)
    assert _files(run_copy) == files_before
    config, data = run.read_saved(run_copy)
    assert (config is None) == (name == "config.json") and (data is None) == (name == "data.json")


# The best checkpoint.


def test_best_value_is_read_from_the_best_checkpoint(tmp_path, capsys):
    """Reads the value from the checkpoint; runs of older code have it only in metrics.jsonl."""
    rows = [{"step": 1, "val/top1": 0.9}, {"step": 2, "val/top1": 0.5}, {"step": 3, "a": 1.0}]
    with checkpoint.Checkpoints(tmp_path / "best", keep_last=1) as best:
        assert read_highest(best, "val/top1", rows) == -1
        best.save(_state(2), value={"val/top1": 0.75})
        best.wait()
        assert read_highest(best, "val/top1", []) == 0.75
        assert read_highest(best, "val/top1", rows) == 0.75
        info = tmp_path / "best/2/info/metadata"
        _set_key("value", ...)(info)
        assert read_highest(best, "val/top1", rows) == 0.5
        assert read_highest(best, "val/top1", rows[:1]) == 0.9
        assert read_highest(best, "val/top1", []) == -1
        info.write_text("[]")
        assert read_highest(best, "val/top1", rows) == -1
    assert "best/2 is damaged" in capsys.readouterr().out


@pytest.mark.slow
def test_run_without_metrics_file_keeps_its_best_checkpoint(trained_run, run_copy):
    (best,) = (path.name for path in (trained_run / "best").iterdir())
    value = json.loads((trained_run / "best" / best / "info" / "metadata").read_text())["value"]
    accuracies = {row["step"]: row.get("val/top1") for row in run_files.read_metrics(trained_run)}
    assert value == {"val/top1": accuracies[int(best)]}
    (run_copy / "metrics.jsonl").unlink()
    _set_key("value", {"val/top1": 1.0})(run_copy / "best" / best / "info" / "metadata")
    trainer.train(_config(total_steps=6), run_copy)
    assert [path.name for path in (run_copy / "best").iterdir()] == [best]


# Names in a run's output and plots.


@pytest.mark.slow
def test_step_lines_name_the_set_and_mark_the_average(tmp_path, monkeypatch, capsys):
    """Only the suffix of EMA metrics means an average, not any underscore in a set's name."""

    def open_suite(config, splits, probes):
        return {"imagenet_real": splits.val, "imagenet_v2": splits.val}, []

    monkeypatch.setattr("mixer.evaluation.suites.open_suite", open_suite)
    trainer.train(_config(optimizer__ema_decay=0.5), tmp_path / "run")
    lines = capsys.readouterr().out
    for name in ("validation", "imagenet_real", "imagenet_v2"):
        assert f"step 2: {name} accuracy" in lines
        assert f"step 2: {name} (average) accuracy" in lines
    assert "imagenet (average)" not in lines


NAMES = (
    "<script>alert(1)</script>",
    "a|b",
    "*a* _b_ `c` [d](e)",
    "$\\frac{",
    "a\nb",
    "# a",
    "x&lt;y",
)


def test_names_are_escaped_in_markdown(tmp_path):
    for name in NAMES:
        text = formatting.in_markdown(name)
        assert not set("<>|*`[]\n") & set(text) and not text.startswith("#")
        assert html.unescape(text) == name.replace("\n", "\\n")
    assert formatting.in_markdown("runs/val_ema 12.5 %") == "runs/val_ema 12.5 %"


def test_class_names_may_be_any_text(run_copy, tmp_path):
    """A label file may have any JSON string, such as lone surrogates and terminal escapes."""
    names = ["\ud800", "b\x1b[31m", "c\nd", *"3456789"]
    _set_key("class_names", names)(run_copy / "data.json")
    for program, file in (
        ("mixer.tools.convert", "x.npz"),
        ("mixer.tools.convert", "x.safetensors"),
        ("mixer.tools.export", "x.stablehlo"),
    ):
        options = ["--platforms=cpu"] * (program == "mixer.tools.export")
        result = run_program(program, run_copy, tmp_path / file, *options)
        assert result.returncode == 0, result.stderr
        card = json.loads((tmp_path / f"{file}.json").read_text())
        assert card.get("card", card)["class_names"] == names
    stored = loading.find(str(tmp_path / "x.npz"), log=print)
    assert stored.card.class_names == tuple(names)
    example = prediction.Prediction("x.png", np.arange(3), np.ones(3, np.float32), None)
    terminal = Console(file=io.StringIO(), width=99)
    terminal.print(prediction.as_table([example], names))
    output = terminal.file.getvalue()
    assert "\x1b" not in output and r"\ud800" in output and r"c\nd" in output


def test_report_cards_show_names_literally(run_copy, tmp_path, capsys):
    """Neither Markdown nor rich may interpret a name as markup."""
    workdir = run_copy.rename(tmp_path / "<img src=x> [b] | *run*")
    _set_key("splits.train.name", "<b>train</b>")(workdir / "data.json")
    results = json.loads((workdir / "results.json").read_text())
    results["splits"]["<i>other</i> [/b]"] = results["splits"]["val"] | {"data": "<u>a</u>"}
    (workdir / "results.json").write_text(json.dumps(results))
    _evaluate(workdir)
    card = (workdir / "results.md").read_text()
    assert "<" not in card and "&#60;i&#62;other" in card and "&#60;u&#62;" in card
    header = card.split("\n|---")[0].splitlines()[-1]
    assert all(row.count("|") == header.count("|") for row in card.splitlines() if row[:1] == "|")
    assert "<img src=x> [b] | *run*" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "$\\frac{",
        "caf\udce9",
        *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if "$" not in name),
    ],
)
def test_names_are_not_formulas_in_plots(tmp_path, name):
    rows = [{"step": step, "train/loss": 1.0, "val/top1": 0.5} for step in (1, 2)]
    curves.draw_curves(rows, tmp_path / "curves.png", name)
    pictures.draw_results([(name, name, 0.5, (0.4, 0.6))], tmp_path / "results.png")
    point = sweeps.Point(8, 10, 0.5, (0.4, 0.6), (0.5,), 1.0, "decode")
    sweep = sweeps.Sweep("resolution", "grow", (sweeps.Curve(name, "", "test", (point,)),))
    sweeps.draw(sweep, tmp_path / "sweep.png")
    sweeps.make_table(sweep)


# Disk errors.


def test_tensorboard_write_error_is_one_warning(tmp_path, monkeypatch):
    class ResourceExhaustedError(Exception):
        """Stands in for TensorFlow's error."""

    ResourceExhaustedError.__module__ = "tensorflow.python.framework.errors_impl"

    class FullWriter:
        def __init__(self, directory):
            pass

        def write_scalars(self, step, scalars):
            raise ResourceExhaustedError("events.out; No space left on device\nmore")

        def close(self):
            raise ResourceExhaustedError("events.out; No space left on device")

    monkeypatch.setitem(sys.modules, "clu", type(sys)("clu"))
    sys.modules["clu"].metric_writers = type(sys)("metric_writers")
    sys.modules["clu"].metric_writers.SummaryWriter = FullWriter
    warnings = []
    writer = metrics.MetricWriter(tmp_path, last_step=0, tensorboard=True, warn=warnings.append)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    (warning,) = warnings
    assert "No space left on device" in warning and "\n" not in warning
    assert [row["step"] for row in run_files.read_metrics(tmp_path)] == [1, 2, 3]


def test_lock_file_disk_error_is_a_user_error(tmp_path, monkeypatch):
    for number in (errno.EIO, errno.ENOSPC, errno.EROFS):

        def fail(path, *args, number=number):
            raise OSError(number, os.strerror(number), path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail)
            with pytest.raises(UserError, match=f".lock.*{os.strerror(number)}"):
                trainer.train(_config(), tmp_path)


def test_output_path_is_checked_before_evaluation(run_copy, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the evaluation has started")

    monkeypatch.setattr(report.classification, "evaluate", fail)
    (run_copy / "evaluation").write_text("a file in place of the folder")
    with pytest.raises(UserError, match=r"run/evaluation is not a directory"):
        _evaluate(run_copy)
    (run_copy / "evaluation").unlink()
    files_before = _files(run_copy)
    with (
        _failing_writes(run_copy, errno.EACCES),
        pytest.raises(UserError, match=rf"--output={run_copy}.*Permission denied"),
    ):
        _evaluate(run_copy)
    assert _files(run_copy) == files_before
