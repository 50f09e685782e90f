"""Exports a model as an ONNX file, for onnxruntime and other runtimes (docs/export.md)."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from mixer import files
from mixer.tools.export import onnx_graphs, serving
from mixer.tools.predict.prediction import names_of
from mixer.weights.load import Loaded

OPSET = 20  # the first with Gelu
# In external data, arrays start at multiples of a page, so that a runtime can map them.
PAGE_BYTES = 4096
# The runtime reads the shapes of reshapes and other small constants from the model itself.
MIN_EXTERNAL_BYTES = 1024


def check(path: str | Path) -> Path:
    """Checks the output path of an export before the weights are read; returns it expanded.

    Raises:
      UserError: the file or its external data exists, or its folder does not.
    """
    path = Path(path).expanduser()
    serving.check_new(_data_path(path), path)
    return path


def _data_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def write(
    loaded: Loaded,
    path: Path,
    *,
    output: str = "logits",
    batch_size: int | None = None,
    max_inside_bytes: int | None = None,
) -> list[Path]:
    """Writes an ONNX file, and its external data if the weights are large.

    The model takes "images" (b, H, W, channels) uint8, as decoded (RGB or grey), maps them to the
    range that the model was trained on, and returns `output` in float32. All files are complete
    before the first is renamed to its final name.

    Args:
      loaded: a model that computes in float32, with its parameters and its card.
      path: the file, from `check`.
      output: "logits" (b, K) or "pre_logits" (b, C).
      batch_size: b; None: any batch size.
      max_inside_bytes: if the constants of the graph have more bytes, they are written to a second
        file, `path` plus ".data". None: only if one file, of less than 2^31 bytes, cannot hold
        them.

    Returns:
      The files.

    Raises:
      UserError: the architecture has no ONNX graph, or logits are requested without a head.
    """
    serving.check_head(loaded.card, output)
    graph = onnx_graphs.build(
        loaded.model,
        serving.served_weights(loaded),
        image_size=loaded.card.image_size,
        value_range=loaded.card.value_range,
        output=output,
    )
    limit = serving.MAX_BYTES if max_inside_bytes is None else max_inside_bytes
    is_inside = sum(array.nbytes for array in graph.constants.values()) <= limit
    paths = [path] if is_inside else [path, _data_path(path)]
    with contextlib.ExitStack() as stack:
        # The stack renames files in reverse order, so the model is renamed last.
        new_path, *new_data_paths = [stack.enter_context(files.atomic_write(p)) for p in paths]
        if is_inside:
            tensors = [numpy_helper.from_array(a, name) for name, a in graph.constants.items()]
        else:
            (new_data_path,) = new_data_paths
            tensors = _write_external(graph.constants, new_data_path, name=paths[1].name)
        model = _make_model(loaded, graph, tensors, output=output, batch_size=batch_size)
        new_path.write_bytes(model.SerializeToString())
    return paths


def _write_external(
    constants: dict[str, np.ndarray], path: Path, *, name: str
) -> list[TensorProto]:
    """Writes large constants to a file; returns all constants, which refer to it by `name`."""
    tensors = []
    with path.open("wb") as file:
        for constant, array in constants.items():
            if array.nbytes < MIN_EXTERNAL_BYTES:
                tensors.append(numpy_helper.from_array(array, constant))
                continue
            file.write(bytes(-file.tell() % PAGE_BYTES))
            tensor = TensorProto(
                name=constant,
                dims=array.shape,
                data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
                data_location=TensorProto.EXTERNAL,
            )
            position = {"location": name, "offset": file.tell(), "length": array.nbytes}
            for key, value in position.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(np.ascontiguousarray(array).data)
            tensors.append(tensor)
    return tensors


def _make_model(
    loaded: Loaded,
    graph: onnx_graphs.Graph,
    tensors: list[TensorProto],
    *,
    output: str,
    batch_size: int | None,
) -> ModelProto:
    card, b = loaded.card, "b" if batch_size is None else batch_size
    shape = (*card.image_size, card.in_channels)
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, (b, *shape))
    pixels = jax.ShapeDtypeStruct((1, *shape), np.float32)
    _, out = jax.eval_shape(loaded.model.apply, {"params": loaded.params}, pixels)
    _, width = out[output].shape
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, (b, width))
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        helper.make_graph(graph.nodes, card.architecture, [images], [result], tensors),
        opset_imports=opsets,
        # The oldest version of the format that has the opset, for the sake of older runtimes.
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="mlp-mixer-jax",
    )
    helper.set_model_props(model, _metadata(loaded))
    return model


def _metadata(loaded: Loaded) -> dict[str, str]:
    """Returns the model's metadata, JSON by key.

    "card" describes the weights (mixer/weights/card.py). Its "preprocess" lists the preprocessing
    ops; the graph itself applies only the final `value_range`. "classes" lists the class names in
    label order; null if they are unknown.
    """
    values = {"card": loaded.card.as_json(), "classes": names_of(loaded.card)}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
