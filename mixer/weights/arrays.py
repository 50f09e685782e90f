"""Reads and writes named arrays in npz and safetensors files, without unpickling anything.

Opening a file reads its headers only; each array is read on request.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
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
# Trained weights compress to about 0.9 of their size, and pruned weights to about a tenth.
MAX_COMPRESSION = 100
MAX_SHARDS = 1000
MAX_HEADER_BYTES = 1 << 16  # header of an array in an npz file; NumPy accepts 10,000


class DamagedError(UserError):
    """A file is damaged, or is not of the type that its name claims.

    Attributes:
      path: path of the file.
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


def open_npz(path: epath.Path) -> dict[str, StoredArray]:
    """Returns the arrays of an npz file by name.

    The sizes in the headers are checked against the file's length, so that a false header cannot
    make a read allocate too much memory.

    Raises:
      UserError: the file cannot be read.
      DamagedError: the file is damaged, or is not an npz file of arrays.
    """
    with _reading(path, "npz"):
        archive = zipfile.ZipFile(path)
        members, length = archive.infolist(), path.stat().length
        if sum(member.compress_size for member in members) > length:
            raise ValueError("its members overlap")
        size = sum(member.file_size for member in members)
        if size > MAX_COMPRESSION * length + 1_000_000:
            raise ValueError(f"its {length:,} bytes would decompress to {size:,}")
        arrays = {}
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{member.filename} uses a compression method that NumPy does not use"
                )
            shape, dtype = _npy_header(archive, member)
            dtype = _real_dtype(dtype)
            read = functools.partial(_read_npy, path, archive, member, dtype)
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"it contains {name} twice")
            arrays[name] = StoredArray(shape, dtype.name, read)
        return arrays


def _npy_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype]:
    """Returns an array's shape and dtype, after checking them against the length of the member."""
    with archive.open(member) as file:
        start = io.BytesIO(file.read(MAX_HEADER_BYTES))
    version = np.lib.format.read_magic(start)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    try:
        with warnings.catch_warnings(action="ignore"):  # syntax warnings for damaged headers
            shape, _, dtype = read_header(start)
    except (SyntaxError, RecursionError, MemoryError, OverflowError, tokenize.TokenError) as error:
        # NumPy reads the header as a Python literal.
        raise ValueError(f"bad header in {member.filename}: {first_line(error)}") from None
    if dtype.hasobject:
        raise ValueError(
            f"{member.filename} holds Python objects, which would have to be unpickled"
        )
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"{member.filename} has the shape {str(shape)[:80]}")
    if math.prod(shape) * dtype.itemsize != member.file_size - start.tell():
        raise ValueError(
            f"{member.filename} has {member.file_size - start.tell():,} bytes of values, which do "
            f"not match its shape {str(shape)[:80]} and dtype {dtype}"
        )
    return shape, dtype


def _real_dtype(dtype: np.dtype) -> np.dtype:
    """Returns `dtype` in native byte order; NumPy stores bfloat16 as two untyped bytes (V2)."""
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
      UserError: the file cannot be read.
      DamagedError: the file is damaged, or is not a safetensors file.
    """
    import safetensors

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

    def read(name: str) -> np.ndarray:
        with _reading(path, "safetensors"):
            return file.get_tensor(name)

    with _reading(path, "safetensors"):
        path.stat()  # gives a clearer error than the library
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


def shard_names(path: epath.Path) -> list[str]:
    """Returns the names of the files that the index of a sharded safetensors file lists.

    Raises:
      UserError: the index cannot be read.
      DamagedError: it is not an index, or names a file outside its folder.
    """
    return sorted(set(_weight_map(path).values()))


def _weight_map(path: epath.Path) -> dict[str, str]:
    """Returns the file of each array in the index of a sharded safetensors file."""
    with _reading(path, "index"):
        content = files.read_regular(path)
        if content is None:
            raise FileNotFoundError(None, "no such file")
        places = json.loads(content)["weight_map"]
        if not isinstance(places, dict) or not places:
            raise ValueError("its weight_map is not an object with the file of each array")
        for name in set(map(str, places.values())):
            if not name.endswith(".safetensors") or "/" in name or not name.isprintable():
                raise ValueError(f"{name!r} is not the name of a .safetensors file beside it")
        if len(set(places.values())) > MAX_SHARDS:
            raise ValueError(f"it lists more than {MAX_SHARDS:,} files")
        return places


def open_sharded(path: epath.Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """Returns the arrays of the safetensors files that an index lists, and the first's metadata.

    Args:
      path: the index, such as model.safetensors.index.json; its files are in the same folder.

    Raises:
      UserError: the index or a file cannot be read.
      DamagedError: the index or a file is damaged, or a file lacks an array.
    """
    places, shards = _weight_map(path), {}
    for name in sorted(set(places.values())):
        shard = path.with_name(name)
        if os.path.exists(shard) and not os.path.isfile(shard):
            raise UserError(f"{shard} is not a regular file")
        shards[name] = open_safetensors(shard)
    missing = [
        f"{name}: not in {file}" for name, file in places.items() if name not in shards[file][0]
    ]
    if missing:
        raise DamagedError(path, f"{path}: {join_faults(missing)}")
    arrays = {name: shards[file][0][name] for name, file in places.items()}
    return arrays, next(iter(shards.values()))[1]


@contextlib.contextmanager
def _reading(path: epath.Path, kind: str) -> Iterator[None]:
    """Turns the errors that the libraries raise for damaged or other files into a UserError."""
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
        raise DamagedError(path, f"{path} is not a valid {kind} file of arrays: {reason}") from None


def write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an npz file whose bytes depend only on the arrays."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # A default ZipInfo has a fixed time stamp; `savez` would write the current time.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_safetensors(
    path: epath.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with default permissions.

    Raises:
      OSError: the file cannot be written.
    """
    import safetensors.numpy

    try:
        safetensors.numpy.save_file(dict(arrays), path, dict(metadata))
    except safetensors.SafetensorError as error:
        raise OSError(first_line(error)) from None
    _sort_metadata(path)
    files.set_default_permissions(path, 0o666)


def _sort_metadata(path: epath.Path) -> None:
    """Sorts the metadata in a safetensors header, which the library writes in random order."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


def check_dtypes(arrays: Mapping[str, StoredArray], source: epath.PathLike) -> None:
    """Raises UserError with a list of all arrays with an unsupported dtype or too many axes."""
    faults = [
        f"{name}: its dtype is {array.dtype}; expected one of {', '.join(DTYPES)}"
        for name, array in arrays.items()
        if array.dtype not in DTYPES
    ]
    faults += [
        f"{name}: it has {len(array.shape)} axes; expected at most {MAX_AXES}"
        for name, array in arrays.items()
        if len(array.shape) > MAX_AXES
    ]
    if faults:
        raise UserError(f"{source}: {join_faults(faults)}")


def misfits(saved: Shapes, expected: Shapes, *, resized: Shapes | None = None) -> list[str]:
    """Returns a line for each array that is missing, not expected or of the wrong shape.

    Args:
      saved: shapes of the saved arrays by name.
      expected: shapes of the model's parameters by name.
      resized: shapes of the saved arrays after resizing; None if they are not resized.
    """
    faults = [f"{name}: missing" for name in expected.keys() - saved.keys()]
    faults += [f"{name}: not in the model" for name in saved.keys() - expected.keys()]
    for name in expected.keys() & saved.keys():
        shape = saved[name] if resized is None else resized[name]
        if tuple(shape) != tuple(expected[name]):
            note = "" if shape == saved[name] else f", resized {shape}"
            faults.append(f"{name}: saved {saved[name]}{note}, expected {expected[name]}")
    return sorted(faults)


def describe_non_finite(array: np.ndarray) -> str:
    """Returns how many values of `array` are NaN or infinite, in words; "" if all are finite."""
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    return f"holds NaN or infinity in {bad:,} of {array.size:,} values" if bad else ""


def join_faults(faults: Iterable[str], max_count: int = 40) -> str:
    """Joins faults into one line in sorted order; shortens a long list and long faults."""
    faults = sorted(printable_line(fault) for fault in faults)
    ending = f"; and {len(faults) - max_count} more" if len(faults) > max_count else ""
    return "; ".join(faults[:max_count]) + ending


def printable_line(text: str) -> str:
    """Returns text from a file as one printable line of at most 300 characters."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:400])
    return text[:300]
