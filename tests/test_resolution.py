"""Tests resizing weights for another image size, by the paper's growth and by interpolation."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from mixer.errors import UserError
from mixer.models import mlp_mixer, resize
from mixer.models.registry import make_model

P = 2
SMALL = dict(patch_size=P, hidden_dim=8, num_blocks=2, channels_mlp_dim=12, num_classes=5)


def random_params(model, size, seed=0):
    """Returns flat parameters with random, nonzero values."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *size, 3), np.float32))
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0.5 if name.endswith("scale") else 0, 0.5, leaf.shape).astype(np.float32)
        for name, leaf in traverse_util.flatten_dict(shapes["params"], sep="/").items()
    }


def outputs(params, images, gelu="tanh"):
    """Returns last-block tokens, pre-logits and logits; the token MLP's width is inferred."""
    width = len(params["MixerBlock_0/token_mixing/Dense_0/bias"])
    model = make_model(**SMALL, tokens_mlp_dim=width, gelu=gelu)
    tree = traverse_util.unflatten_dict(params, sep="/")
    logits, blocks = jax.jit(model.apply)({"params": tree}, images)
    return np.asarray(blocks["block_1"]), np.asarray(blocks["pre_logits"]), np.asarray(logits)


def grow_all(params, grid, factors):
    new_grid = (grid[0] * factors[0], grid[1] * factors[1])
    return {
        name: mlp_mixer.grow(name, array, grid=grid, new_grid=new_grid)
        for name, array in params.items()
    }


def random_images(n, size):
    return np.random.default_rng(1).normal(0, 1, (n, *size, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("grid", "factors", "gelu"),
    [
        ((2, 3), (3, 2), "tanh"),
        pytest.param((3, 2), (1, 2), "erf", marks=pytest.mark.slow),
        pytest.param((2, 2), (2, 2), "tanh", marks=pytest.mark.slow),
        pytest.param((2, 2), (2, 2), "erf", marks=pytest.mark.slow),
        pytest.param((2, 3), (3, 3), "tanh", marks=pytest.mark.slow),
    ],
)
def test_grown_model_averages_over_the_tiles(grid, factors, gelu):
    size = (grid[0] * P, grid[1] * P)
    model = make_model(**SMALL, tokens_mlp_dim=7, gelu=gelu)
    params = random_params(model, size)
    k_h, k_w = factors
    images = random_images(3, (k_h * size[0], k_w * size[1]))
    tiles = images.reshape(3, k_h, size[0], k_w, size[1], 3).swapaxes(2, 3)
    tile_tokens, *tile_outputs = outputs(params, tiles.reshape(-1, *size, 3), gelu)

    grown = grow_all(params, grid, factors)
    tokens, *large_outputs = outputs(grown, images, gelu)
    # Compares tokens too: the last LayerNorm would hide a misplaced bias of the token MLP.
    tokens = tokens.reshape(3, k_h, grid[0], k_w, grid[1], -1).swapaxes(2, 3)
    np.testing.assert_allclose(tokens.reshape(tile_tokens.shape), tile_tokens, rtol=0, atol=1e-4)
    for actual, per_tile in zip(large_outputs, tile_outputs, strict=True):
        mean = per_tile.reshape(3, k_h * k_w, -1).mean(1)
        assert np.abs(mean).max() > 0.1
        np.testing.assert_allclose(actual, mean, rtol=0, atol=1e-4)


def test_growing_twice_by_two_equals_growing_by_four():
    grid = (1, 2)
    params = random_params(make_model(**SMALL, tokens_mlp_dim=3), (P, 2 * P))
    images = random_images(2, (4 * P, 8 * P))
    actual_outputs = outputs(grow_all(grow_all(params, grid, (2, 2)), (2, 4), (2, 2)), images)
    expected_outputs = outputs(grow_all(params, grid, (4, 4)), images)
    for actual, expected in zip(actual_outputs, expected_outputs, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("leaf", ["Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel"])
def test_growth_copies_bits_and_keeps_the_dtype(leaf):
    name = f"MixerBlock_11/token_mixing/{leaf}"
    shape = {"Dense_0/kernel": (6, 4), "Dense_0/bias": (4,), "Dense_1/kernel": (4, 6)}[leaf]
    bits = np.random.default_rng(0).integers(1, 2**15, shape, np.uint16)
    grown = mlp_mixer.grow(name, bits.view(ml_dtypes.bfloat16), grid=(2, 3), new_grid=(4, 3))
    assert grown.dtype == ml_dtypes.bfloat16
    values, counts = np.unique(grown.view(np.uint16), return_counts=True)
    expected = np.concatenate([bits.ravel()] * 2)
    num_zeros = grown.size - expected.size
    assert (counts[0] if values[0] == 0 else 0) == num_zeros
    np.testing.assert_array_equal(
        np.sort(grown.view(np.uint16).ravel())[num_zeros:], np.sort(expected)
    )


@pytest.mark.parametrize(
    "name", ["stem/kernel", "MixerBlock_0/channel_mixing/Dense_0/kernel", "head/bias"]
)
def test_other_parameters_are_returned_unchanged(name):
    array = np.ones((4, 4), np.float32)
    assert mlp_mixer.grow(name, array, grid=(2, 2), new_grid=(4, 4)) is array
    assert mlp_mixer.interpolate(name, array, grid=(2, 2), new_grid=(3, 3)) is array


def test_growth_factors_are_integers_per_dimension():
    assert resize.growth_factors((224, 224), (448, 672), 16) == (2, 3)
    assert resize.growth_factors((224, 224), (224, 224), 16) == (1, 1)
    assert resize.growth_factors((224, 160), (224, 320), 16) == (1, 2)


@pytest.mark.parametrize(
    ("new_size", "nearest"),
    [
        ((384, 384), "(224 or 448) x (224 or 448)"),
        ((448, 500), "448 x (448 or 672)"),
        ((112, 224), " 224 x 224"),
    ],
)
def test_non_integer_growth_factors_are_an_error(new_size, nearest):
    with pytest.raises(UserError) as error:
        resize.growth_factors((224, 224), new_size, 16)
    message = str(error.value)
    assert f"{new_size[0]} x {new_size[1]}" in message and nearest in message
    assert "interpolat" in message and " 16" in message


def token_leaves(grid, width, seed=0):
    """Returns random weights of a token MLP, by name."""
    rng = np.random.default_rng(seed)
    tokens = grid[0] * grid[1]
    shapes = {
        "Dense_0/kernel": (tokens, width),
        "Dense_0/bias": (width,),
        "Dense_1/kernel": (width, tokens),
        "Dense_1/bias": (tokens,),
    }
    return {
        f"MixerBlock_0/token_mixing/{name}": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("grid", "new_grid"), [((3, 4), (5, 7)), ((7, 6), (4, 3)), ((4, 4), (8, 3))]
)
def test_interpolation_keeps_the_output_for_equal_tokens(grid, new_grid):
    """Equal tokens give the same hidden units, and equal weights give the same output."""
    params = token_leaves(grid, width=9)
    new_params = {
        name: mlp_mixer.interpolate(name, array, grid=grid, new_grid=new_grid)
        for name, array in params.items()
    }
    for name, leaf in token_leaves(new_grid, width=9).items():
        assert new_params[name].shape == leaf.shape and new_params[name].dtype == np.float32, name
    kernel = "MixerBlock_0/token_mixing/Dense_0/kernel"
    tokens = np.full((2, params[kernel].shape[0]), 1.7, np.float32)
    new_tokens = np.full((2, new_params[kernel].shape[0]), 1.7, np.float32)
    np.testing.assert_allclose(
        new_tokens @ new_params[kernel], tokens @ params[kernel], rtol=0, atol=1e-5
    )

    kernel = "MixerBlock_0/token_mixing/Dense_1/kernel"
    column = params[kernel][:, :1]
    equal_columns = np.repeat(column, params[kernel].shape[1], axis=1)
    resized = mlp_mixer.interpolate(kernel, equal_columns, grid=grid, new_grid=new_grid)
    np.testing.assert_allclose(resized, np.repeat(column, resized.shape[1], 1), atol=1e-6)


@pytest.mark.parametrize("new_grid", [(6, 10), pytest.param((2, 3), marks=pytest.mark.slow)])
def test_interpolation_matches_image_resizing(new_grid):
    """Dense_1 is resized like an image, and Dense_0 acts on tokens resized to the old grid."""
    grid = (3, 5)
    leaves = token_leaves(grid, width=4)
    new_arrays = {
        name.removeprefix("MixerBlock_0/token_mixing/"): mlp_mixer.interpolate(
            name, array, grid=grid, new_grid=new_grid
        )
        for name, array in leaves.items()
    }
    arrays = list(leaves.values())
    image = jax.image.resize(arrays[2].reshape(4, *grid), (4, *new_grid), "bilinear")
    np.testing.assert_allclose(new_arrays["Dense_1/kernel"].reshape(image.shape), image, atol=1e-5)
    image = jax.image.resize(arrays[3].reshape(grid), new_grid, "bilinear")
    np.testing.assert_allclose(new_arrays["Dense_1/bias"].reshape(image.shape), image, atol=1e-5)

    tokens = np.random.default_rng(1).normal(size=new_grid).astype(np.float32)
    resized = np.asarray(jax.image.resize(tokens, grid, "bilinear"))
    np.testing.assert_allclose(
        tokens.ravel() @ new_arrays["Dense_0/kernel"],
        resized.ravel() @ arrays[0],
        rtol=0,
        atol=1e-5,
    )


def test_interpolation_to_the_same_size_is_the_identity():
    for name, array in token_leaves((3, 4), width=5).items():
        assert mlp_mixer.interpolate(name, array, grid=(3, 4), new_grid=(3, 4)) is array
