"""The model's layers as functions of their parameters, with custom derivatives.

Automatic differentiation of the plain formulation (Dense, GELU, and a transpose before and after
token mixing) does more work than necessary. In this module:

- token mixing is a matmul over the token axis that leaves the channels in place, so nothing is
  transposed. It is one matmul per image, or on a CPU one matmul for all images side by side; on an
  NVIDIA GPU the matmul includes bias and GELU. With groups of channels it is a batched matmul, and
  on a CPU it is faster to transpose before the first and after the second;
- the backward pass of a LayerNorm and the matmul after it stores only the normalized input, if the
  batch is larger than the kernel;
- the gradient of GELU is computed from its input, the only array that the forward pass stores;
- on a CPU, the matmuls for weight gradients transpose the smaller operand; XLA would transpose the
  left operand;
- gradients of weights and biases are summed in float32 for every compute dtype.

In float32 each function equals the plain formulation up to rounding (tests/test_layers.py).
docs/performance.md lists the speed-ups. Only reverse-mode differentiation is defined.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from mixer.parallel.sharding import sum_over_shards
from mixer.sizes import Size, pair

# The tanh form of GELU: x / 2 * (1 + tanh(SCALE * (x + CUBIC * x^3))) (Hendrycks and Gimpel, 2016).
_SCALE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


# With at least this many tokens, a matmul over all images and channels is large enough to use all
# cores of a CPU.
MANY_TOKENS = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, kind: str) -> jax.Array:
    """Applies GELU elementwise; `kind` is "tanh" or "erf"."""
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
    """Applies an affine map to the last axis, in the dtype of `x`.

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
    return _dense_x_grad(kernel, grad), *_dense_sums(x, grad)


def _dense_x_grad(kernel: jax.Array, grad: jax.Array) -> jax.Array:
    return lax.dot_general(grad, kernel.astype(grad.dtype), (((grad.ndim - 1,), (1,)), ((), ())))


dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def residual(x: jax.Array) -> jax.Array:
    """Returns `x`, the input of a residual branch and of its skip connection.

    On a CPU, XLA would recompute the sum of the gradients of all later branches in every branch, so
    that the time grows with the square of the depth.
    """
    return x


def _residual_forward(x: jax.Array) -> tuple[jax.Array, None]:
    return x, None


def _residual_backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
    # On several devices, the condition would need communication.
    if jax.sharding.get_abstract_mesh().size > 1:
        return (grad,)
    return (lax.platform_dependent(grad, cpu=_computed_once, default=lambda x: x),)


def _computed_once(x: jax.Array) -> jax.Array:
    # XLA fuses nothing into a conditional. (On a CPU, it removes `lax.optimization_barrier` before
    # it fuses.) Both branches return x.
    value = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    return lax.cond(value > 0, lambda x: x, lambda x: x * 1, x)


residual.defvjp(_residual_forward, _residual_backward)


def norm_dense(
    x: jax.Array, scale: jax.Array, shift: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    """Applies LayerNorm (epsilon 1e-6) and an affine map to the last axis, in the dtype of `x`.

    Args:
      x: (..., I).
      scale: (I,) float32, scale of LayerNorm.
      shift: (I,) float32, bias of LayerNorm.
      kernel: (I, O) float32.
      bias: (O,) float32.

    Returns:
      (..., O).
    """
    # For a small batch, scaling the kernel costs more than it saves. (The size is symbolic in a
    # program exported for any batch size, which computes no gradients.)
    if isinstance(x.size, int) and x.size < 2 * kernel.size:
        return _dense_of_norm(x, scale, shift, kernel, bias)
    return _joined_norm_dense(x, scale, shift, kernel, bias)


def _dense_of_norm(x, scale, shift, kernel, bias) -> jax.Array:
    normal, _ = _standardize(x)
    return dense((normal * scale + shift).astype(x.dtype), kernel, bias)


# Under differentiation, scale and shift are merged into the affine map. The backward pass then
# needs only the normalized `x`, and computes their gradients from those of kernel and bias.
_joined_norm_dense = jax.custom_vjp(_dense_of_norm)


def _standardize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `x` (..., I) with mean 0 and variance 1, and 1 / deviation (..., 1), in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.mean(x * x, -1, keepdims=True) - mean * mean)
    inverse = lax.rsqrt(variance + 1e-6)
    return (x - mean) * inverse, inverse


def _norm_dense_forward(x, scale, shift, kernel, bias) -> tuple[jax.Array, tuple]:
    normal, inverse = _standardize(x)
    normal = normal.astype(x.dtype)
    bias = bias + jnp.sum(shift[:, None] * kernel, 0)
    return dense(normal, scale[:, None] * kernel, bias), (normal, inverse, scale, shift, kernel)


def _norm_dense_backward(residuals: tuple, grad: jax.Array) -> tuple[jax.Array, ...]:
    normal, inverse, scale, shift, kernel = residuals

    def shard_grads(normal: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the gradients of the four parameters."""
        scaled_grad, bias_grad = _dense_sums(normal, grad)
        return (
            jnp.sum(kernel * scaled_grad, 1),
            jnp.sum(kernel * bias_grad, 1),
            scale[:, None] * scaled_grad + shift[:, None] * bias_grad,
            bias_grad,
        )

    scaled = scale[:, None] * kernel
    x_grad = _dense_x_grad(scaled, grad).astype(jnp.float32)
    x = normal.astype(jnp.float32)
    projection = jnp.mean(x_grad * x, -1, keepdims=True)
    x_grad = inverse * (x_grad - jnp.mean(x_grad, -1, keepdims=True) - projection * x)
    return x_grad.astype(normal.dtype), *sum_over_shards(shard_grads, normal, grad)


_joined_norm_dense.defvjp(_norm_dense_forward, _norm_dense_backward)


def _dense_sums(x: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of kernel (I, O) and bias (O,), summed in float32 over leading axes.

    XLA transposes the left operand of the matmul. On a CPU, transposing the wider operand would
    cost up to half as much as the matmul itself.
    """
    rows = tuple(range(x.ndim - 1))

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        dimensions = ((rows, rows), ((), ()))
        return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)

    def swapped_product(x: jax.Array, grad: jax.Array) -> jax.Array:
        # Without the barrier XLA swaps the operands back to save the small transpose.
        return lax.optimization_barrier(product(grad, x)).T

    if x.shape[-1] <= grad.shape[-1]:
        kernel_grad = product(x, grad)
    else:
        kernel_grad = lax.platform_dependent(x, grad, cpu=swapped_product, default=product)
    return kernel_grad, jnp.sum(grad.astype(jnp.float32), rows)


@jax.custom_vjp
def token_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Applies an affine map to the token axis, the same for all channels, in the dtype of `x`.

    Args:
      x: (N, I, C).
      kernel: (I, O) float32.
      bias: (O,) float32.

    Returns:
      (N, O, C).
    """
    return lax.platform_dependent(x, kernel, bias, cuda=_affine_in_one, default=_affine)


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return _token_product(kernel.T, x) + bias.astype(x.dtype)[:, None]


def _affine_in_one(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Computes `_affine` with the bias folded into the matmul if the padding has room for it.

    XLA can then fuse GELU into the matmul too, because cuBLASLt adds biases only along the other
    axis.
    """
    if not (num_pad := _num_pad_tokens(x)):
        return _affine(x, kernel, bias)
    extended = jnp.pad(jnp.concatenate([kernel, bias[None]]), ((0, num_pad - 1), (0, 0)))
    return _image_by_image(extended.T.astype(x.dtype), _extended(x))


def _num_pad_tokens(x: jax.Array) -> int:
    """Returns by how many tokens XLA pads `x` (N, I, C) to a multiple of 8 on a GPU."""
    return -x.shape[1] % 8 if x.dtype == jnp.bfloat16 else 0


def _extended(x: jax.Array) -> jax.Array:
    """Returns `x` with its padding tokens; the first one is all ones and multiplies the bias."""
    ones = jnp.zeros((x.shape[0], _num_pad_tokens(x), x.shape[2]), x.dtype).at[:, 0].set(1)
    return jnp.concatenate([x, ones], 1)


def _token_product(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Multiplies `matrix` (O, I) with each image (I, C): (N, O, C)."""
    matrix = matrix.astype(x.dtype)
    return lax.platform_dependent(matrix, x, cpu=_side_by_side, default=_image_by_image)


def _image_by_image(matrix: jax.Array, x: jax.Array) -> jax.Array:
    # Without the explicit broadcast XLA would transpose `x`.
    matrix = jnp.broadcast_to(matrix, (x.shape[0], *matrix.shape))
    return lax.dot_general(matrix, x, (((2,), (1,)), ((0,), (0,))))


def _side_by_side(matrix: jax.Array, x: jax.Array) -> jax.Array:
    # In small models one image is too small for an efficient matmul, so join all images, moving
    # contiguous rows of channels. The barrier keeps XLA from transposing the matrix inside the
    # matmul, which is slower.
    matrix = lax.optimization_barrier(matrix)
    product = matrix @ _joined(x)
    return product.reshape(matrix.shape[0], x.shape[0], x.shape[2]).swapaxes(0, 1)


def _joined(x: jax.Array) -> jax.Array:
    """Concatenates each token's channels over all images: (N, S, C) to (S, N * C)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])


def _token_dense_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple:
    return token_dense(x, kernel, bias), (x, kernel)


def _token_dense_backward(
    residuals: tuple, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = residuals

    kernel_grads = lax.platform_dependent(x, grad, cuda=_sums_in_one, default=_sums)
    return _token_product(kernel, grad), *kernel_grads


def _sums(x: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of kernel and bias."""
    return _token_products(x, grad), jnp.sum(grad.astype(jnp.float32), (0, 2))


def _sums_in_one(x: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes `_sums` in one matmul if the padding has room for the bias (`_affine_in_one`)."""
    if not _num_pad_tokens(x):
        return _sums(x, grad)
    products = _token_products(_extended(x), grad)
    return products[: x.shape[1]], products[x.shape[1]]


def _token_products(x: jax.Array, grad: jax.Array) -> jax.Array:
    """Sums the outer products of tokens over images and channels: (I, O) float32."""

    def image_by_image(x: jax.Array, grad: jax.Array) -> jax.Array:
        dimensions = (((2,), (2,)), ((0,), (0,)))
        products = lax.dot_general(x, grad, dimensions, preferred_element_type=jnp.float32)
        return jnp.sum(products, 0)

    def side_by_side(x: jax.Array, grad: jax.Array) -> jax.Array:
        dimensions = (((1,), (1,)), ((), ()))
        x, grad = _joined(x), _joined(grad)
        return lax.dot_general(x, grad, dimensions, preferred_element_type=jnp.float32)

    if min(x.shape[1], grad.shape[1]) < MANY_TOKENS:
        return image_by_image(x, grad)
    return lax.platform_dependent(x, grad, cpu=side_by_side, default=image_by_image)


token_dense.defvjp(_token_dense_forward, _token_dense_backward)


def split_groups(x: jax.Array, num_groups: int) -> jax.Array:
    """Splits the channels of tokens into groups of consecutive channels, and puts the tokens last.

    Returns:
      (G, N, C / G, S) for `x` (N, S, C), where G is `num_groups`.
    """
    n, tokens, channels = x.shape
    return x.reshape(n, tokens, num_groups, channels // num_groups).transpose(2, 0, 3, 1)


def join_groups(x: jax.Array) -> jax.Array:
    """Inverts `split_groups`: (G, N, C / G, S) to (N, S, C)."""
    groups, n, channels, tokens = x.shape
    return x.transpose(1, 3, 0, 2).reshape(n, tokens, groups * channels)


@jax.custom_vjp
def grouped_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Applies an affine map to the last axis, another one for each group, in the dtype of `x`.

    Args:
      x: (G, N, C / G, I).
      kernel: (G, I, O) float32.
      bias: (G, O) float32.

    Returns:
      (G, N, C / G, O).
    """
    product = jnp.einsum("gnci,gio->gnco", x, kernel.astype(x.dtype))
    return product + bias.astype(x.dtype)[:, None, None]


def _grouped_dense_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple:
    return grouped_dense(x, kernel, bias), (x, kernel)


def _grouped_dense_backward(
    residuals: tuple, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = residuals
    x_grad = jnp.einsum("gnco,gio->gnci", grad, kernel.astype(grad.dtype))
    kernel_grad = jnp.einsum("gnci,gnco->gio", x, grad, preferred_element_type=jnp.float32)
    return x_grad, kernel_grad, jnp.sum(grad.astype(jnp.float32), (1, 2))


grouped_dense.defvjp(_grouped_dense_forward, _grouped_dense_backward)


def compiler_options(platform: str) -> dict[str, bool | int]:
    """Returns XLA's options for a platform, for `jax.jit(..., compiler_options=...)`.

    On CPUs, XLA uses vectors of the full width; by default it uses half the width of AVX-512.

    On GPUs, XLA uses cuBLASLt for matmuls, whose epilogues include bias and GELU, and keeps values
    rounded to bfloat16. By default XLA would store the float32 gradient of GELU for the sum that
    follows.
    """
    if platform == "cpu":
        return {"xla_cpu_prefer_vector_width": 512}
    if platform not in ("gpu", "cuda"):
        return {}
    return {"xla_gpu_enable_triton_gemm": False, "xla_allow_excess_precision": False}


def patches(images: jax.Array, patch_size: Size) -> jax.Array:
    """Cuts images (N, H, W, 3) into flattened patches: (N, H / P, W / P, P * P * 3).

    A patch size of two sides cuts patches of that height and width; the number of channels is that
    of the images.
    """
    n, height, width, channels = images.shape
    patch_height, patch_width = pair(patch_size)
    rows, columns = height // patch_height, width // patch_width
    tiles = images.reshape(n, rows, patch_height, columns, patch_width, channels)
    return tiles.swapaxes(2, 3).reshape(n, rows, columns, patch_height * patch_width * channels)
