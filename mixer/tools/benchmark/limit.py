"""The limit of training and inference: the rate of a large square matmul, in turns with them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mixer.tools.benchmark import contest, jax_side, torch_side

SIDES = {"cpu": 2048}  # by backend; 8192 elsewhere


def torch_device() -> str:
    """The device of torch's contestants."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


@contextlib.contextmanager
def torch_child(python: str | None) -> Iterator[torch_side.Child | None]:
    """A process that computes matmuls in torch; None without a Python that has torch."""
    child = torch_side.start(python) if python else None
    try:
        yield child
    finally:
        if child:
            child.close()


def _side() -> int:
    return SIDES.get(jax.default_backend(), 8192)


def prepare(
    dtype: str, child: torch_side.Child | None = None
) -> dict[str, Callable[[], contest.Contestant]]:
    """The contestants "jax" and, with a child, "torch"."""
    shape = (_side(),) * 3
    makers = {"jax": functools.partial(jax_side.prepare_matmul, shape, dtype)}
    if child:
        makers["torch"] = functools.partial(
            torch_side.prepare_matmul, child, shape, dtype, torch_device()
        )
    return makers


def take_figures(results: dict[str, contest.Result]) -> dict[str, Any]:
    """Removes the contestants of `prepare` from the results.

    Returns:
      As JSON has it: side, rates in FLOP/s a device by contestant, and their highest median,
      "limit"; None where none took part.
    """
    work = 2.0 * _side() ** 3
    rates = {
        name: contest.rates(results.pop(name), work) for name in ("jax", "torch") if name in results
    }
    limit = max((rate["median"] for rate in rates.values() if rate), default=None)
    return {"side": _side(), "flops_per_second_per_device": rates, "limit": limit}
