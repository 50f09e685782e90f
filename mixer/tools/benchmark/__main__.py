"""Measures how fast this machine trains and runs models, compared with other implementations.

  python -m mixer.tools.benchmark train --models=S/32,B/16 --batch_size=8 --against=plain
  python -m mixer.tools.benchmark infer --models=B/16 --dtype=bfloat16 --against=timm_compiled
  python -m mixer.tools.benchmark infer --models=ViT-S/16,ViT-B/16 --against=plain,timm
  python -m mixer.tools.benchmark data --config=configs/mixer_b16_i1k.py
  python -m mixer.tools.benchmark loop --config=configs/cifar10.py:epochs=300

The implementations take turns; tables show medians, minima and maxima. `data` measures
the input pipeline of a config on this host, and prints how many devices it can feed. `loop` trains
a config with device-resident images, and prints how long the complete run would take. Only `data`
needs TensorFlow. docs/benchmark.md explains every column.
"""

import os
import sys
from typing import Any

# PyTorch implementations run in other processes and need memory on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags

from mixer import files, memory
from mixer.cli import program
from mixer.errors import UserError, check_choice, check_number
from mixer.parallel import backend

MAX_INT32 = 2**31 - 1  # image indices on devices are int32

MODELS = flags.DEFINE_list(
    "models",
    ["S/32", "B/16"],
    "Models: S/32 S/16 S/8 B/32 B/16 L/32 L/16 H/14, cifar (patch 4), and Vision Transformers: "
    "ViT-S/32 ViT-S/16 ViT-B/32 ViT-B/16 ViT-L/32 ViT-L/16 ViT-H/14.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "dtype of the computation; trained parameters are float32.",
)
GELU = flags.DEFINE_enum("gelu", "tanh", ["tanh", "erf"], "GELU of every implementation.")
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Side in pixels. Default: 224, or 32 for cifar.", 1, 1 << 15
)
BATCH_SIZE = flags.DEFINE_list(
    "batch_size",
    None,
    "Images per device; one or several numbers. Default: 256 on accelerators, 8 on CPUs.",
)
AGAINST = flags.DEFINE_list(
    "against",
    ["plain"],
    "plain (the papers' formulations in Flax), timm, timm_compiled (torch.compile), timm_autotuned "
    "(torch.compile, max-autotune); empty: none.",
)
SECONDS = flags.DEFINE_float(
    "seconds", None, "Seconds per turn of an implementation. Default: 3, or 10 for data.", 0, 3600
)
ROUNDS = flags.DEFINE_integer(
    "rounds", None, "Turns of each implementation. Default: 5, or 3 for data.", 1, 1000
)
TORCH_PYTHON = flags.DEFINE_string(
    "torch_python", sys.executable, "Python interpreter with torch and timm, if not this one."
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file for all results.")
STEP_RATE = flags.DEFINE_float(
    "images_per_second_per_device",
    None,
    "data: rate of the training step. Default: it is measured.",
    0,
)

EXAMPLES = flags.DEFINE_integer("examples", 50_000, "loop: images on the device.", 1, MAX_INT32)

_CASES = ("models", "dtype", "gelu", "image_size", "batch_size")
_TURNS = ("seconds", "rounds")
_TORCH = ("against", "torch_python")
# Measurements and their flags, in addition to --output.
MEASUREMENTS = {
    "train": (*_CASES, *_TURNS, *_TORCH),
    "infer": (*_CASES, *_TURNS, *_TORCH),
    "data": ("config", "batch_size", *_TURNS, "images_per_second_per_device"),
    "loop": ("config", *_TURNS, "examples"),
}
# Removed measurements and their replacements.
REMOVED_MEASUREMENTS = {
    "matmul": "train and infer print the rate of a large matmul",
    "check": "JAX_PLATFORMS=cuda python -m pytest -m gpu tests/test_agreement.py",
}
NUM_CLASSES = {"cifar": 10}  # the other models have 1,000


def main(argv: list[str]) -> None:
    """Runs the measurement in the arguments."""
    name = " ".join(argv[1:])
    if name in REMOVED_MEASUREMENTS:
        raise UserError(
            f"{name}: this measurement was removed; instead: {REMOVED_MEASUREMENTS[name]}"
        )
    if name not in MEASUREMENTS:
        raise UserError(
            f"{name or 'no measurement'}; expected one of {', '.join(MEASUREMENTS)}; see "
            "python -m mixer.tools.benchmark --help"
        )
    _check_flags(name)
    if OUTPUT.value:
        files.check_output("--output", OUTPUT.value)
    import jax

    # Disable the compilation cache, because the compile time is measured.
    jax.config.update("jax_enable_compilation_cache", False)
    memory.compute_in_the_calling_thread()
    backend.start()
    seconds, rounds = (10.0, 3) if name == "data" else (3.0, 5)
    options = dict(
        seconds=seconds if SECONDS.value is None else SECONDS.value,
        rounds=ROUNDS.value or rounds,
        output=OUTPUT.value,
    )
    if name == "data":
        from mixer.tools.benchmark import input as pipeline

        (batch_size,) = _batch_sizes()
        pipeline.measure(_config(), batch_size=batch_size, step_rate=STEP_RATE.value, **options)
    elif name == "loop":
        from mixer.tools.benchmark import loop

        loop.measure(_config(), num_examples=EXAMPLES.value, **options)
    else:
        from mixer.tools.benchmark import train_infer

        train_infer.measure(
            _cases(name), against=AGAINST.value, torch_python=TORCH_PYTHON.value, **options
        )


def _check_flags(measurement: str) -> None:
    """Raises UserError for a flag that the measurement does not accept, or an invalid value."""
    from mixer.tools.benchmark import torch_side

    accepted_flags = MEASUREMENTS[measurement]
    for name in sorted(set().union(*MEASUREMENTS.values()).difference(accepted_flags)):
        if name in flags.FLAGS and flags.FLAGS[name].present:
            names = ", ".join(f"--{flag}" for flag in (*accepted_flags, "output"))
            raise UserError(f"--{name} is not a flag of {measurement}; expected one of {names}")
    for flag in (SECONDS, STEP_RATE):
        check_number(f"--{flag.name}", flag.value or 0)
    if measurement == "data" and BATCH_SIZE.value is not None and len(BATCH_SIZE.value) > 1:
        raise UserError(f"--batch_size={','.join(BATCH_SIZE.value)}; expected one number for data")
    if STEP_RATE.value == 0:
        raise UserError(f"--{STEP_RATE.name}=0; expected a rate above 0")
    for name in AGAINST.value:
        check_choice("--against", name, ("plain", *torch_side.IMPLEMENTATIONS))


def _config() -> Any:
    """Returns the config of --config with its model and preprocessing resolved."""
    from mixer.cli import config as cli
    from mixer.runs import config as run

    config = cli.config()
    run.check_config(config)
    return run.resolve(config, initial=run.find_initial(config))


def _cases(measurement: str) -> list[Any]:
    """Returns the cases of train or infer: every model at every batch size.

    Raises:
      UserError: a model is unknown, or its patch size does not divide the image size.
    """
    from mixer.models.modules import check_image_size
    from mixer.tools.benchmark import cases

    if not MODELS.value:
        raise UserError(f"--models is empty; expected some of {', '.join(cases.MODELS)}")
    selected_cases = []
    for name in MODELS.value:
        check_choice("--models", name, cases.MODELS)
        for implementation in AGAINST.value:
            if not cases.has_implementation(cases.MODELS[name], implementation):
                raise UserError(
                    f"--against={implementation} has no counterpart of --models={name}; expected "
                    "another implementation, or an empty --against="
                )
        size = IMAGE_SIZE.value or (32 if name == "cifar" else 224)
        check_image_size((size, size), cases.MODELS[name]["patch_size"])
        for batch_size in _batch_sizes():
            selected_cases.append(
                cases.Case(
                    measurement=measurement,
                    model=name,
                    dimensions=cases.MODELS[name],
                    image_size=size,
                    num_classes=NUM_CLASSES.get(name, 1000),
                    batch_size=batch_size,
                    dtype=DTYPE.value,
                    gelu=GELU.value,
                )
            )
    return selected_cases


def _batch_sizes() -> list[int]:
    """Returns images per device from --batch_size, or the default for the backend."""
    import jax

    if BATCH_SIZE.value is None:
        return [8 if jax.default_backend() == "cpu" else 256]
    return program.numbers("batch_size", BATCH_SIZE.value, least=1)


if __name__ == "__main__":
    if {"data", "loop"} & set(sys.argv[1:]):
        from mixer.cli import (
            config as cli,  # defines --config; train and infer run without ml_collections
        )

        cli.run(main)
    else:
        program.run(main)
