"""Exported programs: they compute the model's outputs without this package installed."""

import contextlib
import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from helpers import GOLDENS, ROOT, run_program, run_python
from mixer.data.imagenet import names as imagenet_names
from mixer.errors import UserError
from mixer.tools.export import serving
from mixer.weights import load as loading

WEIGHTS = GOLDENS / "mixer_tiny_official.npz"
SHAPE = (32, 32, 3)
# Simulates a server that has JAX but not this package or its other dependencies.
HIDE_PACKAGES = """
import sys
for name in ("mixer", "flax", "tensorflow", "orbax", "optax", "etils"):
    sys.modules[name] = None
"""


def read(**options):
    return loading.read(WEIGHTS, log=lambda line: None, **options)


@pytest.fixture(scope="module")
def loaded():
    """The tiny golden model, with preprocessing that scales pixels to [0, 1]."""
    card = dataclasses.replace(
        read().card,
        preprocess="decode|resize(32)|value_range(0, 1)",
        class_names=tuple("abcdefg"),
    )
    return dataclasses.replace(read(), card=card)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (8, *SHAPE), np.uint8)


def outputs(loaded, images, low=-1.0, high=1.0):
    pixels = images / np.float32(255) * (high - low) + low
    return jax.jit(loaded.model.apply)({"params": loaded.params}, pixels)[1]


def make(loaded, **options):
    return serving.make_program(loaded, serving.served_weights(loaded), **options)


def write(loaded, paths, **options):
    arrays = serving.served_weights(loaded)
    program = serving.make_program(loaded, arrays, **options)
    serving.write(loaded, program, arrays, paths)


def run_isolated(code, folder, images):
    """Runs `code` in a process that has only JAX, and calls its `call` with 1, 3 and 8 images."""
    np.save(folder / "images.npy", images)
    code += """
images = numpy.load("images.npy")
arguments = (weights,) if "weights" in dir() else ()
numpy.savez("out.npz", **{str(n): call(*arguments, images[:n]) for n in (1, 3, 8)})
"""
    run_python("-c", HIDE_PACKAGES + "import numpy\n" + code, cwd=folder, PYTHONPATH="")
    return np.load(folder / "out.npz")


@pytest.mark.slow
def test_program_with_weights_runs_as_documented(tmp_path, images):
    arguments = ("mixer.tools.export", WEIGHTS, tmp_path / "B16.stablehlo")
    result = run_program(*arguments)
    assert result.returncode == 0, result.stderr
    assert "B16.stablehlo: " in result.stdout and "B16.stablehlo.json: " in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"B16.stablehlo", "B16.stablehlo.json"}
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)[0]
    actual = run_isolated(code + "\nassert logits.shape == (8, 7)\n", tmp_path, images)
    expected = outputs(read(), images)["logits"]
    for n in (1, 3, 8):
        np.testing.assert_allclose(actual[str(n)], expected[:n], rtol=0, atol=1e-5)

    result = run_program(*arguments)
    assert result.returncode == 2 and "B16.stablehlo.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def run_in_process(code, folder, images):
    """Like `run_isolated`, but in this process."""
    namespace = {"numpy": np}
    with contextlib.chdir(folder):
        exec(code, namespace)
    return {str(n): namespace["call"](namespace["weights"], images[:n]) for n in (1, 3, 8)}


@pytest.mark.parametrize(
    "execute", [run_in_process, pytest.param(run_isolated, marks=pytest.mark.slow)]
)
def test_program_with_separate_weights_runs_as_its_json_describes(
    tmp_path, loaded, images, execute
):
    paths = serving.check(tmp_path / "tiny.stablehlo", weights="beside", platforms=["cpu"])
    write(loaded, paths, weights="beside", platforms=["cpu"])
    names = {"tiny.stablehlo", "tiny.stablehlo.json", "tiny.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    description = json.loads((tmp_path / "tiny.stablehlo.json").read_text())
    assert description["weights"] == "tiny.safetensors" and description["platforms"] == ["cpu"]
    assert description["inputs"]["images"] == {"shape": ["b", 32, 32, 3], "dtype": "uint8"}
    head = {"shape": [24, 7], "dtype": "float32"}
    assert description["inputs"]["weights"]["head/kernel"] == head
    assert description["output"] == {"shape": ["b", 7], "dtype": "float32"}
    assert description["jax"] == jax.__version__ and description["classes"] == list("abcdefg")
    dims = {"patch_size": 8, "in_channels": 3, "hidden_dim": 24, "num_blocks": 3}
    dims |= {"tokens_mlp_dim": 20, "channels_mlp_dim": 40}
    assert description["card"] == {
        "variant": None,
        **dims,
        "num_classes": 7,
        "image_size": [32, 32],
        "gelu": "tanh",
        "preprocess": loaded.card.preprocess,
        "class_names": list("abcdefg"),
        "source": str(WEIGHTS),
    }
    actual = execute("\n".join(description["call"]), tmp_path, images)
    expected = outputs(loaded, images, 0.0, 1.0)["logits"]
    for n in (1, 3, 8):
        np.testing.assert_allclose(actual[str(n)], expected[:n], rtol=0, atol=1e-5)
    (model, params) = loading.load(tmp_path / "tiny.safetensors", log=lambda line: None)
    assert model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, params, loaded.params)


@pytest.mark.parametrize("weights", ["inside", pytest.param("beside", marks=pytest.mark.slow)])
def test_program_is_lowered_for_platforms_that_are_absent(loaded, images, weights):
    program = make(loaded, weights=weights, platforms=serving.PLATFORMS)
    assert program.platforms == serving.PLATFORMS
    arguments = (serving.served_weights(loaded),) if weights == "beside" else ()
    actual = program.call(*arguments, images[:2])
    expected = outputs(loaded, images[:2], 0.0, 1.0)["logits"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    for platform in ("cuda", "tpu"):
        assert make(loaded, weights=weights, platforms=[platform]).platforms == (platform,)


def test_fixed_batch_on_one_platform_has_static_shapes(loaded, images):
    program = make(loaded, output="pre_logits", platforms=["cpu"], batch_size=4)
    text = program.mlir_module()
    assert "tensor<4x32x32x3xui8>" in text
    assert "custom_call" not in text and "tensor<?" not in text
    expected = outputs(loaded, images[:4], 0.0, 1.0)["pre_logits"]
    np.testing.assert_allclose(program.call(images[:4]), expected, rtol=0, atol=1e-5)


def test_failed_write_leaves_no_files(tmp_path, loaded, monkeypatch):
    def raise_disk_full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.export.Exported, "serialize", raise_disk_full)
    paths = serving.check(tmp_path / "tiny.stablehlo", weights="beside", platforms=["cpu"])
    with pytest.raises(OSError, match="No space left"):
        write(loaded, paths, weights="beside")
    assert not list(tmp_path.iterdir())


def test_json_contains_the_class_names_of_a_named_list(loaded, monkeypatch):
    monkeypatch.setattr(imagenet_names, "class_names", lambda name: (name, "two"))
    card = dataclasses.replace(loaded.card, class_names="imagenet1k")
    imagenet_model = dataclasses.replace(loaded, card=card)
    program = make(imagenet_model, batch_size=2)
    paths = serving.check("tiny.stablehlo", weights="inside", platforms=["cpu"])
    description = serving.describe(imagenet_model, program, {}, paths)
    assert description["classes"] == ("imagenet1k", "two")
    assert description["inputs"] == {"images": {"shape": [2, 32, 32, 3], "dtype": "uint8"}}
    assert "images = numpy.zeros((2, 32, 32, 3), numpy.uint8)" in description["call"]


@pytest.mark.parametrize(
    ("name", "platforms", "message"),
    [
        ("old.safetensors", ["cpu"], r"old\.safetensors"),
        ("none/tiny.stablehlo", ["cpu"], "none"),
        ("tiny.stablehlo", ["gpu"], "'gpu'.*cpu, cuda, rocm, tpu"),
        ("tiny.stablehlo", [], "''"),
        ("old.stablehlo", ["cpu"], r"old\.safetensors"),
    ],
)
def test_invalid_arguments_are_errors(tmp_path, name, platforms, message):
    (tmp_path / "old.safetensors").touch()
    with pytest.raises(UserError, match=message):
        serving.check(tmp_path / name, weights="beside", platforms=platforms)


def test_embedding_too_large_weights_is_an_error(loaded, monkeypatch):
    monkeypatch.setattr(serving, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="--weights=beside"):
        make(loaded)
    make(loaded, weights="beside")


def test_missing_weights_are_a_one_line_error(tmp_path):
    result = run_program("mixer.tools.export", tmp_path / "no.npz", tmp_path / "tiny.stablehlo")
    assert result.returncode == 2 and "no.npz" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_ending_or_flag_selects_the_format(tmp_path):
    result = run_program("mixer.tools.export", WEIGHTS, tmp_path / "tiny.mlir")
    assert result.returncode == 2 and ".stablehlo" in result.stderr and ".onnx" in result.stderr
    options = "--format=stablehlo", "--platforms=cpu"
    result = run_program("mixer.tools.export", WEIGHTS, tmp_path / "tiny.mlir", *options)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.mlir", "tiny.mlir.json"}
    target = tmp_path / "two.stablehlo"
    result = run_program("mixer.tools.export", WEIGHTS, target, "--max_inside_bytes=9")
    assert (
        result.returncode == 2 and "--max_inside_bytes=9" in result.stderr and not target.exists()
    )


@pytest.mark.slow
def test_savedmodel_and_tflite_run_as_documented(tmp_path, finished_run):
    pytest.importorskip("tensorflow")
    pytest.importorskip("jax.experimental.jax2tf")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
    (code,) = [block for block in blocks if "jax2tf" in block]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(finished_run)
    code += """
import numpy as np
images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
expected = np.asarray(apply(images))
saved = tf.saved_model.load("digits_saved_model")
for n in (1, 5):
    np.testing.assert_allclose(saved.call(images[:n]), expected[:n], rtol=0, atol=1e-6)
lite = tf.lite.Interpreter("digits.tflite")
lite.allocate_tensors()
(source,), (target,) = lite.get_input_details(), lite.get_output_details()
lite.set_tensor(source["index"], images[:1])
lite.invoke()
np.testing.assert_allclose(lite.get_tensor(target["index"]), expected[:1], rtol=0, atol=1e-6)
assert np.ptp(expected) > 0.1
"""
    run_python("-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_export_runs_as_a_program(tmp_path):
    run_python("-m", "mixer.tools.export", WEIGHTS, "tiny.stablehlo", cwd=tmp_path)
    assert (tmp_path / "tiny.stablehlo.json").exists()


def test_bfloat16_program_stores_only_rounded_weights_in_bfloat16():
    arrays = serving.served_weights(read(dtype="bfloat16"))
    dtypes = {name: array.dtype for name, array in arrays.items()}
    assert dtypes["stem/kernel"] == dtypes["MixerBlock_1/token_mixing/Dense_0/bias"]
    assert dtypes["stem/kernel"] == ml_dtypes.bfloat16
    assert dtypes["head/kernel"] == dtypes["MixerBlock_1/LayerNorm_0/scale"] == np.float32


@pytest.mark.slow
@pytest.mark.optimized
def test_bfloat16_program_matches_the_model(images):
    loaded = read(dtype="bfloat16")
    arrays = serving.served_weights(loaded)
    actual = serving.make_program(loaded, arrays, weights="beside").call(arrays, images)
    expected = np.asarray(outputs(loaded, images)["logits"])
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)
    float32_logits = outputs(read(), images)["logits"]
    # A smaller difference would mean that the program computes in float32.
    assert 1e-3 < np.abs(actual - float32_logits).max() < 0.1
