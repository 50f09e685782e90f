"""RandAugment and AutoAugment on the device, with the same draws and pixels as on the host.

Each example draws its operations. A branch under vmap would compute every operation for every
example. Therefore each operation is one pass over the batch, with an array of strengths, and
changes only the examples that drew it. mixer/data/preprocessing/device.py explains the rounding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mixer.data import philox
from mixer.data.philox import rounded
from mixer.data.preprocessing.device import box, per_image, pixels_at, plane
from mixer.data.preprocessing.policies import (
    CIFAR_POLICY,
    CONVOLUTION,
    FILL,
    GEOMETRY,
    OPERATIONS,
    amount_of_level,
    amount_of_magnitude,
)

# Operations that map each value of a channel to another value, by a lookup table.
POINT = ("invert", "posterize", "solarize", "solarize_add", "brightness", "contrast")
POINT += ("auto_contrast", "equalize")


@dataclasses.dataclass(frozen=True)
class Strength:
    """An operation with its strength and direction for images of one size; float32 as on the host.

    Attributes:
      name: name of the operation; "keep" does not change the image.
      factor: factor of brightness, color, contrast and sharpness.
      number: mask of posterize, threshold of solarize, or addition of solarize_add.
      middle: grey value that contrast blends with; None: the image's mean.
      half_size: half the side of cutout's square, in pixels.
      y: (a, b, c) of a geometric operation: the pixel at (x, y) comes from row a x + b y + c.
      x: the same for the column.
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


def _whole_pixels(share, side) -> np.float32:
    """Converts a share of a side into a whole number of pixels."""
    return np.floor(np.float32(share) * np.float32(side) + np.float32(0.5))


def autoaugment_cifar(images, keys):
    """Applies one of 25 sub-policies to each image: two operations with probabilities and signs."""
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
    """Applies `num_layers` operations to each image, drawn uniformly from the sixteen.

    The host's function describes the arguments.
    """
    strengths = [
        _magnitude_strength(name, magnitude, sign, images.shape[1:3], mode)
        for name in OPERATIONS
        for sign in (-1, 1)
    ]
    draws = philox.uniform(keys, (num_layers, 4)).transpose(1, 2, 0)
    operations = (draws[:, 0] * len(OPERATIONS)).astype(jnp.int32)
    numbers = 2 * operations + (draws[:, 1] >= 0.5)
    return _apply_in_turn(images, strengths, numbers, draws[:, 2:], published=mode == "published")


def _magnitude_strength(name, magnitude, sign, image_size, mode) -> Strength:
    """Returns the operation that `apply_magnitude` in randaugment.py computes on the host."""
    amount = amount_of_magnitude(name, magnitude, np.float32(sign), mode=mode)
    if mode == "published":
        # The published code's lengths are in pixels.
        match name:
            case "translate_x":
                return Strength(name, x=(1.0, 0.0, np.float32(amount)))
            case "translate_y":
                return Strength(name, y=(0.0, 1.0, np.float32(amount)))
            case "cutout":
                return Strength(name, half_size=np.float32(amount))
    strength = _strength(name, amount, image_size)
    if name != "contrast" or mode == "fixed":
        return strength
    height, width = (np.float32(side) for side in image_size)
    middle = np.floor(min(height * width / np.float32(256), np.float32(255)))
    return dataclasses.replace(strength, middle=middle)


def _strength(name, amount, image_size) -> Strength:
    """Returns the operation that `apply_operation` in randaugment.py computes on the host."""
    match name:
        case "auto_contrast" | "equalize" | "invert":
            return Strength(name)
        case "rotate":
            return _rotate(np.float32(amount), image_size)
        case "shear_x":
            return Strength(name, x=(1.0, np.float32(amount), 0.0))
        case "shear_y":
            return Strength(name, y=(np.float32(amount), 1.0, 0.0))
        case "translate_x":
            return Strength(name, x=(1.0, 0.0, _whole_pixels(amount, image_size[1])))
        case "translate_y":
            return Strength(name, y=(0.0, 1.0, _whole_pixels(amount, image_size[0])))
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
    """Returns the mask of the `bits` highest of eight bits; at least one bit is set."""
    return 0xFF00 >> min(max(bits, 1), 8) & 0xFF


def _apply_in_turn(images, strengths, numbers, places=None, published=False):
    """Applies operations `strengths[numbers[0]]` to the images, then `strengths[numbers[1]]`, ...

    Args:
      images: (N, H, W, 3) uint8.
      strengths: the operations to choose from.
      numbers: (L, N) int32, an index into `strengths` for each layer and image.
      places: (L, 2, N) in [0, 1), center of cutout as shares of the height and the width.
      published: whether to round as the published code.
    """

    # A loop keeps XLA from fusing layers, which would recompute a layer for each use.
    def layer(images, draws):
        return _apply(images, strengths, *draws, published), None

    return jax.lax.scan(layer, images, (numbers, places))[0]


def _apply(images, strengths, number, place, published):
    """Applies operation `strengths[number]`, number (N,), to each image; `place` (2, N) or None."""
    names = {strength.name for strength in strengths}

    def is_a(name):  # (N,)
        return jnp.asarray(np.array([s.name == name for s in strengths]))[number]

    def value(field):  # (N,), or (3, N) for the coefficients of x and y
        values = np.array([getattr(s, field) or 0 for s in strengths])
        dtype = jnp.int32 if field == "number" else jnp.float32
        return jnp.asarray(values.T, dtype)[..., number]

    # Each operation changes only the images that drew it, so their order does not matter.
    result = images
    if names & set(GEOMETRY):
        rows, columns = (
            _nearest(plane(images, *value(axis)), side, published)
            for axis, side in zip("yx", images.shape[1:3], strict=True)
        )
        result = pixels_at(result, rows, columns, fill=FILL)
    if names & set(POINT):
        means = any(s.name == "contrast" and s.middle is None for s in strengths)
        result = _look_up(_tables(images, names, is_a, value, means), result)
    if "color" in names:
        pixels = images.astype(jnp.float32)
        coloured = _blend(luminance(pixels, published), pixels, per_image(value("factor")))
        result = jnp.where(per_image(is_a("color")), coloured, result)
    if "sharpness" in names:
        sharp = _sharpen(images, per_image(value("factor")), published)
        result = jnp.where(per_image(is_a("sharpness")), sharp, result)
    if "cutout" in names:
        square = box(
            *(
                _cutout_range(share, side, value("half_size"))
                for share, side in zip(place, images.shape[1:3], strict=True)
            )
        )
        result = jnp.where(square & per_image(is_a("cutout")), np.uint8(FILL), result)
    return result


def _nearest(coordinate, side, published):
    """Rounds to the nearest integer; -1 or `side` if it is outside of the image.

    Halves are rounded up, or away from zero if `published`.
    """
    if published:
        low = jnp.floor(coordinate)
        fraction = coordinate - low
        coordinate = low + ((fraction > 0.5) | ((fraction == 0.5) & (coordinate > 0)))
    framed = jnp.clip(coordinate + np.float32(1.5), 0, np.float32(side + 1))
    return framed.astype(jnp.int32) - 1  # the cast rounds down


def _cutout_range(share, side, half_size):
    """Returns the mask (N, side) of rows or columns closer than half_size to the center."""
    center = jnp.floor(share * np.float32(side))
    low = jnp.floor(center - half_size - np.float32(0.5)) + 1
    high = jnp.ceil(center + half_size - np.float32(0.5))
    number = np.arange(side)
    return (number >= low[:, None]) & (number < high[:, None])


def _tables(images, names, is_a, value, means):
    """Returns the lookup tables of the point operations for each channel, (N, 3, 256) uint8."""
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
        at_most = _count_up_to(images)
        table = enter("auto_contrast", lambda: _stretch_table(at_most, pixels))
        table = enter("equalize", lambda: _equalize_table(at_most, old))
    # Without the barrier, the compiler may recompute an entry for every pixel that uses it.
    return jax.lax.optimization_barrier(table.astype(jnp.uint8))


def _count_up_to(images):
    """Counts the pixels that have each value or a lower value, (N, 3, 256) int32."""

    def counts(image):
        places = (jnp.arange(3), image)
        return jnp.zeros((3, 256), jnp.int32).at[places].add(1, mode="promise_in_bounds")

    # A product with a triangle of ones sums in one kernel; integers below 2^24 are exact.
    upper = np.triu(np.ones((256, 256), np.float32))
    counted = jax.vmap(counts)(images).astype(jnp.float32)
    return jnp.dot(counted, upper, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)


def _stretch_table(at_most, pixels):
    """Returns the table that stretches the values of each channel to the range 0 to 255."""
    count = at_most[..., -1:]
    low = jnp.sum(at_most == 0, -1, keepdims=True)
    high = jnp.sum(at_most < count, -1, keepdims=True)
    scales = np.float32(255) / np.maximum(np.arange(256, dtype=np.float32), 1)
    scale = jnp.where(high > low, jnp.asarray(scales)[high - low], np.float32(1))
    offset = jnp.where(high > low, rounded(-low.astype(jnp.float32) * scale), np.float32(0))
    return _to_uint8(rounded(pixels * scale) + offset)


def _equalize_table(at_most, old):
    """Returns the table that flattens each channel's histogram, with Pillow's arithmetic."""
    count = at_most[..., -1:]
    # The number of pixels below the highest value, divided by 255.
    step = jnp.max(jnp.where(at_most < count, at_most, 0), -1, keepdims=True) // 255
    num_below = jnp.pad(at_most[..., :-1], [(0, 0), (0, 0), (1, 0)])
    new = jnp.minimum((num_below + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, new, old)


def _look_up(tables, images):
    """Returns tables[image, channel, value] for every value of the images."""

    def look_up(table, image):
        return table.at[jnp.arange(3), image].get(mode="promise_in_bounds")

    return jax.vmap(look_up)(tables, images)


def luminance(pixels, published=False):
    """Converts float pixels in 0 to 255 to integral grey values, (N, H, W, 1).

    The host uses a matrix product, which rounds a product and its addition once if the processor
    can (FMA). XLA's compiler does the same if only the first product is rounded separately. The
    published code's product has one column, for which TensorFlow rounds every product.
    """
    red, green, blue = (rounded(pixels[..., i : i + 1] * np.float32(1 / 255)) for i in range(3))
    red, green, blue = (
        color * np.float32(weight)
        for color, weight in ((red, 0.2989), (green, 0.587), (blue, 0.114))
    )
    if published:
        green, blue = rounded(green), rounded(blue)
    return jnp.floor((rounded(red) + green + blue) * np.float32(255.5))


def _mean_luminance(images):
    """Returns the mean grey value of each image, rounded half to even, (N,) float32."""
    height, width = images.shape[1:3]
    grey = luminance(images.astype(jnp.float32)).astype(jnp.int32)
    mean, remainder = jnp.divmod(jnp.sum(grey, (1, 2, 3)), height * width)
    is_rounded_up = (2 * remainder > height * width) | (
        (2 * remainder == height * width) & (mean % 2 == 1)
    )
    return (mean + is_rounded_up).astype(jnp.float32)


def _sharpen(images, factor, published):
    """Blends smoothed images (factor 0) and the images (1); the border does not change."""
    height, width = images.shape[1:3]
    pixels = images.astype(jnp.float32)
    across = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    center = pixels[:, 1:-1, 1:-1]
    # The kernel is ones around a five, divided by 13. Sums of integers are exact.
    total = across[:, :-2] + across[:, 1:-1] + across[:, 2:] + 4 * center
    smooth = jnp.floor(_convolve(pixels) if published else total * np.float32(1 / 13))
    inner = jnp.pad(_blend(smooth, center, factor), [(0, 0), (1, 1), (1, 1), (0, 0)])
    border = np.ones((height, width, 1), bool)
    border[1:-1, 1:-1] = False
    return jnp.where(border, images, inner)


def _convolve(pixels):
    """Smooths as the convolution of the published code, (N, H - 2, W - 2, 3) float32.

    Computes round(total + pixel * weight) for nine weights, row by row. Pixels have 8 bits, and
    weights and totals are multiples of 2^-27, so that every step but the last is exact.
    """
    height, width = pixels.shape[1:3]
    total = jnp.zeros_like(pixels[:, 2:, 2:])
    for (y, x), weight in np.ndenumerate(CONVOLUTION):
        window = pixels[:, y : height - 2 + y, x : width - 2 + x]
        high = np.round(weight * np.float32(2**16)) / np.float32(2**16)
        product = window * high
        new = total + product
        back = new - total
        error = (total - (new - back)) + (product - back)  # of the addition
        total = new + (error + window * (weight - high))
    return total


def _blend(zero, one, factor):
    """Interpolates or extrapolates between two floats by `factor`; returns uint8."""
    return _to_uint8(zero + rounded(factor * (one - zero)))


def _to_uint8(pixels):
    return jnp.clip(pixels, 0, 255).astype(jnp.uint8)  # the cast truncates
