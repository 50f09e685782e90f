"""Tests the decisions of a restart, one per test, without training."""

import json
import shutil
import tarfile
import types

import numpy as np
import pytest

from configs import mixer_b16_i1k
from helpers import GOLDENS, assert_same_bits, final_state, leaves, tiny_config
from mixer import trainer
from mixer.data import resident
from mixer.errors import UserError
from mixer.parallel import sharding
from mixer.runs import config as run_config
from mixer.runs import resume
from mixer.runs.directory import open_run
from mixer.runs.resume import SavedRun


def _run(path, steps=()):
    """Returns a stand-in for an open run directory with checkpoints at `steps`."""
    return types.SimpleNamespace(path=path, checkpoints=types.SimpleNamespace(steps=list(steps)))


@pytest.fixture
def copied_run(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def _prepare(config, workdir, **options):
    options = {"allow_config_change": False, **options}
    with open_run(config, str(workdir)) as run:
        return resume.prepare(config, run, sharding.make_mesh(config.mesh), **options)


def test_saved_files_are_ignored_without_a_checkpoint(copied_run):
    assert resume.read_saved(_run(copied_run), allow_config_change=False) == SavedRun(None, None)


def test_run_with_checkpoints_reads_its_saved_config_and_data(copied_run):
    saved_run = resume.read_saved(_run(copied_run, [12]), allow_config_change=False)
    assert saved_run.config["total_steps"] == 12 and saved_run.data["num_readers"] == 1


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_missing_run_file_is_an_error_unless_changes_are_allowed(copied_run, name):
    (copied_run / name).unlink()
    with pytest.raises(UserError, match=name):
        resume.read_saved(_run(copied_run, [12]), allow_config_change=False)
    saved_run = resume.read_saved(_run(copied_run, [12]), allow_config_change=True)
    assert [saved_run.config, saved_run.data].count(None) == 1


@pytest.mark.parametrize(
    ("total_steps", "checkpoint_steps", "expected"),
    [(13, [4, 8, 12], True), (12, [12], False), (13, [4, 8], False), (11, [12], False)],
)
def test_finished_run_with_more_steps_is_extended(total_steps, checkpoint_steps, expected):
    saved_run = SavedRun({"total_steps": 12}, {})
    config = tiny_config(total_steps=total_steps)
    assert resume.extends(saved_run, config, checkpoint_steps) == expected
    assert not resume.extends(SavedRun(None, None), tiny_config(), checkpoint_steps)


def test_config_change_is_an_error_with_key_and_values(tmp_path):
    saved_config = json.loads(json.dumps(tiny_config().to_dict()))
    new_config = tiny_config(optimizer__peak_lr=0.5, log_every_steps=5)
    with pytest.raises(UserError, match=r"optimizer\.peak_lr: 0\.003 -> 0\.5") as error:
        resume.check_same_config(_run(tmp_path), saved_config, new_config, is_extended=False)
    assert "log_every_steps" not in str(error.value)  # this key may change


def test_run_begun_before_the_published_form_keeps_its_preprocessing():
    old_ops = {
        "train_preprocess": "inception_crop(224)|flip_lr|randaugment(2, 15)",
        "eval_preprocess": "decode|resize_small(256, method='area')|central_crop(224)",
    }
    recipe = mixer_b16_i1k.get_config()
    old = run_config.resolve(recipe, initial=None).to_dict()
    old["dataset"].update(old_ops)
    resumed = run_config.resolve(recipe, initial=None, saved_config=old)
    assert {key: resumed.dataset[key] for key in old_ops} == old_ops
    assert run_config.changes(old, resumed.to_dict()) == []
    # Any other change of the preprocessing is still one, and a new run has the published form.
    old["dataset"]["train_preprocess"] = "inception_crop(224)|flip_lr|randaugment(2, 10)"
    resumed = run_config.resolve(recipe, initial=None, saved_config=old)
    assert resumed.dataset.train_preprocess == recipe.dataset.train_preprocess
    assert "mode='published'" in recipe.dataset.train_preprocess


def test_extension_may_change_only_the_lengths(tmp_path):
    saved_config = json.loads(json.dumps(tiny_config().to_dict()))
    longer_config = tiny_config(total_steps=24, schedule__warmup_steps=4)
    resume.check_same_config(_run(tmp_path), saved_config, longer_config, is_extended=True)
    with pytest.raises(UserError, match="total_steps: 12 -> 24"):
        resume.check_same_config(_run(tmp_path), saved_config, longer_config, is_extended=False)
    longer_config.schedule.decay = "linear"
    with pytest.raises(UserError, match=r"schedule\.decay"):
        resume.check_same_config(_run(tmp_path), saved_config, longer_config, is_extended=True)


@pytest.mark.parametrize(
    ("saved_data", "num_processes", "batch_size", "expected"),
    [
        (None, 4, 16, 4),  # a new run: one reader per process
        ({"num_readers": 2}, 4, 16, 2),  # a restart on more processes: the readers stay
        ({"splits": {}}, 4, 16, 1),  # older code saved no number and read with one process
        ({"num_readers": 3}, 4, 16, 4),  # three readers do not divide the new batch size
    ],
)
def test_number_of_readers_is_that_of_the_saved_run(
    saved_data, num_processes, batch_size, expected, capsys
):
    config = tiny_config(global_batch_size=batch_size)
    assert resume.choose_readers(config, saved_data, num_processes) == expected
    assert ("batch size has changed" in capsys.readouterr().out) == (
        saved_data == {"num_readers": 3}
    )


@pytest.mark.parametrize(
    ("on_device", "saved_data", "is_resident"),
    [
        ("auto", None, True),
        ("auto", {"on_device": True}, True),
        ("auto", {"splits": {}}, True),  # older code did not save the choice
        ("auto", {"on_device": False}, False),
        ("on", {"on_device": False}, True),  # the user's flag takes precedence
    ],
)
def test_streaming_run_keeps_streaming(on_device, saved_data, is_resident, monkeypatch):
    monkeypatch.setattr(resident, "read", lambda *args, **kwargs: "read")
    examples = resume.read_examples(
        tiny_config(dataset__on_device=on_device),
        lambda: types.SimpleNamespace(train=None),
        saved_data,
        check=lambda split: None,
        should_stop=lambda: False,
    )
    assert (examples == "read") == is_resident and isinstance(examples, str)


def test_restart_restores_the_last_step_and_its_config(copied_run, finished_run, tfds_dir):
    config = tiny_config(tfds_dir, total_steps=20)
    start = _prepare(config, copied_run)
    assert start.step == 12 and start.is_extended and start.num_readers == 1
    assert start.config.model.num_classes == 10 and config.model.num_classes is None
    assert start.record["on_device"] == (not isinstance(start.examples, str))
    saved_state = final_state(finished_run)
    assert_same_bits(start.state.params, saved_state["params"])


def test_finished_run_reads_no_examples_and_keeps_its_record(copied_run, tfds_dir):
    saved_record = json.loads((copied_run / "data.json").read_text())
    start = _prepare(tiny_config(tfds_dir), copied_run)
    assert start.step == 12 and start.examples is None and not start.is_extended
    assert json.loads(json.dumps(start.record)) == saved_record


def test_total_steps_below_the_checkpoint_is_an_error(copied_run, tfds_dir):
    with pytest.raises(UserError, match=r"step 12.*total_steps=8"):
        _prepare(tiny_config(tfds_dir, total_steps=8), copied_run, allow_config_change=True)


def test_prepare_writes_no_config(tmp_path, tfds_dir):
    _prepare(tiny_config(tfds_dir), tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.usefixtures("no_curves")
def test_run_of_older_code_continues(tmp_path):
    """Resumes a run of commit 7a95569, from before `mixer/` had packages, at step 8 of 12.

    `expected.npz` holds that code's parameters at step 12, trained on a CPU.
    """
    with tarfile.open(GOLDENS / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = tiny_config(model__num_classes=10, optimizer__ema_decay=0.9)
    config.model.update(hidden_dim=8, num_blocks=1, tokens_mlp_dim=4, channels_mlp_dim=8)
    trainer.train(config, tmp_path / "old_run")
    state = final_state(tmp_path / "old_run")
    assert int(state["step"]) == 12
    actual = leaves({name: state[name] for name in ("params", "ema_params")})
    with np.load(tmp_path / "expected.npz", allow_pickle=False) as expected:
        assert actual.keys() == set(expected.files)
        for name in expected.files:
            np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-5)
