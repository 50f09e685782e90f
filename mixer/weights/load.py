"""`mixer.load`: weights from anywhere, as a model and its parameters.

A run, a step of it, or a file (mixer/weights/formats.py) is found and recognised; every array's
name, shape and dtype is checked before the first is read; then each goes where it belongs on the
mesh. (The module is not called load: the function `mixer.load` has that name.)
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from mixer import memory, run_files
from mixer.data.imagenet import names as imagenet_names
from mixer.errors import UserError
from mixer.models import resize as resolution
from mixer.models.mlp_mixer import DTYPES, VARIANTS, MlpMixer, check_image_size, count_params
from mixer.parallel import backend, sharding
from mixer.weights import checkpoint, foreign, published
from mixer.weights import fetch as remote
from mixer.weights import formats as weights
from mixer.weights.formats import Card, Shapes

HEADS = ("keep", "reset", "auto")
RESIZES = ("grow", "interpolate")


@dataclasses.dataclass(frozen=True)
class Found:
    """Weights that were found and recognised, and are not read yet.

    Attributes:
      path: as it was given.
      card: what they are.
      shapes: of the arrays, by published name.
      dtype: of the computation that they were trained or saved with.
      preprocess_at: the steps of evaluation for images of another size (H, W), None if not known.
      restore: from arrays as they should be placed, by name, (and a function of each one's name
        and values that makes it what is placed) to the arrays.
      about: what was recognised and what assumed, for the log.
    """

    path: str
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


def load(
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
) -> tuple[MlpMixer, Any]:
    """Loads weights: `model, params = mixer.load("RUN_OR_FILE")`.

    `logits, out = model.apply({"params": params}, images)` then takes images (N, H, W, 3) in
    [-1, 1], or the range that the line of the log says.

    Args:
      path: a run, a step of it (RUN/best, RUN/checkpoints/1000), an npz file in the published or
        the legacy layout, a safetensors file with timm's names, each local or at gs://; a file at
        https://; hf://owner/name; or a published checkpoint's short name, such as "B/16-i21k". Of a
        run that keeps a moving average of its parameters, the average.
      num_classes: width of the head; None: that of the weights, which may have none; 0: no head.
        Without a head the model's logits are the pre-logits.
      image_size: side in pixels of square images, or (H, W); None: that of the weights.
      dtype: of the computation, "float32" or "bfloat16"; None: the run's own, float32 for a file.
      gelu: "tanh" or "erf"; None: the run's own; of a file, what the JSON beside it says, else
        that of the code whose layout it is.
      head: "keep": the saved head has to fit; "reset": zeros; "auto": zeros if it does not fit.
      resize: for another image size: "grow": by whole factors, as the paper does; "interpolate":
        to any size that the patch divides (mixer/models/resize.py).
      mesh: where to; each device gets its part as it is read. None: the default device.
      log: gets one line: what was recognised, what was assumed, what became of the head.

    Returns:
      The Flax module, and its parameters as nested dicts of float32 arrays.

    Raises:
      UserError: nothing there, another model, or weights that do not fit; every misfit is listed.
    """
    options = dict(num_classes=num_classes, image_size=image_size, dtype=dtype, gelu=gelu)
    options |= dict(head=head, resize=resize, mesh=mesh, log=log)
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
    """As `load`, and says what the weights are."""
    _check_choice("head", head, HEADS)
    _check_choice("resize", resize, RESIZES)
    found = find(path, image_size=image_size, gelu=gelu, log=log)
    options = dict(num_classes=num_classes, image_size=image_size, dtype=dtype)
    return read_found(found, **options, head=head, resize=resize, mesh=mesh, log=log)


def read_found(
    found: Found,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    head: str = "auto",
    resize: str = "grow",
    mesh: Mesh | None = None,
    log: Callable[[str], None] = print,
) -> Loaded:
    """As `read`, of weights that `find` has found."""
    size = found.card.image_size if image_size is None else _size(image_size)
    check_image_size(size, found.card.patch_size)
    card = resized(found, size, resize)
    classes = found.card.num_classes if num_classes is None else num_classes
    # The model is made before the arrays are checked: it says what they should be.
    try:
        dtype = found.dtype if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        raise UserError(f"dtype={dtype!r}; one of {', '.join(DTYPES)}") from None
    model = card.model(num_classes=classes, dtype=dtype)
    # Before anything of that size is made or traced.
    dims = {name: getattr(card, name) for name in weights.DIMENSIONS}
    count = count_params(image_size=size, num_classes=classes, **dims)
    what = f"{found.path} for images of {size[0]} x {size[1]}"
    memory.check_room(4 * count, what)
    # One array at a time is on the host, whatever the backend.
    memory.check_room(4 * math.prod(card.grid) * card.tokens_mlp_dim, what, on_host=True)
    # One block is traced: all have the same shapes.
    one = card.model(num_classes=classes, num_blocks=1)
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    shapes = jax.eval_shape(one.init, jax.random.key(0), image)["params"]
    blocks = {f"MixerBlock_{i}": shapes["MixerBlock_0"] for i in range(card.num_blocks)}
    shapes = {**shapes, **blocks}
    where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    if mesh is not None:
        where = sharding.state_shardings(mesh, shapes)
    abstract = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, where
    )
    params, how = fit(found, abstract, image_size=size, head=head, resize=resize)
    if "head" not in params:
        card = dataclasses.replace(card, class_names=None)
        if classes:
            params["head"] = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
                abstract["head"],
            )
    card = dataclasses.replace(card, num_classes=classes)
    log(f"{found.path}: {found.about}; {how}")
    return Loaded(model, params, card)


def initial_params(
    found: Found,
    params: Any,
    *,
    image_size: tuple[int, int],
    class_names: Sequence[str],
    head: str,
    resize: str,
) -> tuple[Any, str]:
    """Replaces a new model's parameters by those that were found.

    Args:
      found: by `find`.
      params: freshly initialised, where they belong on the mesh; a head that is not kept stays.
      image_size: (H, W) that `params` are for.
      class_names: of the new model's data. With head="auto" the head of other classes is not kept,
        however many they are; a head of as many whose classes are not known is kept, and said so.
      head: as for `load`, as is `resize`.
      resize: as for `load`.

    Returns:
      The parameters, and what was done with size and head.

    Raises:
      UserError: weights that do not fit; every misfit is listed.
    """
    other = _other_classes(found.card, class_names)
    if head == "auto" and other:
        head = "reset"
    taken, how = fit(found, params, image_size=image_size, head=head, resize=resize)
    if other:
        how += f", its classes were others ({other})"
    elif "head" in taken and found.card.class_names is None and class_names:
        how += ", its classes are not known and taken for these; init_head=reset drops it"
    return {**params, **taken}, how


def _other_classes(card: Card, class_names: Sequence[str]) -> str:
    """Some of the names of a head's classes where they are not `class_names`; "" if unknown."""
    if card.class_names is None or not class_names:
        return ""
    if isinstance(card.class_names, str):
        # TFDS has the ids of ImageNet's classes for names.
        lists = imagenet_names.class_names, imagenet_names.synsets
        known = [names(card.class_names) for names in lists]
    else:
        known = [card.class_names]
    if tuple(class_names) in known:
        return ""
    return ", ".join(known[0][:3]) + ", ..." * (len(known[0]) > 3)


def fit(
    found: Found, like: Any, *, image_size: tuple[int, int], head: str, resize: str
) -> tuple[dict[str, Any], str]:
    """Reads what was found, for the model whose parameters are `like`, and places it as they are.

    Returns:
      The parameters, without the head where that is not kept; and what was done.
    """
    card, wanted = found.card, traverse_util.flatten_dict(like, sep="/")
    width = wanted["head/bias"].shape[0] if "head/bias" in wanted else 0
    reset = head == "reset" or (head == "auto" and width != card.num_classes)
    shapes = found.shapes
    if reset:
        wanted = {name: leaf for name, leaf in wanted.items() if name not in weights.HEAD}
        shapes = {name: shape for name, shape in shapes.items() if name not in weights.HEAD}
    shape_of, turn = _resizing(card, image_size, resize)
    _check_shapes(shapes, wanted, shape_of, found.path)
    arrays = found.restore(wanted, turn)
    how = []
    if image_size != card.image_size:
        to = f"{image_size[0]} x {image_size[1]}"
        how.append(f"interpolated to {to}" if resize == "interpolate" else f"grown to {to}")
    if width:
        how.append("head kept" if not reset else f"head reset ({card.num_classes:,} -> {width:,})")
    else:
        how.append(f"head of {card.num_classes:,} classes dropped" if reset else "no head")
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
            faults.append(f"{name}: saved {saved}{grown}, wanted {wanted[name].shape}")
    if faults:
        raise UserError(f"{source} does not fit the model: {weights.listed(faults)}")


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
      image_size: where no JSON beside a file says its own: the size that the weights are for, if it
        has as many patches as they have tokens.
      gelu: as for `read`.
      log: gets a line on what is fetched.
    """
    backend.start()
    source = published.shown(path)
    if remote.is_remote_file(path):
        local = remote.fetch(path, log=log)
        with _fetched():
            return _find_file(source, local, image_size, gelu, fetched=True)
    local = epath.Path(path).expanduser()
    if remote.is_directory(path):
        return _find_run(source, local, gelu)
    if not remote.exists(path) and local.suffix.lower() not in foreign.ENDINGS:
        newest = local.with_name(f"{local.name}-LAST")  # of a series of big_vision's
        raise UserError(
            (remote.exists(newest) and foreign.advice(local))
            or f"{path}: no such run or file; expected a run, a step of it, an .npz or "
            f".safetensors file, or one of {', '.join(published.CHECKPOINTS)}"
        )
    return _find_file(source, local, image_size, gelu, fetched=False)


@contextlib.contextmanager
def _fetched() -> Iterator[None]:
    """Says of a damaged file that was fetched how to get rid of it."""
    try:
        yield
    except weights.DamagedError as error:
        raise UserError(f"{error}{remote.fetch_anew(error.path)}") from None


def _find_file(
    source: str,
    path: epath.Path,
    image_size: int | tuple[int, int] | None,
    gelu: str | None,
    *,
    fetched: bool,
) -> Found:
    file = weights.open_file(path)
    # A local file's own name may say what it is; that of its folder is its owner's affair.
    name = source if fetched else path.name
    if released := published.find(source):
        try:
            published.check(released, file.shapes, path.stat().length)
        except UserError as error:
            raise weights.DamagedError(path, str(error)) from None
    dims = weights.dimensions(file.shapes, source)
    num_tokens, num_classes = dims.pop("num_tokens"), dims["num_classes"]
    says, checksum = weights.read_card(path) or ({}, None)
    facts = published.facts(name, layout=file.layout, num_classes=num_classes)
    if file.layout == "timm" and (config := _timm_config(path)):
        facts = published.timm_facts(config, source=source, num_classes=num_classes)
    for name, value in dims.items():
        if says and says[name] != value:
            raise UserError(
                f"{weights.card_path(path)} says {name}={says[name]}, and the arrays of "
                f"{path.name} have {value}"
            )
    if says and math.prod(says["image_size"]) != num_tokens * dims["patch_size"] ** 2:
        raise UserError(
            f"{weights.card_path(path)} says image_size={says['image_size']}, and the arrays of "
            f"{path.name} are for {num_tokens} patches of {dims['patch_size']} pixels"
        )
    if says and checksum != weights.checksum(file.read, file.shapes):
        beside = weights.card_path(path)
        raise weights.DamagedError(
            beside,
            f"{beside} was written for other weights than {path.name} has now; remove it, or "
            "bring it up to date",
        )
    about = [f"{file.layout} layout", *file.notes]

    # The arrays tell the number of patches, and no more of the image's size.
    patch_size = dims["patch_size"]
    asked = None if image_size is None else _size(image_size)
    side = weights.square_side(num_tokens, patch_size)
    if says:
        size = says["image_size"]
    elif asked and math.prod(asked) == num_tokens * patch_size**2:
        size = asked  # no other weights could be grown to it
        about.append("image size as asked")
    elif side:
        size = (side, side)
        about.append("a square image assumed")
    else:
        raise UserError(
            f"{source} is for images of {num_tokens} patches, which make no square; image_size="
            "(H, W) says which they are"
        )
    kind = gelu or says.get("gelu") or file.gelu or weights.GELU_OF[file.layout]
    card = Card(
        variant=weights.find_variant(dims),
        **dims,
        image_size=size,
        gelu=kind,
        preprocess=says["preprocess"] if says else facts.preprocess(size),
        class_names=says["class_names"] if says else facts.class_names,
        source=published.shown(says.get("source", source)),
    )
    why = f"the {file.layout} layout's"
    if gelu or says or file.gelu:
        why = "as asked" if gelu else "its JSON" if says else "its header"
    about.append(_described(card, f"{kind} ({why})"))
    if facts.note and not says:
        about.append(facts.note)

    def restore(wanted: Mapping[str, Any], turn: Callable | None) -> dict[str, jax.Array]:
        placed, faults = {}, []
        for name, leaf in wanted.items():  # one at a time: the host never holds two copies
            with _fetched() if fetched else contextlib.nullcontext():
                array = file.read(name)
            if fault := weights.not_finite(array):
                faults.append(f"{name} {fault}")
            array = array.astype(leaf.dtype, copy=False)
            array = array if turn is None else turn(name, array)
            placed[name] = _place(array, leaf)
        if faults:
            raise UserError(f"{source}: {weights.listed(faults)}")
        return placed

    def preprocess_at(size: tuple[int, int]) -> str | None:
        return None if says else facts.preprocess(size)

    return Found(source, card, file.shapes, "float32", preprocess_at, restore, "; ".join(about))


def _timm_config(path: epath.Path) -> dict[str, Any] | None:
    """The config.json of timm beside a file, as on the Hugging Face Hub."""
    config = weights.read_json(path.with_name("config.json"))
    return config if isinstance(config, dict) and "architecture" in config else None


def _find_run(source: str, path: epath.Path, gelu: str | None) -> Found:
    step = checkpoint.find_step(path)
    item, about = "params", [f"run, step {step.name}"]
    if shapes := checkpoint.saved_params(step, "ema_params"):
        item = "ema_params"
        about.append("moving average")
    else:
        shapes = checkpoint.saved_params(step)
    dims = weights.dimensions(shapes, path)
    num_tokens = dims.pop("num_tokens")
    workdir = step.parent.parent
    config = run_files.read_config(workdir)
    data = run_files.read_data(workdir, is_trained=run_files.is_trained(config or {}))
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
    about.append(_described(card, f"{kind} ({'as asked' if gelu else 'its config'})"))

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
        del tree
        if turn is None:
            return arrays
        # Taken out one by one, so that the old ones go as the new ones come.
        return {
            name: _place(turn(name, np.asarray(arrays.pop(name))), leaf)
            for name, leaf in wanted.items()
        }

    # The run's own steps name sizes of their own, which nobody else can change.
    return Found(
        source,
        card,
        shapes,
        fields.get("dtype", "float32"),
        lambda size: None,
        restore,
        "; ".join(about),
    )


def _names(names: Any) -> str | tuple[str, ...] | None:
    return tuple(names) if isinstance(names, list) else names


def _described(card: Card, gelu: str) -> str:
    dims = ", ".join(f"{name}={getattr(card, name)}" for name in weights.DIMENSIONS)
    what = dims if card.variant is None else card.variant
    if card.variant and card.tokens_mlp_dim != VARIANTS[card.variant]["tokens_mlp_dim"]:
        what += f" with tokens_mlp_dim={card.tokens_mlp_dim}"
    low, high = card.value_range
    return (
        f"{what}, {card.image_size[0]} x {card.image_size[1]}, "
        + f"{card.num_classes:,} classes, " * bool(card.num_classes)
        + f"GELU {gelu}"
        + f", pixels in [{low:g}, {high:g}]" * ((low, high) != (-1, 1))
    )


def _size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a side or of both."""
    try:
        sides = tuple(map(operator.index, np.broadcast_to(image_size, (2,))))
    except (TypeError, ValueError):
        sides = (0, 0)
    if min(sides) < 1:
        raise UserError(f"image_size={image_size!r}: a side in pixels, or (height, width)")
    if max(sides) >= 1 << 31:
        raise UserError("image_size: a side of 2,147,483,648 pixels or more is in no image")
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
