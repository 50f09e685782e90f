"""What every program shares: its environment, and how a mistake or a signal ends it."""

import io
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence

from mixer import memory
from mixer.cli import interrupts
from mixer.parallel import backend

memory.keep_freed_memory()
memory.threads_for_simulated_devices()
backend.forget_settings()
# Before TensorFlow or XLA is loaded: their start-up notices are not for the user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# TensorFlow imports Keras, and that scikit-learn and matplotlib: a third of its time. The Keras
# asked for here is looked for when somebody uses it, which TensorBoard alone does (metrics.py).
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

from absl import app, flags, logging

from mixer.errors import UserError, check_number, exit_code, line_of


def parse(argv: list[str]) -> list[str]:
    """Parses flags; returns the other arguments.

    Raises:
      UserError: an unknown flag, or a value that the flag does not accept.
    """
    check_values(argv)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error


def check_values(argv: Sequence[str]) -> None:
    """Raises UserError where a flag lacks its value and the next flag follows."""
    for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=""):
        if argument == "--":
            return
        name, equals, value = argument.lstrip("-").partition("=")
        if not equals and name in flags.FLAGS and not flags.FLAGS[name].boolean:
            value = following
        if argument.startswith("-") and value.startswith("--"):
            raise UserError(f"--{name} lacks its value: {value} follows; expected --{name}=VALUE")


def numbers(
    flag: str, texts: Sequence[str] | None, kind: type = int, *, least: float = 0
) -> list[int] | list[float]:
    """The numbers of a list flag; [] where it is not given.

    Args:
      flag: its name, for messages.
      texts: its value.
      kind: int or float.
      least: the least accepted number; whole numbers end at 2**31 - 1.

    Raises:
      UserError: the flag is empty, or has something else.
    """
    if texts is None:
        return []
    what = "whole numbers" if kind is int else "numbers"
    if not texts:
        raise UserError(f"--{flag} is empty; expected {what}, joined by commas")
    values = []
    for text in texts:
        try:
            values.append(kind(text))
        except ValueError:
            raise UserError(f"--{flag}={text}; expected {what}, joined by commas") from None
        check_number(
            f"--{flag}", values[-1], minimum=least, limit=2**31 if kind is int else math.inf
        )
    return values


def run(
    main: Callable[[Sequence[str]], None],
    parse: Callable[[list[str]], list[str]] = parse,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Parses the flags and runs `main(arguments)`.

    A user's mistake or a failure of the machine ends in one line and code 2, Ctrl-C in one line and
    code 130.

    Args:
      main: the program.
      parse: returns the arguments of the command line that are no flags.
      tell: receives the line too, or the exception that ends the program.
    """
    name = interrupts.program_name()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be of any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.set_verbosity(logging.FATAL)  # what matters is raised, and told in one line
    interrupts.raise_interrupt()
    try:
        try:
            app.run(main, flags_parser=parse)
        finally:
            interrupts.leave_at_once()  # JAX and others clean up now
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(error, "exit_code"):  # signals.Stopped, which has told the user
            sys.exit(error.exit_code)
        line, code = line_of(error), exit_code(error)
        # A library may have made another exception of KeyboardInterrupt.
        if isinstance(error, KeyboardInterrupt) or interrupts.was_raised():
            line, code = "interrupted", interrupts.CODE
        if line is None:
            tell(f"{type(error).__name__}: {error}")
            raise
        line = "\\n".join(line.splitlines())  # a name on the command line may have several
        print(f"{name}: {line}", file=sys.stderr, flush=True)
        tell(line)
        sys.exit(code)
