"""Measures how fast this machine trains and runs Mixers, beside what one could take instead.

  python -m mixer.tools.benchmark train --models=S/32,B/16 --batch_size=8 --against=plain
  python -m mixer.tools.benchmark infer --models=B/16 --dtype=bfloat16 --against=timm_compiled
  python -m mixer.tools.benchmark matmul --models=B/16 --dtype=bfloat16
  python -m mixer.tools.benchmark check --models=B/16 --dtype=bfloat16 --batch_size=32
  python -m mixer.tools.benchmark data --config=configs/mixer_b16_i1k.py
  python -m mixer.tools.benchmark loop --config=configs/cifar10.py:epochs=300

Contestants take turns in one run; a table has medians, lowest and highest. `check` says how far
results and gradients are from the plain formulation's. `data` says what the input pipeline of a
config delivers on this host, and for how many devices it suffices. `loop` trains a config as its
run does where images stay on the device, and says how long the whole run would take. All but `data`
need neither data nor TensorFlow. docs/benchmark.md explains every column.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

# The contestants of other processes need memory of the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags

from mixer import files, memory
from mixer.cli import program
from mixer.errors import UserError, nearest
from mixer.parallel import backend

MOST = 2**31 - 1  # of images: indices on devices are int32

MODELS = flags.DEFINE_list(
    "models", ["S/32", "B/16"], "S/32 S/16 S/8 B/32 B/16 L/32 L/16 H/14, and cifar (patch 4)."
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of the computation; trained parameters: float32."
)
GELU = flags.DEFINE_enum("gelu", "tanh", ["tanh", "erf"], "Of every contestant.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Pixels; 224, or 32 for cifar.", 1, 1 << 15)
BATCH_SIZE = flags.DEFINE_list(
    "batch_size", None, "Images a device, one or several; 256 on accelerators, 8 on CPUs."
)
AGAINST = flags.DEFINE_list(
    "against",
    ["plain"],
    "plain (the paper's formulation in Flax), timm, timm_compiled (torch.compile), timm_autotuned "
    "(torch.compile, max-autotune); empty: none.",
)
SECONDS = flags.DEFINE_float("seconds", None, "Of a contestant's turn; 3; for data 10.", 0, 3600)
ROUNDS = flags.DEFINE_integer("rounds", None, "Turns of each contestant; 5; for data 3.", 1, 1000)
TORCH_PYTHON = flags.DEFINE_string(
    "torch_python", sys.executable, "The Python that has torch and timm, if not this one."
)
OUTPUT = flags.DEFINE_string("output", None, "File of JSON to write every figure to.")
STEP_RATE = flags.DEFINE_float(
    "images_per_second_per_device", None, "data: the training step's, instead of measuring it.", 0
)

EXAMPLES = flags.DEFINE_integer("examples", 50_000, "loop: images that lie on the device.", 1, MOST)

_CASES = ("models", "dtype", "gelu", "image_size", "batch_size")
_TURNS = ("seconds", "rounds")
_TORCH = ("against", "torch_python")
# Measurements, and their flags beside --output.
MEASUREMENTS = {
    "train": (*_CASES, *_TURNS, *_TORCH),
    "infer": (*_CASES, *_TURNS, *_TORCH),
    "matmul": ("models", "dtype", "image_size", "batch_size", *_TURNS, *_TORCH),
    "check": _CASES,
    "data": ("config", "batch_size", *_TURNS, "images_per_second_per_device"),
    "loop": ("config", *_TURNS, "examples"),
}
NUM_CLASSES = {"cifar": 10}  # 1,000 of the others


def main(argv: list[str]) -> None:
    """Runs the measurement that the arguments name."""
    if len(argv) != 2 or argv[1] not in MEASUREMENTS:
        raise UserError(
            f"{' '.join(argv[1:]) or 'no measurement'}: expected one of "
            f"{', '.join(MEASUREMENTS)}; see python -m mixer.tools.benchmark --help"
        )
    _check_flags(argv[1])
    if OUTPUT.value:
        files.check_output("--output", OUTPUT.value)
    import jax

    # What is compiled is measured, and not what an earlier run has compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    memory.compute_in_the_calling_thread()
    backend.start()
    if argv[1] == "data":
        data()
    elif argv[1] == "loop":
        loop()
    elif argv[1] == "matmul":
        matmul()
    elif argv[1] == "check":
        check()
    else:
        compete(argv[1])


def _check_flags(measurement: str) -> None:
    """Raises UserError for a flag that the measurement has no use for, or of no use at all."""
    from mixer.tools.benchmark import torch_side

    taken = MEASUREMENTS[measurement]
    for name in sorted(set().union(*MEASUREMENTS.values()).difference(taken)):
        if name in flags.FLAGS and flags.FLAGS[name].present:
            known = ", ".join(f"--{flag}" for flag in (*taken, "output"))
            raise UserError(f"--{name}: {measurement} takes none; its flags are {known}")
    for flag in (SECONDS, STEP_RATE):
        if not math.isfinite(flag.value or 0):
            raise UserError(f"--{flag.name}={flag.value}: a number is taken")
    for name in AGAINST.value:
        known = ("plain", *torch_side.CONTESTANTS)
        if name not in known:
            raise UserError(f"--against={name}: one of {', '.join(known)}.{nearest(name, known)}")


def compete(what: str) -> None:
    """Measures training or inference of every model and batch size."""
    import jax

    from mixer.models import flops
    from mixer.parallel import sharding
    from mixer.tools.benchmark import contest, jax_side, report, torch_side

    cases = _cases(what)
    torch_names = [name for name in AGAINST.value if name in torch_side.CONTESTANTS]
    versions = _torch_versions() if torch_names else {}
    mesh = sharding.make_mesh({"data": -1})
    console = report.make_console()
    found = _start("contests", console, versions)
    side = contest.LARGE.get(jax.default_backend(), 8192)
    with _matmul_child(bool(torch_names)) as child:
        for case in cases:
            prepare_jax = jax_side.prepare_train if what == "train" else jax_side.prepare_infer
            prepare: dict[str, Callable[[], contest.Contestant]] = {
                name: functools.partial(prepare_jax, name, case, mesh)
                for name in ["ours", *AGAINST.value]
                if name not in torch_names
            } | {
                name: functools.partial(
                    torch_side.prepare, name, case, TORCH_PYTHON.value, _torch_device()
                )
                for name in torch_names
            }
            models = list(prepare)
            prepare |= _prepare_matmul("", (side, side, side), child)
            console.print()
            title = report.case_title(case, mesh.size)
            console.print(title, markup=False)
            seconds, rounds = _turns(3.0, 5)
            with console.status("") as status:
                results = contest.compete(
                    prepare, seconds=seconds, rounds=rounds, say=status.update
                )
            by = {
                name: contest.rates(results.pop(name), 2.0 * side**3)
                for name in prepare
                if name not in models
            }
            limit = max((rate["median"] for rate in by.values() if rate), default=None)
            model = jax_side.make_mixer(case)
            count = flops.train_flops if what == "train" else flops.forward_flops
            per_image = count(model, (case.image_size, case.image_size))
            figures = {
                **dataclasses.asdict(case),
                "title": title,
                "flops_per_image": per_image,
                "matmul": {"side": side, "flops_per_second_per_device": by, "limit": limit},
                "contestants": {
                    name: contest.as_json(result, case.batch_size, per_image, limit)
                    for name, result in results.items()
                },
                "ours_is_times": {
                    name: contest.ratio(results["ours"], results[name]) for name in models[1:]
                },
                "device_peak_bytes": _device_peak(),
            }
            console.print(report.contest_table(console, figures))
            console.print(report.matmul_line(figures), markup=False)
            found["contests"].append(figures)
            _write(found)


def matmul() -> None:
    """Measures a large square matmul and those of the models' layers, forward."""
    import jax

    from mixer.tools.benchmark import contest, jax_side, report, torch_side

    versions = {}
    with_torch = any(name in torch_side.CONTESTANTS for name in AGAINST.value)
    if with_torch:
        versions = _torch_versions()
    console = report.make_console()
    found = _start("matmuls", console, versions)
    side = contest.LARGE.get(jax.default_backend(), 8192)
    shapes = {"large": (side, side, side)}
    for case in _cases("infer"):
        model = jax_side.make_mixer(case)
        tokens, count = (case.image_size // model.patch_size) ** 2, case.batch_size
        width, across, along = model.hidden_dim, model.tokens_mlp_dim, model.channels_mlp_dim
        patch = 3 * model.patch_size**2
        for name, shape in {
            "stem": (count * tokens, patch, width),
            "token_mixing 1": (count * width, tokens, across),
            "token_mixing 2": (count * width, across, tokens),
            "channel_mixing 1": (count * tokens, width, along),
            "channel_mixing 2": (count * tokens, along, width),
        }.items():
            shapes[f"{case.model} batch {count} {name}"] = shape
    seconds, rounds = _turns(1.0, 5)
    with _matmul_child(with_torch) as child:
        prepare: dict[str, Callable[[], contest.Contestant]] = {}
        for name, shape in shapes.items():
            prepare |= _prepare_matmul(name, shape, child)
        with console.status("") as status:
            results = contest.compete(prepare, seconds=seconds, rounds=rounds, say=status.update)
    table: dict[str, Any] = {}
    for name, (m, k, n) in shapes.items():
        by = {
            who: contest.rates(results[f"{name} {who}".strip()], 2.0 * m * k * n)
            for who in ("jax", "torch")[: 1 + with_torch]
        }
        table[name] = {"shape": (m, k, n), "by": by}
    large = max((rate["median"] for rate in table["large"]["by"].values() if rate), default=None)
    for name, entry in table.items():
        entry["by"] = {
            who: {
                "flops_per_second_per_device": rate,
                "share_of_large": large and rate["median"] / large,
            }
            if rate
            else {"failure": results[f"{name} {who}".strip()].failure}
            for who, rate in entry["by"].items()
        }
    found["matmuls"] = table
    console.print(report.matmul_table(console, table))
    _write(found)


def check() -> None:
    """Holds ours against the plain formulation: logits and gradients."""
    from mixer.tools.benchmark import agreement, report

    cases = _cases("train")
    console = report.make_console()
    found = _start("agreement", console, {})
    table = report.make_table(
        console, "", "relative error of: logits", "gradient", "worst parameter", "which"
    )
    for case in cases:
        errors = agreement.compare(case)
        found["agreement"].append({**dataclasses.asdict(case), "errors": errors})
        for name, error in errors.items():
            table.add_row(
                f"{name}, {case.model}, {case.dtype}",
                *(f"{error[what]:.1e}" for what in ("logits", "gradient", "worst")),
                error["name"],
            )
    console.print(table)
    _write(found)


def data() -> None:
    """Measures the input pipeline of the config, beside its training step."""
    import jax

    from mixer.runs import config as run
    from mixer.tools.benchmark import input as pipeline
    from mixer.tools.benchmark import report

    config = _config()
    config.model.num_classes = config.model.num_classes or 1000
    model = run.build_model(config)
    if BATCH_SIZE.value is not None and len(BATCH_SIZE.value) > 1:
        raise UserError(f"--batch_size={','.join(BATCH_SIZE.value)}: data takes one")
    if STEP_RATE.value == 0:
        raise UserError("--images_per_second_per_device=0: a rate above 0 is taken")
    dataset = config.dataset
    if not dataset.train_preprocess:
        raise UserError("the config has no preprocessing that could be measured")
    specs = pipeline.preprocessings(dataset.train_preprocess, dataset.eval_preprocess)
    console = report.make_console()
    found = _start("input", console, {})
    for name, spec in specs.items():
        console.print(f"{name}: {spec}", markup=False)
    seconds, rounds = _turns(10.0, 3)
    (step_batch_size,) = _batch_sizes()
    step = None
    if STEP_RATE.value is None:
        step = pipeline.training_step(model, config.image_size, step_batch_size)
    figures = pipeline.measure(
        specs,
        config.image_size,
        step,
        pipeline.device_part(dataset.train_preprocess, config.image_size, step_batch_size),
        batch_size=256,
        step_batch_size=step_batch_size,
        seconds=seconds,
        rounds=rounds,
        say=functools.partial(console.print, markup=False),
    )
    table = report.make_table(
        console, "", "images/s", "lowest to highest", "of decoding", "cores busy"
    )
    rates = figures["images_per_second"]
    for name, rate in rates.items():
        table.add_row(
            name,
            report.number(rate["median"]),
            f"{report.number(rate['lowest'])} to {report.number(rate['highest'])}",
            f"{rate['median'] / rates[pipeline.DECODING]['median']:.1%}",
            f"{figures['cores_busy'][name]:.2f}",
        )
    console.print(table)
    of_part = figures["device_part_per_device"]
    if of_part:
        console.print(
            f"{pipeline.DEVICE_PART}: {report.number(of_part['median'])} images/s on a device "
            f"({report.number(of_part['lowest'])} to {report.number(of_part['highest'])})"
        )
    elif figures.get("device_part_failure"):
        console.print(f"{pipeline.DEVICE_PART}: {figures['device_part_failure']}", markup=False)
    start, end = figures["memory_gib"]
    console.print(f"memory {start:.2f} GiB at the start, {end:.2f} at the end")
    of_step = figures["step_per_device"]
    step_rate = STEP_RATE.value or (of_step and of_step["median"])
    if not step_rate:
        console.print(f"the training step: {figures['step_failure']}", markup=False)
    else:
        devices = jax.local_device_count()
        evaluation = pipeline.evaluation_rate(model, config.image_size, step_rate)
        figures["feeds"] = {}
        how = "given" if of_step is None else "measured"
        needs = {name: (step_rate, how) for name in specs}
        if of_part and pipeline.HOST_PART in needs:  # the device does both, one after the other
            both = 1 / (1 / step_rate + 1 / of_part["median"])
            needs[pipeline.HOST_PART] = (both, f"{how}, with its own steps")
        if "evaluation" in needs:
            needs["evaluation"] = (evaluation, "estimated by FLOPs")
        for name, (needed, how) in needs.items():
            feeds = pipeline.sufficiency(rates[name]["median"], needed, devices)
            figures["feeds"][name] = feeds | {"images_per_second_per_device": needed}
            wait = feeds["wait_share"]
            console.print(
                f"{name}: feeds {feeds['devices']:.3g} devices at {report.number(needed)} images/s "
                f"each ({how}); the {devices} of this host would "
                + (f"wait {wait:.0%} of the time" if wait else "not wait")
            )
    found["input"] = figures
    _write(found)


def loop() -> None:
    """Measures the training of the config on images that stay on the device."""
    import datetime

    import jax

    from mixer.models import flops
    from mixer.runs import config as run
    from mixer.tools.benchmark import contest, report
    from mixer.tools.benchmark import loop as looping

    config = _config()
    config.model.num_classes = config.model.num_classes or 10
    run.resolve_lengths(config, EXAMPLES.value)
    model = run.build_model(config)
    console = report.make_console()
    found = _start("loop", console, {})
    side = contest.LARGE.get(jax.default_backend(), 8192)
    seconds, rounds = _turns(3.0, 5)
    prepare: dict[str, Callable[[], contest.Contestant]] = {
        "loop": lambda: looping.prepare(config, EXAMPLES.value),
        "jax": _prepare_matmul("", (side, side, side), None)["jax"],
    }
    with console.status("") as status:
        results = contest.compete(prepare, seconds=seconds, rounds=rounds, say=status.update)
    by = {"jax": contest.rates(results.pop("jax"), 2.0 * side**3)}
    limit = by["jax"] and by["jax"]["median"]
    per_image = flops.train_flops(model, (config.image_size, config.image_size))
    images = config.global_batch_size / results["loop"].devices
    figures = contest.as_json(results["loop"], images, per_image, limit)
    found["loop"] = {
        "matmul": {"side": side, "flops_per_second_per_device": by, "limit": limit},
        "flops_per_image": per_image,
        "contestants": {"loop": figures},
        "ours_is_times": {},
        "total_steps": config.total_steps,
    }
    console.print(
        f"training, {model.dtype}, {EXAMPLES.value:,} images of {config.image_size} px on the "
        f"device, batches of {config.global_batch_size}, {config.dataset.train_preprocess}",
        markup=False,
    )
    console.print(report.contest_table(console, found["loop"]))
    console.print(report.matmul_line(found["loop"]), markup=False)
    if "failure" not in figures:
        whole = datetime.timedelta(
            seconds=round(config.total_steps * figures["seconds_per_step"]["median"])
        )
        console.print(
            f"the run's {config.total_steps:,} updates take {whole} at this rate, "
            "without evaluating and saving"
        )
    _write(found)


def _config() -> Any:
    """The config of --config, its model and preprocessing resolved."""
    from mixer.cli import config as cli
    from mixer.runs import config as run

    config = cli.config()
    run.check_config(config)
    run.resolve_model(config, run.find_initial(config), None)
    run.resolve_permutation(config)
    return config


def _cases(what: str) -> list[Any]:
    """Every model at every batch size.

    Raises:
      UserError: a model or a size that is none.
    """
    from mixer.models.modules import check_image_size
    from mixer.tools.benchmark.contest import MODELS as KNOWN
    from mixer.tools.benchmark.contest import Case

    if not MODELS.value:
        raise UserError(f"--models is empty: one or several of {', '.join(KNOWN)}")
    cases = []
    for name in MODELS.value:
        if name not in KNOWN:
            raise UserError(f"--models={name}: one of {', '.join(KNOWN)}.{nearest(name, KNOWN)}")
        size = IMAGE_SIZE.value or (32 if name == "cifar" else 224)
        check_image_size((size, size), KNOWN[name]["patch_size"])
        for batch_size in _batch_sizes():
            cases.append(
                Case(
                    what=what,
                    model=name,
                    dimensions=KNOWN[name],
                    image_size=size,
                    num_classes=NUM_CLASSES.get(name, 1000),
                    batch_size=batch_size,
                    dtype=DTYPE.value,
                    gelu=GELU.value,
                )
            )
    return cases


def _batch_sizes() -> list[int]:
    """Images a device.

    Raises:
      UserError: something that is no number of at least 1.
    """
    import jax

    if BATCH_SIZE.value is None:
        return [8 if jax.default_backend() == "cpu" else 256]
    if not BATCH_SIZE.value:
        raise UserError("--batch_size is empty: whole numbers of at least 1 are taken")
    for text in BATCH_SIZE.value:
        if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= MOST:
            raise UserError(f"--batch_size={text}: a whole number from 1 to {MOST} is taken")
    return [int(text) for text in BATCH_SIZE.value]


def _turns(seconds: float, rounds: int) -> tuple[float, int]:
    """Those of the flags, or the given ones."""
    seconds = seconds if SECONDS.value is None else SECONDS.value
    return seconds, ROUNDS.value or rounds


def _torch_device() -> str:
    import jax

    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _torch_versions() -> dict[str, str]:
    """Of torch and timm.

    Raises:
      UserError: they are not there, or do not run on the device.
    """
    import jax

    from mixer.tools.benchmark import torch_side

    if jax.default_backend() not in ("cpu", "gpu"):
        raise UserError(
            f"--against={','.join(AGAINST.value)}: torch's contestants run on CPUs and NVIDIA "
            f"GPUs, not on {jax.default_backend()}; plain does"
        )
    return torch_side.versions(TORCH_PYTHON.value)


@contextlib.contextmanager
def _matmul_child(wanted: bool):
    """A process that computes matmuls in torch; None where none is wanted."""
    from mixer.tools.benchmark import torch_side

    child = torch_side.start(TORCH_PYTHON.value) if wanted else None
    try:
        yield child
    finally:
        if child:
            child.close()


def _prepare_matmul(
    name: str, shape: tuple[int, int, int], child: Any
) -> dict[str, Callable[[], Any]]:
    """The contestants of a matmul, named after it: in JAX, and in torch where there is a child."""
    from mixer.tools.benchmark import jax_side, torch_side

    prepare = {
        f"{name} jax".strip(): functools.partial(jax_side.prepare_matmul, shape, DTYPE.value)
    }
    if child:
        prepare[f"{name} torch".strip()] = functools.partial(
            torch_side.prepare_matmul, child, shape, DTYPE.value, _torch_device()
        )
    return prepare


def _device_peak() -> int | None:
    """The most bytes of the first device that all of this process's contestants have held so far.

    None where the device does not say.
    """
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def _start(what: str, console: Any, versions: dict[str, str]) -> dict[str, Any]:
    """Prints the lines above the tables; returns what will be written."""
    from mixer.tools.benchmark import report

    command = shlex.join(["python", "-m", "mixer.tools.benchmark", *sys.argv[1:]])
    environment = report.environment(command, versions)
    for line in report.header(environment):
        console.print(line, markup=False)
    return {**environment, what: []}


def _write(found: dict[str, Any]) -> None:
    """Writes what was found so far to --output."""
    if OUTPUT.value:
        with files.whole(OUTPUT.value) as new:
            new.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    if {"data", "loop"} & set(sys.argv[1:]):
        from mixer.cli import (
            config as cli,  # --config; the others run where ml_collections is not installed
        )

        cli.run(main)
    else:
        program.run(main)
