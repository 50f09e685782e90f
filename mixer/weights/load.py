"""`mixer.load`: reads weights from any source and returns a model with its parameters.

mixer/weights/recognise.py finds a run, a checkpoint or a file and recognises its architecture. This
module checks every array's name, shape and dtype before it reads the first array, and places each
array on the mesh.
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
from mixer.models.modules import DTYPES, check_image_size, patch_grid
from mixer.parallel import sharding
from mixer.weights.arrays import Shapes, join_faults, misfits
from mixer.weights.card import Card
from mixer.weights.recognise import StoredWeights, find, parse_size

HEADS = ("keep", "reset", "auto")
RESIZES = ("grow", "interpolate")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, its parameters under their published names, and the card that describes them."""

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
    resize: str | None = None,
    mesh: Mesh | None = None,
    log: Callable[[str], None] = print,
) -> tuple[nn.Module, Any]:
    """Loads weights: `model, params = mixer.load("RUN_OR_FILE")`.

    `logits, out = model.apply({"params": params}, images)` then takes images (N, H, W, channels) in
    [-1, 1], or in the pixel range that the log line gives.

    Args:
      path: a run, one of its checkpoints (RUN/best, RUN/checkpoints/1000), an npz file in the
        published or the legacy layout, or a safetensors file with timm's names, each local or at
        gs://; a file at https://; hf://owner/name, or such a folder on this machine; or a published
        checkpoint's short name, such as "B/16-i21k". If a run keeps a moving average of its
        parameters, the average is loaded.
      num_classes: width of the head. None keeps the width of the stored head, if there is one; 0
        builds a model without a head, whose logits are the pre-logits.
      image_size: side in pixels of square images, or (H, W); None: the size stored with the
        weights.
      dtype: compute dtype, "float32" or "bfloat16"; None: the dtype of the run, or float32 for a
        file.
      gelu: "tanh" or "erf"; None: the form in the run's config; for a file, the form in its JSON
        sidecar or else the default of the code base that defines the layout.
      head: "keep": the saved head must fit; "reset": zeros; "auto": zeros if it does not fit.
      resize: how to change the image size. "grow": by integer factors, as in the paper;
        "interpolate": to any size that the patch size divides (mixer/models/resize.py). None:
        "grow" for a Mixer, "interpolate" for a Vision Transformer.
      mesh: devices to place the parameters on; each device receives only its own shard. None: the
        default device.
      log: called with one line that lists what was recognised, what was assumed, and whether the
        head was kept.

    Returns:
      The Flax module, and its parameters as nested dicts of float32 arrays.

    Raises:
      UserError: `path` does not exist, holds another model, or holds weights that do not fit; the
        message lists every mismatch.
    """
    check_choice("head", head, HEADS)
    if resize is not None:
        check_choice("resize", resize, RESIZES)
    options = dict(num_classes=num_classes, dtype=dtype, head=head, resize=resize, mesh=mesh)
    loaded = read(path, image_size=image_size, gelu=gelu, log=log, **options)
    return loaded.model, loaded.params


def read(
    path: epath.PathLike,
    *,
    image_size: int | tuple[int, int] | None = None,
    gelu: str | None = None,
    log: Callable[[str], None] = print,
    **options: Any,
) -> Loaded:
    """Reads weights with the options of `load`, and returns their card too."""
    stored = find(path, image_size=image_size, gelu=gelu, log=log)
    return read_stored(stored, image_size=image_size, log=log, **options)


def read_stored(
    stored: StoredWeights,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    head: str = "auto",
    resize: str | None = None,
    mesh: Mesh | None = None,
    log: Callable[[str], None] = print,
) -> Loaded:
    """Reads weights that `find` has recognised, with the options of `read`."""
    size = stored.card.image_size if image_size is None else parse_size(image_size)
    check_image_size(size, stored.card.patch_size)
    resize = resize or registry.ARCHITECTURES[stored.card.architecture].default_resize
    card = resize_card(stored, size, resize)
    classes = stored.card.num_classes if num_classes is None else num_classes
    # The arrays are checked against the model's parameters, so build the model first.
    try:
        dtype = stored.dtype if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        raise UserError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}") from None
    model = card.model(num_classes=classes, dtype=dtype)
    shapes = registry.param_shapes(model, size)
    sizes = [math.prod(leaf.shape) for leaf in shapes.values()]
    subject = f"{stored.path} for images of {size[0]} x {size[1]}"
    memory.check_room(4 * sum(sizes), subject)
    # On every backend the host holds one array at a time.
    memory.check_room(4 * max(sizes), subject, on_host=True)
    shapes = traverse_util.unflatten_dict(shapes, sep="/")
    shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    if mesh is not None:
        shardings = placement.state_shardings(mesh, shapes)
    abstract = sharding.abstract(shapes, shardings)
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
    """Replaces a new model's parameters with stored weights.

    Args:
      stored: the weights, as `find` returns them.
      params: freshly initialised parameters, already placed on the mesh. Their head stays if the
        stored head is not kept.
      image_size: (H, W) of the images that `params` take.
      class_names: class names of the new model's data. With head="auto" the stored head is reset if
        its class names differ, even if the count is the same. A head of the same width with unknown
        class names is kept, and the summary says so.
      head: as in `load`.
      resize: as in `load`.

    Returns:
      The parameters, and a summary of what was done with the image size and the head.

    Raises:
      UserError: the weights do not fit; the message lists every mismatch.
    """
    other_classes = _other_classes(stored.card, class_names)
    if head == "auto" and other_classes:
        head = "reset"
    restored, summary = fit(stored, params, image_size=image_size, head=head, resize=resize)
    if other_classes:
        summary += f", it was trained on other classes ({other_classes})"
    elif "head" in restored and stored.card.class_names is None and class_names:
        summary += ", its class names are unknown and assumed to match; init_head=reset drops it"
    return {**params, **restored}, summary


def _other_classes(card: Card, class_names: Sequence[str]) -> str:
    """Returns a head's first class names if they differ from `class_names`; "" if unknown."""
    if card.class_names is None or not class_names:
        return ""
    if isinstance(card.class_names, str):
        # TFDS names ImageNet's classes by their synset ids.
        lists = imagenet_names.class_names, imagenet_names.synsets
        stored_names = [names(card.class_names) for names in lists]
    else:
        stored_names = [card.class_names]
    if tuple(class_names) in stored_names:
        return ""
    return ", ".join(stored_names[0][:3]) + ", ..." * (len(stored_names[0]) > 3)


def fit(
    stored: StoredWeights,
    abstract_params: Any,
    *,
    image_size: tuple[int, int],
    head: str,
    resize: str,
) -> tuple[dict[str, Any], str]:
    """Reads weights for a model, with the shapes and the placement of its `abstract_params`.

    Returns:
      The parameters, without the head if it is not kept; and a summary of the changes.

    Raises:
      UserError: the weights do not fit; the message lists every mismatch.
    """
    card, leaves = stored.card, traverse_util.flatten_dict(abstract_params, sep="/")
    width = leaves["head/bias"].shape[0] if "head/bias" in leaves else 0
    is_reset = head == "reset" or (head == "auto" and width != card.num_classes)
    shapes = stored.shapes
    if is_reset:
        leaves = {name: leaf for name, leaf in leaves.items() if name not in registry.HEAD}
        shapes = {name: shape for name, shape in shapes.items() if name not in registry.HEAD}
    faults = misfits(
        shapes,
        {name: leaf.shape for name, leaf in leaves.items()},
        resized=_resized_shapes(card, shapes, resize_card(stored, image_size, resize)),
    )
    if faults:
        raise UserError(f"{stored.path} does not fit the model: {join_faults(faults)}")
    arrays = stored.restore(leaves, _make_resize(card, image_size, resize))
    actions = []
    if image_size != card.image_size:
        size = f"{image_size[0]} x {image_size[1]}"
        actions.append(f"interpolated to {size}" if resize == "interpolate" else f"grown to {size}")
    if width:
        actions.append(
            "head kept" if not is_reset else f"head reset ({card.num_classes:,} -> {width:,})"
        )
    else:
        actions.append(f"head of {card.num_classes:,} classes dropped" if is_reset else "no head")
    return traverse_util.unflatten_dict(arrays, sep="/"), ", ".join(actions)


def _resized_shapes(card: Card, shapes: Shapes, new_card: Card) -> dict[str, tuple[int, ...]]:
    """Returns the arrays' shapes after resizing; arrays that the model lacks keep their shapes."""
    if new_card.image_size == card.image_size:
        return dict(shapes)
    old_shapes = registry.param_shapes(card.model(), card.image_size)
    new_shapes = registry.param_shapes(new_card.model(), new_card.image_size)
    return {
        name: new_shapes[name].shape
        if name in old_shapes and old_shapes[name].shape == shape
        else shape
        for name, shape in shapes.items()
    }


def _make_resize(
    card: Card, image_size: tuple[int, int], resize: str
) -> Callable[[str, np.ndarray], np.ndarray] | None:
    """Returns a function (name, array) -> array that resizes a leaf; None for the same size."""
    if image_size == card.image_size:
        return None
    resize_leaf = registry.ARCHITECTURES[card.architecture].resize[resize]
    new_grid = patch_grid(image_size, card.patch_size)
    return functools.partial(resize_leaf, grid=card.grid, new_grid=new_grid)


def resize_card(stored: StoredWeights, image_size: tuple[int, int], resize: str) -> Card:
    """Returns the card that `stored` gets once it is resized to images of (H, W) `image_size`.

    Raises:
      UserError: the weights cannot be grown to that size.
    """
    card = stored.card
    if image_size == card.image_size:
        return card
    dims, architecture = card.dimensions, registry.ARCHITECTURES[card.architecture]
    if resize == "grow":
        dims = registry.grown_dimensions(architecture, dims, card.image_size, image_size)
    preprocess = stored.preprocess_at(image_size)
    return dataclasses.replace(card, image_size=image_size, dimensions=dims, preprocess=preprocess)
