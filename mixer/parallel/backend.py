"""JAX's devices, started before anything else is looked at, and the settings that numbers need."""

import os

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
