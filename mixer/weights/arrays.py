"""Arrays in npz and safetensors files, by name. Nothing is unpickled.

The headers are read when a file is opened, an array when it is asked for.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import stat
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
from etils import epath

from mixer import files
from mixer.errors import UserError, first_line

Shapes = Mapping[str, tuple[int, ...]]

DTYPES = ("float32", "float16", "bfloat16")  # exact in float32
MAX_AXES = 32
# Compressed arrays of trained weights take about 0.9 of their size, and pruned ones a tenth.
MAX_COMPRESSION = 100
MAX_HEADER_BYTES = 1 << 16  # of an array in an npz file; NumPy reads 10,000


class DamagedError(UserError):
    """A file is not what its name says, or damaged.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: epath.PathLike, text: str):
        super().__init__(text)
        self.path = epath.Path(path)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def check_regular(path: epath.Path) -> None:
    """Raises UserError for a device, a pipe or the like, which might never end."""
    try:
        mode = os.stat(path).st_mode  # epath takes a pipe for a file
    except (OSError, ValueError):
        return  # the message of whoever opens it says why not
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is no regular file")


def open_npz(path: epath.Path) -> dict[str, StoredArray]:
    """Returns the arrays of an npz file by name.

    What the headers claim is compared with the length of the file, so that reading an array takes
    no more memory than the file accounts for.

    Raises:
      UserError: the file cannot be read; DamagedError: it holds something else.
    """
    with _reading(path, "npz"):
        archive = zipfile.ZipFile(path)
        members, length = archive.infolist(), path.stat().length
        if sum(member.compress_size for member in members) > length:
            raise ValueError("its members overlap")
        size = sum(member.file_size for member in members)
        if size > MAX_COMPRESSION * length + 1_000_000:
            raise ValueError(f"it has {length:,} bytes and would become {size:,}")
        arrays = {}
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{member.filename} is compressed in a way that NumPy does not use"
                )
            shape, dtype = _npy_header(archive, member)
            dtype = _real_dtype(dtype)
            read = functools.partial(_read_npy, path, archive, member, dtype)
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"it has {name} twice")
            arrays[name] = StoredArray(shape, dtype.name, read)
        return arrays


def _npy_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, which together are as long as the member is."""
    with archive.open(member) as file:
        start = io.BytesIO(file.read(MAX_HEADER_BYTES))
    version = np.lib.format.read_magic(start)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    try:
        with warnings.catch_warnings(action="ignore"):  # of the syntax of broken ones
            shape, _, dtype = read_header(start)
    except (SyntaxError, RecursionError, MemoryError, OverflowError, tokenize.TokenError) as error:
        # NumPy reads the header as a Python literal.
        raise ValueError(f"the header of {member.filename}: {first_line(error)}") from None
    if dtype.hasobject:
        raise ValueError(
            f"{member.filename} holds Python objects, which would have to be unpickled"
        )
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"{member.filename} has the shape {str(shape)[:80]}")
    if math.prod(shape) * dtype.itemsize != member.file_size - start.tell():
        raise ValueError(
            f"{member.filename} has the shape {str(shape)[:80]} of {dtype}, and "
            f"{member.file_size - start.tell():,} bytes of values"
        )
    return shape, dtype


def _real_dtype(dtype: np.dtype) -> np.dtype:
    """In this machine's byte order; NumPy writes bfloat16 as two bytes without a type."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype.newbyteorder("=")


def _read_npy(
    path: epath.Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, dtype: np.dtype
) -> np.ndarray:
    with _reading(path, "npz"), archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    return array.view(dtype) if array.dtype.kind == "V" else array.astype(dtype, copy=False)


def open_safetensors(path: epath.Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """Returns the arrays of a safetensors file by name, and the metadata in its header.

    Raises:
      UserError: the file cannot be read; DamagedError: it holds something else.
    """
    import safetensors

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

    def read(name: str) -> np.ndarray:
        with _reading(path, "safetensors"):
            return file.get_tensor(name)

    with _reading(path, "safetensors"):
        path.stat()  # its message is clearer than the library's
        file = safetensors.safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        arrays = {
            name: StoredArray(
                tuple(array.get_shape()),
                names.get(array.get_dtype(), array.get_dtype()),
                functools.partial(read, name),
            )
            for name, array in slices.items()
        }
        return arrays, file.metadata() or {}


@contextlib.contextmanager
def _reading(path: epath.Path, kind: str) -> Iterator[None]:
    """Turns what the libraries raise on a file of another kind into a UserError."""
    import safetensors

    damage = (ValueError, TypeError, AttributeError, KeyError, EOFError, NotImplementedError)
    damage += (RuntimeError, OverflowError, struct.error, zipfile.BadZipFile, zlib.error)
    damage += (safetensors.SafetensorError,)
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except damage as error:
        reason = first_line(error)
        raise DamagedError(
            path, f"{path} is no {kind} file of arrays, or damaged: {reason}"
        ) from None


def write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an npz file whose bytes are a function of the arrays alone."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # With a ZipInfo of its own: savez would write the time of day.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_safetensors(
    path: epath.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with the usual rights.

    Raises:
      OSError: the file system refuses it.
    """
    import safetensors.numpy

    try:
        safetensors.numpy.save_file(dict(arrays), path, dict(metadata))
    except safetensors.SafetensorError as error:
        raise OSError(first_line(error)) from None
    files.open_up(path, 0o666)


def check_dtypes(arrays: Mapping[str, StoredArray], source: epath.PathLike) -> None:
    """Raises UserError that lists every array of a dtype that is not exact in float32."""
    faults = [
        f"{name}: its dtype is {array.dtype}; {', '.join(DTYPES)} are read"
        for name, array in arrays.items()
        if array.dtype not in DTYPES
    ]
    faults += [
        f"{name}: it has {len(array.shape)} axes; expected at most {MAX_AXES}"
        for name, array in arrays.items()
        if len(array.shape) > MAX_AXES
    ]
    if faults:
        raise UserError(f"{source}: {listed(faults)}")


def misfits(saved: Shapes, wanted: Shapes, *, resized: Shapes | None = None) -> list[str]:
    """Returns a line for each array that is missing, superfluous or of another shape than wanted.

    Args:
      saved: shapes of the saved arrays by name.
      wanted: shapes of the model's parameters by name.
      resized: shapes that the saved arrays get before they are compared; None: their own.
    """
    faults = [f"{name}: missing" for name in wanted.keys() - saved.keys()]
    faults += [f"{name}: not in the model" for name in saved.keys() - wanted.keys()]
    for name in wanted.keys() & saved.keys():
        shape = saved[name] if resized is None else resized[name]
        if tuple(shape) != tuple(wanted[name]):
            note = "" if shape == saved[name] else f", resized {shape}"
            faults.append(f"{name}: saved {saved[name]}{note}, wanted {wanted[name]}")
    return sorted(faults)


def not_finite(array: np.ndarray) -> str:
    """Says how much of `array` is NaN or infinite; "" where all of it is finite."""
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    return f"holds NaN or infinity in {bad:,} of {array.size:,} places" if bad else ""


def listed(faults: Iterable[str], most: int = 40) -> str:
    """Joins faults to one line, in order; of very many the first, of very long ones the start."""
    faults = sorted(short_name(fault) for fault in faults)
    rest = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + rest


def short_name(text: str) -> str:
    """Returns a text with names out of a file in one line, not longer than such names are."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:400])
    return text[:300]
