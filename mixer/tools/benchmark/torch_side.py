"""PyTorch implementations, each in its own process (`mixer.tools.benchmark.torch_child`)."""

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixer import sizes
from mixer.errors import UserError
from mixer.models.registry import architecture_of
from mixer.tools.benchmark.cases import Case
from mixer.tools.benchmark.turns import ProgramError

IMPLEMENTATIONS = ("timm", "timm_compiled", "timm_autotuned")
_MODULE = "mixer.tools.benchmark.torch_child"
_VERSIONS = """
import importlib.metadata as metadata, json, platform
print(json.dumps({name: metadata.version(name) for name in ("torch", "timm")}
    | {"torch's python": platform.python_version()}))
"""


def versions(python: str) -> dict[str, str]:
    """Returns the versions of torch and timm installed for a Python interpreter.

    Raises:
      UserError: the interpreter does not exist, or lacks torch or timm.
    """
    try:
        result = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--torch_python={python}: {error.strerror}") from None
    if result.returncode:
        raise UserError(
            f"{python} lacks torch or timm, which --against=timm* requires; run pip install -e "
            "'.[bench]' in the project's directory, or pass --torch_python"
        )
    return json.loads(result.stdout)


class Child:
    """A worker process that serves requests, one at a time."""

    def __init__(self, command: Sequence[str]):
        """Starts the worker with an empty compilation cache."""
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
        """Sends a request and returns the response.

        Raises:
          ProgramError: the worker reported an error or exited.
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
            lines = self._errors.read().strip().splitlines() or ["no output on stderr"]
            raise ProgramError(f"worker exited with code {code}: {lines[-1][:300]}")
        answer = json.loads(answer)
        if "failure" in answer:
            raise ProgramError(answer["failure"])
        return answer

    def close(self) -> None:
        """Terminates the worker."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class TorchProgram:
    """A program (see turns.py) that a worker process runs on one device."""

    devices = 1
    memory: int | None = None

    def __init__(self, child: Child, key: str, request: dict[str, Any], *, owns_child: bool):
        """Prepares the program; if `owns_child`, `close` also terminates the worker."""
        self._child, self._key, self._owns_child = child, key, owns_child
        self.compile_seconds = child.ask({"prepare": key, **request})["compile_seconds"]

    def run(self, seconds: float) -> tuple[int, float]:
        """Runs the program in the worker, as `Program.run` specifies."""
        answer = self._child.ask({"run": self._key, "seconds": seconds})
        self.memory = answer["memory"]
        return answer["steps"], answer["seconds"]

    def close(self) -> None:
        """Terminates the worker if this program owns it."""
        if self._owns_child:
            self._child.close()


def timm_model(case: Case) -> dict[str, Any]:
    """Returns timm's class for the model of a case, and the arguments of the class."""
    model = case.make_model()
    architecture = architecture_of(model)
    arguments = architecture.timm_arguments(model, sizes.pair(case.image_size))
    return {"timm_class": architecture.timm_class, "timm_arguments": arguments}


def start(python: str) -> Child:
    """Starts a worker that can import torch."""
    return Child([python, "-m", _MODULE])


def prepare(name: str, case: Case, python: str, device: str) -> TorchProgram:
    """Prepares a timm model in a new worker.

    Args:
      name: one of IMPLEMENTATIONS.
      case: the computation.
      python: Python interpreter with torch and timm.
      device: "cpu" or "cuda".

    Raises:
      ProgramError: the program cannot run.
    """
    child = start(python)
    try:
        request = {"program": name, "device": device, **timm_model(case)}
        request |= dataclasses.asdict(case)
        return TorchProgram(child, name, request, owns_child=True)
    except BaseException:
        child.close()
        raise


def prepare_matmul(
    child: Child, shape: tuple[int, int, int], dtype: str, device: str
) -> TorchProgram:
    """Prepares a matmul (m, k) x (k, n) in an existing worker, which can hold several programs.

    Raises:
      ProgramError: the program cannot run.
    """
    request = {"program": "matmul", "device": device, "shape": shape, "dtype": dtype}
    return TorchProgram(child, str(shape), request, owns_child=False)
