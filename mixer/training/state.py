"""The state that a run carries from update to update, created directly on the mesh."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mixer.models import placement
from mixer.parallel import sharding


@flax.struct.dataclass
class TrainState:
    """The whole state of training.

    Attributes:
      step: int32 scalar, the number of finished updates; data order, augmentation and masks of the
        next update are functions of (seed, step).
      params: parameters by their published names.
      opt_state: state of the optimizer.
      ema_params: moving average of the parameters; None if the run keeps none.
      skipped: int32 scalar, the number of updates skipped because they were not finite; None if the
        run does not skip updates.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema_params: Any = None
    skipped: jax.Array | None = None


def abstract_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_size: tuple[int, int],
    mesh: Mesh,
    *,
    ema: bool = False,
    skips: bool = False,
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state without allocating it."""
    shapes = jax.eval_shape(_make_init(model, tx, image_size, ema, skips), jax.random.key(0))
    return sharding.abstract(shapes, placement.state_shardings(mesh, shapes))


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_size: tuple[int, int],
    seed: int,
    abstract: TrainState,
) -> TrainState:
    """Makes the state of step 0, with each leaf created directly in its sharding.

    `abstract` is the `abstract_state` of the same model and optimizer.
    """
    ema, skips = abstract.ema_params is not None, abstract.skipped is not None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(_make_init(model, tx, image_size, ema, skips), out_shardings=shardings)
    return init(jax.random.key(seed))


def _make_init(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_size: tuple[int, int],
    ema: bool,
    skips: bool,
):
    def init(key: jax.Array) -> TrainState:
        params = model.init(key, jnp.zeros((1, *image_size, model.in_channels)))["params"]
        average = jax.tree.map(jnp.copy, params) if ema else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), average, zero if skips else None)

    return init


def abstract_params(model: nn.Module, image_size: tuple[int, int], mesh: Mesh) -> Any:
    """Returns the shapes, dtypes and shardings of only the parameters."""
    return abstract_state(model, optax.identity(), image_size, mesh).params


@jax.jit
def fingerprint(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a checksum of an array's bits, and whether all values are finite.

    Each element's bits are mixed with its position and summed modulo 2^32. Integer sums do not
    depend on the mesh or on the order of summation. JAX compiles one program per shape, and a Mixer
    has few shapes.

    Returns:
      (uint32 (2,), bool scalar).
    """
    finite = jnp.bool_(True)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        finite = jnp.all(jnp.isfinite(leaf))
        # 64-bit floats become pairs of uint32.
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        leaf = jax.lax.bitcast_convert_type(leaf, unsigned)
    bits = leaf.astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + iota
    sums = []
    for salt in (0x9E3779B9, 0x85EBCA6B):
        mixed = (bits ^ (position * jnp.uint32(salt) + jnp.uint32(salt))) * jnp.uint32(0xC2B2AE35)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x27D4EB2F)
        sums.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
    return jnp.stack(sums), finite
