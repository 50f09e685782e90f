import jax
import numpy as np
import pytest

from helpers import TINY, assert_same_bits, golden_params, leaves
from mixer import load, sharding
from mixer.errors import UserError
from mixer.model import make_model
from mixer.train_state import init_state
from mixer.weights import read_npz


def _params(num_classes=7, **fields):
    import optax

    model = make_model(num_classes=num_classes, **{**TINY, **fields})
    mesh = sharding.make_mesh({"data": -1})
    return init_state(model, optax.identity(), (32, 32), mesh, seed=0).params


@pytest.fixture(scope="module")
def published():
    from helpers import GOLDENS

    return GOLDENS / "mixer_tiny_official.npz"


def _write(path, arrays):
    np.savez(path, **arrays)
    return path


def test_published_file_is_taken_whole(published):
    params, head = load.initial_params(published, _params(), head="auto")
    assert head == "head kept"
    assert_same_bits(params, golden_params())


@pytest.mark.parametrize("mode", ["auto", "reset"])
def test_head_of_other_classes_is_reset(published, mode):
    fresh = _params(num_classes=10)
    params, head = load.initial_params(published, fresh, head=mode)
    assert head == "head reset" and not np.any(params["head"]["kernel"])
    assert params["head"]["kernel"].shape == (24, 10)
    assert_same_bits(params["MixerBlock_2"], golden_params()["MixerBlock_2"])
    with pytest.raises(UserError, match=r"head/bias: in the file \(7,\), wanted \(10,\)"):
        load.initial_params(published, fresh, head="keep")


def test_every_misfit_is_listed(published, tmp_path):
    with pytest.raises(UserError) as caught:
        load.initial_params(published, _params(hidden_dim=16, num_blocks=4), head="auto")
    text = str(caught.value)
    assert "stem/kernel: in the file (8, 8, 3, 24), wanted (8, 8, 3, 16)" in text
    assert "MixerBlock_3/LayerNorm_0/bias: missing" in text and "\n" not in text
    arrays = read_npz(published)
    arrays["stem/bias"] = arrays["stem/bias"] * np.nan
    arrays["extra"] = np.zeros(1)
    with pytest.raises(UserError, match=r"extra: not in the model; stem/bias: holds NaN"):
        load.initial_params(_write(tmp_path / "bad.npz", arrays), _params(), head="auto")


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    (tmp_path / "empty.npz").write_bytes(b"")
    with (tmp_path / "bare.npz").open("wb") as file:
        np.save(file, np.ones(3))
    np.savez_compressed(tmp_path / "flipped.npz", a=np.random.default_rng(0).normal(size=300))
    data = bytearray((tmp_path / "flipped.npz").read_bytes())
    data[200] ^= 255
    (tmp_path / "flipped.npz").write_bytes(data)
    for name, message in (
        ("bare", "no npz file"),
        ("flipped", "no npz file|damaged"),
        ("text", "no npz file"),
        ("pickled", "no npz file.*pickle"),
        ("empty", "no npz file"),
        ("missing", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            load.initial_params(tmp_path / f"{name}.npz", _params(), head="auto")


def test_weights_for_another_image_size_say_so(published):
    arrays = read_npz(published)
    params = _params()
    for block in range(3):
        mixing = params[f"MixerBlock_{block}"]["token_mixing"]
        mixing["Dense_0"]["kernel"] = jax.numpy.zeros((64, 20))
        mixing["Dense_1"] = {"kernel": jax.numpy.zeros((20, 64)), "bias": jax.numpy.zeros(64)}
    with pytest.raises(UserError, match="for images of 16 patches, and the model has 64"):
        load.initial_params(published, params, head="auto")
    assert arrays["MixerBlock_0/token_mixing/Dense_0/kernel"].shape == (16, 20)


def test_weights_lie_where_the_model_lies(published):
    params, _ = load.initial_params(published, _params(), head="auto")
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(
        lambda x: x.sharding, _params()
    )
    assert leaves(params).keys() == leaves(_params()).keys()
