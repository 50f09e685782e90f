"""Runs PyTorch implementations in a worker process that `mixer.tools.benchmark.torch_side` starts.

The worker reads requests and writes answers, one line of JSON each. It does not import JAX, which
need not be installed next to torch.

  {"prepare": KEY, "program": "timm" | "timm_compiled" | "timm_autotuned" | "matmul", ...}
  {"run": KEY, "seconds": 2.0}
"""

import collections
import importlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from mixer import memory

memory.keep_freed_memory()  # the same setting as in the JAX implementations

import torch

WARM_UP_STEPS = 3
IN_FLIGHT = 2
# Modes of `torch.compile`. CUDA graphs do not work with gradients and an optimizer outside of the
# compiled function.
MODES = {
    ("timm_compiled", "train"): "default",
    ("timm_compiled", "infer"): "default",
    ("timm_autotuned", "train"): "max-autotune-no-cudagraphs",
    ("timm_autotuned", "infer"): "max-autotune",
}


def make_timm(request: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """Makes timm's model with the class and the arguments of the request.

    Raises:
      ImportError: timm is not installed.
    """
    from timm.layers import get_act_layer

    module, _, name = request["timm_class"].rpartition(".")
    arguments = request["timm_arguments"]
    arguments = arguments | {"act_layer": get_act_layer(arguments["act_layer"])}
    model = getattr(importlib.import_module(module), name)(**arguments)
    # In channels_last the stem writes tokens in the layout that the first block reads.
    return model.to(device).to(memory_format=torch.channels_last)


def make_step(request: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """Returns a function that starts a step of the model in the request.

    With bfloat16, training uses autocast and float32 parameters; inference uses bfloat16
    parameters, which is faster than autocast.
    """
    torch.manual_seed(0)
    size = (request["batch_size"], 3, request["image_size"], request["image_size"])
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, request["num_classes"], (request["batch_size"],), device=device)
    model = make_timm(request, device)
    is_bfloat16 = request["dtype"] == "bfloat16"
    is_training = request["measurement"] == "train"
    if not is_training:
        model = model.train(False).requires_grad_(False)
        model = model.to(torch.bfloat16) if is_bfloat16 else model
    mode = MODES.get((request["program"], request["measurement"]))
    if mode == "max-autotune":
        from torch._inductor import config as inductor

        inductor.freezing = True  # convert the layout of the weights once

    def forward(images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(torch.bfloat16 if is_bfloat16 and not is_training else torch.float32)
        return model(pixels / 127.5 - 1)

    if not is_training:
        predict = torch.compile(forward, mode=mode) if mode else forward

        def infer() -> torch.Tensor:
            # Frozen graphs do not accept the tensors of inference_mode.
            with torch.no_grad():
                return predict(images)

        return infer

    def mean_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
            return torch.nn.functional.cross_entropy(forward(images), labels)

    loss_of = torch.compile(mean_loss, mode=mode) if mode else mean_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def update() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return update


def make_matmul(request: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """Returns a function that starts a matmul of the shape in the request."""
    m, k, n = request["shape"]
    dtype = getattr(torch, request["dtype"])
    left, right = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (k, n)))
    return lambda: left @ right


class Program:
    """A function that is called repeatedly, with its compile time and memory."""

    def __init__(self, request: dict[str, Any], device: torch.device):
        self._cuda = device.type == "cuda"
        self._initial_memory = self._memory()
        make = make_matmul if request["program"] == "matmul" else make_step
        self._call = make(request, device)
        start = time.perf_counter()
        self._steps(1)
        first_seconds = time.perf_counter() - start
        self._steps(WARM_UP_STEPS)
        start = time.perf_counter()
        self._steps(1)
        compiles = (request["program"], request.get("measurement")) in MODES
        self.compile_seconds = compiles * max(first_seconds - (time.perf_counter() - start), 0.0)
        memory.give_back_freed_memory()

    def _memory(self) -> int:
        """Returns the peak memory in bytes, of the GPU or of this process on the host."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        if sys.platform == "linux":  # ru_maxrss would include the peak of the parent process
            with open("/proc/self/status") as status:
                return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read())[1])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

    @property
    def memory(self) -> int:
        """The increase of the peak memory in bytes since the start."""
        return self._memory() - self._initial_memory

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self._call()
        self._wait()

    def run(self, seconds: float) -> tuple[int, float]:
        """Runs as `Program.run` of mixer.tools.benchmark.turns specifies."""
        self._steps(1)
        in_flight: collections.deque[torch.cuda.Event] = collections.deque()
        start, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - start < seconds:
            self._call()
            steps += 1
            if self._cuda:
                event = torch.cuda.Event()
                event.record()
                in_flight.append(event)
                if len(in_flight) > IN_FLIGHT:
                    in_flight.popleft().synchronize()
        self._wait()
        duration = time.perf_counter() - start
        memory.give_back_freed_memory()
        return steps, duration


def answer(programs: dict[str, Program], request: dict[str, Any]) -> dict[str, Any]:
    """Serves a request and returns the answer."""
    device = torch.device(request.get("device", "cpu"))
    try:
        if "prepare" in request:
            if device.type == "cuda" and not torch.cuda.is_available():
                return {"failure": "torch finds no GPU"}
            if device.type == "cuda":
                # JAX uses TF32 for float32 matmuls by default; allow it in torch too.
                torch.set_float32_matmul_precision("high")
                torch.backends.cudnn.benchmark = True
            program = programs[request["prepare"]] = Program(request, device)
            return {"compile_seconds": program.compile_seconds}
        program = programs[request["run"]]
        steps, duration = program.run(request["seconds"])
        return {"steps": steps, "seconds": duration, "memory": program.memory}
    except torch.OutOfMemoryError:
        return {"failure": "does not fit into memory"}


def main() -> None:
    """Answers requests until stdin is closed."""
    # Redirect stdout to stderr, so that output of compilers does not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    programs: dict[str, Program] = {}
    for line in sys.stdin:
        print(json.dumps(answer(programs, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
