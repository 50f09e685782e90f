"""Preprocessing: steps on one image, named in the config and applied in the order written.

A config says, for example, `"inception_crop(224)|flip_lr"`. A step is a pure function of the image
and, if it is random, of a stateless key: the same image with the same key gives the same pixels.
Images stay uint8 all the way; the device turns them into floats.
"""

import ast
import inspect
import math
from collections.abc import Callable

import tensorflow as tf

from mixer.errors import UserError, nearest


def decode(image):
    """Encoded bytes (JPEG, PNG, BMP or GIF, its first frame) to (H, W, 3) uint8."""
    image = tf.io.decode_image(image, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def inception_crop(image, key, size, min_area=0.05, max_area=1.0):
    """A random window of 5 to 100 % of the area and aspect 3/4 to 4/3, resized to `size`.

    From the bytes of a JPEG it decodes the window alone. Bilinear without antialiasing (Szegedy et
    al., 2014; big_vision, `mlp_mixer_i1k`).
    """

    def window(shape):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            tf.zeros([1, 0, 4]),
            seed=key,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
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
        return tf.image.decode_and_crop_jpeg(image, box, channels=3)

    if image.dtype == tf.string:
        image = tf.cond(tf.io.is_jpeg(image), from_jpeg, lambda: from_pixels(decode(image)))
    else:
        image = from_pixels(image)
    return resize(image, size)


def resize(image, size, method="bilinear"):
    """To `size`: a side of a square, or (H, W). No antialiasing; values rounded to uint8."""
    size = (size, size) if isinstance(size, int) else size
    image = tf.image.resize(tf.ensure_shape(image, [None, None, 3]), size, method=method)
    return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8)


def resize_small(image, size, method="area"):
    """Resizes so that the short side is `size`, keeping the aspect (evaluation: 256, area)."""
    shape = tf.cast(tf.shape(image)[:2], tf.float64)
    shape = tf.cast(tf.round(shape * (size / tf.reduce_min(shape))), tf.int32)
    return resize(image, shape, method)


def central_crop(image, size):
    """The window of `size` x `size` pixels in the middle."""
    top, left = tf.unstack((tf.shape(image)[:2] - size) // 2)
    return _window(image, top, left, size)


def random_crop(image, key, size, pad=0):
    """A window of `size` x `size` pixels at a random place, after `pad` black pixels all around."""
    image = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]])
    room = tf.shape(image)[:2] - size
    top, left = tf.unstack(
        tf.cast(tf.random.stateless_uniform([2], key) * tf.cast(room + 1, tf.float32), tf.int32)
    )
    return _window(image, top, left, size)


def _window(image, top, left, size):
    shape = tf.shape(image)
    assertion = tf.debugging.Assert(
        (top >= 0) & (left >= 0), ["a crop of", size, "pixels from an image of", shape[:2]]
    )
    with tf.control_dependencies([assertion]):
        return tf.ensure_shape(image[top : top + size, left : left + size], [size, size, 3])


def flip_lr(image, key):
    """Mirrors half of the images left to right."""
    return tf.cond(
        tf.random.stateless_uniform([], key) < 0.5, lambda: tf.reverse(image, [1]), lambda: image
    )


def random_affine(image, key, degrees=0.0, translate=0.0, scale=0.0, shear=0.0):
    """A small random affine map around the image's middle; bilinear, black outside.

    Args:
      image: (H, W, 3) uint8.
      key: stateless key.
      degrees: rotation, uniform in +-degrees.
      translate: shift of each axis, uniform in +-translate pixels.
      scale: each axis is scaled by its own exp(u), u uniform in +-scale.
      shear: horizontal shear, uniform in +-shear.
    """
    u = tf.random.stateless_uniform([6], key, -1.0, 1.0)
    angle = u[0] * (degrees * math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    wide, high = tf.exp(u[1] * scale), tf.exp(u[2] * scale)
    slant = u[3] * shear
    # From output to input coordinates: rotation, then shear, then one scale an axis.
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


STEPS = {
    step.__name__: step
    for step in (
        decode,
        inception_crop,
        resize,
        resize_small,
        central_crop,
        random_crop,
        flip_lr,
        random_affine,
    )
}


def make_preprocess(spec: str, image_size: tuple[int, int]) -> Callable:
    """Builds the function that a spec such as "decode|random_crop(32, pad=4)|flip_lr" describes.

    Args:
      spec: steps with their arguments, joined by "|".
      image_size: (H, W) that every image must have in the end.

    Returns:
      A function (encoded bytes, key (2,) int) -> (H, W, 3) uint8.

    Raises:
      UserError: an unknown step, wrong arguments, a first step that does not decode, or images of
        another size.
    """
    steps = [_parse_step(text, spec) for text in spec.split("|")]
    if steps[0][0] not in (decode, inception_crop):
        raise UserError(f"preprocessing {spec!r}: the first step must be decode or inception_crop")

    def preprocess(image, key):
        for number, (step, args, kwargs) in enumerate(steps):
            if _is_random(step):
                step_key = tf.random.experimental.stateless_fold_in(key, number)
                image = step(image, step_key, *args, **kwargs)
            else:
                image = step(image, *args, **kwargs)
        return tf.ensure_shape(image, [*image_size, 3])

    try:
        tf.function(preprocess).get_concrete_function(
            tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int64)
        )
    except (ValueError, TypeError) as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise UserError(
            f"preprocessing {spec!r} gives no images of image_size={image_size[0]}: "
            f"{reason.strip()}"
        ) from error
    return preprocess


def _is_random(step: Callable) -> bool:
    return "key" in inspect.signature(step).parameters


def _parse_step(text: str, spec: str) -> tuple[Callable, list, dict]:
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        name = call.func.id
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, AttributeError, ValueError):
        raise UserError(
            f"preprocessing {spec!r}: {text.strip()!r} is no step; write name(arguments)"
        ) from None
    if name not in STEPS:
        raise UserError(
            f"preprocessing {spec!r}: unknown step {name!r}; one of {', '.join(STEPS)}."
            f"{nearest(name, STEPS)}"
        )
    try:
        given = (None, None) if _is_random(STEPS[name]) else (None,)  # image, key
        inspect.signature(STEPS[name]).bind(*given, *args, **kwargs)
    except TypeError as error:
        raise UserError(f"preprocessing {spec!r}: {name}: {error}") from None
    return STEPS[name], args, kwargs
