"""Finds weights anywhere and recognises what they are; no array is read."""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from mixer import run_files
from mixer.errors import UserError
from mixer.models import registry
from mixer.parallel import backend, sharding
from mixer.weights import checkpoint, fetch, foreign, formats, published
from mixer.weights.arrays import DamagedError, Shapes, listed, not_finite
from mixer.weights.card import Card, card_path, checksum, read_card, read_json


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """Weights that are recognised and not read yet.

    Attributes:
      path: as it was given.
      card: what they are.
      shapes: of the arrays, by published name.
      dtype: of the computation that they were trained or saved with.
      preprocess_at: the steps of evaluation for images of another size (H, W), None if not known.
      restore: (abstract arrays by name, function of a name and an array or None) -> arrays; the
        function turns each array into what is placed as the abstract one.
      about: what was recognised and what assumed, for the log.
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
      path: as for `mixer.load`.
      image_size: where no JSON beside a file says its own: the size that the weights are for, if it
        has as many patches as they have tokens.
      gelu: as for `mixer.load`.
      log: gets a line on what is fetched.

    Raises:
      UserError: nothing there, or another model.
    """
    backend.start()
    source = published.shown(path)
    if fetch.is_remote_file(path):
        local = fetch.fetch(path, log=log)
        with _fetched():
            return _find_file(source, local, image_size, gelu, fetched=True)
    local = epath.Path(path).expanduser()
    if fetch.is_directory(path):
        return _find_run(source, local, gelu)
    if not fetch.exists(path) and local.suffix.lower() not in foreign.ENDINGS:
        newest = local.with_name(f"{local.name}-LAST")  # of a series of big_vision's
        raise UserError(
            (fetch.exists(newest) and foreign.advice(local))
            or f"{path}: no such run or file; expected a run, a step of it, an .npz or "
            f".safetensors file, or one of {', '.join(published.CHECKPOINTS)}"
        )
    return _find_file(source, local, image_size, gelu, fetched=False)


@contextlib.contextmanager
def _fetched() -> Iterator[None]:
    """Says of a damaged file that was fetched how to get rid of it."""
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{error}{fetch.fetch_anew(error.path)}") from None


# A file.


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
    saved = _read_card(path, file, dims)
    num_tokens, num_classes = dims.pop("num_tokens"), dims.pop("num_classes")
    # A local file's own name may say what it is; that of its folder is its owner's affair.
    name = source if fetched else path.name
    facts = published.facts(name, layout=file.layout, num_classes=num_classes)
    if file.layout == "timm" and (config := _timm_config(path)):
        facts = published.timm_facts(config, source=source, num_classes=num_classes)

    about = [f"{file.layout} layout", *file.notes]
    if saved:
        size = saved["image_size"]
    else:
        size, assumed = _assumed_size(source, num_tokens, dims["patch_size"], image_size)
        about.append(assumed)
    kind, why = formats.GELU_OF[file.layout], f"the {file.layout} layout's"
    for value, reason in (
        (file.gelu, "its header"),
        (saved.get("gelu"), "its JSON"),
        (gelu, "as asked"),
    ):
        kind, why = (value, reason) if value else (kind, why)
    card = Card(
        architecture=file.architecture,
        variant=registry.find_variant(architecture, dims),
        dimensions=dims,
        num_classes=num_classes,
        image_size=size,
        gelu=kind,
        preprocess=saved["preprocess"] if saved else facts.preprocess(size),
        class_names=saved["class_names"] if saved else facts.class_names,
        source=published.shown(saved.get("source", source)),
    )
    about.append(_described(card, f"{kind} ({why})"))
    if facts.note and not saved:
        about.append(facts.note)
    return StoredWeights(
        path=source,
        card=card,
        shapes=file.shapes,
        dtype="float32",
        # The steps in a JSON name sizes of their own, which nobody else can change.
        preprocess_at=(lambda size: None) if saved else facts.preprocess,
        restore=functools.partial(_restore_file, file, source, fetched),
        about="; ".join(about),
    )


def _read_card(path: epath.Path, file: formats.File, dims: Mapping[str, int]) -> dict[str, Any]:
    """The JSON beside a file, which has to agree with the arrays; {} where there is none."""
    saved, json_path = read_card(path), card_path(path)
    if saved is None:
        return {}
    for name, value in dims.items():
        if name != "num_tokens" and saved.get(name) != value:
            text = str(saved.get(name))[:80]
            raise UserError(
                f"{json_path} says {name}={text}, and the arrays of {path.name} have {value}"
            )
    if math.prod(saved["image_size"]) != dims["num_tokens"] * dims["patch_size"] ** 2:
        raise UserError(
            f"{json_path} says image_size={saved['image_size']}, and the arrays of {path.name} are "
            f"for {dims['num_tokens']} patches of {dims['patch_size']} pixels"
        )
    if saved["checksum"] != checksum(file.read, file.shapes):
        raise DamagedError(
            json_path,
            f"{json_path} was written for other weights than {path.name} has now; remove it, or "
            "bring it up to date",
        )
    return saved


def _timm_config(path: epath.Path) -> dict[str, Any] | None:
    """The config.json of timm beside a file, as on the Hugging Face Hub."""
    config = read_json(path.with_name("config.json"))
    return config if isinstance(config, dict) and "architecture" in config else None


def _assumed_size(
    source: str, num_tokens: int, patch_size: int, asked: int | tuple[int, int] | None
) -> tuple[tuple[int, int], str]:
    """The image size of weights for so many patches, which is all that arrays tell, and why."""
    asked = asked if asked is None else parse_size(asked)
    if asked and math.prod(asked) == num_tokens * patch_size**2:
        return asked, "image size as asked"  # no other weights could be grown to it
    if side := _square_side(num_tokens, patch_size):
        return (side, side), "a square image assumed"
    raise UserError(
        f"{source} is for images of {num_tokens} patches, which make no square; image_size=(H, W) "
        "says which they are"
    )


def _restore_file(
    file: formats.File,
    source: str,
    fetched: bool,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    turn: Callable[[str, np.ndarray], np.ndarray] | None,
) -> dict[str, jax.Array]:
    placed, faults = {}, []
    for name, leaf in wanted.items():  # one at a time: the host never holds two copies
        with _fetched() if fetched else contextlib.nullcontext():
            array = file.read(name)
        if fault := not_finite(array):
            faults.append(f"{name} {fault}")
        array = array.astype(leaf.dtype, copy=False)
        placed[name] = _place(array if turn is None else turn(name, array), leaf)
    if faults:
        raise UserError(f"{source}: {listed(faults)}")
    return placed


# A run.


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
        side = _square_side(num_tokens, dims["patch_size"])
        if side is None:
            raise UserError(f"{path}: no config.json in the run says which images it is for")
        config = {"image_size": side, "model": {}, "dataset": {}}
        about.append("no config.json: the authors' GELU and a square image assumed")
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
    if math.prod(card.grid) != num_tokens:
        raise UserError(
            f"{step}: its weights are for {num_tokens} patches, and its config.json says images "
            f"of {card.image_size[0]} x {card.image_size[1]}"
        )
    about.append(_described(card, f"{kind} ({'as asked' if gelu else 'its config'})"))
    return StoredWeights(
        path=source,
        card=card,
        shapes=shapes,
        dtype=fields.get("dtype", "float32"),
        preprocess_at=lambda size: None,  # as for a JSON
        restore=functools.partial(_restore_run, step, shapes, item),
        about="; ".join(about),
    )


def _restore_run(
    step: epath.Path,
    shapes: Shapes,
    item: str,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    turn: Callable[[str, np.ndarray], np.ndarray] | None,
) -> dict[str, jax.Array]:
    without = "head" if "head/kernel" in shapes and "head/kernel" not in wanted else ""
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    as_saved = {
        name: leaf
        if turn is None
        else jax.ShapeDtypeStruct(shapes[name], leaf.dtype, sharding=one_device)
        for name, leaf in wanted.items()
    }
    abstract = sharding.abstract(traverse_util.unflatten_dict(as_saved, sep="/"))
    tree = checkpoint.restore_params(step, abstract, item=item, without=without)
    arrays = traverse_util.flatten_dict(tree, sep="/")
    del tree
    if turn is None:
        return arrays
    # Taken out one by one, so that the old ones go as the new ones come.
    return {
        name: _place(turn(name, np.asarray(arrays.pop(name))), leaf)
        for name, leaf in wanted.items()
    }


# Both.


def parse_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (H, W) of a side in pixels or of both.

    Raises:
      UserError: it is neither.
    """
    try:
        sides = tuple(map(operator.index, np.broadcast_to(image_size, (2,))))
    except (TypeError, ValueError):
        sides = (0, 0)
    if min(sides) < 1:
        raise UserError(f"image_size={image_size!r}; expected a side in pixels, or (height, width)")
    if max(sides) >= 1 << 31:
        raise UserError("image_size: a side of 2,147,483,648 pixels or more is in no image")
    return sides


def _square_side(num_tokens: int, patch_size: int) -> int | None:
    """Side in pixels of the square image of `num_tokens` patches; None where there is none."""
    side = math.isqrt(num_tokens)
    return side * patch_size if side * side == num_tokens else None


def _described(card: Card, gelu: str) -> str:
    architecture = registry.ARCHITECTURES[card.architecture]
    what = card.variant or ", ".join(f"{name}={dim}" for name, dim in card.dimensions.items())
    grown = architecture.grown_dim
    if card.variant and card.dimensions[grown] != architecture.variants[card.variant][grown]:
        what += f" with {grown}={card.dimensions[grown]}"
    low, high = card.value_range
    return (
        f"{what}, {card.image_size[0]} x {card.image_size[1]}, "
        + f"{card.num_classes:,} classes, " * bool(card.num_classes)
        + f"GELU {gelu}"
        + f", pixels in [{low:g}, {high:g}]" * ((low, high) != (-1, 1))
    )


def _place(array: np.ndarray, leaf: Any) -> jax.Array:
    """`array` in the dtype and on the devices of `leaf`; each device gets its own part alone."""
    array = array.astype(leaf.dtype, copy=False)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])
