"""MLP-Mixer in JAX/Flax: train, fine-tune, evaluate and use.

`import mixer; model, params = mixer.load("RUN_OR_FILE")` loads weights (mixer/weights/load.py). JAX
is imported when `load` is first used.
"""

from typing import Any


def __dir__() -> list[str]:
    return [*globals(), "load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module 'mixer' has no attribute {name!r}")
    from mixer.weights.load import load

    return load
