"""A batch in parts that are computed one after the other.

Accelerators take a batch whole, unless it does not fit into their memory. A CPU is up to a third
faster in parts whose activations stay in its cache from one layer to the next; how many images that
is follows from what was measured (docs/performance.md).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixer.models.registry import architecture_of
from mixer.parallel.sharding import BATCH, batch_shards, constrain

# Up to so many values the widest activations of a whole batch are in the cache anyway.
FEW_VALUES = 1_250_000
# Of a CPU's matmuls: fewer rows (of tokens) take longer each; more rows, or more values in the
# widest activations, do not stay in the cache.
LEAST_ROWS, MOST_ROWS, MOST_VALUES = 768, 2048, 2_500_000


def best_count(model: nn.Module, shape: tuple[int, ...]) -> int:
    """In how many parts a batch of images is computed fastest where this is traced for.

    That is the mesh of `sharding.on_mesh`, or else JAX's default device.

    Args:
      model: for its widths.
      shape: of the images, (N, H, W, 3).

    Returns:
      A divisor of N, such that the mesh divides each part as it does N; 1 but on CPUs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    if platform != "cpu" or not isinstance(shape[0], int):  # an exported program's is not known
        return 1
    size = shape[0] if mesh.empty else shape[0] // batch_shards(mesh)
    tokens = shape[1] * shape[2] // model.patch_size**2
    widest = getattr(model, architecture_of(model).widest_dim)
    if size * tokens * widest <= FEW_VALUES:
        return 1
    rows = min(max(MOST_VALUES // widest, LEAST_ROWS), MOST_ROWS)
    images = max(1, rows // tokens)
    part = next(part for part in range(min(images, size), 0, -1) if size % part == 0)
    # Of a size with no divisor nearby the parts would be too small.
    return size // part if 2 * part >= images else 1


def cut(x: jax.Array, count: int) -> jax.Array:
    """Cuts the batch axis: (N, ...) to (count, N / count, ...).

    Every count-th example makes a part, so that each device's share of a part lies in its own share
    of the batch, and nothing moves between devices.
    """
    parts = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
    return constrain(parts, None, BATCH, *(None,) * (x.ndim - 1))


def map_images(model: nn.Module, function: Callable[[jax.Array], Any], images: jax.Array) -> Any:
    """`function(images)` in as many parts as are fastest.

    Args:
      model: what `function` computes for the most part.
      function: from images to a tree of arrays (N, ...), whose rows are each of one image.
      images: (N, H, W, 3).
    """
    count = best_count(model, images.shape)
    if count == 1:
        return function(images)
    parts = jax.lax.map(function, cut(images, count))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
