"""Damage and strange things in a run's directory: one line, and no work lost."""

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
    config = tiny_config(**values)
    config.model.num_classes = 10
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with two checkpoints; nobody changes it."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    trainer.train(_config(), path)
    return path


@pytest.fixture
def copy(trained, tmp_path):
    """A run of one's own."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def _files(directory):
    """Name and content of every file that is no lock."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# The JSON files.


def _edited(key, value):
    """A change of the key a.b.c of a JSON file; `...` deletes it."""

    def edit(path):
        *groups, last = key.split(".")
        whole = node = json.loads(path.read_text())
        for group in groups:
            node = node[group]
        if value is ...:
            del node[last]
        else:
            node[last] = value
        path.write_text(json.dumps(whole))

    return edit


def _content(content):
    return lambda path: path.write_bytes(content)


def _directory(path):
    path.unlink()
    path.mkdir()


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


def _device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE = {
    "list": _content(b"[1, 2]"),
    "number": _content(b"3"),
    "string": _content(b'"text"'),
    "null": _content(b"null"),
    "empty": _content(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "deep": _content(b"[" * 100_000),
    "deep and closed": _content(b'{"splits": ' * 400 + b"0" + b"}" * 400),
    "long number": _content(b'{"seed": ' + b"9" * 5000 + b"}"),
    "not UTF-8": _content(b'{"loss": "\xff\xfe"}'),
    "zeros": _content(bytes(100)),
    "directory": _directory,
    "pipe": _pipe,
    "device": _device,
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
def test_what_is_no_run_file_is_refused_by_name(trained, tmp_path, name):
    """Each in one line that says file, key and value; training, which reads all, says the same."""
    for file in EDITS:
        shutil.copy(trained / file, tmp_path)
    whole = (tmp_path / name).read_bytes()
    cases = [(damage, change, None, None) for damage, change in DAMAGE.items()]
    cases += [
        (f"{key}={value!r:.20}", _edited(key, value), key, value) for key, value in EDITS[name]
    ]
    for case, change, key, value in cases:
        change(tmp_path / name)
        with pytest.raises(UserError) as caught:
            READERS[name](tmp_path)
        line = str(caught.value)
        assert f"{tmp_path / name}" in line and "\n" not in line and len(line) < 500, case
        assert key is None or key in line, (case, line)
        if key and isinstance(value, str | int | type(None)) and value != 10**400:
            assert repr(value) in line, (case, line)
        if (tmp_path / name).is_dir():
            (tmp_path / name).rmdir()
        else:
            (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(whole)
        READERS[name](tmp_path)


def _evaluate(workdir):
    opened = [lambda: open_subject(str(workdir), checkpoint_name="last")]
    report.evaluate(opened, report.Options(splits=["val"]))


def test_programs_tell_damage_of_a_run_in_one_line(copy):
    """Whoever would read a file on their own would end in a traceback."""
    options = dict(
        weights=None, checkpoint_name="last", output=None, split_name=None, data_dir=None
    )
    programs = (
        lambda: trainer.train(_config(), copy),
        lambda: _evaluate(copy),
        lambda: page.write(workdirs=[str(copy)], image_size=None, log=print, **options),
        lambda: loading.find(str(copy), log=print),
        lambda: open_subject(str(copy)),
    )
    for name in EDITS:
        whole = (copy / name).read_text()
        (copy / name).write_text('{"model": 3, "splits": 3, "total_steps": 4}')
        before = _files(copy)
        for program in programs[:2] if name == "results.json" else programs:
            with pytest.raises(UserError, match=name):
                program()
        after = _files(copy)
        assert {key: after[key] for key in before} == before
        (copy / name).write_text(whole)
    done = run_program("evaluate.py", f"--workdir={copy}/none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not a run" in done.stderr


def test_class_names_and_model_of_a_run_agree(copy):
    _edited("class_names", ["a", "b"])(copy / "data.json")
    with pytest.raises(UserError, match=r"model.num_classes=10.* 2 class_names"):
        run.read_run(copy)


def _leaves(schema, prefix=""):
    for key, inner in schema.items():
        inner = inner.schema if isinstance(inner, run_files.Added) else inner
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_schema_has_the_keys_of_the_configs_and_older_runs_are_completed(trained):
    written = json.loads((trained / "config.json").read_text())
    assert set(_leaves(run_files.CONFIG)) == set(_leaves(common.base().to_dict()))
    old = {key: value for key, value in written.items() if key not in ("mixup", "stall_secs")}
    del old["optimizer"]["ema_decay"], old["dataset"]["label_file"], old["mesh"]["fsdp"]
    whole = run_files.complete(old)
    assert whole["mixup"] == written["mixup"] and whole["stall_secs"] == 120
    assert whole["optimizer"]["ema_decay"] == 0.0 and whole["mesh"]["fsdp"] == 1
    assert "mixup" not in old  # a continued run is compared by what it was begun with


def test_damaged_lines_of_the_record_are_left_out_with_a_warning(tmp_path):
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
    told = []
    rows = run_files.read_metrics(tmp_path, told.append)
    assert rows[0] == {"step": 1, "train/loss": 1.0}
    assert rows[1:] == [{"step": 6, "train/accuracy": 0.5}, {"step": 8, "a": 2}]
    assert len(told) == 1 and f"{record}: line 2" in told[0] and "11 more" in told[0]
    record.unlink()
    record.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is a directory"):
        run_files.read_metrics(tmp_path)


# What stands in a run that nobody put there.


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
def test_a_name_of_a_run_that_is_something_else_is_refused(tmp_path, name, kind):
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


def test_strange_names_among_checkpoints_are_none(copy):
    for name in ("²", "١٠", "007", "-3", "3.5", "notes"):
        (copy / "checkpoints" / name).mkdir()
    (copy / "checkpoints" / "9").touch()
    (copy / "state").mkdir()
    for name in ("last", "4"):
        assert checkpoint.find_named(copy, name).name == "4"
    for name in ("²", "١٠", "007", "9"):
        with pytest.raises(UserError, match=f"--checkpoint={name}"):
            checkpoint.find_named(copy, name)
    assert checkpoint.last_step(copy) == 4 and checkpoint.last_step(copy / "none") is None


def test_what_killed_writers_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".config.json.{dead.pid}.new", f".results.json.{os.getpid()}.new"):
        (tmp_path / name).touch()
    kept = {f".config.json.{os.getppid()}.new", "config.json.new", ".x.new", ".x.5000000000.new"}
    for name in kept:
        (tmp_path / name).touch()
    files.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


# Checkpoints.


def _state(step):
    return TrainState(jnp.int32(step), {"a": jnp.full((4, 4), step, jnp.float32)}, ())


ABSTRACT = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _state(0)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints; nobody changes them."""
    path = tmp_path_factory.mktemp("saved") / "run"
    with checkpoint.Checkpoints(path / "checkpoints", keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(_state(step))
        checkpoints.wait()
    return path


def _restore(path):
    """Step and warnings."""
    lines = []
    with checkpoint.Checkpoints(path / "checkpoints", keep_last=2) as checkpoints:
        return int(checkpoints.restore_latest(ABSTRACT, lines.append)[0].step), lines


@pytest.mark.parametrize(
    "name", ["a\\b", "$\\frac{", "[0]", "run[1]", "lr=*", "what?", "a\nb", "a\x1bb", "caf\udce9"]
)
def test_directories_that_orbax_misreads_are_refused_before_they_are_made(tmp_path, name):
    workdir = f"{tmp_path}/{name}/run"
    for make in (
        lambda: trainer.train(_config(), workdir),
        lambda: checkpoint.Checkpoints(f"{workdir}/checkpoints", keep_last=1),
    ):
        with pytest.raises(UserError) as caught:
            make()
        assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_a_good_run_in_such_a_directory_is_not_called_damaged(saved, tmp_path):
    for name, is_read in (("a\\b", False), ("caf\udce9", False), ("[0]", True), ("x*", True)):
        path = tmp_path / name
        shutil.copytree(saved, path)
        with contextlib.nullcontext() if is_read else pytest.raises(UserError, match="whose name"):
            checkpoint.restore_params(path, ABSTRACT.params)
        assert sorted(each.name for each in path.iterdir()) == ["checkpoints"]


@pytest.mark.parametrize(
    ("error", "is_user_error"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (ValueError("NOT_FOUND: Error reading [os_error_code='5']"), True),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), True),
        (KeyError(8), False),
        (AssertionError(), False),
        (RuntimeError("the program's own"), False),
    ],
    ids=str,
)
def test_faults_that_are_not_the_checkpoints_move_nothing(
    saved, tmp_path, monkeypatch, error, is_user_error
):
    """Of reading where it is the machine's, of the work with what was read where the program's."""
    shutil.copytree(saved, tmp_path / "run")

    def fail(*args, **kwargs):
        if is_user_error:
            raise Exception("Orbax's own words") from error
        raise error

    if is_user_error or isinstance(error, RuntimeError):
        monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointer, "restore", fail)
    else:
        monkeypatch.setattr(checkpoint, "fingerprint", fail)
    before = _files(tmp_path / "run")
    with pytest.raises(UserError if is_user_error else type(error)) as caught:
        _restore(tmp_path / "run")
    assert not isinstance(caught.value, checkpoint.DamagedError)
    assert not is_user_error or "could not be read" in str(caught.value)
    assert _files(tmp_path / "run") == before


def test_a_backend_that_cannot_start_is_no_damage(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")

    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match=r"JAX finds no .*JAX_PLATFORMS=cpu"):
        checkpoint.restore_params(tmp_path / "run", ABSTRACT.params)


@pytest.mark.parametrize("content", ["[1]", '{"init_timestamp_nsecs": "x"}', "[" * 9999])
def test_orbaxs_file_of_times_may_be_anything(saved, tmp_path, content):
    shutil.copytree(saved, tmp_path / "run")
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
def test_damage_of_a_checkpoint_is_still_moved_aside(saved, tmp_path, file, content):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/checkpoints/2" / file).write_text(content)
    step, lines = _restore(tmp_path / "run")
    assert step == 1 and len(lines) == 1 and "checkpoints/2 is damaged" in lines[0]
    assert [path.name for path in (tmp_path / "run/damaged").iterdir()] == ["2-1"]


_WRITES = {"os.mkdir": 0, "os.rename": 1, "open": 0}  # Python's audit events; which has the path
_watched = {"directory": None, "place": 0, "errno": 0, "operations": []}


def _full_disk(event, arguments):
    """An audit hook, which nothing removes: write operations fail from one of them on."""
    if _watched["directory"] is None or event not in _WRITES:
        return
    path = arguments[_WRITES[event]]
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
        return
    if _watched["directory"] in str(path):
        _watched["operations"].append(event)
        if len(_watched["operations"]) >= _watched["place"]:
            raise OSError(_watched["errno"], os.strerror(_watched["errno"]), str(path))


@contextlib.contextmanager
def _failing_writes(directory, number, place=1):
    """Below `directory` every write operation from number `place` on fails with that errno."""
    if not _watched.setdefault("is_installed", False):
        sys.addaudithook(_full_disk)
        _watched["is_installed"] = True
    _watched.update(directory=str(directory), place=place, errno=number, operations=[])
    try:
        yield
    finally:
        _watched["directory"] = None


def test_a_disk_that_is_full_at_any_moment_of_a_save_ends_it_with_its_reason(saved, tmp_path):
    """Python's share of the operations; and nobody goes on waiting for what has failed."""
    for place in (1, 2, 4, 100):
        path, reason = tmp_path / str(place), None
        shutil.copytree(saved, path)
        try:
            with (
                checkpoint.Checkpoints(path / "checkpoints", keep_last=2) as checkpoints,
                _failing_writes(path, errno.ENOSPC, place),
            ):
                checkpoints.save(_state(3))
                checkpoints.wait()
        except UserError as error:
            reason = str(error)
        if place == 100:
            break
        assert "No space left on device" in reason
        assert f"last complete checkpoint: {path}/checkpoints/" in reason
        assert checkpoint.last_step(path) in (2, 3)
    assert reason is None and checkpoint.last_step(path) == 3
    assert not [each for each in threading.enumerate() if type(each).__module__[:5] == "orbax"]


# A run whose files go away.


@pytest.mark.parametrize("then", ["removed", "replaced"])
def test_a_record_or_checkpoints_that_went_away_are_an_error(tmp_path, then):
    """At the next log step, or at the next save or its end."""
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep_last=2) as checkpoints:
        writer = metrics.MetricWriter(tmp_path, last_step=0, tensorboard=False)
        writer.write(1, {"train/loss": 1.0})
        checkpoints.save(_state(1))
        checkpoints.wait()
        for name in ("metrics.jsonl", "checkpoints"):
            aside = (tmp_path / name).rename(tmp_path / f"{name}.aside")
            if then == "replaced":
                (shutil.copytree if aside.is_dir() else shutil.copy)(aside, tmp_path / name)
        what = "is gone" if then == "removed" else "is a different"
        for act, name in (
            (lambda: writer.write(2, {"train/loss": 1.0}), "metrics.jsonl"),
            (writer.check, "metrics.jsonl"),
            (checkpoints.check, "checkpoints"),
            (lambda: checkpoints.save(_state(2)), "checkpoints"),
            (checkpoints.wait, "checkpoints"),
        ):
            with pytest.raises(UserError, match=f"{name} {what}"):
                act()
    assert (tmp_path / "metrics.jsonl").exists() == (then == "replaced")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "checkpoints", "metrics.jsonl"])
def test_a_run_whose_place_goes_away_ends(tmp_path, monkeypatch, name):
    original = TrainLog.finish_step

    def finish_step(log, first, last, metrics):
        if last == 2:
            (tmp_path / "run" / name).rename(tmp_path / "aside")
        original(log, first, last, metrics)

    monkeypatch.setattr(TrainLog, "finish_step", finish_step)
    with pytest.raises(UserError, match=f"{name} is gone"):
        trainer.train(_config(log_every_steps=1, checkpoint__every_steps=4), tmp_path / "run")


def test_a_last_checkpoint_that_went_away_is_no_success(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep_last=2) as checkpoints:
        checkpoints.save(_state(1))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "checkpoints" / "1")
        with pytest.raises(UserError, match="checkpoints/1 is gone"):
            checkpoints.wait()


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_run_without_its_config_or_data_is_refused(copy, name):
    (copy / name).unlink()
    before = _files(copy)
    with pytest.raises(UserError, match=rf"{name} is missing.*--allow_config_change"):
        trainer.train(_config(seed=7), copy)
    with pytest.raises(UserError, match=f"not a run: it has no {name}"):
        run.read_run(copy)
    assert _files(copy) == before
    config, data = run.read_saved(copy)
    assert (config is None) == (name == "config.json") and (data is None) == (name == "data.json")


# What is best.


def test_best_so_far_belongs_to_the_best_checkpoint(tmp_path, capsys):
    """A record that is cut or gone changes nothing; a run of older code has it in the record."""
    rows = [{"step": 1, "val/top1": 0.9}, {"step": 2, "val/top1": 0.5}, {"step": 3, "a": 1.0}]
    with checkpoint.Checkpoints(tmp_path / "best", keep_last=1) as best:
        assert read_highest(best, "val/top1", rows) == -1
        best.save(_state(2), value={"val/top1": 0.75})
        best.wait()
        assert read_highest(best, "val/top1", []) == 0.75
        assert read_highest(best, "val/top1", rows) == 0.75
        info = tmp_path / "best/2/info/metadata"
        _edited("value", ...)(info)
        assert read_highest(best, "val/top1", rows) == 0.5
        assert read_highest(best, "val/top1", rows[:1]) == 0.9
        assert read_highest(best, "val/top1", []) == -1
        info.write_text("[]")
        assert read_highest(best, "val/top1", rows) == -1
    assert "best/2 is damaged" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_without_its_record_keeps_its_best(trained, copy):
    (best,) = (path.name for path in (trained / "best").iterdir())
    value = json.loads((trained / "best" / best / "info" / "metadata").read_text())["value"]
    tops = {row["step"]: row.get("val/top1") for row in run_files.read_metrics(trained)}
    assert value == {"val/top1": tops[int(best)]}
    (copy / "metrics.jsonl").unlink()
    _edited("value", {"val/top1": 1.0})(copy / "best" / best / "info" / "metadata")
    trainer.train(_config(total_steps=6), copy)
    assert [path.name for path in (copy / "best").iterdir()] == [best]


# What a run says, and what is drawn of it.


@pytest.mark.slow
def test_lines_name_the_set_and_the_average(tmp_path, monkeypatch, capsys):
    """A name with an underscore is not the average of what stands before it."""

    def open_suite(config, splits, probes):
        return {"imagenet_real": splits.val, "imagenet_v2": splits.val}, []

    monkeypatch.setattr("mixer.evaluation.suites.open_suite", open_suite)
    trainer.train(_config(optimizer__ema_decay=0.5), tmp_path / "run")
    lines = capsys.readouterr().out
    for what in ("validation", "imagenet_real", "imagenet_v2"):
        assert f"step 2: {what} accuracy" in lines
        assert f"step 2: {what} (average) accuracy" in lines
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


def test_names_are_no_markup_in_markdown(tmp_path):
    for name in NAMES:
        text = formatting.in_markdown(name)
        assert not set("<>|*`[]\n") & set(text) and not text.startswith("#")
        assert html.unescape(text) == name.replace("\n", "\\n")
    assert formatting.in_markdown("runs/val_ema 12.5 %") == "runs/val_ema 12.5 %"


def test_class_names_of_any_text_are_converted_exported_and_shown(copy, tmp_path):
    """A label file may have any string that JSON has, lone surrogates and terminals' codes too."""
    names = ["\ud800", "b\x1b[31m", "c\nd", *"3456789"]
    _edited("class_names", names)(copy / "data.json")
    for program, file in (
        ("mixer.tools.convert", "x.npz"),
        ("mixer.tools.convert", "x.safetensors"),
        ("mixer.tools.export", "x.stablehlo"),
    ):
        options = ["--platforms=cpu"] * (program == "mixer.tools.export")
        done = run_program(program, copy, tmp_path / file, *options)
        assert done.returncode == 0, done.stderr
        card = json.loads((tmp_path / f"{file}.json").read_text())
        assert card.get("card", card)["class_names"] == names
    found = loading.find(str(tmp_path / "x.npz"), log=print)
    assert found.card.class_names == tuple(names)
    one = prediction.Prediction("x.png", np.arange(3), np.ones(3, np.float32), None)
    terminal = Console(file=io.StringIO(), width=99)
    terminal.print(prediction.as_table([one], names))
    shown = terminal.file.getvalue()
    assert "\x1b" not in shown and r"\ud800" in shown and r"c\nd" in shown


def test_report_cards_show_names_as_they_are(copy, tmp_path, capsys):
    """Also to rich, which has markup of its own."""
    workdir = copy.rename(tmp_path / "<img src=x> [b] | *run*")
    _edited("splits.train.name", "<b>train</b>")(workdir / "data.json")
    results = json.loads((workdir / "results.json").read_text())
    results["splits"]["<i>other</i> [/b]"] = results["splits"]["val"] | {"data": "<u>a</u>"}
    (workdir / "results.json").write_text(json.dumps(results))
    _evaluate(workdir)
    card = (workdir / "results.md").read_text()
    assert "<" not in card and "&#60;i&#62;other" in card and "&#60;u&#62;" in card
    header = card.split("\n|---")[0].splitlines()[-1]
    assert all(row.count("|") == header.count("|") for row in card.splitlines() if row[:1] == "|")
    assert "<img src=x> [b] | *run*" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*NAMES, "caf\udce9"])
def test_names_are_no_formulas_in_pictures(tmp_path, name):
    rows = [{"step": step, "train/loss": 1.0, "val/top1": 0.5} for step in (1, 2)]
    curves.draw_curves(rows, tmp_path / "curves.png", name)
    pictures.draw_results([(name, name, 0.5, (0.4, 0.6))], tmp_path / "results.png")
    point = sweeps.Point(8, 10, 0.5, (0.4, 0.6), (0.5,), 1.0, "decode")
    sweep = sweeps.Sweep("resolution", "grow", (sweeps.Curve(name, "", "test", (point,)),))
    sweeps.draw(sweep, tmp_path / "sweep.png")
    sweeps.make_table(sweep)


# Disks.


def test_tensorboard_that_cannot_be_written_is_given_up_with_a_line(tmp_path, monkeypatch):
    class ResourceExhaustedError(Exception):
        """As TensorFlow's."""

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
    told = []
    writer = metrics.MetricWriter(tmp_path, last_step=0, tensorboard=True, warn=told.append)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    assert len(told) == 1 and "No space left on device" in told[0] and "\n" not in told[0]
    assert [row["step"] for row in run_files.read_metrics(tmp_path)] == [1, 2, 3]


def test_a_lock_on_a_disk_that_fails_is_one_line(tmp_path, monkeypatch):
    for number in (errno.EIO, errno.ENOSPC, errno.EROFS):

        def fail(path, *args, number=number):
            raise OSError(number, os.strerror(number), path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail)
            with pytest.raises(UserError, match=f".lock.*{os.strerror(number)}"):
                trainer.train(_config(), tmp_path)


def test_where_results_go_is_looked_at_before_anything_is_computed(copy, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(report.classification, "evaluate", fail)
    (copy / "evaluation").write_text("a file in place of the folder")
    with pytest.raises(UserError, match=r"run/evaluation is not a directory"):
        _evaluate(copy)
    (copy / "evaluation").unlink()
    before = _files(copy)
    with (
        _failing_writes(copy, errno.EACCES),
        pytest.raises(UserError, match=rf"--output={copy}.*Permission denied"),
    ):
        _evaluate(copy)
    assert _files(copy) == before
