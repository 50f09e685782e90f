"""Computes features of the images of a split with frozen weights, for linear probes."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mixer.data import splits as pipeline
from mixer.errors import UserError
from mixer.evaluation import classification
from mixer.models import layers, microbatches
from mixer.parallel import sharding
from mixer.training.step import normalize


@functools.lru_cache(maxsize=1)  # all probes of a model share one program
def _make_step(model: nn.Module, mesh: Mesh) -> Callable:
    """Returns `(params, batch) -> columns` for `classification.collect`.

    The columns are "index", the index of each image in the split, and "features", its pre_logits
    (N, C).
    """

    def features(params: Any, images: jax.Array) -> jax.Array:
        def pre_logits(images: jax.Array) -> jax.Array:
            return model.apply({"params": params}, normalize(images))[1]["pre_logits"]

        return microbatches.map_images(model, pre_logits, images)

    def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        values = sharding.on_mesh(features, mesh)(params, batch["image"])
        return {"index": batch["index"], "features": values}

    return jax.jit(step, compiler_options=layers.compiler_options(jax.default_backend()))


def collect(
    model: nn.Module,
    params: Any,
    split: pipeline.Split,
    *,
    mesh: Mesh,
    global_batch_size: int,
    prefetch_batches: int,
    should_stop: Callable[[], bool],
) -> np.ndarray | None:
    """Computes the pre_logits (n, C) of all images of a split, on every process.

    Args:
      model: the model.
      params: parameters of the model, on every device of the mesh.
      split: the split; its images are read in order.
      mesh: mesh of the devices over which a batch is sharded.
      global_batch_size: images per batch, over all devices.
      prefetch_batches: number of batches to prefetch to the devices.
      should_stop: called after every batch.

    Returns:
      The features; None if `should_stop` returned True.

    Raises:
      UserError: features are not finite.
    """
    columns = classification.collect(
        _make_step(model, mesh),
        params,
        split,
        global_batch_size=global_batch_size,
        mesh=mesh,
        prefetch_batches=prefetch_batches,
        should_stop=should_stop,
    )
    if columns is None:
        return None
    features = columns["features"]
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(broken):
        raise UserError(
            f"{split.name}: the features of {len(broken):,} images are not finite, the first of "
            f"them {split.example_id(int(broken[0]))}; the weights are damaged or have diverged"
        )
    return features


def put(array: np.ndarray, array_sharding: NamedSharding) -> jax.Array:
    """Makes a global array from a NumPy array of which every process has a complete copy."""
    return jax.make_array_from_callback(array.shape, array_sharding, lambda index: array[index])
