import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from helpers import PLAIN_STEP, TINY, leaves
from mixer.models import microbatches
from mixer.models.mlp_mixer import VARIANTS
from mixer.models.registry import make_model
from mixer.parallel import sharding
from mixer.training import losses
from mixer.training.state import TrainState
from mixer.training.step import TrainStep, make_predict

CIFAR = dict(patch_size=4, hidden_dim=128, num_blocks=8, tokens_mlp_dim=64, channels_mlp_dim=512)

DIGITS = dict(patch_size=2, hidden_dim=64, num_blocks=4, tokens_mlp_dim=32, channels_mlp_dim=128)


def _mixer(name):
    fields = {**VARIANTS, "cifar": CIFAR, "digits": DIGITS}[name]
    return make_model(**fields, num_classes=10)


def _mesh(platform, data):
    device = AbstractDevice(platform, None, platform)
    types = (AxisType.Auto,) * 3
    return AbstractMesh((data, 1, 1), sharding.AXES, axis_types=types, abstract_device=device)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("cifar", (128, 32, 32, 3), 4),
        ("cifar", (32, 32, 32, 3), 1),
        ("cifar", (500, 32, 32, 3), 20),  # parts of 25 images
        ("cifar", (127, 32, 32, 3), 1),  # 127 is prime
        ("digits", (500, 8, 8, 3), 1),  # the whole batch is small
        ("S/32", (64, 224, 224, 3), 4),
        ("S/16", (8, 224, 224, 3), 2),
        ("B/16", (32, 224, 224, 3), 8),
        ("B/16", (4, 224, 224, 3), 1),
        ("H/14", (8, 224, 224, 3), 4),
    ],
)
def test_number_of_parts_on_a_cpu(name, shape, count):
    assert microbatches.best_count(_mixer(name), shape) == count


def test_parts_divide_the_batch_of_one_device_on_cpus_only():
    shape = (128, 32, 32, 3)
    for platform, data, count in (("cpu", 1, 4), ("cpu", 2, 2), ("cpu", 8, 1), ("tpu", 1, 1)):
        with jax.sharding.use_abstract_mesh(_mesh(platform, data)):
            assert microbatches.best_count(_mixer("cifar"), shape) == count


@pytest.fixture
def many_parts(monkeypatch):
    """Makes batches of the tiny model split into parts of 4 images with 16 tokens each."""
    monkeypatch.setattr(microbatches, "FEW_VALUES", 0)
    for name in ("MIN_ROWS", "MAX_ROWS"):
        monkeypatch.setattr(microbatches, name, 4 * 16)


def _params(mixer, rng):
    """Returns parameters with a nonzero head, so that the blocks below it have gradients."""
    params = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    params["head"]["kernel"] = jnp.asarray(rng.standard_normal((TINY["hidden_dim"], 7), np.float32))
    return params


def test_predictions_keep_the_order_of_the_images(many_parts):
    mixer = make_model(num_classes=7, **TINY)
    rng = np.random.default_rng(0)
    params = _params(mixer, rng)
    images = rng.integers(0, 256, (12, 32, 32, 3), np.uint8)
    assert microbatches.best_count(mixer, images.shape) == 3
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    apply = jax.jit(mixer.apply)
    expected = [apply({"params": params}, image[None] / 127.5 - 1)[0][0] for image in images]
    predict = jax.jit(make_predict(mixer, mesh))
    np.testing.assert_allclose(predict(params, images), expected, atol=1e-4)


@pytest.mark.slow
def test_update_in_parts_matches_the_whole_batch(many_parts, monkeypatch):
    """The dropout masks must match, too."""
    mixer = make_model(num_classes=7, **TINY | dict(dropout=0.5, num_blocks=1))
    tx = optax.sgd(0.1)
    rng = np.random.default_rng(0)
    params = _params(mixer, rng)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    batch = {
        "image": rng.integers(0, 256, (12, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 7, 12, np.int32),
    }
    schedule = lambda step: 0.1  # noqa: E731

    def update(*, has_scan):
        step = TrainStep(mixer, tx, schedule, losses.softmax, seed=0, **PLAIN_STEP)
        traced = jax.jit(step).trace(state, batch)
        assert ("scan" in str(traced.jaxpr)) == has_scan
        return traced.lower().compile()(state, batch)

    actual, metrics = update(has_scan=True)
    monkeypatch.setattr(microbatches, "best_count", lambda model, shape: 1)
    expected, expected_metrics = update(has_scan=False)
    for path, value in leaves(actual.params).items():
        np.testing.assert_allclose(value, leaves(expected.params)[path], atol=1e-6, err_msg=path)
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
