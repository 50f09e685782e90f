"""Ours and the plain formulation: logits and gradients of one loss, on the device of this machine.

Each is compared with the plain one in float32 at the highest precision of matmuls, as
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

SMALL = 1e-3  # of the whole gradient's norm: a parameter's smaller gradient counts as that large


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
    """Errors of ours and of plain, both in the case's dtype."""
    params = jax_side.draw_params(case)
    rng = np.random.default_rng(2)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    images = rng.integers(0, 256, shape, np.uint8)
    label = rng.integers(0, case.num_classes, case.batch_size, np.int32)

    def ours(params, images):
        return jax_side.make_mixer(case).apply({"params": params}, normalize(images))[0]

    def plain(dtype):
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
        reference = compute(plain("float32"), {})
    options = layers.compiler_options(jax.default_backend())
    return (
        _relative_errors(compute(ours, options), reference),
        _relative_errors(compute(plain(case.dtype), {}), reference),
    )


def _relative_errors(actual, reference):
    """Of the logits, of the whole gradient, and of the parameter whose gradient is worst."""
    (logits, grads), (true_logits, true_grads) = actual, reference
    norms = np.array(
        [
            (np.linalg.norm(one - other), np.linalg.norm(other))
            for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(true_grads), strict=True)
        ]
    )
    off, size = np.linalg.norm(norms, axis=0)
    # The bias that follows token mixing has no gradient but rounding: the norm takes it away.
    worst = np.max(norms[:, 0] / np.maximum(norms[:, 1], SMALL * size))
    logits_off = np.linalg.norm(logits - true_logits) / np.linalg.norm(true_logits)
    return dict(logits=logits_off, gradient=off / size, worst=worst)


def test_ours_is_the_plain_function_of_the_same_parameters():
    sizes = dict(image_size=16, num_classes=7, batch_size=4)
    case = _case("tiny", TINY | dict(num_blocks=1), **sizes, dtype="float32")
    ours, plain = _errors(case)
    assert 0 < ours["gradient"] < 1e-5 and ours["worst"] < 1e-4 and ours["logits"] < 1e-5
    assert plain["logits"] < 1e-5


def test_errors_are_of_the_whole_and_of_the_worst():
    true = np.ones(4), {"a": np.array([3.0, 0.0]), "b": np.array([0.0, 4.0]), "c": np.zeros(2)}
    other = np.full(4, 1.5), {**true[1], "a": np.array([3.0, 3.0])}
    assert _relative_errors(other, true) == dict(logits=0.5, gradient=0.6, worst=1.0)
    noise = true[0], {**true[1], "c": np.array([0.0, 1e-3])}
    assert _relative_errors(noise, true)["worst"] == pytest.approx(0.2)  # of a thousandth of 5


@pytest.mark.gpu
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["S/32", "B/16"])
def test_on_a_gpu_ours_is_about_as_far_off_as_plain(model, dtype):
    """In bfloat16 that is about 1e-2; a wrong form of a layer is off by its own size."""
    if jax.default_backend() != "gpu":
        pytest.skip("JAX runs on no GPU; JAX_PLATFORMS=cuda selects it")
    sizes = dict(image_size=224, num_classes=1000, batch_size=32)
    ours, plain = _errors(_case(model, cases.MODELS[model], **sizes, dtype=dtype))
    for what, error in ours.items():
        assert error < 2 * plain[what] + 1e-5, (what, ours, plain)
