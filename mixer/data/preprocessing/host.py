"""Preprocessing on the host: functions that apply ops to one example with TensorFlow.

A config names the ops, as in "inception_crop(224)|flip_lr"; mixer/data/preprocessing/ops.py
declares them. An op is a pure function of the image (`one_hot`: of the example), its arguments and,
if it is random, a stateless key: the same image and key give the same pixels. Images stay uint8
unless `value_range` is the last op; otherwise the device converts them to floats.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from mixer import sizes
from mixer.data.preprocessing import permutation
from mixer.data.preprocessing.decoding import DCT, as_channels, decode, orientation_of
from mixer.data.preprocessing.ops import Kind
from mixer.data.preprocessing.spec import Specification, parse

# `resize_small` produces more than MOST_RESIZED pixels only if the aspect is at most MOST_ASPECT.
MOST_RESIZED, MOST_ASPECT = 1 << 21, 8
# Aspects of inception_crop's window: ours, and TensorFlow's defaults, which the authors' code uses.
ASPECTS, PUBLISHED_ASPECTS = (3 / 4, 4 / 3), (0.75, 1.33)


def inception_crop(
    image, key, size, min_area=0.05, max_area=1.0, dct="fast", published=False, channels=3
):
    """Crops a random window of 5 to 100 % of the area and aspect 3/4 to 4/3; resizes it to `size`.

    Of an upright JPEG, only the window is decoded. Resizing is bilinear without antialiasing
    (Szegedy et al., 2014; big_vision, `mlp_mixer_i1k`). With `published`, the aspect is 0.75 to
    1.33, and values are truncated, as in big_vision. `channels` is that of `decode`.
    """
    window = inception_window(image, key, min_area, max_area, dct, published, channels)
    return resize(window, size, published=published)


def inception_window(
    image, key, min_area=0.05, max_area=1.0, dct="fast", published=False, channels=3
):
    """Returns the window of `inception_crop` before it is resized, (h, w, channels) uint8."""

    def window(shape):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            tf.zeros([1, 0, 4]),
            seed=key,
            min_object_covered=0.0,
            aspect_ratio_range=PUBLISHED_ASPECTS if published else ASPECTS,
            area_range=(min_area, max_area),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        return begin[0], begin[1], extent[0], extent[1]

    def from_pixels(pixels):
        top, left, height, width = window(tf.shape(pixels))
        return pixels[top : top + height, left : left + width]

    def from_jpeg():
        box = tf.stack(window(tf.io.extract_jpeg_shape(image)))
        pixels = tf.image.decode_and_crop_jpeg(image, box, channels=3, dct_method=DCT[dct])
        return as_channels(pixels, channels)

    def is_upright():
        return tf.cond(tf.io.is_jpeg(image), lambda: orientation_of(image) == 1, lambda: False)

    if image.dtype == tf.string:
        return tf.cond(is_upright(), from_jpeg, lambda: from_pixels(decode(image, dct, channels)))
    return from_pixels(image)


def resize(image, size, method="bilinear", antialias=False, published=False):
    """Resizes to `size`, the side of a square or (H, W); rounds values to uint8.

    With `published`, values are truncated instead, as in big_vision.

    With `antialias`, downscaling averages over all pixels of the larger image, as Pillow's resize
    does ("bilinear", "bicubic"; timm's preprocessing). Without it, as in the authors' code, it
    interpolates between the pixels next to each point. "area" always averages.
    """
    size = sizes.pair(size)
    image = tf.ensure_shape(image, [None, None, image.shape[-1]])
    if method == "bilinear" and not antialias:
        # The kernel is twice as fast on float32; for large images the copy costs as much.
        image = tf.cond(
            tf.size(image) < 1 << 20,
            lambda: tf.image.resize(tf.cast(image, tf.float32), size),
            lambda: tf.image.resize(image, size),
        )
    else:
        image = tf.image.resize(image, size, method=method, antialias=antialias)
        image = tf.clip_by_value(image, 0, 255)
    return tf.cast(image if published else tf.round(image), tf.uint8)  # the cast truncates


def resize_small(image, size, method="area", antialias=False, published=False):
    """Resizes the short side to `size` and keeps the aspect (evaluation: 256, area).

    With `published`, values are truncated, as in big_vision.

    The ends of a very long image are cut off first, so that the result has at most MOST_RESIZED
    pixels: at 256, the middle 32 squares. A central crop is the same with and without this.
    """
    sides = tf.shape(image)[:2]
    max_length = max(MOST_RESIZED // size**2, MOST_ASPECT) * tf.reduce_min(sides)
    top, left = tf.unstack(tf.maximum(sides - max_length, 0) // 2)  # the same amount at both ends
    image = image[top : sides[0] - top, left : sides[1] - left]
    shape = tf.cast(tf.shape(image)[:2], tf.float64)
    shape = tf.cast(tf.round(shape * (size / tf.reduce_min(shape))), tf.int32)
    return resize(image, shape, method, antialias, published)


def central_crop(image, size):
    """Crops the central window of `size`, the side of a square or (H, W)."""
    sides = sizes.pair(size)
    top, left = tf.unstack((tf.shape(image)[:2] - sides) // 2)
    return _window(image, top, left, sides)


def random_crop(image, key, size, pad=0):
    """Pads with `pad` black pixels on all sides, and crops a random window of `size`.

    `size` is the side of a square, or (H, W).
    """
    sides = sizes.pair(size)
    image = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]])
    room = tf.shape(image)[:2] - sides
    top, left = tf.unstack(
        tf.cast(tf.random.stateless_uniform([2], key) * tf.cast(room + 1, tf.float32), tf.int32)
    )
    return _window(image, top, left, sides)


def _window(image, top, left, sides):
    shape, (height, width) = tf.shape(image), sides
    assertion = tf.debugging.Assert(
        (top >= 0) & (left >= 0),
        ["a crop of", sizes.text(sides), "pixels from an image of", shape[:2]],
    )
    with tf.control_dependencies([assertion]):
        window = image[top : top + height, left : left + width]
        return tf.ensure_shape(window, [height, width, image.shape[-1]])


def flip_lr(image, key):
    """Mirrors the image left to right with probability 1/2."""
    return tf.cond(
        tf.random.stateless_uniform([], key) < 0.5, lambda: tf.reverse(image, [1]), lambda: image
    )


def random_affine(image, key, degrees=0.0, translate=0.0, scale=0.0, shear=0.0):
    """Applies a small random affine map around the image's center; bilinear, black outside.

    Args:
      image: (H, W, channels) uint8.
      key: stateless key.
      degrees: the rotation is uniform in +-degrees.
      translate: the shift along each axis is uniform in +-translate pixels.
      scale: the factor of each axis is exp(u), with u uniform in +-scale.
      shear: the horizontal shear is uniform in +-shear.
    """
    u = tf.random.stateless_uniform([6], key, -1.0, 1.0)
    angle = u[0] * (degrees * math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    wide, high = tf.exp(u[1] * scale), tf.exp(u[2] * scale)
    slant = u[3] * shear
    # From output to input coordinates: rotation, then shear, then one factor per axis.
    a, b = wide * cos, wide * (slant * cos - sin)
    c, d = high * sin, high * (slant * sin + cos)
    middle = (tf.cast(tf.shape(image)[:2], tf.float32) - 1) / 2
    y, x = middle[0], middle[1]
    shift_x = x - a * x - b * y + u[4] * translate
    shift_y = y - c * x - d * y + u[5] * translate
    image = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(image, tf.float32)[None],
        transforms=tf.stack([a, b, shift_x, c, d, shift_y, 0.0, 0.0])[None],
        output_shape=tf.shape(image)[:2],
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
        fill_value=0.0,
    )[0]
    return tf.cast(tf.round(image), tf.uint8)


def random_erasing(
    image, key, prob=0.25, min_area=0.02, max_area=1 / 3, min_aspect=0.3, fill="noise"
):
    """Erases a random rectangle in some images (Zhong et al., 2020).

    Args:
      image: (H, W, channels) uint8.
      key: stateless key.
      prob: probability that a rectangle is erased.
      min_area: smallest area of the rectangle, as a share of the image; the area is uniform.
      max_area: largest area.
      min_aspect: height / width is between this and its inverse, with a uniform logarithm (as in
        timm; in the paper the ratio itself is uniform). The first of ten draws that fits is used.
      fill: "noise" for a random value per pixel and channel, or a constant 0 to 255.
    """
    keys = tf.random.experimental.stateless_split(key, 2)
    height, width = tf.unstack(tf.shape(image)[:2])
    draws = tf.random.stateless_uniform([41], keys[0])
    area, aspect, top, left = tf.unstack(tf.reshape(draws[1:], [4, 10]))
    area = (min_area + area * (max_area - min_area)) * tf.cast(height * width, tf.float32)
    aspect = tf.exp((2 * aspect - 1) * math.log(min_aspect))
    high = tf.cast(tf.round(tf.sqrt(area * aspect)), tf.int32)
    wide = tf.cast(tf.round(tf.sqrt(area / aspect)), tf.int32)
    fits = (high < height) & (wide < width)

    def erase():
        first = tf.argmax(fits)
        h, w = high[first], wide[first]
        y = tf.cast(top[first] * tf.cast(height - h + 1, tf.float32), tf.int32)
        x = tf.cast(left[first] * tf.cast(width - w + 1, tf.float32), tf.int32)
        rows = (tf.range(height) >= y) & (tf.range(height) < y + h)
        columns = (tf.range(width) >= x) & (tf.range(width) < x + w)
        if fill == "noise":
            noise = tf.random.stateless_uniform(tf.shape(image), keys[1], 0, 256, tf.int32)
            value = tf.cast(noise, tf.uint8)
        else:
            value = tf.constant(fill, tf.uint8)
        return tf.where((rows[:, None] & columns)[..., None], value, image)

    return tf.cond((draws[0] < prob) & tf.reduce_any(fits), erase, lambda: image)


def permute_patches(image, size, patch_size, seed=0):
    """Shuffles the patches, and the pixels within patches, the same way in all images.

    Args:
      image: (H, W, channels) uint8 of size `size`.
      size: side of a square, or (H, W).
      patch_size: P, pixels: side of a square, or its height and width.
      seed: seed; `size`, `patch_size` and `seed` determine the permutations.
    """
    sides = sizes.pair(size)
    return _reorder(image, sides, permutation.patch_order(sides, patch_size, seed=seed))


def permute_pixels(image, size, seed=0):
    """Shuffles all pixels by one permutation, which `size` and `seed` determine."""
    sides = sizes.pair(size)
    return _reorder(image, sides, permutation.pixel_order(sides, seed=seed))


def _reorder(image, sides, order):
    shape = [*sides, image.shape[-1]]
    pixels = tf.reshape(tf.ensure_shape(image, shape), [-1, image.shape[-1]])
    return tf.reshape(tf.gather(pixels, order), shape)


def value_range(image, low=-1.0, high=1.0):
    """Maps 0 to `low` and 255 to `high`, as float32. By default the device maps to [-1, 1]."""
    return tf.cast(image, tf.float32) * ((high - low) / 255) + low


def one_hot(example, num_classes, on=1.0, off=0.0):
    """Converts the label to (num_classes,) float32: `on` at the label, `off` elsewhere.

    If there are several labels, each has `off` plus its weight times (`on` - `off`).
    """
    labels = tf.reshape(example["label"], [-1])
    weights = example.get("label_weight", tf.ones(tf.shape(labels)))
    assertion = tf.debugging.Assert(
        tf.reduce_all((labels < num_classes) & ((labels >= 0) | (weights == 0))),
        ["label", labels, "is not in 0 to", num_classes - 1],
    )
    with tf.control_dependencies([assertion]):
        rows = tf.maximum(labels, 0)[:, None]  # padding has label -1 and weight 0
    share = tf.tensor_scatter_nd_max(tf.zeros([num_classes]), rows, weights)
    dense = {name: value for name, value in example.items() if name != "label_weight"}
    return {**dense, "label": off + share * (on - off)}


def make_preprocess(spec: str | Specification, image_size: tuple[int, int]) -> Callable:
    """Builds the function for a specification such as "decode|random_crop(32)|flip_lr".

    Args:
      spec: calls of ops, joined by "|".
      image_size: required (H, W) of every preprocessed image; None: any.

    Returns:
      A function (example, key (2,) int64) -> example. An example is a dict. Its "image" is encoded
      bytes or pixels before, and (H, W, channels) uint8 (float32 after `value_range`) afterwards.

    Raises:
      UserError: as in `spec.parse`.
    """
    spec = parse(spec, image_size)
    calls = [(call, call.op.host_function) for call in spec.calls]
    shape = [*image_size, spec.channels]

    @tf.autograph.experimental.do_not_convert  # the loop is Python that builds the graph
    def preprocess(example, key):
        for call, function in calls:
            arguments = call.arguments
            if call.op.random:
                call_key = tf.random.experimental.stateless_fold_in(key, call.place)
                arguments = {"key": call_key, **arguments}
            if call.op.kind is Kind.LABEL:
                example = function(example, **arguments)
            else:
                example = {**example, "image": function(example["image"], **arguments)}
        return {**example, "image": tf.ensure_shape(example["image"], shape)}

    return preprocess


def output_spec(preprocess: Callable, example_spec: dict) -> dict:
    """Returns the shapes and dtypes of examples after preprocessing.

    Args:
      preprocess: a function from `make_preprocess`.
      example_spec: name -> (shape, name of the dtype) of its input; the image is ((), "string").

    Returns:
      name -> (shape, name of the dtype) of its output.
    """
    inputs = {name: tf.TensorSpec(*spec) for name, spec in example_spec.items()}
    graph = tf.function(preprocess).get_concrete_function(inputs, tf.TensorSpec([2], tf.int64))
    return {
        name: (tuple(spec.shape), spec.dtype.name)
        for name, spec in graph.structured_outputs.items()
    }
