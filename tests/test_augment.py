"""The device's random numbers and pixels are those of the host, bit for bit."""

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

# The compiler's fusions decide what rounds where: each variant is also compiled as in a run.
AS_IN_A_RUN = [pytest.mark.slow, pytest.mark.optimized]

ENDS = [[0, 0], [-1, -1], [1, 2], [2**63 - 1, -(2**63)], [2**32 - 1, 2**31]]


def _seeds(count):
    random = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (count - len(ENDS), 2))
    return np.concatenate([ENDS, random])


def _keys(seeds):
    return philox.make_key(seeds[:, 0], seeds[:, 1])


def _words(seeds):
    """TensorFlow's seeds as keys."""
    return np.asarray(seeds, np.int64).view(np.uint32)


@pytest.mark.parametrize("compiled", ["quickly", pytest.param("as in a run", marks=AS_IN_A_RUN)])
def test_random_numbers_are_tensorflows(compiled):
    fold_in, uniform = tf.random.experimental.stateless_fold_in, tf.random.stateless_uniform
    seeds = _seeds(60)

    def on_device(keys):
        folded = philox.fold_in(keys, -3, bits=32)
        return (
            philox.uniform(keys),
            philox.uniform(keys, (41,), -0.3, 2.7),
            philox.integers(keys, (2, 5), -7, 1000),
            folded,
            philox.fold_in(keys, 1 << 40),
            philox.split(folded, 3),
        )

    actual = jax.jit(on_device)(_keys(seeds))
    for place, seed in enumerate(seeds):
        folded = fold_in(tf.constant(seed), -3)
        expected = (
            uniform([], seed),
            uniform([41], seed, -0.3, 2.7),
            uniform([2, 5], seed, -7, 1000, tf.int32),
            _words(folded),
            _words(fold_in(tf.constant(seed), tf.constant(1 << 40, tf.int64))),
            _words(tf.random.experimental.stateless_split(folded, 3)),
        )
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(one[place], other)


def test_keys_of_numbers_on_the_device_and_on_the_host():
    numbers = np.array([0, 5, 2**31 - 1, -1, -(2**31)], np.int32)
    on_device = philox.make_key(7, jax.numpy.asarray(numbers))
    np.testing.assert_array_equal(on_device, philox.make_key(7, numbers))
    np.testing.assert_array_equal(on_device[3], [7, 0, 2**32 - 1, 2**32 - 1])
    unsigned = philox.make_key(jax.numpy.uint32(2**32 - 1), 0)
    np.testing.assert_array_equal(unsigned, philox.make_key(2**32 - 1, 0))


def _photos(count, height, width):
    """Smooth pictures with noise, some of few values, one of a single one."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:height, :width] / 6
    waves = rng.uniform(0, 3, (count, 5, 1, 1, 3))
    base, across, down, phase, noise = np.moveaxis(waves, 1, 0)
    smooth = np.sin(across * x[..., None] + down * y[..., None] + phase)
    images = 60 * base + 70 * smooth + 8 * noise * rng.normal(size=(count, height, width, 3))
    images = np.clip(images, 0, 255).astype(np.uint8)
    images[::7] &= 0xE0
    images[3] = 90
    return images


def _host(spec, images, seeds, image_size):
    steps = preprocess.make_preprocess(spec, image_size)
    encoded = [tf.io.encode_png(image).numpy() for image in images]
    examples = {"image": tf.constant(encoded), "label": tf.zeros(len(images), tf.int32)}
    data = tf.data.Dataset.from_tensor_slices((examples, tf.constant(seeds)))
    return next(iter(data.map(steps).batch(len(images)))).pop("image").numpy()


STEPS = (
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
        pytest.param(STEPS, (16, 16), 32, marks=pytest.mark.slow, id="steps"),
        pytest.param(STEPS, (16, 16), 48, marks=AS_IN_A_RUN, id="steps as in a run"),
        pytest.param(AUTOAUGMENT, (30, 35), 160, marks=AS_IN_A_RUN, id="autoaugment"),
        pytest.param(RANDAUGMENT, (30, 35), 40, id="randaugment"),
        pytest.param(RANDAUGMENT, (30, 35), 64, marks=AS_IN_A_RUN, id="randaugment as in a run"),
        pytest.param(PUBLISHED, (30, 35), 40, id="published"),
        pytest.param(PUBLISHED, (30, 35), 160, marks=AS_IN_A_RUN, id="published as in a run"),
        pytest.param(FIXED, (30, 35), 96, marks=AS_IN_A_RUN, id="fixed"),
    ],
)
def test_pixels_are_those_of_the_host(spec, image_size, count):
    images, seeds = _photos(count, 30, 35), _seeds(count)
    expected = _host(spec, images, seeds, image_size)
    size = {"resize(20)": (20, 20)}.get(spec.split("|")[1], (30, 35))
    spec = parse(spec)
    _check_device(spec, _host(spec.parts.host, images, seeds, size), seeds, expected)


def _check_device(spec, host, seeds, expected):
    """The device's part changes the host's images into those expected."""
    actual = jax.jit(augment.make_augment(spec, host.shape[1:3]))(host, _keys(seeds))
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
    assert host.shape != expected.shape or (host != expected).any((1, 2, 3)).mean() > 0.4


# Values of the arguments without a default, and calls that do more than their defaults.
VALUES = {"size": 12, "patch_size": 4}
CALLS = {"random_affine": "random_affine(10, 2, 0.15, 0.1)", "random_erasing": "random_erasing(1)"}
ON_DEVICE = [name for name, op in OPS.items() if op.device]
CHEAP = [name for name in ON_DEVICE if OPS[name].kind is not Kind.POLICY and name not in CALLS]


def _call(name):
    given = [key for key, (_, default) in OPS[name].arguments.items() if default is REQUIRED]
    return CALLS.get(name) or f"{name}({', '.join(str(VALUES[key]) for key in given)})"


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(CHEAP, id="in a row"),
        *(pytest.param([name], marks=pytest.mark.slow, id=name) for name in ON_DEVICE),
    ],
)
def test_ops_with_a_device_form_give_the_hosts_pixels(names):
    """All of the registry: a new op needs no line here."""
    spec = parse("|".join(["decode|flip_lr", *map(_call, names)]))
    side = 12 if OPS[names[0]].kind is Kind.PERMUTATION else 14
    images, seeds = _photos(16, side, side), _seeds(16)
    expected = _host(spec, images, seeds, spec.image_size or (side, side))
    _check_device(spec, images, seeds, expected)


@pytest.mark.optimized
def test_grey_of_many_colours_is_the_hosts():
    """Where the rounding of one sum decides; found among all 2^24: none differs."""
    from mixer.data.preprocessing import randaugment

    rows = np.mgrid[0:256:5, :256, 0:256:3].reshape(3, -1).T[None].astype(np.uint8)
    pixels = rows[:, :, None].astype(np.float32)
    for published in (False, True):
        luminance = functools.partial(device_policies.luminance, published=published)
        actual = jax.jit(luminance)(pixels)[0, :, 0]
        expected = randaugment.color(tf.constant(rows), 0.0, published)[0]
        np.testing.assert_array_equal(np.broadcast_to(actual, expected.shape), expected)


def test_where_a_specification_is_parted():
    for spec, host, device, random in (
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
        assert (str(parts.host), str(parts.device), parts.random_on_host) == (host, device, random)


def test_every_function_takes_what_the_registry_declares():
    """A key if the op is random, the example if it is on the label, and the arguments."""
    for op in OPS.values():
        arguments = {key: value.default for key, value in op.signature.parameters.items()}
        subject = "example" if op.kind is Kind.LABEL else "image"
        forms = [(op.host_function, subject, "key")]
        if op.device:
            forms.append((op.device_function, "images", "keys"))
        for function, first, key in forms:
            parameters = inspect.signature(function).parameters
            required = dict.fromkeys([first, *[key] * op.random], inspect.Parameter.empty)
            declared = {name: parameter.default for name, parameter in parameters.items()}
            assert declared == required | arguments, (op.name, function)
            assert list(declared) == [*required, *arguments]


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
def test_mistakes_are_one_line(spec, reason):
    with pytest.raises(UserError, match=reason) as error:
        augment.make_augment(parse(spec), (8, 8))
    assert "\n" not in str(error.value) and spec in str(error.value)
