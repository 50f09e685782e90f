"""Ctrl-C as one line and exit code 130, whenever it comes; imports nothing that takes time.

What it does depends on when it comes. While a program starts and once it has ended, nothing can be
lost: the process leaves at once. In between it raises KeyboardInterrupt, so that files and child
processes are cleaned up; but during an import it leaves at once there too, because an extension
module that is interrupted while it initializes reports another error, or crashes the interpreter.
"""

import os
import signal
import sys
import types

CODE = 128 + signal.SIGINT
# JAX's callback in the garbage collector: what is raised there is printed and forgotten.
_SWALLOWING = "_xla_gc_callback"

_raised = False
_hook = sys.unraisablehook


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process without any clean-up."""
    signal.signal(signal.SIGINT, _leave)


def raise_interrupt() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt where that can be done."""
    global _raised, _hook
    _raised = False
    signal.signal(signal.SIGINT, _interrupt)
    if sys.unraisablehook is not _again:
        _hook, sys.unraisablehook = sys.unraisablehook, _again


def was_raised() -> bool:
    """Whether Ctrl-C has raised KeyboardInterrupt, which may arrive as another exception."""
    return _raised


def program_name() -> str:
    """What was started: "train.py" or "mixer.tools.predict"."""
    if sys.argv[0] == "-m":  # Python still looks for the module
        return sys.orig_argv[sys.orig_argv.index("-m") + 1]
    spec = sys.modules["__main__"].__spec__
    return os.path.basename(sys.argv[0]) if spec is None else spec.name.removesuffix(".__main__")


def _leave(signum: int, frame: types.FrameType | None) -> None:
    del signum, frame
    os.write(2, f"{program_name()}: interrupted\n".encode())
    os._exit(CODE)


def _interrupt(signum: int, frame: types.FrameType | None) -> None:
    global _raised
    place = frame
    while place is not None:
        if place.f_code.co_filename.startswith("<frozen importlib"):
            _leave(signum, frame)
        if place.f_code.co_name == _SWALLOWING:
            _later()
            return
        place = place.f_back
    _raised = True
    raise KeyboardInterrupt


def _later() -> None:
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _again(unraisable) -> None:
    """Raises an interrupt again that a destructor or a callback could not pass on."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _later()
    else:
        _hook(unraisable)
