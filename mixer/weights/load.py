"""`mixer.load`: weights from anywhere, as a model and its parameters.

A run, a step of it, or a file is found and recognised (mixer/weights/recognise.py); every array's
name, shape and dtype is checked before the first is read; then each goes where it belongs on the
mesh. (The module is not called load: the function `mixer.load` has that name.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from mixer import memory
from mixer.data.imagenet import names as imagenet_names
from mixer.errors import UserError, check_choice
from mixer.models import placement, registry
from mixer.models.modules import DTYPES, check_image_size
from mixer.parallel import sharding
from mixer.weights.arrays import Shapes, listed, misfits
from mixer.weights.card import Card
from mixer.weights.recognise import StoredWeights, find, parse_size

HEADS = ("keep", "reset", "auto")
RESIZES = ("grow", "interpolate")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, its parameters by published names, and what they are."""

    model: nn.Module
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
) -> tuple[nn.Module, Any]:
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
    check_choice("head", head, HEADS)
    check_choice("resize", resize, RESIZES)
    stored = find(path, image_size=image_size, gelu=gelu, log=log)
    options = dict(num_classes=num_classes, image_size=image_size, dtype=dtype)
    return read_stored(stored, **options, head=head, resize=resize, mesh=mesh, log=log)


def read_stored(
    stored: StoredWeights,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    head: str = "auto",
    resize: str = "grow",
    mesh: Mesh | None = None,
    log: Callable[[str], None] = print,
) -> Loaded:
    """As `read`, of weights that `find` has recognised."""
    size = stored.card.image_size if image_size is None else parse_size(image_size)
    check_image_size(size, stored.card.patch_size)
    card = resize_card(stored, size, resize)
    classes = stored.card.num_classes if num_classes is None else num_classes
    # The model is made before the arrays are checked: it says what they should be.
    try:
        dtype = stored.dtype if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        raise UserError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}") from None
    model = card.model(num_classes=classes, dtype=dtype)
    shapes = registry.param_shapes(model, size)
    sizes = [math.prod(leaf.shape) for leaf in shapes.values()]
    what = f"{stored.path} for images of {size[0]} x {size[1]}"
    memory.check_room(4 * sum(sizes), what)
    # One array at a time is on the host, whatever the backend.
    memory.check_room(4 * max(sizes), what, on_host=True)
    shapes = traverse_util.unflatten_dict(shapes, sep="/")
    where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    if mesh is not None:
        where = placement.state_shardings(mesh, shapes)
    abstract = sharding.abstract(shapes, where)
    params, summary = fit(stored, abstract, image_size=size, head=head, resize=resize)
    if "head" not in params:
        card = dataclasses.replace(card, class_names=None)
        if classes:
            params["head"] = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
                abstract["head"],
            )
    card = dataclasses.replace(card, num_classes=classes)
    log(f"{stored.path}: {stored.about}; {summary}")
    return Loaded(model, params, card)


def initial_params(
    stored: StoredWeights,
    params: Any,
    *,
    image_size: tuple[int, int],
    class_names: Sequence[str],
    head: str,
    resize: str,
) -> tuple[Any, str]:
    """Replaces a new model's parameters by stored weights.

    Args:
      stored: by `find`.
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
    other = _other_classes(stored.card, class_names)
    if head == "auto" and other:
        head = "reset"
    restored, summary = fit(stored, params, image_size=image_size, head=head, resize=resize)
    if other:
        summary += f", its classes were others ({other})"
    elif "head" in restored and stored.card.class_names is None and class_names:
        summary += ", its classes are not known and taken for these; init_head=reset drops it"
    return {**params, **restored}, summary


def _other_classes(card: Card, class_names: Sequence[str]) -> str:
    """Some of the names of a head's classes where they are not `class_names`; "" if unknown."""
    if card.class_names is None or not class_names:
        return ""
    if isinstance(card.class_names, str):
        # TFDS has the ids of ImageNet's classes for names.
        lists = imagenet_names.class_names, imagenet_names.synsets
        own = [names(card.class_names) for names in lists]
    else:
        own = [card.class_names]
    if tuple(class_names) in own:
        return ""
    return ", ".join(own[0][:3]) + ", ..." * (len(own[0]) > 3)


def fit(
    stored: StoredWeights, like: Any, *, image_size: tuple[int, int], head: str, resize: str
) -> tuple[dict[str, Any], str]:
    """Reads weights for the model whose parameters are `like`, and places them as these are.

    Returns:
      The parameters, without the head where that is not kept; and what was done.

    Raises:
      UserError: weights that do not fit; every misfit is listed.
    """
    card, wanted = stored.card, traverse_util.flatten_dict(like, sep="/")
    width = wanted["head/bias"].shape[0] if "head/bias" in wanted else 0
    reset = head == "reset" or (head == "auto" and width != card.num_classes)
    shapes = stored.shapes
    if reset:
        wanted = {name: leaf for name, leaf in wanted.items() if name not in registry.HEAD}
        shapes = {name: shape for name, shape in shapes.items() if name not in registry.HEAD}
    faults = misfits(
        shapes,
        {name: leaf.shape for name, leaf in wanted.items()},
        resized=_resized_shapes(card, shapes, resize_card(stored, image_size, resize)),
    )
    if faults:
        raise UserError(f"{stored.path} does not fit the model: {listed(faults)}")
    arrays = stored.restore(wanted, _resizing(card, image_size, resize))
    actions = []
    if image_size != card.image_size:
        to = f"{image_size[0]} x {image_size[1]}"
        actions.append(f"interpolated to {to}" if resize == "interpolate" else f"grown to {to}")
    if width:
        actions.append(
            "head kept" if not reset else f"head reset ({card.num_classes:,} -> {width:,})"
        )
    else:
        actions.append(f"head of {card.num_classes:,} classes dropped" if reset else "no head")
    return traverse_util.unflatten_dict(arrays, sep="/"), ", ".join(actions)


def _resized_shapes(card: Card, shapes: Shapes, new_card: Card) -> dict[str, tuple[int, ...]]:
    """The shapes of a card's arrays once they are resized; of those that it lacks, the same."""
    if new_card.image_size == card.image_size:
        return dict(shapes)
    before = registry.param_shapes(card.model(), card.image_size)
    after = registry.param_shapes(new_card.model(), new_card.image_size)
    return {
        name: after[name].shape if name in before and before[name].shape == shape else shape
        for name, shape in shapes.items()
    }


def _resizing(
    card: Card, image_size: tuple[int, int], resize: str
) -> Callable[[str, np.ndarray], np.ndarray] | None:
    """The function of a leaf's name and values that resizes it; None: the size stays."""
    if image_size == card.image_size:
        return None
    resize_leaf = registry.ARCHITECTURES[card.architecture].resize[resize]
    new_grid = (image_size[0] // card.patch_size, image_size[1] // card.patch_size)
    return functools.partial(resize_leaf, grid=card.grid, new_grid=new_grid)


def resize_card(stored: StoredWeights, image_size: tuple[int, int], resize: str) -> Card:
    """Returns the card of weights once they are for images of (H, W) `image_size`.

    Raises:
      UserError: weights cannot be grown to that size.
    """
    card = stored.card
    if image_size == card.image_size:
        return card
    dims, architecture = card.dimensions, registry.ARCHITECTURES[card.architecture]
    if resize == "grow":
        dims = registry.grown_dimensions(architecture, dims, card.image_size, image_size)
    preprocess = stored.preprocess_at(image_size)
    return dataclasses.replace(card, image_size=image_size, dimensions=dims, preprocess=preprocess)
