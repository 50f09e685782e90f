"""Sets up the environment of every program, and ends it after an error or a signal."""

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
# Hide the start-up notices of TensorFlow and XLA; this must precede their import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# By default TensorFlow imports Keras, which imports scikit-learn and matplotlib; this takes a third
# of TensorFlow's import time. Legacy Keras is imported only when it is used.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

from absl import app, flags, logging

from mixer.errors import UserError, check_number, exit_code, line_of


def parse(argv: list[str]) -> list[str]:
    """Parses flags; returns the other arguments.

    Raises:
      UserError: a flag is unknown, or does not accept its value.
    """
    check_values(argv)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error


def check_values(argv: Sequence[str]) -> None:
    """Raises UserError if a flag lacks its value and another flag follows."""
    for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=""):
        if argument == "--":
            return
        name, equals, value = argument.lstrip("-").partition("=")
        if not equals and name in flags.FLAGS and not flags.FLAGS[name].boolean:
            value = following
        if argument.startswith("-") and value.startswith("--"):
            raise UserError(f"--{name} has no value: {value} follows it; expected --{name}=VALUE")


def numbers(
    flag: str, texts: Sequence[str] | None, kind: type = int, *, least: float = 0
) -> list[int] | list[float]:
    """Returns the numbers of a list flag; [] if it is not set.

    Args:
      flag: name of the flag, for messages.
      texts: value of the flag.
      kind: int or float.
      least: the smallest accepted number; the largest accepted int is 2**31 - 1.

    Raises:
      UserError: the list is empty, or has an invalid number.
    """
    if texts is None:
        return []
    expected = f"{'whole ' * (kind is int)}numbers, separated by commas"
    if not texts:
        raise UserError(f"--{flag} is empty; expected {expected}")
    values = []
    for text in texts:
        try:
            values.append(kind(text))
        except ValueError:
            raise UserError(f"--{flag}={text}; expected {expected}") from None
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

    After a user's mistake or a failure of the machine the program prints one line and exits with
    code 2; after Ctrl-C it prints one line and exits with code 130.

    Args:
      main: the program.
      parse: parses the flags of the command line and returns the other arguments.
      tell: called with the printed line, or with a description of any other exception.
    """
    name = interrupts.program_name()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may contain any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.set_verbosity(logging.FATAL)  # errors are raised, and printed in one line below
    interrupts.raise_interrupt()
    try:
        try:
            app.run(main, flags_parser=parse)
        finally:
            interrupts.leave_at_once()  # do not interrupt the clean-up of JAX and other libraries
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(error, "exit_code"):  # signals.Stopped; the user has seen a line
            sys.exit(error.exit_code)
        line, code = line_of(error), exit_code(error)
        # A library may have replaced KeyboardInterrupt by another exception.
        if isinstance(error, KeyboardInterrupt) or interrupts.was_raised():
            line, code = "interrupted", interrupts.CODE
        if line is None:
            tell(f"{type(error).__name__}: {error}")
            raise
        line = "\\n".join(line.splitlines())  # an argument may contain line breaks
        print(f"{name}: {line}", file=sys.stderr, flush=True)
        tell(line)
        sys.exit(code)
