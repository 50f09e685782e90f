"""MLP-Mixer (Tolstikhin et al., 2021, arXiv 2105.01601), section 2 and figure 1.

Dimensions in the docstrings: N images, S tokens, C channels (`hidden_dim`), D_S (`tokens_mlp_dim`),
D_C (`channels_mlp_dim`), P (`patch_size`). Parameter names match the released checkpoints.

The network comes first. Functions that depend on its shape follow: FLOPs, reading dimensions from
arrays, names in other programs' files, and resizing weights for another image size.
`mixer/models/registry.py` lists these functions for the rest of the package.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mixer.errors import UserError
from mixer.models import layers, modules, resize
from mixer.parallel.sharding import BATCH, constrain
from mixer.sizes import Size, shorten

# Paper, table 1.
_SIZES = {
    "S": dict(hidden_dim=512, num_blocks=8, tokens_mlp_dim=256, channels_mlp_dim=2048),
    "B": dict(hidden_dim=768, num_blocks=12, tokens_mlp_dim=384, channels_mlp_dim=3072),
    "L": dict(hidden_dim=1024, num_blocks=24, tokens_mlp_dim=512, channels_mlp_dim=4096),
    "H": dict(hidden_dim=1280, num_blocks=32, tokens_mlp_dim=640, channels_mlp_dim=5120),
}
VARIANTS = {
    name: dict(patch_size=int(name[2:]), **_SIZES[name[0]])
    for name in ("S/32", "S/16", "S/8", "B/32", "B/16", "L/32", "L/16", "H/14")
}

# Fields besides the dimensions that decide which parameters the network has, and their values.
OPTIONS = {"token_mixing_groups": None}  # any divisor of C

# The mesh axes that split each dimension of a parameter, for `mixer.models.placement`.
PLACEMENT = (
    (r"stem/kernel", (None, None, None, "fsdp")),  # (P, P, 3, C)
    # (S, D_S) and (D_S, S): few numbers of devices divide S, which is 196 at 224 px. The axis of
    # token-mixing groups, if there is one, comes first and is not split.
    (r"MixerBlock_\d+/token_mixing/Dense_0/kernel", (None, ("tensor", "fsdp"))),
    (r"MixerBlock_\d+/token_mixing/Dense_1/kernel", (("tensor", "fsdp"), None)),
    (r"MixerBlock_\d+/channel_mixing/Dense_0/kernel", ("fsdp", "tensor")),  # (C, D_C)
    (r"MixerBlock_\d+/channel_mixing/Dense_1/kernel", ("tensor", "fsdp")),  # (D_C, C)
    (r"MixerBlock_\d+/\w+_mixing/Dense_0/bias", ("tensor",)),  # (D_S,), (D_C,)
)


class MlpMixer(nn.Module):
    """The MLP-Mixer network.

    Attributes:
      num_classes: width of the head; 0: no head, and the logits are the pre-logits, as in the
        authors' code.
      patch_size: P, the side of a square patch in pixels, or its height and width.
      hidden_dim: C. num_blocks: L. tokens_mlp_dim: D_S. channels_mlp_dim: D_C.
      gelu: "tanh" (the authors' code) or "erf" (timm).
      stoch_depth: drop rate r of the last block; block i of L drops each of its two branches, per
        example, with probability i / max(L - 1, 1) * r.
      stoch_depth_rescale: False, as in the authors' code, does not scale kept branches, and
        evaluation does not scale either. True divides a kept branch by its probability, as timm
        does. (timm's Mixers use the same drop rate in all blocks; here the rate always grows.)
      dropout: rate after each of the two layers of every MLP; kept values are rescaled.
      token_mixing_groups: G, the number of token-mixing MLPs in a block, each for C / G consecutive
        channels. 1: all channels share one (the paper). C: each channel has its own ("untied",
        paper, appendix A.1). Above 1, their parameters have a leading axis of size G.
      head_bias_init: initial value of the head's bias (for the sigmoid loss, the authors' code uses
        -6.9 with 1,000 classes and -10 with 21,843). The head's kernel is initialised to zero.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and logits are float32.
      remat: "none", "dots" or "full": which activations the backward pass recomputes to save memory
        (Chen et al., 2016, arXiv 1604.06174). The results do not change.
      scan_blocks: whether the blocks run as one loop over stacked parameters, which is compiled
        once, instead of one copy per block. Names, parameters and results do not change.
      in_channels: number of channels of the images: 3 for RGB, 1 for grey.
    """

    num_classes: int
    patch_size: Size
    hidden_dim: int
    num_blocks: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: str = "tanh"
    stoch_depth: float = 0.0
    stoch_depth_rescale: bool = False
    dropout: float = 0.0
    token_mixing_groups: int = 1
    head_bias_init: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan_blocks: bool = False
    in_channels: int = 3

    def __post_init__(self):
        """Raises UserError for a number of groups that does not divide the channels."""
        if self.hidden_dim % self.token_mixing_groups:
            raise UserError(
                f"model.token_mixing_groups={self.token_mixing_groups} does not divide "
                f"model.hidden_dim={self.hidden_dim}; expected a divisor"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, example_index: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the logits and the intermediate outputs.

        Args:
          images: (N, H, W, in_channels) float in [-1, 1]; H and W are multiples of P.
          train: whether to apply stochastic depth and dropout; `apply` then needs
            `rngs={"dropout": key}`.
          example_index: (N,) position of each image in the global batch, which determines its
            masks; None: 0..N-1.

        Returns:
          `(logits, out)`: logits (N, num_classes) float32; out holds "stem" (N, H/P, W/P, C),
          "block_0" ... (N, S, C), "pre_logits" (N, C) and "logits".

        Raises:
          UserError: the images have another shape or an integer dtype, or P does not divide H or W.
        """
        modules.check_images(images, self.patch_size, self.in_channels)
        dtype = jnp.dtype(self.dtype)
        if example_index is None:
            example_index = jnp.arange(images.shape[0])
        has_masks = train and bool(self.stoch_depth or self.dropout)
        key = self.make_rng("dropout") if has_masks else None
        out = {}

        # Per-patch fully-connected.
        x = modules.patch_embedding(images, self.patch_size, self.hidden_dim, dtype, name="stem")
        out["stem"] = x
        n, rows, columns, _ = x.shape  # n may be 0
        x = constrain(x.reshape(n, rows * columns, self.hidden_dim), BATCH, None, None)

        # L mixer layers.
        fields = dict(
            tokens_mlp_dim=self.tokens_mlp_dim,
            token_mixing_groups=self.token_mixing_groups,
            channels_mlp_dim=self.channels_mlp_dim,
            gelu=self.gelu,
            dropout=self.dropout,
            drop_path_rescale=self.stoch_depth_rescale,
            dtype=dtype,
        )
        masks = dict(key=key, example_index=example_index)
        x, outputs = modules.apply_blocks(self, MixerBlock, fields, x, name=BLOCK, **masks)
        out |= {f"block_{i}": output for i, output in enumerate(outputs)}

        # Global average pooling and the head.
        x = nn.LayerNorm(dtype=dtype, name="pre_head_layer_norm")(x)
        x = out["pre_logits"] = jnp.mean(x, axis=1).astype(jnp.float32)
        out["logits"] = modules.head(x, self.num_classes, self.head_bias_init)
        return out["logits"], out


BLOCK = "MixerBlock_{}"  # prefix of the names of a block's parameters
BRANCHES = ("token_mixing", "channel_mixing")


class MixerBlock(nn.Module):
    """A mixer layer: token mixing, then channel mixing, each with its skip connection."""

    tokens_mlp_dim: int
    token_mixing_groups: int
    channels_mlp_dim: int
    gelu: str
    dropout: float
    drop_path_rescale: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, keys: jax.Array | None, keep_prob: jax.Array | float | None
    ) -> jax.Array:
        """Applies the layer: (N, S, C) to (N, S, C).

        Args:
          x: (N, S, C).
          keys: (N,) random keys for all masks; None: no masks (evaluation).
          keep_prob: probability that an example's branch is kept; None: 1.
        """
        # LayerNorm, transpose, MLP 1, transpose. `layers.token_dense` needs no transposed array.
        y = nn.LayerNorm(dtype=self.dtype)(x)
        args = (self.gelu, self.dropout)
        if self.token_mixing_groups == 1:
            mlp = modules.MlpBlock(1, self.tokens_mlp_dim, *args, name="token_mixing")
        else:
            groups = self.token_mixing_groups
            mlp = GroupedMlpBlock(groups, self.tokens_mlp_dim, *args, name="token_mixing")
        y = mlp(y, modules.dropout_keys(keys, 0, self.dropout))
        y = modules.drop_branch(y, keys, 0, keep_prob, rescale=self.drop_path_rescale)
        x = constrain(x + y, BATCH, None, None)

        # LayerNorm, MLP 2. `layers.norm_dense` computes the norm and the first matmul together.
        norm = modules.Norm(x.shape[-1], name="LayerNorm_1")()
        mlp = modules.MlpBlock(2, self.channels_mlp_dim, *args, name="channel_mixing")
        y = mlp(x, modules.dropout_keys(keys, 1, self.dropout), norm)
        y = modules.drop_branch(y, keys, 1, keep_prob, rescale=self.drop_path_rescale)
        return constrain(x + y, BATCH, None, None)


class GroupedMlpBlock(nn.Module):
    """Token mixing with an MLP for each group of consecutive channels (paper, appendix A.1).

    The parameters are those of `modules.MlpBlock` with a leading axis (G). The matmuls are batched
    over the groups. Unlike with one MLP for all channels, it is faster to transpose the tokens.
    """

    groups: int
    mlp_dim: int
    gelu: str
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Applies the MLPs: (N, S, C) to (N, S, C).

        Args:
          x: (N, S, C).
          keys: (N,) random keys for the dropout masks, which are those of a shared MLP; None: no
            dropout.
        """
        tokens = x.shape[1]
        x = layers.split_groups(x, self.groups)  # (G, N, C / G, S)
        affine = modules.Dense((tokens, self.mlp_dim), groups=self.groups, name="Dense_0")()
        x = checkpoint_name(layers.grouped_dense(x, *affine), "dense")
        x = constrain(x, None, BATCH, None, "tensor")
        x = layers.gelu(x, self.gelu)
        if keys is not None:
            x = modules.dropout(layers.join_groups(x), self.dropout, modules.fold(keys, 0))
            x = layers.split_groups(x, self.groups)
        affine = modules.Dense((self.mlp_dim, tokens), groups=self.groups, name="Dense_1")()
        x = checkpoint_name(layers.grouped_dense(x, *affine), "dense")
        x = layers.join_groups(x)
        if keys is not None:
            x = modules.dropout(x, self.dropout, modules.fold(keys, 1))
        return x


# Functions of the network's shape.


def layer_flops(model: MlpMixer, image_size: tuple[int, int]) -> Iterator[tuple[str, float]]:
    """Yields (name, FLOPs of one image's forward pass) of each layer with parameters, in order.

    The FLOPs are multiplications and additions of matmuls, 2 * S * D_in * D_out; a norm has none.
    They do not depend on the number of token-mixing groups.
    """
    tokens = math.prod(modules.patch_grid(image_size, model.patch_size))
    token_mlp = 2.0 * model.hidden_dim * tokens * model.tokens_mlp_dim
    channel_mlp = 2.0 * tokens * model.hidden_dim * model.channels_mlp_dim
    yield "stem", 2.0 * math.prod(image_size) * model.in_channels * model.hidden_dim
    for i in range(model.num_blocks):
        block = BLOCK.format(i)
        for number, (mlp, flops) in enumerate(
            (("token_mixing", token_mlp), ("channel_mixing", channel_mlp))
        ):
            yield f"{block}/LayerNorm_{number}", 0.0
            yield f"{block}/{mlp}/Dense_0", flops
            yield f"{block}/{mlp}/Dense_1", flops
    yield "pre_head_layer_norm", 0.0
    yield "head", 2.0 * model.hidden_dim * model.num_classes


def hidden_values(model: MlpMixer, image_size: tuple[int, int]) -> int:
    """Returns the number of hidden values per image in a block's two MLPs: C D_S + S D_C."""
    tokens = math.prod(modules.patch_grid(image_size, model.patch_size))
    return model.hidden_dim * model.tokens_mlp_dim + tokens * model.channels_mlp_dim


def read_dimensions(shapes: Mapping[str, tuple[int, ...]], source: Any) -> dict[str, int]:
    """Infers dimensions and options, by the model's field names, from the shapes of its parameters.

    "num_tokens" is S; "num_classes" is 0 if there is no head. "token_mixing_groups" is absent if
    all channels share the token-mixing MLPs, so that weights of such models are described as they
    were before there were groups.

    Raises:
      UserError: an array that determines dimensions is missing, is empty, or has other axes.
    """
    token_kernel = "MixerBlock_0/token_mixing/Dense_0/kernel"
    axes = {"stem/kernel": 4, token_kernel: 2, "MixerBlock_0/channel_mixing/Dense_0/kernel": 2}
    faults = [f"{name}: missing" for name in axes if name not in shapes]
    if len(shapes.get(token_kernel, ())) == 3:  # with groups
        axes[token_kernel] = 3
    for name, ndim in (axes | {"head/kernel": 2}).items():
        if name in shapes and len(shapes[name]) != ndim:
            faults.append(f"{name}: {shapes[name]} does not have {ndim} axes")
        elif 0 in shapes.get(name, ()):
            faults.append(f"{name}: {shapes[name]} is empty")
    if faults:
        raise UserError(f"{source} is not a complete MLP-Mixer: {'; '.join(faults)}")
    patch_height, patch_width, in_channels, hidden_dim = shapes["stem/kernel"]
    *groups, num_tokens, tokens_mlp_dim = shapes[token_kernel]
    _, channels_mlp_dim = shapes["MixerBlock_0/channel_mixing/Dense_0/kernel"]
    return {
        "patch_size": shorten((patch_height, patch_width)),
        "in_channels": in_channels,
        "hidden_dim": hidden_dim,
        "num_blocks": modules.count_blocks(shapes),
        "tokens_mlp_dim": tokens_mlp_dim,
        "channels_mlp_dim": channels_mlp_dim,
        **({"token_mixing_groups": groups[0]} if groups else {}),
        "num_tokens": num_tokens,
        "num_classes": shapes.get("head/kernel", (0,))[-1],
    }


# Names and axes in the files of other programs. "legacy" is the code before Flax Linen, whose files
# big_vision converts; "timm" is timm's MlpMixer.


def recognise(shapes: Mapping[str, tuple[int, ...]], source: Any) -> str | None:
    """Returns the layout of a file from its array names; None if it holds no MLP-Mixer.

    Raises:
      UserError: the names are those of a similar model.
    """
    if "stem/kernel" in shapes:
        return "published"
    if any(name.startswith("Mixer/") for name in shapes):
        return "legacy"
    if not any(name.startswith(("stem.", "blocks.")) for name in shapes):
        return None
    if any(".attn." in name for name in shapes):  # a Vision Transformer, or another Transformer
        return None
    wide, narrow = (shapes.get(f"blocks.0.mlp_tokens.fc{n}.weight") for n in (1, 2))
    other_model = None
    if any(name.startswith("blocks.0.linear_tokens.") for name in shapes):
        other_model = "a ResMLP"
    elif any(".gate." in name for name in shapes):
        other_model = "a gMLP"
    elif wide and narrow and wide[0] == 2 * narrow[-1]:
        other_model = "a gMixer, with gated MLPs"
    if other_model:
        raise UserError(
            f"{source} is {other_model}, not an MLP-Mixer; expected a timm model named mixer_*"
        )
    return "timm"


def leaf_names(num_blocks: int) -> Iterator[str]:
    """Yields the published names of a Mixer's parameters."""
    names = ["stem", "pre_head_layer_norm", "head"]
    for block in map(BLOCK.format, range(num_blocks)):
        names += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_1"]
        names += [f"{block}/{mlp}_mixing/Dense_{i}" for mlp in ("token", "channel") for i in (0, 1)]
    for name in names:
        is_norm = "norm" in name.rpartition("/")[2].lower()
        yield f"{name}/{'scale' if is_norm else 'kernel'}"
        yield f"{name}/bias"


def stored_name(name: str, layout: str) -> str:
    """Returns the name that the array with published name `name` has in a file of `layout`."""
    if layout == "legacy":
        name = re.sub("^stem/", "embedding/", name)
        name = re.sub("^pre_head_layer_norm/", "Mixer/encoder_norm/", name)
        name = re.sub("^MixerBlock_", "Mixer/encoderblock_", name)
        return re.sub(
            r"_mixing/Dense_(\d)/(\w+)",
            lambda match: f"_mixing_phase_0/{match[2]}{int(match[1]) + 1}",
            name,
        )
    if layout == "timm":
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


def from_layout(name: str, array: np.ndarray, layout: str, fields: Mapping[str, Any]) -> np.ndarray:
    """Converts an array from its axes in a file of `layout` to the published axes."""
    if layout == "timm" and name.endswith("kernel"):
        return array.transpose((2, 3, 1, 0) if array.ndim == 4 else None)
    if "_mixing/Dense_" in name:  # the legacy layout has leading axes of size 1
        while array.ndim > (2 if name.endswith("kernel") else 1) and len(array) == 1:
            array = array[0]
    return array


def to_layout(name: str, array: np.ndarray, layout: str) -> np.ndarray:
    """Converts an array from the published axes to those of `layout`; inverts `from_layout`.

    Raises:
      UserError: the array has token-mixing groups, which the legacy layout lacks.
    """
    if layout == "timm" and name.endswith("kernel"):
        return np.ascontiguousarray(array.transpose((3, 2, 0, 1) if array.ndim == 4 else None))
    if layout == "legacy" and "_mixing/Dense_" in name:
        if array.ndim > 1 + name.endswith("kernel"):
            raise UserError(
                f"the legacy layout has no MLP-Mixer with token_mixing_groups={len(array)}; "
                "expected the published layout"
            )
        return array[None]
    return array


# timm's models by name, and the arguments of its class that each name sets (timm 1.0.31).
TIMM_MODELS = {
    f"mixer_{name[0].lower()}{name[2:]}_224": dict(
        patch_size=VARIANTS[name]["patch_size"],
        num_blocks=VARIANTS[name]["num_blocks"],
        embed_dim=VARIANTS[name]["hidden_dim"],
    )
    for name in ("S/32", "S/16", "B/32", "B/16", "L/32", "L/16")
}


def timm_arguments(model: MlpMixer, image_size: tuple[int, int]) -> dict[str, Any] | None:
    """Returns the arguments of timm.models.mlp_mixer.MlpMixer for a model equal to `model`.

    None: timm has no token-mixing groups. `act_layer` is a name that timm.layers.get_act_layer
    accepts.
    """

    def ratio(width: int) -> float:  # timm truncates ratio * embed_dim
        value = width / model.hidden_dim
        while int(value * model.hidden_dim) < width:
            value = math.nextafter(value, math.inf)
        return value

    if model.token_mixing_groups > 1:
        return None
    return {
        "num_classes": model.num_classes,
        "img_size": list(image_size),
        "patch_size": model.patch_size,
        "num_blocks": model.num_blocks,
        "embed_dim": model.hidden_dim,
        "mlp_ratio": [ratio(model.tokens_mlp_dim), ratio(model.channels_mlp_dim)],
        "act_layer": "gelu" if model.gelu == "erf" else "gelu_tanh",
        **modules.timm_channels(model.in_channels),
    }


# The graph of an export to ONNX.


def onnx_graph(graph: Any, model: MlpMixer, pixels: str, image_size: tuple[int, int]) -> str:
    """Adds the network to an ONNX graph; returns the name of its pre-logits (b, C).

    Args:
      graph: a `mixer.tools.export.onnx_graphs.Graph`.
      model: the model.
      pixels: name of the input (b, H, W, in_channels).
      image_size: (H, W).
    """
    # Per-patch fully-connected.
    x = graph.patch_embedding(pixels, "stem", image_size=image_size)
    # L mixer layers: token mixing, then channel mixing.
    for block in map(BLOCK.format, range(model.num_blocks)):
        for i, branch in enumerate(BRANCHES):
            dense = graph.token_dense if branch == "token_mixing" else graph.dense
            y = graph.layer_norm(x, f"{block}/LayerNorm_{i}")
            y = dense(y, f"{block}/{branch}/Dense_0")
            y = graph.gelu(y, model.gelu, name=f"{block}/{branch}/gelu")
            y = dense(y, f"{block}/{branch}/Dense_1")
            x = graph.node("Add", x, y, name=f"{block}/{branch}/skip")
    # Global average pooling.
    return graph.mean_token(graph.layer_norm(x, "pre_head_layer_norm"), name="pooling")


# Resizing weights for another image size, leaf by leaf. In a Mixer only the token-mixing widths S
# and D_S depend on the size, and the MLP of each group of channels is resized alike. Grids are
# (H / P, W / P) in tokens, in row-major order: S = H W / P^2.


def _token_mixing_leaf(name: str) -> str | None:
    """Returns a name such as "Dense_0/kernel" for a leaf of token mixing, else None."""
    match = re.fullmatch(r"MixerBlock_\d+/token_mixing/(.*)", name)
    return match and match[1]


def grow(
    name: str, array: np.ndarray, *, grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """Grows one leaf for images that are K_h and K_w times as large (paper, supplement).

    Kernels become block-diagonal with K_h K_w copies of the old kernel, biases are repeated, and
    token axes are permuted from tile order to row-major order. The dtype and the values are kept;
    no memory is allocated except for the result.

    Args:
      name: published name, such as "MixerBlock_0/token_mixing/Dense_0/kernel".
      array: the leaf. A leaf that does not belong to token mixing is returned unchanged.
      grid: (H / P, W / P) of the weights.
      new_grid: (K_h H / P, K_w W / P), the grid of the new images.
    """
    leaf = _token_mixing_leaf(name)
    if leaf is None or grid == new_grid:
        return array
    h, w = grid
    k_h, k_w = new_grid[0] // h, new_grid[1] // w
    if leaf == "Dense_0/bias":  # D_S
        return np.tile(array, k_h * k_w)
    if leaf == "Dense_1/bias":  # S
        *groups, _ = array.shape
        return np.tile(array.reshape(*groups, h, w), (k_h, k_w)).reshape(*groups, -1)
    *groups, rows, columns = array.shape
    grown = np.zeros((*groups, rows * k_h * k_w, columns * k_h * k_w), array.dtype)
    # Index a token of the large image by (row of its tile, row in the tile, column of its tile,
    # column in the tile), and a hidden unit by (tile, old unit). The groups come first.
    count = math.prod(groups)
    if leaf == "Dense_0/kernel":  # S, D_S
        blocks = grown.reshape(count, k_h, h, k_w, w, k_h * k_w, columns)
        blocks = blocks.transpose(1, 3, 5, 0, 2, 4, 6)
        block = array.reshape(count, h, w, columns)
    else:  # D_S, S
        blocks = grown.reshape(count, k_h * k_w, rows, k_h, h, k_w, w)
        blocks = blocks.transpose(3, 5, 1, 0, 2, 4, 6)
        block = array.reshape(count, rows, h, w)
    for row in range(k_h):
        for column in range(k_w):
            blocks[row, column, row * k_w + column] = block
    return grown


def interpolate(
    name: str, array: np.ndarray, *, grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """Resamples one leaf for images of another size, with D_S unchanged. Not from the paper.

    Let R be the bilinear resampling of one grid to another (`resize.resampling`). Then W2' = R(old
    to new) W2, b2' = R(old to new) b2 and W1' = R(new to old)^T W1, so that the hidden units equal
    those of the old weights on resampled tokens. The transpose equals the bilinear enlargement of
    W1 times S / S', but is exact at the borders: constant tokens give the same hidden units as
    before, and constant outputs stay constant.

    Args:
      name: published name.
      array: the leaf. A leaf that does not depend on the number of tokens is returned unchanged.
      grid: (H / P, W / P) of the weights.
      new_grid: the grid of the new images.
    """
    leaf = _token_mixing_leaf(name)
    if leaf is None or leaf == "Dense_0/bias" or grid == new_grid:
        return array
    if leaf == "Dense_0/kernel":
        matrices = [matrix.T for matrix in resize.resampling(new_grid, grid)]
    else:
        matrices = resize.resampling(grid, new_grid)
    return resize.resample(array, matrices, grid=grid, axis=-2 if leaf == "Dense_0/kernel" else -1)
