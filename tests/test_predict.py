"""Tests prediction from files: image formats, lists of images, predictions and the command."""

import dataclasses
import io
import itertools
import json
import logging

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers import GOLDENS, golden_params, run_program, run_python, tiny_config
from mixer import files, trainer
from mixer.data.imagenet import names as imagenet_names
from mixer.errors import UserError
from mixer.tools.predict import prediction
from mixer.weights import load as loading

WEIGHTS = GOLDENS / "mixer_tiny_official.npz"
PREPROCESS = "decode|resize(32)"


def _picture(height=40, width=47, seed=0):
    """Returns a smooth picture without symmetry."""
    coarse_pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse_pixels).resize((width, height), Image.BICUBIC)


@pytest.fixture(scope="module")
def loaded():
    return loading.read(WEIGHTS, log=lambda line: None)


@pytest.fixture(scope="module")
def reference(loaded):
    """A function from images in [-1, 1] to the logits and block outputs of the golden model."""
    apply = jax.jit(loaded.model.apply)
    return lambda images: apply({"params": golden_params()}, images)


@pytest.fixture(scope="module")
def read():
    """A reader that decodes pictures of 40 x 47."""
    return prediction.make_reader("decode", (40, 47))


def _pixels(read, path):
    result = read(str(path))
    assert not isinstance(result, prediction.Unreadable), result
    assert result[1].dtype == np.uint8
    return result[1].astype(int)


def _predict(loaded, images, **options):
    options = {"preprocess": PREPROCESS, "top": 7, "batch_size": 4, **options}
    return list(prediction.predict(loaded, [str(image) for image in images], **options))


# Image formats.


@pytest.mark.parametrize(
    ("mode", "ending", "options", "tolerance"),
    [
        ("RGB", "tif", {}, 0),
        ("RGB", "tif", {"compression": "tiff_lzw"}, 0),
        ("CMYK", "tif", {}, 0),
        ("P", "tif", {}, 0),
        ("P", "bmp", {}, 0),
        ("1", "bmp", {}, 0),
        ("L", "bmp", {}, 0),
        ("RGB", "ppm", {}, 0),
        ("RGBA", "ico", {"sizes": [(47, 40)]}, 0),
        ("RGBA", "tga", {}, 0),
        ("P", "png", {}, 0),
        ("LA", "png", {}, 0),
        ("CMYK", "jpg", {"quality": 95}, 12),
        ("RGB", "webp", {"lossless": True}, 0),
    ],
)
def test_reader_matches_pillow_in_every_format(read, tmp_path, mode, ending, options, tolerance):
    path = tmp_path / f"picture.{ending}"
    _picture().convert(mode).save(path, **options)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.ptp(expected) > 100
    assert np.abs(_pixels(read, path) - expected).max() <= tolerance


@pytest.mark.parametrize("ending", ["jp2", "avif"])
def test_optional_pillow_formats_are_read(read, tmp_path, ending):
    path = tmp_path / f"picture.{ending}"
    try:
        _picture().save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"Pillow cannot write {ending} here")
    np.testing.assert_array_equal(_pixels(read, path), Image.open(path).convert("RGB"))


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_pictures_keep_the_high_byte(read, tmp_path, ending):
    values = np.random.default_rng(0).integers(0, 1 << 16, (40, 47), np.uint16)
    path = tmp_path / f"picture.{ending}"
    Image.fromarray(values).save(path)
    expected = np.repeat((values >> 8)[..., None], 3, -1)
    np.testing.assert_array_equal(_pixels(read, path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("ending", "options"), [("tif", {}), ("jpg", {"quality": 95})])
def test_exif_orientation_is_applied(read, tmp_path, orientation, ending, options):
    picture, path = _picture(), tmp_path / f"picture.{ending}"
    stored = next(  # the transposed picture that the EXIF orientation turns upright
        image
        for method in (None, *Image.Transpose)
        for image in [picture.copy() if method is None else picture.transpose(method)]
        if _apply_exif(image, orientation).tobytes() == picture.tobytes()
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, **options)
    difference = np.abs(_pixels(read, path) - np.asarray(picture).astype(int))
    assert difference.mean() < (1 if ending == "tif" else 4)
    # The fallback through Pillow, too: TensorFlow decodes JPEG, and only Pillow reads TIFF.
    bmp = Image.open(io.BytesIO(prediction.as_bmp(path.read_bytes())))
    assert np.abs(np.asarray(bmp).astype(int) - np.asarray(picture)).mean() < 4


def _apply_exif(image, orientation):
    image.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(image)


@pytest.mark.parametrize("ending", ["gif", "tif"])
def test_first_frame_of_an_animation_is_read(read, tmp_path, ending):
    red_frame, blue_frame = (Image.new("RGB", (47, 40), color) for color in ("red", "blue"))
    path = tmp_path / f"film.{ending}"
    red_frame.save(path, save_all=True, append_images=[blue_frame])
    np.testing.assert_array_equal(_pixels(read, path), np.asarray(red_frame))


def test_value_range_gives_float_pixels(tmp_path):
    _picture().save(tmp_path / "a.png")
    read = prediction.make_reader("decode|value_range(0, 1)", (40, 47))
    pixels = read(str(tmp_path / "a.png"))[1]
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, np.asarray(_picture()) / 255, atol=1e-6)


def test_unreadable_picture_gives_a_reason(read, tmp_path):
    file = io.BytesIO()
    _picture().save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-300])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    _picture().convert("F").save(tmp_path / "float.tif")
    _picture(20, 20).save(tmp_path / "small.png")
    for name, reason in (
        ("cut.jpg", "truncated"),
        ("text.jpg", "not an image"),
        ("empty.png", "not an image"),
        ("float.tif", "8 or 16 bits"),
        ("small.png", "40 x 47"),
        ("none.png", "No such file"),
    ):
        result = read(str(tmp_path / name))
        assert isinstance(result, prediction.Unreadable), name
        assert reason in result.reason and "\n" not in result.reason, result


# Lists of images.


def test_folders_files_and_lists_of_images_are_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.JPG", "b/10.tif", "a.png", ".hidden.png", ".git/c.png", "b/d.heic", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list.txt").write_text("b/2.JPG\r\n\n e.txt\nb\n")
    folder_images = ["b/10.tif", "b/2.JPG", "b/d.heic"]
    assert prediction.list_images(["."]) == [f"./{name}" for name in ["a.png", *folder_images]]
    assert prediction.list_images(["b", "a.png", "e.txt"]) == [*folder_images, "a.png", "e.txt"]
    assert prediction.list_images(["@list.txt", "a.png"]) == [
        "b/2.JPG",
        "e.txt",
        *folder_images,
        "a.png",
    ]
    (tmp_path / "c").mkdir()
    (tmp_path / "bad.txt").write_text("a.png\nmissing.png\n")
    for arguments, message in (
        ([], "no images"),
        (["x.png"], "x.png: "),
        (["c"], "c: "),
        (["@bad.txt"], "@bad.txt line 2: missing.png: "),
        (["@none.txt"], "@none.txt: "),
    ):
        with pytest.raises(UserError) as error_info:
            prediction.list_images(arguments)
        assert message in str(error_info.value)


# Predictions.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of ten 32 x 32 pictures and one unreadable file, and the pixels of the ten."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        ending = ("png", "tif")[number % 2]
        _picture(32, 32, seed=number).save(folder / f"{number}.{ending}")
    (folder / "4x.png").write_text("no picture")
    pixels = np.stack([np.asarray(_picture(32, 32, seed=number)) for number in range(10)])
    return sorted(folder.iterdir()), pixels


@pytest.mark.parametrize("batch_size", [3, pytest.param(64, marks=pytest.mark.slow)])
def test_probabilities_and_features_match_the_model(loaded, reference, pictures, batch_size):
    paths, pixels = pictures
    logits, blocks = reference(pixels / np.float32(127.5) - 1)
    expected = np.asarray(jax.nn.softmax(logits))
    results = _predict(loaded, paths, batch_size=batch_size, layer="block_1")
    faults = [result for result in results if isinstance(result, prediction.Unreadable)]
    results = [result for result in results if isinstance(result, prediction.Prediction)]
    assert [fault.image for fault in faults] == [str(paths[5])] and "4x.png" in str(paths[5])
    assert [result.image for result in results] == [str(p) for p in paths if "4x" not in p.name]
    for result, row, features in zip(results, expected, blocks["block_1"], strict=True):
        assert (np.diff(result.probabilities) <= 0).all()
        np.testing.assert_allclose(result.probabilities, row[result.classes], atol=1e-5)
        assert sorted(result.classes) == list(range(7))
        np.testing.assert_allclose(result.features, features, atol=1e-4)


def test_wrong_image_size_suggests_a_resize(loaded, tmp_path):
    Image.fromarray(np.zeros((40, 32, 3), np.uint8)).save(tmp_path / "x.png")
    (result,) = _predict(loaded, [tmp_path / "x.png"], preprocess="decode")
    assert "'decode'" in result.reason
    assert "40 x 32" in result.reason and " 32 x 32" in result.reason
    assert "--preprocess='decode|resize((32, 32))'" in result.reason


def test_model_is_compiled_once_for_all_batches(loaded, pictures):
    with jax.log_compiles(), _Records() as records:
        _predict(loaded, pictures[0], batch_size=3, top=2)
    compilations = [
        line for line in records.lines if "Finished XLA compilation of jit(compute)" in line
    ]
    assert len(compilations) == 1


class _Records:
    """Collects the lines that JAX logs."""

    def __enter__(self):
        self.lines, self.handler = [], logging.Handler()
        self.handler.emit = lambda record: self.lines.append(record.getMessage())
        logging.getLogger("jax").addHandler(self.handler)
        return self

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self.handler)


def test_float_pixels_reach_the_model_unchanged(loaded, reference, pictures):
    paths, pixels = pictures
    logits, _ = reference(pixels / np.float32(255))
    (result,) = _predict(loaded, paths[:1], preprocess="decode|value_range(0, 1)")
    row = np.asarray(jax.nn.softmax(logits))[0]
    np.testing.assert_allclose(result.probabilities, row[result.classes], atol=1e-5)


def test_invalid_options_are_named_in_the_error(loaded, pictures):
    for options, message in (
        (dict(preprocess=None), r"32 x 32.*resize_small\(36\)\|central_crop\(32\)'"),
        (dict(layer="prelogits"), r"layer='prelogits'.*'pre_logits'"),
        (dict(layer="block_3"), r"--layer='block_3'"),
        (dict(preprocess="decode|resize(64)"), "image_size=32"),
    ):
        with pytest.raises(UserError, match=message):
            _predict(loaded, pictures[0], **options)


@pytest.mark.slow
def test_run_predicts_with_its_preprocessing_and_class_names(tmp_path):
    """A run trained on two colours names them in new pictures of a different size."""
    rng = np.random.default_rng(0)
    colours = {"auburn": (165, 42, 42), "teal": (0, 128, 128)}

    def save(colour, path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(-20, 20, (size, size, 3))
        Image.fromarray(np.clip(colours[colour] + noise, 0, 255).astype(np.uint8)).save(path)

    for colour, number in itertools.product(colours, range(16)):
        save(colour, tmp_path / "data" / "train" / colour / f"{number}.png", 8)
    config = tiny_config(dataset__name="folder", dataset__data_dir=str(tmp_path / "data"))
    config.update(total_steps=30, eval_every_steps=None)
    config.checkpoint.every_steps = 30
    config.model.update(num_blocks=1, stoch_depth=0.0, dropout=0.0)  # compiles quickly
    config.dataset.update(val_split="", test_split="")
    config.dataset.update(train_preprocess="decode", eval_preprocess="decode|resize(8)")
    trainer.train(config, str(tmp_path / "run"))

    loaded = loading.read(str(tmp_path / "run"), log=lambda line: None)
    names = prediction.names_of(loaded.card)
    assert names == ("auburn", "teal")
    labels = ["teal", "auburn", "auburn", "teal"]
    paths = [tmp_path / "new" / f"{number}.tif" for number in range(4)]
    for colour, path in zip(labels, paths, strict=True):
        save(colour, path, 50)
    results = _predict(loaded, paths, preprocess=loaded.card.preprocess)
    tops = [prediction.as_json(result, names)["top"] for result in results]
    assert [top[0]["name"] for top in tops] == labels
    assert all(sum(row["probability"] for row in top) == pytest.approx(1) for top in tops)


# Output.


def _prediction(image, features=None):
    return prediction.Prediction(
        image, np.array([134, 517]), np.array([0.7, 0.1], np.float32), features
    )


def test_json_output_has_class_names_if_known(loaded):
    names = prediction.names_of(dataclasses.replace(loaded.card, class_names="imagenet1k"))
    assert names == imagenet_names.class_names("imagenet1k")
    assert prediction.as_json(_prediction("a"), names) == {
        "image": "a",
        "top": [
            {"class": 134, "name": "crane", "probability": 0.7},
            {"class": 517, "name": "crane", "probability": 0.1},
        ],
    }
    assert prediction.names_of(loaded.card) is None
    assert prediction.as_json(_prediction("a"), None)["top"][0]["name"] is None


@pytest.mark.parametrize("has_names", [True, False])
def test_table_shows_classes_with_and_without_names(has_names):
    from rich.console import Console

    names = imagenet_names.class_names("imagenet1k") if has_names else None
    image = "[red]:smile:\udcff.jpg"
    file = io.StringIO()
    Console(file=file, width=100).print(prediction.as_table([_prediction(image)], names))
    lines = [line.split("│")[1:-1] for line in file.getvalue().splitlines() if "%" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0] == [r"[red]:smile:\udcff.jpg", "70.0%", "134", *["crane"] * has_names]
    assert cells[1] == ["", "10.0%", "517", *["crane"] * has_names]


def test_features_file_is_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "features.npz"
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    prediction.write_features(str(path), features, ["a/ü.jpg", "long name.png"])
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["features"], features)
        assert file["features"].dtype == np.float32
        assert file["images"].tolist() == ["a/ü.jpg", "long name.png"]
    content = path.read_bytes()

    def raise_disk_full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", raise_disk_full)
    with pytest.raises(OSError, match="No space"):
        prediction.write_features(str(path), features, ["a", "b"])
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_features_path_is_checked_first(tmp_path):
    with pytest.raises(UserError, match="--features="):
        files.check_output("--features", tmp_path / "none" / "out.npz")
    with pytest.raises(UserError, match=r"--features=.*folder"):
        files.check_output("--features", tmp_path)


# The command.


def test_command_writes_json_and_features(loaded, pictures, tmp_path):
    paths, _ = pictures
    output = tmp_path / "features.npz"
    command = run_program(
        "mixer.tools.predict",
        paths[0].parent,
        f"--weights={WEIGHTS}",
        f"--preprocess={PREPROCESS}",
        *("--json", "--top=2", "--batch_size=4", f"--features={output}"),
    )
    assert command.returncode == 1 and "Traceback" not in command.stderr, command.stderr
    expected = _predict(loaded, paths, top=2, layer="pre_logits")
    expected = [result for result in expected if isinstance(result, prediction.Prediction)]
    images = [result.image for result in expected]
    lines = [json.loads(line) for line in command.stdout.splitlines()]
    assert [line["image"] for line in lines] == images
    for line, result in zip(lines, expected, strict=True):
        assert [top["class"] for top in line["top"]] == result.classes.tolist()
        np.testing.assert_allclose(
            [top["probability"] for top in line["top"]], result.probabilities, rtol=1e-5
        )
    features = [result.features for result in expected]
    with np.load(output, allow_pickle=False) as file:
        assert file["images"].tolist() == images
        np.testing.assert_allclose(file["features"], features, atol=1e-5)
    assert sum("names" in line for line in command.stderr.splitlines()) == 1
    assert f"{paths[5]}: not an image" in command.stderr
    assert "1 of 11 images" in command.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], "--weights"),
        (["a.png", "--weights=x.npz", "--layer=stem"], "--features"),
        (["--weights=x.npz", "--top=0"], "top=0"),
    ],
)
def test_invalid_flags_are_one_line_of_error(arguments, message):
    command = run_program("mixer.tools.predict", *arguments)
    assert command.returncode == 2 and message in command.stderr
    assert len(command.stderr.splitlines()) == 1


@pytest.mark.slow
def test_command_runs_as_a_module(pictures):
    arguments = (f"--weights={WEIGHTS}", f"--preprocess={PREPROCESS}", "--json")
    command = run_python("-m", "mixer.tools.predict", pictures[0][0], *arguments)
    assert json.loads(command.stdout)["image"] == str(pictures[0][0])
