import gc
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import PUBLISHED, assert_same_bits, run_python
from mixer import checkpoint, optimizer, sharding, train_state
from mixer.errors import UserError
from mixer.model import make_model


def _model(**fields):
    return make_model(
        **{
            **dict(patch_size=2, hidden_dim=16, num_blocks=2, tokens_mlp_dim=8),
            **dict(channels_mlp_dim=32, num_classes=10),
            **fields,
        }
    )


TX = optimizer.make_optimizer(lambda step: 1e-3, **PUBLISHED)


def _states(**fields):
    mesh = sharding.make_mesh({"data": -1})
    model = _model(**fields)
    state = train_state.init_state(model, TX, (8, 8), mesh, 0)
    return state, train_state.abstract_state(model, TX, (8, 8), mesh)


def _at(state, step):
    """The state with another step and other values, different in every leaf of floats."""
    grown = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), (state.params, state.opt_state))
    return state.replace(step=jnp.int32(step), params=grown[0], opt_state=grown[1])


def _open(path, **options):
    return checkpoint.Checkpoints(path, **{"keep_last": 2, **options})


def _save(path, steps=(10, 20, 30), **options):
    state, abstract = _states()
    with _open(path, **options) as manager:
        for step in steps:
            manager.save(_at(state, step))
        manager.wait()
        return state, abstract, manager.steps


def test_round_trip_is_exact_and_saves_versions(tmp_path):
    state, abstract, _ = _save(tmp_path / "checkpoints")
    with _open(tmp_path / "checkpoints") as manager:
        restored, info = manager.restore_latest(abstract, warn=pytest.fail)
    assert_same_bits(restored, _at(state, 30))
    assert info["step"] == 30
    assert {"python", "commit", "jax", "flax", "optax", "orbax-checkpoint"} <= set(info["versions"])


def test_keeps_the_last_and_the_multiples(tmp_path):
    assert _save(tmp_path / "a", range(10, 80, 10))[2] == [60, 70]
    assert _save(tmp_path / "b", range(10, 80, 10), keep_every_steps=30)[2] == [30, 60, 70]


def test_saving_goes_on_while_the_state_changes(tmp_path):
    """What is written is the state that was given, though its buffers are donated at once."""
    state, abstract = _states(hidden_dim=256, channels_mlp_dim=1024, num_blocks=4)
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    wanted = {}
    with _open(tmp_path, keep_last=100) as manager:
        for _ in range(8):
            state = add(state)
            wanted[int(state.step)] = jax.device_get(checkpoint.checksums(state)[0])
            manager.save(state)
            for _ in range(5):
                state = add(state)
        manager.wait()
        for step in manager.steps:
            restored, _ = manager._restore(step, abstract)
            assert checkpoint.checksums(restored)[0] == wanted[step]
    assert len(wanted) == 8


def _files(directory):
    return sorted(
        os.path.join(root, name) for root, _, names in os.walk(directory) for name in names
    )


def _flip(path):
    data = bytearray(Path(path).read_bytes())
    for i in range(len(data) // 3, min(len(data) // 3 + 64, len(data))):
        data[i] ^= 255
    Path(path).write_bytes(data)


def _each_data_file(directory, damage):
    """All of them: which ones hold the arrays, and which are left over, is a race of threads."""
    for path in _files(directory):
        if f"{os.sep}d{os.sep}" in path:
            damage(path)


DAMAGE = {
    "truncated data": lambda d: _each_data_file(
        d, lambda f: os.truncate(f, os.path.getsize(f) // 2)
    ),
    "flipped data": lambda d: _each_data_file(d, _flip),
    "missing data": lambda d: _each_data_file(d, os.remove),
    "flipped list of arrays": lambda d: _flip(d / "state" / "_METADATA"),
    "empty list of arrays": lambda d: os.truncate(d / "state" / "_METADATA", 0),
    "flipped database": lambda d: _flip(d / "state" / "manifest.ocdbt"),
    "missing database": lambda d: os.remove(d / "state" / "manifest.ocdbt"),
    "flipped info": lambda d: _flip(d / "info" / "metadata"),
    "missing info": lambda d: shutil.rmtree(d / "info"),
    "missing state": lambda d: shutil.rmtree(d / "state"),
    "all files empty": lambda d: [os.truncate(path, 0) for path in _files(d)],
    "all files gone": lambda d: [os.remove(path) for path in _files(d)],
    "empty directory": lambda d: (shutil.rmtree(d), d.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_moved_aside_and_saved_again(tmp_path, damage, capfd):
    state, abstract, _ = _save(tmp_path / "checkpoints")
    DAMAGE[damage](tmp_path / "checkpoints" / "30")
    capfd.readouterr()
    lines = []
    with _open(tmp_path / "checkpoints") as manager:
        restored, _ = manager.restore_latest(abstract, lines.append)
        assert int(restored.step) == 20
        assert_same_bits(restored, _at(state, 20))
        manager.save(_at(state, 30))
        manager.wait()
        assert manager.steps == [20, 30]
    if lines:  # an empty directory is no checkpoint to Orbax, and needs no warning
        assert len(lines) == 1 and "30 is damaged" in lines[0] and "\n" not in lines[0]
        assert len(list((tmp_path / "damaged").iterdir())) == 1
    assert "Traceback" not in "".join(capfd.readouterr())
    with _open(tmp_path / "checkpoints") as manager:
        assert int(manager.restore_latest(abstract, pytest.fail)[0].step) == 30


@pytest.mark.slow
def test_every_damaged_file_is_noticed_or_harmless(tmp_path, capfd):
    """Each file of a checkpoint in turn: the state that comes back is always one that was saved."""
    state, abstract, _ = _save(tmp_path / "whole", steps=(20, 30))
    for path in _files(tmp_path / "whole" / "30"):
        if not os.path.getsize(path):
            continue
        for do in (_flip, os.remove):
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "checkpoints")
            do(path.replace("whole", "checkpoints"))
            with _open(tmp_path / "checkpoints") as manager:
                restored, info = manager.restore_latest(abstract, lambda line: None)
            assert info["step"] == int(restored.step) in (20, 30)
            assert_same_bits(restored, _at(state, int(restored.step)))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_read_of_orbaxs_that_never_began_says_nothing(tmp_path, recwarn):
    async def read():
        pass

    with _open(tmp_path / "checkpoints"):
        read()
        gc.collect()
    assert not [str(seen.message) for seen in recwarn if "never awaited" in str(seen.message)]


def test_all_damaged_stops_and_says_so(tmp_path):
    _, abstract, _ = _save(tmp_path / "checkpoints")
    for step in ("20", "30"):
        _each_data_file(tmp_path / "checkpoints" / step, _flip)
    lines = []
    with _open(tmp_path / "checkpoints") as manager:
        with pytest.raises(UserError, match=r"none of the checkpoints .* starts from step 0"):
            manager.restore_latest(abstract, lines.append)
        assert len(lines) == 2
        assert manager.restore_latest(abstract, lines.append) is None


def test_state_of_another_model_is_refused_and_stays(tmp_path):
    _save(tmp_path / "checkpoints")
    _, abstract = _states(hidden_dim=24, num_blocks=1)
    with _open(tmp_path / "checkpoints") as manager:
        with pytest.raises(UserError, match="does not fit the model") as caught:
            manager.restore_latest(abstract, pytest.fail)
        assert manager.steps == [20, 30]
    text = str(caught.value)
    assert "params/stem/kernel: saved (2, 2, 3, 16), wanted (2, 2, 3, 24)" in text
    assert "params/MixerBlock_1/LayerNorm_0/bias: not in the model" in text


def test_state_that_is_not_finite_is_never_saved(tmp_path):
    state, _ = _states()
    broken = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    with _open(tmp_path / "checkpoints") as manager:
        with pytest.raises(UserError, match=r"NaN.*nothing was saved.*peak_lr"):
            manager.save(broken)
        assert manager.steps == []


def save_on_a_full_disk(directory):
    """Run as a process of its own: from the second checkpoint on no file may outgrow 2 kB.

    The limit is the whole process's: in pytest it would also cut off the log of the tests.
    """
    state, _ = _states()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with _open(directory) as manager:
            manager.save(_at(state, 10))
            manager.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            manager.save(_at(state, 20))
            manager.wait()
    except UserError as error:
        print("UserError:", error)


def test_failed_background_save_stops_with_its_reason(tmp_path):
    code = "import sys, test_checkpoint as t; t.save_on_a_full_disk(t.Path(sys.argv[1]))"
    text = run_python("-c", code, tmp_path / "checkpoints").stdout
    assert "UserError: " in text and "could not be written to" in text
    assert "File too large" in text and "checkpoints/10" in text


def test_parameters_alone(tmp_path):
    state, abstract, _ = _save(tmp_path / "run" / "checkpoints")
    for path in ("run", "run/checkpoints", "run/checkpoints/30"):
        params = checkpoint.restore_params(tmp_path / path, abstract.params)
        assert_same_bits(params, _at(state, 30).params)
    params = checkpoint.restore_params(tmp_path / "run/checkpoints/20", abstract.params)
    assert_same_bits(params, _at(state, 20).params)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.restore_params(tmp_path / "nowhere", abstract.params)
    with pytest.raises(UserError, match=r"stem/bias: saved \(16,\), wanted \(24,\)"):
        checkpoint.restore_params(tmp_path / "run", _states(hidden_dim=24)[1].params)
    _each_data_file(tmp_path / "run" / "checkpoints" / "30", _flip)
    with pytest.raises(UserError, match="30 is damaged"):
        checkpoint.restore_params(tmp_path / "run", abstract.params)


def test_fingerprint_sees_every_bit_and_every_exchange():
    tree = {"a": jnp.arange(24, dtype=jnp.float32).reshape(4, 6), "b": jnp.int32(3)}
    sums, finite = checkpoint.checksums(tree)
    assert finite and sums.keys() == {"a", "b"}
    swapped = tree["a"].at[0, 0].set(1.0).at[0, 1].set(0.0)
    for changed in (swapped, tree["a"].at[3, 5].set(jnp.nextafter(23.0, 24.0)), -tree["a"]):
        assert checkpoint.checksums({**tree, "a": changed})[0]["a"] != sums["a"]
    assert checkpoint.checksums({**tree, "b": jnp.int32(4)})[0]["b"] != sums["b"]
    assert not checkpoint.checksums({"a": jnp.array([1.0, jnp.inf])})[1]
    assert checkpoint.checksums({"a": jnp.ones(3, jnp.bfloat16)})[1]


def test_run_directory_is_held_by_one_process(tmp_path):
    with (
        checkpoint.locked(tmp_path),
        pytest.raises(UserError, match=rf"in use by another process \(pid {os.getpid()}\)"),
        checkpoint.locked(tmp_path),
    ):
        pass
    with checkpoint.locked(tmp_path):
        pass


def test_info_is_json(tmp_path):
    _save(tmp_path)
    text = (tmp_path / "30" / "info" / "metadata").read_text()
    assert json.loads(text)["checksums"]["params/head/bias"]
    assert np.isfinite(json.loads(text)["step"])
