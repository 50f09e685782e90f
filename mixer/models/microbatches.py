"""Computes a batch in consecutive microbatches.

An accelerator computes a whole batch at once if the batch fits into its memory. A CPU is up to a
third faster on microbatches whose activations stay in its cache from one layer to the next. The
constants below were measured (docs/performance.md).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixer.models.modules import patch_grid
from mixer.models.registry import architecture_of
from mixer.parallel.sharding import BATCH, batch_shards, constrain

# Up to this number of values, the widest activations of a batch stay in the cache.
FEW_VALUES = 1_250_000
# Rows (tokens) of a CPU's matmul. With fewer rows, each row takes longer. More rows, or more values
# in the widest activations, do not stay in the cache.
MIN_ROWS, MAX_ROWS, MAX_VALUES = 768, 2048, 2_500_000


def best_count(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Returns the fastest number of microbatches for a batch of images.

    The result depends on the devices of the mesh of `sharding.on_mesh`, or without a mesh on JAX's
    default device.

    Args:
      model: the model, whose widths determine the result.
      shape: shape of the images, (N, H, W, channels).

    Returns:
      A divisor of N such that the mesh divides each microbatch as it divides N; 1 except on CPUs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    if platform != "cpu" or not isinstance(shape[0], int):  # symbolic batch size of an export
        return 1
    size = shape[0] if mesh.empty else shape[0] // batch_shards(mesh)
    tokens = math.prod(patch_grid((shape[1], shape[2]), model.patch_size))
    widest = getattr(model, architecture_of(model).widest_dim)
    if size * tokens * widest <= FEW_VALUES:
        return 1
    rows = min(max(MAX_VALUES // widest, MIN_ROWS), MAX_ROWS)
    images = max(1, rows // tokens)
    part = next(part for part in range(min(images, size), 0, -1) if size % part == 0)
    # Without a divisor near the ideal size, the microbatches would be too small.
    return size // part if 2 * part >= images else 1


def cut(x: jax.Array, count: int) -> jax.Array:
    """Cuts the batch axis: (N, ...) to (count, N / count, ...).

    A microbatch takes every count-th example, so that each device's shard of a microbatch is part
    of its shard of the batch, and no data moves between devices.
    """
    parts = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
    return constrain(parts, None, BATCH, *(None,) * (x.ndim - 1))


def map_images(model: nn.Module, function: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    """Computes `function(images)` in the fastest number of microbatches.

    Args:
      model: the model that `function` applies.
      function: maps images to a tree of arrays (N, ...); row i depends only on image i.
      images: (N, H, W, channels).
    """
    count = best_count(model, images.shape)
    if count == 1:
        return function(images)
    parts = jax.lax.map(function, cut(images, count))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
