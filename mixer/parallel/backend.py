"""Starts JAX's devices and its compilation cache, and checks JAX's settings."""

import os
import zlib

from etils import epath

from mixer.errors import UserError, first_line

# JAX settings that this code requires. Another value changes random numbers or dtypes, or makes a
# run fail.
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
    """Removes environment variables that change `SETTINGS`; call it before JAX is imported."""
    for name in SETTINGS:
        os.environ.pop(name.upper(), None)


def check_settings() -> None:
    """Raises UserError if one of `SETTINGS` has been changed, for example in a notebook."""
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
      UserError: the backend cannot start, or finds no device of the platform in JAX_PLATFORMS.
    """
    import jax

    try:
        jax.devices()
    except Exception as error:  # the exception's type depends on the platform
        if platforms := jax.config.jax_platforms:
            raise UserError(
                f"JAX finds no {platforms} device (JAX_PLATFORMS={platforms}); expected an "
                "installed platform, or JAX_PLATFORMS unset"
            ) from error
        raise UserError(f"JAX finds no device: {first_line(error)}") from error


def keep_compiled_programs(directory: str, workdir: epath.Path) -> None:
    """Enables JAX's compilation cache, unless JAX_COMPILATION_CACHE_DIR is set.

    Args:
      directory: the config's compile_cache_dir; "auto": `workdir`/compiled on an accelerator, and
        on a CPU one folder for all runs on this CPU model; "": no cache.
      workdir: the run directory.
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
    compilation_cache.reset_cache()  # an earlier run in this process may have used another cache
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory) or None)


def _cache_of_cpu() -> str:
    """Returns the folder of programs compiled for this CPU model; "" if it cannot be written.

    Programs that XLA compiles for one CPU only run on CPUs with the same features.
    """
    try:
        with open("/proc/cpuinfo") as file:
            kind = next(line for line in file if line.startswith(("flags", "Features")))
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = os.path.join(root, "mlp_mixer", f"compiled-{zlib.crc32(kind.encode()):08x}")
        os.makedirs(path, exist_ok=True)
        os.utime(path)  # raises OSError if the folder is not writable
    except (OSError, StopIteration):  # not Linux, or no writable home directory
        return ""
    return path
