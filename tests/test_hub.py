"""Folders for the Hugging Face Hub, folders that timm wrote, and sharded files."""

import dataclasses
import json
import os
import shlex
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from etils import epath
from flax import serialization, traverse_util

import mixer
from helpers import GOLDENS, TINY, assert_same_bits, golden, run_program
from mixer import run_files
from mixer.errors import UserError
from mixer.evaluation.subject import open_subject
from mixer.models.mlp_mixer import VARIANTS
from mixer.tools import convert
from mixer.weights import fetch, hub
from mixer.weights import load as loading
from mixer.weights.card import Card
from mixer.weights.published import timm_facts

TIMM = GOLDENS / "mixer_tiny_timm.safetensors"
TIMM_HUB = GOLDENS / "timm_hub"  # written by timm
# A preprocessing that config.json expresses exactly.
SPEC = "decode(dct='accurate')|resize_small(36, method='bicubic', antialias=True)|central_crop(32)"


def read(path, **options):
    lines = []
    loaded = loading.read(path, log=lines.append, **options)
    return loaded, lines[-1]


def expect_error(path, match):
    with pytest.raises(UserError, match=match) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def make_card(variant=None, **values):
    dims = VARIANTS[variant] if variant else TINY
    fields = dict(architecture="mixer", variant=variant, dimensions=dims, num_classes=7)
    fields |= dict(image_size=(224, 224), gelu="erf", preprocess=None, class_names=None)
    return Card(**fields | dict(source="random") | values)


@pytest.fixture
def folder(tmp_path):
    """The golden weights, with a card that config.json can express, as a folder."""
    loaded, _ = read(GOLDENS / "mixer_tiny_official.npz")
    names = tuple(f"class {i}" for i in range(7))
    card = dataclasses.replace(loaded.card, preprocess=SPEC, class_names=names, source="random")
    path = epath.Path(tmp_path / "pets.v1")
    convert.write(path, dataclasses.replace(loaded, card=card), "hub")
    return path, loaded.params, card


# Reading.


def test_folder_written_by_timm_reproduces_its_logits():
    loaded, line = read(TIMM_HUB)
    card = loaded.card
    assert card.image_size == (16, 24) and "config.json" in line  # 6 patches do not form a square
    assert card.class_names == ("cat", "dog", "fox") and card.value_range == (0, 1)
    resize = "resize((16, 24), method='bicubic', antialias=True)"
    assert card.preprocess == f"decode(dct='accurate')|{resize}|value_range(0, 1)"
    with np.load(GOLDENS / "timm_hub_outputs.npz") as outputs:
        logits, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, outputs["images"])
        np.testing.assert_allclose(logits, outputs["logits"], atol=2e-6)
    model, params = mixer.load(TIMM_HUB / "model.safetensors", log=print)
    assert model == loaded.model
    assert_same_bits(params, loaded.params)


def test_folder_round_trip_is_bit_identical(folder):
    path, params, card = folder
    loaded, _ = read(path)
    assert_same_bits(loaded.params, params)
    assert loaded.card == card
    (path / "model.safetensors.json").unlink()  # config.json and the header suffice
    loaded, line = read(path)
    assert_same_bits(loaded.params, params)
    assert loaded.card == dataclasses.replace(card, source=str(path))
    assert "tanh (its header)" in line


def test_run_with_a_weight_file_is_loaded_as_a_run(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.copy(TIMM, run / "model.safetensors")
    assert "run, step 12" in read(run)[1]


def test_folder_is_evaluated_without_a_run(folder):
    subject = open_subject(folder[0], say=print)
    assert subject.workdir is None and subject.card == folder[2]


def test_config_image_size_is_ignored_if_it_does_not_fit_the_arrays(tmp_path):
    folder = shutil.copytree(TIMM_HUB, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    shutil.copy(TIMM, folder / "model.safetensors")  # weights for 32 x 32 images
    loaded, line = read(folder)
    assert loaded.card.image_size == (32, 32) and "square" in line
    config["model_args"]["img_size"] = [64, 16]
    (folder / "config.json").write_text(json.dumps(config))
    assert read(folder)[0].card.image_size == (64, 16)
    assert read(folder, image_size=(16, 64))[0].card.image_size == (16, 64)


def test_transformers_prefix_is_removed(tmp_path):
    arrays = safetensors.numpy.load_file(TIMM_HUB / "model.safetensors")
    arrays = {f"timm_model.{name}": value for name, value in arrays.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((TIMM_HUB / "config.json").read_text())
    config |= {"architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, line = read(tmp_path)
    expected, _ = read(TIMM_HUB)
    assert_same_bits(loaded.params, expected.params)
    assert "timm_model" in line
    assert loaded.card == dataclasses.replace(expected.card, source=str(tmp_path))


@pytest.fixture
def shards(tmp_path):
    """The golden file in two shards, and their index."""
    arrays = safetensors.numpy.load_file(TIMM)
    names = sorted(arrays)
    places = {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        safetensors.numpy.save_file({name: arrays[name] for name in part}, tmp_path / file)
        places |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index, places


def test_sharded_file_loads_like_a_single_file(shards):
    index, _ = shards
    expected, _ = read(TIMM)
    for path in (index, index.parent):
        loaded, _ = read(path)
        assert_same_bits(loaded.params, expected.params)
        assert loaded.card == dataclasses.replace(expected.card, source=str(path))


def test_damaged_index_raises_a_one_line_error(shards):
    index, places = shards
    name, file = next(iter(places.items()))
    other = next(other for other in places.values() if other != file)

    os.mkfifo(index.with_name("pipe.safetensors"))

    def write(value):
        index.write_text(value if isinstance(value, str) else json.dumps({"weight_map": value}))

    for value, message in (
        (places | {name: other}, rf"{name}: not in {other}"),
        (places | {name: "../x.safetensors"}, r"'\.\./x\.safetensors'"),
        (places | {name: "x.bin"}, "'x.bin'"),
        (places | {name: "a\n.safetensors"}, "a.*safetensors"),
        (places | {name: "pipe.safetensors"}, "pipe.safetensors is not a regular file"),
        (places | {name: 7}, "'7'"),
        (places | {name: ["a.safetensors"]}, r"\['a\.safetensors'\]"),
        ({}, "weight_map"),
        ([], "weight_map"),
        ("{}", "weight_map"),
        ("[" * 100_000, "not a valid index"),
        (
            dict.fromkeys(map(str, range(2000)), "")
            | {str(i): f"{i}.safetensors" for i in range(2000)},
            "1,000",
        ),
        (places | {name: "none.safetensors"}, "none.safetensors"),
    ):
        write(value)
        expect_error(index, message)
    write(places)
    (index.parent / file).write_bytes((index.parent / file).read_bytes()[:50])
    expect_error(index.parent, file)
    index.unlink()
    expect_error(index, "no such run or file")


def test_other_formats_in_a_folder_get_a_conversion_command(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    text = expect_error(tmp_path, r"pytorch_model\.bin is a pickled file")
    assert '"model.safetensors"' in text  # the name that mixer.load reads
    (tmp_path / "pytorch_model.bin").unlink()
    arrays = {"params": traverse_util.unflatten_dict(dict(golden("official")), sep="/")}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(arrays))
    text = expect_error(tmp_path, r"flax_model\.msgpack is a Flax msgpack file")
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(text.split("`")[1])[2], {})
    expected, _ = read(GOLDENS / "mixer_tiny_official.npz")
    assert_same_bits(read(tmp_path / "flax_model.npz")[0].params, expected.params)
    assert fetch.hub_weights(tmp_path) is None


# Writing.


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_json_uses_timm_model_names(variant):
    """The names and fixed arguments are those of timm 1.0.31's mlp_mixer.py."""
    config = hub.timm_config(make_card(variant))
    if variant in ("S/8", "H/14"):
        assert config["architecture"] == "MlpMixer"  # unknown to timm
        assert config["model_args"]["patch_size"] == VARIANTS[variant]["patch_size"]
    else:
        assert config["architecture"] == f"mixer_{variant.replace('/', '').lower()}_224"
        # timm's functions raise TypeError for an argument that they set themselves.
        assert config["model_args"] == {"img_size": [224, 224], "mlp_ratio": [0.5, 4.0]}


def test_config_json_of_other_widths_sizes_and_heads():
    dims = VARIANTS["B/32"] | {"tokens_mlp_dim": 768}
    config = hub.timm_config(make_card("B/32", dimensions=dims, image_size=(448, 224)))
    assert config["architecture"] == "mixer_b32_224" and config["num_classes"] == 7
    assert config["model_args"] == {"img_size": [448, 224], "mlp_ratio": [1.0, 4.0]}
    inner = config["pretrained_cfg"]
    assert inner["input_size"] == [3, 448, 224] and inner["fixed_input_size"] is True
    assert (inner["first_conv"], inner["classifier"]) == ("stem.proj", "head")
    config = hub.timm_config(make_card("B/16", num_classes=1000, class_names="imagenet1k"))
    assert config["label_names"][0] == "n01440764"
    assert config["label_descriptions"]["n01440764"] == "tench, Tinca tinca"
    facts = timm_facts(config, source="x", num_classes=1000)
    assert facts.class_names == "imagenet1k"
    assert "label_names" not in hub.timm_config(make_card(num_classes=0))


@pytest.mark.parametrize("side", [9, 32, 64, 224, 299, 384])
@pytest.mark.parametrize("margin", [0, 1, 5, 32])
def test_exact_preprocessing_survives_config_json(side, margin):
    start, method = (
        "decode(dct='accurate')|",
        f"({side + margin}, method='bilinear', antialias=True)",
    )
    crop = f"|central_crop({side})"
    specs = [f"{start}resize_small{method}{crop}", f"{start}resize{method}{crop * bool(margin)}"]
    for steps in (*specs, f"{specs[0]}|value_range(0, 1)", f"{specs[1]}|value_range(-0.5, 1.5)"):
        config = hub.timm_config(make_card(image_size=(side, side), preprocess=steps))
        facts = timm_facts(config, source="x", num_classes=7)
        assert facts.preprocess((side, side)) == steps


def test_model_card_lists_what_timm_cannot_express():
    def limits(**values):
        card = make_card(values.pop("variant", "B/16"), **values)
        text = hub.model_card(card, name="x", num_params=1, license_name="mit", results={})
        usage, limits = text.split("## Usage in timm")[1].split("## What timm cannot express")
        return usage, limits

    exact = SPEC.replace("36", "256").replace("32", "224")
    usage, text = limits(preprocess=exact)
    assert "create_model" in usage and "act_layer" not in usage and "- " not in text
    usage, text = limits(preprocess=exact, gelu="tanh")
    assert 'act_layer=timm.layers.get_act_layer("gelu_tanh")' in usage and "GELU" in text
    usage, text = limits(preprocess=exact, variant="S/8")
    assert "timm.models.mlp_mixer.MlpMixer(" in usage and "patch_size=8" in usage
    assert "Dimensions" in text and "GELU" not in text
    area = "decode|resize_small(256, method='area')|central_crop(224)"
    odd = "decode|random_erasing(0.2)"
    for steps, word in ((area, area), (odd, odd), ("decode", "224 x 224"), (None, "unknown")):
        _, text = limits(preprocess=steps)
        assert text.count("- ") == 1 and "Preprocessing" in text and word in text


def test_model_card_contains_the_results_of_the_run(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    splits = {
        "test": {"count": 50, "top1": 0.5},
        "val_ema": {"count": 4, "top1": 0.5, "data": "/data/of mine/pets val"},
        "test_ema": {"count": 1797, "top1": 0.96875, "top1_interval": [0.95, 0.98], "top5": 1.0}
        | {"loss": 0.125, "data": 'digits "test"'},
    }
    run_files.write_json(epath.Path(run) / "results.json", {"step": 12, "splits": splits})
    arguments = (run, tmp_path / "pets", "--to=hub", "--license=apache-2.0")
    process = run_program("mixer.tools.convert", *arguments)
    assert process.returncode == 0, process.stderr
    assert "pets" in process.stdout and "README.md" in process.stdout
    text = (tmp_path / "pets" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "jax"
    assert front["pipeline_tag"] == "image-classification" and "mlp-mixer" in front["tags"]
    (entry,) = front["model-index"]
    # Only the results of the moving average, whose weights were converted.
    val_result, test_result = entry["results"]
    assert val_result["dataset"]["name"] == "pets val" and "/data" not in text
    assert entry["name"] == "pets" and test_result["dataset"]["name"] == 'digits "test"'
    assert test_result["metrics"] == [{"type": "accuracy", "value": 0.96875}]
    assert "| test | 1,797 | 96.88 % | 95.00 % to 98.00 % | 100.00 % | 0.1250 |" in text
    assert str(tmp_path) not in text + (tmp_path / "pets" / "model.safetensors.json").read_text()
    loaded, _ = read(tmp_path / "pets")
    expected, _ = read(run)
    assert_same_bits(loaded.params, expected.params)
    assert loaded.card == dataclasses.replace(expected.card, source="run")
    # Results from another step do not describe these weights, so they are ignored.
    run_files.write_json(epath.Path(run) / "results.json", {"step": 8, "splits": splits})
    assert hub.read_results(run) == {}


def test_invalid_arguments_exit_with_one_line(tmp_path):
    (tmp_path / "existing").mkdir()
    for arguments, message in (
        ((TIMM, tmp_path / "x.npz", "--to=hub"), "x.npz"),
        ((TIMM, tmp_path / "existing", "--to=hub"), "existing exists already"),
        ((TIMM, tmp_path / "x", "--to=hub", "--license=a b\n"), "--license"),
        ((TIMM, tmp_path / "x.npz", "--license=mit"), "--license=mit"),
        ((TIMM, tmp_path / "x", "--to=hub", "--layout=legacy"), "--layout=legacy"),
    ):
        process = run_program("mixer.tools.convert", *arguments)
        assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
        assert message in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["existing"]


def test_timm_opens_the_folder(folder):
    pytest.importorskip("timm")
    import torch

    path, params, card = folder
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    expected, _ = card.model().apply({"params": params}, images)
    code = (path / "README.md").read_text().split("## Usage in timm")[1].split("```")[1]
    code = code.removeprefix("python\n").replace(
        "model.safetensors", str(path / "model.safetensors")
    )
    names = {"images": torch.tensor(images.transpose(0, 3, 1, 2).copy())}
    exec(code, names)
    np.testing.assert_allclose(names["logits"].detach().numpy(), expected, atol=1e-5)
