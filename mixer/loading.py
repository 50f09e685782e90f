"""`mixer.load`: weights from anywhere, as a model and its parameters.

A run, a step of it, or a file (mixer/weights.py) is found and recognised; every array's name, shape
and dtype is checked before the first is read; then each goes where it belongs on the mesh. (The
module is not called load: the function `mixer.load` has that name.)
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from mixer import checkpoint, published, remote, resolution, sharding, weights
from mixer.errors import UserError
from mixer.model import MlpMixer, check_image_size
from mixer.weights import Card, Shapes

HEADS = ("keep", "reset", "auto")
RESIZES = ("grow", "interpolate")


@dataclasses.dataclass(frozen=True)
class Found:
    """Weights that were found and recognised, and are not read yet.

    Attributes:
      card: what they are.
      shapes: of the arrays, by published name.
      dtype: of the computation that they were trained or saved with.
      preprocess_at: the steps of evaluation for images of another size (H, W), None if not known.
      restore: from arrays as they should be placed, by name, (and a function of each one's name
        and values that makes it what is placed) to the arrays.
      about: what was recognised and what assumed, for the log.
    """

    card: Card
    shapes: Shapes
    dtype: str
    preprocess_at: Callable[[tuple[int, int]], str | None]
    restore: Callable[..., dict[str, jax.Array]]
    about: str


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, its parameters by published names, and what they are."""

    model: MlpMixer
    params: Any
    card: Card


def load(path: epath.PathLike, **options: Any) -> tuple[MlpMixer, Any]:
    """Loads weights: `model, params = mixer.load("RUN_OR_FILE")`.

    `logits, out = model.apply({"params": params}, images)` then takes images (N, H, W, 3) in
    [-1, 1].

    Args:
      path: a run, a step of it (RUN/best, RUN/checkpoints/1000), an npz file in the published or
        the legacy layout, a safetensors file with timm's names, each local or at gs://; a file at
        https://; hf://owner/name; or a published checkpoint's short name, such as "B/16-i21k". Of a
        run that keeps a moving average of its parameters, the average.
      **options: those of `read`, which also says what the weights are.

    Returns:
      The Flax module, and its parameters as nested dicts of float32 arrays.

    Raises:
      UserError: see `read`.
    """
    loaded = read(path, **options)
    return loaded.model, loaded.params


def read(
    path: epath.PathLike,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    gelu: str | None = None,
    head: str = "auto",
    resize: str = "grow",
    mesh: Mesh | None = None,
    log: Callable[[str], None] = print,
) -> Loaded:
    """Loads weights, and says what they are.

    Args:
      path: as for `load`.
      num_classes: width of the head; None: that of the weights.
      image_size: side in pixels of square images, or (H, W); None: that of the weights.
      dtype: of the computation, "float32" or "bfloat16"; None: the run's own, float32 for a file.
      gelu: "tanh" or "erf"; None: the run's own; of a file, what the JSON beside it says, else
        that of the code whose layout it is.
      head: "keep": the saved head has to fit; "reset": zeros; "auto": zeros if it does not fit.
      resize: for another image size: "grow": by whole factors, as the paper does; "interpolate":
        to any size that the patch divides (mixer/resolution.py).
      mesh: where to; each device gets its part as it is read. None: the default device.
      log: gets one line: what was recognised, what was assumed, what became of the head.

    Raises:
      UserError: nothing there, another model, or weights that do not fit; every misfit is listed.
    """
    _check_choice("head", head, HEADS)
    _check_choice("resize", resize, RESIZES)
    found = find(path, image_size=image_size, gelu=gelu, log=log)
    size = found.card.image_size if image_size is None else _size(image_size)
    check_image_size(size, found.card.patch_size)
    card = resized(found, size, resize)
    classes = num_classes or found.card.num_classes
    if not classes:
        raise UserError(f"{path} has no head; num_classes says how wide a new one is to be")
    # The model is made before the arrays are checked: it says what they should be.
    dtype = found.dtype if dtype is None else jnp.dtype(dtype).name
    model = card.model(num_classes=classes, dtype=dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))["params"]
    where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    if mesh is not None:
        where = sharding.state_shardings(mesh, shapes)
    abstract = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, where
    )
    params, how = fit(found, abstract, image_size=size, head=head, resize=resize)
    if "head" not in params:
        params["head"] = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract["head"]
        )
        card = dataclasses.replace(card, class_names=None)
    card = dataclasses.replace(card, num_classes=classes)
    log(f"{path}: {found.about}; {how}")
    return Loaded(model, params, card)


def initial_params(
    found: Found, params: Any, *, image_size: tuple[int, int], head: str, resize: str
) -> tuple[Any, str]:
    """Replaces a new model's parameters by those that were found.

    Args:
      found: by `find`.
      params: freshly initialised, where they belong on the mesh; a head that is not kept stays.
      image_size: (H, W) that `params` are for.
      head: as for `read`, as is `resize`.
      resize: as for `read`.

    Returns:
      The parameters, and what was done with size and head.

    Raises:
      UserError: weights that do not fit; every misfit is listed.
    """
    taken, how = fit(found, params, image_size=image_size, head=head, resize=resize)
    return {**params, **taken}, how


def fit(
    found: Found, like: Any, *, image_size: tuple[int, int], head: str, resize: str
) -> tuple[dict[str, Any], str]:
    """Reads what was found, for the model whose parameters are `like`, and places it as they are.

    Returns:
      The parameters, without the head where that is not kept; and what was done.
    """
    card, wanted = found.card, traverse_util.flatten_dict(like, sep="/")
    width = wanted["head/bias"].shape[0]
    reset = head == "reset" or (head == "auto" and width != card.num_classes)
    shapes = found.shapes
    if reset:
        wanted = {name: leaf for name, leaf in wanted.items() if name not in weights.HEAD}
        shapes = {name: shape for name, shape in shapes.items() if name not in weights.HEAD}
    shape_of, turn = _resizing(card, image_size, resize)
    _check_shapes(shapes, wanted, shape_of, card.source)
    arrays = found.restore(wanted, turn)
    how = []
    if image_size != card.image_size:
        to = f"{image_size[0]} x {image_size[1]}"
        how.append(f"interpolated to {to}" if resize == "interpolate" else f"grown to {to}")
    how.append("head kept" if not reset else f"head reset ({card.num_classes:,} -> {width:,})")
    return traverse_util.unflatten_dict(arrays, sep="/"), ", ".join(how)


def _resizing(
    card: Card, image_size: tuple[int, int], resize: str
) -> tuple[Callable, Callable | None]:
    """What becomes of a leaf's shape, and of its values (None: they stay), at `image_size`."""
    if image_size == card.image_size:
        return lambda name, shape: shape, None
    grid = card.grid
    if resize == "interpolate":
        new = (image_size[0] // card.patch_size, image_size[1] // card.patch_size)
        return (
            lambda name, shape: resolution.interpolated_shape(name, shape, grid, new),
            lambda name, array: resolution.interpolate(name, array, grid=grid, new_grid=new),
        )
    factors = resolution.check(card.image_size, image_size, card.patch_size)
    return (
        lambda name, shape: resolution.grown_shape(name, shape, factors),
        lambda name, array: resolution.grow(name, array, grid=grid, factors=factors),
    )


def resized(found: Found, image_size: tuple[int, int], resize: str) -> Card:
    """The card of what was found once it is for images of (H, W) `image_size`."""
    card = found.card
    if image_size == card.image_size:
        return card
    name = "MixerBlock_0/token_mixing/Dense_0/bias"
    shape_of, _ = _resizing(card, image_size, resize)
    return dataclasses.replace(
        card,
        image_size=image_size,
        tokens_mlp_dim=shape_of(name, (card.tokens_mlp_dim,))[0],
        preprocess=found.preprocess_at(image_size),
    )


def _check_shapes(
    shapes: Shapes, wanted: Mapping[str, Any], shape_of: Callable, source: str
) -> None:
    """Raises UserError that lists every array that is missing, too many or mis-shaped."""
    faults = [f"{name}: missing" for name in wanted.keys() - shapes.keys()]
    faults += [f"{name}: not in the model" for name in shapes.keys() - wanted.keys()]
    for name in wanted.keys() & shapes.keys():
        saved = tuple(shapes[name])
        # One of another number of axes is no leaf that could be resized.
        fitted = shape_of(name, saved) if len(saved) == wanted[name].ndim else saved
        if fitted != wanted[name].shape:
            grown = "" if fitted == saved else f", resized {fitted}"
            faults.append(f"{name}: in the file {saved}{grown}, wanted {wanted[name].shape}")
    if faults:
        raise UserError(f"{source} does not fit the model: {'; '.join(sorted(faults))}")


def find(
    path: epath.PathLike,
    *,
    image_size: int | tuple[int, int] | None = None,
    gelu: str | None = None,
    log: Callable[[str], None] = print,
) -> Found:
    """Finds and recognises the weights at `path`; no array is read.

    Args:
      path: as for `load`.
      image_size: where neither the weights nor what stands beside them says it: the size they are
        for, if it has as many patches as they have tokens.
      gelu: as for `read`.
      log: gets a line on what is fetched.
    """
    local = remote.fetch(path, log=log) if remote.is_remote_file(path) else None
    local = epath.Path(path).expanduser() if local is None else local
    if local.is_dir():
        return _find_run(local, gelu)
    if not local.exists() and not local.suffix:
        raise UserError(
            f"{path}: no such run or file; expected a run, a step of it, an .npz or .safetensors "
            f"file, or one of {', '.join(published.CHECKPOINTS)}"
        )
    return _find_file(str(path), local, image_size, gelu)


def _find_file(
    source: str, path: epath.Path, image_size: int | tuple[int, int] | None, gelu: str | None
) -> Found:
    file = weights.open_file(path)
    if released := published.find(source):
        try:
            published.check(released, file.shapes, path.stat().length)
        except UserError as error:
            raise UserError(f"{error}; delete {path} to fetch it anew") from None
    dims = weights.dimensions(file.shapes, source)
    num_tokens, num_classes = dims.pop("num_tokens"), dims["num_classes"]
    says = weights.read_card(path) or {}
    facts = published.facts(source, layout=file.layout, num_classes=num_classes)
    if file.layout == "timm" and (config := _timm_config(path)):
        facts = published.timm_facts(config, source=source, num_classes=num_classes)
    for name, value in dims.items():
        if says and says[name] != value:
            raise UserError(
                f"{path.with_suffix('.json')} says {name}={says[name]}, and the arrays of "
                f"{path.name} have {value}"
            )
    about = [f"{file.layout} layout", *file.notes]

    # The arrays tell the number of patches, and no more of the image's size.
    patch_size = dims["patch_size"]
    asked = None if image_size is None else _size(image_size)
    side = weights.square_side(num_tokens, patch_size)
    if says:
        size = says["image_size"]
    elif side:
        size = (side, side)
    elif asked and asked[0] * asked[1] == num_tokens * patch_size**2:
        size = asked
        about.append("image size as asked")
    else:
        raise UserError(
            f"{source} is for images of {num_tokens} patches, which make no square; image_size="
            "(H, W) says which they are"
        )
    kind = gelu or says.get("gelu") or weights.GELU_OF[file.layout]
    card = Card(
        variant=weights.find_variant(dims),
        **dims,
        image_size=size,
        gelu=kind,
        preprocess=says["preprocess"] if says else facts.preprocess(size),
        class_names=says["class_names"] if says else facts.class_names,
        source=says.get("source", source),
    )
    why = "as asked" if gelu else "its JSON" if says else f"the {file.layout} layout's"
    about += _described(card, f"{kind} ({why})")
    if facts.note and not says:
        about.append(facts.note)

    def restore(wanted: Mapping[str, Any], turn: Callable | None) -> dict[str, jax.Array]:
        placed, faults = {}, []
        for name, leaf in wanted.items():  # one at a time: the host never holds two copies
            array = file.read(name)
            if fault := weights.not_finite(array):
                faults.append(f"{name} {fault}")
            array = array if turn is None else turn(name, array)
            placed[name] = _place(array, leaf)
        if faults:
            raise UserError(f"{source}: {'; '.join(faults)}")
        return placed

    def preprocess_at(size: tuple[int, int]) -> str | None:
        return None if says else facts.preprocess(size)

    return Found(card, file.shapes, "float32", preprocess_at, restore, "; ".join(about))


def _timm_config(path: epath.Path) -> dict[str, Any] | None:
    """The config.json of timm beside a file, as on the Hugging Face Hub."""
    path = path.with_name("config.json")
    try:
        config = json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return config if isinstance(config, dict) and "architecture" in config else None


def _find_run(path: epath.Path, gelu: str | None) -> Found:
    step = checkpoint.find_step(path)
    item, about = "params", [f"run, step {step.name}"]
    if shapes := checkpoint.saved_params(step, "ema_params"):
        item = "ema_params"
        about.append("moving average")
    else:
        shapes = checkpoint.saved_params(step)
    dims = weights.dimensions(shapes, path)
    num_tokens = dims.pop("num_tokens")
    config, data = (_beside_run(step, name) for name in ("config.json", "data.json"))
    if config is None:
        side = weights.square_side(num_tokens, dims["patch_size"])
        if side is None:
            raise UserError(f"{path}: no config.json in the run says which images it is for")
        config = {"image_size": side, "model": {}, "dataset": {}}
        about.append("no config.json: the authors' GELU and a square image assumed")
    fields = config["model"]
    kind = gelu or fields.get("gelu") or "tanh"
    card = Card(
        variant=weights.find_variant(dims),
        **dims,
        image_size=_size(config["image_size"]),
        gelu=kind,
        preprocess=config["dataset"].get("eval_preprocess"),
        class_names=_names(data["class_names"]) if data else None,
        source=config["source"] if "source" in config else str(path),
    )
    if card.grid[0] * card.grid[1] != num_tokens:
        raise UserError(
            f"{step}: its weights are for {num_tokens} patches, and its config.json says images "
            f"of {card.image_size[0]} x {card.image_size[1]}"
        )
    about += _described(card, f"{kind} ({'as asked' if gelu else 'its config'})")

    def restore(wanted: Mapping[str, Any], turn: Callable | None) -> dict[str, jax.Array]:
        without = "head" if "head/kernel" in shapes and "head/kernel" not in wanted else ""
        as_saved = {
            name: leaf if turn is None else _on_one_device(shapes[name], leaf.dtype)
            for name, leaf in wanted.items()
        }
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            traverse_util.unflatten_dict(as_saved, sep="/"),
        )
        tree = checkpoint.restore_params(step, abstract, item=item, without=without)
        arrays = traverse_util.flatten_dict(tree, sep="/")
        if turn is None:
            return arrays
        # Taken out one by one, so that the old ones go as the new ones come.
        return {
            name: _place(turn(name, np.asarray(arrays.pop(name))), leaf)
            for name, leaf in wanted.items()
        }

    # The run's own steps name sizes of their own, which nobody else can change.
    return Found(
        card, shapes, fields.get("dtype", "float32"), lambda size: None, restore, "; ".join(about)
    )


def _beside_run(step: epath.Path, name: str) -> dict[str, Any] | None:
    path = step.parent.parent / name
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _names(names: Any) -> str | tuple[str, ...] | None:
    return tuple(names) if isinstance(names, list) else names


def _described(card: Card, gelu: str) -> list[str]:
    dims = ", ".join(f"{name}={getattr(card, name)}" for name in weights.DIMENSIONS)
    what = dims if card.variant is None else card.variant
    return [
        f"{what}, {card.image_size[0]} x {card.image_size[1]}, {card.num_classes:,} classes, "
        f"GELU {gelu}"
    ]


def _size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a side or of both."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"image_size={image_size!r}: a side in pixels, or (height, width)")
    return sides


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r}; one of {', '.join(known)}")


def _on_one_device(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    where = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _place(array: np.ndarray, leaf: Any) -> jax.Array:
    """`array` in the dtype and on the devices of `leaf`; each gets its own part alone."""
    array = array.astype(leaf.dtype, copy=False)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])
