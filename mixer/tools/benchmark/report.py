"""Prints the tables of a benchmark and their header, and writes the file of --output."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import psutil

from mixer import files, memory
from mixer.console import Console
from mixer.evaluation.tables import Table, print_table
from mixer.tools.benchmark.cases import Case

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Record:
    """Writes a measurement to the console and to the file of --output."""

    def __init__(self, key: str, output: str | None, versions: Mapping[str, str] | None = None):
        """Prints the header above the tables.

        Args:
          key: key of the results in the file.
          output: the file; None: do not write a file.
          versions: versions of packages of another Python interpreter.
        """
        self.console = Console()
        self._key, self._output = key, output
        self._environment = environment(versions or {})
        for line in header(self._environment):
            self.console.say(line)

    def show(self, case: Mapping[str, Any]) -> None:
        """Prints the implementations of a case, and the rate of the matmul."""
        print_table(self.console, case_table(case))
        self.console.say(matmul_line(case))

    def write(self, figures: Any) -> None:
        """Writes the environment and the results up to now to the file."""
        if self._output:
            content = {**self._environment, self._key: figures}
            with files.atomic_write(self._output) as new_file:
                new_file.write_text(json.dumps(content, indent=2) + "\n")


def environment(versions: Mapping[str, str]) -> dict[str, Any]:
    """Returns the command line, machine, versions and settings as JSON.

    Args:
      versions: versions of packages of another Python interpreter.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "XLA_FLAGS", "JAX_PLATFORMS")
    }
    return {
        "command": shlex.join(["python", "-m", "mixer.tools.benchmark", *sys.argv[1:]]),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "others": round(cores_of_others(), 2),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            **versions,
        },
        "memory_setting": (
            "kept, in every program" if memory.keeps_freed_memory() else "glibc's default"
        ),
        "environment": variables,
    }


def cores_of_others(seconds: float = 1.5) -> float:
    """Returns the mean number of cores that other processes use, while this one sleeps `seconds`.

    The system's load average would include a benchmark that has just ended.
    """

    def cpu_seconds() -> tuple[float, float]:
        """Returns the CPU seconds of all processes and of this process."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Linux counts guest time twice, as guest and as user time.
        idle += getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        process_times = psutil.Process().cpu_times()
        return sum(times) - idle, process_times.user + process_times.system

    start_seconds, start = cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    all_used, own_used = (
        end - begin for end, begin in zip(cpu_seconds(), start_seconds, strict=True)
    )
    return max(all_used - own_used, 0.0) / (time.monotonic() - start)


def _processor() -> str:
    """Returns the name of the processor, or the architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header(environment: Mapping[str, Any]) -> list[str]:
    """Returns the lines above the tables."""
    machine = f"{environment['processor']}, {environment['cores']} cores"
    if environment["backend"] != "cpu" or environment["devices"] > 1:
        machine = f"{environment['devices']} x {environment['device']}; host: {machine}"
    settings = ", ".join(f"{name}={value}" for name, value in environment["environment"].items())
    is_busy = environment["others"] > environment["cores"] / 8
    return [
        environment["command"],
        machine,
        *([f"BUSY: other processes use {environment['others']:.1f} cores"] * is_busy),
        ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        f"freed memory: {environment['memory_setting']}"
        + f"; environment: {settings}" * bool(settings),
    ]


def case_title(case: Case, devices: int) -> str:
    """Returns a line that describes the computation of a case."""
    task = "training" if case.measurement == "train" else "inference"
    return (
        f"{task}, {case.model}, {case.image_size} px, {case.dtype}, batch {case.batch_size} per "
        f"device{f', {devices} devices' * (devices > 1)}, GELU {case.gelu}"
    )


def case_table(case: Mapping[str, Any]) -> Table:
    """Makes the table of a case's implementations from the case's results as JSON."""
    unit, prefix = flops_unit(case["matmul"]["limit"])
    several = any(figures.get("devices", 1) > 1 for figures in case["contestants"].values())
    header = (
        "",
        "images/s" + " per device" * several,
        "lowest to highest",
        "ms per step",
        f"{prefix}FLOP/s",
        "share of matmul rate",
        "GiB",
        "compile s",
        "speedup of ours (lowest to highest)",
    )
    rows = []
    for name, figures in case["contestants"].items():
        if "failure" in figures:
            rows.append((name, figures["failure"]))
            continue
        rate, memory = figures["images_per_second_per_device"], figures["memory_bytes_per_device"]
        share, ratio = figures["share_of_matmul"], case["ours_is_times"].get(name)
        cells = (
            name,
            number(rate["median"]),
            span(rate),
            number(1e3 * figures["seconds_per_step"]["median"]),
            number(figures["flops_per_second_per_device"]["median"] / unit),
            f"{share:.1%}" if share else "",
            number(memory / 2**30) if memory else "",
            f"{figures['compile_seconds']:.0f}" if figures["compile_seconds"] else "",
            f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
            if ratio
            else "",
        )
        rows.append(cells)
    return Table(header, rows)


def matmul_line(case: Mapping[str, Any]) -> str:
    """Returns a line with the rates of the large matmul and the FLOPs per image of a case."""
    matmul = case["matmul"]
    unit, prefix = flops_unit(matmul["limit"])
    rates = ", ".join(
        f"{name} {number(rate['median'] / unit)} ({span(rate, unit)})"
        for name, rate in matmul["flops_per_second_per_device"].items()
        if rate
    )
    side = matmul["side"]
    return (
        f"{prefix}FLOP/s of a matmul of {side} x {side} in the same rounds: {rates}; "
        f"{number(case['flops_per_image'] / 1e9)} GFLOP per image"
    )


def flops_unit(rate: float | None) -> tuple[float, str]:
    """Returns a readable unit for a rate in FLOP/s, and the prefix of the unit."""
    return (1e12, "T") if rate and rate >= 1e13 else (1e9, "G")


def span(rate: Mapping[str, float], unit: float = 1) -> str:
    """Formats the range of a `turns.spread` in multiples of `unit`."""
    return f"{number(rate['lowest'] / unit)} to {number(rate['highest'] / unit)}"


def number(value: float) -> str:
    """Formats a number with three significant digits, or as an integer from 100."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
