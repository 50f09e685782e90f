"""RandAugment on the host (Cubuk et al., 2020): sixteen operations, and the op that draws them.

Each operation maps an (H, W, 3) uint8 image to another. Geometric operations sample the nearest
pixel and fill uncovered pixels with grey (128). `published` gives the pixels of the published Mixer
recipe (big_vision's code, `mlp_mixer_i1k`); docs/preprocessing.md describes all modes.
"""

import functools
import math

import numpy as np
import tensorflow as tf

from mixer.data.preprocessing.policies import (
    CONVOLUTION,
    FILL,
    GEOMETRY,
    OPERATIONS,
    amount_of_magnitude,
)

# Point operations. TensorFlow vectorizes arithmetic on uint8 and float32 (15 us for 224 x 224
# pixels), but not tf.where and tf.gather of single values (400 to 1000 us).


def invert(image):
    """Subtracts each value from 255."""
    return 255 - image


def posterize(image, bits):
    """Keeps the highest `bits` bits (1 to 8) of each value."""
    shift = 8 - min(max(bits, 1), 8)
    return tf.bitwise.bitwise_and(image, tf.constant(0xFF >> shift << shift, tf.uint8))


def solarize(image, threshold):
    """Inverts values of at least `threshold` (0 to 256)."""
    if threshold > 255:
        return tf.identity(image)
    return tf.bitwise.bitwise_xor(image, _mask(image >= tf.constant(threshold, tf.uint8)))


def solarize_add(image, addition):
    """Adds `addition` to values below 128; sums are limited to 255."""
    room = tf.minimum(255 - image, tf.constant(min(addition, 255), tf.uint8))
    return image + tf.bitwise.bitwise_and(room, _mask(image < tf.constant(128, tf.uint8)))


def _mask(condition):
    """Returns uint8 with all bits set if `condition` is true, else 0."""
    return tf.cast(condition, tf.uint8) * 255


def brightness(image, factor):
    """Blends black (factor 0) and the image (1); factors above 1 brighten."""
    return _to_uint8(tf.cast(image, tf.float32) * factor)


def contrast(image, factor, middle=None):
    """Blends a grey image (factor 0) and the image (1); factors above 1 add contrast.

    Args:
      image: (H, W, 3) uint8.
      factor: weight of the image.
      middle: value of the grey image; None: the mean luminance, rounded to an integer.
    """
    if middle is None:
        middle = tf.round(tf.reduce_mean(_luminance(tf.cast(image, tf.float32))))
    return _blend(middle, tf.cast(image, tf.float32), factor)


def auto_contrast(image):
    """Stretches the values of each channel to the range 0 to 255."""
    rows = tf.cast(_rows(image), tf.float32)
    low, high = _by_channel(tf.reduce_min, rows), _by_channel(tf.reduce_max, rows)
    scale = tf.where(high > low, 255.0 / (high - low), 1.0)
    offset = tf.where(high > low, -low * scale, 0.0)
    # Complete rows are used as vectors, because adding a vector of three to each pixel is slow.
    width = tf.shape(image)[1]
    stretched = rows * tf.tile(scale, [width]) + tf.tile(offset, [width])
    return tf.reshape(_to_uint8(stretched), tf.shape(image))


def equalize(image):
    """Flattens each channel's histogram, with Pillow's integer arithmetic."""
    size = tf.shape(image)[0] * tf.shape(image)[1]
    # Indices into the concatenated tables of the three channels.
    places = tf.cast(_rows(image), tf.int32) + tf.tile(256 * tf.range(3), [tf.shape(image)[1]])
    places = tf.reshape(places, [-1])
    counts = tf.raw_ops.Bincount(arr=places, size=768, weights=tf.constant([], tf.int32))
    counts = tf.reshape(counts, [3, 256])
    last = tf.reduce_max(tf.where(counts > 0, tf.range(256), 0), 1, keepdims=True)
    step = (size - tf.gather(counts, last, batch_dims=1)) // 255
    num_below = tf.cumsum(counts, 1, exclusive=True)
    tables = tf.minimum((num_below + step // 2) // tf.maximum(step, 1), 255)
    tables = tf.cast(tf.where(step > 0, tables, tf.range(256)), tf.uint8)
    values = tf.gather_nd(tf.reshape(tables, [-1]), places[:, None])  # faster than tf.gather
    return tf.reshape(values, tf.shape(image))


def _rows(image):
    """Reshapes (H, W, 3) to (H, 3 W)."""
    return tf.reshape(image, [tf.shape(image)[0], -1])


def _by_channel(reduce, rows):
    """Reduces (H, 3 W) over the pixels to (3,)."""
    return reduce(tf.reshape(reduce(rows, 0), [-1, 3]), 0)


def _blend(zero, one, factor):
    """Interpolates or extrapolates between two float images; returns (H, W, 3) uint8."""
    return _to_uint8(zero + factor * (one - zero))


def _to_uint8(image):
    return tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8)  # the cast truncates


# Operations that mix channels or neighbouring pixels.


def _luminance(pixels):
    """Converts float pixels in 0 to 255 to integral grey values, equal in the three channels.

    It scales by 255 and 255.5 as tf.image.rgb_to_grayscale does.
    """
    weights = tf.constant([[0.2989], [0.587], [0.114]]) * tf.ones([1, 3])
    grey = tf.linalg.matmul(tf.reshape(pixels * (1 / 255), [-1, 3]), weights)
    return tf.reshape(tf.floor(grey * 255.5), tf.shape(pixels))


def color(image, factor, published=False):
    """Blends the grey image (factor 0) and the image (1); factors above 1 add saturation."""
    pixels = tf.cast(image, tf.float32)
    if published:
        grey = tf.cast(tf.image.rgb_to_grayscale(image), tf.float32)
    else:
        grey = _luminance(pixels)
    return _blend(grey, pixels, factor)


def sharpness(image, factor, published=False):
    """Blends a smoothed image (factor 0) and the image (1); the border does not change.

    With `published`, the published code's convolution smooths. It rounds each addition, so that
    some quotients end just below a whole number.
    """
    rows = _rows(image)
    center = tf.cast(rows[1:-1, 3:-3], tf.float32)
    smooth = tf.floor(_convolve(rows) if published else _sums(rows) * (1 / 13))
    inner = tf.concat([rows[1:-1, :3], _blend(smooth, center, factor), rows[1:-1, -3:]], 1)
    return tf.reshape(tf.concat([rows[:1], inner, rows[-1:]], 0), tf.shape(image))


def _sums(rows):
    """Weights each value's neighbours with ones and itself with five, (H - 2, 3 W - 6) float32."""
    pixels = tf.cast(rows, tf.float32)
    sums = pixels[:, :-6] + pixels[:, 3:-3] + pixels[:, 6:]
    return sums[:-2] + sums[1:-1] + sums[2:] + 4 * pixels[1:-1, 3:-3]


def _convolve(rows):
    """Computes `_sums` / 13 as the published code's convolution, which rounds every addition.

    The convolution adds nine products, row by row, and rounds a product and its addition once
    (FMA). float64 holds both exactly, so the cast is the only rounding on every processor.
    """
    height, width = tf.unstack(tf.shape(rows) - (2, 6))
    pixels = tf.cast(rows, tf.float64)
    total = tf.zeros([height, width])
    for (y, x), weight in np.ndenumerate(CONVOLUTION):
        product = pixels[y : y + height, 3 * x : 3 * x + width] * float(weight)
        total = tf.cast(tf.cast(total, tf.float64) + product, tf.float32)
    return total


# Geometric operations compute the source of each output pixel.


def rotate(image, degrees, published=False):
    """Rotates counter-clockwise around the center."""
    angle = tf.cast(degrees, tf.float32) * (math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    y, x = _grid(image)
    bottom, right = y[-1, 0], x[0, -1]
    shift_y = (bottom - (sin * right + cos * bottom)) / 2
    shift_x = (right - (cos * right - sin * bottom)) / 2
    rows, columns = sin * x + cos * y + shift_y, cos * x - sin * y + shift_x
    return _sample(image, rows, columns, published)


def shear_x(image, amount, published=False):
    """Moves row y to the left by `amount` * y pixels."""
    y, x = _grid(image)
    return _sample(image, y, x + amount * y, published)


def shear_y(image, amount, published=False):
    """Moves column x up by `amount` * x pixels."""
    y, x = _grid(image)
    return _sample(image, y + amount * x, x, published)


def translate_x(image, pixels, published=False):
    """Moves the image to the left by `pixels`, rounded to an integer."""
    if published:
        y, x = _grid(image)
        return _sample(image, y, x + pixels, published)
    return _shift(image, 0, pixels)


def translate_y(image, pixels, published=False):
    """Moves the image up by `pixels`, rounded to an integer."""
    if published:
        y, x = _grid(image)
        return _sample(image, y + pixels, x, published)
    return _shift(image, pixels, 0)


def _shift(image, up, left):
    shift = tf.stack(
        [tf.cast(tf.floor(tf.cast(n, tf.float32) + 0.5), tf.int32) for n in (up, left)]
    )
    shift = tf.clip_by_value(shift, -tf.shape(image)[:2], tf.shape(image)[:2])
    room = tf.concat([tf.abs(shift), [0]], 0)
    framed = tf.pad(image, tf.stack([room, room], 1), constant_values=FILL)
    begin = tf.concat([tf.abs(shift) + shift, [0]], 0)
    return tf.slice(framed, begin, tf.shape(image))


def _grid(image):
    """Returns the coordinates y (H, 1) and x (1, W) of the pixels, float32."""
    shape = tf.cast(tf.shape(image), tf.float32)
    return tf.range(shape[0])[:, None], tf.range(shape[1])[None]


def _sample(image, y, x, published):
    """Samples the pixels nearest to (y, x), both (H or 1, W or 1); grey outside.

    Halves are rounded up. With `published`, they are rounded away from zero, so that a coordinate
    of -0.5 is outside of the image. tf.raw_ops.ImageProjectiveTransformV3 computes the published
    form in three times the time.
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    framed = tf.pad(image, [[1, 1], [1, 1], [0, 0]], constant_values=FILL)

    def nearest(coordinate, size):  # in the framed image; the cast rounds because a half is added
        if published:
            coordinate = _round_half_away(coordinate)
        end = tf.cast(size, tf.float32) + 1
        return tf.cast(tf.clip_by_value(coordinate + 1.5, 0.0, end), tf.int32)

    places = nearest(y, height) * (width + 2) + nearest(x, width)
    return tf.gather_nd(tf.reshape(framed, [-1, 3]), places[..., None])


def _round_half_away(coordinate):
    """Rounds to the nearest integer, and halves away from zero, as C++'s std::round."""
    low = tf.floor(coordinate)
    fraction = coordinate - low
    is_up = (fraction > 0.5) | ((fraction == 0.5) & (coordinate > 0))
    return low + tf.cast(is_up, tf.float32)


def cutout(image, center_y, center_x, half_size):
    """Fills a square of side 2 * `half_size` around a point with grey, inside the image."""
    height, width = tf.unstack(tf.shape(image)[:2])

    def ends(center, size):  # of the range of pixels that are closer than half_size
        low = tf.floor(center - half_size - 0.5) + 1
        high = tf.math.ceil(center + half_size - 0.5)
        return [tf.clip_by_value(tf.cast(end, tf.int32), 0, size) for end in (low, high)]

    top, bottom = ends(center_y, height)
    left, right = ends(center_x, width)
    grey = tf.fill([bottom - top, right - left, 3], tf.constant(FILL, tf.uint8))
    middle = tf.concat([image[top:bottom, :left], grey, image[top:bottom, right:]], 1)
    return tf.concat([image[:top], middle, image[bottom:]], 0)


# Operations with another form in the published code.
PUBLISHED_FORMS = (*GEOMETRY, "color", "sharpness")


def apply_operation(image, name, amount, *, place=(0.5, 0.5), middle=None, published=False):
    """Applies an operation of a policy.

    Args:
      image: (H, W, 3) uint8.
      name: name of the operation.
      amount: amount from mixer/data/preprocessing/policies.py; lengths are shares of the sides, or
        pixels if `published`.
      place: (y, x) in [0, 1), center of cutout.
      middle: as in `contrast`.
      published: whether to compute the pixels of the published code.
    """
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    if name in ("translate_x", "translate_y", "cutout") and not published:
        amount = amount * (height if name == "translate_y" else width)
    match name:
        case "contrast":
            return contrast(image, amount, middle)
        case "cutout":
            y, x = place[0] * height, place[1] * width
            return cutout(image, tf.floor(y), tf.floor(x), amount)
    operation = globals()[name]
    if published and name in PUBLISHED_FORMS:
        return operation(image, amount, published=True)
    return operation(image) if amount is None else operation(image, amount)


def apply_magnitude(image, name, magnitude, *, mode="faithful", sign=1.0, place=(0.5, 0.5)):
    """Applies an operation of RandAugment.

    Args:
      image: (H, W, 3) uint8.
      name: one of OPERATIONS.
      magnitude: as in `amount_of_magnitude`.
      mode: as in `randaugment`.
      sign: direction of geometric operations, -1.0 or 1.0.
      place: (y, x) in [0, 1), center of cutout.
    """
    middle = None
    if name == "contrast" and mode != "fixed":
        # The published recipe uses the sum of the histogram (the number of pixels) as the mean.
        height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
        middle = tf.floor(tf.minimum(height * width / 256, 255.0))
    amount = amount_of_magnitude(name, magnitude, sign, mode=mode)
    return apply_operation(
        image, name, amount, place=place, middle=middle, published=mode == "published"
    )


def choose(number, branches, image, **arguments):
    """Computes `branches[number](image, **arguments)`.

    tf.switch_case inlines all branches into the graph, and skipping their nodes takes longer than
    most operations. Here each branch remains a function.
    """
    image = tf.ensure_shape(image, [None, None, 3])
    inputs = {"image": image, **{key: tf.convert_to_tensor(x) for key, x in arguments.items()}}
    signature = {key: tf.TensorSpec(x.shape, x.dtype) for key, x in inputs.items()}

    def function(branch):
        traced = tf.function(lambda values: branch(**values), autograph=False)
        return traced.get_concrete_function(signature)

    (image,) = tf.raw_ops.Case(
        branch_index=number,
        input=tf.nest.flatten(inputs),
        Tout=[tf.uint8],
        branches=[function(branch) for branch in branches],
    )
    return tf.ensure_shape(image, [None, None, 3])


def randaugment(image, key, num_layers=2, magnitude=10, mode="faithful"):
    """Applies `num_layers` operations, drawn uniformly from the sixteen.

    Args:
      image: (H, W, 3) uint8.
      key: stateless key.
      num_layers: number of operations.
      magnitude: as in `amount_of_magnitude`; the paper's ImageNet-1k recipe uses 15.
      mode: "faithful" reproduces the published recipe at 224 pixels with two quirks: contrast
        blends with the constant H * W / 256 instead of the image's mean, and the threshold of
        solarize wraps modulo 256. "fixed" uses the mean and limits the threshold to 256.
        "published" gives the pixels of the published code at every size: as "faithful", but its
        shifts and its cutout are 10 and 8 times the magnitude in pixels, and it rounds as there.
    """
    for draws in tf.unstack(tf.random.stateless_uniform([num_layers, 4], key)):
        sign = tf.where(draws[1] < 0.5, -1.0, 1.0)
        branches = [
            functools.partial(apply_magnitude, name=name, magnitude=magnitude, mode=mode)
            for name in OPERATIONS
        ]
        number = tf.cast(draws[0] * len(OPERATIONS), tf.int32)
        image = choose(number, branches, image, sign=sign, place=draws[2:])
    return image
