"""`python -m mixer.tools.convert`: bit-exact conversion between all formats, and its errors."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from helpers import GOLDENS, TINY, assert_same_bits, run_program, run_python
from mixer.models.mlp_mixer import timm_arguments
from mixer.models.registry import make_model
from mixer.tools import convert
from mixer.weights import formats as weights
from mixer.weights import load as loading
from mixer.weights.card import Card

PUBLISHED = GOLDENS / "mixer_tiny_official.npz"
NAMES = {"run": "run", "published": "new.npz", "legacy": "old.npz", "timm": "timm.safetensors"}
# Models with unusual shapes: rectangles, and axes of length one.
SHAPES = {
    "tiny": (TINY, (32, 32), 7),
    "rectangle": (TINY | {"num_blocks": 1}, (16, 40), 2),
    "ones": (dict(patch_size=1, hidden_dim=1, num_blocks=1) | dict(tokens_mlp_dim=1), (1, 1), 1),
    "thin": (TINY | {"patch_size": 3, "hidden_dim": 5, "tokens_mlp_dim": 1}, (9, 3), 1),
    "grey": (TINY | {"patch_size": (4, 8), "in_channels": 1}, (8, 24), 3),
    "many blocks": (TINY | {"num_blocks": 12, "hidden_dim": 4}, (8, 8), 3),
}


def read(path):
    return loading.read(path, log=lambda line: None)


def make(name, gelu="tanh"):
    """Returns random weights without zeros, with every field of the card set."""
    dims, size, classes = SHAPES[name]
    dims = {"channels_mlp_dim": 2, "in_channels": 3} | dims
    model = make_model(num_classes=classes, gelu=gelu, **dims)
    images = jnp.zeros((1, *size, model.in_channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    card = Card(
        architecture="mixer",
        variant=None,
        dimensions=dims,
        num_classes=classes,
        image_size=size,
        gelu=gelu,
        preprocess=f"decode|resize({size})",
        class_names=tuple(f"class {i}" for i in range(classes)),
        source="test",
    )
    return loading.Loaded(model, params, card)


def write(path, loaded, layout):
    convert.write(epath.Path(path), loaded, layout)
    return path


def test_conversion_through_all_formats_keeps_weights_and_card(tmp_path):
    original = loaded = make("rectangle", gelu="erf")
    for index, layout in enumerate(("run", "published", "timm", "legacy")):
        loaded = read(write(tmp_path / f"{index}_{NAMES[layout]}", loaded, layout))
        assert_same_bits(original.params, loaded.params)
        assert loaded.card == original.card
        assert loaded.model == original.model


@pytest.mark.slow
@pytest.mark.parametrize("first_layout", NAMES)
@pytest.mark.parametrize("second_layout", NAMES)
def test_conversion_between_two_formats_keeps_weights_and_card(
    tmp_path, first_layout, second_layout
):
    original = make("tiny", gelu="erf" if second_layout == "run" else "tanh")
    loaded = read(write(tmp_path / f"a_{NAMES[first_layout]}", original, first_layout))
    reloaded = read(write(tmp_path / f"b_{NAMES[second_layout]}", loaded, second_layout))
    assert_same_bits(original.params, reloaded.params)
    assert reloaded.card == loaded.card == original.card
    assert reloaded.model == original.model


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name == "run" else ()) for name in NAMES],
)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_unusual_shapes_are_restored(tmp_path, name, layout):
    original = make(name)
    loaded = read(write(tmp_path / NAMES[layout], original, layout))
    assert_same_bits(original.params, loaded.params)
    assert loaded.card == original.card


def test_files_match_the_goldens_of_other_implementations(tmp_path):
    """Converted goldens have the names, shapes and values of the goldens in the other formats."""
    for layout, golden in (
        ("published", PUBLISHED),
        ("legacy", GOLDENS / "mixer_tiny_legacy.npz"),
    ):
        path = write(tmp_path / f"{layout}.npz", read(PUBLISHED), layout)
        with np.load(path) as actual, np.load(golden) as expected:
            assert set(actual.files) == set(expected.files)
            for name in expected.files:
                assert actual[name].shape == expected[name].shape, name
                assert actual[name].tobytes() == expected[name].tobytes(), name
    golden = GOLDENS / "mixer_tiny_timm.safetensors"
    actual = safetensors.numpy.load_file(write(tmp_path / "t.safetensors", read(golden), "timm"))
    expected = safetensors.numpy.load_file(golden)
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[name], expected[name]) for name in expected)


def test_written_bytes_are_deterministic(tmp_path):
    for layout in ("published", "legacy", "timm"):
        path_1, path_2 = (
            write(tmp_path / f"{i}_{NAMES[layout]}", read(PUBLISHED), layout) for i in (1, 2)
        )
        assert path_1.read_bytes() == path_2.read_bytes()
    assert not list(tmp_path.glob("*.new"))


def test_timm_arguments_give_the_exact_mlp_widths():
    """timm multiplies mlp_ratio by embed_dim and truncates the product."""
    card = make("tiny").card
    for hidden_dim in (24, 49, 100, 768, 1280):
        for width in (1, 7, 20, 48, 384, 1536, 5121):
            model = card.model(hidden_dim=hidden_dim, channels_mlp_dim=width)
            assert int(timm_arguments(model, (32, 32))["mlp_ratio"][1] * hidden_dim) == width
    arguments = timm_arguments(card.model(), card.image_size)
    assert (arguments["act_layer"], arguments["img_size"]) == ("gelu_tanh", [32, 32])


def test_non_finite_weights_are_not_written(tmp_path):
    weights_with_nan = make("tiny")
    weights_with_nan.params["stem"]["bias"][0] = np.nan
    with pytest.raises(weights.UserError, match=r"stem/bias.*NaN"):
        write(tmp_path / "x.npz", weights_with_nan, "published")
    assert not list(tmp_path.iterdir())


def test_converted_run_cannot_be_trained(tmp_path):
    from helpers import tiny_config
    from mixer import trainer
    from mixer.runs import config as run

    path = write(tmp_path / "run", make("tiny"), "run")
    for open_run in (lambda: run.read_run(path), lambda: trainer.train(tiny_config(), str(path))):
        with pytest.raises(weights.UserError, match=rf"{path}.*init"):
            open_run()


def command(*arguments, cwd, code=0):
    result = run_program("mixer.tools.convert", *arguments, cwd=cwd)
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


def test_command_converts_resizes_and_reports(tmp_path):
    stdout, stderr = command(
        PUBLISHED, "large.safetensors", "--image_size=64", "--report", cwd=tmp_path
    )
    assert "64 x 64" in stderr and "published" in stderr
    assert re.search(r"large\.safetensors.*timm.*42,247.*0\.2 MB", stdout)
    rows = [[cell.strip() for cell in line.split("|")] for line in stdout.splitlines()]
    rows = {row[1]: row for row in rows if len(row) > 6}
    with np.load(PUBLISHED) as file:
        mean, deviation = file["stem/kernel"].mean(), file["stem/kernel"].std()
    _, _, shape, _, size, *statistics = rows["stem/kernel"]
    assert (shape, size) == ("(8, 8, 3, 24)", "4,608")
    assert [float(value) for value in statistics[:2]] == pytest.approx([mean, deviation], rel=0.01)
    assert rows["MixerBlock_2/token_mixing/Dense_0/kernel"][2] == "(64, 80)"
    assert "Total: 42,247" in stdout  # 13,123 and 9,708 per block
    card = json.loads((tmp_path / "large.safetensors.json").read_text())
    assert card["image_size"] == [64, 64] and card["tokens_mlp_dim"] == 80
    assert card["source"] == str(PUBLISHED) and card["gelu"] == "tanh"


def test_invalid_arguments_are_one_line_errors(tmp_path):
    (tmp_path / "existing.npz").write_bytes(b"")
    (tmp_path / "with_card.npz.json").write_text("{}")
    for arguments, message in (
        ((PUBLISHED,), "--report"),
        ((PUBLISHED, "x.h5"), "x.h5: "),
        ((PUBLISHED, "existing.npz"), "existing.npz"),
        ((PUBLISHED, "with_card.npz"), "with_card.npz.json"),
        ((PUBLISHED, "x.safetensors", "--layout=legacy"), "--layout=legacy"),
        ((PUBLISHED, tmp_path / "no" / "x.npz"), f"no folder {tmp_path / 'no'}"),
    ):
        _, stderr = command(*arguments, cwd=tmp_path, code=2)
        assert len(stderr.splitlines()) == 1 and message in stderr, stderr


@pytest.mark.slow
def test_convert_runs_as_a_program(tmp_path):
    run_python("-m", "mixer.tools.convert", PUBLISHED, "x.safetensors", cwd=tmp_path)
    result = run_python("-m", "mixer.tools.convert", PUBLISHED, cwd=tmp_path, check=False)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
