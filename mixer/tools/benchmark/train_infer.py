"""Measures training and inference of this project's models and the implementations of --against."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mixer import sizes
from mixer.errors import UserError
from mixer.evaluation import throughput
from mixer.models import flops
from mixer.parallel import sharding
from mixer.tools.benchmark import jax_side, limit, report, torch_side, turns
from mixer.tools.benchmark.cases import Case


def measure(
    cases: Sequence[Case],
    *,
    against: Sequence[str],
    torch_python: str,
    seconds: float,
    rounds: int,
    output: str | None,
) -> None:
    """Measures every case, and writes the results after each case.

    Args:
      cases: the cases, all of training or all of inference.
      against: "plain" and names of `torch_side.IMPLEMENTATIONS`.
      torch_python: Python interpreter with torch and timm.
      seconds: duration of a turn.
      rounds: turns of each implementation.
      output: JSON file; None: do not write a file.

    Raises:
      UserError: torch is requested but not installed, or does not support the device.
    """
    with_torch = any(name in torch_side.IMPLEMENTATIONS for name in against)
    if with_torch and jax.default_backend() not in ("cpu", "gpu"):
        raise UserError(
            f"--against={','.join(against)}: the torch implementations do not run on "
            f"{jax.default_backend()}; expected a CPU or an NVIDIA GPU (plain runs on all devices)"
        )
    versions = torch_side.versions(torch_python) if with_torch else {}
    record = report.Record("contests", output, versions)
    contests: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        child = None  # the worker that computes matmuls in torch
        if with_torch:
            child = stack.enter_context(contextlib.closing(torch_side.start(torch_python)))
        for case in cases:
            record.console.say("")
            record.console.say(report.case_title(case, jax.device_count()))
            makers = _makers(case, against, torch_python)
            with record.console.status("") as status:
                results = turns.take_turns(
                    makers | limit.makers(case.dtype, child),
                    seconds=seconds,
                    rounds=rounds,
                    say=status.update,
                )
            figures = _figures(case, results)
            record.show(figures)
            if rate := figures["paper_images_per_second_per_tpuv3_core"]:
                record.console.say(f"the paper reports {rate:,} images/s per TPUv3 core")
            contests.append(figures)
            record.write(contests)


def _makers(
    case: Case, against: Sequence[str], torch_python: str
) -> dict[str, Callable[[], turns.Program]]:
    mesh = sharding.make_mesh({"data": -1})
    in_jax = jax_side.prepare_train if case.measurement == "train" else jax_side.prepare_infer
    makers = {}
    for name in ("ours", *against):
        if name in torch_side.IMPLEMENTATIONS:
            makers[name] = functools.partial(
                torch_side.prepare, name, case, torch_python, limit.torch_device()
            )
        else:
            makers[name] = functools.partial(in_jax, name, case, mesh)
    return makers


def _figures(case: Case, results: dict[str, turns.Result]) -> dict[str, Any]:
    """Returns the results of a case as JSON."""
    matmul = limit.take_figures(results)
    is_training, image_size = case.measurement == "train", sizes.pair(case.image_size)
    count = flops.train_flops if is_training else flops.forward_flops
    per_image = count(case.make_model(), image_size)
    paper_rate = None if is_training else throughput.published_rate(case.model, image_size)
    fields = dataclasses.asdict(case)
    return {
        "what": fields.pop("measurement"),
        **fields,
        "title": report.case_title(case, jax.device_count()),
        "flops_per_image": per_image,
        "paper_images_per_second_per_tpuv3_core": paper_rate,
        "matmul": matmul,
        "contestants": {
            name: turns.as_json(result, case.batch_size, per_image, matmul["limit"])
            for name, result in results.items()
        },
        "ours_is_times": {
            name: turns.ratio(results["ours"], result)
            for name, result in results.items()
            if name != "ours"
        },
        "device_peak_bytes": _device_peak(),
    }


def _device_peak() -> int | None:
    """Returns the peak memory of the first device over all implementations in this process.

    The result is None if the device does not report it.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
