"""Vision Transformer (Dosovitskiy et al., 2020, arXiv 2010.11929), section 3 and figure 1.

The paper of MLP-Mixer compares every Mixer with a Vision Transformer of about the same cost.

Dimensions in the docstrings: N images, S patches, T tokens (S, or S + 1 with the class token),
C channels (`hidden_dim`), M (`mlp_dim`), H heads of D = C / H channels, P (`patch_size`). Parameter
names match the released checkpoints of vision_transformer.

The network comes first. Functions that depend on its shape follow, in the order of `mlp_mixer.py`.
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

# Paper, table 1. S is from DeiT (arXiv 2012.12877).
_SIZES = {
    "S": dict(hidden_dim=384, num_blocks=12, mlp_dim=1536, num_heads=6),
    "B": dict(hidden_dim=768, num_blocks=12, mlp_dim=3072, num_heads=12),
    "L": dict(hidden_dim=1024, num_blocks=24, mlp_dim=4096, num_heads=16),
    "H": dict(hidden_dim=1280, num_blocks=32, mlp_dim=5120, num_heads=16),
}
VARIANTS = {
    name: dict(patch_size=int(name[2:]), **_SIZES[name[0]])
    for name in ("S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14")
}
# Fields besides the dimensions that decide which parameters the network has, and their values.
OPTIONS = {
    "pooling": ("token", "gap", "map"),
    "positions": ("learnt", "learnt_patches", "sincos2d"),
    "pre_logits_layer": (False, True),
}

# The mesh axes that split each dimension of a parameter, for `mixer.models.placement`.
PLACEMENT = (
    (r"embedding/kernel", (None, None, None, "fsdp")),  # (P, P, 3, C)
    (r"MultiHeadDotProductAttention_0/(query|key|value)/kernel", ("fsdp", "tensor", None)),  # C H D
    (r"MultiHeadDotProductAttention_0/(query|key|value)/bias", ("tensor", None)),  # (H, D)
    (r"MultiHeadDotProductAttention_0/out/kernel", ("tensor", None, "fsdp")),  # (H, D, C)
    (r"MlpBlock_0/Dense_0/kernel", ("fsdp", "tensor")),  # (C, M)
    (r"MlpBlock_0/Dense_0/bias", ("tensor",)),
    (r"MlpBlock_0/Dense_1/kernel", ("tensor", "fsdp")),  # (M, C)
    (r"pre_logits/kernel", ("fsdp", None)),  # (C, C)
)


class VisionTransformer(nn.Module):
    """The Vision Transformer.

    Attributes:
      num_classes: width of the head; 0: no head, and the logits are the pre-logits.
      patch_size: P, the side of a square patch in pixels, or its height and width.
      hidden_dim: C. num_blocks: L. mlp_dim: M. num_heads: H, a divisor of C.
      pooling: what the head sees. "token": the class token (the paper); "gap": the mean of the
        tokens; "map": attention from a learnt probe (Zhai et al., 2021, arXiv 2106.04560).
      positions: "learnt": one for each token (the paper, vision_transformer); "learnt_patches":
        one for each patch and none for the class token (big_vision); "sincos2d": fixed sines and
        cosines of row and column, none for the class token (Beyer et al., 2022, arXiv 2205.01580).
      pre_logits_layer: whether a layer of width C with tanh precedes the head, as in vision_
        transformer's ImageNet-21k weights and big_vision's `rep_size=True`.
      gelu: "tanh" (both JAX code bases) or "erf" (timm).
      dropout: rate after the positions, after attention, and after each of an MLP's two layers.
      in_channels, head_bias_init, stoch_depth, stoch_depth_rescale, dtype, remat, scan_blocks: as
        in `MlpMixer`.
    """

    num_classes: int
    patch_size: Size
    hidden_dim: int
    num_blocks: int
    mlp_dim: int
    num_heads: int
    pooling: str = "token"
    positions: str = "learnt"
    pre_logits_layer: bool = False
    gelu: str = "tanh"
    stoch_depth: float = 0.0
    stoch_depth_rescale: bool = False
    dropout: float = 0.0
    head_bias_init: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan_blocks: bool = False
    in_channels: int = 3

    def __post_init__(self):
        """Raises UserError for a width that heads or sine-cosine positions do not divide."""
        if self.hidden_dim % self.num_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} does not divide model.hidden_dim="
                f"{self.hidden_dim}; expected a divisor"
            )
        if self.positions == "sincos2d" and (self.hidden_dim % 4 or self.hidden_dim < 8):
            raise UserError(
                f"model.hidden_dim={self.hidden_dim} with model.positions=sincos2d; expected a "
                "multiple of 4 of at least 8"
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
          "tokens" (N, T, C), the input of the first block, "block_0" ... (N, T, C), "pre_logits"
          (N, C) and "logits".

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

        # Linear projection of flattened patches.
        x = modules.patch_embedding(
            images, self.patch_size, self.hidden_dim, dtype, name="embedding"
        )
        out["stem"] = x
        n, rows, columns, width = x.shape
        x = x.reshape(n, rows * columns, width)

        # Position embedding of the patches, and the class token.
        if self.positions == "sincos2d":
            x = x + sincos2d(rows, columns, width).astype(dtype)
        elif self.positions == "learnt_patches":
            positions = self.param("pos_embedding", _init_positions, (1, *x.shape[1:]), jnp.float32)
            x = x + positions.astype(dtype)
        if self.pooling == "token":
            token = self.param("cls", nn.initializers.zeros, (1, 1, width), jnp.float32)
            token = jnp.broadcast_to(token.astype(dtype), (n, 1, width))
            x = jnp.concatenate([token, x], axis=1)

        # Transformer encoder. It adds learnt positions of all tokens.
        names = ("num_blocks", "mlp_dim", "num_heads", "gelu", "stoch_depth")
        names += ("stoch_depth_rescale", "dropout", "dtype", "remat", "scan_blocks")
        fields = {name: getattr(self, name) for name in names}
        encoder = Encoder(self.positions == "learnt", **fields, name="Transformer")
        x, outputs = encoder(x, key, example_index)
        out |= outputs

        # Pooling and the head.
        if self.pooling == "token":
            x = x[:, 0]
        elif self.pooling == "gap":
            x = jnp.mean(x, axis=1)
        else:
            x = AttentionPooling(self.mlp_dim, self.num_heads, self.gelu, name="MAPHead_0")(x)
        x = x.astype(jnp.float32)
        if self.pre_logits_layer:
            x = jnp.tanh(nn.Dense(self.hidden_dim, name="pre_logits")(x))
        out["pre_logits"] = x
        out["logits"] = modules.head(x, self.num_classes, self.head_bias_init)
        return out["logits"], out


BLOCK = "Transformer/encoderblock_{}"  # prefix of the names of a block's parameters
BRANCHES = ("MultiHeadDotProductAttention_0", "MlpBlock_0")

_MLP_INIT = dict(
    kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.normal(1e-6)
)


class Encoder(nn.Module):
    """The Transformer encoder: positions of all tokens, L blocks and a LayerNorm.

    Without `has_positions`, the tokens have their positions already. The other fields are those of
    the network.
    """

    has_positions: bool
    num_blocks: int
    mlp_dim: int
    num_heads: int
    gelu: str
    stoch_depth: float
    stoch_depth_rescale: bool
    dropout: float
    dtype: str
    remat: str
    scan_blocks: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, key: jax.Array | None, example_index: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes the tokens.

        Args:
          x: (N, T, C).
          key: random key for all masks; None: no masks (evaluation).
          example_index: (N,), position of each image in the global batch.

        Returns:
          The normalized tokens (N, T, C), and "tokens", "block_0" ...
        """
        if self.has_positions:
            positions = Positions((1, *x.shape[1:]), name="posembed_input")()
            x = x + positions.astype(x.dtype)
        if key is not None and self.dropout:
            keys = jax.random.fold_in(key, self.num_blocks)  # the blocks use 0..L-1
            keys = jax.vmap(jax.random.fold_in, (None, 0))(keys, example_index)
            x = modules.dropout(x, self.dropout, keys)
        x = constrain(x, BATCH, None, None)
        out = {"tokens": x}

        fields = dict(
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            gelu=self.gelu,
            dropout=self.dropout,
            drop_path_rescale=self.stoch_depth_rescale,
        )
        x, outputs = modules.apply_blocks(
            self,
            EncoderBlock,
            fields,
            x,
            name="encoderblock_{}",
            key=key,
            example_index=example_index,
        )
        out |= {f"block_{i}": output for i, output in enumerate(outputs)}
        return nn.LayerNorm(dtype=jnp.dtype(self.dtype), name="encoder_norm")(x), out


def _init_positions(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return nn.initializers.normal(1 / math.sqrt(shape[-1]))(key, shape, dtype)  # as in big_vision


class Positions(nn.Module):
    """The parameter of learnt positions."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the positions (1, T, C), float32."""
        return self.param("pos_embedding", _init_positions, self.shape, jnp.float32)


def sincos2d(rows: int, columns: int, width: int) -> jax.Array:
    """Returns fixed positions (rows * columns, width): sines and cosines of column, then of row.

    The frequencies fall geometrically from 1 to 1 / 10,000 (arXiv 2205.01580; MoCo v3).
    """
    frequencies = 1e4 ** -(np.arange(width // 4) / (width // 4 - 1))
    row, column = (axis.reshape(-1, 1) * frequencies for axis in np.mgrid[:rows, :columns])
    waves = (np.sin(column), np.cos(column), np.sin(row), np.cos(row))
    return jnp.asarray(np.concatenate(waves, axis=1), jnp.float32)


class EncoderBlock(nn.Module):
    """An encoder block: self-attention, then the MLP, each with its skip connection."""

    mlp_dim: int
    num_heads: int
    gelu: str
    dropout: float
    drop_path_rescale: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, keys: jax.Array | None, keep_prob: jax.Array | float | None
    ) -> jax.Array:
        """Applies the block: (N, T, C) to (N, T, C).

        Args:
          x: (N, T, C).
          keys: (N,) random keys for all masks; None: no masks (evaluation).
          keep_prob: probability that an example's branch is kept; None: 1.
        """
        # LayerNorm, multi-head attention.
        x = layers.residual(x)
        norm = modules.Norm(x.shape[-1], name="LayerNorm_0")()
        y = Attention(self.num_heads, name="MultiHeadDotProductAttention_0")(x, norm)
        if (masks := modules.dropout_keys(keys, 0, self.dropout)) is not None:
            y = modules.dropout(y, self.dropout, masks)
        y = modules.drop_branch(y, keys, 0, keep_prob, rescale=self.drop_path_rescale)
        x = constrain(x + y, BATCH, None, None)

        # LayerNorm, MLP.
        x = layers.residual(x)
        norm = modules.Norm(x.shape[-1], name="LayerNorm_1")()
        mlp = modules.MlpBlock(
            2, self.mlp_dim, self.gelu, self.dropout, **_MLP_INIT, name="MlpBlock_0"
        )
        y = mlp(x, modules.dropout_keys(keys, 1, self.dropout), norm)
        y = modules.drop_branch(y, keys, 1, keep_prob, rescale=self.drop_path_rescale)
        return constrain(x + y, BATCH, None, None)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017, arXiv 1706.03762, section 3.2)."""

    num_heads: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        norm: tuple[jax.Array, jax.Array] | None = None,
        probe: jax.Array | None = None,
    ) -> jax.Array:
        """Applies attention, in the dtype of `x`.

        Args:
          x: (N, T, C), the source of keys and values.
          norm: scale and bias of a preceding LayerNorm; None: no LayerNorm.
          probe: (1, 1, C), the source of the queries; None: `x`.

        Returns:
          (N, T, C), or (N, 1, C) with a probe.
        """
        width = x.shape[-1]
        head_dim = width // self.num_heads
        heads = (self.num_heads, head_dim)
        query, key, value = (HeadDense((width, *heads), name=n)() for n in _QUERY_KEY_VALUE)
        # One matmul for all projections of `x`; each head's are adjacent, so that a mesh that
        # splits the heads splits the product too.
        projections = (query, key, value) if probe is None else (key, value)
        kernel, bias = (jnp.concatenate(part, axis=-1) for part in zip(*projections, strict=True))
        affine = kernel.reshape(width, -1), bias.reshape(-1)
        y = layers.dense(x, *affine) if norm is None else layers.norm_dense(x, *norm, *affine)
        y = checkpoint_name(y, "dense").reshape(*x.shape[:2], self.num_heads, -1)
        y = constrain(y, BATCH, None, "tensor", None)
        parts = jnp.split(y, len(projections), axis=-1)  # (N, T, H, D)
        if probe is not None:
            kernel, bias = query
            q = layers.dense(probe.astype(x.dtype), kernel.reshape(width, -1), bias.reshape(-1))
            parts = [jnp.broadcast_to(q.reshape(1, 1, *heads), (x.shape[0], 1, *heads)), *parts]
        if self.is_mutable_collection("attention"):  # mixer.tools.inspect draws the weights
            self.sow("attention", "weights", attention_weights(*parts[:2]))
        y = attend(*parts)
        kernel, bias = HeadDense((*heads, width), name="out")()
        y = y.reshape(*y.shape[:2], width)
        return checkpoint_name(layers.dense(y, kernel.reshape(width, width), bias), "dense")


_QUERY_KEY_VALUE = ("query", "key", "value")


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Returns the mean values of each head, weighted by attention.

    On a CPU this form is faster than `jax.nn.dot_product_attention`: all matrices of a head are
    adjacent, and the sum of the weights divides the result instead of each weight.

    Args:
      query: (N, T', H, D).
      key: (N, T, H, D).
      value: (N, T, H, D).

    Returns:
      (N, T', H, D).
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # (N, H, T, D)
    batch = ((0, 1), (0, 1))
    options = dict(preferred_element_type=jnp.float32)
    logits = jax.lax.dot_general(query, key, (((3,), (3,)), batch), **options)
    largest = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    weights = jnp.exp((logits - largest) / math.sqrt(query.shape[-1]))
    sums = jnp.sum(weights, -1, keepdims=True)
    weights = weights.astype(value.dtype)
    values = jax.lax.dot_general(weights, value, (((3,), (2,)), batch), **options)
    return (values / sums).astype(value.dtype).swapaxes(1, 2)


def attention_weights(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the attention weights (N, H, T', T) in float32.

    Args:
      query: (N, T', H, D).
      key: (N, T, H, D).
    """
    logits = jnp.einsum("nqhd,nkhd->nhqk", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits / math.sqrt(query.shape[-1]))


class HeadDense(nn.Module):
    """The parameters of a projection to heads (C, H, D), or from heads (H, D, C)."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns the kernel and the bias (H, D) or (C,), float32."""
        is_input = self.name == "out"
        bias_shape = self.shape[2:] if is_input else self.shape[1:]

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            width = shape[-1] if is_input else shape[0]
            square = nn.initializers.xavier_uniform()(key, (width, width), dtype)
            return square.reshape(shape)

        kernel = self.param("kernel", init, self.shape, jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, bias_shape, jnp.float32)


class AttentionPooling(nn.Module):
    """Attention from a learnt probe to the tokens, then an MLP (arXiv 2106.04560)."""

    mlp_dim: int
    num_heads: int
    gelu: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pools the tokens: (N, T, C) to (N, C)."""
        width = x.shape[-1]
        init = nn.initializers.xavier_uniform()
        probe = self.param("probe", init, (1, 1, width), jnp.float32)
        x = Attention(self.num_heads, name="MultiHeadDotProductAttention_0")(x, probe=probe)
        norm = modules.Norm(width, name="LayerNorm_0")()
        mlp = modules.MlpBlock(2, self.mlp_dim, self.gelu, 0.0, **_MLP_INIT, name="MlpBlock_0")
        return (x + mlp(x, None, norm))[:, 0]


# Functions of the network's shape.


def num_tokens(model: VisionTransformer, image_size: tuple[int, int]) -> int:
    """Returns T: the number of patches, and the class token."""
    patches = math.prod(modules.patch_grid(image_size, model.patch_size))
    return patches + (model.pooling == "token")


def layer_flops(
    model: VisionTransformer, image_size: tuple[int, int]
) -> Iterator[tuple[str, float]]:
    """Yields (name, FLOPs of one image's forward pass) of each layer, in order.

    The FLOPs are multiplications and additions of matmuls. Those of an attention without its
    projections, 4 T^2 C, bear the attention's own name.
    """
    width, tokens = model.hidden_dim, num_tokens(model, image_size)

    def attention(name: str, queries: float) -> Iterator[tuple[str, float]]:
        yield f"{name}/query", 2.0 * queries * width**2
        yield f"{name}/key", 2.0 * tokens * width**2
        yield f"{name}/value", 2.0 * tokens * width**2
        yield name, 4.0 * queries * tokens * width
        yield f"{name}/out", 2.0 * queries * width**2

    def mlp(name: str, tokens: float) -> Iterator[tuple[str, float]]:
        for layer in ("Dense_0", "Dense_1"):
            yield f"{name}/MlpBlock_0/{layer}", 2.0 * tokens * width * model.mlp_dim

    yield "embedding", 2.0 * math.prod(image_size) * model.in_channels * width
    if model.positions == "learnt":
        yield "Transformer/posembed_input", 0.0
    for i in range(model.num_blocks):
        block = BLOCK.format(i)
        yield f"{block}/LayerNorm_0", 0.0
        yield from attention(f"{block}/{BRANCHES[0]}", tokens)
        yield f"{block}/LayerNorm_1", 0.0
        yield from mlp(block, tokens)
    yield "Transformer/encoder_norm", 0.0
    if model.pooling == "map":
        yield "MAPHead_0", 0.0
        yield from attention(f"MAPHead_0/{BRANCHES[0]}", 1)
        yield "MAPHead_0/LayerNorm_0", 0.0
        yield from mlp("MAPHead_0", 1)
    if model.pre_logits_layer:
        yield "pre_logits", 2.0 * width**2
    yield "head", 2.0 * width * model.num_classes


def hidden_values(model: VisionTransformer, image_size: tuple[int, int]) -> int:
    """Returns the number of hidden values per image in a block: T M, 4 T C and H T^2."""
    tokens = num_tokens(model, image_size)
    return tokens * (model.mlp_dim + 4 * model.hidden_dim + model.num_heads * tokens)


def read_dimensions(shapes: Mapping[str, tuple[int, ...]], source: Any) -> dict[str, Any]:
    """Infers dimensions and options, by the model's field names, from the shapes of its parameters.

    "num_tokens" is the number of patches S, or None if no parameter depends on it; "num_classes" is
    0 if there is no head.

    Raises:
      UserError: an array that determines dimensions is missing, is empty, or has other axes.
    """
    block = BLOCK.format(0)
    query, hidden = f"{block}/{BRANCHES[0]}/query/kernel", f"{block}/MlpBlock_0/Dense_0/kernel"
    axes = {"embedding/kernel": 4, query: 3, hidden: 2}
    faults = [f"{name}: missing" for name in axes if name not in shapes]
    for name, ndim in (axes | {"head/kernel": 2} | dict.fromkeys(_POSITIONS, 3)).items():
        if name in shapes and len(shapes[name]) != ndim:
            faults.append(f"{name}: {shapes[name]} does not have {ndim} axes")
        elif 0 in shapes.get(name, ()):
            faults.append(f"{name}: {shapes[name]} is empty")
    if faults:
        raise UserError(f"{source} is not a complete Vision Transformer: {'; '.join(faults)}")
    patch_height, patch_width, in_channels, hidden_dim = shapes["embedding/kernel"]
    pooling = "token" if "cls" in shapes else "gap"
    if any(name.startswith("MAPHead_0/") for name in shapes):
        pooling = "map"
    num_patches, positions = None, "sincos2d"
    for kind, name in zip(("learnt", "learnt_patches"), _POSITIONS, strict=True):
        if name in shapes:
            num_patches, positions = shapes[name][1], kind
    if positions == "learnt" and pooling == "token":
        num_patches -= 1
    return {
        "patch_size": shorten((patch_height, patch_width)),
        "in_channels": in_channels,
        "hidden_dim": hidden_dim,
        "num_blocks": modules.count_blocks(shapes),
        "mlp_dim": shapes[hidden][1],
        "num_heads": shapes[query][1],
        "pooling": pooling,
        "positions": positions,
        "pre_logits_layer": "pre_logits/kernel" in shapes,
        "num_tokens": num_patches,
        "num_classes": shapes.get("head/kernel", (0,))[-1],
    }


# Names and axes in the files of other programs. "legacy" is vision_transformer before Flax Linen,
# which numbers all submodules of a block in one row; "timm" is timm's VisionTransformer, in which
# query, key and value are one matrix. big_vision reads and writes the published names.

# Of vision_transformer (positions "learnt"), and of big_vision ("learnt_patches").
_POSITIONS = ("Transformer/posembed_input/pos_embedding", "pos_embedding")


def recognise(shapes: Mapping[str, tuple[int, ...]], source: Any) -> str | None:
    """Returns the layout of a file from its array names; None if it holds no Vision Transformer.

    Raises:
      UserError: the file holds one of timm's Vision Transformers with layers that this one lacks.
    """
    if any(name.startswith("Transformer/") for name in shapes):
        if any("/MlpBlock_3/" in name for name in shapes):
            return "legacy"
        return "published"
    if "patch_embed.proj.weight" not in shapes or not any(".attn.qkv." in name for name in shapes):
        return None
    for name in shapes:
        if match := _TIMM_EXTRAS.search(name):
            raise UserError(
                f"{source} holds a Vision Transformer with {match[0]} ({name}); expected one "
                "without, such as timm's vit_base_patch16_224"
            )
    return "timm"


# Parts of timm's Vision Transformers that change the function (timm 1.0.31).
_TIMM_EXTRAS = re.compile(
    r"dist_token|reg_token|ls[12](?=\.gamma)|norm_pre|fc_norm|[qk]_norm|rel_pos|gamma_[12]|layers"
)


def leaf_names(num_blocks: int) -> Iterator[str]:
    """Yields the published names of all parameters that Vision Transformers may have."""
    yield from ("embedding/kernel", "embedding/bias", "cls", *_POSITIONS, "MAPHead_0/probe")
    names = ["Transformer/encoder_norm", "MAPHead_0/LayerNorm_0", "pre_logits", "head"]
    for block in map(BLOCK.format, range(num_blocks)):
        names += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_1"]
    for part in (*map(BLOCK.format, range(num_blocks)), "MAPHead_0"):
        names += [f"{part}/{BRANCHES[0]}/{name}" for name in (*_QUERY_KEY_VALUE, "out")]
        names += [f"{part}/MlpBlock_0/Dense_{i}" for i in (0, 1)]
    for name in names:
        is_norm = "norm" in name.rpartition("/")[2].lower()
        yield f"{name}/{'scale' if is_norm else 'kernel'}"
        yield f"{name}/bias"


def stored_name(name: str, layout: str) -> str:
    """Returns the name of the array that holds the published leaf `name` in a file of `layout`.

    In the timm layout, several leaves share an array: query, key and value.
    """
    if layout == "legacy" and name.startswith("Transformer/encoderblock_"):
        name = name.replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        return name.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
    if layout == "timm":
        name = _TIMM_NAMES.get(name, name)
        name = re.sub("^embedding/", "patch_embed.proj.", name)
        name = re.sub("^Transformer/encoder_norm/", "norm.", name)
        name = re.sub(r"^Transformer/encoderblock_(\d+)/", r"blocks.\1.", name)
        name = re.sub(r"^(blocks\.\d+\.)LayerNorm_(\d)/", _timm_norm, name)
        name = re.sub("MlpBlock_0/Dense_0/", "mlp.fc1.", name)
        name = re.sub("MlpBlock_0/Dense_1/", "mlp.fc2.", name)
        if name.startswith("MAPHead_0/"):
            name = name.replace("MAPHead_0/", "attn_pool.").replace("LayerNorm_0/", "norm.")
            name = re.sub(f"{BRANCHES[0]}/query/", "q.", name)
            name = re.sub(f"{BRANCHES[0]}/(key|value)/", "kv.", name)
            name = re.sub(f"{BRANCHES[0]}/out/", "proj.", name)
        name = re.sub(f"{BRANCHES[0]}/(query|key|value)/", "attn.qkv.", name)
        name = re.sub(f"{BRANCHES[0]}/out/", "attn.proj.", name)
        return re.sub("(kernel|scale)$", "weight", name).replace("/", ".")
    return name


_TIMM_NAMES = {
    "cls": "cls_token",
    _POSITIONS[0]: "pos_embed",
    "MAPHead_0/probe": "attn_pool.latent",
}


def _timm_norm(match: re.Match) -> str:
    return f"{match[1]}norm{int(match[2]) + 1}."


def from_layout(name: str, array: np.ndarray, layout: str, fields: Mapping[str, Any]) -> np.ndarray:
    """Converts an array from its axes in a file of `layout` to the published axes.

    Args:
      name: published name.
      array: the array of `stored_name`.
      layout: a layout of the architecture.
      fields: fields of the model that the file's header or JSON gives. The heads of a timm file
        are "num_heads", or those of timm's models of the same width: mostly 64 channels wide.

    Raises:
      UserError: the number of heads is unknown, or does not divide the width.
    """
    is_kernel = name.endswith("kernel")
    if layout != "timm":
        return array
    if is_kernel and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if array.ndim != (2 if is_kernel else 1):
        return array
    if BRANCHES[0] not in name:
        return array.T if is_kernel else array
    part, kind, _ = name.rsplit("/", 2)
    if kind == "out":
        if not is_kernel:
            return array
        return array.T.reshape(_num_heads(array.shape[1], fields), -1, array.shape[0])
    kinds = _joined(part, kind)
    width, index = array.shape[0] // len(kinds), kinds.index(kind)
    array = array[index * width : (index + 1) * width]
    heads = _num_heads(width, fields)
    return array.T.reshape(-1, heads, width // heads) if is_kernel else array.reshape(heads, -1)


def _joined(part: str, kind: str) -> tuple[str, ...]:
    """Returns the projections of an attention that share a matrix with `kind` in timm."""
    if not part.startswith("MAPHead_0"):
        return _QUERY_KEY_VALUE
    return ("query",) if kind == "query" else ("key", "value")


# Heads by width of timm's models whose heads are not 64 channels wide (timm 1.0.31). Its models of
# 1536 channels have 16 or 24 heads.
_TIMM_HEADS = {64: 2, 1152: 16, 1408: 16, 1664: 16}


def _num_heads(width: int, fields: Mapping[str, Any]) -> int:
    """Returns the number of heads of a timm file, which the shapes do not tell."""
    by_width = _TIMM_HEADS | {size["hidden_dim"]: size["num_heads"] for size in _SIZES.values()}
    is_usual = width % 64 == 0 and width <= 1024
    heads = fields.get("num_heads", by_width.get(width, width // 64 if is_usual else None))
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(
            f"num_heads={str(heads)[:80]} for a width of {width}; expected a divisor as num_heads "
            "in the model_args of timm's config.json beside the file"
        )
    return heads


def to_layout(name: str, array: np.ndarray, layout: str) -> np.ndarray:
    """Converts an array from the published axes to those of `layout`.

    Leaves with the same `stored_name` are joined along their first axis, in the order of
    `leaf_names`.
    """
    if layout != "timm":
        return array
    if name.endswith("kernel") and name.startswith("embedding"):
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    if BRANCHES[0] in name and "/out/" not in name:  # (C, H, D) and (H, D)
        array = array.reshape(*array.shape[:-2], -1)
    elif BRANCHES[0] in name and name.endswith("kernel"):  # (H, D, C)
        array = array.reshape(-1, array.shape[-1])
    return np.ascontiguousarray(array.T) if name.endswith("kernel") else array


# timm's models by name, and the arguments of its class that each name sets (timm 1.0.31).
_TIMM_SIZES = {"S": "small", "B": "base", "L": "large", "H": "huge"}
TIMM_MODELS = {
    f"vit_{_TIMM_SIZES[name[0]]}_patch{size['patch_size']}_224": dict(
        patch_size=size["patch_size"],
        embed_dim=size["hidden_dim"],
        depth=size["num_blocks"],
        num_heads=size["num_heads"],
    )
    for name, size in VARIANTS.items()
}


def timm_form(
    model: VisionTransformer, arrays: Mapping[str, np.ndarray], image_size: tuple[int, int]
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Returns the options and the arrays of the model with a learnt position for each token.

    timm has no other positions. Fixed positions become an array, and a class token without a
    position gets zeros, so the outputs are equal.
    """
    arrays = dict(arrays)
    if model.positions == "learnt":
        return {}, arrays
    if model.positions == "learnt_patches":
        positions = np.asarray(arrays.pop(_POSITIONS[1]))
    else:
        grid = modules.patch_grid(image_size, model.patch_size)
        positions = np.asarray(sincos2d(*grid, model.hidden_dim))[None]
    num_first = int(model.pooling == "token")
    arrays[_POSITIONS[0]] = np.pad(positions, ((0, 0), (num_first, 0), (0, 0)))
    return {"positions": "learnt"}, arrays


def timm_arguments(model: VisionTransformer, image_size: tuple[int, int]) -> dict[str, Any] | None:
    """Returns the arguments of timm's VisionTransformer for a model equal to `model`.

    None: timm has only learnt positions of all tokens (see `timm_form`), and no layer before the
    head.
    """
    if model.positions != "learnt" or model.pre_logits_layer:
        return None
    ratio = model.mlp_dim / model.hidden_dim
    while int(ratio * model.hidden_dim) < model.mlp_dim:  # timm truncates
        ratio = math.nextafter(ratio, math.inf)
    return {
        "num_classes": model.num_classes,
        "img_size": list(image_size),
        "patch_size": model.patch_size,
        "depth": model.num_blocks,
        "embed_dim": model.hidden_dim,
        "mlp_ratio": ratio,
        "num_heads": model.num_heads,
        "class_token": model.pooling == "token",
        "global_pool": {"token": "token", "gap": "avg", "map": "map"}[model.pooling],
        "fc_norm": False,
        "act_layer": "gelu" if model.gelu == "erf" else "gelu_tanh",
        **modules.timm_channels(model.in_channels),
    }


# The graph of an export to ONNX.


def onnx_graph(
    graph: Any, model: VisionTransformer, pixels: str, image_size: tuple[int, int]
) -> str:
    """Adds the network to an ONNX graph; returns the name of its pre-logits (b, C).

    Args:
      graph: a `mixer.tools.export.onnx_graphs.Graph`.
      model: the model.
      pixels: name of the input (b, H, W, in_channels).
      image_size: (H, W).
    """
    # Linear projection of flattened patches, position embedding, class token.
    x = graph.patch_embedding(pixels, "embedding", image_size=image_size)
    grid = modules.patch_grid(image_size, model.patch_size)
    if model.positions == "sincos2d":
        positions = graph.constant("sincos2d", sincos2d(*grid, model.hidden_dim))
        x = graph.node("Add", x, positions, name="embedding/positions")
    elif model.positions == "learnt_patches":
        x = graph.node("Add", x, graph.weight("pos_embedding"), name="embedding/positions")
    if model.pooling == "token":
        # Zeros before the patches, plus the token and zeros, have any batch size.
        pads = graph.constant("cls/pads", np.array([0, 1, 0, 0, 0, 0], np.int64))
        x = graph.node("Pad", x, pads, name="cls/patches")
        pads = np.array([0, 0, 0, 0, math.prod(grid), 0], np.int64)
        pads = graph.constant("cls/pads_after", pads)
        token = graph.node("Pad", graph.weight("cls"), pads, name="cls/token")
        x = graph.node("Add", x, token, name="cls/tokens")
    # Transformer encoder.
    if model.positions == "learnt":
        positions = graph.weight("Transformer/posembed_input/pos_embedding")
        x = graph.node("Add", x, positions, name="Transformer/posembed_input")
    tokens = num_tokens(model, image_size)
    for block in map(BLOCK.format, range(model.num_blocks)):
        y = graph.layer_norm(x, f"{block}/LayerNorm_0")
        y = _onnx_attention(graph, model, y, f"{block}/{BRANCHES[0]}", num_keys=tokens)
        x = graph.node("Add", x, y, name=f"{block}/{BRANCHES[0]}/skip")
        x = _onnx_mlp(graph, model, x, block, norm="LayerNorm_1")
    x = graph.layer_norm(x, "Transformer/encoder_norm")
    # Pooling.
    if model.pooling == "token":
        x = graph.first_token(x, name="pooling")
    elif model.pooling == "gap":
        x = graph.mean_token(x, name="pooling")
    else:
        attention = f"MAPHead_0/{BRANCHES[0]}"
        probe = graph.weight("MAPHead_0/probe")
        x = _onnx_attention(graph, model, x, attention, num_keys=tokens, probe=probe)
        x = _onnx_mlp(graph, model, x, "MAPHead_0", norm="LayerNorm_0")
        x = graph.first_token(x, name="pooling")
    if model.pre_logits_layer:
        x = graph.node("Tanh", graph.dense(x, "pre_logits"), name="pre_logits/tanh")
    return x


def _onnx_attention(
    graph: Any,
    model: VisionTransformer,
    x: str,
    name: str,
    *,
    num_keys: int,
    probe: str | None = None,
) -> str:
    """Adds multi-head attention: (b, T, C) to (b, T, C), or to (b, 1, C) with a probe."""
    num_queries = num_keys if probe is None else 1
    head_dim = model.hidden_dim // model.num_heads

    def heads(kind: str, perm: tuple[int, ...]) -> str:
        source = probe if kind == "query" and probe is not None else x
        num_tokens = num_queries if kind == "query" else num_keys
        y = graph.dense(source, f"{name}/{kind}")
        y = graph.reshape(y, (num_tokens, model.num_heads, head_dim), name=f"{name}/{kind}/heads")
        return graph.node("Transpose", y, name=f"{name}/{kind}/by_head", perm=perm)

    query, value = heads("query", (0, 2, 1, 3)), heads("value", (0, 2, 1, 3))
    key = heads("key", (0, 2, 3, 1))  # transposed
    logits = graph.node("MatMul", query, key, name=f"{name}/products")
    scale = graph.constant(f"{name}/scale", np.float32(1 / math.sqrt(head_dim)))
    logits = graph.node("Mul", logits, scale, name=f"{name}/logits")
    weights = graph.node("Softmax", logits, name=f"{name}/weights", axis=-1)
    y = graph.node("MatMul", weights, value, name=f"{name}/values_by_head")
    y = graph.node("Transpose", y, name=f"{name}/values", perm=(0, 2, 1, 3))
    y = graph.reshape(y, (num_queries, model.hidden_dim), name=f"{name}/joined")
    return graph.dense(y, f"{name}/out")


def _onnx_mlp(graph: Any, model: VisionTransformer, x: str, part: str, *, norm: str) -> str:
    """Adds a LayerNorm, an MLP and its skip connection: (b, T, C) to (b, T, C)."""
    name = f"{part}/{BRANCHES[1]}"
    y = graph.dense(graph.layer_norm(x, f"{part}/{norm}"), f"{name}/Dense_0")
    y = graph.dense(graph.gelu(y, model.gelu, name=f"{name}/gelu"), f"{name}/Dense_1")
    return graph.node("Add", x, y, name=f"{name}/skip")


# Resizing weights for another image size. Only learnt positions depend on the size.


def interpolate(
    name: str, array: np.ndarray, *, grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """Interpolates learnt positions bilinearly, as vision_transformer does.

    The corners of both grids coincide. The position of the class token does not change.

    Args:
      name: published name.
      array: the leaf. A leaf that is no position is returned unchanged.
      grid: (H / P, W / P) of the weights.
      new_grid: the grid of the new images.
    """
    if name not in _POSITIONS or grid == new_grid:
        return array
    num_first = array.shape[1] - math.prod(grid)  # 1 with a position of the class token
    matrices = [_aligned(old, new) for old, new in zip(grid, new_grid, strict=True)]
    patches = resize.resample(array[:, num_first:], matrices, grid=grid, axis=1)
    return np.concatenate([array[:, :num_first], patches], axis=1)


def _aligned(old: int, new: int) -> np.ndarray:
    """Returns the matrix (new, old) of linear interpolation with equal first and last points."""
    places = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old))).astype(np.float32)
