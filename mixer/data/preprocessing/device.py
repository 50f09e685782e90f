"""Preprocessing on the device: JAX functions with the same draws and pixels as on the host.

A function here has the name and arguments of the host's function, but takes a batch: `images`
(N, H, W, channels) uint8 and, if it is random, `keys` (N, 4) uint32 (see mixer/data/philox.py).
RandAugment and AutoAugment are in mixer/data/preprocessing/device_policies.py.

For bit-identical results on a CPU, this code rounds a product before an addition (`rounded`) where
TensorFlow does, and divides no float by a constant, which compilers would turn into a product.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixer import sizes
from mixer.data import philox
from mixer.data.philox import rounded
from mixer.data.preprocessing import permutation
from mixer.data.preprocessing.spec import Specification
from mixer.errors import UserError


def make_augment(spec: Specification, image_size: tuple[int, int]) -> Callable:
    """Builds the function for the device's part of a specification.

    Args:
      spec: the complete specification; the function computes `parts.device`.
      image_size: (H, W) of the images after the host's part.

    Returns:
      A function (images (N, H, W, channels) uint8, keys (N, 4) uint32) -> images of the final size,
      uint8, or float32 after `value_range`. The key of an example is the same as on the host:
      `fold_in(make_key(seed, epoch), number)`.

    Raises:
      UserError: an op does not fit images of this size.
    """
    calls = [(call, call.op.device_function) for call in spec.parts.device.calls]

    def augment(images: jax.Array, keys: jax.Array) -> jax.Array:
        for call, function in calls:
            arguments = call.arguments
            if call.op.random:
                arguments = {"keys": philox.fold_in(keys, call.place, bits=32), **arguments}
            images = function(images, **arguments)
        return images

    try:
        jax.eval_shape(
            augment,
            jax.ShapeDtypeStruct((1, *image_size, spec.channels), jnp.uint8),
            jax.ShapeDtypeStruct((1, 4), jnp.uint32),
        )
    except ValueError as error:
        raise UserError(f"preprocessing {str(spec)!r}: {error}") from error
    return augment


# Crops, mirroring and permutations.


def central_crop(images, size):
    """Crops the central window of `size`, the side of a square or (H, W)."""
    height, width = _check_window(images, size)
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]


def random_crop(images, keys, size, pad=0):
    """Pads with `pad` black pixels on all sides, and crops a random window of `size`."""
    images = jnp.pad(images, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    sides = _check_window(images, size)
    places = np.array(images.shape[1:3]) - sides + 1
    corners = (philox.uniform(keys, (2,)) * places.astype(np.float32)).astype(jnp.int32)

    def window(image, corner):
        shape = (*sides, image.shape[-1])
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

    return jax.vmap(window)(images, corners)


def _check_window(images, size):
    """Returns (H, W) of a window that the images contain; otherwise raises ValueError."""
    sides = sizes.pair(size)
    if any(side < part for side, part in zip(images.shape[1:3], sides, strict=True)):
        raise ValueError(f"crop size {size} is larger than the image, {list(images.shape[1:3])}")
    return sides


def flip_lr(images, keys):
    """Mirrors each image left to right with probability 1/2."""
    return jnp.where(per_image(philox.uniform(keys) < 0.5), images[:, :, ::-1], images)


def permute_patches(images, size, patch_size, seed=0):
    """Shuffles the patches, and the pixels within patches, the same way in all images."""
    sides = _check_sides(images, size)
    return _reorder(images, permutation.patch_order(sides, patch_size, seed=seed))


def permute_pixels(images, size, seed=0):
    """Shuffles all pixels by one permutation, the same for all images."""
    return _reorder(images, permutation.pixel_order(_check_sides(images, size), seed=seed))


def _check_sides(images, size):
    sides = sizes.pair(size)
    if images.shape[1:3] != sides:
        raise ValueError(
            f"permutation size {list(sides)} differs from the image, {list(images.shape[1:3])}"
        )
    return sides


def _reorder(images, order):
    return images.reshape(len(images), -1, images.shape[-1])[:, order].reshape(images.shape)


def value_range(images, low=-1.0, high=1.0):
    """Maps 0 to `low` and 255 to `high`, as float32."""
    scaled = images.astype(jnp.float32) * np.float32((high - low) / 255)
    return rounded(scaled) + np.float32(low)


# Random affine maps and erasing.


def random_affine(images, keys, degrees=0.0, translate=0.0, scale=0.0, shear=0.0):
    """Applies a small random affine map around each image's center; bilinear, black outside.

    The arguments bound uniform draws as in the host's function.
    """
    u = philox.uniform(keys, (6,), -1.0, 1.0).T
    angle = u[0] * np.float32(degrees * math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide, high = (_exp(rounded(u[i] * np.float32(scale)), scale) for i in (1, 2))
    slant = u[3] * np.float32(shear)
    a, b = wide * cos, wide * (rounded(slant * cos) - sin)
    c, d = high * sin, high * (rounded(slant * sin) + cos)
    y, x = ((side - 1) / 2 for side in map(np.float32, images.shape[1:3]))
    shift_x = x - rounded(a * x) - rounded(b * y) + rounded(u[4] * np.float32(translate))
    shift_y = y - rounded(c * x) - rounded(d * y) + rounded(u[5] * np.float32(translate))
    return _bilinear(images, plane(images, c, d, shift_y), plane(images, a, b, shift_x))


def _exp(exponent, bound):
    """Computes exp of float32 numbers in +-bound, almost always correct to the last bit.

    XLA's result differs in the last bit in a tenth of the cases; that of the C library, which
    TensorFlow uses, almost never does. This code stores the exponentials of 256 points per unit as
    sums of two floats, and expands around the nearest point.
    """
    ends = math.ceil(abs(bound) * 256) + 1
    exact = np.exp(np.arange(-ends, ends + 1) / 256)
    coarse = exact.astype(np.float32)
    fine = (exact - coarse).astype(np.float32)
    nearest_point = jnp.round(exponent * 256)
    remainder = exponent - nearest_point * np.float32(1 / 256)  # exact
    point = nearest_point.astype(jnp.int32) + ends
    growth = remainder + remainder * remainder * (np.float32(0.5) + remainder * np.float32(1 / 6))
    base = jnp.asarray(coarse)[point]
    return base + (jnp.asarray(fine)[point] + base * growth)


def plane(images, of_x, of_y, shift):
    """Returns of_x * x + of_y * y + shift at every pixel (x, y), (N, H, W) float32."""
    y, x = _pixel_grid(images)
    of_x, of_y, shift = (value[:, None, None] for value in (of_x, of_y, shift))
    return rounded(of_x * x) + rounded(of_y * y) + shift


def _pixel_grid(images):
    """Returns the row numbers (H, 1) and the column numbers (1, W), float32."""
    height, width = images.shape[1:3]
    return np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]


def _bilinear(images, y, x):
    """Samples the images at (y, x), both (N, H, W), with bilinear interpolation; 0 outside."""
    y_low, x_low = jnp.floor(y), jnp.floor(x)
    rows = []
    for row in (y_low, y_low + 1):
        left, right = (
            pixels_at(images, row, column, fill=0).astype(jnp.float32)
            for column in (x_low, x_low + 1)
        )
        low, high = (x_low + 1 - x)[..., None], (x - x_low)[..., None]
        rows.append(rounded(low * left) + rounded(high * right))
    low, high = (y_low + 1 - y)[..., None], (y - y_low)[..., None]
    return jnp.round(rounded(low * rows[0]) + rounded(high * rows[1])).astype(jnp.uint8)


def pixels_at(images, y, x, *, fill):
    """Returns the pixels at integral rows y and columns x (N, H, W); `fill` outside the image."""
    height, width = images.shape[1:3]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    row, column = (
        jnp.clip(value, 0, side - 1).astype(jnp.int32) for value, side in ((y, height), (x, width))
    )
    pixels = jax.vmap(lambda image, r, c: image.at[r, c].get(mode="promise_in_bounds"))(
        images, row, column
    )
    return jnp.where(inside[..., None], pixels, np.uint8(fill))


def random_erasing(
    images, keys, prob=0.25, min_area=0.02, max_area=1 / 3, min_aspect=0.3, fill="noise"
):
    """Erases a random rectangle in some images; the host's function describes the arguments."""
    split_keys = jnp.moveaxis(philox.split(keys), 1, 0)
    height, width = images.shape[1:3]
    draws = philox.uniform(split_keys[0], (41,))
    area, aspect, top, left = jnp.moveaxis(draws[:, 1:].reshape(-1, 4, 10), 1, 0)
    area = rounded(area * np.float32(max_area - min_area)) + np.float32(min_area)
    area = area * np.float32(height * width)
    aspect = jnp.exp((2 * aspect - 1) * np.float32(math.log(min_aspect)))
    high = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    wide = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (high < height) & (wide < width)
    first = jnp.argmax(fits, 1)[:, None]
    inside = []
    for side, place, extent in ((height, top, high), (width, left, wide)):
        place, extent = (jnp.take_along_axis(value, first, 1) for value in (place, extent))
        start = (place * (side - extent + 1).astype(jnp.float32)).astype(jnp.int32)
        number = np.arange(side)
        inside.append((number >= start) & (number < start + extent))
    applies = (draws[:, 0] < prob) & jnp.any(fits, 1)
    is_erased = box(*inside) & per_image(applies)
    if fill == "noise":
        value = philox.integers(split_keys[1], images.shape[1:], 0, 256).astype(jnp.uint8)
    else:
        value = np.uint8(fill)
    return jnp.where(is_erased, value, images)


def box(rows, columns):
    """Returns the mask (N, H, W, 1) of pixels whose row (N, H) and column (N, W) are set."""
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def per_image(values):
    """Reshapes (N,) to (N, 1, 1, 1)."""
    return values[:, None, None, None]
