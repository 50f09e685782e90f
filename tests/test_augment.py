"""Preprocessing on the device matches TensorFlow on the host, bit for bit."""

import functools
import inspect

import jax
import numpy as np
import pytest
import tensorflow as tf

from mixer.data import philox
from mixer.data.preprocessing import device as augment
from mixer.data.preprocessing import device_policies
from mixer.data.preprocessing import host as preprocess
from mixer.data.preprocessing.ops import OPS, REQUIRED, Kind
from mixer.data.preprocessing.spec import parse
from mixer.errors import UserError

# Rounding depends on the compiler's fusions, so each variant is also compiled with optimizations.
OPTIMIZED = [pytest.mark.slow, pytest.mark.optimized]

EXTREME_SEEDS = [[0, 0], [-1, -1], [1, 2], [2**63 - 1, -(2**63)], [2**32 - 1, 2**31]]


def _seeds(count):
    random = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (count - len(EXTREME_SEEDS), 2))
    return np.concatenate([EXTREME_SEEDS, random])


def _keys(seeds):
    return philox.make_key(seeds[:, 0], seeds[:, 1])


def _words(seeds):
    """Returns TensorFlow seeds as keys."""
    return np.asarray(seeds, np.int64).view(np.uint32)


@pytest.mark.parametrize("mode", ["quick", pytest.param("optimized", marks=OPTIMIZED)])
def test_random_numbers_match_tensorflow(mode):
    fold_in, uniform = tf.random.experimental.stateless_fold_in, tf.random.stateless_uniform
    seeds = _seeds(60)

    def draw(keys):
        folded_key = philox.fold_in(keys, -3, bits=32)
        return (
            philox.uniform(keys),
            philox.uniform(keys, (41,), -0.3, 2.7),
            philox.integers(keys, (2, 5), -7, 1000),
            folded_key,
            philox.fold_in(keys, 1 << 40),
            philox.split(folded_key, 3),
        )

    actual = jax.jit(draw)(_keys(seeds))
    for index, seed in enumerate(seeds):
        folded_key = fold_in(tf.constant(seed), -3)
        expected = (
            uniform([], seed),
            uniform([41], seed, -0.3, 2.7),
            uniform([2, 5], seed, -7, 1000, tf.int32),
            _words(folded_key),
            _words(fold_in(tf.constant(seed), tf.constant(1 << 40, tf.int64))),
            _words(tf.random.experimental.stateless_split(folded_key, 3)),
        )
        for values, expected_values in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(values[index], expected_values)


def test_keys_made_on_the_device_match_the_host():
    numbers = np.array([0, 5, 2**31 - 1, -1, -(2**31)], np.int32)
    device_keys = philox.make_key(7, jax.numpy.asarray(numbers))
    np.testing.assert_array_equal(device_keys, philox.make_key(7, numbers))
    np.testing.assert_array_equal(device_keys[3], [7, 0, 2**32 - 1, 2**32 - 1])
    unsigned_key = philox.make_key(jax.numpy.uint32(2**32 - 1), 0)
    np.testing.assert_array_equal(unsigned_key, philox.make_key(2**32 - 1, 0))


def _photos(count, height, width):
    """Returns smooth, noisy images; some with few distinct values and one that is constant."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:height, :width] / 6
    waves = rng.uniform(0, 3, (count, 5, 1, 1, 3))
    brightness, x_frequency, y_frequency, phase, noise = np.moveaxis(waves, 1, 0)
    signal = np.sin(x_frequency * x[..., None] + y_frequency * y[..., None] + phase)
    images = 60 * brightness + 70 * signal + 8 * noise * rng.normal(size=(count, height, width, 3))
    images = np.clip(images, 0, 255).astype(np.uint8)
    images[::7] &= 0xE0
    images[3] = 90
    return images


def _host(spec, images, seeds, image_size):
    preprocess_example = preprocess.make_preprocess(spec, image_size)
    png_images = [tf.io.encode_png(image).numpy() for image in images]
    examples = {"image": tf.constant(png_images), "label": tf.zeros(len(images), tf.int32)}
    data = tf.data.Dataset.from_tensor_slices((examples, tf.constant(seeds)))
    return next(iter(data.map(preprocess_example).batch(len(images)))).pop("image").numpy()


OPS_IN_A_ROW = (
    "decode|resize(20)|random_crop(18, pad=2)|one_hot(3)|flip_lr|random_erasing(0.5)|"
    "random_affine(10, 2, 0.15, 0.1)|central_crop(16)|permute_patches(16, 4)|"
    "permute_pixels(16)|value_range(-1.5, 2.25)"
)
AUTOAUGMENT = "inception_crop((30, 35))|flip_lr|autoaugment_cifar"
RANDAUGMENT = "decode|randaugment(3, 15)"
PUBLISHED = "decode|randaugment(3, 15, mode='published')"
FIXED = "decode|flip_lr|randaugment(2, 10, mode='fixed')|random_erasing(0.9, fill=7)"


@pytest.mark.parametrize(
    ("spec", "image_size", "count"),
    [
        pytest.param(OPS_IN_A_ROW, (16, 16), 48, marks=OPTIMIZED, id="ops optimized"),
        pytest.param(AUTOAUGMENT, (30, 35), 160, marks=OPTIMIZED, id="autoaugment"),
        pytest.param(RANDAUGMENT.replace("3", "2"), (30, 35), 40, id="randaugment"),
        pytest.param(RANDAUGMENT, (30, 35), 64, marks=OPTIMIZED, id="randaugment optimized"),
        pytest.param(PUBLISHED, (30, 35), 160, marks=OPTIMIZED, id="published optimized"),
        pytest.param(FIXED, (30, 35), 96, marks=OPTIMIZED, id="fixed"),
    ],
)
def test_pixels_match_the_host(spec, image_size, count):
    images, seeds = _photos(count, 30, 35), _seeds(count)
    expected = _host(spec, images, seeds, image_size)
    size = {"resize(20)": (20, 20)}.get(spec.split("|")[1], (30, 35))
    spec = parse(spec)
    _check_device(spec, _host(spec.parts.host, images, seeds, size), seeds, expected)


def _check_device(spec, host, seeds, expected):
    """Checks that the device part turns the images of the host part into the expected ones."""
    actual = jax.jit(augment.make_augment(spec, host.shape[1:3]))(host, _keys(seeds))
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
    assert host.shape != expected.shape or (host != expected).any((1, 2, 3)).mean() > 0.4


# Values for arguments without a default, and calls for ops that do little by default.
VALUES = {"size": 12, "patch_size": 4}
CALLS = {"random_affine": "random_affine(10, 2, 0.15, 0.1)", "random_erasing": "random_erasing(1)"}
ON_DEVICE = [name for name, op in OPS.items() if op.device]
CHEAP = [name for name in ON_DEVICE if OPS[name].kind is not Kind.POLICY and name not in CALLS]


def _op_call(name):
    required = [key for key, (_, default) in OPS[name].arguments.items() if default is REQUIRED]
    return CALLS.get(name) or f"{name}({', '.join(str(VALUES[key]) for key in required)})"


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(CHEAP, id="in a row"),
        *(pytest.param([name], marks=pytest.mark.slow, id=name) for name in ON_DEVICE),
    ],
)
def test_every_device_op_matches_the_host(names):
    """Covers every op in the registry, so a new op is tested without a change here."""
    spec = parse("|".join(["decode|flip_lr", *map(_op_call, names)]))
    side = 12 if OPS[names[0]].kind is Kind.PERMUTATION else 14
    images, seeds = _photos(16, side, side), _seeds(16)
    expected = _host(spec, images, seeds, spec.image_size or (side, side))
    _check_device(spec, images, seeds, expected)


@pytest.mark.optimized
def test_luminance_of_many_colours_matches_the_host():
    """The sum may round differently; a search over all 2^24 colours has found no difference."""
    from mixer.data.preprocessing import randaugment

    rows = np.mgrid[0:256:5, :256, 0:256:3].reshape(3, -1).T[None].astype(np.uint8)
    pixels = rows[:, :, None].astype(np.float32)
    for published in (False, True):
        luminance = functools.partial(device_policies.luminance, published=published)
        actual = jax.jit(luminance)(pixels)[0, :, 0]
        expected = randaugment.color(tf.constant(rows), 0.0, published)[0]
        np.testing.assert_array_equal(np.broadcast_to(actual, expected.shape), expected)


def test_specification_is_split_into_host_and_device_parts():
    for spec, host, device, random_on_host in (
        ("decode", "decode", "", None),
        ("decode|resize(8)|one_hot(3)", "decode|resize(8)|one_hot(3)", "", None),
        ("decode|flip_lr|one_hot(3)", "decode|one_hot(3)", "flip_lr", None),
        (
            "decode|central_crop(8)|random_crop(8, pad=1)|central_crop(6)|value_range(0, 1)",
            "decode|central_crop(8)",
            "random_crop(8, pad=1)|central_crop(6)|value_range(0, 1)",
            None,
        ),
        ("decode|value_range", "decode", "value_range", None),
        ("decode|flip_lr|resize(8)", "decode|flip_lr|resize(8)", "", "flip_lr"),
        (
            "inception_crop(8)|flip_lr|randaugment(2, 15)",
            "inception_crop(8)",
            "flip_lr|randaugment(2, 15)",
            "inception_crop",
        ),
    ):
        parts = parse(spec).parts
        assert (str(parts.host), str(parts.device), parts.random_on_host) == (
            host,
            device,
            random_on_host,
        )


def test_op_functions_have_the_declared_signature():
    """A random op takes a key, a label op the example, and every op its declared arguments."""
    for op in OPS.values():
        arguments = {key: value.default for key, value in op.signature.parameters.items()}
        subject = "example" if op.kind is Kind.LABEL else "image"
        forms = [(op.host_function, subject, "key")]
        if op.device:
            forms.append((op.device_function, "images", "keys"))
        for function, first_name, key in forms:
            parameters = inspect.signature(function).parameters
            required_arguments = dict.fromkeys(
                [first_name, *[key] * op.random], inspect.Parameter.empty
            )
            declared_arguments = {name: parameter.default for name, parameter in parameters.items()}
            assert declared_arguments == required_arguments | arguments, (op.name, function)
            assert list(declared_arguments) == [*required_arguments, *arguments]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("decode|flip_rl", "'flip_rl'.*'flip_lr'"),
        ("decode|flip_lr)", r"flip_lr\)"),
        ("decode|random_crop(pad=1)", "random_crop.*'size'"),
        ("decode|random_crop(9)", r"9.*\[8, 8\]"),
        ("decode|flip_lr|permute_pixels(7)", r"\[7, 7\]"),
        ("decode|flip_lr|permute_patches(8, 3)", "3.*8 x 8"),
        ("decode|randaugment(2, 31)", "magnitude=31"),
        ("decode|randaugment(mode='exact')", "mode='exact'"),
        ("decode|random_erasing(fill=256)", "fill=256"),
    ],
)
def test_invalid_specifications_are_one_line_errors(spec, reason):
    with pytest.raises(UserError, match=reason) as error:
        augment.make_augment(parse(spec), (8, 8))
    assert "\n" not in str(error.value) and spec in str(error.value)
