"""Defines --config and the flags that entry points share, and builds the config from them."""

import difflib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mixer.cli import program
from mixer.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument for it after a colon: FILE.py[:key=value,...]."
)


def run(
    main: Callable[[Sequence[str]], None], tell: Callable[[str], None] = lambda line: None
) -> None:
    """Runs `main` as `program.run` does, with --config and its overrides."""
    program.run(main, _parse, tell)


def config() -> ConfigDict:
    """Returns the config of --config with the command line's overrides.

    Raises:
      UserError: --config is missing.
    """
    value = CONFIG.value
    if value is None:
        raise UserError("--config is missing; for example --config=configs/digits.py")
    _replace_lengths(value, _overrides())
    return value


def _overrides() -> dict[str, Any]:
    """Returns the values of --config.KEY=VALUE by key."""
    values = config_flags.get_override_values(flags.FLAGS["config"])
    return {key.removeprefix("config."): value for key, value in values.items()}


def _replace_lengths(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Unsets lengths of the config file that the command line sets in another unit."""
    keys = dict(_types(config)).keys()
    for key in overrides:
        stem, _, unit = key.rpartition("_")
        if unit in UNITS:
            lengths = {f"{stem}_{name}" for name in UNITS}
            for name in lengths & keys - overrides.keys():
                config.update_from_flattened_dict({name: None})


def config_maker(default: str) -> Callable[..., ConfigDict]:
    """Returns a function that builds several configs from one file, with different arguments.

    Args:
      default: the config file if --config is not set.

    Returns:
      A function (always={key: value}, unless_given={key: value}) -> config. The file gets the
      arguments `unless_given`, then those of the command line, then `always`; later ones override
      earlier ones. --config.KEY=VALUE is applied last.
    """
    value = config_flags.get_config_filename(flags.FLAGS["config"]) if CONFIG.value else default
    path, _, argument = value.partition(":")
    overrides = _overrides() if CONFIG.value else {}

    def make(*, always: Mapping[str, Any], unless_given: Mapping[str, Any]) -> ConfigDict:
        first, last = (
            [f"{key}={value}" for key, value in arguments.items()]
            for arguments in (unless_given, always)
        )
        config = _load(f"{path}:{','.join([*first, *filter(None, [argument]), *last])}")
        config.update_from_flattened_dict(overrides)
        _replace_lengths(config, overrides)
        return config

    return make


def _load(value: str) -> ConfigDict:
    """Loads the config of --config=`value`, which is FILE.py or FILE.py:ARGUMENT.

    Raises:
      UserError: the file does not exist or is not a config file, or rejects its argument.
    """
    path, colon, argument = value.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: no such file; for example configs/digits.py")
    if not path.endswith(".py"):
        hint = ""
        if os.path.basename(path) == "config.json":
            hint = "; to repeat a run, pass the config file of its command and another --workdir"
        raise UserError(
            f"--config={path}: expected a Python file with get_config(), such as configs/digits.py"
            + hint
        )
    # Import the configs next to this package, not another package `configs` on the path.
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    if sys.path[0] != root and os.path.isfile(os.path.join(root, "configs", "__init__.py")):
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location("config_of_program", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.get_code(spec.name)
    except (SyntaxError, ValueError) as error:  # ValueError: the file contains null bytes
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = getattr(error, "msg", str(error))
        raise UserError(f"--config={path}{line}: not a Python file: {reason}") from None
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config={path}: get_config() is missing; see configs/digits.py")
    arguments = [argument] if colon else []
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError:
        raise UserError(
            f"--config={value}: its get_config() takes {'no' if colon else 'an'} argument"
        ) from None
    try:
        config = module.get_config(*arguments)
    except ValueError as error:
        if str(error).startswith("config argument"):  # configs.common.parse_arg
            raise UserError(str(error)) from None
        raise
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={path}: get_config() returns {type(config).__name__}; expected the "
            "ConfigDict that configs.common.base() makes"
        )
    return config


UNITS = ("steps", "epochs", "examples")


def image_size(flag: str, sides: list[str] | None) -> tuple[int, int] | None:
    """Returns (H, W) from a list flag with one or two sides in pixels; None if it is not set.

    Raises:
      UserError: the value is invalid.
    """
    values = program.numbers(flag, sides, least=1)
    if len(values) > 2:
        raise UserError(f"--{flag}={','.join(sides)}; expected a side in pixels, or HEIGHT,WIDTH")
    return (values[0], values[-1]) if values else None


def config_name() -> str:
    """Returns the name of the config file without its suffix."""
    path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    return os.path.splitext(os.path.basename(path))[0]


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; returns the other arguments.

    Raises:
      UserError: a flag, --config or one of its overrides is invalid.
    """
    joined: list[str] = []  # absl also accepts `--config FILE` and `-config=FILE`
    for arg in argv:
        arg = re.sub(r"^-(?=config\b)", "--", arg)
        if joined and joined[-1] == "--config" and not arg.startswith("--"):
            joined[-1] = f"--config={arg}"
        else:
            joined.append(arg)
    argv = joined
    if any(arg in ("--help", "-h", "--helpfull", "--helpshort") for arg in argv):
        argv = [arg for arg in argv if not arg.startswith("--config")]
    program.check_values(argv)
    values = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    overrides = [arg for arg in argv if re.match(r"--(no)?config\.", arg)]
    types = dict(_types(_load(values[-1]))) if values else {}
    if overrides and not values:
        raise UserError(
            "--config=FILE.py is missing; --config.KEY=VALUE only overrides a key of that config"
        )
    if overrides and argv.index(f"--config={values[-1]}") > argv.index(overrides[0]):
        raise UserError("--config=FILE.py must precede --config.KEY=VALUE")
    for arg in overrides:
        _check_key(arg, types)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        for arg in overrides:
            kind = types.get(_key(arg))
            if kind in (int, float, bool) and message.startswith(f"flag {arg}:"):
                message = f"{arg}; expected a value of type {kind.__name__}"
            elif isinstance(error, IndexError) and "[" in arg:
                message = f"{arg}: {message}"
        raise UserError(message) from error


def _key(arg: str) -> str:
    """Returns the key of an argument such as --config.KEY=VALUE."""
    return arg.partition("=")[0].partition("config.")[2]


def _check_key(arg: str, types: Mapping[str, type]) -> None:
    """Raises UserError if the key of --config.KEY=VALUE is unknown or a group of keys."""
    key = _key(arg)
    if "[" in key:  # an element of a value
        return
    if key not in types:
        raise UserError(f"config has no key {key!r}.{_nearest_key(key, types)}")
    if types[key] is ConfigDict:
        members = ", ".join(name for name in types if name.startswith(f"{key}."))
        raise UserError(f"{arg} sets a group of keys; expected one of {members}")


# Names of the same keys in big_vision, vision_transformer, timm and other programs.
FOREIGN_NAMES = {
    "global_batch_size": "batch_size batch input.batch_size train_batch_size",
    "eval_batch_size": "batch_eval validation_batch_size",
    "optimizer.peak_lr": "lr base_lr learning_rate peak_lr max_lr optimizer.lr",
    "optimizer.weight_decay": "wd decay optimizer.wd",
    "optimizer.grad_clip_norm": "grad_norm_clip clip_grad clip_norm max_grad_norm",
    "optimizer.accumulate_steps": "accum_steps grad_accum_steps gradient_accumulation_steps",
    "optimizer.ema_decay": "model_ema_decay ema",
    "optimizer.momentum_dtype": "optax.mu_dtype",
    "optimizer.name": "opt optax_name",
    "optimizer.b1": "momentum beta1",
    "optimizer.b2": "beta2",
    "schedule.decay": "sched decay_type schedule.decay_type lr_schedule",
    "schedule.warmup_steps": "warmup warmup_iters",
    "total_epochs": "epochs num_epochs",
    "total_steps": "steps num_steps num_train_steps",
    "eval_every_steps": "eval_every eval_freq",
    "log_every_steps": "log_training_steps log_every log_interval progress_every",
    "checkpoint.every_steps": "ckpt_steps checkpoint_every save_every",
    "checkpoint.keep_every_steps": "keep_ckpt_steps",
    "image_size": "img_size input_size resolution res",
    "init_from": "model_init pretrained pretrained_dir initial_checkpoint checkpoint_path",
    "label_smoothing": "smoothing",
    "mixup.alpha": "mixup.p mixup_alpha",
    "mixup.cutmix_alpha": "cutmix",
    "model.variant": "model_name arch variant",
    "model.stoch_depth": "drop_path drop_path_rate stochastic_depth model.drop_path",
    "model.dropout": "drop drop_rate dropout_rate",
    "model.dtype": "precision amp_dtype dtype",
    "model.patch_size": "patches.size patch",
    "model.in_channels": "in_chans channels num_channels",
    "model.num_blocks": "depth num_layers model.depth",
    "model.hidden_dim": "width embed_dim",
    "dataset.name": "input.data.name data.name",
    "dataset.data_dir": "input.data.data_dir data_path tfds_data_dir",
    "dataset.train_split": "input.data.split",
    "dataset.train_preprocess": "input.pp pp_train pp.train",
    "dataset.eval_preprocess": "pp_eval pp.test",
}


def _nearest_key(key: str, types: Mapping[str, type]) -> str:
    """Returns a hint: the key with this name in another program, the most similar key, or all."""
    keys = [name for name, kind in types.items() if kind is not ConfigDict]
    for name, foreign_names in FOREIGN_NAMES.items():
        if key in foreign_names.split() and name in keys:
            return f" Did you mean {name!r}?"

    def similarity(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    last = key.rpartition(".")[2]
    similar = [name for name in keys if similarity(last, name.rpartition(".")[2]) >= 0.7]
    if not similar:
        return f" Its keys: {', '.join(keys)}"
    return f" Did you mean {max(similar, key=lambda name: similarity(key, name))!r}?"


def _types(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yields every key with the type of its value; ConfigDict for a group of keys."""
    for key in config:
        value = config.get_ref(key).get() if config.is_type_safe else config[key]
        if isinstance(value, ConfigDict):
            yield prefix + key, ConfigDict
            yield from _types(value, f"{prefix}{key}.")
        else:
            yield prefix + key, config.get_type(key)
