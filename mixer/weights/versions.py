"""The versions of Python, the libraries and this code, which checkpoints record."""

import contextlib
import functools
import importlib.metadata
import subprocess
import sys
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python, the libraries and this code, as of the first call."""
    numbers = {"python": sys.version.split()[0], "commit": commit()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[package] = importlib.metadata.version(package)
    return numbers


def commit() -> str:
    """Returns this code's commit, with "+changes" if the working tree is modified, or "unknown"."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    if head.returncode or changes.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
