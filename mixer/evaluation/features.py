"""Computes features of the images of a split with frozen weights, for linear probes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import classification
from mixer.evaluation.evaluator import Batching
from mixer.models import layers
from mixer.training.step import make_predict


@functools.lru_cache(maxsize=1)  # all probes of a model share one program
def _make_step(model: nn.Module, mesh: Mesh) -> Callable:
    """Returns `(params, batch) -> columns` for `classification.collect`.

    The columns are "index", the index of each image in the split, and "features", its pre_logits
    (N, C).
    """
    predict = make_predict(model, mesh, layer="pre_logits")

    def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"index": batch["index"], "features": predict(params, batch["image"])}

    return jax.jit(step, compiler_options=layers.compiler_options(jax.default_backend()))


def collect(
    model: nn.Module,
    params: Any,
    splits: Sequence[Split],
    *,
    batching: Batching,
    should_stop: Callable[[], bool],
) -> list[np.ndarray] | None:
    """Computes the pre_logits (n, C) of all images of each split, on every process.

    Args:
      model: the model.
      params: parameters of the model, on every device of the mesh.
      splits: the splits; their images are read in order.
      batching: the batches of images.
      should_stop: called after every batch.

    Returns:
      The features of each split; None if `should_stop` returned True.

    Raises:
      UserError: features are not finite.
    """
    step = _make_step(model, batching.mesh)
    features = []
    for split in splits:
        columns = classification.collect(
            step, params, split, batching=batching, should_stop=should_stop
        )
        if columns is None:
            return None
        features.append(columns["features"])
        broken_indices = np.flatnonzero(~np.isfinite(features[-1]).all(axis=1))
        if len(broken_indices):
            raise UserError(
                f"{split.name}: the features of {len(broken_indices):,} images are not "
                f"finite, first for {split.example_id(int(broken_indices[0]))}; the weights are "
                "damaged or have diverged"
            )
    return features
