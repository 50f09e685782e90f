"""Checkpoints: exact round trips, damaged files, failed saves, fingerprints and locks."""

import gc
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import PUBLISHED, assert_same_bits
from mixer.errors import UserError
from mixer.models.registry import make_model
from mixer.parallel import sharding
from mixer.runs import directory
from mixer.training import optimizer
from mixer.training import state as train_state
from mixer.weights import checkpoint


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
    abstract = train_state.abstract_state(model, TX, (8, 8), mesh)
    return train_state.init_state(model, TX, (8, 8), 0, abstract), abstract


def _state_at(state, step):
    """Returns the state at another step, with every value changed."""
    trees = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), (state.params, state.opt_state))
    return state.replace(step=jnp.int32(step), params=trees[0], opt_state=trees[1])


def _open(path, **options):
    return checkpoint.Checkpoints(path, **{"keep_last": 2, **options})


@pytest.fixture(scope="module")
def states():
    """A state at step 0, and its abstract state."""
    return _states()


@pytest.fixture(scope="module")
def saved_checkpoints(states, tmp_path_factory):
    """The directory of checkpoints at steps 10, 20 and 30, of which the last two are kept."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    with _open(path) as manager:
        for step in (10, 20, 30):
            manager.save(_state_at(states[0], step))
        manager.wait()
        assert manager.steps == [20, 30]
    return path


@pytest.fixture
def checkpoints(saved_checkpoints, tmp_path):
    """A copy of `saved_checkpoints` that a test may damage."""
    return shutil.copytree(saved_checkpoints, tmp_path / "checkpoints")


def test_round_trip_is_exact_and_records_versions(saved_checkpoints, states):
    state, abstract = states
    with _open(saved_checkpoints) as manager:
        restored, info = manager.restore_latest(abstract, warn=pytest.fail)
    assert_same_bits(restored, _state_at(state, 30))
    assert info["step"] == 30
    assert {"python", "commit", "jax", "flax", "optax", "orbax-checkpoint"} <= set(info["versions"])
    text = (saved_checkpoints / "30" / "info" / "metadata").read_text()
    assert json.loads(text)["checksums"]["params/head/bias"]
    assert np.isfinite(json.loads(text)["step"])


def test_last_checkpoints_and_multiples_are_kept(states, tmp_path):
    with _open(tmp_path / "checkpoints", keep_last=1, keep_every_steps=20) as manager:
        for step in range(10, 60, 10):
            manager.save(_state_at(states[0], step))
        manager.wait()
        assert manager.steps == [20, 40, 50]


def test_background_save_is_not_affected_by_later_updates(tmp_path):
    """A background save writes the state passed to it, although its buffers are donated at once."""
    state, abstract = _states(hidden_dim=256, channels_mlp_dim=1024, num_blocks=1)
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    expected = {}
    with _open(tmp_path, keep_last=100) as manager:
        for _ in range(4):
            state = add(state)
            expected[int(state.step)] = checkpoint.checksums(state.params)[0]
            manager.save(state)
            for _ in range(5):
                state = add(state)
        manager.wait()
        assert manager.steps == list(expected)
    for step, sums in expected.items():
        params = checkpoint.restore_params(tmp_path / str(step), abstract.params)
        assert checkpoint.checksums(params)[0] == sums


def _files(directory):
    return sorted(
        os.path.join(root, name) for root, _, names in os.walk(directory) for name in names
    )


def _flip(path):
    data = bytearray(Path(path).read_bytes())
    for i in range(len(data) // 3, min(len(data) // 3 + 64, len(data))):
        data[i] ^= 255
    Path(path).write_bytes(data)


def _damage_data_files(directory, damage):
    """Damages every data file, since thread timing decides which of them contain the arrays."""
    for path in _files(directory):
        if f"{os.sep}d{os.sep}" in path:
            damage(path)


DAMAGE = {
    "truncated data": lambda d: _damage_data_files(
        d, lambda f: os.truncate(f, os.path.getsize(f) // 2)
    ),
    "flipped data": lambda d: _damage_data_files(d, _flip),
    "missing data": lambda d: _damage_data_files(d, os.remove),
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


KINDS = ("truncated data", "flipped data", "flipped info", "missing state")


@pytest.mark.parametrize(
    "damage",
    [pytest.param(kind, marks=() if kind in KINDS else pytest.mark.slow) for kind in DAMAGE],
)
def test_damaged_checkpoint_is_moved_aside_and_saved_again(
    checkpoints, states, tmp_path, damage, capfd
):
    state, abstract = states
    DAMAGE[damage](checkpoints / "30")
    capfd.readouterr()
    lines = []
    with _open(checkpoints) as manager:
        restored, _ = manager.restore_latest(abstract, lines.append)
        assert int(restored.step) == 20
        assert_same_bits(restored, _state_at(state, 20))
        manager.save(_state_at(state, 30))
        manager.wait()
        assert manager.steps == [20, 30]
    if lines:  # Orbax ignores an empty directory, so there is no warning
        assert len(lines) == 1 and str(checkpoints / "30") in lines[0] and "\n" not in lines[0]
        assert len(list((tmp_path / "damaged").iterdir())) == 1
    assert "Traceback" not in "".join(capfd.readouterr())
    with _open(checkpoints) as manager:
        assert int(manager.restore_latest(abstract, pytest.fail)[0].step) == 30


@pytest.mark.slow
def test_every_damaged_file_is_detected_or_harmless(saved_checkpoints, states, tmp_path, capfd):
    """Damages each file in turn; the restored state is always one that was saved."""
    state, abstract = states
    copy = tmp_path / "checkpoints"
    for path in _files(saved_checkpoints / "30"):
        if not os.path.getsize(path):
            continue
        for damage in (_flip, os.remove):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(saved_checkpoints, copy)
            damage(copy / os.path.relpath(path, saved_checkpoints))
            with _open(copy) as manager:
                restored, info = manager.restore_latest(abstract, lambda line: None)
            assert info["step"] == int(restored.step) in (20, 30)
            assert_same_bits(restored, _state_at(state, int(restored.step)))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_unawaited_orbax_read_causes_no_warning(tmp_path, recwarn):
    async def read():
        pass

    with _open(tmp_path / "checkpoints"):
        read()
        gc.collect()
    assert not [
        str(warning.message) for warning in recwarn if "never awaited" in str(warning.message)
    ]


def test_restore_fails_if_every_checkpoint_is_damaged(checkpoints, states):
    abstract = states[1]
    for step in ("20", "30"):
        _damage_data_files(checkpoints / step, _flip)
    lines = []
    with _open(checkpoints) as manager:
        with pytest.raises(UserError, match=rf"{checkpoints}.*damaged"):
            manager.restore_latest(abstract, lines.append)
        assert len(lines) == 2
        assert manager.restore_latest(abstract, lines.append) is None


def _abstract(**fields):
    return train_state.abstract_state(
        _model(**fields), TX, (8, 8), sharding.make_mesh({"data": -1})
    )


def test_checkpoint_of_another_model_is_an_error_and_is_kept(saved_checkpoints):
    with _open(saved_checkpoints) as manager:
        with pytest.raises(UserError, match=str(saved_checkpoints / "30")) as error:
            manager.restore_latest(_abstract(hidden_dim=24, num_blocks=1), pytest.fail)
        assert manager.steps == [20, 30]
    text = str(error.value)
    assert re.search(r"params/stem/kernel: .*\(2, 2, 3, 16\).*\(2, 2, 3, 24\)", text)
    assert "params/MixerBlock_1/LayerNorm_0/bias: " in text


def test_non_finite_state_is_not_saved(states, tmp_path):
    state, _ = states
    nan_state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    with _open(tmp_path / "checkpoints") as manager:
        with pytest.raises(UserError, match=r"NaN.*peak_lr"):
            manager.save(nan_state)
        assert manager.steps == []


def test_failed_background_save_reports_the_reason(states, tmp_path):
    """A limit of 2 kB per file makes the second save fail, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    state, _ = states
    with (
        pytest.raises(UserError, match=r"File too large.*checkpoints/10"),
        _open(tmp_path / "checkpoints") as manager,
    ):
        manager.save(_state_at(state, 10))
        manager.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            manager.save(_state_at(state, 20))
            manager.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)


def test_restore_params_reads_only_parameters(checkpoints, states, tmp_path):
    state, abstract = states
    for path in (tmp_path, checkpoints, checkpoints / "30"):
        params = checkpoint.restore_params(path, abstract.params)
        assert_same_bits(params, _state_at(state, 30).params)
    params = checkpoint.restore_params(checkpoints / "20", abstract.params)
    assert_same_bits(params, _state_at(state, 20).params)
    with pytest.raises(UserError, match="nowhere"):
        checkpoint.restore_params(tmp_path / "nowhere", abstract.params)
    with pytest.raises(UserError, match=r"stem/bias: .*\(16,\).*\(24,\)"):
        checkpoint.restore_params(tmp_path, _abstract(hidden_dim=24).params)
    _damage_data_files(checkpoints / "30", _flip)
    with pytest.raises(UserError, match=str(checkpoints / "30")):
        checkpoint.restore_params(tmp_path, abstract.params)


def test_checksums_detect_changed_bits_and_swapped_values():
    tree = {"a": jnp.arange(24, dtype=jnp.float32).reshape(4, 6), "b": jnp.int32(3)}
    sums, finite = checkpoint.checksums(tree)
    assert finite and sums.keys() == {"a", "b"}
    swapped_array = tree["a"].at[0, 0].set(1.0).at[0, 1].set(0.0)
    for changed_array in (
        swapped_array,
        tree["a"].at[3, 5].set(jnp.nextafter(23.0, 24.0)),
        -tree["a"],
    ):
        assert checkpoint.checksums({**tree, "a": changed_array})[0]["a"] != sums["a"]
    assert checkpoint.checksums({**tree, "b": jnp.int32(4)})[0]["b"] != sums["b"]
    assert not checkpoint.checksums({"a": jnp.array([1.0, jnp.inf])})[1]
    assert checkpoint.checksums({"a": jnp.ones(3, jnp.bfloat16)})[1]


def test_run_directory_is_locked_by_one_process(tmp_path):
    with (
        directory.lock(tmp_path),
        pytest.raises(UserError, match=rf"{tmp_path}.*\b{os.getpid()}\b"),
        directory.lock(tmp_path),
    ):
        pass
    with directory.lock(tmp_path):
        pass
