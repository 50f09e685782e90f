"""The flags that the entry points share, and the config that they describe."""

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
    """`program.run` with the flags of a config."""
    program.run(main, _parse, tell)


def config() -> ConfigDict:
    """The config that the flags describe.

    Raises:
      UserError: --config is missing or names no file.
    """
    value = CONFIG.value
    if value is None:
        raise UserError("--config is missing; for example --config=configs/digits.py")
    _replace_lengths(value, _overrides())
    return value


def _overrides() -> dict[str, Any]:
    """The command line's --config.KEY=VALUE."""
    values = config_flags.get_override_values(flags.FLAGS["config"])
    return {key.removeprefix("config."): value for key, value in values.items()}


def _replace_lengths(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Removes a length of the config file that the command line gives in another unit."""
    for key in overrides:
        stem, _, unit = key.rpartition("_")
        if unit in UNITS:
            for other in UNITS:
                name = f"{stem}_{other}"
                if name not in overrides and _has(config, name):
                    config.update_from_flattened_dict({name: None})


def config_maker(default: str) -> Callable[..., ConfigDict]:
    """A function that builds configs of one file with several arguments, one after the other.

    Args:
      default: the file where --config is not given.

    Returns:
      (always={key: value}, unless_given={key: value}) -> the config that the file makes of its
      arguments on the command line, `unless_given` before them and `always` after; then the
      command line's --config.KEY=VALUE.
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
    """The config of --config=`value`, which is FILE.py or FILE.py:ARGUMENT.

    Raises:
      UserError: there is no such file, it is no config file, or it fails.
    """
    path, colon, argument = value.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: no such file; for example configs/digits.py")
    if not path.endswith(".py"):
        hint = ""
        if os.path.basename(path) == "config.json":
            hint = "; to repeat a run, give the config file of its command and another --workdir"
        raise UserError(
            f"--config={path}: expected a Python file with get_config(), such as configs/digits.py"
            + hint
        )
    # The configs beside this package, and not a package of that name elsewhere on the path.
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    if sys.path[0] != root and os.path.isfile(os.path.join(root, "configs", "__init__.py")):
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location("config_of_program", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.get_code(spec.name)
    except (SyntaxError, ValueError) as error:  # of null bytes
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = getattr(error, "msg", str(error))
        raise UserError(f"--config={path}{where}: not a Python file: {reason}") from None
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config={path}: it defines no get_config(); see configs/digits.py")
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
            "ConfigDict of configs.common.base(), with values of its own"
        )
    return config


UNITS = ("steps", "epochs", "examples")


def _has(config: ConfigDict, key: str) -> bool:
    *groups, last = key.split(".")
    for group in groups:
        config = config[group]
    return last in config


def image_size(flag: str, sides: list[str] | None) -> tuple[int, int] | None:
    """(H, W) of a list flag that has a side in pixels, or two; None where it is not given.

    Raises:
      UserError: it has something else.
    """
    values = program.numbers(flag, sides, least=1)
    if len(values) > 2:
        raise UserError(f"--{flag}={','.join(sides)}; expected a side in pixels, or HEIGHT,WIDTH")
    return (values[0], values[-1]) if values else None


def config_name() -> str:
    """The config file's name without its ending."""
    path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    return os.path.splitext(os.path.basename(path))[0]


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; mistakes in --config and its overrides become one line."""
    joined: list[str] = []  # absl takes `--config FILE` and `-config=FILE` too
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
    given = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    overrides = [arg for arg in argv if re.match(r"--(no)?config\.", arg)]
    types = dict(_types(_load(given[-1]))) if given else {}
    if overrides and not given:
        raise UserError("--config=FILE.py is missing, which --config.KEY=VALUE changes")
    if overrides and argv.index(f"--config={given[-1]}") > argv.index(overrides[0]):
        raise UserError("--config=FILE.py must stand before --config.KEY=VALUE")
    for arg in overrides:
        _check_key(arg, types)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        for arg in overrides:
            _check_type(arg, types)
        raise UserError(" ".join(str(error).split())) from error


def _check_key(arg: str, types: Mapping[str, type]) -> None:
    """Raises UserError where --config.KEY=VALUE names no key, or a group of them."""
    key = arg.partition("=")[0].partition("config.")[2]
    if "[" in key:  # a part of a value
        return
    if key not in types:
        raise UserError(f"config has no key {key!r}.{_nearest_key(key, types)}")
    if types[key] is ConfigDict:
        members = ", ".join(other for other in types if other.startswith(f"{key}."))
        raise UserError(f"{arg} names a group of keys; expected one of {members}")


def _check_type(arg: str, types: Mapping[str, type]) -> None:
    """Raises UserError where --config.KEY=VALUE has a value of another type."""
    name, equals, value = arg.partition("=")
    kind = types.get(name.partition("config.")[2])
    if equals and kind in (int, float, bool) and not _is(kind, value):
        raise UserError(f"{arg}; expected a value of type {kind.__name__}")


def _is(kind: type, value: str) -> bool:
    try:
        return value.lower() in ("true", "false", "1", "0") if kind is bool else bool([kind(value)])
    except ValueError:
        return False


# What big_vision, vision_transformer, timm and others call keys whose names here are not alike.
USUAL_NAMES = {
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
    "model.num_blocks": "depth num_layers model.depth",
    "model.hidden_dim": "width embed_dim",
    "dataset.name": "input.data.name data.name",
    "dataset.data_dir": "input.data.data_dir data_path tfds_data_dir",
    "dataset.train_split": "input.data.split",
    "dataset.train_preprocess": "input.pp pp_train pp.train",
    "dataset.eval_preprocess": "pp_eval pp.test",
}


def _nearest_key(key: str, types: Mapping[str, type]) -> str:
    """The key that was meant: by another program's name for it, or the one that is most alike."""
    keys = [name for name, kind in types.items() if kind is not ConfigDict]
    for name, usual in USUAL_NAMES.items():
        if key in usual.split() and name in keys:
            return f" Did you mean {name!r}?"

    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    last = key.rpartition(".")[2]
    alike = [name for name in keys if likeness(last, name.rpartition(".")[2]) >= 0.7]
    if not alike:
        return f" Its keys: {', '.join(keys)}"
    return f" Did you mean {max(alike, key=lambda name: likeness(key, name))!r}?"


def _types(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every key with the type of its value; of a group of keys, ConfigDict."""
    for key in config:
        value = config.get_ref(key).get() if config.is_type_safe else config[key]
        if isinstance(value, ConfigDict):
            yield prefix + key, ConfigDict
            yield from _types(value, f"{prefix}{key}.")
        else:
            yield prefix + key, config.get_type(key)
