import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from helpers import TINY, golden, golden_params
from mixer.errors import UserError
from mixer.models.mlp_mixer import VARIANTS, MlpMixer
from mixer.models.modules import MlpBlock
from mixer.models.registry import make_model

# Parameter counts with 1,000 classes.
NUM_PARAMS = {
    "S/32": 19_104_624,
    "S/16": 18_528_264,
    "S/8": 20_646_504,
    "B/32": 60_293_428,
    "B/16": 59_880_472,
    "L/32": 206_939_264,
    "L/16": 208_196_168,
    "H/14": 432_350_952,
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow if v.startswith("L") else ()) for v in VARIANTS],
)
def test_variant_has_the_published_parameter_count_and_names(variant):
    model = make_model(variant=variant, num_classes=1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    params = traverse_util.flatten_dict(shapes, sep="/")
    assert sum(leaf.size for leaf in params.values()) == NUM_PARAMS[variant]
    assert len(params) == 12 * model.num_blocks + 6
    last_block = f"MixerBlock_{model.num_blocks - 1}"
    tokens = (224 // model.patch_size) ** 2
    assert params[f"{last_block}/token_mixing/Dense_0/kernel"].shape == (
        tokens,
        model.tokens_mlp_dim,
    )
    assert params[f"{last_block}/channel_mixing/Dense_1/kernel"].shape == (
        model.channels_mlp_dim,
        model.hidden_dim,
    )
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    assert {"stem/kernel", "pre_head_layer_norm/scale", "head/bias"} <= set(params)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def _apply_model(model, params, images, key, example_index, train):
    rngs = {"dropout": key} if train else None
    settings = dict(train=train, example_index=example_index, rngs=rngs)
    return model.apply({"params": params}, images, **settings)


def _apply(images=None, train=False, seed=0, example_index=None, **fields):
    model = make_model(num_classes=7, **{**TINY, **fields})
    images = golden("outputs")["image"] if images is None else images
    key = jax.random.key(seed)
    return _apply_model(model, golden_params(), images, key, example_index, train)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.uint8), "uint8.*float"),
        (np.zeros((1, 3, 32, 32), np.float32), r"\(1, 3, 32, 32\).*\(N, H, W, 3\)"),
        (np.zeros((32, 32, 3), np.float32), r"\(32, 32, 3\).*\(N, H, W, 3\)"),
    ],
)
def test_images_of_wrong_shape_or_dtype_are_an_error(images, message):
    model = make_model(num_classes=7, **TINY)
    with pytest.raises(UserError, match=message):
        model.apply({"params": golden_params()}, images)


def test_tanh_and_erf_gelu_differ_slightly():
    tanh_logits, erf_logits = _apply(gelu="tanh")[0], _apply(gelu="erf")[0]
    assert 0 < np.abs(tanh_logits - erf_logits).max() < 0.05


def test_bfloat16_model_has_float32_parameters_and_logits():
    logits, blocks = _apply(dtype="bfloat16")
    assert blocks["block_2"].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden("outputs")["logits"], atol=0.1)
    model = make_model(num_classes=7, dtype="bfloat16", **TINY)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_head_kernel_starts_at_zero_and_bias_at_its_value():
    model = make_model(num_classes=7, head_bias_init=-6.9, **TINY)
    images = jnp.zeros((1, 32, 32, 3))
    head = jax.jit(lambda: model.init(jax.random.key(0), images)["params"]["head"])()
    assert not head["kernel"].any()
    np.testing.assert_allclose(head["bias"], -6.9)


@pytest.mark.parametrize("rescale", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stochastic_depth_drops_branches_at_the_linear_rate(rescale):
    """A branch that is not dropped has weight 1 (the authors) or 1 / (1 - rate) (timm)."""
    images = np.repeat(golden("outputs")["image"][:1], 512, axis=0)
    rate = 0.6
    _, blocks = _apply(images, train=True, stoch_depth=rate, stoch_depth_rescale=rescale)
    _, full_blocks = _apply(images[:1])
    # The rate of block 0 is 0.
    np.testing.assert_allclose(
        blocks["block_0"], np.repeat(full_blocks["block_0"], 512, 0), atol=1e-5
    )
    # Block 1 drops each of its two branches with rate / 2, which gives four outcomes.
    outcomes, counts = np.unique(
        np.round(np.asarray(blocks["block_1"]).reshape(512, -1)[:, :8], 4),
        axis=0,
        return_counts=True,
    )
    assert len(outcomes) == 4
    keep_prob = 1 - rate / 2
    expected = sorted(
        [
            keep_prob**2,
            keep_prob * (1 - keep_prob),
            keep_prob * (1 - keep_prob),
            (1 - keep_prob) ** 2,
        ]
    )
    np.testing.assert_allclose(sorted(counts / 512), expected, atol=0.07)
    # Without both branches the output is the input; with both it is that of the whole block.
    flat = np.asarray(blocks["block_1"]).reshape(512, -1)
    assert (np.abs(flat - np.ravel(full_blocks["block_0"])).max(1) < 1e-5).any()
    has_unscaled_block = (np.abs(flat - np.ravel(full_blocks["block_1"])).max(1) < 1e-4).any()
    assert has_unscaled_block != rescale


def test_stochastic_depth_and_dropout_are_off_in_evaluation():
    expected = _apply()[0]
    np.testing.assert_array_equal(_apply(stoch_depth=0.5, dropout=0.5)[0], expected)


def test_dropout_has_its_rate_and_rescales():
    """Checks the last layer of an MLP, whose dropout mask multiplies the output directly."""
    x = jax.random.normal(jax.random.key(1), (256, 4, 6))
    mlp = MlpBlock(axis=2, mlp_dim=8, gelu="tanh", dropout=0.25)
    params = jax.jit(mlp.init)(jax.random.key(0), x, None)
    params["params"]["Dense_1"]["kernel"] *= 0  # the output is the bias, 1
    params["params"]["Dense_1"]["bias"] += 1
    keys = jax.random.split(jax.random.key(2), 256)
    values, counts = np.unique(jax.jit(mlp.apply)(params, x, keys), return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(counts[0] / counts.sum(), 0.25, atol=0.02)


def test_masks_depend_only_on_global_index_and_key():
    images = np.repeat(golden("outputs")["image"], 4, axis=0)
    settings = dict(train=True, stoch_depth=0.5, dropout=0.3)
    index = jnp.arange(len(images))
    logits = _apply(images, example_index=index, **settings)[0]
    # Two halves of the batch change places, as on other devices.
    half = len(images) // 2
    swapped_index = jnp.roll(index, half)
    swapped = _apply(np.roll(images, half, 0), example_index=swapped_index, **settings)[0]
    np.testing.assert_allclose(np.roll(swapped, half, 0), logits, atol=1e-6)
    other_seed_logits = _apply(images, seed=1, **settings)[0]
    assert np.abs(other_seed_logits - logits).max() > 1e-3


@pytest.mark.parametrize("size", [(33, 32), (32, 30), (4, 32)])
def test_image_size_must_be_divisible_by_the_patch_size(size):
    with pytest.raises(UserError, match="8"):
        _apply(np.zeros((1, *size, 3), np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(variant="B/17"), "'B/17'.*'B/16'"),
        (dict(variant="S/16", hiden_dim=3), "'hiden_dim'.*'hidden_dim'"),
        (dict(patch_size=4), "hidden_dim"),
        (dict(variant="S/16", gelu="relu"), "relu.*tanh, erf"),
        (dict(variant="S/16", dtype="float16"), "float16.*float32, bfloat16"),
        (dict(variant="S/16", stoch_depth=1.0), "stoch_depth.*1.0"),
        (dict(variant="S/16", hidden_dim=0), "hidden_dim.*0"),
        (dict(variant="S/16", num_classes=0), "num_classes.*0"),
    ],
)
def test_invalid_arguments_are_named_in_the_error(arguments, message):
    with pytest.raises(UserError, match=message):
        make_model(**{"num_classes": 10, **arguments})


def test_explicit_dimensions_override_the_variant():
    model = make_model(variant="S/16", num_classes=10, hidden_dim=64, num_blocks=None)
    assert isinstance(model, MlpMixer)
    assert (model.hidden_dim, model.num_blocks, model.patch_size) == (64, 8, 16)


@functools.partial(jax.jit, static_argnames="model")
def _training_and_evaluation(model, params, images):
    """Returns loss, outputs and gradient with dropout and stochastic depth, and eval logits."""

    def loss(params):
        logits, blocks = model.apply(
            {"params": params}, images, train=True, rngs={"dropout": jax.random.key(1)}
        )
        return jnp.sum(logits**2) + jnp.mean(blocks["block_1"] ** 2), blocks

    eval_logits, _ = model.apply({"params": params}, images)
    return jax.value_and_grad(loss, has_aux=True)(params), eval_logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "execution",
    [
        dict(remat="dots"),
        dict(remat="full"),
        dict(scan_blocks=True),
        dict(scan_blocks=True, remat="full"),
    ],
    ids=["dots", "full", "scan", "scan-full"],
)
@pytest.mark.parametrize("rescale", [False, True])
def test_remat_and_scan_change_no_value_or_name(rescale, execution):
    fields = dict(patch_size=4, hidden_dim=8, num_blocks=2, tokens_mlp_dim=6, channels_mlp_dim=12)
    fields |= dict(num_classes=5, stoch_depth=0.5, stoch_depth_rescale=rescale, dropout=0.2)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    reference, model = make_model(**fields), make_model(**fields, **execution)
    params = jax.jit(reference.init)(jax.random.key(2), images)["params"]
    shapes = jax.eval_shape(model.init, jax.random.key(2), images)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    params["head"]["kernel"] += 0.1
    expected = _training_and_evaluation(reference, params, images)
    actual = _training_and_evaluation(model, params, images)
    np.testing.assert_allclose(actual[0][0][0], expected[0][0][0], rtol=1e-6)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(assert_close, actual, expected)


@pytest.mark.optimized
def test_outputs_match_the_reference_code():
    expected = golden("outputs")
    logits, blocks = _apply()
    assert set(blocks) == set(expected.files) - {"image"}
    for name in blocks:
        np.testing.assert_allclose(blocks[name], expected[name], atol=1e-5, rtol=0, err_msg=name)
    np.testing.assert_array_equal(logits, blocks["logits"])


@pytest.mark.slow
@pytest.mark.optimized
def test_remat_saves_memory_in_the_backward_pass():
    fields = dict(
        patch_size=4, hidden_dim=64, num_blocks=4, tokens_mlp_dim=32, channels_mlp_dim=256
    )
    images = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
    sizes = {}
    for remat in ("none", "dots", "full"):
        # Outside a loop, XLA on a CPU would remove the rematerialisation.
        model = make_model(**fields, num_classes=5, remat=remat, scan_blocks=True)
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

        def loss(params, images, model=model):
            return jnp.sum(model.apply({"params": params}, images)[0] ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params, images).compile()
        sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes["full"] < 0.5 * sizes["none"] and sizes["full"] < sizes["dots"] < sizes["none"]
