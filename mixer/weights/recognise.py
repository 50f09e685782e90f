"""Finds weights at any source and recognises their architecture without reading an array."""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from mixer import run_files, sizes
from mixer.data.preprocessing.spec import with_channels
from mixer.errors import UserError
from mixer.models import registry
from mixer.parallel import backend, sharding
from mixer.weights import checkpoint, fetch, foreign, formats, published
from mixer.weights.arrays import DamagedError, Shapes, describe_non_finite, join_faults
from mixer.weights.card import Card, card_path, checksum, read_card, read_json


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """Weights that have been recognised but not read.

    Attributes:
      path: the path that the caller passed.
      card: the model and data that the weights are for.
      shapes: shapes of the arrays by published name.
      dtype: compute dtype that the weights were trained or saved with.
      preprocess_at: function (H, W) -> evaluation preprocessing for images of that size, or None if
        it is unknown.
      restore: function (abstract arrays by name, transform or None) -> arrays. `transform(name,
        array)` converts each array to the shape of its abstract array before it is placed.
      about: a line for the log that lists what was recognised and what was assumed.
    """

    path: str
    card: Card
    shapes: Shapes
    dtype: str
    preprocess_at: Callable[[tuple[int, int]], str | None]
    restore: Callable[..., dict[str, jax.Array]]
    about: str


def find(
    path: epath.PathLike,
    *,
    image_size: int | tuple[int, int] | None = None,
    gelu: str | None = None,
    log: Callable[[str], None] = print,
) -> StoredWeights:
    """Finds and recognises the weights at `path`.

    Args:
      path: as in `mixer.load`.
      image_size: the image size of a file without a JSON sidecar. It is used only if its number of
        patches equals the number of tokens of the weights.
      gelu: as in `mixer.load`.
      log: called with a line on what is fetched.

    Raises:
      UserError: `path` does not exist, or holds another model.
    """
    backend.start()
    source = published.redact(path)
    if fetch.is_remote_file(path):
        local = fetch.fetch(path, log=log)
        with _refetch_hint():
            return _find_file(source, local, image_size, gelu, fetched=True)
    local = epath.Path(path).expanduser()
    if fetch.is_run(path):
        return _find_run(source, local, gelu)
    local = fetch.hub_weights(local) or local
    if not fetch.exists(path) and local.suffix.lower() not in foreign.ENDINGS:
        newest = local.with_name(f"{local.name}-LAST")  # big_vision's name of the newest
        raise UserError(
            (fetch.exists(newest) and foreign.advice(local))
            or f"{path}: no such run or file; expected a run, one of its checkpoints, an .npz or "
            ".safetensors file, a folder in the Hub's format, or one of "
            f"{', '.join(published.CHECKPOINTS)}"
        )
    return _find_file(source, local, image_size, gelu, fetched=False)


@contextlib.contextmanager
def _refetch_hint() -> Iterator[None]:
    """Adds instructions for a new download to the message of a damaged file."""
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{error}{fetch.refetch_hint(error.path)}") from None


# Weight files.


def _find_file(
    source: str,
    path: epath.Path,
    image_size: int | tuple[int, int] | None,
    gelu: str | None,
    *,
    fetched: bool,
) -> StoredWeights:
    file = formats.open_file(path)
    if released := published.find(source):
        try:
            published.check(released, file.shapes, path.stat().length)
        except UserError as error:
            raise DamagedError(path, str(error)) from None
    architecture = registry.ARCHITECTURES[file.architecture]
    dims = architecture.read_dimensions(file.shapes, source)
    sidecar = _read_card(path, file, dims)
    num_tokens, num_classes = dims.pop("num_tokens"), dims.pop("num_classes")
    # A local file's name may identify the weights. The name of its folder says nothing about them.
    name = source if fetched else path.name
    facts = published.facts(name, layout=file.layout, num_classes=num_classes)
    if file.layout == "timm" and (config := _timm_config(path)):
        facts = published.timm_facts(config, source=source, num_classes=num_classes)

    about = [f"{file.layout} layout", *file.notes]
    if sidecar:
        size = sidecar["image_size"]
    else:
        size, assumption = _assumed_size(
            source, num_tokens, dims["patch_size"], image_size, facts.image_size
        )
        about.append(assumption)
    gelu_sources = (
        (gelu, "as requested"),
        (sidecar.get("gelu"), "its JSON"),
        (file.gelu, "its header"),
        (facts.gelu, "its config.json"),
        (formats.GELU_OF[file.layout], f"the {file.layout} layout's"),
    )
    kind, origin = next((kind, origin) for kind, origin in gelu_sources if kind)

    def preprocess_at(size: tuple[int, int]) -> str | None:
        preprocess = facts.preprocess(size)
        return preprocess and with_channels(preprocess, dims["in_channels"])

    card = Card(
        architecture=file.architecture,
        variant=registry.find_variant(architecture, dims),
        dimensions=dims,
        num_classes=num_classes,
        image_size=size,
        gelu=kind,
        preprocess=sidecar["preprocess"] if sidecar else preprocess_at(size),
        class_names=sidecar["class_names"] if sidecar else facts.class_names,
        source=published.redact(sidecar.get("source", source)),
    )
    about.append(_describe(card, f"{kind} ({origin})"))
    if facts.note and not sidecar:
        about.append(facts.note)
    return StoredWeights(
        path=source,
        card=card,
        shapes=file.shapes,
        dtype="float32",
        # The preprocessing in a JSON sidecar contains fixed sizes, so it fits no other image size.
        preprocess_at=(lambda size: None) if sidecar else preprocess_at,
        restore=functools.partial(_restore_file, file, source, fetched),
        about="; ".join(about),
    )


def _read_card(path: epath.Path, file: formats.File, dims: Mapping[str, int]) -> dict[str, Any]:
    """Reads the JSON sidecar of a file and checks it against the arrays; {} if there is none."""
    sidecar, json_path = read_card(path), card_path(path)
    if sidecar is None:
        return {}
    for name, value in dims.items():
        value = list(value) if isinstance(value, tuple) else value  # as in JSON
        if name != "num_tokens" and sidecar.get(name) != value:
            text = str(sidecar.get(name))[:80]
            raise UserError(
                f"{json_path}: {name}={text}; expected {value}, as in the arrays of {path.name}"
            )
    num_tokens, patch_size = dims["num_tokens"], dims["patch_size"]
    if num_tokens and not _fits(sidecar["image_size"], num_tokens, patch_size):
        raise UserError(
            f"{json_path}: image_size={sidecar['image_size']}; the arrays of {path.name} are for "
            f"{num_tokens} patches of {sizes.text(patch_size)} pixels"
        )
    if sidecar["checksum"] != checksum(file.read, file.shapes):
        raise DamagedError(
            json_path,
            f"{json_path}: its checksum does not match the weights in {path.name}; remove the JSON "
            "file, or write it again",
        )
    return sidecar


def _timm_config(path: epath.Path) -> dict[str, Any] | None:
    """Reads timm's config.json in the folder of a file, as on the Hugging Face Hub."""
    config = read_json(path.with_name("config.json"))
    return config if isinstance(config, dict) and "architecture" in config else None


def _assumed_size(
    source: str,
    num_tokens: int | None,
    patch_size: sizes.Size,
    image_size: int | tuple[int, int] | None,
    config_size: tuple[int, int] | None,
) -> tuple[tuple[int, int], str]:
    """Returns an image size with `num_tokens` patches, and the reason for the choice.

    The arrays give only the number of patches, not the height and width. With fixed positions
    (`num_tokens` None) they do not even give that. `config_size` is that of timm's config.json;
    older versions of timm did not update it if the model was resized.
    """
    size = image_size if image_size is None else parse_size(image_size)
    if num_tokens is None and size:
        return size, "image size as requested"
    side = published.IMAGE_SIZE
    if num_tokens is None and all(side % patch == 0 for patch in sizes.pair(patch_size)):
        return (side, side), f"assuming {side} x {side} images, as the positions fit any size"
    if num_tokens is None:
        raise UserError(
            f"{source}: the weights fit any image size; pass image_size=(H, W), multiples of "
            f"{sizes.text(patch_size)}"
        )
    if size and _fits(size, num_tokens, patch_size):
        return size, "image size as requested"
    if config_size and _fits(config_size, num_tokens, patch_size):
        return config_size, "image size of its config.json"
    if side := _square_side(num_tokens, patch_size):
        return (side, side), "assuming a square image"
    raise UserError(
        f"{source}: the weights are for {num_tokens} patches, which do not form a square image; "
        "pass image_size=(H, W)"
    )


def _restore_file(
    file: formats.File,
    source: str,
    fetched: bool,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    transform: Callable[[str, np.ndarray], np.ndarray] | None,
) -> dict[str, jax.Array]:
    placed, faults = {}, []
    for name, leaf in leaves.items():  # one at a time, so that the host never holds two copies
        with _refetch_hint() if fetched else contextlib.nullcontext():
            array = file.read(name)
        if fault := describe_non_finite(array):
            faults.append(f"{name} {fault}")
        array = array.astype(leaf.dtype, copy=False)
        placed[name] = _place(array if transform is None else transform(name, array), leaf)
    if faults:
        raise UserError(f"{source}: {join_faults(faults)}")
    return placed


# Runs.


def _find_run(source: str, path: epath.Path, gelu: str | None) -> StoredWeights:
    step = checkpoint.find_step(path)
    item, about = "params", [f"run, step {step.name}"]
    if shapes := checkpoint.saved_params(step, "ema_params"):
        item = "ema_params"
        about.append("moving average")
    else:
        shapes = checkpoint.saved_params(step)
    name, _ = formats.recognise(shapes, path)
    architecture = registry.ARCHITECTURES[name]
    dims = architecture.read_dimensions(shapes, path)
    num_tokens, num_classes = dims.pop("num_tokens"), dims.pop("num_classes")
    workdir = step.parent.parent
    config = run_files.read_config(workdir)
    data = run_files.read_data(workdir, is_trained=run_files.is_trained(config or {}))
    if config is None:
        side = _square_side(num_tokens, dims["patch_size"]) if num_tokens else None
        if side is None:
            raise UserError(
                f"{path}: the image size is unknown, because the run has no config.json"
            )
        config = {"image_size": side, "model": {}, "dataset": {}}
        about.append("no config.json: assuming the authors' GELU and a square image")
    fields = config["model"]
    kind = gelu or fields.get("gelu") or "tanh"
    class_names = data["class_names"] if data else None
    card = Card(
        architecture=name,
        variant=registry.find_variant(architecture, dims),
        dimensions=dims,
        num_classes=num_classes,
        image_size=parse_size(config["image_size"]),
        gelu=kind,
        preprocess=config["dataset"].get("eval_preprocess"),
        class_names=tuple(class_names) if isinstance(class_names, list) else class_names,
        source=config["source"] if "source" in config else str(path),
    )
    if num_tokens and math.prod(card.grid) != num_tokens:
        raise UserError(
            f"{step}: the weights are for {num_tokens} patches, but config.json gives images of "
            f"{card.image_size[0]} x {card.image_size[1]}"
        )
    about.append(_describe(card, f"{kind} ({'as requested' if gelu else 'its config'})"))
    return StoredWeights(
        path=source,
        card=card,
        shapes=shapes,
        dtype=fields.get("dtype", "float32"),
        preprocess_at=lambda size: None,  # the run's preprocessing contains fixed sizes
        restore=functools.partial(_restore_run, step, shapes, item),
        about="; ".join(about),
    )


def _restore_run(
    step: epath.Path,
    shapes: Shapes,
    item: str,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    transform: Callable[[str, np.ndarray], np.ndarray] | None,
) -> dict[str, jax.Array]:
    skip = "head" if "head/kernel" in shapes and "head/kernel" not in leaves else ""
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    saved_leaves = {
        name: leaf
        if transform is None
        else jax.ShapeDtypeStruct(shapes[name], leaf.dtype, sharding=one_device)
        for name, leaf in leaves.items()
    }
    abstract = sharding.abstract(traverse_util.unflatten_dict(saved_leaves, sep="/"))
    tree = checkpoint.restore_params(step, abstract, item=item, skip=skip)
    arrays = traverse_util.flatten_dict(tree, sep="/")
    del tree
    if transform is None:
        return arrays
    # pop() frees each saved array as soon as its resized copy exists.
    return {
        name: _place(transform(name, np.asarray(arrays.pop(name))), leaf)
        for name, leaf in leaves.items()
    }


# Shared by files and runs.


def parse_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (H, W) for a side in pixels or a pair of sides.

    Raises:
      UserError: `image_size` is neither of them, or too large.
    """
    try:
        sides = tuple(map(operator.index, np.broadcast_to(image_size, (2,))))
    except (TypeError, ValueError):
        sides = (0, 0)
    if min(sides) < 1:
        raise UserError(f"image_size={image_size!r}; expected a side in pixels, or (height, width)")
    if max(sides) >= 1 << 31:
        raise UserError(f"image_size={image_size!r}; expected sides below 2,147,483,648 pixels")
    return sides


def _fits(image_size: Sequence[int], num_tokens: int, patch_size: sizes.Size) -> bool:
    """Returns whether an image of (H, W) pixels has as many pixels as `num_tokens` patches."""
    return math.prod(image_size) == num_tokens * math.prod(sizes.pair(patch_size))


def _square_side(num_tokens: int, patch_size: sizes.Size) -> int | None:
    """Returns the side in pixels of a square image of `num_tokens` patches, or None."""
    patch_sides = sizes.pair(patch_size)
    side = math.isqrt(num_tokens * math.prod(patch_sides))
    is_divisible = all(side % patch_side == 0 for patch_side in patch_sides)
    return side if is_divisible and _fits((side, side), num_tokens, patch_size) else None


def _describe(card: Card, gelu: str) -> str:
    variants = registry.ARCHITECTURES[card.architecture].variants
    # All dimensions, or those in which the weights differ from their variant.
    variant = {"in_channels": sizes.RGB_CHANNELS, **variants.get(card.variant, {})}
    dims = [f"{key}={dim}" for key, dim in card.dimensions.items() if variant.get(key) != dim]
    model = " with ".join(filter(None, (card.variant, ", ".join(dims))))
    low, high = card.value_range
    return (
        f"{model}, {card.image_size[0]} x {card.image_size[1]}, "
        + f"{card.num_classes:,} classes, " * bool(card.num_classes)
        + f"GELU {gelu}"
        + f", pixels in [{low:g}, {high:g}]" * ((low, high) != (-1, 1))
    )


def _place(array: np.ndarray, leaf: Any) -> jax.Array:
    """Places `array` with the dtype and sharding of `leaf`; each device receives only its shard."""
    array = array.astype(leaf.dtype, copy=False)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])
