"""Files of weights: the published npz layout, the legacy one, and timm's names in safetensors.

Whatever the layout, arrays are known by the names of the released checkpoints, joined by "/", such
as "MixerBlock_0/token_mixing/Dense_0/kernel". Nothing is unpickled.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import stat
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mixer import files
from mixer.data.imagenet.names import LISTS
from mixer.data.preprocessing.spec import pixel_range
from mixer.errors import UserError, first_line
from mixer.models.mlp_mixer import GELUS, VARIANTS, MlpMixer, make_model
from mixer.weights import foreign

Shapes = Mapping[str, tuple[int, ...]]

# By layout: the ending of its files, and the GELU of the code whose layout it is.
ENDINGS = {"published": ".npz", "legacy": ".npz", "timm": ".safetensors"}
GELU_OF = {"published": "tanh", "legacy": "tanh", "timm": "erf"}
DTYPES = ("float32", "float16", "bfloat16")  # exact in float32
DIMENSIONS = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
HEAD = ("head/kernel", "head/bias")
FORMAT = "mlp-mixer weights, 1"  # what the JSON beside a file says of itself
MAX_AXES = 32
# Compressed arrays of trained weights take about 0.9 of their size, and pruned ones a tenth.
MAX_COMPRESSION = 100
MAX_HEADER_BYTES = 1 << 16  # of an array in an npz file; NumPy reads 10,000
MAX_JSON_BYTES = 64_000_000


class DamagedError(UserError):
    """A file is not what its name says, or damaged.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: epath.PathLike, text: str):
        super().__init__(text)
        self.path = epath.Path(path)


@dataclasses.dataclass(frozen=True)
class Card:
    """What weights are: recognised from their shapes, a run's config, or the JSON beside a file.

    Attributes:
      variant: such as "B/16"; None: other dimensions. Grown to a larger image, a variant has a
        multiple of its tokens_mlp_dim.
      patch_size: P. hidden_dim: C. num_blocks: L. tokens_mlp_dim: D_S. channels_mlp_dim: D_C.
      num_classes: width of the head; 0: they have none.
      image_size: (H, W) in pixels.
      gelu: "tanh" or "erf".
      preprocess: the steps of evaluation, of mixer/data/preprocessing/host.py; None: not known.
      class_names: in label order, or the name of a list of mixer/data/imagenet/names.py; None: not
        known.
      source: where the weights come from.
    """

    variant: str | None
    patch_size: int
    hidden_dim: int
    num_blocks: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    num_classes: int
    image_size: tuple[int, int]
    gelu: str
    preprocess: str | None
    class_names: str | tuple[str, ...] | None
    source: str

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along each side of the image, (H/P, W/P)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def value_range(self) -> tuple[float, float]:
        """What the values 0 and 255 of a pixel become for the model."""
        return pixel_range(self.preprocess)

    def model(self, **fields: Any) -> MlpMixer:
        """The model of these weights; `fields` replace its own."""
        own = {name: getattr(self, name) for name in (*DIMENSIONS, "num_classes", "gelu")}
        fields = own | fields
        if fields["num_classes"] == 0:  # `make_model` is for training too, which needs a head
            return make_model(**fields | {"num_classes": 1}).clone(num_classes=0)
        return make_model(**fields)


@dataclasses.dataclass(frozen=True)
class File:
    """An opened file: names and shapes; an array is read when it is asked for.

    Attributes:
      path: where it is.
      layout: a key of ENDINGS.
      shapes: by published name; an array that the layout does not have goes by its own.
      read: an array by that name, turned as published, in the file's dtype.
      gelu: what its own header says; None: nothing.
      notes: what was passed over or taken off, for the log.
    """

    path: epath.Path
    layout: str
    shapes: Shapes
    read: Callable[[str], np.ndarray]
    gelu: str | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array as it lies in a file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def open_file(path: epath.PathLike) -> File:
    """Opens a file of weights and recognises its layout from its names.

    Raises:
      UserError: no such file, one of another kind, another model, or an array of another dtype.
    """
    path, gelu = epath.Path(path).expanduser(), None
    check_regular(path)
    match path.suffix.lower():
        case ".npz":
            arrays = _npz_arrays(path)
        case ".safetensors":
            arrays, gelu = _safetensors_arrays(path)
        case _:
            advice = foreign.advice(path)
            raise UserError(
                advice or f"{path} is no file of weights; .npz and .safetensors are read"
            )
    arrays, notes = _unwrapped(arrays)
    layout = _recognise(arrays, path)
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
        raise UserError(f"{path}: {listed(faults)}")

    places = {}  # published name -> the file's
    for name in leaf_names(_num_blocks(arrays)):
        if _stored_name(name, layout) in arrays:
            places[name] = _stored_name(name, layout)
    places |= {name: name for name in arrays.keys() - set(places.values())}
    return File(
        path,
        layout,
        {name: _published_shape(name, arrays[old].shape, layout) for name, old in places.items()},
        lambda name: _published(name, arrays[places[name]].read(), layout),
        gelu,
        notes,
    )


def check_regular(path: epath.Path) -> None:
    """Raises UserError for a device, a pipe or the like, which might never end."""
    try:
        mode = os.stat(path).st_mode  # epath takes a pipe for a file
    except (OSError, ValueError):
        return  # whoever opens it says why not
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is no regular file")


def _num_blocks(names: Iterable[str]) -> int:
    """The largest number of a block, plus 1; a number that the names cannot reach counts for none.

    A file has more arrays than blocks, so that its size bounds what is made of a number.
    """
    names = list(names)
    digits = re.findall(
        r"(?:MixerBlock_|encoderblock_|blocks\.)([0-9]{1,9})(?![0-9])", " ".join(names)
    )
    return max((int(n) + 1 for n in digits if int(n) < len(names)), default=0)


def leaf_names(num_blocks: int) -> Iterator[str]:
    """The published names of a Mixer's arrays."""
    for module in ("stem", "head", "pre_head_layer_norm"):
        yield from (f"{module}/{leaf}" for leaf in _leaves(module))
    for block in range(num_blocks):
        for norm, mlp in (("LayerNorm_0", "token_mixing"), ("LayerNorm_1", "channel_mixing")):
            for module in (norm, f"{mlp}/Dense_0", f"{mlp}/Dense_1"):
                yield from (f"MixerBlock_{block}/{module}/{leaf}" for leaf in _leaves(module))


def _leaves(module: str) -> tuple[str, str]:
    return ("scale" if "norm" in module.lower() else "kernel"), "bias"


def _stored_name(name: str, layout: str) -> str:
    """The name in a file of `layout` of the array that is published as `name`."""
    if layout == "legacy":  # the code before Linen (big_vision converts its files)
        name = re.sub("^stem/", "embedding/", name)
        name = re.sub("^pre_head_layer_norm/", "Mixer/encoder_norm/", name)
        name = re.sub("^MixerBlock_", "Mixer/encoderblock_", name)
        return re.sub(
            r"_mixing/Dense_(\d)/(\w+)",
            lambda match: f"_mixing_phase_0/{match[2]}{int(match[1]) + 1}",
            name,
        )
    if layout == "timm":  # timm's MlpMixer
        name = re.sub("^stem/", "stem.proj.", name)
        name = re.sub("^pre_head_layer_norm/", "norm.", name)
        name = re.sub(r"^MixerBlock_(\d+)/", r"blocks.\1.", name)
        name = re.sub(r"LayerNorm_(\d)/", lambda match: f"norm{int(match[1]) + 1}.", name)
        name = re.sub(
            r"(token|channel)_mixing/Dense_(\d)/",
            lambda match: f"mlp_{match[1]}s.fc{int(match[2]) + 1}.",
            name,
        )
        return re.sub("(kernel|scale)$", "weight", name).replace("/", ".")
    return name


def _published(name: str, array: np.ndarray, layout: str) -> np.ndarray:
    """Turns an array as it lies in a file of `layout` to the published orientation."""
    if layout == "timm" and name.endswith("kernel"):
        return array.transpose((2, 3, 1, 0) if array.ndim == 4 else None)
    if "_mixing/Dense_" in name:  # the legacy layout has a unit axis before the others
        shape = list(array.shape)
        while 1 in shape and len(shape) > (2 if name.endswith("kernel") else 1):
            shape.remove(1)
        return array.reshape(shape)
    return array


def _published_shape(name: str, shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    return _published(name, np.broadcast_to(np.float32(0), shape), layout).shape  # no memory


def _stored(name: str, array: np.ndarray, layout: str) -> np.ndarray:
    """The inverse of `_published`."""
    if layout == "timm" and name.endswith("kernel"):
        return np.ascontiguousarray(array.transpose((3, 2, 0, 1) if array.ndim == 4 else None))
    return array[None] if layout == "legacy" and "_mixing/Dense_" in name else array


def _npz_arrays(path: epath.Path) -> dict[str, _Array]:
    """The arrays of an npz file by name; only their headers are read.

    What the headers claim is compared with the length of the file, so that reading an array takes
    no more memory than the file accounts for.
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
            arrays[name] = _Array(shape, dtype.name, read)
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


def _safetensors_arrays(path: epath.Path) -> tuple[dict[str, _Array], str | None]:
    """The arrays of a safetensors file by name, and its "gelu"; only its header is read."""
    import safetensors

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

    def read(name: str) -> np.ndarray:
        with _reading(path, "safetensors"):
            return file.get_tensor(name)

    with _reading(path, "safetensors"):
        path.stat()  # its message is clearer than the library's
        file = safetensors.safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        gelu = (file.metadata() or {}).get("gelu")
        if gelu not in (None, *GELUS):
            raise ValueError(f"its header says gelu={gelu!r}; one of {', '.join(GELUS)}")
        arrays = {
            name: _Array(
                tuple(array.get_shape()),
                names.get(array.get_dtype(), array.get_dtype()),
                functools.partial(read, name),
            )
            for name, array in slices.items()
        }
        return arrays, gelu


@contextlib.contextmanager
def _reading(path: epath.Path, kind: str) -> Iterator[None]:
    """Whatever the libraries make of a file that is none of its kind becomes a UserError."""
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


# What training programs put around weights: of several the first, an average before the rest.
_AROUND = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module", "_orig_mod")
_AROUND += ("params", "opt/target", "target")
_FIRST_PARTS = {"stem", "embedding", "Mixer", "blocks"}


def _unwrapped(arrays: dict[str, _Array]) -> tuple[dict[str, _Array], tuple[str, ...]]:
    """Takes the weights out of a training program's state: (arrays, what was done)."""
    notes = []
    while not any(re.split("[/.]", name)[0] in _FIRST_PARTS for name in arrays):
        for around in _AROUND:
            inside = {
                name[len(around) + 1 :]: array
                for name, array in arrays.items()
                if name.startswith((f"{around}/", f"{around}."))
            }
            if any(_FIRST_PARTS.intersection(re.split("[/.]", name)) for name in inside):
                break
        else:
            break  # no Mixer's
        beside = len(arrays) - len(inside)
        notes.append(
            f"taken out of {around!r}" + f", {beside} arrays beside it left" * bool(beside)
        )
        arrays = inside
    return arrays, tuple(notes)


def _recognise(arrays: Mapping[str, _Array], path: epath.Path) -> str:
    """The layout; UserError for another model, by its name, or for none."""
    if "stem/kernel" in arrays:
        return "published"
    if any(name.startswith(("embedding/", "Mixer/")) for name in arrays):
        return "legacy"
    if not any(name.startswith(("stem.", "blocks.")) for name in arrays):
        some = ", ".join(map(_printable, sorted(arrays)[:4])) or "none"
        raise UserError(
            f"{path} holds no MLP-Mixer: a published file has stem/kernel, a legacy one "
            f"embedding/kernel, timm's stem.proj.weight; this one has {some}"
            f"{' ...' if len(arrays) > 4 else ''}"
        )
    wide, narrow = (arrays.get(f"blocks.0.mlp_tokens.fc{n}.weight") for n in (1, 2))
    other = None
    if any(name.startswith("blocks.0.linear_tokens.") for name in arrays):
        other = "a ResMLP"
    elif any(".gate." in name for name in arrays):
        other = "a gMLP"
    elif wide and narrow and wide.shape[0] == 2 * narrow.shape[-1]:
        other = "a gMixer, with gated MLPs"
    if other:
        raise UserError(f"{path} is {other}: another model; timm's MLP-Mixers are its mixer_*")
    return "timm"


def dimensions(shapes: Shapes, source: epath.PathLike) -> dict[str, int]:
    """The model's dimensions, by its field names, from the shapes of its weights.

    "num_tokens" is S; "num_classes" is 0 where there is no head.

    Raises:
      UserError: the arrays that tell are not there, or have other axes.
    """
    tell = {
        "stem/kernel": 4,
        "MixerBlock_0/token_mixing/Dense_0/kernel": 2,
        "MixerBlock_0/channel_mixing/Dense_0/kernel": 2,
    }
    faults = [f"{name}: missing" for name in tell if name not in shapes]
    for name, axes in (tell | {"head/kernel": 2}).items():
        if name in shapes and len(shapes[name]) != axes:
            faults.append(f"{name}: {shapes[name]} has not {axes} axes")
        elif 0 in shapes.get(name, ()):
            faults.append(f"{name}: {shapes[name]} holds nothing")
    if faults:
        raise UserError(f"{source} is no whole MLP-Mixer: {'; '.join(faults)}")
    patch_size, _, _, hidden_dim = shapes["stem/kernel"]
    num_tokens, tokens_mlp_dim = shapes["MixerBlock_0/token_mixing/Dense_0/kernel"]
    _, channels_mlp_dim = shapes["MixerBlock_0/channel_mixing/Dense_0/kernel"]
    return {
        "patch_size": patch_size,
        "hidden_dim": hidden_dim,
        "num_blocks": _num_blocks(shapes),
        "tokens_mlp_dim": tokens_mlp_dim,
        "channels_mlp_dim": channels_mlp_dim,
        "num_tokens": num_tokens,
        "num_classes": shapes.get("head/kernel", (0,))[-1],
    }


def find_variant(dims: Mapping[str, int]) -> str | None:
    """The variant of these dimensions; its tokens_mlp_dim may be a multiple, from growth."""
    for name, variant in VARIANTS.items():
        rest = {key: value for key, value in variant.items() if key != "tokens_mlp_dim"}
        same = all(dims[key] == value for key, value in rest.items())
        if same and dims["tokens_mlp_dim"] % variant["tokens_mlp_dim"] == 0:
            return name
    return None


def square_side(num_tokens: int, patch_size: int) -> int | None:
    """Side in pixels of the square image of `num_tokens` patches; None where there is none."""
    side = math.isqrt(num_tokens)
    return side * patch_size if side * side == num_tokens else None


def card_path(path: epath.PathLike) -> epath.Path:
    """Where the JSON of a file of weights is: its name and ".json"."""
    path = epath.Path(path)
    return path.with_name(path.name + ".json")


def read_card(path: epath.PathLike) -> tuple[dict[str, Any], int] | None:
    """The JSON beside a file of weights: a card's values, and a checksum of the arrays.

    None where there is none of ours.

    Raises:
      UserError: it is damaged, of a later version, or has a value that no card has.
    """
    path = card_path(path)
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if not str(found).startswith(FORMAT.rpartition(",")[0]):
        return None
    if found != FORMAT:
        raise UserError(f"{path} is of the format {str(found)[:80]!r}, and {FORMAT!r} is read")
    wanted = [field.name for field in dataclasses.fields(Card)]
    if missing := [name for name in (*wanted, "checksum") if name not in values]:
        raise DamagedError(path, f"{path} lacks {', '.join(missing)}")
    card = {name: values[name] for name in wanted}
    names, size = card["class_names"], card["image_size"]
    if isinstance(names, list):
        named = len(names) == card["num_classes"] and all(isinstance(n, str) for n in names)
    else:
        named = names is None or LISTS.get(str(names)) == card["num_classes"]
    sized = isinstance(size, list) and len(size) == 2
    for name, good in (
        ("gelu", card["gelu"] in GELUS),
        ("image_size", sized and all(type(side) is int and side > 0 for side in size)),
        ("class_names", named),
        ("preprocess", card["preprocess"] is None or _are_steps(card["preprocess"])),
        ("source", isinstance(card["source"], str)),
    ):
        if not good:
            text = str(card[name])[:80]
            raise DamagedError(path, f"{path} says {name}={text}, which cannot be")
    card["image_size"] = tuple(size)
    card["class_names"] = tuple(names) if isinstance(names, list) else names
    return card, values["checksum"]


def read_json(path: epath.Path) -> Any:
    """What a JSON file holds, None where there is no such file.

    Raises:
      UserError: it is no regular file, too large or damaged.
    """
    try:
        if not path.exists():
            return None
        check_regular(path)
        if path.stat().length > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        return json.loads(path.read_text())
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"{path} is damaged: {first_line(error)}") from None
    except OSError as error:
        raise DamagedError(path, f"{path} is damaged: {error.strerror or error}") from None


def _are_steps(preprocess: Any) -> bool:
    try:
        return all(map(math.isfinite, pixel_range(preprocess)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError):
        return False


def checksum(read: Callable[[str], np.ndarray], shapes: Shapes) -> int:
    """A sum over a few small arrays: other weights of the same shapes have another."""
    names = ("stem/bias", "pre_head_layer_norm/scale", "pre_head_layer_norm/bias", "head/bias")
    data = [read(name).astype("<f4").tobytes() for name in names if name in shapes]
    return zlib.crc32(b"".join(data))


def write_file(
    path: epath.PathLike, arrays: Mapping[str, Any], card: Card, *, layout: str
) -> epath.Path:
    """Writes a file of weights and its JSON, each whole or not at all.

    The bytes are a function of the arrays alone.

    Args:
      path: ends as ENDINGS says for the layout.
      arrays: by published name, float32.
      card: for the JSON, which has the arguments of timm's MlpMixer too.
      layout: "published", "legacy" or "timm".

    Returns:
      The path of the JSON.

    Raises:
      UserError: a value is NaN or infinite, or the ending is another layout's.
    """
    path = epath.Path(path)
    if path.suffix != ENDINGS[layout]:
        raise UserError(f"{path}: files in the {layout} layout end in {ENDINGS[layout]}")
    stored = {}
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if fault := not_finite(array):
            raise UserError(f"{path} is not written: {name} {fault}")
        stored[_stored_name(name, layout)] = _stored(name, array, layout)
    values = {"format": FORMAT, "layout": layout} | dataclasses.asdict(card)
    values["checksum"] = checksum(lambda name: np.asarray(arrays[name]), arrays)
    values["timm"] = timm_arguments(card)
    # The JSON gets its name first: arrays without it could be taken for something else.
    with files.whole(path) as new, files.whole(card_path(path)) as new_card:
        files.write_text(new_card, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        if layout == "timm":
            import safetensors.numpy

            try:
                safetensors.numpy.save_file(stored, new, {"gelu": card.gelu})
            except safetensors.SafetensorError as error:  # of what the file system says
                raise OSError(first_line(error)) from None
            files.open_up(new, 0o666)
        else:
            _write_npz(new, stored)
    return card_path(path)


def _write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # With a ZipInfo of its own: savez would write the time of day.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def timm_arguments(card: Card) -> dict[str, Any]:
    """The arguments of timm.models.mlp_mixer.MlpMixer that make the model of `card`.

    `act_layer` is a name for timm.layers.get_act_layer.
    """

    def ratio(width: int) -> float:  # timm cuts ratio * embed_dim down to a whole number
        found = width / card.hidden_dim
        while int(found * card.hidden_dim) < width:
            found = math.nextafter(found, math.inf)
        return found

    return {
        "num_classes": card.num_classes,
        "img_size": list(card.image_size),
        "patch_size": card.patch_size,
        "num_blocks": card.num_blocks,
        "embed_dim": card.hidden_dim,
        "mlp_ratio": [ratio(card.tokens_mlp_dim), ratio(card.channels_mlp_dim)],
        "act_layer": "gelu" if card.gelu == "erf" else "gelu_tanh",
    }


def not_finite(array: np.ndarray) -> str:
    """Says how much of `array` is NaN or infinite; "" where all of it is finite."""
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    return f"holds NaN or infinity in {bad:,} of {array.size:,} places" if bad else ""


def _printable(text: str) -> str:
    """A text with names out of a file in one line, not longer than such names are."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:400])
    return text[:300]


def listed(faults: Iterable[str], most: int = 40) -> str:
    """The faults in one line, in order; of very many the first, of very long ones the beginning."""
    faults = sorted(_printable(fault) for fault in faults)
    rest = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + rest
