"""Contestants in PyTorch, each in a process of its own (`mixer.tools.benchmark.torch_child`)."""

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixer.errors import UserError
from mixer.tools.benchmark.contest import Case, Failed

CONTESTANTS = ("timm", "timm_compiled", "timm_autotuned")
_MODULE = "mixer.tools.benchmark.torch_child"
_VERSIONS = """
import importlib.metadata as metadata, json, platform
print(json.dumps({name: metadata.version(name) for name in ("torch", "timm")}
    | {"torch's python": platform.python_version()}))
"""


def versions(python: str) -> dict[str, str]:
    """Versions of torch and timm that a Python has.

    Raises:
      UserError: there is no such Python, or torch or timm is missing there.
    """
    try:
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--torch_python={python}: {error.strerror}") from None
    if done.returncode:
        raise UserError(
            f"{python} is no Python with torch and timm, which --against=timm and its like need; "
            "in the project's directory: pip install -e '.[bench]', or name a Python that has them "
            "with --torch_python"
        )
    return json.loads(done.stdout)


class Child:
    """A process that waits for requests and computes one at a time."""

    def __init__(self, command: Sequence[str]):
        """Starts the process with an empty cache of compiled programs."""
        self._directory = tempfile.mkdtemp(prefix="mixer_benchmark_")
        self._errors = open(Path(self._directory) / "stderr", "w+")  # noqa: SIM115
        root = str(Path(__file__).parents[3])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "TORCHINDUCTOR_CACHE_DIR": self._directory,
            },
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request.

        Raises:
          Failed: the process says why it cannot answer, or has ended.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines() or ["without a word"]
            raise Failed(f"its process ended with code {code}: {last[-1][:300]}")
        answer = json.loads(answer)
        if "failure" in answer:
            raise Failed(answer["failure"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class Program:
    """A contestant of `mixer.tools.benchmark.contest` in a child, on one device."""

    devices = 1
    memory: int | None = None

    def __init__(self, child: Child, key: str, request: dict[str, Any], *, ends: bool):
        """Prepares the program; `ends` says whether its `close` ends the child."""
        self._child, self._key, self._ends = child, key, ends
        self.compile_seconds = child.ask({"prepare": key, **request})["compile_seconds"]

    def run(self, seconds: float) -> tuple[int, float]:
        """As `Contestant.run`."""
        answer = self._child.ask({"run": self._key, "seconds": seconds})
        self.memory = answer["memory"]
        return answer["steps"], answer["seconds"]

    def close(self) -> None:
        """Ends the child, unless others use it too."""
        if self._ends:
            self._child.close()


def start(python: str) -> Child:
    """Starts a child that has torch."""
    return Child([python, "-m", _MODULE])


def prepare(name: str, case: Case, python: str, device: str) -> Program:
    """A model of timm in a new child.

    Args:
      name: one of CONTESTANTS.
      case: what to compute.
      python: a Python that has torch and timm.
      device: "cpu" or "cuda".

    Raises:
      Failed: the program cannot take part.
    """
    child = start(python)
    try:
        request = {"program": name, "device": device, **dataclasses.asdict(case)}
        return Program(child, name, request, ends=True)
    except BaseException:
        child.close()
        raise


def prepare_matmul(child: Child, shape: tuple[int, int, int], dtype: str, device: str) -> Program:
    """A matmul (m, k) x (k, n) in a child, which may hold several programs.

    Raises:
      Failed: the program cannot take part.
    """
    request = {"program": "matmul", "device": device, "shape": shape, "dtype": dtype}
    return Program(child, str(shape), request, ends=False)
