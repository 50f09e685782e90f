"""Tables of a benchmark, the lines above them, and the file of --output."""

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
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixer import files, memory
from mixer.tools.benchmark.contest import Case

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def make_console() -> Console:
    """A console that is wide enough for the tables; without a terminal they are Markdown."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=200)


def make_table(console: Console, *columns: str) -> Table:
    """An empty table; all columns but the first hold numbers."""
    table = Table(box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


class Record:
    """A measurement on the console and in the file of --output."""

    def __init__(self, what: str, output: str | None, versions: Mapping[str, str] | None = None):
        """Prints the lines that stand above the tables.

        Args:
          what: key of the figures in the file.
          output: the file; None: none is written.
          versions: of packages that another Python has.
        """
        self.console = make_console()
        self._what, self._output = what, output
        command = shlex.join(["python", "-m", "mixer.tools.benchmark", *sys.argv[1:]])
        self._environment = environment(command, versions or {})
        for line in header(self._environment):
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line as it is."""
        self.console.print(line, markup=False)

    def write(self, figures: Any) -> None:
        """Writes the figures so far, and the environment, to the file."""
        if self._output:
            content = {**self._environment, self._what: figures}
            with files.whole(self._output) as new:
                new.write_text(json.dumps(content, indent=2) + "\n")


def environment(command: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Machine, versions and settings, as JSON has them.

    Args:
      command: the command line.
      versions: of packages that another Python has.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "XLA_FLAGS", "JAX_PLATFORMS")
    }
    return {
        "command": command,
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
        "memory_setting": "kept, in every contestant" if memory.keeps() else "as glibc has it",
        "environment": variables,
    }


def cores_of_others(seconds: float = 1.5) -> float:
    """How many cores other processes use: a mean over `seconds`, during which this one waits.

    The system's load average would include a benchmark that has just ended.
    """

    def busy() -> tuple[float, float]:
        """CPU seconds of all processes so far, and of this one."""
        all_of_it = psutil.cpu_times()
        idle = all_of_it.idle + getattr(all_of_it, "iowait", 0.0)
        # Linux counts what guests take as the users' too.
        idle += getattr(all_of_it, "guest", 0.0) + getattr(all_of_it, "guest_nice", 0.0)
        own = psutil.Process().cpu_times()
        return sum(all_of_it) - idle, own.user + own.system

    before, start = busy(), time.monotonic()
    time.sleep(seconds)
    everyone, own = (now - then for now, then in zip(busy(), before, strict=True))
    return max(everyone - own, 0.0) / (time.monotonic() - start)


def _processor() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def header(environment: Mapping[str, Any]) -> list[str]:
    """The lines above the tables."""
    where = f"{environment['processor']}, {environment['cores']} cores"
    if environment["backend"] != "cpu" or environment["devices"] > 1:
        where = f"{environment['devices']} x {environment['device']}; host: {where}"
    settings = ", ".join(f"{name}={value}" for name, value in environment["environment"].items())
    busy = environment["others"] > environment["cores"] / 8
    return [
        environment["command"],
        where,
        *([f"BUSY: other processes use {environment['others']:.1f} cores"] * busy),
        ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        f"freed memory: {environment['memory_setting']}"
        + f"; environment: {settings}" * bool(settings),
    ]


def case_title(case: Case, devices: int) -> str:
    """A line that says what the contestants of a case compute."""
    what = "training" if case.what == "train" else "inference"
    return (
        f"{what}, {case.model}, {case.image_size} px, {case.dtype}, batch {case.batch_size} a "
        f"device{f', {devices} devices' * (devices > 1)}, GELU {case.gelu}"
    )


def contest_table(console: Console, case: Mapping[str, Any]) -> Table:
    """The table of a case's contestants, of its figures as JSON has them."""
    unit, prefix = flops_unit(case["matmul"]["limit"] or 1e9)
    several = any(figures.get("devices", 1) > 1 for figures in case["contestants"].values())
    table = make_table(
        console,
        "",
        "images/s" + " a device" * several,
        "lowest to highest",
        "ms a step",
        f"{prefix}FLOP/s",
        "of matmul",
        "GiB",
        "compile s",
        "ours is x times (lowest to highest)",
    )
    for name, figures in case["contestants"].items():
        if "failure" in figures:
            table.add_row(name, escape(figures["failure"]))
            continue
        rate, memory = figures["images_per_second_per_device"], figures["memory_bytes_per_device"]
        share, ratio = figures["share_of_matmul"], case["ours_is_times"].get(name)
        table.add_row(
            name,
            number(rate["median"]),
            f"{number(rate['lowest'])} to {number(rate['highest'])}",
            number(1e3 * figures["seconds_per_step"]["median"]),
            number(figures["flops_per_second_per_device"]["median"] / unit),
            f"{share:.1%}" if share else "",
            number(memory / 2**30) if memory else "",
            f"{figures['compile_seconds']:.0f}" if figures["compile_seconds"] else "",
            f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
            if ratio
            else "",
        )
    return table


def matmul_line(case: Mapping[str, Any]) -> str:
    """A line with the rates of the large matmul in a case's rounds, and the FLOPs of an image."""
    matmul = case["matmul"]
    unit, prefix = flops_unit(matmul["limit"] or 1e9)
    rates = ", ".join(
        f"{name} {number(rate['median'] / unit)} "
        f"({number(rate['lowest'] / unit)} to {number(rate['highest'] / unit)})"
        for name, rate in matmul["flops_per_second_per_device"].items()
        if rate
    )
    side = matmul["side"]
    return (
        f"{prefix}FLOP/s of a matmul of {side} x {side} in the same rounds: {rates}; "
        f"{number(case['flops_per_image'] / 1e9)} GFLOP an image"
    )


def flops_unit(rate: float) -> tuple[float, str]:
    """A readable unit for rates like this one, and its prefix."""
    return (1e9, "G") if rate < 1e13 else (1e12, "T")


def number(value: float) -> str:
    """A number with three figures, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
