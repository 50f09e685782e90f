"""Builds the ONNX graph of a model from its architecture's description.

An architecture has one function here and one entry of `EMITTERS`. Dimensions in the comments: b
images (any number unless fixed), S tokens, C channels, D_S and D_C hidden units, P patch size.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from onnx import NodeProto, helper

from mixer import sizes
from mixer.errors import UserError
from mixer.models import mlp_mixer, registry
from mixer.models.modules import patch_grid


class Graph:
    """The nodes and constants of an ONNX graph while it is built.

    A node is named after the layer that it computes, and its output has the name of the node. A
    constant has the published name of its weights.

    Attributes:
      weights: the model's weights by published names, float32.
      nodes: the nodes, each after those whose outputs it takes.
      constants: the arrays that the nodes take, by name.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self.weights = weights
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, name: str, array: Any) -> str:
        """Adds a constant; returns its name."""
        self.constants[name] = np.asarray(array)
        return name

    def node(self, op: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Adds a node of ONNX's operator `op`; returns the name of its output."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def reshape(self, x: str, shape: tuple[int, ...], *, name: str) -> str:
        """Adds a reshape of `x` (b, ...) to (b, *shape)."""
        # In ONNX a side of 0 is copied from the input.
        shape = self.constant(f"{name}/shape", np.array((0, *shape), np.int64))
        return self.node("Reshape", x, shape, name=name)

    def dense(self, x: str, layer: str) -> str:
        """Adds an affine map of the last axis: (..., I) to (..., O)."""
        kernel = self.weights[f"{layer}/kernel"]
        kernel = self.constant(f"{layer}/kernel", kernel.reshape(-1, kernel.shape[-1]))
        bias = self.constant(f"{layer}/bias", self.weights[f"{layer}/bias"])
        product = self.node("MatMul", x, kernel, name=f"{layer}/matmul")
        return self.node("Add", product, bias, name=layer)

    def token_dense(self, x: str, layer: str) -> str:
        """Adds an affine map of the token axis: (b, I, C) to (b, O, C)."""
        matrix = np.ascontiguousarray(self.weights[f"{layer}/kernel"].T)  # (O, I)
        matrix = self.constant(f"{layer}/kernel", matrix)
        bias = self.constant(f"{layer}/bias", self.weights[f"{layer}/bias"][:, None])
        product = self.node("MatMul", matrix, x, name=f"{layer}/matmul")
        return self.node("Add", product, bias, name=layer)

    def layer_norm(self, x: str, layer: str) -> str:
        """Adds a LayerNorm of the last axis, with Flax's epsilon."""
        affine = [
            self.constant(f"{layer}/{leaf}", self.weights[f"{layer}/{leaf}"])
            for leaf in ("scale", "bias")
        ]
        return self.node("LayerNormalization", x, *affine, name=layer, axis=-1, epsilon=1e-6)

    def gelu(self, x: str, kind: str, *, name: str) -> str:
        """Adds GELU; `kind` is "tanh" or "erf"."""
        return self.node("Gelu", x, name=name, approximate="tanh" if kind == "tanh" else "none")


def build(
    model: nn.Module,
    weights: Mapping[str, np.ndarray],
    *,
    image_size: tuple[int, int],
    value_range: tuple[float, float],
    output: str,
) -> Graph:
    """Builds the graph of a model, from its input "images" to its output.

    Args:
      model: the model.
      weights: its weights by published names, float32.
      image_size: (H, W); "images" is (b, H, W, channels) uint8.
      value_range: the model's input values for the pixel values 0 and 255.
      output: name of the output, "logits" or "pre_logits".

    Raises:
      UserError: the architecture has no ONNX graph.
    """
    architecture = registry.architecture_of(model)
    if architecture.name not in EMITTERS:
        raise UserError(
            f"{architecture.title} has no ONNX graph; expected one of {', '.join(EMITTERS)} "
            "(--format=stablehlo exports every architecture)"
        )
    graph, (low, high) = Graph(weights), value_range
    pixels = graph.node("Cast", "images", name="images/float", to=1)  # TensorProto.FLOAT
    scale = graph.constant("value_range/scale", np.float32(255 / (high - low)))
    offset = graph.constant("value_range/low", np.float32(low))
    pixels = graph.node("Div", pixels, scale, name="value_range/scaled")
    pixels = graph.node("Add", pixels, offset, name="value_range")
    features = EMITTERS[architecture.name](graph, model, pixels, image_size)
    if output == "logits":
        features = graph.dense(features, "head")
    # The result gets its name here, so that layers can be named without knowing which is the last.
    graph.node("Identity", features, name=output)
    return graph


def emit_mixer(
    graph: Graph, model: mlp_mixer.MlpMixer, pixels: str, image_size: tuple[int, int]
) -> str:
    """Adds an MLP-Mixer (figure 1 of the paper); returns the name of its pre-logits (b, C)."""
    # Per-patch fully-connected.
    (rows, columns), channels = patch_grid(image_size, model.patch_size), model.in_channels
    height, width = sizes.pair(model.patch_size)
    shape = (rows, height, columns, width, channels)
    tiles = graph.reshape(pixels, shape, name="stem/patches/tiles")
    tiles = graph.node("Transpose", tiles, name="stem/patches/by_tile", perm=(0, 1, 3, 2, 4, 5))
    size = rows * columns, height * width * channels
    x = graph.dense(graph.reshape(tiles, size, name="stem/patches"), "stem")
    # L mixer layers.
    for i in range(model.num_blocks):
        x = _emit_mixer_block(graph, model, x, mlp_mixer.BLOCK.format(i))
    # Global average pooling.
    x = graph.layer_norm(x, "pre_head_layer_norm")
    axes = graph.constant("pooling/axes", np.array([1], np.int64))
    return graph.node("ReduceMean", x, axes, name="pooling", keepdims=0)


def _emit_mixer_block(graph: Graph, model: mlp_mixer.MlpMixer, x: str, block: str) -> str:
    """Adds a mixer layer, (b, S, C) to (b, S, C): token mixing, then channel mixing."""
    for i, branch in enumerate(mlp_mixer.BRANCHES):
        dense = graph.token_dense if branch == "token_mixing" else graph.dense
        y = graph.layer_norm(x, f"{block}/LayerNorm_{i}")
        y = dense(y, f"{block}/{branch}/Dense_0")
        y = graph.gelu(y, model.gelu, name=f"{block}/{branch}/gelu")
        y = dense(y, f"{block}/{branch}/Dense_1")
        x = graph.node("Add", x, y, name=f"{block}/{branch}/skip")
    return x


# By the architecture's name in `registry.ARCHITECTURES`: a function that adds the network to a
# graph and returns the name of its pre-logits (b, C). Its arguments are those of `emit_mixer`.
EMITTERS = {"mixer": emit_mixer}
