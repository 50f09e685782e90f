"""The layers against the plain formulation: values, gradients, and sums in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer.models import layers


def _arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def _value_and_gradients(function, arguments):
    """Of all arguments, for an arbitrary gradient of the result."""

    @jax.jit
    def computed(*arguments):
        value, pull = jax.vjp(function, *arguments)
        grad = _arrays(value.shape, seed=1)[0].astype(value.dtype)
        return value, pull(grad)

    return computed(*arguments)


def _compare(ours, plain, arguments, rtol=1e-5):
    value, gradients = _value_and_gradients(ours, arguments)
    expected, expected_gradients = _value_and_gradients(plain, arguments)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol)
    for one, other in zip(gradients, expected_gradients, strict=True):
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


def _plain_norm_dense(x, scale, shift, kernel, bias):
    normal = nn.LayerNorm().apply({"params": {"scale": scale, "bias": shift}}, x)
    return normal @ kernel + bias


@pytest.mark.parametrize("images", [1, 7], ids=["few rows", "many rows"])
def test_norm_dense_is_layer_norm_and_dense(images):
    """With many rows scale and shift are part of the affine map."""
    x, *affine = _arrays((images, 5, 12), (12,), (12,), (12, 9), (9,))
    assert (images == 7) == (x.size >= 2 * affine[2].size)
    _compare(layers.norm_dense, _plain_norm_dense, (3 * x + 1, *affine), rtol=2e-5)


def test_norm_dense_keeps_one_array_of_the_inputs_size():
    x, *affine = _arrays((8, 16, 12), (12,), (12,), (12, 9), (9,))
    kept = jax.tree.leaves(jax.vjp(layers.norm_dense, x, *affine)[1])
    assert sum(leaf.size == x.size for leaf in kept) == 1


@pytest.fixture
def patched(monkeypatch):
    """Patches what is read while a function is traced: JAX keeps what it has traced."""

    def patch(*arguments):
        monkeypatch.setattr(*arguments)
        jax.clear_caches()

    yield patch
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("tokens", [6, 8], ids=["with room", "without room"])
def test_bias_within_the_product_is_the_added_bias(tokens, patched):
    """What a GPU computes, here on the CPU: values, and gradients of kernel and bias."""
    x, kernel, bias = _arrays((3, tokens, 5), (tokens, 4), (4,))
    x, bias = x.astype(jnp.bfloat16), bias.astype(jnp.bfloat16).astype(jnp.float32)
    expected, (_, *expected_gradients) = _value_and_gradients(layers.token_dense, (x, kernel, bias))

    def as_on_a_gpu(*arguments, default, cuda=None, cpu=None):
        return (cuda or default)(*arguments)

    patched(layers.lax, "platform_dependent", as_on_a_gpu)
    actual, (_, *gradients) = _value_and_gradients(layers.token_dense, (x, kernel, bias))
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    np.testing.assert_allclose(actual.astype(float), expected.astype(float), rtol=1e-2, atol=1e-2)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_token_gradients_do_not_depend_on_how_images_lie(patched):
    """A CPU multiplies all images at once where there are many tokens."""
    arguments = _arrays((3, 6, 5), (6, 4), (4,))
    _, (_, apart, _) = _value_and_gradients(layers.token_dense, arguments)
    patched(layers, "MANY_TOKENS", 4)
    _, (_, together, _) = _value_and_gradients(layers.token_dense, arguments)
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)
    assert apart.shape == (6, 4)


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
