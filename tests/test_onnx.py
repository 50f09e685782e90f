"""ONNX files: onnxruntime computes the model's outputs, and the metadata describes the model."""

import contextlib
import dataclasses
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from helpers import GOLDENS, ROOT, run_program, run_python
from mixer.data.imagenet import names as imagenet_names
from mixer.errors import UserError
from mixer.models import registry
from mixer.parallel import sharding
from mixer.weights import formats
from mixer.weights import load as loading
from mixer.weights.card import Card

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
onnx_model = pytest.importorskip("mixer.tools.export.onnx_model")

SLOW = pytest.mark.slow
WEIGHTS = GOLDENS / "mixer_tiny_official.npz"
TOOL = "mixer.tools.export"


def read(path=WEIGHTS, **options):
    return loading.read(path, log=lambda line: None, **options)


def pixels(loaded, n, seed=0):
    shape = (n, *loaded.card.image_size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def outputs(loaded, images):
    low, high = loaded.card.value_range
    x = images / np.float32(255) * np.float32(high - low) + np.float32(low)
    return jax.jit(loaded.model.apply)({"params": loaded.params}, x)[1]


def check(path, loaded, *, output="logits", sizes=(1, 3, 8), atol=1e-5):
    """Checks that the file is valid and matches the model; returns its session."""
    onnx.checker.check_model(str(path), full_check=True)
    session = ort.InferenceSession(str(path))
    images = pixels(loaded, max(sizes))
    expected = outputs(loaded, images)[output]
    for n in sizes:
        (got,) = session.run([output], {"images": images[:n]})
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[:n], rtol=0, atol=atol)
    return session


@pytest.mark.parametrize(
    ("options", "output"),
    [
        (dict(gelu="tanh"), "logits"),
        (dict(gelu="erf"), "logits"),
        (dict(image_size=(64, 96)), "logits"),  # grown, and not square
        (dict(num_classes=0), "pre_logits"),
    ],
)
def test_onnxruntime_matches_the_model(tmp_path, options, output):
    loaded = read(**options)
    (path,) = onnx_model.write(loaded, tmp_path / "tiny.onnx", output=output)
    session = check(path, loaded, output=output)
    (images,), (result,) = session.get_inputs(), session.get_outputs()
    assert images.shape == ["b", *loaded.card.image_size, 3] and images.type == "tensor(uint8)"
    assert result.shape == ["b", 7 if output == "logits" else 24]


VIT_CASES = {
    "bv_map": dict(gelu="erf"),  # attention pooling, positions of patches
    "official_token": dict(image_size=(32, 48)),
    "official_gap": dict(),
    "bv_gap_sincos": dict(image_size=(48, 32), num_classes=0),
    "bv_tok": dict(gelu="erf"),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "bv_map" else pytest.param(kind, marks=SLOW) for kind in VIT_CASES]
)
def test_onnxruntime_matches_the_vision_transformer(tmp_path, kind):
    path, options = GOLDENS / f"vit_tiny_{kind}.npz", VIT_CASES[kind]
    if kind == "bv_gap_sincos":  # its positions fit any size
        loaded = read(path, image_size=(32, 32))
        formats.write_file(
            tmp_path / "x.npz", sharding.by_name(loaded.params), loaded.card, layout="published"
        )
        path = tmp_path / "x.npz"
    loaded = read(path, **options)
    output = "logits" if loaded.card.num_classes else "pre_logits"
    (path,) = onnx_model.write(loaded, tmp_path / "tiny.onnx", output=output)
    check(path, loaded, output=output)
    names = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert names >= set(sharding.by_name(loaded.params)) - set(registry.HEAD)


@pytest.mark.parametrize("groups", [24, pytest.param(4, marks=pytest.mark.slow)])
def test_onnxruntime_matches_a_model_with_token_mixing_groups(tmp_path, groups):
    loaded, rng = read(), np.random.default_rng(0)
    for i in range(loaded.card.num_blocks):
        mlp = loaded.params[f"MixerBlock_{i}"]["token_mixing"]
        scales = rng.normal(size=groups).astype(np.float32)
        loaded.params[f"MixerBlock_{i}"]["token_mixing"] = jax.tree.map(
            lambda leaf, scales=scales: np.multiply.outer(scales, leaf), mlp
        )
    model = loaded.model.clone(token_mixing_groups=groups)
    loaded = dataclasses.replace(loaded, model=model)
    (path,) = onnx_model.write(loaded, tmp_path / "tiny.onnx")
    check(path, loaded, sizes=(1, 3))


def test_tiny_weights_distinguish_the_forms_of_gelu(tmp_path):
    """Otherwise the test above would pass with the wrong form."""
    images = pixels(read(), 2)
    tanh, erf = (outputs(read(gelu=kind), images)["logits"] for kind in ("tanh", "erf"))
    assert np.abs(tanh - erf).max() > 2e-5


def test_command_and_example_run_as_documented(tmp_path):
    arguments = TOOL, WEIGHTS, tmp_path / "B16.onnx"
    result = run_program(*arguments)
    assert result.returncode == 0, result.stderr
    size = (tmp_path / "B16.onnx").stat().st_size
    assert f"B16.onnx: {size:,} bytes" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["B16.onnx"]
    check(tmp_path / "B16.onnx", read())
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
    (code,) = [block for block in blocks if 'InferenceSession("B16.onnx")' in block]
    assert len([line for line in code.splitlines() if line]) <= 8
    space = {}
    with contextlib.chdir(tmp_path):
        exec(code, space)
    assert space["logits"].shape == (8, 7)

    result = run_program(*arguments)
    assert result.returncode == 2 and "B16.onnx already exists" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_metadata_contains_classes_preprocessing_and_card(tmp_path, monkeypatch):
    loaded = read()
    preprocess = "decode|resize(32)|value_range(0, 1)"
    card = dataclasses.replace(loaded.card, preprocess=preprocess, class_names=tuple("äbcdefg"))
    loaded = dataclasses.replace(loaded, card=card)
    (path,) = onnx_model.write(loaded, tmp_path / "tiny.onnx")
    session = check(path, loaded)  # with its own range of values
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list("äbcdefg")
    assert json.loads(about["card"])["preprocess"] == preprocess
    assert json.loads(about["card"]) == json.loads(json.dumps(card.as_json()))

    monkeypatch.setattr(imagenet_names, "class_names", lambda name: (name, "two"))
    card = dataclasses.replace(card, class_names="imagenet1k")
    (path,) = onnx_model.write(dataclasses.replace(loaded, card=card), tmp_path / "names.onnx")
    (classes,) = [p.value for p in onnx.load(path).metadata_props if p.key == "classes"]
    assert json.loads(classes) == ["imagenet1k", "two"]


def test_file_has_opset_20_and_its_oldest_ir_version(tmp_path):
    (path,) = onnx_model.write(read(), tmp_path / "tiny.onnx", batch_size=4)
    model = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert model.ir_version == 9
    names = {tensor.name for tensor in model.graph.initializer}
    assert names >= set(sharding.by_name(read().params))
    check(path, read(), sizes=(4,))
    with pytest.raises(Exception, match="images"):  # the batch is fixed
        ort.InferenceSession(str(path)).run(None, {"images": pixels(read(), 3)})


def test_weights_above_the_limit_become_external_data(tmp_path):
    total = sum(array.nbytes for array in sharding.by_name(read().params).values())
    result = run_program(TOOL, WEIGHTS, tmp_path / "one.onnx", f"--max_inside_bytes={total + 999}")
    assert result.returncode == 0 and [p.name for p in tmp_path.iterdir()] == ["one.onnx"]
    # The scale and the range of pixels and a few shapes are constants too.
    result = run_program(TOOL, WEIGHTS, tmp_path / "tiny.onnx", f"--max_inside_bytes={total}")
    assert result.returncode == 0, result.stderr
    for name in ("tiny.onnx", "tiny.onnx.data"):
        assert f"{name}: {(tmp_path / name).stat().st_size:,} bytes" in result.stdout
    assert (tmp_path / "tiny.onnx").stat().st_size < (tmp_path / "one.onnx").stat().st_size / 2
    check(tmp_path / "tiny.onnx", read())
    (tmp_path / "elsewhere").mkdir()
    for name in ("tiny.onnx", "tiny.onnx.data"):  # the two move together
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    check(tmp_path / "elsewhere" / "tiny.onnx", read())
    external = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(
            tmp_path / "elsewhere/tiny.onnx", load_external_data=False
        ).graph.initializer
        if tensor.external_data
    ]
    assert len(external) > 10
    assert all(int(entry["offset"]) % 4096 == 0 for entry in external)


@pytest.mark.slow
def test_run_in_bfloat16_is_exported_in_float32(tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["model"]["dtype"] = "bfloat16"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert read(tmp_path / "run").model.dtype == "bfloat16"
    result = run_program(TOOL, tmp_path / "run", tmp_path / "digits.onnx", "--dtype=float32")
    assert result.returncode == 0, result.stderr
    session = check(tmp_path / "digits.onnx", read(tmp_path / "run", dtype="float32"))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list("0123456789")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights=beside"], r"--weights=beside.*--max_inside_bytes=0"),
        (["--platforms=cpu"], "--platforms"),
        (["--dtype=bfloat16"], r"--dtype=bfloat16.*float32"),
        (["--max_inside_bytes=3000000000"], "3000000000"),
    ],
)
def test_options_for_stablehlo_are_errors(tmp_path, options, message):
    result = run_program(TOOL, WEIGHTS, tmp_path / "tiny.onnx", *options)
    assert result.returncode == 2 and re.search(message, result.stderr)
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_invalid_arguments_are_errors(tmp_path, monkeypatch):
    (tmp_path / "old.onnx.data").touch()
    for name, message in (("old.onnx", r"old\.onnx\.data"), ("no/tiny.onnx", "no")):
        with pytest.raises(UserError, match=message):
            onnx_model.check(tmp_path / name)
    with pytest.raises(UserError, match="--output=pre_logits"):
        onnx_model.write(read(num_classes=0), tmp_path / "tiny.onnx")
    entry = dataclasses.replace(registry.ARCHITECTURES["mixer"], onnx_graph=None)
    monkeypatch.setitem(registry.ARCHITECTURES, "mixer", entry)
    with pytest.raises(UserError, match=r"MLP-Mixer.*Vision Transformer"):
        onnx_model.write(read(), tmp_path / "tiny.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx.data"]


def test_missing_onnx_is_a_one_line_error_with_the_command(tmp_path, monkeypatch):
    import mixer.tools.export as package

    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in ("onnx_model", "onnx_graphs"):
        monkeypatch.delitem(sys.modules, f"{TOOL}.{name}")
        monkeypatch.delattr(package, name)
    result = run_program(TOOL, WEIGHTS, tmp_path / "tiny.onnx")
    assert result.returncode == 2 and "pip install -e .[onnx]" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_failed_write_leaves_no_files(tmp_path, monkeypatch):
    def disk_is_full(*arguments, **options):
        assert [path.suffix for path in tmp_path.iterdir()] == [".new"]  # the external data
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_model.helper, "make_model", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        onnx_model.write(read(), tmp_path / "tiny.onnx", max_inside_bytes=0)
    assert not list(tmp_path.iterdir())


# The paper's sizes.


def random_weights(variant, gelu, path, **fields):
    """Writes weights of a variant, all random, to a file."""
    model = registry.make_model(variant, num_classes=1000, **fields)
    architecture = registry.architecture_of(model)
    rng = np.random.default_rng(0)
    arrays = {}
    for name, leaf in registry.param_shapes(model, (224, 224)).items():
        values = rng.standard_normal(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name.endswith("kernel") else 100
        arrays[name] = values / np.float32(np.sqrt(fan_in)) + name.endswith("scale")
    dims = registry.dimensions(model) | {key: getattr(model, key) for key in architecture.options}
    card = Card(
        **dict(architecture=architecture.name, variant=variant, dimensions=dims),
        **dict(num_classes=1000, image_size=(224, 224), gelu=gelu, source="random"),
        **dict(preprocess=None, class_names=None),
    )
    formats.write_file(path, arrays, card, layout="published")


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("variant", ["S/32", "B/16"])
def test_onnxruntime_matches_the_papers_models(tmp_path, variant, gelu):
    random_weights(variant, gelu, tmp_path / "weights.npz")
    loaded = read(tmp_path / "weights.npz")
    assert loaded.card.gelu == gelu
    (path,) = onnx_model.write(loaded, tmp_path / "model.onnx")
    check(path, loaded, sizes=(1, 4))
    paths = onnx_model.write(loaded, tmp_path / "two.onnx", max_inside_bytes=10**6)
    assert len(paths) == 2
    check(paths[0], loaded, sizes=(2,))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("variant", ["S/32", "B/16"])
def test_onnxruntime_matches_vision_transformers_of_the_papers_sizes(tmp_path, variant):
    random_weights(variant, "tanh", tmp_path / "weights.npz", name="vit", pre_logits_layer=True)
    loaded = read(tmp_path / "weights.npz")
    (path,) = onnx_model.write(loaded, tmp_path / "model.onnx")
    check(path, loaded, sizes=(1, 2))


@pytest.mark.slow
@pytest.mark.optimized
def test_onnxruntime_matches_a_grown_model(tmp_path):
    random_weights("S/32", "tanh", tmp_path / "weights.npz")
    loaded = read(tmp_path / "weights.npz", image_size=(448, 224))
    (path,) = onnx_model.write(loaded, tmp_path / "model.onnx")
    check(path, loaded, sizes=(1, 3))


@pytest.mark.slow
def test_only_the_export_to_onnx_imports_onnx(tmp_path):
    code = """
import sys, mixer
from mixer.tools.export import __main__, serving
assert not [name for name in sys.modules if name.startswith("onnx")]
"""
    run_python("-c", code)
    run_python("-m", TOOL, WEIGHTS, "tiny.onnx", cwd=tmp_path)
    check(tmp_path / "tiny.onnx", read())
