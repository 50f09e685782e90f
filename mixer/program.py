"""What every program shares: its environment, and how a mistake or a signal ends it."""

import errno
import io
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence

from mixer import memory

memory.keep_freed_memory()
memory.threads_for_simulated_devices()
# Before TensorFlow or XLA is loaded: their start-up notices are not for the user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# TensorFlow imports Keras, and that scikit-learn and matplotlib: a third of its time. The Keras
# asked for here is looked for when somebody uses it, which TensorBoard alone does (metrics.py).
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

from absl import app, flags, logging

from mixer.errors import UserError


def parse(argv: list[str]) -> list[str]:
    """Parses flags; returns what is left.

    Raises:
      UserError: a flag that is not there, or a value that is not accepted.
    """
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error


def run(
    main: Callable[[Sequence[str]], None], parse: Callable[[list[str]], list[str]] = parse
) -> None:
    """Parses the flags and runs `main(arguments)`; a user's mistake ends in one line, code 2."""
    name = os.path.basename(sys.argv[0])
    if name == "__main__.py" or sys.modules["__main__"].__spec__ is not None:
        name = sys.modules["__main__"].__spec__.name
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be of any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.set_verbosity(logging.FATAL)  # what matters is raised, and told in one line
    signal.signal(signal.SIGINT, interrupt)
    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        _end(name, str(error), 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        _end(name, f"{error.strerror}: {error.filename or 'while writing'}", 2)
    except KeyboardInterrupt:
        _end(name, "interrupted", 128 + signal.SIGINT)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        sys.exit(code)


def interrupt(signum: int, frame: types.FrameType | None) -> None:
    """Raises KeyboardInterrupt, a moment later where it would be lost.

    JAX has a callback in the garbage collector, and what is raised there is printed and forgotten.
    """
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _end(name: str, message: str, code: int) -> None:
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
