"""The layers against the plain formulation: values, gradients, and sums in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer import layers


def _arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def _compare(ours, plain, arguments, rtol=1e-5):
    """Values, and gradients of all arguments for an arbitrary gradient of the result."""
    value, pull = jax.vjp(ours, *arguments)
    wanted, plain_pull = jax.vjp(plain, *arguments)
    np.testing.assert_allclose(value, wanted, rtol=rtol, atol=rtol)
    grad = _arrays(value.shape, seed=1)[0]
    for one, other in zip(pull(grad), plain_pull(grad), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


@pytest.mark.parametrize("kind", ["tanh", "erf"])
def test_gelu_is_the_plain_one(kind):
    x = jnp.linspace(-9, 9, 4001)
    _compare(lambda x: layers.gelu(x, kind), lambda x: nn.gelu(x, approximate=kind == "tanh"), (x,))
    with pytest.raises(AssertionError):
        _compare(lambda x: layers.gelu(x, "erf"), lambda x: layers.gelu(x, "tanh"), (x,))


@pytest.mark.parametrize("widths", [(6, 10), (10, 6)], ids=["wider", "narrower"])
def test_dense_is_the_plain_one(widths):
    arguments = _arrays((3, 5, widths[0]), widths, widths[1:])
    _compare(layers.dense, lambda x, kernel, bias: x @ kernel + bias, arguments)


@pytest.mark.parametrize("widths", [(6, 10), (10, 6)])
def test_token_dense_is_dense_between_transposes(widths):
    arguments = _arrays((3, widths[0], 7), widths, widths[1:])
    _compare(
        layers.token_dense,
        lambda x, kernel, bias: (x.swapaxes(1, 2) @ kernel + bias).swapaxes(1, 2),
        arguments,
    )


def test_patches_and_dense_are_the_convolution():
    images, kernel = _arrays((2, 8, 12, 3), (4, 4, 3, 5))
    ours = layers.patches(images, 4) @ kernel.reshape(-1, 5)
    wanted = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apply", [layers.dense, layers.token_dense])
def test_in_bfloat16_gradients_of_parameters_are_sums_in_float32(apply):
    """Of 16,384 equal terms, which a sum in bfloat16 stops counting at 256."""
    n = 16_384
    x = jnp.ones((n, 1, 1), jnp.bfloat16)
    kernel, bias = jnp.ones((1, 1)), jnp.zeros(1)
    value, pull = jax.vjp(apply, x, kernel, bias)
    x_grad, kernel_grad, bias_grad = pull(jnp.ones_like(value))
    assert value.dtype == x_grad.dtype == jnp.bfloat16
    assert kernel_grad.dtype == bias_grad.dtype == jnp.float32
    assert kernel_grad[0, 0] == bias_grad[0] == n


def test_gelu_keeps_nothing_but_its_input_for_the_backward_pass():
    x = jnp.ones((4, 8))
    kept = jax.tree.leaves(jax.vjp(lambda x: layers.gelu(x, "tanh"), x)[1])
    assert [leaf.shape for leaf in kept if leaf.ndim] == [x.shape]
