"""Preprocessing on the device: the same draws and pixels as the functions on the host.

An op here has the name and the arguments of the function on the host, and takes a batch: `images`
(N, H, W, 3) uint8 and, if it is random, `keys` (N, 4) uint32 (see mixer/data/philox.py).
RandAugment and AutoAugment choose operations per example. A branch under vmap computes all sides
for all examples, so each operation is one pass over the batch, with an array of strengths, that
changes the examples that chose it.

This code rounds a product before adding to it (`rounded`) where TensorFlow does, and divides no
float by a constant, which compilers turn into a product. Compilers on the CPU then give equal bits.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixer.data import philox
from mixer.data.philox import rounded
from mixer.data.preprocessing import permutation
from mixer.data.preprocessing.policies import (
    CIFAR_POLICY,
    FILL,
    GEOMETRY,
    OPERATIONS,
    amount_of_level,
    amount_of_magnitude,
)
from mixer.data.preprocessing.spec import Specification
from mixer.errors import UserError


def make_augment(spec: Specification, image_size: tuple[int, int]) -> Callable:
    """Builds the function of the ops that a specification leaves to the device.

    Args:
      spec: the whole specification, of which `parts.device` is computed.
      image_size: (H, W) of the images that the host's part gives.

    Returns:
      A function (images (N, H, W, 3) uint8, keys (N, 4) uint32) -> images (N, H', W', 3) uint8, or
      float32 after `value_range`. A key is the example's, as the ops on the host get it:
      `fold_in(make_key(seed, epoch), number)`.

    Raises:
      UserError: an op does not fit images of that size.
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
            jax.ShapeDtypeStruct((1, *image_size, 3), jnp.uint8),
            jax.ShapeDtypeStruct((1, 4), jnp.uint32),
        )
    except ValueError as error:
        raise UserError(f"preprocessing {str(spec)!r}: {error}") from error
    return augment


# Crops, mirrors, orders.


def central_crop(images, size):
    """The window of `size` x `size` pixels in the middle."""
    _check_window(images, size)
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def random_crop(images, keys, size, pad=0):
    """A window of `size` x `size` pixels at a random place, after `pad` black pixels all around."""
    images = jnp.pad(images, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    _check_window(images, size)
    places = np.array(images.shape[1:3]) - size + 1
    corners = (philox.uniform(keys, (2,)) * places.astype(np.float32)).astype(jnp.int32)

    def window(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, 3))

    return jax.vmap(window)(images, corners)


def _check_window(images, size):
    if min(images.shape[1:3]) < size:
        raise ValueError(f"a crop of {size} pixels from an image of {list(images.shape[1:3])}")


def flip_lr(images, keys):
    """Mirrors half of the images left to right."""
    return jnp.where(_per_image(philox.uniform(keys) < 0.5), images[:, :, ::-1], images)


def permute_patches(images, size, patch_size, seed=0):
    """Shuffles the patches, and all patches' pixels alike, by one permutation for every image."""
    sides = _check_sides(images, size)
    return _reordered(images, permutation.patch_order(sides, patch_size, seed=seed))


def permute_pixels(images, size, seed=0):
    """Shuffles all pixels by one permutation for every image."""
    return _reordered(images, permutation.pixel_order(_check_sides(images, size), seed=seed))


def _check_sides(images, size):
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if images.shape[1:3] != sides:
        raise ValueError(f"a permutation of {list(sides)} of an image of {images.shape[1:3]}")
    return sides


def _reordered(images, order):
    return images.reshape(len(images), -1, 3)[:, order].reshape(images.shape)


def value_range(images, low=-1.0, high=1.0):
    """Maps 0 to `low` and 255 to `high`, as float32."""
    scaled = images.astype(jnp.float32) * np.float32((high - low) / 255)
    return rounded(scaled) + np.float32(low)


# Random affine maps and erasing.


def random_affine(images, keys, degrees=0.0, translate=0.0, scale=0.0, shear=0.0):
    """A small random affine map around each image's middle; bilinear, black outside.

    Degrees, `translate` in pixels, `scale` and `shear` bound uniform draws, as on the host.
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
    return _bilinear(images, _plane(images, c, d, shift_y), _plane(images, a, b, shift_x))


def _exp(exponent, bound):
    """The exponential of float32 numbers within +-bound, the last bit right almost always.

    XLA's is off by one in a tenth of the cases, the C library's, TensorFlow's, hardly ever. From
    the nearest of 2^8 points a unit, whose exponential is a sum of two floats, it is not far.
    """
    ends = math.ceil(abs(bound) * 256) + 1
    exact = np.exp(np.arange(-ends, ends + 1) / 256)
    coarse = exact.astype(np.float32)
    fine = (exact - coarse).astype(np.float32)
    nearest_point = jnp.round(exponent * 256)
    rest = exponent - nearest_point * np.float32(1 / 256)  # exact
    point = nearest_point.astype(jnp.int32) + ends
    growth = rest + rest * rest * (np.float32(0.5) + rest * np.float32(1 / 6))
    base = jnp.asarray(coarse)[point]
    return base + (jnp.asarray(fine)[point] + base * growth)


def _plane(images, of_x, of_y, shift):
    """of_x * x + of_y * y + shift at every pixel: (N, H, W) float32."""
    y, x = _pixel_grid(images)
    of_x, of_y, shift = (value[:, None, None] for value in (of_x, of_y, shift))
    return rounded(of_x * x) + rounded(of_y * y) + shift


def _pixel_grid(images):
    """Row and column numbers: (H, 1) and (1, W) float32."""
    height, width = images.shape[1:3]
    return np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]


def _bilinear(images, y, x):
    """The images at (y, x), each (N, H, W), between the four pixels around; 0 outside."""
    y_low, x_low = jnp.floor(y), jnp.floor(x)
    rows = []
    for row in (y_low, y_low + 1):
        left, right = (
            _pixels_at(images, row, column, fill=0).astype(jnp.float32)
            for column in (x_low, x_low + 1)
        )
        low, high = (x_low + 1 - x)[..., None], (x - x_low)[..., None]
        rows.append(rounded(low * left) + rounded(high * right))
    low, high = (y_low + 1 - y)[..., None], (y - y_low)[..., None]
    return jnp.round(rounded(low * rows[0]) + rounded(high * rows[1])).astype(jnp.uint8)


def _pixels_at(images, y, x, *, fill):
    """The pixels of row y and column x, whole numbers (N, H, W); `fill` outside the image."""
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
    """Erases a random rectangle of some of the images: the first of ten drawn that fits.

    See the function on the host for the arguments; `fill` is "noise" or a value 0 to 255.
    """
    own = jnp.moveaxis(philox.split(keys), 1, 0)
    height, width = images.shape[1:3]
    draws = philox.uniform(own[0], (41,))
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
    erased = (draws[:, 0] < prob) & jnp.any(fits, 1)
    box = _box(*inside) & _per_image(erased)
    if fill == "noise":
        value = philox.integers(own[1], images.shape[1:], 0, 256).astype(jnp.uint8)
    else:
        value = np.uint8(fill)
    return jnp.where(box, value, images)


def _box(rows, columns):
    """Of rows (N, H) and columns (N, W): (N, H, W, 1)."""
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def _per_image(values):
    """(N,) to (N, 1, 1, 1)."""
    return values[:, None, None, None]


# The operations of RandAugment and AutoAugment.

# What maps each value of a channel to another one.
POINT = ("invert", "posterize", "solarize", "solarize_add", "brightness", "contrast")
POINT += ("auto_contrast", "equalize")


@dataclasses.dataclass(frozen=True)
class Strength:
    """An operation of given strength and direction, on images of one size; float32 as on the host.

    Attributes:
      name: the operation; "keep" leaves the image as it is.
      factor: of brightness, color, contrast and sharpness.
      number: posterize's mask, solarize's threshold, solarize_add's addition.
      middle: the grey that contrast blends with; None: the image's mean.
      half_size: of cutout's square, in pixels.
      y: where a geometric operation takes a pixel's row from: its slope along x, that along y, and
        its value in the corner.
      x: the same of the column.
    """

    name: str
    factor: float = 0.0
    number: int = 0
    middle: float | None = 0.0
    half_size: float = 0.0
    y: tuple[float, float, float] = (0.0, 1.0, 0.0)
    x: tuple[float, float, float] = (1.0, 0.0, 0.0)


def _rotate(degrees, image_size) -> Strength:
    angle = degrees * np.float32(math.pi / 180)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    bottom, right = (np.float32(side - 1) for side in image_size)
    shift_y = (bottom - (sin * right + cos * bottom)) / np.float32(2)
    shift_x = (right - (cos * right - sin * bottom)) / np.float32(2)
    return Strength("rotate", y=(sin, cos, shift_y), x=(cos, -sin, shift_x))


def _shear(name, amount) -> Strength:
    if name == "shear_x":
        return Strength(name, x=(1.0, amount, 0.0))
    return Strength(name, y=(amount, 1.0, 0.0))


def _translate(name, share, image_size) -> Strength:
    """By a share (float32) of the side, rounded to whole pixels."""
    pixels = np.floor(share * np.float32(image_size[name == "translate_x"]) + np.float32(0.5))
    if name == "translate_x":
        return Strength(name, x=(1.0, 0.0, pixels))
    return Strength(name, y=(0.0, 1.0, pixels))


def autoaugment_cifar(images, keys):
    """One of the 25 sub-policies an image: two operations, each of its own probability and sign."""
    strengths = [Strength("keep")]
    for layer in (0, 1):
        for policy in CIFAR_POLICY:
            name, _, level = policy[layer]
            amounts = [amount_of_level(name, level, np.float32(sign)) for sign in (-1, 1)]
            strengths += [_strength(name, amount, images.shape[1:3]) for amount in amounts]
    draws = philox.uniform(keys, (5,)).T
    chosen = (draws[0] * len(CIFAR_POLICY)).astype(jnp.int32)
    chances = np.array([[chance for _, chance, _ in policy] for policy in CIFAR_POLICY], np.float32)
    applies = draws[1:3] < jnp.asarray(chances.T)[:, chosen]
    first = 1 + 2 * len(CIFAR_POLICY) * np.arange(2)[:, None]
    numbers = jnp.where(applies, first + 2 * chosen + (draws[3:5] >= 0.5), 0)
    return _apply_in_turn(images, strengths, numbers)


def randaugment(images, keys, num_layers=2, magnitude=10, mode="faithful"):
    """`num_layers` operations an image, each drawn uniformly from the sixteen and always applied.

    See the function on the host for the arguments.
    """
    strengths = [
        _magnitude_strength(name, magnitude, sign, images.shape[1:3], mode == "faithful")
        for name in OPERATIONS
        for sign in (-1, 1)
    ]
    draws = philox.uniform(keys, (num_layers, 4)).transpose(1, 2, 0)
    operations = (draws[:, 0] * len(OPERATIONS)).astype(jnp.int32)
    return _apply_in_turn(images, strengths, 2 * operations + (draws[:, 1] >= 0.5), draws[:, 2:])


def _magnitude_strength(name, magnitude, sign, image_size, faithful) -> Strength:
    """An operation as `apply_magnitude` of mixer/data/preprocessing/randaugment.py makes it."""
    amount = amount_of_magnitude(name, magnitude, np.float32(sign), faithful=faithful)
    strength = _strength(name, amount, image_size)
    if name != "contrast" or not faithful:
        return strength
    height, width = (np.float32(side) for side in image_size)
    middle = np.floor(min(height * width / np.float32(256), np.float32(255)))
    return dataclasses.replace(strength, middle=middle)


def _strength(name, amount, image_size) -> Strength:
    """An operation as `apply_operation` of mixer/data/preprocessing/randaugment.py computes it."""
    match name:
        case "auto_contrast" | "equalize" | "invert":
            return Strength(name)
        case "rotate":
            return _rotate(np.float32(amount), image_size)
        case "shear_x" | "shear_y":
            return _shear(name, np.float32(amount))
        case "translate_x" | "translate_y":
            return _translate(name, np.float32(amount), image_size)
        case "posterize":
            return Strength(name, number=_mask(amount))
        case "solarize":
            return Strength(name, number=amount)
        case "solarize_add":
            return Strength(name, number=min(amount, 255))
        case "cutout":
            return Strength(name, half_size=np.float32(amount) * np.float32(image_size[1]))
    return Strength(name, factor=np.float32(amount), middle=None)


def _mask(bits):
    """Of the `bits` highest of eight bits, one at least."""
    return 0xFF00 >> min(max(bits, 1), 8) & 0xFF


def _apply_in_turn(images, strengths, numbers, places=None):
    """Operations `strengths[numbers[0]]` on the images, then `strengths[numbers[1]]`, ...

    Args:
      images: (N, H, W, 3) uint8.
      strengths: what there is to choose from.
      numbers: (L, N) int32.
      places: (L, 2, N) in [0, 1): where cutout strikes, as shares of the height and the width.
    """

    # A loop: without it one layer is joined to the next, and computed for each use that has of it.
    def layer(images, draws):
        return _apply(images, strengths, *draws), None

    return jax.lax.scan(layer, images, (numbers, places))[0]


def _apply(images, strengths, number, place):
    """Operation `strengths[number]` (N,) on each image; `place` (2, N) or None."""
    names = {strength.name for strength in strengths}

    def is_a(name):  # (N,)
        return jnp.asarray(np.array([s.name == name for s in strengths]))[number]

    def value(field):  # (N,), or (3, N) of a plane
        values = np.array([getattr(s, field) or 0 for s in strengths])
        dtype = jnp.int32 if field == "number" else jnp.float32
        return jnp.asarray(values.T, dtype)[..., number]

    # Each operation leaves the images alone that are not its own, so all follow upon each other.
    result = images
    if names & set(GEOMETRY):
        rows, columns = (
            _nearest(_plane(images, *value(axis)), side)
            for axis, side in zip("yx", images.shape[1:3], strict=True)
        )
        result = _pixels_at(result, rows, columns, fill=FILL)
    if names & set(POINT):
        means = any(s.name == "contrast" and s.middle is None for s in strengths)
        result = _looked_up(_tables(images, names, is_a, value, means), result)
    if "color" in names:
        pixels = images.astype(jnp.float32)
        coloured = _blend(luminance(pixels), pixels, _per_image(value("factor")))
        result = jnp.where(_per_image(is_a("color")), coloured, result)
    if "sharpness" in names:
        sharp = _sharpened(images, _per_image(value("factor")))
        result = jnp.where(_per_image(is_a("sharpness")), sharp, result)
    if "cutout" in names:
        square = _box(
            *(
                _cut(share, side, value("half_size"))
                for share, side in zip(place, images.shape[1:3], strict=True)
            )
        )
        result = jnp.where(square & _per_image(is_a("cutout")), np.uint8(FILL), result)
    return result


def _nearest(coordinate, side):
    """The nearest whole number, -1 or `side` where that lies outside."""
    framed = jnp.clip(coordinate + np.float32(1.5), 0, np.float32(side + 1))
    return framed.astype(jnp.int32) - 1  # the cast rounds down


def _cut(share, side, half_size):
    """The rows, or columns, whose middle is nearer than half_size to a point: (N, side)."""
    center = jnp.floor(share * np.float32(side))
    low = jnp.floor(center - half_size - np.float32(0.5)) + 1
    high = jnp.ceil(center + half_size - np.float32(0.5))
    number = np.arange(side)
    return (number >= low[:, None]) & (number < high[:, None])


def _tables(images, names, is_a, value, means):
    """What each value of each channel becomes by the point operations: (N, 3, 256) uint8."""
    table = old = jnp.broadcast_to(jnp.arange(256), (len(images), 3, 256))
    pixels = old.astype(jnp.float32)
    number, factor = (value(field)[:, None, None] for field in ("number", "factor"))

    def enter(name, new):
        return jnp.where(is_a(name)[:, None, None], new(), table) if name in names else table

    table = enter("invert", lambda: 255 - old)
    table = enter("posterize", lambda: old & number)
    table = enter("solarize", lambda: jnp.where(old < number, old, 255 - old))
    table = enter("solarize_add", lambda: jnp.where(old < 128, jnp.minimum(old + number, 255), old))
    table = enter("brightness", lambda: _to_uint8(pixels * factor))
    if "contrast" in names:
        middle = _mean_luminance(images) if means else value("middle")
        table = enter("contrast", lambda: _blend(middle[:, None, None], pixels, factor))
    if names & {"auto_contrast", "equalize"}:
        at_most = _at_most(images)
        table = enter("auto_contrast", lambda: _stretched(at_most, pixels))
        table = enter("equalize", lambda: _equalized(at_most, old))
    # Else the compiler may compute an entry anew for every pixel that looks it up.
    return jax.lax.optimization_barrier(table.astype(jnp.uint8))


def _at_most(images):
    """How many pixels have each value or a lower one, by channel: (N, 3, 256) int32."""

    def counts(image):
        places = (jnp.arange(3), image)
        return jnp.zeros((3, 256), jnp.int32).at[places].add(1, mode="promise_in_bounds")

    # Sums by a matrix of ones: exact, being whole numbers below 2^24, and a single kernel.
    upper = np.triu(np.ones((256, 256), np.float32))
    counted = jax.vmap(counts)(images).astype(jnp.float32)
    return jnp.dot(counted, upper, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)


def _stretched(at_most, pixels):
    """The table that stretches each channel's values to the range 0 to 255."""
    count = at_most[..., -1:]
    low = jnp.sum(at_most == 0, -1, keepdims=True)
    high = jnp.sum(at_most < count, -1, keepdims=True)
    scales = np.float32(255) / np.maximum(np.arange(256, dtype=np.float32), 1)
    scale = jnp.where(high > low, jnp.asarray(scales)[high - low], np.float32(1))
    offset = jnp.where(high > low, rounded(-low.astype(jnp.float32) * scale), np.float32(0))
    return _to_uint8(rounded(pixels * scale) + offset)


def _equalized(at_most, old):
    """The table that flattens each channel's histogram, with Pillow's integer arithmetic."""
    count = at_most[..., -1:]
    # All but the pixels of the highest value, shared among the other 255.
    step = jnp.max(jnp.where(at_most < count, at_most, 0), -1, keepdims=True) // 255
    below = jnp.pad(at_most[..., :-1], [(0, 0), (0, 0), (1, 0)])
    new = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, new, old)


def _looked_up(tables, images):
    """tables[image, channel, value] for every value of the images."""

    def look_up(table, image):
        return table.at[jnp.arange(3), image].get(mode="promise_in_bounds")

    return jax.vmap(look_up)(tables, images)


def luminance(pixels):
    """Grey version of float pixels in 0 to 255: whole numbers, (N, H, W, 1).

    The host's is a matrix product, which rounds once for a product and the sum it is added to where
    the processor can: so will the compiler's, if only the first product is rounded by itself.
    """
    red, green, blue = (rounded(pixels[..., i : i + 1] * np.float32(1 / 255)) for i in range(3))
    grey = rounded(red * np.float32(0.2989)) + green * np.float32(0.587)
    return jnp.floor((grey + blue * np.float32(0.114)) * np.float32(255.5))


def _mean_luminance(images):
    """The mean grey of each image, rounded to a whole number, halves to even: (N,) float32."""
    height, width = images.shape[1:3]
    grey = luminance(images.astype(jnp.float32)).astype(jnp.int32)
    whole, rest = jnp.divmod(jnp.sum(grey, (1, 2, 3)), height * width)
    up = (2 * rest > height * width) | ((2 * rest == height * width) & (whole % 2 == 1))
    return (whole + up).astype(jnp.float32)


def _sharpened(images, factor):
    """Blends smoothed images (factor 0) and the images (1); the border is kept."""
    height, width = images.shape[1:3]
    pixels = images.astype(jnp.float32)
    across = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    center = pixels[:, 1:-1, 1:-1]
    # Ones around a five, over 13; sums of whole numbers are exact.
    total = across[:, :-2] + across[:, 1:-1] + across[:, 2:] + 4 * center
    smooth = jnp.floor(total * np.float32(1 / 13))
    inner = jnp.pad(_blend(smooth, center, factor), [(0, 0), (1, 1), (1, 1), (0, 0)])
    border = np.ones((height, width, 1), bool)
    border[1:-1, 1:-1] = False
    return jnp.where(border, images, inner)


def _blend(zero, one, factor):
    """At `factor` between two floats, or beyond, as uint8."""
    return _to_uint8(zero + rounded(factor * (one - zero)))


def _to_uint8(pixels):
    return jnp.clip(pixels, 0, 255).astype(jnp.uint8)  # the cast truncates
