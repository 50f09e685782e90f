"""The flags that the entry points share, and the config that they describe."""

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mixer import program
from mixer.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument for it after a colon: FILE.py[:key=value,...]."
)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`program.run` with the flags of a config; a user's mistake ends in one line, code 2."""
    program.run(main, _parse)


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
    """Lets a length of the command line take the place of the config file's in another unit."""
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
    given = config_flags.get_config_filename(flags.FLAGS["config"]) if CONFIG.value else default
    path, _, argument = given.partition(":")
    spec = importlib.util.spec_from_file_location("config_of_suite", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    overrides = _overrides() if CONFIG.value else {}

    def make(*, always: Mapping[str, Any], unless_given: Mapping[str, Any]) -> ConfigDict:
        first, last = (
            [f"{key}={value}" for key, value in each.items()] for each in (unless_given, always)
        )
        try:
            config = module.get_config(",".join([*first, *filter(None, [argument]), *last]))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        config.update_from_flattened_dict(overrides)
        _replace_lengths(config, overrides)
        return config

    return make


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
    if sides is None:
        return None
    if len(sides) not in (1, 2) or not all(re.fullmatch("[1-9][0-9]*", side) for side in sides):
        raise UserError(f"--{flag}={','.join(sides)}: a side in pixels, or HEIGHT,WIDTH")
    return int(sides[0]), int(sides[-1])


def config_name() -> str:
    """The config file's name without its ending."""
    path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    return os.path.splitext(os.path.basename(path))[0]


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; mistakes in --config and its overrides become one line."""
    joined: list[str] = []  # absl takes `--config FILE` too
    for arg in argv:
        if joined and joined[-1] == "--config":
            joined[-1] = f"--config={arg}"
        else:
            joined.append(arg)
    argv = joined
    if any(arg in ("--help", "-h", "--helpfull", "--helpshort") for arg in argv):
        argv = [arg for arg in argv if not arg.startswith("--config")]
    for arg in argv[1:]:
        match = re.fullmatch(r"--config=([^:]*)(:.*)?", arg)
        if match and not os.path.isfile(match[1]):
            raise UserError(f"--config={match[1]}: no such file; for example configs/digits.py")
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise _flag_mistake(argv, error) from error


def _flag_mistake(argv: list[str], error: Exception) -> Exception:
    """Turns an error of absl or ml_collections into a UserError; a config's own fault stays."""
    text = str(error)
    if "has no attribute 'get_config'" in text:
        return UserError(
            "--config: the file defines no get_config(); for example configs/digits.py"
        )
    if "Error whilst parsing config file" in text:
        last = text.strip().splitlines()[-1]
        if last.startswith("ValueError: config argument"):  # configs.common.parse_arg
            return UserError(last.removeprefix("ValueError: "))
        return error
    config = next((arg for arg in argv if arg.startswith("--config=")), None)
    if config is None and any(arg.startswith("--config.") for arg in argv):
        return UserError("--config=FILE.py must stand before --config.KEY=VALUE")
    if config is not None:
        known = _known_keys(config.removeprefix("--config="))
        for arg in argv:
            if arg.startswith("--config."):
                key, _, value = arg.removeprefix("--config.").partition("=")
                if key not in known:
                    return UserError(f"config has no key {key!r}.{_nearest_key(key, known)}")
                kind = known[key]
                if kind in (int, float, bool) and not _is(kind, value):
                    return UserError(f"--config.{key}={value}: it must be of type {kind.__name__}")
    return UserError(" ".join(text.split()))


def _is(kind: type, value: str) -> bool:
    try:
        return value.lower() in ("true", "false", "1", "0") if kind is bool else bool([kind(value)])
    except ValueError:
        return False


# What other programs call keys whose names here are not alike.
USUAL_NAMES = {
    "batch_size": "global_batch_size",
    "batch": "global_batch_size",
    "lr": "optimizer.peak_lr",
    "learning_rate": "optimizer.peak_lr",
    "optimizer.lr": "optimizer.peak_lr",
    "epochs": "total_epochs",
    "num_epochs": "total_epochs",
    "steps": "total_steps",
    "num_steps": "total_steps",
}


def _nearest_key(key: str, known: dict[str, type]) -> str:
    """The nearest full key: by another program's name for it, compared whole, or by last name."""
    if key in USUAL_NAMES:
        return f" Did you mean {USUAL_NAMES[key]!r}?"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        by_name = {name.rpartition(".")[2]: name for name in known}
        match = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.6)
        close = [by_name[match[0]]] if match else []
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}"


def _known_keys(path: str) -> dict[str, type]:
    parser = config_flags.config_flags.ConfigFileFlagParser("config")
    return dict(_types(parser.parse(path)))


def _types(config: ConfigDict, prefix: str = ""):
    for key in config:
        value = config.get_ref(key).get() if config.is_type_safe else config[key]
        if isinstance(value, ConfigDict):
            yield from _types(value, f"{prefix}{key}.")
        else:
            yield prefix + key, config.get_type(key)
