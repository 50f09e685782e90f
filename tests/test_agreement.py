"""Logits and gradients of the mixer, compared with the plain implementation on the local device.

The reference is the plain implementation in float32 with the highest matmul precision. An error is
|x - reference| / |reference|.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import TINY
from mixer.models import layers
from mixer.tools.benchmark import cases, jax_side
from mixer.training.step import normalize

# A parameter's gradient counts as at least this share of the norm of the whole gradient.
MIN_SHARE = 1e-3


def _case(model, dimensions, *, image_size, num_classes, batch_size, dtype):
    return cases.Case(
        measurement="train",
        model=model,
        dimensions=dimensions,
        image_size=image_size,
        num_classes=num_classes,
        batch_size=batch_size,
        dtype=dtype,
        gelu="tanh",
    )


def _errors(case):
    """Returns the errors of the mixer and of the plain implementation, both in the case's dtype."""
    params = jax_side.draw_params(case)
    rng = np.random.default_rng(2)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    images = rng.integers(0, 256, shape, np.uint8)
    label = rng.integers(0, case.num_classes, case.batch_size, np.int32)

    def mixer(params, images):
        return case.make_model().apply({"params": params}, normalize(images))[0]

    def make_plain(dtype):
        model = jax_side.make_plain(case).clone(dtype=dtype)
        return lambda params, images: model.apply({"params": params}, images)

    def compute(forward, options):
        def loss(params, images):
            logits = forward(params, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return jnp.mean(losses), logits

        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)
        (_, logits), grads = gradient(params, images)
        return jax.device_get((logits, grads))

    with jax.default_matmul_precision("highest"):
        reference = compute(make_plain("float32"), {})
    options = layers.compiler_options(jax.default_backend())
    return (
        _relative_errors(compute(mixer, options), reference),
        _relative_errors(compute(make_plain(case.dtype), {}), reference),
    )


def _relative_errors(actual, reference):
    """Returns the errors of the logits, the whole gradient, and the worst parameter's gradient."""
    (logits, grads), (ref_logits, ref_grads) = actual, reference
    norms = np.array(
        [
            (np.linalg.norm(grad - ref_grad), np.linalg.norm(ref_grad))
            for grad, ref_grad in zip(
                jax.tree.leaves(grads), jax.tree.leaves(ref_grads), strict=True
            )
        ]
    )
    error, size = np.linalg.norm(norms, axis=0)
    # The bias after token mixing has a gradient of 0 up to rounding, since a norm cancels it.
    worst = np.max(norms[:, 0] / np.maximum(norms[:, 1], MIN_SHARE * size))
    logits_error = np.linalg.norm(logits - ref_logits) / np.linalg.norm(ref_logits)
    return dict(logits=logits_error, gradient=error / size, worst=worst)


def test_mixer_matches_the_plain_implementation():
    sizes = dict(image_size=16, num_classes=7, batch_size=4)
    case = _case("tiny", TINY | dict(num_blocks=1), **sizes, dtype="float32")
    mixer_errors, plain_errors = _errors(case)
    assert 0 < mixer_errors["gradient"] < 1e-5 and mixer_errors["worst"] < 1e-4
    assert mixer_errors["logits"] < 1e-5 and plain_errors["logits"] < 1e-5


def test_relative_errors_cover_the_whole_and_the_worst_parameter():
    reference = np.ones(4), {"a": np.array([3.0, 0.0]), "b": np.array([0.0, 4.0]), "c": np.zeros(2)}
    actual = np.full(4, 1.5), {**reference[1], "a": np.array([3.0, 3.0])}
    assert _relative_errors(actual, reference) == dict(logits=0.5, gradient=0.6, worst=1.0)
    noisy_result = reference[0], {**reference[1], "c": np.array([0.0, 1e-3])}
    worst = _relative_errors(noisy_result, reference)["worst"]
    assert worst == pytest.approx(1e-3 / (MIN_SHARE * 5))


@pytest.mark.gpu
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["S/32", "B/16"])
def test_mixer_is_as_accurate_as_plain_on_a_gpu(model, dtype):
    """The errors are about 1e-2 in bfloat16; a wrong layer has an error of about 1."""
    if jax.default_backend() != "gpu":
        pytest.skip("JAX runs on no GPU; JAX_PLATFORMS=cuda selects it")
    sizes = dict(image_size=224, num_classes=1000, batch_size=32)
    mixer_errors, plain_errors = _errors(_case(model, cases.MODELS[model], **sizes, dtype=dtype))
    for key, error in mixer_errors.items():
        assert error < 2 * plain_errors[key] + 1e-5, (key, mixer_errors, plain_errors)
