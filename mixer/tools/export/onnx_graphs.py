"""Builds the ONNX graph of a model.

This module has the operations that architectures share. The network's own graph is the function
`onnx_graph` of the architecture's entry in `mixer.models.registry`. Dimensions in the docstrings: b
images (any number unless fixed), S tokens, C channels, P patch size.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from onnx import NodeProto, helper

from mixer.errors import UserError
from mixer.models import registry
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

    def weight(self, name: str) -> str:
        """Adds a parameter as a constant; returns its name."""
        return self.constant(name, self.weights[name])

    def patch_embedding(self, pixels: str, layer: str, *, image_size: tuple[int, int]) -> str:
        """Adds the per-patch fully-connected layer: (b, H, W, channels) to (b, S, C)."""
        height, width, channels, _ = self.weights[f"{layer}/kernel"].shape
        rows, columns = patch_grid(image_size, (height, width))
        shape = (rows, height, columns, width, channels)
        tiles = self.reshape(pixels, shape, name=f"{layer}/patches/tiles")
        tiles = self.node(
            "Transpose", tiles, name=f"{layer}/patches/by_tile", perm=(0, 1, 3, 2, 4, 5)
        )
        size = rows * columns, height * width * channels
        return self.dense(self.reshape(tiles, size, name=f"{layer}/patches"), layer)

    def dense(self, x: str, layer: str) -> str:
        """Adds an affine map of the last axis: (..., I) to (..., O).

        The axes of the kernel before and after the map are joined.
        """
        kernel, bias = (self.weights[f"{layer}/{leaf}"] for leaf in ("kernel", "bias"))
        kernel = self.constant(f"{layer}/kernel", kernel.reshape(-1, bias.size))
        bias = self.constant(f"{layer}/bias", bias.reshape(-1))
        product = self.node("MatMul", x, kernel, name=f"{layer}/matmul")
        return self.node("Add", product, bias, name=layer)

    def token_dense(self, x: str, layer: str) -> str:
        """Adds an affine map of the token axis: (b, I, C) to (b, O, C).

        A kernel (G, I, O) has a map for each group of C / G consecutive channels.
        """
        kernel, bias = (self.weights[f"{layer}/{leaf}"] for leaf in ("kernel", "bias"))
        matrix = np.ascontiguousarray(kernel.swapaxes(-1, -2))  # (O, I)
        matrix = self.constant(f"{layer}/kernel", matrix)
        bias = self.constant(f"{layer}/bias", bias[..., None])
        if kernel.ndim == 2:
            product = self.node("MatMul", matrix, x, name=f"{layer}/matmul")
            return self.node("Add", product, bias, name=layer)
        groups, num_in, num_out = kernel.shape
        x = self.reshape(x, (num_in, groups, -1), name=f"{layer}/split")
        x = self.node("Transpose", x, name=f"{layer}/by_group", perm=(0, 2, 1, 3))
        product = self.node("MatMul", matrix, x, name=f"{layer}/matmul")
        y = self.node("Add", product, bias, name=f"{layer}/bias_added")  # (b, G, O, C / G)
        y = self.node("Transpose", y, name=f"{layer}/by_token", perm=(0, 2, 1, 3))
        return self.reshape(y, (num_out, -1), name=layer)

    def layer_norm(self, x: str, layer: str) -> str:
        """Adds a LayerNorm of the last axis, with Flax's epsilon."""
        affine = [self.weight(f"{layer}/{leaf}") for leaf in ("scale", "bias")]
        return self.node("LayerNormalization", x, *affine, name=layer, axis=-1, epsilon=1e-6)

    def gelu(self, x: str, kind: str, *, name: str) -> str:
        """Adds GELU; `kind` is "tanh" or "erf"."""
        return self.node("Gelu", x, name=name, approximate="tanh" if kind == "tanh" else "none")

    def mean_token(self, x: str, *, name: str) -> str:
        """Adds the mean of the tokens: (b, S, C) to (b, C)."""
        axes = self.constant(f"{name}/axes", np.array([1], np.int64))
        return self.node("ReduceMean", x, axes, name=name, keepdims=0)

    def first_token(self, x: str, *, name: str) -> str:
        """Adds the selection of the first token: (b, S, C) to (b, C)."""
        return self.node("Gather", x, self.constant(f"{name}/index", 0), name=name, axis=1)


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
    if architecture.onnx_graph is None:
        entries = registry.ARCHITECTURES.values()
        titles = ", ".join(entry.title for entry in entries if entry.onnx_graph is not None)
        raise UserError(
            f"{architecture.title} has no ONNX graph; expected one of {titles} "
            "(--format=stablehlo exports every architecture)"
        )
    graph, (low, high) = Graph(weights), value_range
    pixels = graph.node("Cast", "images", name="images/float", to=1)  # TensorProto.FLOAT
    scale = graph.constant("value_range/scale", np.float32(255 / (high - low)))
    offset = graph.constant("value_range/low", np.float32(low))
    pixels = graph.node("Div", pixels, scale, name="value_range/scaled")
    pixels = graph.node("Add", pixels, offset, name="value_range")
    features = architecture.onnx_graph(graph, model, pixels, image_size)
    if output == "logits":
        features = graph.dense(features, "head")
    # The result gets its name here, so that layers can be named without knowing which is the last.
    graph.node("Identity", features, name=output)
    return graph
