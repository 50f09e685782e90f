"""Measures a large square matmul, whose rate is the upper limit of training and inference."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from mixer.tools.benchmark import jax_side, torch_side, turns

SIDES = {"cpu": 2048}  # side of the matmul by backend; 8192 on all others


def torch_device() -> str:
    """Returns the device of the PyTorch implementations."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _side() -> int:
    return SIDES.get(jax.default_backend(), 8192)


def makers(
    dtype: str, child: torch_side.Child | None = None
) -> dict[str, Callable[[], turns.Program]]:
    """Returns functions that prepare the programs "jax" and, with a worker, "torch"."""
    shape = (_side(),) * 3
    functions = {"jax": functools.partial(jax_side.prepare_matmul, shape, dtype)}
    if child:
        functions["torch"] = functools.partial(
            torch_side.prepare_matmul, child, shape, dtype, torch_device()
        )
    return functions


def take_figures(results: dict[str, turns.Result]) -> dict[str, Any]:
    """Removes the programs of `makers` from the results, and returns their rates.

    Returns:
      As JSON: the side, the rates in FLOP/s per device by program, and their highest median
      "limit", which is None if all programs failed.
    """
    work = 2.0 * _side() ** 3
    rates = {
        name: turns.rates(results.pop(name), work) for name in ("jax", "torch") if name in results
    }
    limit = max((rate["median"] for rate in rates.values() if rate), default=None)
    return {"side": _side(), "flops_per_second_per_device": rates, "limit": limit}
