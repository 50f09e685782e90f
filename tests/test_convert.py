"""`python -m mixer.tools.convert`: every pair of formats, bit for bit, and what it refuses."""

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
# Odd ones: rectangles, axes of one.
SHAPES = {
    "tiny": (TINY, (32, 32), 7),
    "rectangle": (TINY | {"num_blocks": 1}, (16, 40), 2),
    "ones": (dict(patch_size=1, hidden_dim=1, num_blocks=1) | dict(tokens_mlp_dim=1), (1, 1), 1),
    "thin": (TINY | {"patch_size": 3, "hidden_dim": 5, "tokens_mlp_dim": 1}, (9, 3), 1),
    "many blocks": (TINY | {"num_blocks": 12, "hidden_dim": 4}, (8, 8), 3),
}


def read(path):
    return loading.read(path, log=lambda line: None)


def make(name, gelu="tanh"):
    """Random weights, none of them zero, with all that a card can say."""
    dims, size, classes = SHAPES[name]
    dims = {"channels_mlp_dim": 2} | dims
    model = make_model(num_classes=classes, gelu=gelu, **dims)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))["params"]
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
        source="made up",
    )
    return loading.Loaded(model, params, card)


def write(path, loaded, layout):
    convert.write(epath.Path(path), loaded, layout)
    return path


def test_through_every_format_is_bit_exact_and_keeps_the_card(tmp_path):
    made = loaded = make("rectangle", gelu="erf")
    for place, layout in enumerate(("run", "published", "timm", "legacy")):
        loaded = read(write(tmp_path / f"{place}_{NAMES[layout]}", loaded, layout))
        assert_same_bits(made.params, loaded.params)
        assert loaded.card == made.card
        assert loaded.model == made.model


@pytest.mark.slow
@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_every_pair_is_bit_exact_and_keeps_the_card(tmp_path, first, second):
    made = make("tiny", gelu="erf" if second == "run" else "tanh")
    one = read(write(tmp_path / f"a_{NAMES[first]}", made, first))
    two = read(write(tmp_path / f"b_{NAMES[second]}", one, second))
    assert_same_bits(made.params, two.params)
    assert two.card == one.card == made.card
    assert two.model == made.model


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name == "run" else ()) for name in NAMES],
)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_odd_shapes_come_back(tmp_path, name, layout):
    made = make(name)
    again = read(write(tmp_path / NAMES[layout], made, layout))
    assert_same_bits(made.params, again.params)
    assert again.card == made.card


def test_files_are_those_of_the_other_code(tmp_path):
    """Names, shapes, orientation and values of the goldens, out of each other."""
    for layout, golden in (
        ("published", PUBLISHED),
        ("legacy", GOLDENS / "mixer_tiny_legacy.npz"),
    ):
        path = write(tmp_path / f"{layout}.npz", read(PUBLISHED), layout)
        with np.load(path) as ours, np.load(golden) as theirs:
            assert set(ours.files) == set(theirs.files)
            for name in theirs.files:
                assert ours[name].shape == theirs[name].shape, name
                assert ours[name].tobytes() == theirs[name].tobytes(), name
    golden = GOLDENS / "mixer_tiny_timm.safetensors"
    ours = safetensors.numpy.load_file(write(tmp_path / "t.safetensors", read(golden), "timm"))
    theirs = safetensors.numpy.load_file(golden)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for layout in ("published", "legacy", "timm"):
        one, two = (
            write(tmp_path / f"{i}_{NAMES[layout]}", read(PUBLISHED), layout) for i in (1, 2)
        )
        assert one.read_bytes() == two.read_bytes()
    assert not list(tmp_path.glob("*.new"))


def test_the_json_tells_timm_how_to_build_the_model():
    """timm takes ratios of embed_dim, and cuts their product down to a whole number."""
    card = make("tiny").card
    for hidden in (24, 49, 100, 768, 1280):
        for width in (1, 7, 20, 48, 384, 1536, 5121):
            model = card.model(hidden_dim=hidden, channels_mlp_dim=width)
            assert int(timm_arguments(model, (32, 32))["mlp_ratio"][1] * hidden) == width
    arguments = timm_arguments(card.model(), card.image_size)
    assert (arguments["act_layer"], arguments["img_size"]) == ("gelu_tanh", [32, 32])


def test_values_that_are_not_finite_are_not_written(tmp_path):
    made = make("tiny")
    made.params["stem"]["bias"][0] = np.nan
    with pytest.raises(weights.UserError, match=r"stem/bias.*NaN"):
        write(tmp_path / "x.npz", made, "published")
    assert not list(tmp_path.iterdir())


def test_a_converted_run_is_no_training_run(tmp_path):
    from helpers import tiny_config
    from mixer import trainer
    from mixer.runs import config as run

    path = write(tmp_path / "run", make("tiny"), "run")
    for use in (lambda: run.read_run(path), lambda: trainer.train(tiny_config(), str(path))):
        with pytest.raises(weights.UserError, match=rf"{path}.*init"):
            use()


def command(*arguments, cwd, code=0):
    done = run_program("mixer.tools.convert", *arguments, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def test_the_command_converts_reports_and_grows(tmp_path):
    out, err = command(PUBLISHED, "large.safetensors", "--image_size=64", "--report", cwd=tmp_path)
    assert "64 x 64" in err and "published" in err
    assert re.search(r"large\.safetensors.*timm.*42,247.*0\.2 MB", out)
    rows = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()]
    rows = {row[1]: row for row in rows if len(row) > 6}
    with np.load(PUBLISHED) as file:
        mean, deviation = file["stem/kernel"].mean(), file["stem/kernel"].std()
    _, _, shape, _, size, *statistics = rows["stem/kernel"]
    assert (shape, size) == ("(8, 8, 3, 24)", "4,608")
    assert [float(value) for value in statistics[:2]] == pytest.approx([mean, deviation], rel=0.01)
    assert rows["MixerBlock_2/token_mixing/Dense_0/kernel"][2] == "(64, 80)"
    assert "Total: 42,247" in out  # 13,123 and 9,708 more a block
    card = json.loads((tmp_path / "large.safetensors.json").read_text())
    assert card["image_size"] == [64, 64] and card["tokens_mlp_dim"] == 80
    assert card["source"] == str(PUBLISHED) and card["gelu"] == "tanh"


def test_mistakes_get_one_line(tmp_path):
    (tmp_path / "there.npz").write_bytes(b"")
    (tmp_path / "beside.npz.json").write_text("{}")
    for arguments, message in (
        ((PUBLISHED,), "--report"),
        ((PUBLISHED, "x.h5"), "x.h5: "),
        ((PUBLISHED, "there.npz"), "there.npz"),
        ((PUBLISHED, "beside.npz"), "beside.npz.json"),
        ((PUBLISHED, "x.safetensors", "--layout=legacy"), "--layout=legacy"),
        ((PUBLISHED, tmp_path / "no" / "x.npz"), f"no folder {tmp_path / 'no'}"),
    ):
        _, err = command(*arguments, cwd=tmp_path, code=2)
        assert len(err.splitlines()) == 1 and message in err, err


@pytest.mark.slow
def test_the_command_is_a_program(tmp_path):
    run_python("-m", "mixer.tools.convert", PUBLISHED, "x.safetensors", cwd=tmp_path)
    done = run_python("-m", "mixer.tools.convert", PUBLISHED, cwd=tmp_path, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
