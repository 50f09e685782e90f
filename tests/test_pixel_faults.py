"""Faults that hostile or odd pictures and preprocessing specifications met."""

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
from mixer.data.preprocessing import spec as steps
from mixer.data.preprocessing.decoding import decode
from mixer.errors import UserError, first_line
from mixer.runs import data as run_data
from mixer.tools.predict import prediction

KEY = tf.constant([1, 2], tf.int64)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def _picture(mode="RGB", height=30, width=40):
    """A smooth picture without symmetry; its alpha channel has all values."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
    if mode == "RGBA":
        picture.putalpha(picture.getchannel(0))
    return picture


def _file(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def _bmp(header, pixels):
    start = struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header))
    return b"BM" + start + header + pixels


def _windows_bmp(bits, compression, pixels, masks=b""):
    """8 x 8 pixels behind a header of 40 bytes, or of 108 where there are masks."""
    size = 40 + len(masks)
    fields = (size, 8, 8, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    return _bmp(struct.pack("<IiiHHIIiiII", *fields) + masks, pixels)


def _reference(data):
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return np.asarray(picture.convert("RGB"))


def _animated(mode, kind, **options):
    other = Image.new(mode, (40, 30))
    return _file(_picture(mode), kind, save_all=True, append_images=[other], **options)


ABGR = np.full((8, 8, 4), (255, 30, 40, 200), np.uint8).tobytes()
STICKER = Image.new("RGBA", (40, 30), (255, 255, 255, 0))
STICKER.paste((200, 30, 30, 255), (5, 5, 25, 25))
PICTURES = {
    "WebP, lossless alpha": _file(_picture("RGBA"), "WEBP", lossless=True, exact=True),
    "WebP, lossy alpha": _file(_picture("RGBA"), "WEBP"),
    "WebP, animated": _animated("RGB", "WEBP"),
    "WebP, animated alpha": _animated("RGBA", "WEBP"),
    "WebP, orientation": _file(_picture(), "WEBP", lossless=True, exif=_orientation(6)),
    "WebP, profile": _file(_picture(), "WEBP", lossless=True, icc_profile=bytes(50)),
    "PNG, alpha": _file(_picture("RGBA"), "PNG"),
    "PNG, transparent palette": _file(_picture().quantize(16), "PNG", transparency=3),
    "PNG, transparent colour": _file(_picture(), "PNG", transparency=(1, 2, 3)),
    "PNG, animated": _animated("RGB", "PNG"),
    "PNG, orientation": _file(_picture(), "PNG", exif=_orientation(8)),
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
    """Pixels as `predict` decodes them, of any size."""
    return prediction.make_reader("decode", (None, None))


@pytest.mark.parametrize("name", PICTURES)
def test_one_decoder_for_training_and_predict(read, tmp_path, name):
    """The pixels are Pillow's: no alpha, palettes' colours, the first frame, upright."""
    data = PICTURES[name]
    found = decode(tf.constant(data)).numpy()
    np.testing.assert_array_equal(found, _reference(data))
    (tmp_path / "picture.jpg").write_bytes(data)
    np.testing.assert_array_equal(read(str(tmp_path / "picture.jpg"))[1], found)


def test_a_set_of_odd_pictures_is_read_in_several_threads():
    rows = tf.data.Dataset.from_tensor_slices([*PICTURES.values()] * 4)
    shapes = rows.map(lambda data: tf.shape(decode(data)), num_parallel_calls=4)
    wanted = [_reference(data).shape for data in PICTURES.values()] * 4
    assert [tuple(shape) for shape in shapes.as_numpy_iterator()] == wanted


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
def test_what_is_refused_says_why(data, reason):
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        decode(tf.constant(data))
    line = first_line(caught.value)
    assert reason in line and "\n" not in line and "0x" not in line


def test_an_image_starts_no_program(read, tmp_path, monkeypatch):
    def start(*args, **kwargs):
        raise AssertionError(f"started {args}")

    for name in ("Popen", "call", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, start)
    preview = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS
    for number, data in enumerate((EPS, preview)):
        path = tmp_path / f"holiday{number}.jpg"
        path.write_bytes(data)
        assert read(str(path)) == prediction.Unreadable(
            str(path), "not an image, or a format that Pillow does not read"
        )
    assert not {"EPS", "IPTC", "SPIDER", "WMF", "FITS", "HDF5"}.intersection(images.READ)


def test_pillow_opens_a_fixed_list_of_formats_everywhere():
    calls = 0
    for path in (ROOT / "mixer").rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "Image.open" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                calls += 1
                assert "formats" in [word.arg for word in node.keywords], path
    assert calls == 1


# The discrete cosine transform of JPEG.


def test_the_accurate_dct_is_pillows():
    data = _file(_picture(height=90, width=120), "JPEG", quality=80)
    wanted = _reference(data).astype(int)
    found = {
        dct: preprocess.make_preprocess(f"decode(dct={dct!r})", (None, None))(
            {"image": tf.constant(data)}, KEY
        )["image"].numpy()
        for dct in ("fast", "accurate")
    }
    assert (np.abs(found["accurate"] - wanted) > 0).mean() < 0.01
    assert (np.abs(found["fast"] - wanted) > 0).mean() > 0.1
    np.testing.assert_array_equal(found["fast"], decode(tf.constant(data)))


def test_a_crop_takes_the_accurate_dct_too():
    data = tf.constant(_file(_picture(height=90, width=120), "JPEG", quality=80))
    crops = [
        preprocess.inception_window(data, KEY, dct=dct).numpy() for dct in ("fast", "accurate")
    ]
    whole = preprocess.inception_window(decode(data, dct="accurate"), KEY).numpy()
    assert (crops[0] != crops[1]).any()
    inner = (slice(8, -8), slice(8, -8))  # colours at a window's border are interpolated otherwise
    np.testing.assert_array_equal(crops[1][inner], whole[inner])


# Arguments.


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("inception_crop(224, 8, 100)|flip_lr", "inception_crop: min_area=8 | 1"),
        ("decode|central_crop((224, 224))", "central_crop: size=(224, 224) | 1 and 8192"),
        ("decode|random_crop((224, 224))", "random_crop: size=(224, 224) | 1 and 8192"),
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
def test_arguments_out_of_range_are_one_line(spec, parts):
    with pytest.raises(UserError) as caught:
        preprocess.make_preprocess(spec, (8, 8))
    line = str(caught.value)
    assert "\n" not in line
    for part in parts.split(" | "):
        assert part in line.removeprefix(f"preprocessing {spec!r}"), line


LITERALS = (None, True, "x", b"x", -1, -1.0, 10**30, "1e999", "nan", "-1e999", (), (0, 0), [1], {})
LITERALS += ((8, 8, 8), 1j, "lambda: 0")


def test_no_literal_gets_past_the_ranges_of_any_op():
    """What the parser lets through can be computed; nothing else is raised."""
    for name, op in ops.OPS.items():
        required = {key: 8 for key, (_, default) in op.arguments.items() if default is ops.REQUIRED}
        for key, value in itertools.product(op.arguments, LITERALS):
            given = {**required, key: value}
            written = ", ".join(
                f"{k}={v if v in ('1e999', 'nan', '-1e999', 'lambda: 0') else repr(v)}"
                for k, v in given.items()
            )
            decoding = op.kind is ops.Kind.DECODING
            spec = f"{name}({written})" if decoding else f"decode|{name}({written})"
            negative = name == "value_range" and value in (-1, -1.0)
            if negative or (key in ("antialias", "published") and value is True):
                steps.parse(spec)
                continue
            with pytest.raises(UserError) as caught:
                steps.parse(spec)
            assert f"{name}: " in str(caught.value), spec


def test_a_mistake_in_either_list_of_steps_is_found_before_data_is_read(monkeypatch):
    monkeypatch.setattr(pipeline, "open_split", lambda *args, **kwargs: pytest.fail("opened"))
    for key in ("train_preprocess", "eval_preprocess"):
        config = tiny_config(dataset__name="folder", dataset__data_dir="/none")
        config.dataset.update(train_preprocess="decode|resize(8)", eval_preprocess="decode")
        config.dataset[key] = "decode|resize_small(0)|central_crop(8)"
        with pytest.raises(UserError, match=r"resize_small: size=0"):
            run_data.open_splits(config, None)


def test_the_command_names_the_argument(tmp_path):
    done = run_program(
        *("train.py", "--config=configs/folder.py:res=32,patch=8", f"--workdir={tmp_path / 'run'}"),
        f"--config.dataset.data_dir={tmp_path}",
        "--config.dataset.train_preprocess=inception_crop(32, 8, 100)|flip_lr",
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "inception_crop: min_area=8" in done.stderr.splitlines()[-1]


# Very long pictures.


@pytest.mark.parametrize("height", [1, 7])
def test_a_very_long_picture_takes_little_memory(height):
    row = (np.arange(20_000) // 3 % 251).astype(np.uint8)
    picture = np.broadcast_to(row[None, :, None], (height, 20_000, 3))
    found = preprocess.resize_small(tf.constant(picture), 32)
    assert found.shape[0] == 32 and np.prod(found.shape[:2]) <= preprocess.MOST_RESIZED
    crop = preprocess.central_crop(found, 24).numpy()
    # The middle is where it was: area averaging gives the pixels around 10,000.
    first = 10_000 - 12 * height / 32
    columns = np.floor(first + (np.arange(24) + 0.5) * height / 32).astype(int)
    assert np.abs(crop[0, :, 0] - row[columns].astype(int)).max() <= 1
    turned = preprocess.resize_small(tf.constant(picture.transpose(1, 0, 2)), 32)
    np.testing.assert_array_equal(turned, found.numpy().transpose(1, 0, 2))


def test_pictures_of_usual_aspects_stay_whole():
    for height, width, size, wanted in (
        (60, 900, 256, (256, 3840)),
        (700, 100, 512, (3584, 512)),
        (3, 2000, 8, (8, 5333)),
    ):
        shape = preprocess.resize_small(tf.zeros([height, width, 3], tf.uint8), size).shape
        assert tuple(shape[:2]) == wanted


# The device's form.


def test_specifications_and_the_device_need_no_tensorflow():
    code = """
import sys
sys.modules["tensorflow"] = None
from mixer.data.preprocessing import device, spec
parsed = spec.parse("decode|flip_lr|randaugment(1)|autoaugment_cifar")
device.make_augment(parsed, (8, 8))
assert not any(name.startswith("tensorflow.") for name in sys.modules)
try:
    parsed.calls[1].op.host_function
except ImportError:  # it is hidden indeed
    print("hidden")
"""
    assert run_python("-c", code).stdout == "hidden\n"
