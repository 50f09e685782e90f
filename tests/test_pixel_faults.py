"""Regression tests for hostile and unusual pictures and preprocessing specifications."""

import ast
import io
import itertools
import struct
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from helpers import ROOT, run_program, run_python, tiny_config
from mixer.data import splits as pipeline
from mixer.data.preprocessing import host as preprocess
from mixer.data.preprocessing import images, ops
from mixer.data.preprocessing import spec as spec_module
from mixer.data.preprocessing.decoding import decode
from mixer.errors import UserError, first_line
from mixer.runs import data as run_data
from mixer.tools.predict import prediction

KEY = tf.constant([1, 2], tf.int64)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def _picture(mode="RGB", height=30, width=40):
    """Returns a smooth picture without symmetry; with RGBA, alpha takes many values."""
    coarse_pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    picture = Image.fromarray(coarse_pixels).resize((width, height), Image.BICUBIC)
    if mode == "RGBA":
        picture.putalpha(picture.getchannel(0))
    return picture


def _file(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _bmp(header, pixels):
    file_header = struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header))
    return b"BM" + file_header + header + pixels


def _windows_bmp(bits, compression, pixels, masks=b""):
    """Returns an 8 x 8 BMP with a header of 40 bytes, or of 108 with colour masks."""
    size = 40 + len(masks)
    fields = (size, 8, 8, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    return _bmp(struct.pack("<IiiHHIIiiII", *fields) + masks, pixels)


def _reference(data):
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return np.asarray(picture.convert("RGB"))


def _animated(mode, kind, **options):
    second_frame = Image.new(mode, (40, 30))
    return _file(_picture(mode), kind, save_all=True, append_images=[second_frame], **options)


ABGR = np.full((8, 8, 4), (255, 30, 40, 200), np.uint8).tobytes()
STICKER = Image.new("RGBA", (40, 30), (255, 255, 255, 0))
STICKER.paste((200, 30, 30, 255), (5, 5, 25, 25))
PICTURES = {
    "WebP, lossless alpha": _file(_picture("RGBA"), "WEBP", lossless=True, exact=True),
    "WebP, lossy alpha": _file(_picture("RGBA"), "WEBP"),
    "WebP, animated": _animated("RGB", "WEBP"),
    "WebP, animated alpha": _animated("RGBA", "WEBP"),
    "WebP, orientation": _file(_picture(), "WEBP", lossless=True, exif=_exif(6)),
    "WebP, profile": _file(_picture(), "WEBP", lossless=True, icc_profile=bytes(50)),
    "PNG, alpha": _file(_picture("RGBA"), "PNG"),
    "PNG, transparent palette": _file(_picture().quantize(16), "PNG", transparency=3),
    "PNG, transparent colour": _file(_picture(), "PNG", transparency=(1, 2, 3)),
    "PNG, animated": _animated("RGB", "PNG"),
    "PNG, orientation": _file(_picture(), "PNG", exif=_exif(8)),
    "GIF, transparent": _file(STICKER, "GIF"),
    "GIF, animated": _animated("RGB", "GIF"),
    "GIF, grey": _file(_picture().convert("L"), "GIF"),
    "BMP, 24 bits": _file(_picture(), "BMP"),
    "BMP, 32 bits": _windows_bmp(32, 0, ABGR),
    "BMP, masks": _windows_bmp(
        32, 3, ABGR, struct.pack("<4I", 255 << 24, 255 << 16, 255 << 8, 255) + b"BGRs" + bytes(48)
    ),
    "BMP of OS/2": _bmp(struct.pack("<IHHHH", 12, 8, 8, 1, 24), bytes(range(192))),
}


@pytest.fixture(scope="module")
def read():
    """The reader of `mixer.tools.predict`, for pictures of any size."""
    return prediction.make_reader("decode", (None, None))


@pytest.mark.parametrize("name", PICTURES)
def test_training_and_predict_decode_like_pillow(read, tmp_path, name):
    """Both drop alpha, apply palettes and EXIF orientation, and take the first frame."""
    data = PICTURES[name]
    actual = decode(tf.constant(data)).numpy()
    np.testing.assert_array_equal(actual, _reference(data))
    (tmp_path / "picture.jpg").write_bytes(data)
    np.testing.assert_array_equal(read(str(tmp_path / "picture.jpg"))[1], actual)


def test_decoder_is_thread_safe():
    files = tf.data.Dataset.from_tensor_slices([*PICTURES.values()] * 4)
    shapes = files.map(lambda data: tf.shape(decode(data)), num_parallel_calls=4)
    expected = [_reference(data).shape for data in PICTURES.values()] * 4
    assert [tuple(shape) for shape in shapes.as_numpy_iterator()] == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_bmp(struct.pack("<IHHHH", 12, 8, 8, 1, 8), bytes(1000)), "BMP of less than 24 bits"),
        (_windows_bmp(16, 3, bytes(1000), bytes(68)), "BMP of less than 24 bits"),
        (PICTURES["WebP, animated"][:200], "decoder"),
        (PICTURES["GIF, transparent"][:60], "truncated"),
        (PICTURES["BMP, masks"][:150], "truncated"),
        (b"GIF89a", "no image"),
        (b"RIFF\0\0\0\0WEBPVP8X\n\0\0\0\x82" + bytes(50), "decoder"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 60_000, 60_000), "3600000000 pix"),
        (EPS, "Unknown image file format"),
    ],
    ids=["os2-8", "bmp-16", "cut-webp", "cut-gif", "cut-bmp", "gif", "flags", "huge-png", "eps"],
)
def test_undecodable_image_is_one_line_with_the_reason(data, reason):
    with pytest.raises(tf.errors.InvalidArgumentError) as error_info:
        decode(tf.constant(data))
    line = first_line(error_info.value)
    assert reason in line and "\n" not in line and "0x" not in line


def test_decoding_an_image_starts_no_subprocess(read, tmp_path, monkeypatch):
    def fail_on_start(*args, **kwargs):
        raise AssertionError(f"started {args}")

    for name in ("Popen", "call", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, fail_on_start)
    preview = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS
    for number, data in enumerate((EPS, preview)):
        path = tmp_path / f"holiday{number}.jpg"
        path.write_bytes(data)
        assert read(str(path)) == prediction.Unreadable(
            str(path), "not an image, or a format that Pillow does not read"
        )
    assert not {"EPS", "IPTC", "SPIDER", "WMF", "FITS", "HDF5"}.intersection(images.READ)


def test_every_call_of_image_open_restricts_the_formats():
    calls = 0
    for path in (ROOT / "mixer").rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "Image.open" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                calls += 1
                assert "formats" in [keyword.arg for keyword in node.keywords], path
    assert calls == 1


# Discrete cosine transform of JPEG.


def test_accurate_dct_matches_pillow():
    data = _file(_picture(height=90, width=120), "JPEG", quality=80)
    expected = _reference(data).astype(int)
    actual = {
        dct: preprocess.make_preprocess(f"decode(dct={dct!r})", (None, None))(
            {"image": tf.constant(data)}, KEY
        )["image"].numpy()
        for dct in ("fast", "accurate")
    }
    assert (np.abs(actual["accurate"] - expected) > 0).mean() < 0.01
    assert (np.abs(actual["fast"] - expected) > 0).mean() > 0.1
    np.testing.assert_array_equal(actual["fast"], decode(tf.constant(data)))


def test_inception_crop_uses_the_accurate_dct():
    data = tf.constant(_file(_picture(height=90, width=120), "JPEG", quality=80))
    crops = [
        preprocess.inception_window(data, KEY, dct=dct).numpy() for dct in ("fast", "accurate")
    ]
    expected = preprocess.inception_window(decode(data, dct="accurate"), KEY).numpy()
    assert (crops[0] != crops[1]).any()
    # Chroma is interpolated differently at the border of a window.
    interior = (slice(8, -8), slice(8, -8))
    np.testing.assert_array_equal(crops[1][interior], expected[interior])


# Arguments.


@pytest.mark.parametrize(
    ("spec", "fragments"),
    [
        ("inception_crop(224, 8, 100)|flip_lr", "inception_crop: min_area=8 | 1"),
        ("decode|central_crop((224, 9000))", "central_crop: size=(224, 9000) | 1 and 8192"),
        ("decode|random_crop((224, 0))", "random_crop: size=(224, 0) | 1 and 8192"),
        ("decode|permute_patches(16, 0)", "permute_patches: patch_size=0 | 1 and 8192"),
        ("decode|resize(1000000)|central_crop(8)", "resize: size=1000000 | 1 and 8192"),
        ("decode|resize_small(-1)", "resize_small: size=-1 | 1 and 8192"),
        ("decode|resize(size=8, size=9)", "resize: | twice"),
        ("decode|resize(8, method='cubic')", "resize: method='cubic' | 'bicubic'"),
        ("decode|resize(8)|random_affine(nan)", "random_affine: degrees=nan | 0 and 360"),
        ("decode|resize(8)|random_affine(-1e999)", "random_affine: degrees=-inf | 0 and 360"),
        ("decode|random_crop(8, pad=99999)", "random_crop: pad=99999 | 0 and 1024"),
        ("decode|randaugment(999)", "randaugment: num_layers=999 | 0 and 16"),
        ("decode|random_erasing(prob='a')", "random_erasing: prob='a' | 0 and 1"),
        ("decode|random_erasing(min_area=0.5)", "random_erasing: min_area=0.5 | max_area=0.33"),
        ("decode|value_range(2)", "value_range: low=2 | high=1.0"),
        ("decode|one_hot(0)", "one_hot: num_classes=0 | 1 and 1048576"),
        ("decode|one_hot(8, on=x.y)", "one_hot: on=x.y | 0 and 1"),
        ("decode('accurat')", "decode: dct='accurat' | 'fast' | 'accurate'"),
        ("decode|resize_small(8)|central_crop(9)", "central_crop: size=9 | 8"),
        ("decode|resize(8)|random_crop(20, pad=4)", "random_crop: size=20 | 16"),
        ("decode|resize(8)|decode", "decode | first op"),
        ("decode|resize(8)|permute_pixels(9)", "permute_pixels: size=9 | 8 x 8"),
        ("decode|resize(" + "(" * 300, "not an op"),
        ("decode|resize(" + "-" * 20_000 + "1)", "not an op"),
        ("decode|resize(9)|flip_lr", "image_size=8 | 9 x 9"),
    ],
)
def test_invalid_argument_is_one_line_of_error(spec, fragments):
    with pytest.raises(UserError) as error_info:
        preprocess.make_preprocess(spec, (8, 8))
    line = str(error_info.value)
    assert "\n" not in line
    for fragment in fragments.split(" | "):
        assert fragment in line.removeprefix(f"preprocessing {spec!r}"), line


LITERALS = (None, True, "x", b"x", -1, -1.0, 10**30, "1e999", "nan", "-1e999", (), (0, 0), [1], {})
LITERALS += ((8, 8, 8), 1j, "lambda: 0")


def test_invalid_literals_are_rejected_by_every_op():
    """Any literal but a valid one is a `UserError` that names the op."""
    for name, op in ops.OPS.items():
        required_arguments = {
            key: 8 for key, (_, default) in op.arguments.items() if default is ops.REQUIRED
        }
        for key, value in itertools.product(op.arguments, LITERALS):
            arguments = {**required_arguments, key: value}
            argument_text = ", ".join(
                f"{k}={v if v in ('1e999', 'nan', '-1e999', 'lambda: 0') else repr(v)}"
                for k, v in arguments.items()
            )
            call = f"{name}({argument_text})"
            spec = call if op.kind is ops.Kind.DECODING else f"decode|{call}"
            is_valid_range = name == "value_range" and value in (-1, -1.0)
            if is_valid_range or (key in ("antialias", "published") and value is True):
                spec_module.parse(spec)
                continue
            with pytest.raises(UserError) as error_info:
                spec_module.parse(spec)
            assert f"{name}: " in str(error_info.value), spec


def test_preprocessing_is_checked_before_data_is_read(monkeypatch):
    monkeypatch.setattr(
        pipeline, "open_split", lambda *args, **kwargs: pytest.fail("data was opened")
    )
    for key in ("train_preprocess", "eval_preprocess"):
        config = tiny_config(dataset__name="folder", dataset__data_dir="/none")
        config.dataset.update(train_preprocess="decode|resize(8)", eval_preprocess="decode")
        config.dataset[key] = "decode|resize_small(0)|central_crop(8)"
        with pytest.raises(UserError, match=r"resize_small: size=0"):
            run_data.open_splits(config, None)


def test_command_line_error_names_the_argument(tmp_path):
    command = run_program(
        *("train.py", "--config=configs/folder.py:res=32,patch=8", f"--workdir={tmp_path / 'run'}"),
        f"--config.dataset.data_dir={tmp_path}",
        "--config.dataset.train_preprocess=inception_crop(32, 8, 100)|flip_lr",
    )
    assert command.returncode == 2 and "Traceback" not in command.stderr
    assert "inception_crop: min_area=8" in command.stderr.splitlines()[-1]


# Pictures with extreme aspect ratios.


@pytest.mark.parametrize("height", [1, 7])
def test_resize_of_an_extreme_aspect_ratio_is_bounded(height):
    row = (np.arange(20_000) // 3 % 251).astype(np.uint8)
    picture = np.broadcast_to(row[None, :, None], (height, 20_000, 3))
    resized = preprocess.resize_small(tf.constant(picture), 32)
    assert resized.shape[0] == 32 and np.prod(resized.shape[:2]) <= preprocess.MOST_RESIZED
    crop = preprocess.central_crop(resized, 24).numpy()
    # The central crop still shows the middle of the picture, around column 10,000.
    left_edge = 10_000 - 12 * height / 32
    columns = np.floor(left_edge + (np.arange(24) + 0.5) * height / 32).astype(int)
    assert np.abs(crop[0, :, 0] - row[columns].astype(int)).max() <= 1
    transposed = preprocess.resize_small(tf.constant(picture.transpose(1, 0, 2)), 32)
    np.testing.assert_array_equal(transposed, resized.numpy().transpose(1, 0, 2))


def test_resize_keeps_ordinary_aspect_ratios():
    for height, width, size, expected in (
        (60, 900, 256, (256, 3840)),
        (700, 100, 512, (3584, 512)),
        (3, 2000, 8, (8, 5333)),
    ):
        shape = preprocess.resize_small(tf.zeros([height, width, 3], tf.uint8), size).shape
        assert tuple(shape[:2]) == expected


# Device code without TensorFlow.


def test_spec_and_device_modules_need_no_tensorflow():
    code = """
import sys
sys.modules["tensorflow"] = None
from mixer.data.preprocessing import device, spec
parsed = spec.parse("decode|flip_lr|randaugment(1)|autoaugment_cifar")
device.make_augment(parsed, (8, 8))
assert not any(name.startswith("tensorflow.") for name in sys.modules)
try:
    parsed.calls[1].op.host_function
except ImportError:  # proves that TensorFlow is hidden
    print("hidden")
"""
    assert run_python("-c", code).stdout == "hidden\n"
