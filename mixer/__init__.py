"""MLP-Mixer in JAX/Flax: train, fine-tune, evaluate and use.

`import mixer; model, params = mixer.load("RUN_OR_FILE")` loads weights (mixer/weights/load.py);
`model = mixer.make_model("B/16", num_classes=10)` builds a model without weights
(mixer/models/registry.py).
JAX is imported when one of them is first used.
"""

import importlib
from typing import Any

_MODULES = {"load": "mixer.weights.load", "make_model": "mixer.models.registry"}


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mixer' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
