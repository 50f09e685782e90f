"""The model's layers as functions of their parameters, with derivatives written out.

Autodiff of the plain formulation (Dense, GELU, and a transpose before and after token mixing)
costs more than the mathematics asks for. Here:

- token mixing is a matmul over the token axis with channels where they are, so that nothing is
  transposed: one for each image, or on a CPU one for all images side by side;
- the gradient of GELU is computed from its input alone, the one array that the forward pass keeps;
- on a CPU, gradients of weights are products that transpose the smaller of their two operands,
  where XLA would transpose the one on the left;
- gradients of weights and biases are sums in float32, whatever the dtype of the computation.

In float32 each is the same function as the plain formulation up to rounding (tests/test_layers.py).
docs/performance.md has what they bring. Only reverse-mode differentiation is defined.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

# GELU by tanh: x / 2 * (1 + tanh(SCALE * (x + CUBIC * x^3))) (Hendrycks and Gimpel, 2016).
_SCALE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, kind: str) -> jax.Array:
    """GELU of any shape; `kind` is "tanh" or "erf"."""
    return jax.nn.gelu(x, approximate=kind == "tanh")


def _gelu_forward(x: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    return gelu(x, kind), x


def _gelu_backward(kind: str, x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    dtype, x = x.dtype, x.astype(jnp.float32)
    if kind == "tanh":
        square = x * x
        tanh = jnp.tanh(_SCALE * x * (1 + _CUBIC * square))
        inner = _SCALE * (1 + 3 * _CUBIC * square)
        slope = 0.5 * (1 + tanh) * (1 + x * (1 - tanh) * inner)
    else:
        density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        slope = 0.5 * (1 + lax.erf(x / math.sqrt(2))) + x * density
    return ((grad.astype(jnp.float32) * slope).astype(dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Affine map of the last axis, in the dtype of `x`.

    Args:
      x: (..., I).
      kernel: (I, O) float32.
      bias: (O,) float32.

    Returns:
      (..., O).
    """
    return jnp.dot(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


def _dense_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple:
    return dense(x, kernel, bias), (x, kernel)


def _dense_backward(residuals: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))
    x_grad = lax.dot_general(grad, kernel.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    return x_grad, _summed_products(x, grad, rows), jnp.sum(grad.astype(jnp.float32), rows)


dense.defvjp(_dense_forward, _dense_backward)


def _summed_products(x: jax.Array, grad: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """Sum over `rows` of the outer products of the last axes: (I, O) float32.

    A product transposes its left operand, which on a CPU costs as much as half of the product
    itself where that is the wide one.
    """

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        dimensions = ((rows, rows), ((), ()))
        return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)

    def exchanged(x: jax.Array, grad: jax.Array) -> jax.Array:
        # Without the barrier XLA exchanges the operands again, to save the small transpose.
        return lax.optimization_barrier(product(grad, x)).T

    if x.shape[-1] <= grad.shape[-1]:
        return product(x, grad)
    return lax.platform_dependent(x, grad, cpu=exchanged, default=product)


@jax.custom_vjp
def token_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Affine map of the token axis, for each channel alike, in the dtype of `x`.

    Args:
      x: (N, I, C).
      kernel: (I, O) float32.
      bias: (O,) float32.

    Returns:
      (N, O, C).
    """
    return _token_product(kernel.T, x) + bias.astype(x.dtype)[:, None]


def _token_product(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """`matrix` (O, I) times each image's (I, C): (N, O, C)."""
    matrix = matrix.astype(x.dtype)
    return lax.platform_dependent(matrix, x, cpu=_side_by_side, default=_image_by_image)


def _image_by_image(matrix: jax.Array, x: jax.Array) -> jax.Array:
    # Broadcast by hand: XLA would take the one matrix for a reason to transpose `x`.
    matrix = jnp.broadcast_to(matrix, (x.shape[0], *matrix.shape))
    return lax.dot_general(matrix, x, (((2,), (1,)), ((0,), (0,))))


def _side_by_side(matrix: jax.Array, x: jax.Array) -> jax.Array:
    # The images of small models are too small for a matmul each. Whole rows of channels move.
    joined = x.swapaxes(0, 1).reshape(x.shape[1], -1)
    return (matrix @ joined).reshape(-1, x.shape[0], x.shape[2]).swapaxes(0, 1)


def _token_dense_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple:
    return token_dense(x, kernel, bias), (x, kernel)


def _token_dense_backward(
    residuals: tuple, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = residuals
    dimensions = (((2,), (2,)), ((0,), (0,)))
    products = lax.dot_general(x, grad, dimensions, preferred_element_type=jnp.float32)
    bias_grad = jnp.sum(grad.astype(jnp.float32), (0, 2))
    return _token_product(kernel, grad), jnp.sum(products, 0), bias_grad


token_dense.defvjp(_token_dense_forward, _token_dense_backward)


def compiler_options(platform: str) -> dict[str, bool]:
    """What XLA is told beside the program, for `jax.jit(..., compiler_options=...)`.

    On GPUs: matmuls are cuBLASLt's, whose epilogues take in bias and GELU, and what is rounded to
    bfloat16 stays so. XLA would otherwise keep the float32 original of GELU's gradient for the sum
    that follows, and store it.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    return {"xla_gpu_enable_triton_gemm": False, "xla_allow_excess_precision": False}


def patches(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images (N, H, W, 3) into rows of pixels: (N, H / P, W / P, P * P * 3)."""
    n, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(n, rows, patch_size, columns, patch_size, channels)
    return cut.swapaxes(2, 3).reshape(n, rows, columns, patch_size**2 * channels)
