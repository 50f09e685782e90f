"""JAX's devices, started before anything else is looked at, and the settings that numbers need."""

import os
import zlib

from etils import epath

from mixer.errors import UserError, first_line

# Settings of JAX, by the values that this code is written for. Another value gives other random
# numbers or other dtypes, or stops the code in the middle of a run.
SETTINGS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_jit": False,
}


def forget_settings() -> None:
    """Removes environment variables that change `SETTINGS`; to be called before JAX is imported."""
    for name in SETTINGS:
        os.environ.pop(name.upper(), None)


def check_settings() -> None:
    """Raises UserError where a notebook has changed one of `SETTINGS`."""
    import jax

    for name, value in SETTINGS.items():
        if getattr(jax.config, name) != value:
            raise UserError(
                f"{name}={getattr(jax.config, name)!r}: training needs {value!r}; "
                f"jax.config.update({name!r}, {value!r}) sets it"
            )


def start() -> None:
    """Starts JAX's backend.

    Raises:
      UserError: it finds no device of the kind that JAX_PLATFORMS asks for, or cannot start.
    """
    import jax

    try:
        jax.devices()
    except Exception as error:  # AssertionError, RuntimeError and more, by the kind of device
        if platforms := jax.config.jax_platforms:
            raise UserError(
                f"JAX finds no {platforms} device (JAX_PLATFORMS={platforms}); expected a platform "
                "that is installed here, or no JAX_PLATFORMS"
            ) from error
        raise UserError(f"JAX finds no device: {first_line(error)}") from error


def keep_compiled_programs(directory: str, workdir: epath.Path) -> None:
    """Turns on JAX's compilation cache, unless JAX's own variable has done so.

    Args:
      directory: the config's compile_cache_dir; "auto" is one folder for all runs on this kind of
        CPU, or `workdir`/compiled on an accelerator; "" is no cache.
      workdir: the run.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    if directory == "auto":
        on_cpu = jax.default_backend() == "cpu"
        directory = _cache_of_cpu() if on_cpu else os.fspath(workdir / "compiled")
        if on_cpu and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.reset_cache()  # an earlier run of this program may have used another
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory) or None)


def _cache_of_cpu() -> str:
    """The folder of programs compiled for this kind of CPU; "" if there can be none.

    What XLA compiles for a CPU runs on CPUs with the same features only.
    """
    try:
        with open("/proc/cpuinfo") as file:
            kind = next(line for line in file if line.startswith(("flags", "Features")))
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = os.path.join(root, "mlp_mixer", f"compiled-{zlib.crc32(kind.encode()):08x}")
        os.makedirs(path, exist_ok=True)
        os.utime(path)  # fails if nobody may write
    except (OSError, StopIteration):  # not Linux, or a home that nobody may write to
        return ""
    return path
