"""Images and patches that are not square, and images that are not RGB."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

import mixer
from helpers import TINY, TINY_VIT, assert_same_bits, run_program, tiny_config
from mixer import run_files, trainer
from mixer.data import philox
from mixer.data import splits as pipeline
from mixer.data.preprocessing import device
from mixer.data.preprocessing.spec import parse, with_channels
from mixer.errors import UserError
from mixer.evaluation.suites import dataset_config
from mixer.models import flops, registry
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.tools.inspect import activations
from mixer.tools.plan import hlo
from mixer.tools.plan import subject as plan_subject
from mixer.tools.predict import prediction
from mixer.training import program
from mixer.weights import formats, hub, load
from mixer.weights.card import Card

PATCH, SIZE, CHANNELS = (2, 4), (8, 12), 5


def tiny(name="mixer", **fields):
    dims = {"mixer": TINY, "vit": TINY_VIT}[name]
    fields = dict(num_classes=7, patch_size=PATCH, in_channels=CHANNELS) | fields
    return registry.make_model(name=name, **{**dims, **fields})


def draw_params(model, size=SIZE):
    rng, shapes = np.random.default_rng(0), registry.param_shapes(model, size)
    return {name: rng.normal(0, 0.2, x.shape).astype(np.float32) for name, x in shapes.items()}


def make_card(model, size=SIZE, preprocess=None):
    architecture = registry.architecture_of(model)
    shapes = {name: x.shape for name, x in registry.param_shapes(model, size).items()}
    dims = architecture.read_dimensions(shapes, "random")
    del dims["num_tokens"], dims["num_classes"]
    return Card(architecture.name, None, dims, 7, size, "tanh", preprocess, None, "random")


def inputs_config(name="mixer", **values):
    """A config for grey images of 8 x 16 pixels in patches of 2 x 4."""
    options = dict(image_size=(8, 16), model__patch_size=(2, 4), model__in_channels=1)
    config = tiny_config(**options | values)
    if name == "vit":
        config.model.update(name="vit", tokens_mlp_dim=None, channels_mlp_dim=None)
        config.model.update(mlp_dim=24, num_heads=2)
    return config


def read(path, **options):
    return load.read(path, log=lambda line: None, **options)


# Models and weights.


@pytest.mark.parametrize("name", ["mixer", "vit"])
def test_patches_are_cut_by_rows_and_columns(name):
    model = tiny(name)
    params = traverse_util.unflatten_dict(draw_params(model), sep="/")
    images = np.random.default_rng(1).normal(size=(2, *SIZE, CHANNELS)).astype(np.float32)
    _, out = jax.jit(model.apply)({"params": params}, images)
    stem = params["stem" if name == "mixer" else "embedding"]
    tiles = images.reshape(2, 4, 2, 3, 4, CHANNELS)
    expected = np.einsum("nrycxk,yxkd->nrcd", tiles, stem["kernel"]) + stem["bias"]
    np.testing.assert_allclose(out["stem"], expected, atol=1e-5)
    with pytest.raises(UserError, match=r"\(2, 8, 12, 3\).*\(N, H, W, 5\)"):
        model.apply({"params": params}, images[..., :3])
    with pytest.raises(UserError, match=r"patch size 2 x 4.* 10"):
        model.apply({"params": params}, images[:, :, :10])


@pytest.mark.parametrize("name", ["mixer", "vit"])
def test_update_and_plan_follow_the_shape_of_the_images(name):
    """Traces an update on grey images, and counts the FLOPs of the traced forward pass."""
    config = inputs_config(name, model__num_classes=10)
    subject = plan_subject.open_subject(config, "gpu:1xH200", utilization=0.5)
    assert subject.model.in_channels == 1 and subject.image_size == (8, 16)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    train = program.make_program(subject.config, mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((16, 8, 16, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((16,), jnp.int32),
    }
    train.jit_step().eval_shape(train.state, batch)

    def forward(params, images):
        return train.model.apply({"params": params}, images)[0]

    images = jax.ShapeDtypeStruct((16, 8, 16, 1), jnp.float32)
    text = jax.jit(forward).lower(train.state.params, images).as_text("hlo")
    expected = 16 * flops.forward_flops(train.model, (8, 16))
    assert hlo.count(text).flops == pytest.approx(expected, rel=0.01)
    stem = next(registry.architecture_of(train.model).layer_flops(train.model, (8, 16)))
    assert stem[1] == 2 * 16 * (2 * 4 * 1) * 16  # 16 patches of 8 values, 16 channels


@pytest.mark.parametrize("name", ["mixer", "vit"])
@pytest.mark.parametrize("layout", ["published", "timm"])
def test_weights_return_from_a_file(tmp_path, name, layout):
    model = tiny(name)
    arrays, card = draw_params(model), make_card(model)
    path = tmp_path / f"w{formats.ENDINGS[layout]}"
    formats.write_file(path, arrays, card, layout=layout)
    loaded = read(path)
    assert loaded.card.patch_size == PATCH and loaded.card.in_channels == CHANNELS
    assert (loaded.model, loaded.card.image_size) == (model, SIZE)
    assert_same_bits(loaded.params, traverse_util.unflatten_dict(arrays, sep="/"))
    wide = read(path, image_size=(16, 32), resize="interpolate")
    assert wide.card.grid == (8, 8)
    values = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert (values["timm"]["in_chans"], values["timm"]["patch_size"]) == (CHANNELS, [2, 4])
    # The files of older code have no number of channels.
    rgb = tiny(name, in_channels=3)
    formats.write_file(path, draw_params(rgb), make_card(rgb), layout=layout)
    values = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert values.pop("in_channels") == 3 and "in_chans" not in values["timm"]
    (tmp_path / f"{path.name}.json").write_text(json.dumps(values))
    assert read(path).model == rgb


def test_hub_config_has_the_channels_and_no_stem_that_timm_would_convert():
    config = hub.timm_config(make_card(tiny(), preprocess="decode(channels=5)|resize((8, 12))"))
    inner = config["pretrained_cfg"]
    assert inner["input_size"] == [5, 8, 12] and inner["first_conv"] is None
    assert len(inner["mean"]) == len(inner["std"]) == config["model_args"]["in_chans"] == 5
    rgb = hub.timm_config(make_card(tiny(in_channels=3)))
    assert rgb["pretrained_cfg"]["first_conv"] == "stem.proj"


def test_initial_weights_have_the_channels_of_the_config(tmp_path):
    model = tiny(in_channels=1)
    formats.write_file(tmp_path / "w.npz", draw_params(model), make_card(model), layout="published")
    config = inputs_config(init_from=str(tmp_path / "w.npz"), init_resize="interpolate")
    initial = run.find_initial(config)
    assert run.resolve(config, initial=initial).init_image_size == SIZE
    config.model.in_channels = 3
    with pytest.raises(UserError, match=r"model\.in_channels=3, .*w\.npz.*model\.in_channels=1"):
        run.find_initial(config)


def test_predict_refuses_images_that_no_file_holds():
    model = tiny()
    loaded = load.Loaded(model, {}, make_card(model))
    with pytest.raises(UserError, match="5 channels"):
        prediction.predict(loaded, ["x.png"], preprocess="decode", top=1, batch_size=1)


def test_filters_show_their_channels_side_by_side():
    kernel = np.zeros((2, 4, CHANNELS, 3), np.float32)
    kernel[1, 2, 3, 0] = -1  # the first filter: row 1 and column 2 of channel 3
    pictures = activations.stem_filters(kernel)
    assert pictures.shape == (3, 2, CHANNELS * 4, 3)
    assert np.argwhere(pictures[0, :, :, 0] == 0).tolist() == [[1, 3 * 4 + 2]]


# Configs.


def test_config_returns_from_its_file_and_older_runs_are_rgb():
    config = run.resolve(inputs_config(), initial=None)
    saved = run_files.complete(json.loads(json.dumps(config.to_dict())))
    assert run.changes(saved, config.to_dict()) == []
    del saved["model"]["in_channels"]
    assert run_files.complete(saved)["model"]["in_channels"] == 3
    square = run.resolve(inputs_config(image_size=(8, 8), model__patch_size=(2, 2)), initial=None)
    assert (square.image_size, square.model.patch_size) == (8, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(image_size=(9, 16)), "9 x 16.* 2 x 4 .* 9; .* 8 or 10"),
        (dict(image_size=(8, 16, 3)), r"image_size=\[8, 16, 3\]"),
        (dict(image_size="8x16"), "image_size='8x16'"),
        (dict(image_size=8.5), r"image_size=8\.5"),
        (dict(init_image_size=(8, 0)), "init_image_size=0"),
        (dict(model__patch_size=(0, 4)), r"model\.patch_size=0"),
        (dict(model__in_channels=0), r"model\.in_channels=0"),
        (
            dict(dataset__train_preprocess="decode|resize((8, 16))|randaugment(2, 10)"),
            r"randaugment .*RGB.*model\.in_channels=1",
        ),
        (dict(dataset__eval_preprocess="decode|autoaugment_cifar"), "autoaugment_cifar .*RGB"),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(values, message):
    config = inputs_config(**values)
    with pytest.raises(UserError, match=message) as error:
        run.check_config(config)
        run.resolve(config, initial=None)
    assert "\n" not in str(error.value)


# Preprocessing.


def test_decoding_op_gets_the_channels_of_the_model():
    assert with_channels("decode|flip_lr", 3) == "decode|flip_lr"
    assert with_channels("decode|flip_lr", 1) == "decode(channels=1)|flip_lr"
    crop = with_channels("inception_crop((8, 16), published=True)|flip_lr", 4)
    assert crop == "inception_crop((8, 16), published=True, channels=4)|flip_lr"
    assert with_channels(crop, 1) == crop and with_channels("", 1) == ""
    with pytest.raises(UserError, match=r"4 channel.*model\.in_channels=1"):
        parse(crop, (8, 16), channels=1)
    with pytest.raises(UserError, match=r"16 x 8; expected image_size=\(8, 16\)"):
        parse("decode|resize((16, 8))", (8, 16))
    for size in ("(8, 17)", "(9, 16)", "17"):
        with pytest.raises(UserError, match="larger than the image"):
            parse(f"decode|resize((8, 16))|central_crop({size})")


def test_colours_become_grey_as_in_pillow():
    from mixer.data.preprocessing.host import make_preprocess

    colours = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    picture = Image.fromarray(colours)
    for image in (picture, picture.convert("L")):
        file = io.BytesIO()
        image.save(file, "PNG")
        decode = make_preprocess("decode(channels=1)", (6, 10))
        pixels = decode({"image": file.getvalue()}, np.zeros(2, np.int64))["image"]
        np.testing.assert_array_equal(pixels[..., 0], np.asarray(picture.convert("L")))


@pytest.mark.slow
def test_device_ops_equal_the_host_for_any_shape():
    from mixer.data.preprocessing.host import make_preprocess

    text = (
        "decode(channels=5)|random_crop((8, 12), pad=3)|flip_lr|random_erasing(prob=1)|"
        "random_affine(degrees=9)|central_crop((4, 12))|permute_patches((4, 12), (2, 4))|"
        "permute_pixels((4, 12))|value_range(0, 1)"
    )
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 11, 5), np.uint8)
    seeds = np.arange(8).reshape(4, 2)
    host = make_preprocess(text, (4, 12))
    expected = [host({"image": x}, seed)["image"] for x, seed in zip(images, seeds, strict=True)]
    augment = device.make_augment(parse(text), (6, 11))
    actual = jax.jit(augment)(jnp.asarray(images), philox.make_key(seeds[:, 0], seeds[:, 1]))
    np.testing.assert_array_equal(actual, np.stack(expected))


def test_arrays_of_a_tfds_set_are_read(tmp_path):
    import tensorflow_datasets as tfds

    images = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 5), np.uint8)

    class Bands(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(6, 8, 5), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            keys = ("image", "label")
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):
                yield i, {"image": image, "label": i % 2}

    builder = Bands(data_dir=tmp_path)
    builder.download_and_prepare()
    dataset = dataset_config("bands", str(tmp_path))
    options = dict(image_size=(6, 8), num_classes=None)
    spec = "decode(channels=5)"
    split = pipeline.open_split(dataset, "train", spec, channels=5, **options)
    (batch,) = split.read(start=0, stop=4, batch_size=4)
    assert sorted(x.tobytes() for x in batch["image"]) == sorted(x.tobytes() for x in images)
    assert split.stored_bytes() == images.nbytes and not any(fault for _, fault in split.check())
    with pytest.raises(UserError, match=r"5 channel.*model\.in_channels=3"):
        pipeline.open_split(dataset, "train", "decode", **options)


# Runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of grey and colour images of 20 x 36 pixels in two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4), ("test", 4)):
        for label in range(2):
            directory = root / split / f"class_{label}"
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (20, 36, 3), np.uint8) + np.uint8(100 * label)
                picture = Image.fromarray(pixels).convert("L" if number % 2 else "RGB")
                picture.save(directory / f"{number}.{'png' if number % 2 else 'jpg'}")
    return root


@pytest.mark.slow
def test_grey_folder_is_trained_evaluated_predicted_and_exported(folder, tmp_path):
    overrides = {
        "image_size": "(16, 32)",
        "total_steps": 4,
        "global_batch_size": 16,
        "eval_every_steps": 2,
        "checkpoint.every_steps": 2,
        "schedule.warmup_steps": 0,
        "tensorboard": False,
        "model.in_channels": 1,
        "model.patch_size": "(4, 8)",
        "model.hidden_dim": 16,
        "model.num_blocks": 2,
        "model.tokens_mlp_dim": 8,
        "model.channels_mlp_dim": 24,
        "dataset.data_dir": folder,
        "dataset.train_preprocess": "inception_crop((16, 32))|flip_lr",
        "dataset.eval_preprocess": "decode|resize((16, 32))",
    }
    workdir = tmp_path / "run"

    def train(**values):
        flags = [f"--config.{key}={value}" for key, value in (overrides | values).items()]
        return run_program("train.py", "--config=configs/folder.py", f"--workdir={workdir}", *flags)

    assert train().returncode == 0
    saved = json.loads((workdir / "config.json").read_text())
    assert (saved["image_size"], saved["model"]["patch_size"]) == ([16, 32], [4, 8])
    assert saved["dataset"]["eval_preprocess"] == "decode(channels=1)|resize((16, 32))"
    assert train().returncode == 0  # resumes a finished run
    changed = train(**{"model.in_channels": 3})
    assert changed.returncode == 2 and "model.in_channels: 1 -> 3" in changed.stderr
    evaluated = run_program("evaluate.py", f"--workdir={workdir}")
    assert evaluated.returncode == 0 and "test" in evaluated.stdout

    images = [folder / "test" / "class_0" / name for name in ("0.jpg", "1.png")]
    arguments = [*images, f"--weights={workdir}", "--json"]
    predicted = run_program("mixer.tools.predict", *arguments)
    assert len(predicted.stdout.splitlines()) == 2, predicted.stderr
    exported = run_program("mixer.tools.export", workdir, tmp_path / "grey.stablehlo")
    assert exported.returncode == 0, exported.stderr
    values = json.loads((tmp_path / "grey.stablehlo.json").read_text())
    assert values["inputs"]["images"]["shape"] == ["b", 16, 32, 1]
    inspected = run_program("mixer.tools.inspect", f"--workdir={workdir}")
    assert inspected.returncode == 0, inspected.stderr
    assert (workdir / "inspect" / "stem.png").exists()


@pytest.mark.slow
def test_multispectral_run_is_resumed_and_fine_tuned_at_another_aspect(tmp_path):
    options = dict(model__in_channels=CHANNELS, eval_every_steps=None, schedule__warmup_steps=0)
    trainer.train(inputs_config("vit", total_steps=4, **options), tmp_path / "whole")
    trainer.train(inputs_config("vit", total_steps=4, **options), tmp_path / "whole")
    model, _ = mixer.load(tmp_path / "whole", log=lambda line: None)
    assert (model.in_channels, model.patch_size) == (CHANNELS, (2, 4))
    options |= dict(init_from=str(tmp_path / "whole"), init_resize="interpolate", total_steps=2)
    trainer.train(inputs_config("vit", image_size=(12, 8), **options), tmp_path / "tuned")
    config, _ = run.read_run(tmp_path / "tuned")
    assert config.init_image_size == [8, 16]
    tuned = read(tmp_path / "tuned")
    assert tuned.card.image_size == (12, 8) and tuned.card.grid == (6, 2)


@pytest.mark.slow
def test_onnx_model_takes_images_of_any_shape(tmp_path):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from mixer.tools.export import onnx_model

    model = tiny()
    params = traverse_util.unflatten_dict(draw_params(model), sep="/")
    loaded = load.Loaded(model, params, make_card(model))
    (path,) = onnx_model.write(loaded, tmp_path / "bands.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    images = np.random.default_rng(1).integers(0, 256, (3, *SIZE, CHANNELS), np.uint8)
    (logits,) = ort.InferenceSession(str(path)).run(["logits"], {"images": images})
    expected, _ = model.apply({"params": params}, images.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
