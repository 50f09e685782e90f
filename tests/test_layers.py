"""The layers, compared with plain JAX: values, gradients, and accumulation in float32."""

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
    """Returns the value and the gradients of all arguments, given a random output gradient."""

    @jax.jit
    def compute(*arguments):
        value, pull = jax.vjp(function, *arguments)
        grad = _arrays(value.shape, seed=1)[0].astype(value.dtype)
        return value, pull(grad)

    return compute(*arguments)


def _compare(layer, reference, arguments, rtol=1e-5):
    value, gradients = _value_and_gradients(layer, arguments)
    expected, expected_gradients = _value_and_gradients(reference, arguments)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol)
    for grad, expected_grad in zip(gradients, expected_gradients, strict=True):
        assert grad.shape == expected_grad.shape and grad.dtype == expected_grad.dtype
        np.testing.assert_allclose(
            grad, expected_grad, rtol=rtol, atol=rtol * np.abs(expected_grad).max()
        )


@pytest.mark.parametrize("kind", ["tanh", "erf"])
def test_gelu_matches_flax(kind):
    x = jnp.linspace(-9, 9, 4001)
    _compare(lambda x: layers.gelu(x, kind), lambda x: nn.gelu(x, approximate=kind == "tanh"), (x,))
    with pytest.raises(AssertionError):
        _compare(lambda x: layers.gelu(x, "erf"), lambda x: layers.gelu(x, "tanh"), (x,))


@pytest.mark.parametrize("widths", [(6, 10), (10, 6)], ids=["wider", "narrower"])
def test_dense_matches_a_plain_affine_map(widths):
    arguments = _arrays((3, 5, widths[0]), widths, widths[1:])
    _compare(layers.dense, lambda x, kernel, bias: x @ kernel + bias, arguments)


@pytest.mark.parametrize("widths", [(6, 10), (10, 6)])
def test_token_dense_matches_dense_between_transposes(widths):
    arguments = _arrays((3, widths[0], 7), widths, widths[1:])
    _compare(
        layers.token_dense,
        lambda x, kernel, bias: (x.swapaxes(1, 2) @ kernel + bias).swapaxes(1, 2),
        arguments,
    )


@pytest.mark.parametrize("groups", [2, 6], ids=["few", "all"])
def test_grouped_dense_matches_a_map_for_each_group(groups):
    arguments = _arrays((3, 5, 6), (groups, 5, 4), (groups, 4))

    def reference(x, kernel, bias):
        parts = jnp.split(x, groups, axis=2)
        return jnp.concatenate(
            [
                (part.swapaxes(1, 2) @ kernel[g] + bias[g]).swapaxes(1, 2)
                for g, part in enumerate(parts)
            ],
            axis=2,
        )

    def layer(x, kernel, bias):
        return layers.join_groups(
            layers.grouped_dense(layers.split_groups(x, groups), kernel, bias)
        )

    _compare(layer, reference, arguments)


def _plain_norm_dense(x, scale, shift, kernel, bias):
    normal = nn.LayerNorm().apply({"params": {"scale": scale, "bias": shift}}, x)
    return normal @ kernel + bias


@pytest.mark.parametrize("images", [1, 7], ids=["few rows", "many rows"])
def test_norm_dense_matches_layer_norm_and_dense(images):
    """With many rows, scale and shift are folded into the matmul."""
    x, *affine = _arrays((images, 5, 12), (12,), (12,), (12, 9), (9,))
    assert (images == 7) == (x.size >= 2 * affine[2].size)
    _compare(layers.norm_dense, _plain_norm_dense, (3 * x + 1, *affine), rtol=2e-5)


def test_norm_dense_saves_one_array_of_the_input_size():
    x, *affine = _arrays((8, 16, 12), (12,), (12,), (12, 9), (9,))
    residuals = jax.tree.leaves(jax.vjp(layers.norm_dense, x, *affine)[1])
    assert sum(leaf.size == x.size for leaf in residuals) == 1


@pytest.fixture
def patch_traced(monkeypatch):
    """A `monkeypatch.setattr` that clears the caches of JAX, which keep traced functions."""

    def patch(*arguments):
        monkeypatch.setattr(*arguments)
        jax.clear_caches()

    yield patch
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize(
    "tokens",
    [pytest.param(6, id="padded"), pytest.param(8, id="unpadded", marks=pytest.mark.slow)],
)
def test_fused_bias_of_token_dense_matches_an_added_bias(tokens, patch_traced):
    """Runs the GPU implementation on the CPU: values, and gradients of kernel and bias."""
    x, kernel, bias = _arrays((3, tokens, 5), (tokens, 4), (4,))
    x, bias = x.astype(jnp.bfloat16), bias.astype(jnp.bfloat16).astype(jnp.float32)
    expected, (_, *expected_gradients) = _value_and_gradients(layers.token_dense, (x, kernel, bias))

    def choose_cuda(*arguments, default, cuda=None, cpu=None):
        return (cuda or default)(*arguments)

    patch_traced(layers.lax, "platform_dependent", choose_cuda)
    actual, (_, *gradients) = _value_and_gradients(layers.token_dense, (x, kernel, bias))
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    np.testing.assert_allclose(actual.astype(float), expected.astype(float), rtol=1e-2, atol=1e-2)
    for grad, expected_grad in zip(gradients, expected_gradients, strict=True):
        assert grad.dtype == expected_grad.dtype == jnp.float32
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_joint_token_gradients_match_separate_ones(patch_traced):
    """With many tokens, a CPU multiplies all images at once."""
    arguments = _arrays((3, 6, 5), (6, 4), (4,))
    _, (_, separate_grads, _) = _value_and_gradients(layers.token_dense, arguments)
    patch_traced(layers, "MANY_TOKENS", 4)
    _, (_, joint_grads, _) = _value_and_gradients(layers.token_dense, arguments)
    np.testing.assert_allclose(joint_grads, separate_grads, rtol=1e-5, atol=1e-5)
    assert separate_grads.shape == (6, 4)


def test_patches_and_dense_match_a_convolution():
    images, kernel = _arrays((2, 8, 12, 3), (4, 4, 3, 5))
    actual = layers.patches(images, 4) @ kernel.reshape(-1, 5)
    expected = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apply", [layers.dense, layers.token_dense, layers.grouped_dense])
def test_bfloat16_parameter_gradients_accumulate_in_float32(apply):
    """Sums 16,384 ones: a sum in bfloat16 would stop at 256."""
    n, groups = 16_384, (1,) * (apply is layers.grouped_dense)
    x = jnp.ones((*groups, n, 1, 1), jnp.bfloat16)
    kernel, bias = jnp.ones((*groups, 1, 1)), jnp.zeros((*groups, 1))
    value, pull = jax.vjp(apply, x, kernel, bias)
    x_grad, kernel_grad, bias_grad = pull(jnp.ones_like(value))
    assert value.dtype == x_grad.dtype == jnp.bfloat16
    assert kernel_grad.dtype == bias_grad.dtype == jnp.float32
    assert kernel_grad.item() == bias_grad.item() == n


def test_gelu_saves_only_its_input_for_the_backward_pass():
    x = jnp.ones((4, 8))
    residuals = jax.tree.leaves(jax.vjp(lambda x: layers.gelu(x, "tanh"), x)[1])
    assert [leaf.shape for leaf in residuals if leaf.ndim] == [x.shape]
