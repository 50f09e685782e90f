"""The Vision Transformer: the reference code's answers, sizes, names, masks, a small training."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import traverse_util

import helpers
import mixer
from helpers import GOLDENS, TINY, TINY_VIT, assert_same_bits, final_state, tiny_config
from mixer import trainer
from mixer.errors import UserError
from mixer.models import flops, placement, registry, vit
from mixer.models.registry import make_model
from mixer.runs import config as run
from mixer.tools import convert
from mixer.tools.inspect import activations
from mixer.tools.plan import hlo
from mixer.weights import formats, hub, load
from mixer.weights.card import Card

SLOW = pytest.mark.slow

# REFERENCE: parameters with 1,000 classes at 224 px: class token with a position for each patch,
# and the mean of the tokens with fixed positions.
COUNTS = {
    "S/32": (22_878_568, 22_859_368),
    "S/16": (22_050_280, 21_974_632),
    "B/32": (88_223_464, 88_185_064),
    "B/16": (86_566_888, 86_415_592),
    "L/32": (306_534_376, 306_483_176),
    "L/16": (304_325_608, 304_123_880),
    "H/14": (632_044_520, 631_715_560),
}
KINDS = {
    "official_token": {},
    "official_gap": dict(pooling="gap"),
    "bv_gap_learn": dict(pooling="gap", positions="learnt_patches"),
    "bv_gap_sincos": dict(pooling="gap", positions="sincos2d"),
    "bv_tok": dict(positions="learnt_patches"),
    "bv_map": dict(pooling="map", positions="learnt_patches"),
}


def golden(name):
    return np.load(GOLDENS / f"vit_tiny_{name}.npz", allow_pickle=False)


def golden_params(name="official_token"):
    file = golden(name)
    return traverse_util.unflatten_dict({key: file[key] for key in file.files}, sep="/")


def tiny(**fields):
    return make_model(name="vit", num_classes=7, **{**TINY_VIT, **fields})


def quiet_load(path, **options):
    return mixer.load(path, log=lambda line: None, **options)


# The other kinds combine what these have.
FAST_KINDS = ("official_token", "official_gap", "bv_gap_sincos", "bv_map")


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in FAST_KINDS else pytest.mark.slow) for kind in KINDS],
)
def test_outputs_equal_the_reference_code(kind, scan):
    answers, model = golden(f"{kind}_outputs"), tiny(**KINDS[kind], scan_blocks=scan)
    logits, out = jax.jit(model.apply)({"params": golden_params(kind)}, answers["image"])
    for name in set(answers.files) - {"image"}:
        atol = 2e-5 if scan else 1e-5
        np.testing.assert_allclose(out[name], answers[name], atol=atol, rtol=0, err_msg=name)
    np.testing.assert_array_equal(logits, out["logits"])
    assert {"stem", "tokens", "block_0", "block_1", "block_2", "pre_logits"} < set(out)


@pytest.mark.parametrize("variant", vit.VARIANTS)
def test_variant_has_the_published_size(variant):
    options = (dict(positions="learnt_patches"), dict(pooling="gap", positions="sincos2d"))
    for fields, count in zip(options, COUNTS[variant], strict=True):
        model = make_model(variant, name="vit", num_classes=1000, **fields)
        assert registry.num_params(model, (224, 224)) == count
    model = make_model(variant, name="vit", num_classes=1000)
    assert registry.num_params(model, (224, 224)) == COUNTS[variant][0] + model.hidden_dim


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_both_code_bases_are_recognised(kind):
    """The test above compares the outputs of this model with these parameters."""
    model, params = quiet_load(GOLDENS / f"vit_tiny_{kind}.npz", image_size=32)
    assert model == tiny(**KINDS[kind])
    assert_same_bits(params, golden_params(kind))


def test_positions_are_interpolated_as_vision_transformer_does():
    answers = golden("official_resized")
    path = GOLDENS / "vit_tiny_official_token.npz"
    model, params = quiet_load(path, image_size=48)
    positions = params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_allclose(positions, answers["posemb"], atol=1e-6)
    logits, _ = jax.jit(model.apply)({"params": params}, answers["image"])
    np.testing.assert_allclose(logits, answers["logits"], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"resize=grow.*interpolate"):
        quiet_load(path, image_size=64, resize="grow")


def write_timm(folder, **model_args):
    path = folder / "model.safetensors"
    shutil.copy(GOLDENS / "vit_tiny_timm.safetensors", path)
    about = dict(mean=[0.5], std=[0.5], crop_pct=0.9, interpolation="bicubic")
    config = dict(architecture="vit", model_args=model_args, pretrained_cfg=about)
    (folder / "config.json").write_text(json.dumps(config))
    return path


def test_timm_files_take_their_heads_from_timms_config(tmp_path):
    answers, path = golden("timm_outputs"), write_timm(tmp_path, num_heads=4)
    model, params = quiet_load(path)
    assert (model.gelu, model.num_heads, model.positions) == ("erf", 4, "learnt")
    logits, _ = jax.jit(model.apply)({"params": params}, answers["image"])
    np.testing.assert_allclose(logits, answers["logits"], atol=1e-5, rtol=0)
    assert quiet_load(write_timm(tmp_path, num_heads=4, act_layer="gelu_tanh"))[0].gelu == "tanh"
    with pytest.raises(UserError, match=r"act_layer.*'quick_gelu'.*gelu_tanh"):
        quiet_load(write_timm(tmp_path, num_heads=4, act_layer="quick_gelu"))
    for heads in (5, 0, "4"):
        with pytest.raises(UserError, match=rf"num_heads={heads}.*24"):
            quiet_load(write_timm(tmp_path, num_heads=heads))
    with pytest.raises(UserError, match=r"num_heads.*24.*config\.json"):
        quiet_load(GOLDENS / "vit_tiny_timm.safetensors")


@pytest.mark.parametrize("name", ["blocks.0.ls1.gamma", "dist_token", "norm_pre.weight"])
def test_timms_other_vision_transformers_are_refused_by_name(tmp_path, name):
    arrays = safetensors.numpy.load_file(write_timm(tmp_path, num_heads=4))
    arrays[name] = np.ones(24, np.float32)
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors.*{name}"):
        quiet_load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (1024, 16), (1152, 16), (1280, 16)])
def test_heads_of_timm_files_without_a_config(width, heads):
    """The widths are those of timm's vit_tiny, vit_large, vit_so400m and vit_huge."""
    name, array = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias", np.zeros
    assert vit.from_layout(name, array(3 * width), "timm", {}).shape == (heads, width // heads)
    with pytest.raises(UserError, match=r"num_heads.*1536"):  # timm's models differ
        vit.from_layout(name, array(3 * 1536), "timm", {})


def read_golden(kind):
    return load.read(GOLDENS / f"vit_tiny_{kind}.npz", image_size=32, log=lambda line: None)


SLOW_KINDS = [kind if kind == "bv_tok" else pytest.param(kind, marks=SLOW) for kind in KINDS]


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_hub_folder_has_equal_outputs_and_timms_config(tmp_path, kind):
    loaded = read_golden(kind)
    convert.write(epath.Path(tmp_path / "folder"), loaded, "hub")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    assert config["architecture"] == "vit_base_patch16_224"  # accepts all arguments
    arguments = config["model_args"]
    pool = {"token": "token", "gap": "avg", "map": "map"}[loaded.model.pooling]
    expected = dict(patch_size=8, embed_dim=24, depth=3, num_heads=4, img_size=[32, 32])
    expected |= dict(global_pool=pool, class_token=pool == "token", act_layer="gelu_tanh")
    assert arguments == arguments | expected and "num_classes" not in arguments
    (tmp_path / "folder/model.safetensors.json").unlink()  # config.json and the header suffice
    again = load.read(tmp_path / "folder", log=lambda line: None)
    assert (again.model.gelu, again.model.positions) == ("tanh", "learnt")
    logits, _ = again.model.apply({"params": again.params}, golden(f"{kind}_outputs")["image"])
    np.testing.assert_allclose(logits, golden(f"{kind}_outputs")["logits"], atol=1e-5, rtol=0)
    text = (tmp_path / "folder/README.md").read_text().split("## Usage in timm")[1]
    assert "create_model" in text and "act_layer" not in text
    has_changed = loaded.model.positions != "learnt"
    assert (f"positions={loaded.model.positions}" in text) == has_changed


@pytest.mark.parametrize("variant", vit.VARIANTS)
def test_hub_folder_uses_timms_names(variant):
    model = make_model(variant, name="vit", num_classes=10)
    dims = registry.dimensions(model) | dict(pooling="token", positions="learnt")
    card = Card(
        **dict(architecture="vit", variant=variant, num_classes=10, image_size=(224, 224)),
        **dict(gelu="erf", preprocess=None, class_names=None, source="x"),
        dimensions=dims | dict(pre_logits_layer=False),
    )
    size = {"S": "small", "B": "base", "L": "large", "H": "huge"}[variant[0]]
    assert hub.timm_name(card) == f"vit_{size}_patch{variant[2:]}_224"
    assert "embed_dim" not in hub.timm_config(card)["model_args"]


def test_layer_before_the_head_is_refused_by_timm(tmp_path):
    loaded = read_golden("official_token")
    width = loaded.model.hidden_dim
    card = dataclasses.replace(
        loaded.card, dimensions={**loaded.card.dimensions, "pre_logits_layer": True}
    )
    params = {**loaded.params, "pre_logits": dict(kernel=np.eye(width), bias=np.zeros(width))}
    for name, layout in (("folder", "hub"), ("x.safetensors", "timm")):
        path = epath.Path(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: timm.*pre_logits_layer=True"):
            convert.write(path, load.Loaded(card.model(), params, card), layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_timm_opens_the_folder(tmp_path, kind):
    timm = pytest.importorskip("timm")
    import torch

    loaded = read_golden(kind)
    for gelu in ("tanh", "erf"):
        card = dataclasses.replace(loaded.card, gelu=gelu)
        path = tmp_path / gelu
        convert.write(epath.Path(path), dataclasses.replace(loaded, card=card), "hub")
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        images = golden(f"{kind}_outputs")["image"]
        logits = model(torch.tensor(images.transpose(0, 3, 1, 2).copy())).detach().numpy()
        expected, _ = card.model().apply({"params": loaded.params}, images)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_sharded_timm_file_takes_its_heads_from_timms_config(tmp_path):
    path = write_timm(tmp_path, num_heads=4)
    expected = quiet_load(path)[1]
    arrays = safetensors.numpy.load_file(path)
    path.unlink()
    names = sorted(arrays)
    places = {}
    for file, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
        safetensors.numpy.save_file({name: arrays[name] for name in part}, tmp_path / file)
        places |= dict.fromkeys(part, file)
    index = dict(metadata={}, weight_map=places)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_bits(quiet_load(tmp_path)[1], expected)


def test_numbering_before_linen_is_read(tmp_path):
    arrays = {}
    for name, array in dict(golden("official_token")).items():
        arrays[vit.stored_name(name, "legacy")] = array
    block = "Transformer/encoderblock_1"
    assert f"{block}/MlpBlock_3/Dense_0/kernel" in arrays
    assert {f"{block}/LayerNorm_2/scale", f"{block}/LayerNorm_0/scale"} < set(arrays)
    assert f"{block}/MultiHeadDotProductAttention_1/query/kernel" in arrays
    np.savez(tmp_path / "old.npz", **arrays)
    assert_same_bits(quiet_load(tmp_path / "old.npz")[1], golden_params())


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back_bit_by_bit(tmp_path, kind):
    loaded = load.read(GOLDENS / f"vit_tiny_{kind}.npz", image_size=32, log=lambda line: None)
    arrays = load.sharding.by_name(loaded.params)
    for layout in ("published", "legacy", "timm"):
        path = tmp_path / f"{layout}{formats.ENDINGS[layout]}"
        formats.write_file(path, arrays, loaded.card, layout=layout)
        again = load.read(path, log=lambda line: None)
        if layout == "timm" and not kind.startswith("official"):  # stored as learnt positions
            assert again.model == loaded.model.clone(positions="learnt")
            continue
        assert_same_bits(again.params, loaded.params)
        assert again.card.as_json() == loaded.card.as_json()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=5), r"num_heads=5.*24"),
        (dict(hidden_dim=26, num_heads=2, positions="sincos2d"), r"hidden_dim=26.*sincos2d.*4"),
        (dict(pooling="mean"), r"pooling='mean'.*token, gap, map"),
        (dict(positions="learned"), r"positions='learned'.*learnt"),
        (dict(tokens_mlp_dim=4), r"tokens_mlp_dim"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        tiny(**fields)


@pytest.mark.slow
def test_masks_depend_on_the_place_in_the_global_batch_and_on_the_key_only():
    images = np.repeat(golden("official_token_outputs")["image"], 4, axis=0)
    model = tiny(stoch_depth=0.5, dropout=0.3)

    @jax.jit
    def apply(images, index, seed=0):
        rngs = {"dropout": jax.random.key(seed)}
        settings = dict(train=True, example_index=index, rngs=rngs)
        return model.apply({"params": golden_params()}, images, **settings)[0]

    whole = apply(images, jnp.arange(len(images)))
    assert np.abs(whole[1:4] - whole[:1]).min(1).max() > 1e-3  # the masks of equal images differ
    # Two halves of the batch change places, as on other devices.
    half = len(images) // 2
    swapped = apply(np.roll(images, half, 0), np.roll(np.arange(len(images)), half))
    np.testing.assert_allclose(np.roll(swapped, half, 0), whole, atol=1e-5)
    assert np.abs(apply(images, jnp.arange(len(images)), seed=1) - whole).max() > 1e-3


@pytest.mark.slow
def test_evaluation_draws_no_masks():
    answers, model = golden("official_token_outputs"), tiny(stoch_depth=0.5, dropout=0.3)
    logits, _ = jax.jit(model.apply)({"params": golden_params()}, answers["image"])
    np.testing.assert_allclose(logits, answers["logits"], atol=1e-5)


@pytest.mark.slow
def test_remat_scan_and_bfloat16_keep_parameters_and_gradients():
    images = golden("official_token_outputs")["image"]

    def gradient(**fields):
        model = tiny(**fields)

        def loss(params):
            return jnp.sum(model.apply({"params": params}, images)[0] ** 2)

        return jax.jit(jax.grad(loss))(golden_params())

    expected = gradient()
    for fields in (dict(remat="dots"), dict(remat="full", scan_blocks=True)):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
        jax.tree.map(close, gradient(**fields), expected)
    logits, out = tiny(dtype="bfloat16").apply({"params": golden_params()}, images)
    assert out["block_2"].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden("official_token_outputs")["logits"], atol=0.2)


def test_attention_matches_jax():
    rng = np.random.default_rng(0)
    shapes = (2, 3, 2, 6), (2, 5, 2, 6), (2, 5, 2, 6)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]

    def compute(function):
        def total(*arrays):
            return jnp.sum(function(*arrays) ** 2)

        return jax.jit(function)(*arrays), *jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)

    results = compute(vit.attend), compute(jax.nn.dot_product_attention)
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    query, key, value = 30 * arrays[0], 30 * arrays[1], arrays[2]  # exp would overflow
    expected = jax.nn.dot_product_attention(query, key, value)
    np.testing.assert_allclose(vit.attend(query, key, value), expected, atol=1e-4)


def vit_config(**values):
    config = tiny_config(model__name="vit", **values)
    config.model.update(tokens_mlp_dim=None, channels_mlp_dim=None, mlp_dim=24, num_heads=2)
    return config


@pytest.mark.slow
def test_run_resumes_bit_by_bit_and_is_loaded(tmp_path):
    config = vit_config(schedule__decay="constant")  # does not depend on the length
    trainer.train(config, tmp_path / "whole")
    trainer.train(vit_config(schedule__decay="constant", total_steps=4), tmp_path / "half")
    trainer.train(config, tmp_path / "half", allow_config_change=True)
    assert_same_bits(final_state(tmp_path / "half"), final_state(tmp_path / "whole"))
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())["model"]
    assert (saved["name"], saved["pooling"], saved["positions"]) == ("vit", "token", "learnt")
    model, params = quiet_load(tmp_path / "whole")
    assert model.apply({"params": params}, np.zeros((2, 8, 8, 3)))[0].shape == (2, 10)
    # The weights of the run start another run, which takes their options.
    config = vit_config(init_from=str(tmp_path / "whole"), image_size=12, init_resize="interpolate")
    trainer.train(config, tmp_path / "fine")


def test_files_and_keys_of_another_architecture_are_refused():
    config = vit_config(init_from=str(GOLDENS / "mixer_tiny_official.npz"))
    with pytest.raises(UserError, match=r"model\.name=vit.*model\.name=mixer"):
        run.find_initial(config)
    config = tiny_config(init_from=str(GOLDENS / "vit_tiny_official_token.npz"))
    with pytest.raises(UserError, match=r"model\.name=mixer.*model\.name=vit"):
        run.find_initial(config)
    for config, key in (
        (vit_config(model__tokens_mlp_dim=8), "tokens_mlp_dim"),
        (tiny_config(model__num_heads=8), "num_heads"),
        (tiny_config(model__pooling="gap"), "pooling"),
    ):
        if key == "tokens_mlp_dim":
            config.model.tokens_mlp_dim = 8
        with pytest.raises(UserError, match=rf"model\.{key}="):
            run.check_config(config)


@pytest.mark.parametrize(
    "kind", ["official_token", pytest.param("official_gap", marks=pytest.mark.slow)]
)
def test_attention_maps_are_those_of_the_formula(kind):
    images, params = golden(f"{kind}_outputs")["image"], golden_params(kind)
    model = tiny(**KINDS[kind])
    maps = activations.attention_maps(model, params, images, batch_size=3)
    out = jax.jit(model.apply)({"params": params}, images)[1]
    x = np.asarray(out["tokens"], np.float64)
    block = params["Transformer"]["encoderblock_0"]
    norm, attention = block["LayerNorm_0"], block["MultiHeadDotProductAttention_0"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * norm["scale"] + norm["bias"]
    query, key = (
        np.einsum("ntc,chd->nhtd", x, attention[name]["kernel"]) + attention[name]["bias"][:, None]
        for name in ("query", "key")
    )
    weights = np.exp(query @ key.swapaxes(2, 3) / np.sqrt(6))
    weights /= weights.sum(-1, keepdims=True)
    weights = weights[:, :, 0, 1:] if kind == "official_token" else weights.mean(2)
    assert maps.shape == (3, 4, 4, 4)
    np.testing.assert_allclose(maps[0], weights.mean(0).reshape(4, 4, 4), rtol=1e-4)
    mixer_model = make_model(num_classes=7, **TINY)
    assert activations.attention_maps(mixer_model, helpers.golden_params(), images) is None


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(pooling="gap", positions="sincos2d")])
def test_flops_are_those_of_the_compiled_program(options):
    model, size = tiny(hidden_dim=64, mlp_dim=128, **options), (64, 64)
    images = jax.ShapeDtypeStruct((2, *size, 3), np.float32)
    params = registry.param_shapes(model, size)
    params = traverse_util.unflatten_dict(params, sep="/")

    def loss(params, images):
        return model.apply({"params": params}, images)[0].sum()

    for function, expected in ((loss, flops.forward_flops), (jax.grad(loss), flops.train_flops)):
        counted = hlo.count(jax.jit(function).lower(params, images).compile().as_text()).flops
        assert counted == pytest.approx(2 * expected(model, size), rel=0.01)


@SLOW
def test_cost_of_the_gradient_grows_linearly_with_depth():
    """On a CPU, XLA could repeat the sum of the residual gradients in each branch."""
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)

    def cost(num_blocks):
        model = tiny(num_blocks=num_blocks)
        params = traverse_util.unflatten_dict(registry.param_shapes(model, (32, 32)), sep="/")
        gradient = jax.grad(lambda params, x: model.apply({"params": params}, x)[0].sum())
        return jax.jit(gradient).lower(params, images).compile().cost_analysis()["flops"]

    costs = np.diff([cost(num_blocks) for num_blocks in (2, 5, 8)])
    assert costs[1] == pytest.approx(costs[0], rel=0.02)


def test_heads_and_mlp_are_split_over_the_mesh():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = registry.param_shapes(tiny(), (32, 32))
    shapes = traverse_util.unflatten_dict(shapes, sep="/")
    shardings = traverse_util.flatten_dict(placement.state_shardings(mesh, shapes), sep="/")
    block = "Transformer/encoderblock_2"
    specs = {name: tuple(value.spec) for name, value in shardings.items()}
    attention = f"{block}/MultiHeadDotProductAttention_0"
    assert specs[f"{attention}/query/kernel"] == ("fsdp", "tensor", None)
    assert specs[f"{attention}/value/bias"] == ("tensor", None)
    assert specs[f"{attention}/out/kernel"] == ("tensor", None, "fsdp")
    assert specs[f"{block}/MlpBlock_0/Dense_1/kernel"] == ("tensor", "fsdp")
    assert specs["embedding/kernel"][-1] == "fsdp" and specs["cls"] == ()
