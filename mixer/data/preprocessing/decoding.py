"""Decodes images of all common formats on the host to upright RGB pixels."""

import functools

import tensorflow as tf

from mixer.data.preprocessing import images

ORIENTATION = 0x0112  # number of the EXIF tag
DCT = {"fast": "INTEGER_FAST", "accurate": "INTEGER_ACCURATE"}  # TensorFlow's names for JPEG
MOST_PIXELS = (1 << 29) // 3  # TensorFlow's limit for JPEG, and Pillow's for all formats
METADATA = 1 << 17  # bytes at the start of a file, and at the end of a PNG, to search for EXIF data
# First bytes of rejected formats. \C matches any byte; [^x] matches no byte from 128 on.
REFUSED = {
    "TIFF": rb"(II\*\x00|MM\x00\*)\C*",
    "JPEG 2000": rb"\x00\x00\x00\x0cjP\C*",
    "HEIC or AVIF": rb"\C{4}ftyp\C*",
    "BMP of less than 24 bits per pixel": rb"BM\C{12}([^\x0c]\C{13}|\x0c\C{9})[\x01-\x10]\C*",
}
# First bytes of the formats that Pillow decodes, except for the layouts below, which TensorFlow
# decodes correctly. TensorFlow loses the colours of transparent pixels in a GIF, supports only one
# layout of BMP, and corrupts its memory on an animated WebP. A still WebP has no flag for animation
# or EXIF.
BY_PILLOW = rb"(GIF8|BM|RIFF\C{4}WEBP)\C*"
PLAIN_BMP = rb"BM\C{12}[\x28\x34\x38\x6c\x7c]\x00\x00\x00\C{10}\x18\x00\x00\x00\x00\x00"
STILL_WEBP = rb"RIFF\C{4}WEBP(VP8 |VP8L|VP8X\C{4}[\x00\x04\x10\x14\x20\x24\x30\x34])\C*"
PNG = rb"\CPNG\r\n\x1a\n\C*"
SMALL_PNG = (
    rb"\CPNG\r\n\x1a\n\C{8}\x00\x00[\x00-\x33]\C\x00\x00[\x00-\x33]\C*"  # sides below 13,312
)


def decode(image, dct="fast", channels=3):
    """Decodes a JPEG, PNG, GIF, WebP or BMP to (H, W, channels) uint8, upright.

    With 3 channels, grey images get three equal channels. With 1, `as_channels` converts colours to
    grey. CMYK is converted to RGB, 16-bit values keep their high 8 bits, palettes are replaced by
    their colours, and an alpha channel is dropped (as Pillow's convert("RGB") does). Animations
    yield their first frame. An EXIF orientation is applied.

    Args:
      image: bytes of the file; or pixels that a data set stores as an array, which do not change.
      dct: JPEG's inverse DCT: "fast", as in the authors' code (TensorFlow's default), or
        "accurate", as in Pillow.
      channels: 3, or 1 for grey (`as_channels`); for an array, its number of channels.
    """
    image = tf.convert_to_tensor(image)
    if image.dtype == tf.string:
        return as_channels(_decoder(dct)(image), channels)
    return tf.ensure_shape(image, [None, None, channels])


def as_channels(pixels, channels):
    """Returns RGB pixels (H, W, 3) uint8 unchanged, or as grey (H, W, 1) for `channels` 1.

    Grey is 0.299 R + 0.587 G + 0.114 B, rounded as Pillow's convert("L") does (ITU-R BT.601). Equal
    channels therefore keep their value.
    """
    if channels != 1:
        return tf.ensure_shape(pixels, [None, None, channels])
    weights = tf.constant([19595, 38470, 7471])  # they sum to 2^16
    total = tf.reduce_sum(tf.cast(pixels, tf.int32) * weights, -1, keepdims=True)
    return tf.cast(tf.bitwise.right_shift(total + (1 << 15), 16), tf.uint8)


@functools.cache
def _decoder(dct):
    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)  # trace only once
    def decode(image):
        def jpeg():
            pixels = tf.io.decode_jpeg(image, channels=3, dct_method=DCT[dct])
            return _upright(pixels, orientation_of(image))

        pixels = tf.cond(tf.io.is_jpeg(image), jpeg, lambda: _decode_other(image))
        return tf.ensure_shape(pixels, [None, None, 3])

    return decode


def _decode_other(image):
    """As `decode`, for all formats except JPEG."""
    start = tf.strings.substr(image, 0, 34)

    def begins(pattern):
        return tf.strings.regex_full_match(start, pattern)

    def by_pillow():
        pixels, reason = tf.numpy_function(
            images.try_decode, [image], [tf.uint8, tf.string], stateful=False
        )
        with tf.control_dependencies([tf.debugging.Assert(reason == "", [reason])]):
            return tf.ensure_shape(pixels, [None, None, 3])

    def plain():
        return tf.io.decode_image(image, channels=3, expand_animations=False)

    def small_png():
        return tf.cond(_has_exif_chunk(image), by_pillow, plain)

    def large_png():
        with tf.control_dependencies([_check_png_size(image)]):
            return small_png()

    def webp():  # TensorFlow decodes it only to its own number of channels
        pixels = tf.io.decode_image(image, channels=0, expand_animations=False)
        return tf.ensure_shape(pixels, [None, None, None])[..., :3]

    def rest():
        kind = tf.constant("")
        for name, pattern in REFUSED.items():
            kind = tf.where(begins(pattern), name, kind)
        assertion = tf.debugging.Assert(
            kind == "", [kind, "files are not supported; expected JPEG, PNG, GIF, WebP or BMP"]
        )
        with tf.control_dependencies([assertion]):
            return tf.cond(begins(BY_PILLOW) & ~begins(PLAIN_BMP), by_pillow, plain)

    def large_png_or_other():
        return tf.cond(begins(PNG), large_png, lambda: tf.cond(begins(STILL_WEBP), webp, rest))

    return tf.cond(begins(SMALL_PNG), small_png, large_png_or_other)


def _has_exif_chunk(image):
    """Returns whether a PNG's first or last bytes contain the name of an EXIF chunk."""
    end = tf.strings.substr(image, tf.maximum(tf.strings.length(image) - METADATA, 0), METADATA)
    ends = tf.strings.join([tf.strings.substr(image, 0, METADATA), end])
    return tf.strings.regex_full_match(ends, rb"\C*eXIf\C*")


def _check_png_size(image):
    """Fails in the graph if the header of a PNG specifies more than MOST_PIXELS."""
    header = tf.strings.join([tf.strings.substr(image, 0, 24), bytes(24)])
    sides = tf.io.decode_raw(tf.strings.substr(header, 16, 8), tf.int32, little_endian=False)
    count = tf.reduce_prod(tf.cast(sides, tf.int64))
    return tf.debugging.Assert(
        count <= MOST_PIXELS,
        [count, f"pixels; expected at most {MOST_PIXELS:,}"],
    )


def orientation_of(image):
    """Returns the EXIF orientation of a JPEG, 1 (upright) to 8; 1 if there is none."""
    # Most files have no EXIF segment: the tables directly follow the start or a JFIF header.
    start = tf.strings.substr(image, 0, 22)
    plain = (tf.strings.substr(start, 0, 4) == b"\xff\xd8\xff\xdb") | (
        (tf.strings.substr(start, 0, 6) == b"\xff\xd8\xff\xe0\x00\x10")
        & (tf.strings.substr(start, -2, 2) == b"\xff\xdb")
    )
    return tf.cond(plain, lambda: 1, lambda: _exif_orientation(image))


def _exif_orientation(image):
    """Returns the orientation from the first EXIF segment in the first METADATA bytes."""
    start = tf.strings.substr(image, 0, METADATA)
    parts = tf.raw_ops.StringSplitV2(input=start[None], sep="Exif\0\0", maxsplit=1).values
    # The appended zeros keep reads from a damaged segment in bounds.
    tiff = tf.cast(tf.io.decode_raw(tf.strings.join([parts[-1], bytes(8)]), tf.uint8), tf.int32)
    little = tiff[0] == ord("I")  # little-endian; "M" is big-endian

    def number(places):  # unsigned, 16 bits
        places = tf.minimum(places, tf.size(tiff) - 2)
        first, second = tf.gather(tiff, places), tf.gather(tiff, places + 1)
        return tf.where(little, first + 256 * second, 256 * first + second)

    # A segment is shorter than 64 kB, so the directory's offset is in the low half of its four
    # bytes. The directory starts with the number of its entries, which have 12 bytes each.
    directory = number(tf.where(little, 4, 6))
    entries = directory + 2 + 12 * tf.range(tf.minimum(number(directory), 1000))
    value = tf.reduce_max(tf.where(number(entries) == ORIENTATION, number(entries + 8), 0))
    marker = tf.strings.substr(tf.strings.join(["    ", parts[0]]), -4, 2)
    is_exif = (tf.size(parts) == 2) & (marker == b"\xff\xe1")
    return tf.where(is_exif & (value >= 1) & (value <= 8), value, 1)


def _upright(image, orientation):
    """Undoes an EXIF orientation: transposes first, then mirrors."""

    def turn():
        turned = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
        rows = tf.reduce_any(orientation == [3, 4, 7, 8])
        columns = tf.reduce_any(orientation == [2, 3, 6, 7])
        return tf.raw_ops.Reverse(tensor=turned, dims=tf.stack([rows, columns, False]))

    return tf.cond(orientation == 1, lambda: image, turn)
