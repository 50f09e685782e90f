"""JAX implementations, which run in this process."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

from mixer import memory, sizes
from mixer.errors import first_line
from mixer.evaluation import throughput
from mixer.models import layers
from mixer.models.registry import param_shapes
from mixer.parallel import sharding
from mixer.tools.benchmark import plain
from mixer.tools.benchmark.cases import Case
from mixer.tools.benchmark.turns import ProgramError
from mixer.training.losses import make_loss
from mixer.training.optimizer import make_optimizer, make_schedule
from mixer.training.state import TrainState
from mixer.training.step import TrainStep, make_predict

WARM_UP_STEPS = 3


@contextlib.contextmanager
def convert_device_errors() -> Iterator[None]:
    """Converts errors on the device to `ProgramError`; decorates functions that compute."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        is_full = "RESOURCE_EXHAUSTED" in str(error)
        raise ProgramError("does not fit into memory" if is_full else first_line(error)) from None
    except memory.NoRoomError as error:
        raise ProgramError(f"does not fit: {error}") from None


class JaxProgram:
    """A program (see turns.py) that calls a function repeatedly."""

    def __init__(
        self, call: Callable[[], Any], *, devices: int, compile_seconds: float, memory: int | None
    ):
        """Warms the program up.

        Args:
          call: function that starts a step and returns its arrays.
          devices: number of devices in use.
          compile_seconds: compile time.
          memory: bytes of device memory, reported by the compiler.
        """
        self.call = call
        self.devices, self.compile_seconds, self.memory = devices, compile_seconds, memory
        self._steps(WARM_UP_STEPS)

    def _steps(self, count: int) -> None:
        jax.block_until_ready([self.call() for _ in range(count)])

    @convert_device_errors()
    def run(self, seconds: float) -> tuple[int, float]:
        """Runs as `Program.run` specifies; the first step, with cold caches, is not timed."""
        self._steps(1)
        return throughput.run_for(self.call, seconds)

    def close(self) -> None:
        """Releases the arrays."""
        del self.call


def compile_for(jitted: Any, *args: Any) -> tuple[Any, float, int | None]:
    """Compiles a function for arguments; returns the program, compile time and device memory.

    The memory, in bytes, includes arguments (parameters, optimizer state), results and temporary
    arrays, as assigned by the compiler.
    """
    start = time.perf_counter()
    program = jitted.lower(*args).compile()
    seconds = time.perf_counter() - start
    size = memory_of(program)
    if size is not None:
        arguments = program.memory_analysis().argument_size_in_bytes
        memory.check_room(size - arguments, "the temporary arrays of a step")
    return program, seconds, size


def compile_call(jitted: Any, *args: Any, devices: int) -> JaxProgram:
    """Compiles a function for arguments; returns the program that calls it with them."""
    compiled, seconds, size = compile_for(jitted, *args)
    call = functools.partial(compiled, *args)
    return JaxProgram(call, devices=devices, compile_seconds=seconds, memory=size)


def memory_of(program: Any) -> int | None:
    """Returns the device memory of a compiled program in bytes; None if unknown."""
    analysis = program.memory_analysis()
    if analysis is None:
        return None
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes


def make_plain(case: Case) -> nn.Module:
    """Makes the plain model for a case, with the same parameters."""
    fields = dict(case.dimensions)
    module = plain.MODULES[fields.pop("name", "mixer")]
    return module(**fields, num_classes=case.num_classes, dtype=case.dtype, gelu=case.gelu)


def draw_params(case: Case) -> Any:
    """Draws initial parameters in NumPy, with a head that is not zero."""
    shapes = param_shapes(case.make_model(), sizes.pair(case.image_size))
    shapes = traverse_util.unflatten_dict(shapes, sep="/")
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "kernel":
            deviation = np.sqrt(1 / np.prod(leaf.shape[:-1]))
            return rng.standard_normal(leaf.shape, np.float32) * np.float32(deviation)
        return np.full(leaf.shape, path[-1].key == "scale", np.float32)

    return jax.tree.map_with_path(draw, shapes)


def _batch(case: Case, mesh: Mesh) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    count = case.batch_size * mesh.size
    channels = case.make_model().in_channels
    shape = (count, *sizes.pair(case.image_size), channels)
    batch = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, case.num_classes, count, np.int32),
    }
    return jax.device_put(batch, sharding.batch_sharding(mesh))


def _repeat(train_step: Any, state: Any, batch: Any) -> Callable[[], Any]:
    """Returns a function that continues from the state of its previous call."""
    states = [state]

    def call() -> jax.Array:
        state, metrics = train_step(states.pop(), batch)
        states.append(state)
        return metrics["loss"]

    return call


@convert_device_errors()
def prepare_train(name: str, case: Case, mesh: Mesh) -> JaxProgram:
    """Prepares the update of "ours" or "plain" on a batch that stays on the devices.

    "ours" is the update of `train.py`, including clipping and metrics, which "plain" omits.

    Raises:
      ProgramError: the update does not fit into memory.
    """
    replicated = sharding.replicated(mesh)
    params = jax.device_put(draw_params(case), replicated)
    if name == "ours":
        schedule = make_schedule(
            peak_lr=1e-3,
            total_steps=100_000,
            decay="linear",
            warmup_steps=10_000,
            final_multiplier=1e-5,
            rsqrt_timescale=10_000,
            cooldown_steps=0,
        )
        tx = make_optimizer(
            schedule,
            name="adamw",
            peak_lr=1e-3,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            momentum_dtype="float32",
            variance_dtype="float32",
            weight_decay=0.1,
            weight_decay_form="lr",
            grad_clip_norm=1.0,
            lr_multipliers=(),
        )
        step = TrainStep(
            case.make_model(),
            tx,
            schedule,
            make_loss("softmax"),
            seed=0,
            mix=lambda key, images, labels: (images, labels),
            label_smoothing=0.0,
            lr_multipliers=(),
            sam_rho=0.0,
            ema_decay=0.0,
            accumulate_steps=1,
        )
        step = sharding.on_mesh(step, mesh)
    else:
        tx = optax.adamw(1e-3, weight_decay=0.1)
        step = plain.make_train_step(make_plain(case), tx)
    opt_state = jax.jit(tx.init, out_shardings=replicated)(params)
    state: Any = (params, opt_state)
    if name == "ours":
        state = TrainState(jax.device_put(jnp.zeros((), jnp.int32), replicated), params, opt_state)
    batch = _batch(case, mesh)
    options = layers.compiler_options(jax.default_backend()) if name == "ours" else {}
    jitted = jax.jit(step, donate_argnums=0, out_shardings=replicated, compiler_options=options)
    program, seconds, size = compile_for(jitted, state, batch)
    call = _repeat(program, state, batch)
    return JaxProgram(call, devices=mesh.size, compile_seconds=seconds, memory=size)


@convert_device_errors()
def prepare_infer(name: str, case: Case, mesh: Mesh) -> JaxProgram:
    """Prepares inference by "ours" or "plain", from pixels on the devices; float32 parameters.

    Raises:
      ProgramError: the program does not fit into memory.
    """
    params = jax.device_put(draw_params(case), sharding.replicated(mesh))
    images = _batch(case, mesh)["image"]
    if name == "ours":
        predict = make_predict(case.make_model(), mesh)
    else:
        model = make_plain(case)

        def predict(params: Any, images: jax.Array) -> jax.Array:
            return model.apply({"params": params}, images)

    options = layers.compiler_options(jax.default_backend()) if name == "ours" else {}
    batch_sharding = sharding.batch_sharding(mesh)
    jitted = jax.jit(predict, out_shardings=batch_sharding, compiler_options=options)
    return compile_call(jitted, params, images, devices=mesh.size)


@convert_device_errors()
def prepare_matmul(shape: tuple[int, int, int], dtype: str) -> JaxProgram:
    """Prepares a matmul (m, k) x (k, n) on all devices at once, at JAX's default precision.

    Raises:
      ProgramError: the matmul does not fit into memory.
    """
    m, k, n = shape
    rng = np.random.default_rng(0)
    # Use random numbers, because a GPU needs less power for zeros and runs faster.
    left, right = (rng.standard_normal(size, np.float32) for size in ((m, k), (k, n)))
    pairs = [
        [jax.device_put(x.astype(jnp.dtype(dtype)), device) for x in (left, right)]
        for device in jax.local_devices()
    ]
    matmul = jax.jit(jnp.matmul)

    def call() -> list[jax.Array]:
        return [matmul(*pair) for pair in pairs]

    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds = time.perf_counter() - start
    return JaxProgram(call, devices=len(pairs), compile_seconds=seconds, memory=None)
