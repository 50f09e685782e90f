"""Decodes image files with Pillow, without TensorFlow.

Training, evaluation, `prepare check` and `predict` read images with `decode` in
mixer/data/preprocessing/decoding.py. TensorFlow decodes the formats of most data sets, in many
threads. If it would fail or produce other colours, `decode` calls this module. `predict` also calls
it for all other formats.
"""

import io
import warnings

import numpy as np

from mixer.errors import first_line

# Pillow's names of the formats that `decode` passes to it, and of those that `predict` reads. No
# other format is opened: Pillow runs Ghostscript for EPS, opens files in any format that IPTC and
# SPIDER files refer to, and also reads films and scientific data.
DECODED = ("BMP", "GIF", "PNG", "WEBP")
READ = (
    *("AVIF", "BMP", "CUR", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX"),
    *("PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TIFF", "WEBP", "XBM", "XPM", "TGA"),
)

warnings.filterwarnings("ignore", module="PIL")  # about metadata; serious faults are exceptions


def pixels(data: bytes, formats: tuple[str, ...]) -> np.ndarray:
    """Decodes an image with Pillow, upright, to (H, W, 3) uint8.

    Animations yield their first frame, 16-bit values keep their high 8 bits, palettes are replaced
    by their colours, and an alpha channel is dropped.

    Args:
      data: bytes of the file.
      formats: Pillow's names of the formats that may be opened.

    Raises:
      PIL.UnidentifiedImageError: the file has another format or is not an image.
      ValueError: the pixels have no defined range of brightness (32-bit integers or floats).
      Exception: any exception that Pillow raises for a damaged file.
    """
    from PIL import Image, ImageOps

    Image.init()  # not every build of Pillow has all formats
    formats = [name for name in formats if name in Image.OPEN]
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=formats))
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"pixel values from {values.min()} to {values.max()}; expected 8 or 16 bits"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def try_decode(data: bytes) -> tuple[np.ndarray, bytes]:
    """Decodes a file in one of the formats DECODED; returns a reason instead of raising.

    Returns:
      The pixels (H, W, 3) uint8 and b""; or a placeholder and the reason if it cannot be decoded.
    """
    from PIL import UnidentifiedImageError

    try:
        return pixels(data, DECODED), b""
    except UnidentifiedImageError:
        return np.zeros((1, 1, 3), np.uint8), b"damaged: Pillow recognises no image in the file"
    except Exception as error:  # a damaged file may cause any exception in Pillow's readers
        return np.zeros((1, 1, 3), np.uint8), first_line(error).encode()
