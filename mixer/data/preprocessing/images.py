"""Image files: which formats are read, and reading by Pillow. No TensorFlow here.

Training, evaluation, `prepare check` and `predict` read images with `decode` of
mixer/data/preprocessing/decoding.py. TensorFlow decodes the formats of most data sets, in many
threads at once; where it would fail, or give other colours, `decode` comes here. `predict` comes
here with all else.
"""

import io
import warnings

import numpy as np

from mixer.errors import first_line

# Pillow's names of what `decode` leaves to it, and of what `predict` reads. No other format is
# opened: Pillow hands EPS to Ghostscript, opens what IPTC and SPIDER files point to in any format,
# and knows films and scientific data, which are no pictures.
DECODED = ("BMP", "GIF", "PNG", "WEBP")
READ = (
    *("AVIF", "BMP", "CUR", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX"),
    *("PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TIFF", "WEBP", "XBM", "XPM", "TGA"),
)

warnings.filterwarnings("ignore", module="PIL")  # odd metadata; what matters is raised


def pixels(data: bytes, formats: tuple[str, ...]) -> np.ndarray:
    """What Pillow reads, upright (H, W, 3) uint8.

    Of an animation it is the first frame, of 16 bits the 8 high ones; palettes become their
    colours, and an alpha channel is dropped.

    Args:
      data: the file.
      formats: names that Pillow has for the formats that may be opened.

    Raises:
      PIL.UnidentifiedImageError: another format, or no image.
      ValueError: pixels whose range of brightness no one defines (32 bits, floats).
      Exception: whatever Pillow raises for what is damaged.
    """
    from PIL import Image, ImageOps

    Image.init()  # a Pillow may lack some
    formats = [name for name in formats if name in Image.OPEN]
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=formats))
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"its pixels lie in {values.min()} to {values.max()}; 8 or 16 bits are read"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def decoded(data: bytes) -> tuple[np.ndarray, bytes]:
    """`pixels` of one of DECODED, and b""; of what cannot be read none, and why."""
    from PIL import UnidentifiedImageError

    try:
        return pixels(data, DECODED), b""
    except UnidentifiedImageError:
        return np.zeros((1, 1, 3), np.uint8), b"no image can be made out behind its first bytes"
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        return np.zeros((1, 1, 3), np.uint8), first_line(error).encode()
