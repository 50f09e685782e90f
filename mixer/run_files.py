"""Reads, checks and writes the JSON files of a run.

Every program reads a run's `config.json`, `data.json`, `results.json` and `metrics.jsonl` with this
module. A file that does not match the schema raises a one-line error with the file, the key and the
value. A returned object has every required key with a value of the right type.
"""

import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

from etils import epath

from mixer import files
from mixer.errors import UserError

MAX_LEVELS = 20  # of nested lists and objects


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of values other than objects: its name in messages, and a predicate."""

    name: str
    fits: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A list of values of one schema."""

    item: Any


@dataclasses.dataclass(frozen=True)
class DictOf:
    """An object with arbitrary keys, and values of one schema."""

    item: Any


@dataclasses.dataclass(frozen=True)
class AddedKey:
    """A key that files of older code lack, with a value that matches the older behaviour."""

    schema: Any
    value: Any = None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_pair(value: Any, first: Kind, second: Kind) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and first.fits(value[0]) and second.fits(value[1])


def _optional(kind: Kind) -> Kind:
    return Kind(f"{kind.name} or null", lambda value: value is None or kind.fits(value))


def _one_of(*values: str) -> Kind:
    return Kind(f"one of {', '.join(values)}", lambda value: value in values)


TEXT = Kind("a string", lambda value: isinstance(value, str))
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = Kind("a whole number", _is_integer)
NATURAL = Kind("a whole number of at least 0", lambda value: _is_integer(value) and value >= 0)
COUNT = Kind("a whole number of at least 1", lambda value: _is_integer(value) and value >= 1)
NUMBER = Kind("a finite number", _is_number)
REAL = Kind("a number", lambda value: _is_integer(value) or isinstance(value, float))  # or NaN
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
SPAN = Kind("a list of two numbers", lambda value: _is_pair(value, REAL, REAL))
SIDE = Kind(
    "a side in pixels, or a list of height and width",
    lambda value: COUNT.fits(value) or _is_pair(value, COUNT, COUNT),
)
MULTIPLIERS = ListOf(Kind("[regex, multiplier]", lambda value: _is_pair(value, TEXT, NUMBER)))
CLASS_NAMES = Kind(
    "a list of strings, the name of a list, or null",
    lambda value: (
        value is None
        or TEXT.fits(value)
        or (isinstance(value, list) and all(map(TEXT.fits, value)))
    ),
)


# The config keys, which configs/common.py explains.
CONFIG = {
    "seed": NATURAL,
    "total_steps": COUNT,
    "total_epochs": AddedKey(_optional(NUMBER)),
    "total_examples": AddedKey(_optional(NUMBER)),
    "global_batch_size": COUNT,
    "image_size": SIDE,
    "loss": _one_of("softmax", "sigmoid"),
    "label_smoothing": AddedKey(SHARE, 0.0),
    "class_balance": AddedKey(SHARE, 0.0),
    "mesh": {"data": INTEGER, "fsdp": AddedKey(INTEGER, 1), "tensor": AddedKey(INTEGER, 1)},
    "init_from": TEXT,
    "init_head": AddedKey(TEXT, "auto"),
    "init_resize": AddedKey(TEXT, "grow"),
    "init_image_size": AddedKey(_optional(SIDE)),
    "model": {
        "name": AddedKey(TEXT, "mixer"),
        "variant": _optional(TEXT),
        "patch_size": _optional(SIDE),
        "in_channels": AddedKey(COUNT, 3),
        "hidden_dim": _optional(COUNT),
        "num_blocks": _optional(COUNT),
        "tokens_mlp_dim": _optional(COUNT),
        "channels_mlp_dim": _optional(COUNT),
        "token_mixing_groups": AddedKey(_optional(COUNT)),
        "mlp_dim": AddedKey(_optional(COUNT)),
        "num_heads": AddedKey(_optional(COUNT)),
        "pooling": AddedKey(_optional(TEXT)),
        "positions": AddedKey(_optional(TEXT)),
        "pre_logits_layer": AddedKey(_optional(BOOL)),
        "num_classes": _optional(COUNT),  # null in the first runs; data.json has the number
        "gelu": _optional(_one_of("tanh", "erf")),
        "stoch_depth": SHARE,
        "stoch_depth_rescale": BOOL,
        "dropout": SHARE,
        "head_bias_init": NUMBER,
        "dtype": TEXT,
        "remat": AddedKey(TEXT, "none"),
        "scan_blocks": AddedKey(BOOL, False),
    },
    "dataset": {
        "name": TEXT,
        "data_dir": TEXT,
        "label_key": AddedKey(TEXT, ""),
        "label_file": AddedKey(TEXT, ""),
        "class_order": AddedKey(TEXT, "sorted"),
        "train_split": TEXT,
        "val_split": TEXT,
        "test_split": TEXT,
        "train_preprocess": TEXT,
        "eval_preprocess": TEXT,
        "permutation": AddedKey(TEXT, ""),
        "exclude": TEXT,
        "shuffle_group_size": COUNT,
        "prefetch_batches": COUNT,
        "on_device": AddedKey(TEXT, "auto"),
        "augment_on": AddedKey(TEXT, "auto"),
    },
    "mixup": AddedKey(
        {
            "alpha": AddedKey(NUMBER, 0.0),
            "per_example": AddedKey(BOOL, False),
            "cutmix_alpha": AddedKey(NUMBER, 0.0),
            "cutmix_prob": AddedKey(SHARE, 0.0),
        },
        {},
    ),
    "optimizer": {
        "name": TEXT,
        "peak_lr": NUMBER,
        "b1": NUMBER,
        "b2": NUMBER,
        "eps": NUMBER,
        "momentum_dtype": AddedKey(TEXT, "float32"),
        "variance_dtype": AddedKey(TEXT, "float32"),
        "weight_decay": NUMBER,
        "weight_decay_form": AddedKey(TEXT, "lr"),
        "grad_clip_norm": NUMBER,
        "lr_multipliers": AddedKey(MULTIPLIERS, []),
        "sam_rho": AddedKey(NUMBER, 0.0),
        "ema_decay": AddedKey(SHARE, 0.0),
        "accumulate_steps": AddedKey(COUNT, 1),
    },
    "schedule": {
        "decay": TEXT,
        "warmup_steps": _optional(NATURAL),
        "warmup_epochs": AddedKey(_optional(NUMBER)),
        "warmup_examples": AddedKey(_optional(NUMBER)),
        "final_multiplier": NUMBER,
        "rsqrt_timescale": AddedKey(NUMBER, 10_000),
        "cooldown_steps": AddedKey(_optional(NATURAL), 0),
        "cooldown_epochs": AddedKey(_optional(NUMBER)),
        "cooldown_examples": AddedKey(_optional(NUMBER)),
    },
    "log_every_steps": COUNT,
    "eval_every_steps": _optional(COUNT),
    "eval_every_epochs": AddedKey(_optional(NUMBER)),
    "eval_every_examples": AddedKey(_optional(NUMBER)),
    "eval_suite": AddedKey(TEXT, ""),
    "eval_batch_size": _optional(COUNT),
    "checkpoint": {
        "every_steps": COUNT,
        "keep_last": COUNT,
        "keep_every_steps": _optional(COUNT),
        "keep_best": BOOL,
    },
    "tensorboard": BOOL,
    "nan_policy": AddedKey(TEXT, "stop"),
    "max_skipped_steps": AddedKey(NATURAL, 10),
    "profile_steps": AddedKey(ListOf(INTEGER), []),
    "stall_secs": AddedKey(NUMBER, 120),
    "compile_cache_dir": AddedKey(TEXT, "auto"),
}
# The config that mixer.tools.convert writes for converted weights.
CONVERTED_CONFIG = {
    "source": AddedKey(_optional(TEXT)),
    "image_size": SIDE,
    "model": {
        "variant": AddedKey(_optional(TEXT)),
        "gelu": AddedKey(_optional(_one_of("tanh", "erf"))),
        "dtype": AddedKey(TEXT, "float32"),
    },
    "dataset": {"eval_preprocess": AddedKey(_optional(TEXT))},
}

SPLIT = {
    "name": TEXT,
    "num_examples": COUNT,
    "fingerprint": TEXT,
    "files": AddedKey(
        {
            "num_files": NATURAL,
            "num_bytes": NATURAL,
            "sizes": TEXT,
            "class_files": AddedKey(ListOf(NATURAL)),
            "class_bytes": AddedKey(ListOf(NATURAL)),
        }
    ),
}
DATA = {
    "class_names": ListOf(TEXT),
    "num_readers": AddedKey(COUNT, 1),
    "on_device": AddedKey(BOOL, True),
    "subfolders": AddedKey(BOOL),
    "splits": {"train": SPLIT, "val": AddedKey(SPLIT), "test": AddedKey(SPLIT)},
}
CONVERTED_DATA = {"class_names": CLASS_NAMES}

LINEAR_PROBE = {
    "train": TEXT,
    "validation": TEXT,
    "test": TEXT,
    "train_count": COUNT,
    "validation_count": COUNT,
    "count": COUNT,
    "num_classes": COUNT,
    "untrained_classes": NATURAL,
    "penalty": TEXT,
    "lam": NUMBER,
    "on_edge": BOOL,
    "top1": SHARE,
    "top1_interval": SPAN,
    "mean_per_class": SHARE,
    "mean_per_class_interval": SPAN,
    "path": ListOf(
        {
            "lam": NUMBER,
            "validation_top1": SHARE,
            "iterations": NATURAL,
            "residual": REAL,
            "converged": BOOL,
        }
    ),
}
RESULTS = {
    "step": AddedKey(NATURAL),
    "weights": AddedKey(TEXT),
    "splits": AddedKey(
        DictOf(
            {
                "count": AddedKey(COUNT),
                "labelled": AddedKey(NATURAL),
                "top1": AddedKey(SHARE),
                "top1_interval": AddedKey(SPAN),
                "top5": AddedKey(SHARE),
                "loss": AddedKey(REAL),
                "ece": AddedKey(REAL),
                "mean_per_class": AddedKey(_optional(SHARE)),
                "mean_per_class_interval": AddedKey(_optional(SPAN)),
                "data": AddedKey(TEXT),
                "published": AddedKey({"weights": TEXT, "top1": SHARE, "source": TEXT}),
            }
        )
    ),
    "fewshot": AddedKey(
        DictOf(
            {
                "train": AddedKey(TEXT),
                "test": AddedKey(TEXT),
                "count": AddedKey(COUNT),
                "results": AddedKey(
                    ListOf(
                        {
                            "shots": COUNT,
                            "examples": NATURAL,
                            "short_classes": NATURAL,
                            "accuracies": ListOf(SHARE),
                            "mean": SHARE,
                            "std": _optional(REAL),
                            "interval": SPAN,
                        }
                    )
                ),
            }
        )
    ),
    "linear_probe": AddedKey(DictOf(LINEAR_PROBE)),
    "omnibenchmark": AddedKey(
        DictOf({"realm": TEXT, "weights": TEXT, "settings": TEXT, **LINEAR_PROBE})
    ),
    "throughput": AddedKey(
        DictOf(
            {
                "image_size": SPAN,
                "dtype": TEXT,
                "device": TEXT,
                "devices": COUNT,
                "variant": _optional(TEXT),
                "published": _optional(NUMBER),
                "rates": ListOf(
                    {
                        "batch_size": COUNT,
                        "images_per_second": _optional(NUMBER),
                        "low": _optional(NUMBER),
                        "high": _optional(NUMBER),
                    }
                ),
            }
        )
    ),
    "transfer": AddedKey(
        DictOf(
            {
                "markdown": ListOf(TEXT),
                "tasks": AddedKey(
                    DictOf(
                        {
                            "count": COUNT,
                            "top1": SHARE,
                            "top1_interval": SPAN,
                            "mean_per_class": _optional(SHARE),
                        }
                    )
                ),
                "means": AddedKey(
                    DictOf({"num_tasks": COUNT, "of": COUNT, "top1": SHARE, "top1_interval": SPAN})
                ),
            }
        )
    ),
    "training": AddedKey(
        DictOf(
            {
                "images": NUMBER,
                "seconds": NUMBER,
                "devices": SPAN,
                "device_hours": NUMBER,
                "device_days": NUMBER,
            }
        )
    ),
}

INFO = {
    "step": NATURAL,
    "checksums": DictOf(ListOf(INTEGER)),
    "versions": DictOf(TEXT),
    "value": AddedKey(DictOf(NUMBER)),
}


def is_trained(config: dict[str, Any]) -> bool:
    """Returns whether a config.json is from a training run, not from converted weights."""
    return "total_steps" in config or "optimizer" in config


def read_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Reads the config of a training run or of converted weights; None if the file is missing."""
    path = epath.Path(workdir) / "config.json"
    return _read(path, lambda config: CONFIG if is_trained(config) else CONVERTED_CONFIG)


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a training config completed with newer keys, set to the older behaviour."""
    return _complete(config, CONFIG)


def read_data(workdir: epath.PathLike, *, is_trained: bool = True) -> dict[str, Any] | None:
    """Reads data.json of a training run or of converted weights; None if the file is missing."""
    return _read(
        epath.Path(workdir) / "data.json", lambda _: DATA if is_trained else CONVERTED_DATA
    )


def results_path(directory: epath.PathLike, name: str) -> epath.Path:
    """Returns the path of the results of the checkpoint `name`, which may be "last"."""
    return epath.Path(directory) / ("results.json" if name == "last" else f"results_{name}.json")


def read_results(directory: epath.PathLike, name: str) -> dict[str, Any] | None:
    """Reads the results of the checkpoint `name`; None if there are none.

    Unlike other files of a run, a damaged results file can be written again.
    """
    hint = "; remove the file, and evaluate.py writes it again"
    return _read(results_path(directory, name), lambda _: RESULTS, hint=hint)


def read_info(directory: epath.PathLike) -> dict[str, Any]:
    """Reads the checksums and versions that are saved with a checkpoint's state.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = epath.Path(directory) / "info" / "metadata"
    info = _read(path, lambda _: INFO)
    if info is None:
        raise UserError(f"{path} is missing")
    return info


def read_metrics(
    workdir: epath.PathLike, warn: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl` in order: {"step": k, "train/loss": ...}.

    Damaged lines are skipped, and `warn` is called once with a message about them. A last line that
    a crash truncated is skipped without a warning.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    content = files.read_regular(path) or b""
    *lines, last_line = content.split(b"\n")
    rows, damaged_lines = [], []
    for number, line in enumerate([*lines, last_line], 1):
        if not line.strip():
            continue
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number <= len(lines):
            damaged_lines.append(number)
    if damaged_lines and warn is not None:
        suffix = f", and {len(damaged_lines) - 1} more" * (len(damaged_lines) > 1)
        warn(f"{path}: line {damaged_lines[0]} is damaged{suffix}; skipped")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not NATURAL.fits(row.get("step")):
        return None
    if not all(map(REAL.fits, row.values())):
        return None
    return {key: value for key, value in row.items() if _is_number(value)}


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file atomically, with each list of numbers on one line."""
    text = json.dumps(value, indent=2)
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    with files.atomic_write(path) as new:
        new.write_text(text + "\n")


def _read(path: epath.Path, schema_of: Callable[[dict[str, Any]], Any], hint: str = "") -> Any:
    """Reads a JSON file and checks it against `schema_of(value)`; None if the file is missing."""
    content = files.read_regular(path)
    if content is None:
        return None
    try:
        value = json.loads(content)
        if _num_levels(value) > MAX_LEVELS:
            raise ValueError(f"lists and objects are nested more than {MAX_LEVELS} levels deep")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}{hint}") from None
    try:
        _check(value, {}, ())
        _check(value, schema_of(value), ())
    except _Mismatch as mismatch:
        raise UserError(f"{path}: {mismatch}{hint}") from None
    return value


class _Mismatch(Exception):
    """A value that does not match its schema; the message has key, value and expected type."""


def _check(value: Any, schema: Any, keys: tuple[str, ...]) -> None:
    name = ".".join(keys) or "the file"

    def expect(kind: str, fits: bool) -> None:
        if not fits:
            raise _Mismatch(f"{name} is {reprlib.repr(value)}; expected {kind}")

    match schema:
        case AddedKey():
            _check(value, schema.schema, keys)
        case Kind():
            expect(schema.name, schema.fits(value))
        case ListOf():
            expect("a list", isinstance(value, list))
            for number, item in enumerate(value):
                _check(item, schema.item, (*keys, str(number)))
        case DictOf():
            expect("an object", isinstance(value, dict))
            for key, item in value.items():
                _check(item, schema.item, (*keys, key))
        case dict():
            expect("an object", isinstance(value, dict))
            for key, inner in schema.items():
                if key in value:
                    _check(value[key], inner, (*keys, key))
                elif not isinstance(inner, AddedKey):
                    raise _Mismatch(f"{'.'.join((*keys, key))} is missing")


def _num_levels(value: Any) -> int:
    """Returns how many lists and objects are nested in each other."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return 1 + max(map(_num_levels, value), default=0)


def _complete(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    result = dict(value)
    for key, inner in schema.items():
        if isinstance(inner, AddedKey):
            result.setdefault(key, inner.value)
            inner = inner.schema
        if isinstance(inner, dict):
            result[key] = _complete(result[key], inner)
    return result
