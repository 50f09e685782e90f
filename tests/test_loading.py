"""Tests `mixer.load` and a run's initial weights: layouts, heads, resizing and error messages."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import mixer
from helpers import (
    GOLDENS,
    TINY,
    assert_close,
    assert_same_bits,
    final_state,
    golden,
    golden_params,
    leaves,
    run_python,
    tiny_config,
)
from mixer import trainer
from mixer.data.preprocessing.spec import pixel_range
from mixer.errors import UserError
from mixer.models import registry
from mixer.models.registry import make_model
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.runs import resume
from mixer.training.state import abstract_params
from mixer.weights import formats as weights
from mixer.weights import load as loading

PUBLISHED = GOLDENS / "mixer_tiny_official.npz"
LEGACY = GOLDENS / "mixer_tiny_legacy.npz"
TIMM = GOLDENS / "mixer_tiny_timm.safetensors"


def load(path, **options):
    """Returns the model, its parameters and the one line that was logged."""
    lines = []
    model, params = mixer.load(path, log=lines.append, **options)
    assert len(lines) == 1 and str(path) in lines[0]
    return model, params, lines[0]


def read_arrays(path):
    if str(path).endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    return safetensors.numpy.load_file(path)


def write_arrays(path, arrays):
    if str(path).endswith(".npz"):
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    return path


def expect_error(path, match, **options):
    with pytest.raises(UserError, match=match) as error_info:
        mixer.load(path, log=lambda line: None, **options)
    assert "\n" not in str(error_info.value)
    return str(error_info.value)


# Layouts and variants.


@pytest.mark.parametrize(
    ("path", "outputs", "gelu"),
    [
        (PUBLISHED, "outputs", "tanh"),
        (LEGACY, "outputs", "tanh"),
        (TIMM, "timm_outputs", "erf"),
    ],
)
def test_golden_weights_give_the_reference_logits(path, outputs, gelu):
    model, params, line = load(path)
    logits, blocks = jax.jit(model.apply)({"params": params}, golden(outputs)["image"])
    np.testing.assert_allclose(logits, golden(outputs)["logits"], atol=1e-5)
    assert model.gelu == gelu and f"GELU {gelu}" in line
    assert "32 x 32, 7 classes" in line and "head kept" in line
    if outputs == "outputs":
        np.testing.assert_allclose(blocks["block_2"], golden(outputs)["block_2"], atol=1e-5)


def test_gelu_argument_changes_the_logits():
    images = golden("outputs")["image"]
    model, params, line = load(PUBLISHED, gelu="erf")
    assert model.gelu == "erf" and "GELU erf" in line
    logits, _ = jax.jit(model.apply)({"params": params}, images)
    difference = np.abs(logits - golden("outputs")["logits"])
    assert 1e-5 < difference.max() < 0.1


def test_variant_is_inferred_from_array_shapes():
    for variant, side in (("S/32", 64), ("B/16", 32), ("H/14", 28)):
        model = make_model(variant=variant, num_classes=3)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
        flat = traverse_util.flatten_dict(shapes["params"], sep="/")
        shapes = {name: leaf.shape for name, leaf in flat.items()}
        mixer = registry.ARCHITECTURES["mixer"]
        dims = mixer.read_dimensions(shapes, "x")
        assert registry.find_variant(mixer, dims) == variant
        assert (dims["num_tokens"], dims["num_classes"]) == (4, 3)
        grown_dims = dims | {"tokens_mlp_dim": 4 * dims["tokens_mlp_dim"]}
        assert registry.find_variant(mixer, grown_dims) == variant
        assert registry.find_variant(mixer, dims | {"num_blocks": 3}) is None


@pytest.mark.parametrize(
    ("path", "wrapper", "extra_names"),
    [
        (TIMM, "state_dict.", ()),
        (TIMM, "state_dict_ema.module.", ("state_dict.stem.proj.weight",)),
        (TIMM, "model.", ("optimizer.lr",)),
        (TIMM, "module._orig_mod.", ()),
        (TIMM, "_orig_mod.module.", ()),
        (TIMM, "module.model.", ("module.head_2.weight",)),
        (TIMM, "state_dict.model_ema.module.", ("state_dict.model.stem.proj.weight",)),
        (TIMM, "module.", ("n_averaged",)),
        (PUBLISHED, "params/params/", ()),
        (PUBLISHED, "params/", ("opt/0/mu/stem/kernel", "extra/steps")),
        (PUBLISHED, "opt/target/", ("opt/state/step",)),
    ],
)
def test_weights_are_extracted_from_a_training_state(tmp_path, path, wrapper, extra_names):
    wrapped_arrays = {wrapper + name: array for name, array in read_arrays(path).items()}
    wrapped_arrays |= {name: np.zeros(1, np.float32) for name in extra_names}
    _, params, line = load(write_arrays(tmp_path / f"wrapped{path.suffix}", wrapped_arrays))
    assert_same_bits(params, load(path)[1])
    for part in wrapper.rstrip("./").replace("opt/", "opt+").replace("/", ".").split("."):
        assert repr(part.replace("+", "/")) in line
    assert (" ignored" in line) == bool(extra_names)


def test_untyped_bfloat16_float16_and_big_endian_arrays_load(tmp_path):
    arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in read_arrays(PUBLISHED).items()}
    np.savez(tmp_path / "void.npz", **arrays)
    with np.load(tmp_path / "void.npz") as file:
        assert file["head/bias"].dtype == np.dtype("V2")  # NumPy stores bfloat16 as raw bytes
    _, params, _ = load(tmp_path / "void.npz")
    expected = {k: v.astype(np.float32) for k, v in arrays.items()}
    assert_same_bits(params, traverse_util.unflatten_dict(expected, sep="/"))

    big_endian = {k: v.astype(">f4") for k, v in read_arrays(PUBLISHED).items()}
    assert_same_bits(load(write_arrays(tmp_path / "swapped.npz", big_endian))[1], golden_params())
    float16_arrays = {k: v.astype(np.float16) for k, v in read_arrays(TIMM).items()}
    _, params, _ = load(write_arrays(tmp_path / "half.safetensors", float16_arrays))
    assert params["stem"]["bias"].dtype == np.float32
    np.testing.assert_array_equal(params["stem"]["bias"], float16_arrays["stem.proj.bias"])


def test_dtype_sets_the_compute_dtype_and_is_validated():
    model, params, _ = load(PUBLISHED, dtype=jnp.bfloat16)
    assert model.dtype == "bfloat16" and params["stem"]["kernel"].dtype == np.float32
    expect_error(PUBLISHED, "dtype.*float16.*float32, bfloat16", dtype="float16")
    expect_error(PUBLISHED, "dtype='bf16'.*float32, bfloat16", dtype="bf16")


def test_non_square_token_count_needs_image_size(tmp_path):
    wide_weights = loading.read(PUBLISHED, image_size=(32, 96), log=print)
    arrays = traverse_util.flatten_dict(wide_weights.params, sep="/")
    np.savez(tmp_path / "wide.npz", **arrays)
    expect_error(tmp_path / "wide.npz", r"48 patches.*image_size")
    _, params, line = load(tmp_path / "wide.npz", image_size=(32, 96))
    assert "32 x 96" in line
    assert_same_bits(params, wide_weights.params)
    # The patch count is a square number: a square image is assumed, and the line says so.
    long_weights = loading.read(PUBLISHED, image_size=(32, 32 * 4), log=print)
    np.savez(tmp_path / "odd.npz", **traverse_util.flatten_dict(long_weights.params, sep="/"))
    assert "square" in load(tmp_path / "odd.npz")[2]
    assert "64 x 64" in load(tmp_path / "odd.npz")[2]
    _, params, line = load(tmp_path / "odd.npz", image_size=(32, 128))
    assert "32 x 128" in line and "square" not in line.partition("odd.npz: ")[2]
    assert_same_bits(params, long_weights.params)
    # A JSON sidecar stores the image size, so the argument is not needed.
    weights.write_file(tmp_path / "sidecar.npz", arrays, wide_weights.card, layout="published")
    assert loading.read(tmp_path / "sidecar.npz", log=print).card.image_size == (32, 96)


def test_json_sidecar_is_used_and_validated(tmp_path):
    loaded = loading.read(TIMM, log=print)
    card = dataclasses.replace(
        loaded.card, preprocess="decode|resize(32)|value_range(0, 1)", class_names=tuple("abcdefg")
    )
    path = tmp_path / "mine.npz"
    sidecar = weights.write_file(
        path, traverse_util.flatten_dict(loaded.params, sep="/"), card, layout="published"
    )
    reloaded = loading.read(path, log=print)
    assert reloaded.card == card and reloaded.model.gelu == "erf"  # not the default of the layout
    assert reloaded.card.value_range == (0, 1) and loaded.card.value_range == (-1, 1)
    values = json.loads(sidecar.read_text())
    for change, message in (
        ({"num_classes": 8, "class_names": None}, "num_classes=8.*mine.npz"),
        ({"gelu": "relu"}, "gelu=relu"),
        ({"image_size": [32]}, r"image_size=\[32\]"),
        ({"image_size": [32, 32.0]}, "image_size=.*32.0"),
        ({"image_size": [64, 64]}, r"image_size=\(64, 64\).* 16 patches of 8"),
        ({"class_names": ["a", "b"]}, "class_names="),
        ({"class_names": "imagenet1k"}, "class_names=imagenet1k"),
        ({"preprocess": 3}, "preprocess=3"),
        ({"preprocess": "value_range(x)"}, "preprocess=value_range"),
        ({"source": None}, "source=None"),
        ({"format": "mlp-mixer weights, 2"}, "'mlp-mixer weights, 2'"),
        ({"checksum": 1}, "mine.npz"),
    ):
        sidecar.write_text(json.dumps(values | change))
        expect_error(path, message)
    del values["gelu"]
    sidecar.write_text(json.dumps(values))
    expect_error(path, "mine.npz.json.*gelu")
    sidecar.write_text("{")
    expect_error(path, "mine.npz.json is damaged")
    sidecar.unlink()
    sidecar.mkdir()
    expect_error(path, "mine.npz.json is a directory")
    sidecar.rmdir()
    sidecar.write_text('{"some": "notes"}')  # another program's JSON
    assert load(path)[0].gelu == "tanh"


def test_safetensors_header_stores_gelu(tmp_path):
    loaded = loading.read(PUBLISHED, log=print)
    path = tmp_path / "tanh.safetensors"
    flat = traverse_util.flatten_dict(loaded.params, sep="/")
    weights.write_file(path, flat, loaded.card, layout="timm").unlink()
    model, params, line = load(path)
    assert model.gelu == "tanh" and "GELU tanh" in line
    assert_same_bits(params, loaded.params)
    safetensors.numpy.save_file({"stem/bias": np.zeros(1, "f4")}, path, {"gelu": "relu"})
    expect_error(path, "gelu='relu'")


@pytest.mark.parametrize(
    ("preprocess", "low_high"),
    [
        (None, (-1, 1)),
        ("decode|resize(32)", (-1, 1)),
        ("decode|value_range", (-1, 1)),
        ("decode|value_range(0, 1)", (0, 1)),
        ("decode | value_range(high=2)", (-1, 2)),
        ("decode|value_range(-2, high=2)|one_hot(num_classes=5)", (-2, 2)),
    ],
)
def test_pixel_range_is_read_from_the_preprocessing(preprocess, low_high):
    assert pixel_range(preprocess) == low_high


def test_unusual_pixel_range_is_reported(tmp_path):
    config = {"architecture": "mixer_s16_224", "pretrained_cfg": {"mean": [0] * 3, "std": [1] * 3}}
    config["pretrained_cfg"] |= {"crop_pct": 0.875, "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = write_arrays(tmp_path / "model.safetensors", read_arrays(TIMM))
    line = load(path)[2]
    assert "GELU erf" in line and "[0, 1]" in line
    (tmp_path / "config.json").write_text("{")
    expect_error(path, "config.json is damaged")


# Invalid weights.


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("stem.proj.weight", "blocks.0.linear_tokens.weight", "blocks.0.ls1"), "ResMLP"),
        (("stem.proj.weight", "blocks.0.mlp_channels.gate.proj.weight"), "gMLP"),
        (("patch_embed.proj.weight", "blocks_0"), "does not hold weights of a known model"),
        ((), "does not hold weights of a known model"),
    ],
)
def test_other_architectures_are_named_in_the_error(tmp_path, names, message):
    arrays = {name: np.zeros((2, 2), np.float32) for name in names}
    expect_error(write_arrays(tmp_path / "other.safetensors", arrays), message)


def test_gmixers_are_recognised_by_shape_and_file_name(tmp_path):
    arrays = read_arrays(TIMM)
    for block in range(3):
        name = f"blocks.{block}.mlp_tokens.fc2.weight"
        arrays[name] = np.ascontiguousarray(arrays[name][:, :10])
    expect_error(write_arrays(tmp_path / "x.safetensors", arrays), "gMixer")
    path = write_arrays(tmp_path / "gmixer_24_224.ra3_in1k.safetensors", read_arrays(TIMM))
    expect_error(path, "gmixer_24_224.ra3_in1k")
    # Only the file name identifies a released model; a user's folder may have any name.
    (tmp_path / "gmlp_s16_224_against").mkdir()
    load(write_arrays(tmp_path / "gmlp_s16_224_against" / "mine.safetensors", read_arrays(TIMM)))


def test_every_missing_extra_and_misshapen_array_is_listed(tmp_path):
    arrays = read_arrays(PUBLISHED)
    del arrays["MixerBlock_1/LayerNorm_0/bias"], arrays["head/bias"]
    arrays["MixerBlock_2/channel_mixing/Dense_1/kernel"] = np.zeros((40, 23), np.float32)
    arrays["extra"] = np.zeros(1, np.float32)
    text = expect_error(write_arrays(tmp_path / "bad.npz", arrays), "bad.npz")
    assert "MixerBlock_1/LayerNorm_0/bias: missing" in text
    assert "head/bias: missing" in text and "extra: " in text
    assert re.search(r"Dense_1/kernel: .*\(40, 23\).*\(40, 24\)", text)
    del arrays["stem/kernel"]
    expect_error(
        write_arrays(tmp_path / "bad.npz", arrays | {"embedding/kernel": np.zeros(1, "f4")}),
        "stem/",
    )
    legacy = read_arrays(LEGACY)
    del legacy["Mixer/encoder_norm/scale"]
    expect_error(write_arrays(tmp_path / "old.npz", legacy), "pre_head_layer_norm/scale: missing")


def test_arrays_with_non_finite_values_are_listed(tmp_path):
    arrays = read_arrays(PUBLISHED)
    arrays["stem/bias"] = arrays["stem/bias"] * np.nan
    arrays["head/kernel"][0, :2] = np.inf
    text = expect_error(write_arrays(tmp_path / "bad.npz", arrays), "stem/bias .* 24 of 24")
    assert re.search("head/kernel .* 2 of 168", text)
    # A head that is reset may contain infinities.
    arrays["stem/bias"][:] = 0
    load(write_arrays(tmp_path / "bad.npz", arrays), head="reset")


def test_unsupported_dtypes_are_listed(tmp_path):
    arrays = read_arrays(PUBLISHED)
    arrays["stem/bias"] = arrays["stem/bias"].astype(np.float64)
    arrays["head/bias"] = np.arange(7)
    text = expect_error(write_arrays(tmp_path / "bad.npz", arrays), "stem/bias: .*float64")
    assert re.search("head/bias: .*int64.*float32, float16, bfloat16", text)


def test_invalid_weight_files_are_named_in_the_error(tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    (tmp_path / "empty.npz").write_bytes(b"")
    with (tmp_path / "bare.npz").open("wb") as file:
        np.save(file, np.ones(3))
    data = bytearray(PUBLISHED.read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "flipped.npz").write_bytes(data)
    (tmp_path / "short.npz").write_bytes(data[:5000])
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "short.safetensors").write_bytes(TIMM.read_bytes()[:-4])
    (tmp_path / "text.safetensors").write_text("no arrays")
    (tmp_path / "text.csv").write_text("1, 2")
    (tmp_path / "model.pth").write_bytes(b"\x80\x04.")
    for name, message in (
        ("bare.npz", "npz"),
        ("flipped.npz", "npz.*CRC"),
        ("short.npz", "npz"),
        ("zip.npz", "npz"),
        ("text.npz", "npz"),
        ("pickled.npz", "pickle"),
        ("empty.npz", "npz"),
        ("missing.npz", "No such file"),
        ("short.safetensors", "safetensors"),
        ("text.safetensors", "safetensors"),
        ("missing.safetensors", "No such file"),
        ("model.pth", "pickle.*safetensors"),
        ("text.csv", ".npz.*.safetensors"),
        ("lr0.03", "lr0.03"),
        ("weights.h5", "weights.h5"),
        ("nothing", "nothing.* B/16-i21k"),
        (".", "no checkpoint in"),
    ):
        expect_error(tmp_path / name, message)
    expect_error("B/16-i22k", "Did you mean 'B/16-i21k'")


# The head.


def test_head_is_kept_or_reset_and_the_line_says_which():
    model, params, line = load(PUBLISHED, num_classes=7)
    assert "head kept" in line
    model, params, line = load(PUBLISHED, num_classes=10)
    assert model.num_classes == 10 and "head reset (7 -> 10)" in line
    assert params["head"]["kernel"].shape == (24, 10) and not np.any(params["head"]["kernel"])
    assert not np.any(params["head"]["bias"])
    assert_same_bits(params["MixerBlock_2"], golden_params()["MixerBlock_2"])
    _, params, line = load(PUBLISHED, head="reset")
    assert "head reset (7 -> 7)" in line and not np.any(params["head"]["bias"])
    text = expect_error(PUBLISHED, r"head/bias: .*\(7,\)", num_classes=9, head="keep")
    assert re.search(r"head/kernel: .*\(24, 7\).*\(24, 9\)", text)
    expect_error(PUBLISHED, "head='drop'.*keep, reset, auto", head="drop")


def test_headless_weights_load_and_can_get_a_new_head(tmp_path):
    arrays = {k: v for k, v in read_arrays(PUBLISHED).items() if not k.startswith("head/")}
    path = write_arrays(tmp_path / "headless.npz", arrays)
    model, params, line = load(path)
    assert (model.num_classes, "head" in params) == (0, False) and "; no head" in line
    logits, blocks = jax.jit(model.apply)({"params": params}, golden("outputs")["image"])
    np.testing.assert_array_equal(logits, blocks["pre_logits"])
    _, params, line = load(path, num_classes=4)
    assert params["head"]["kernel"].shape == (24, 4) and "head reset" in line
    expect_error(path, "head/kernel: missing", num_classes=4, head="keep")


# Higher resolution.


@pytest.mark.slow
@pytest.mark.parametrize("factors", [(1, 2), (2, 2), (3, 3)])
def test_grown_weights_give_the_mean_over_tiles(factors):
    model, params, _ = load(PUBLISHED)
    large_model, large_params, line = load(PUBLISHED, image_size=(32 * factors[0], 32 * factors[1]))
    assert f"grown to {32 * factors[0]} x {32 * factors[1]}" in line
    assert large_model.tokens_mlp_dim == 20 * factors[0] * factors[1]
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32 * factors[0], 32 * factors[1], 3))
    tiles = images.reshape(2, factors[0], 32, factors[1], 32, 3).swapaxes(2, 3)
    tile_results = model.apply({"params": params}, tiles.reshape(-1, 32, 32, 3).astype(np.float32))
    logits, outputs = large_model.apply({"params": large_params}, images.astype(np.float32))
    for actual, per_tile in (
        (logits, tile_results[0]),
        (outputs["pre_logits"], tile_results[1]["pre_logits"]),
    ):
        expected = per_tile.reshape(2, -1, per_tile.shape[-1]).mean(1)
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_image_sizes_are_validated_when_weights_are_resized():
    expect_error(PUBLISHED, r"\(32 or 64\) x \(32 or 64\)", image_size=48)
    expect_error(PUBLISHED, "patch size 8 .* 50", image_size=50)
    expect_error(PUBLISHED, "patch size 8 .* 50", image_size=50, resize="interpolate")
    expect_error(PUBLISHED, "resize='crop'.*grow, interpolate", image_size=48, resize="crop")
    for size in (0, 64.0, (32, 32, 32), "large"):
        expect_error(PUBLISHED, "image_size=", image_size=size)
    assert "grown to 64 x 64" in load(PUBLISHED, image_size=np.int64(64))[2]
    model, params, line = load(PUBLISHED, image_size=48, resize="interpolate")
    assert "interpolated to 48 x 48" in line and model.tokens_mlp_dim == 20
    assert params["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"].shape == (36, 20)
    logits, _ = jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, 48, 48, 3)))
    assert logits.shape == (1, 7)
    load(PUBLISHED, image_size=16, resize="interpolate")  # a smaller image, too


# Runs.


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixer.runs.curves.draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A run without a moving average, with checkpoints at steps 4 and 8."""
    path = tmp_path_factory.mktemp("runs") / "plain"
    schedule = dict(total_steps=8, eval_every_steps=8, dataset__test_split="")
    model = dict(model__num_blocks=1, model__dropout=0.0, model__stoch_depth=0.0)
    trainer.train(tiny_config(**schedule, **model), path)
    return path


def test_run_loads_with_its_dtype_gelu_and_moving_average(finished_run, plain_run, tmp_path):
    average = shutil.copytree(finished_run, tmp_path / "average")
    config = json.loads((average / "config.json").read_text())
    config["model"].update(dtype="bfloat16", gelu="erf")
    (average / "config.json").write_text(json.dumps(config))
    model, params, line = load(average)
    assert (model.dtype, model.gelu, model.num_classes) == ("bfloat16", "erf", 10)
    assert "step 12" in line and "moving average" in line and "GELU erf" in line
    assert_same_bits(params, final_state(average)["ema_params"])
    assert load(average, dtype="float32")[0].dtype == "float32"
    model, params, line = load(plain_run)
    assert_same_bits(params, final_state(plain_run)["params"])
    assert "average" not in line.split(":", 1)[1] and model.gelu == "tanh"


def test_checkpoint_and_best_of_a_run_load(plain_run):
    _, params, line = load(plain_run / "checkpoints" / "4")
    assert_same_bits(params, final_state(plain_run, 4)["params"])
    assert "step 4" in line
    loaded = loading.read(plain_run / "best", log=print)
    assert loaded.card.image_size == (8, 8) and len(loaded.card.class_names) == 10
    with_new_head = loading.read(plain_run, num_classes=3, log=print)
    assert with_new_head.card.class_names is None and with_new_head.card.num_classes == 3
    expect_error(plain_run / "checkpoints" / "9", "checkpoints/9")


def test_run_loads_at_a_larger_size_with_a_new_head(plain_run):
    _, params, line = load(plain_run, image_size=16, num_classes=3)
    assert "grown to 16 x 16, head reset (10 -> 3)" in line
    small_kernel = load(plain_run)[1]["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"]
    large_kernel = params["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"]
    assert large_kernel.shape == (64, 32)
    assert sorted(set(np.ravel(large_kernel))) == sorted({0.0, *np.ravel(small_kernel)})


def test_run_without_config_loads_with_a_notice(plain_run, tmp_path):
    shutil.copytree(plain_run / "checkpoints", tmp_path / "checkpoints")
    _, params, line = load(tmp_path)
    assert "no config.json" in line
    assert_same_bits(params, final_state(plain_run)["params"])


def test_weights_are_placed_on_the_mesh():
    mesh = sharding.make_mesh({"data": -1})
    _, params, _ = load(PUBLISHED, mesh=mesh, num_classes=3)
    for leaf in jax.tree.leaves(params):
        assert leaf.sharding.mesh == mesh and leaf.is_fully_replicated
    assert_same_bits(params["stem"], golden_params()["stem"])


@pytest.mark.slow
def test_weights_are_sharded_over_eight_devices(plain_run):
    code = f"""
import jax, mixer, numpy as np
from mixer.parallel import sharding

mesh = sharding.make_mesh({{"data": 2, "fsdp": 2, "tensor": 2}})
for path, size in (({str(PUBLISHED)!r}, 32), ({str(plain_run)!r}, 16)):
    plain_params, sharded_params = (
        mixer.load(path, image_size=size, num_classes=8, mesh=target)[1] for target in (None, mesh)
    )
    for a, b in zip(jax.tree.leaves(plain_params), jax.tree.leaves(sharded_params), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = sharded_params["MixerBlock_0"]["channel_mixing"]["Dense_0"]["kernel"]
    sides = [side // 2 for side in kernel.shape]
    assert [list(part.data.shape) for part in kernel.addressable_shards] == [sides] * 8
print("same", len(kernel.addressable_shards))
"""
    result = run_python("-c", code, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert result.stdout.splitlines()[-1] == "same 8"


@pytest.mark.slow
def test_load_needs_no_tensorflow_and_prints_one_line(plain_run):
    code = f"""
import sys
for name in ("tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None
import mixer
for path in ({str(plain_run)!r}, {str(PUBLISHED)!r}):
    mixer.load(path)
try:
    mixer.lode
except AttributeError as error:
    print(error)
"""
    result = run_python("-c", code)
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[2] == "module 'mixer' has no attribute 'lode'"
    assert "Traceback" not in result.stderr and "WARNING" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_1_3_times_the_file(tmp_path):
    """Loads B/16 with 1,000 classes (240 MB) in a separate process."""
    model = make_model(variant="B/16", num_classes=1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    flat = traverse_util.flatten_dict(shapes, sep="/")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in flat.items()}
    np.savez(tmp_path / "b16.npz", **arrays)
    code = f"""
import jax, mixer, re
mixer.load({str(PUBLISHED)!r})
# Not ru_maxrss: it is inherited from the parent process.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
initial_peak = peak()
model, params = mixer.load({str(tmp_path / "b16.npz")!r})
jax.block_until_ready(params)
print((peak() - initial_peak) / {(tmp_path / "b16.npz").stat().st_size})
"""
    share = float(run_python("-c", code).stdout.splitlines()[-1])
    assert 0.5 < share < 1.3


@pytest.mark.slow
def test_weights_that_exceed_memory_are_an_error(plain_run, tmp_path, monkeypatch):
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=60_000))
    assert load(PUBLISHED)  # 53 kB
    expect_error(
        PUBLISHED,
        "64 x 64 .*memory",
        image_size=64,
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=10_000))
    config = _fine_tune(plain_run)
    with pytest.raises(UserError, match=r"16 px.* 8 px"):
        trainer.train(config, str(tmp_path))
    config = _fine_tune(plain_run, image_size=8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1_000))
    with pytest.raises(UserError, match=r" 8 px"):
        trainer.train(config, str(tmp_path))


# Initial weights of a run.


def _params(num_classes=7, head_bias=0.0, **fields):
    """Returns a new model's parameters: zeros, placed on the mesh."""
    model = make_model(num_classes=num_classes, **{**TINY, **fields})
    abstract = abstract_params(model, (32, 32), sharding.make_mesh({"data": -1}))
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract)
    zeros["head"]["bias"] += head_bias
    return zeros


def _initial(path, params, **options):
    options = dict(image_size=(32, 32), class_names=(), head="auto", resize="grow") | options
    return loading.initial_params(loading.find(path), params, **options)


def test_initial_weights_keep_the_shardings_of_the_model():
    params, summary = _initial(PUBLISHED, _params())
    assert summary == "head kept"
    assert_same_bits(params, golden_params())
    shardings = jax.tree.map(lambda x: x.sharding, _params())
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    assert leaves(params).keys() == leaves(_params()).keys()


def test_reset_head_keeps_the_new_initialisation():
    new_params = _params(num_classes=10, head_bias=-6.9)
    params, summary = _initial(PUBLISHED, new_params)
    assert summary == "head reset (7 -> 10)"
    np.testing.assert_array_equal(params["head"]["bias"], np.full(10, -6.9, np.float32))
    with pytest.raises(UserError, match=r"head/bias: .*\(7,\).*\(10,\)"):
        _initial(PUBLISHED, new_params, head="keep")
    with pytest.raises(UserError, match=r"stem/kernel: .*\(8, 8, 3, 24\)"):
        _initial(PUBLISHED, _params(hidden_dim=16))


def test_head_is_reset_if_class_names_differ(tmp_path):
    """The class count is equal, as in transfer between two halves of CIFAR-10."""
    loaded = loading.read(PUBLISHED, log=print)
    names = tuple("abcdefg")
    card = dataclasses.replace(loaded.card, class_names=names)
    path = tmp_path / "named.npz"
    flat = traverse_util.flatten_dict(loaded.params, sep="/")
    weights.write_file(path, flat, card, layout="published")
    params, summary = _initial(path, _params(), class_names=names)
    assert summary == "head kept"
    params, summary = _initial(path, _params(), class_names=names[::-1])
    assert "head reset (7 -> 7)" in summary and "(a, b, c, ...)" in summary
    assert not np.any(params["head"]["kernel"])
    _, summary = _initial(path, _params(), class_names=names[::-1], head="keep")
    assert "head kept" in summary and "(a, b, c, ...)" in summary
    _, summary = _initial(PUBLISHED, _params(), class_names=names)  # the file has no class names
    assert summary.startswith("head kept") and "init_head=reset" in summary
    imagenet = loading.imagenet_names
    stored = loading.find(PUBLISHED)
    card = dataclasses.replace(stored.card, class_names="imagenet1k")
    stored = dataclasses.replace(stored, card=card)
    options = dict(image_size=(32, 32), head="auto", resize="grow")
    # Data sets may name ImageNet's classes in words or, as TFDS does, by synset.
    for dataset_names in (imagenet.class_names("imagenet1k"), imagenet.synsets("imagenet1k")):
        _, summary = loading.initial_params(stored, _params(), class_names=dataset_names, **options)
        assert summary == "head kept"


@pytest.fixture(scope="module")
def small_file(plain_run, tmp_path_factory):
    """The weights of `plain_run` in timm's layout, for 8-pixel images and erf GELU."""
    loaded = loading.read(plain_run, log=print)
    path = tmp_path_factory.mktemp("files") / "small.safetensors"
    flat = traverse_util.flatten_dict(loaded.params, sep="/")
    weights.write_file(path, flat, dataclasses.replace(loaded.card, gelu="erf"), layout="timm")
    return path


def _fine_tune(path, **values):
    defaults = dict(dataset__val_split="", dataset__test_split="", model__num_blocks=1)
    defaults |= dict(total_steps=4, checkpoint__every_steps=2, image_size=16)
    defaults |= dict(model__dropout=0.0, model__stoch_depth=0.0)
    return tiny_config(init_from=str(path), **defaults | values)


@pytest.fixture(scope="module")
def fine_tuned_run(small_file, tmp_path_factory):
    """A run initialised from `small_file`: its directory and its output."""
    path = tmp_path_factory.mktemp("fine_tuned") / "run"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer.train(_fine_tune(small_file), path)
    return path, output.getvalue()


def test_run_starts_from_weights_of_half_its_image_size(small_file, fine_tuned_run):
    path, output = fine_tuned_run
    assert f"first weights: {small_file}: timm layout; " in output
    assert "GELU erf" in output and "grown to 16 x 16, head kept" in output
    config = json.loads((path / "config.json").read_text())
    assert config["model"]["tokens_mlp_dim"] == 4 * 8 and config["model"]["gelu"] == "erf"
    assert config["init_image_size"] == 8
    model = load(path)[0]
    assert model.tokens_mlp_dim == 32 and model.gelu == "erf"


def test_grown_run_resumes_without_the_initial_file(fine_tuned_run, tmp_path):
    path = shutil.copytree(fine_tuned_run[0], tmp_path / "again")
    shutil.rmtree(path / "checkpoints" / "4")
    config = json.loads((path / "config.json").read_text())
    missing_file = str(tmp_path / "gone.safetensors")
    (path / "config.json").write_text(json.dumps(config | {"init_from": missing_file}))
    trainer.train(_fine_tune(missing_file), path)
    assert_close(final_state(path), final_state(fine_tuned_run[0]))
    with pytest.raises(UserError, match="tokens_mlp_dim: 32 -> 64"):
        trainer.train(_fine_tune(missing_file, model__tokens_mlp_dim=16), path)


def test_differences_from_the_initial_weights_are_printed(
    small_file, tmp_path, capsys, monkeypatch
):
    """The run changes the pixel range, the GELU and the token-mixing shape."""
    loaded = loading.read(small_file, log=print)
    card = dataclasses.replace(loaded.card, preprocess="decode|resize(8)|value_range(0, 1)")
    flat = traverse_util.flatten_dict(loaded.params, sep="/")
    weights.write_file(tmp_path / "w.npz", flat, card, layout="published")

    class SetUp(Exception):
        pass

    def stop(*args, **kwargs):
        raise SetUp

    monkeypatch.setattr(resume, "compile_updates", stop)  # stop before compilation
    config = _fine_tune(tmp_path / "w.npz", model__gelu="tanh", init_resize="interpolate")
    with pytest.raises(SetUp):
        trainer.train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "interpolated to 16 x 16" in output
    assert re.search(r"GELU erf; .*gelu=tanh", output)
    assert re.search(r"\[0.0, 1.0\].*train_preprocess .*\[-1", output)
    saved_config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved_config["model"]["gelu"], saved_config["model"]["tokens_mlp_dim"]) == ("tanh", 8)


def test_finetune_config_takes_model_dimensions_from_weights(small_file, tmp_path):
    from configs import finetune

    config = finetune.get_config(f"dataset=folder,res=24,init={small_file}")
    assert config.model.variant is None
    run.resolve_model(config, run.find_initial(config), None)
    assert config.model.tokens_mlp_dim == 9 * 8 and config.model.hidden_dim == 16
    assert (config.model.num_blocks, config.model.patch_size, config.model.gelu) == (1, 2, "erf")
    # A resumed run takes the dimensions from its saved config.
    resumed_config = finetune.get_config(f"dataset=folder,res=24,init={small_file}")
    run.resolve_model(resumed_config, None, config.to_dict())
    assert run.changes(config.to_dict(), resumed_config.to_dict()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(image_size=12), r"12 x 12.*\(8 or 16\) x \(8 or 16\)"),
        (dict(init_image_size=16), "init_image_size=16.* 8 x 8"),
        (dict(init_resize="crop"), "init_resize='crop'.*grow, interpolate"),
        (dict(init_from="no.npz"), "no.npz .*No such file"),
    ],
)
def test_unusable_initial_weights_are_an_error(small_file, values, message):
    config = _fine_tune(small_file, **{k: v for k, v in values.items() if k == "init_resize"})
    config.update(values)
    with pytest.raises(UserError, match=message):
        run.check_config(config)
        run.resolve_model(config, run.find_initial(config), None)


def test_width_that_conflicts_with_the_grown_weights_is_listed(small_file, tmp_path):
    with pytest.raises(UserError, match=r"\(32,\).*\(36,\)"):
        trainer.train(_fine_tune(small_file, model__tokens_mlp_dim=9), str(tmp_path))
