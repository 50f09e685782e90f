"""The registry of architectures, and functions that depend on a network's shape.

An architecture is one file of this package and one entry of `ARCHITECTURES`. This module provides a
model's dimensions, the names and shapes of its parameters, its FLOPs, and the conversion of its
weights to another image size or another program's layout.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from mixer import sizes
from mixer.errors import UserError, check_choice, check_number
from mixer.models import mlp_mixer, resize, vit
from mixer.models.modules import DTYPES, GELUS, MAX_BLOCKS, REMAT
from mixer.parallel import sharding

HEAD = ("head/kernel", "head/bias")  # the head's parameters, in every architecture


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The interface of an architecture to the rest of the package.

    Attributes:
      name: value of `config.model.name`.
      title: name of the architecture in messages.
      prefix: prefix of the variants' names where those of several architectures are listed.
      module: the Flax module. It has at least the fields of `MlpMixer` without its two MLP widths
        and its groups, and the same arguments and outputs. Its fields are keys of `config.model`,
        in which fields that other architectures lack are None unless they are set.
      variants: for each named size, the dimensions by the module's field names.
      options: other fields that decide which parameters the module has, and their values; None: a
        positive integer.
      block: pattern of the name of a block's parameters.
      branches: names of a block's two residual branches: across tokens, then within each token.
      token_kernel: pattern of the name of the kernel (S, units) that mixes a block's tokens; None
        if the weights across tokens depend on the image.
      grown_dim: the dimension that is multiplied when weights grow to a larger image; None if
        weights cannot grow.
      widest_dim: the width of the widest layer that is applied to each token.
      signature: small parameters outside the head whose checksum tells apart weights of the same
        shapes.
      placement: (pattern, mesh axes) of each parameter that is split over the mesh.
      cast_leaves: pattern of the parameters that a model in bfloat16 rounds to bfloat16.
      layer_flops: (model, image_size) -> (name, FLOPs of one image's forward pass) of each layer.
      hidden_values: (model, image_size) -> number of values in a block's hidden layers, per image.
      read_dimensions: (shapes of parameters, source) -> dimensions, options (an absent one has its
        default value), "in_channels", "num_tokens" (patches; None if no parameter depends on them)
        and "num_classes".
      layouts: layouts of files with such weights: "published", "legacy" or "timm".
      recognise: (shapes in a file, source) -> its layout; None: not this architecture.
      leaf_names: number of blocks -> iterator over the published names of all parameters that
        models may have; the first is the stem's kernel, (P, P, channels of the images, C).
      stored_name: (published name, layout) -> name in a file of that layout. Arrays that share a
        name are joined along their first axis, in the order of `leaf_names`.
      from_layout: (published name, array, layout, fields in the file's header or JSON) -> the array
        with the published axes.
      to_layout: (published name, array, layout) -> the inverse.
      timm_form: (model, arrays by published name, image_size) -> (changed options, arrays) of an
        equal model that timm may have.
      timm_arguments: (model, image_size) -> arguments of timm's class for the same model; None if
        timm has no such model.
      resize: for the name of each method, the default first: (published name, array, grid=,
        new_grid=) -> the array for images of another size.
      onnx_graph: (graph, model, pixels, image_size) -> name of the pre-logits: adds the network to
        a graph of `mixer.tools.export.onnx_graphs`; None: the architecture has no export to ONNX.
      timm_class: path of timm's class for the same models; "" if timm has none.
      timm_models: names of timm's models, and the arguments of its class that each name sets.
      timm_any_model: the one of these names under which timm accepts every argument of its class,
        with the activation as a name; "" if there is none.
    """

    name: str
    title: str
    module: type[nn.Module]
    variants: Mapping[str, Mapping[str, int]]
    options: Mapping[str, tuple | None]
    block: str
    branches: tuple[str, str]
    token_kernel: str | None
    grown_dim: str | None
    widest_dim: str
    signature: tuple[str, ...]
    placement: tuple[tuple[str, tuple], ...]
    cast_leaves: str
    layer_flops: Callable
    hidden_values: Callable
    read_dimensions: Callable
    layouts: tuple[str, ...]
    recognise: Callable
    leaf_names: Callable
    stored_name: Callable
    from_layout: Callable
    to_layout: Callable
    timm_arguments: Callable
    resize: Mapping[str, Callable]
    prefix: str = ""
    onnx_graph: Callable | None = None
    timm_form: Callable = lambda model, arrays, image_size: ({}, arrays)
    timm_class: str = ""
    timm_models: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    timm_any_model: str = ""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the module's fields that a variant determines."""
        return tuple(next(iter(self.variants.values())))

    @property
    def default_resize(self) -> str:
        """Name of the method that resizes weights unless another one is selected."""
        return next(iter(self.resize))

    @property
    def default_options(self) -> dict[str, Any]:
        """The module's default value of each of the `options`."""
        return {key: getattr(self.module, key) for key in self.options}

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all fields of the module."""
        names = (field.name for field in dataclasses.fields(self.module))
        return tuple(name for name in names if name not in ("parent", "name"))  # Flax adds these


_ENTRIES = (
    Architecture(
        name="mixer",
        title="MLP-Mixer",
        module=mlp_mixer.MlpMixer,
        variants=mlp_mixer.VARIANTS,
        options=mlp_mixer.OPTIONS,
        block=mlp_mixer.BLOCK,
        branches=mlp_mixer.BRANCHES,
        token_kernel=f"{mlp_mixer.BLOCK}/token_mixing/Dense_0/kernel",
        grown_dim="tokens_mlp_dim",
        widest_dim="channels_mlp_dim",
        signature=("stem/bias", "pre_head_layer_norm/scale", "pre_head_layer_norm/bias"),
        placement=mlp_mixer.PLACEMENT,
        cast_leaves="stem/.*|.*_mixing/.*",
        layer_flops=mlp_mixer.layer_flops,
        hidden_values=mlp_mixer.hidden_values,
        read_dimensions=mlp_mixer.read_dimensions,
        layouts=("published", "legacy", "timm"),
        recognise=mlp_mixer.recognise,
        leaf_names=mlp_mixer.leaf_names,
        stored_name=mlp_mixer.stored_name,
        from_layout=mlp_mixer.from_layout,
        to_layout=mlp_mixer.to_layout,
        timm_arguments=mlp_mixer.timm_arguments,
        resize={"grow": mlp_mixer.grow, "interpolate": mlp_mixer.interpolate},
        onnx_graph=mlp_mixer.onnx_graph,
        timm_class="timm.models.mlp_mixer.MlpMixer",
        timm_models=mlp_mixer.TIMM_MODELS,
    ),
    Architecture(
        name="vit",
        title="Vision Transformer",
        prefix="ViT-",
        module=vit.VisionTransformer,
        variants=vit.VARIANTS,
        options=vit.OPTIONS,
        block=vit.BLOCK,
        branches=vit.BRANCHES,
        token_kernel=None,
        grown_dim=None,
        widest_dim="mlp_dim",
        signature=(
            "embedding/bias",
            "Transformer/encoder_norm/scale",
            "Transformer/encoder_norm/bias",
        ),
        placement=vit.PLACEMENT,
        cast_leaves="embedding/.*|cls|(.*/)?pos_embedding|.*/probe|.*(Attention|MlpBlock)_0/.*",
        layer_flops=vit.layer_flops,
        hidden_values=vit.hidden_values,
        read_dimensions=vit.read_dimensions,
        layouts=("published", "legacy", "timm"),
        recognise=vit.recognise,
        leaf_names=vit.leaf_names,
        stored_name=vit.stored_name,
        from_layout=vit.from_layout,
        to_layout=vit.to_layout,
        timm_arguments=vit.timm_arguments,
        resize={"interpolate": vit.interpolate},
        onnx_graph=vit.onnx_graph,
        timm_form=vit.timm_form,
        timm_class="timm.models.vision_transformer.VisionTransformer",
        timm_models=vit.TIMM_MODELS,
        timm_any_model="vit_base_patch16_224",
    ),
)
ARCHITECTURES = {entry.name: entry for entry in _ENTRIES}


def architecture_of(model: nn.Module) -> Architecture:
    """Returns the architecture of a model."""
    return next(entry for entry in ARCHITECTURES.values() if isinstance(model, entry.module))


def make_model(
    variant: str | None = None, *, name: str = "mixer", num_classes: int, **fields
) -> nn.Module:
    """Builds a model from a variant's name, from explicit dimensions, or from both.

    `mixer.make_model("B/16", num_classes=10)` returns only the module. Initialise its parameters
    with `model.init(key, images)["params"]`, or read them with `mixer.load`.

    Args:
      variant: such as "B/16"; None if `fields` sets every dimension.
      name: the architecture, a key of `ARCHITECTURES`.
      num_classes: width of the head.
      **fields: fields of the architecture's module, such as `hidden_dim` or `dtype`; fields that
        are not None override the variant. Fields that are None need not exist.

    Returns:
      A Flax module; `logits, out = model.apply({"params": params}, images)`.

    Raises:
      UserError: the architecture, the variant or a field is unknown, a dimension is missing, or a
        value is out of range.
    """
    check_choice("model.name", name, ARCHITECTURES)
    architecture = ARCHITECTURES[name]
    fields = {key: value for key, value in fields.items() if value is not None}
    for key in fields:
        check_choice("field of the model", key, architecture.fields)
    if variant is not None:
        check_choice("model.variant", variant, architecture.variants)
    fields = {**architecture.variants.get(variant, {}), **fields, "num_classes": num_classes}
    _check_fields(architecture, fields)
    fields["patch_size"] = sizes.shorten(fields["patch_size"])
    return architecture.module(**fields)


def _check_fields(architecture: Architecture, fields: Mapping[str, Any]) -> None:
    if missing := [key for key in architecture.dimensions if key not in fields]:
        variants = ", ".join(architecture.variants)
        raise UserError(
            f"model dimensions are missing: {', '.join(missing)}; expected all of them, or "
            f"model.variant, one of {variants}"
        )
    for key in ("num_classes", "in_channels", *architecture.dimensions):
        limit = MAX_BLOCKS + 1 if key == "num_blocks" else 2**31
        if key == "patch_size":
            sizes.check_size(f"model.{key}", fields[key], limit=limit)
        elif key in fields:
            check_number(f"model.{key}", fields[key], minimum=1, limit=limit, integer=True)
    for key in ("stoch_depth", "dropout"):
        check_number(f"model.{key}", fields.get(key, 0), limit=1)
    if not math.isfinite(fields.get("head_bias_init", 0)):
        raise UserError(
            f"model.head_bias_init={fields['head_bias_init']}; expected a finite number"
        )
    for key, choices in (("gelu", GELUS), ("dtype", DTYPES), ("remat", REMAT)):
        if key in fields:
            check_choice(f"model.{key}", fields[key], choices)
    for key, choices in architecture.options.items():
        if key in fields and choices is None:
            check_number(f"model.{key}", fields[key], minimum=1, limit=2**31, integer=True)
        elif key in fields:
            check_choice(f"model.{key}", str(fields[key]), map(str, choices))


def dimensions(model: nn.Module) -> dict[str, int]:
    """Returns the fields of a model that a variant determines."""
    return {key: getattr(model, key) for key in architecture_of(model).dimensions}


def option_values(model: nn.Module) -> dict[str, Any]:
    """Returns the other fields of a model that decide which parameters it has."""
    return {key: getattr(model, key) for key in architecture_of(model).options}


def find_variant(architecture: Architecture, dims: Mapping[str, int]) -> str | None:
    """Returns the variant with these dimensions, of which `grown_dim` may have been multiplied."""
    for name, variant in architecture.variants.items():
        if all(
            dims[key] % value == 0 if key == architecture.grown_dim else dims[key] == value
            for key, value in variant.items()
        ):
            return name
    return None


def grown_dimensions(
    architecture: Architecture,
    dims: Mapping[str, int],
    old: tuple[int, int],
    new: tuple[int, int],
) -> dict[str, int]:
    """Returns the dimensions of a model that is grown from images of size `old` to size `new`.

    Raises:
      UserError: weights of the architecture cannot grow, or the new size is not an integer multiple
        of the old size.
    """
    if architecture.grown_dim is None:
        raise UserError(
            f"resize=grow: weights of {architecture.title} cannot grow; expected "
            f"{' or '.join(architecture.resize)} (init_resize in a config)"
        )
    factor = math.prod(resize.growth_factors(old, new, dims["patch_size"]))
    return {**dims, architecture.grown_dim: dims[architecture.grown_dim] * factor}


def param_shapes(model: nn.Module, image_size: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of each parameter by its name, joined by "/".

    Args:
      model: the model; no parameters are allocated.
      image_size: (H, W) in pixels.
    """
    # All blocks have the same shapes, so tracing one of them is enough.
    images = jax.ShapeDtypeStruct((1, *image_size, model.in_channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = jax.eval_shape(model.clone(num_blocks=1).init, key, images)["params"]
    block = architecture_of(model).block
    shapes = {}
    for name, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        is_in_block = name.startswith(block.format(0))
        for i in range(model.num_blocks if is_in_block else 1):
            shapes[name.replace(block.format(0), block.format(i), 1)] = leaf
    return shapes


def num_params(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Returns the number of parameters of a model for images of (H, W) pixels."""
    return sharding.num_values(param_shapes(model, image_size))
