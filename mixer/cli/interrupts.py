"""Makes Ctrl-C print one line and exit with code 130 at any time; imports no slow module.

While a program starts, and after it has ended, nothing can be lost, so Ctrl-C exits at once. While
the program runs, Ctrl-C raises KeyboardInterrupt, so that files and child processes are cleaned up.
An exception is an import: Ctrl-C exits at once, because an extension module that is interrupted
during its initialization raises another error or crashes the interpreter.
"""

import os
import signal
import sys
import types

CODE = 128 + signal.SIGINT
# JAX's callback in the garbage collector; Python only prints exceptions that it raises.
_GC_CALLBACK = "_xla_gc_callback"

_raised = False
_hook = sys.unraisablehook


def leave_at_once() -> None:
    """Makes Ctrl-C end the process without any clean-up."""
    signal.signal(signal.SIGINT, _leave)


def raise_interrupt() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt, except in imports and in JAX's callback."""
    global _raised, _hook
    _raised = False
    signal.signal(signal.SIGINT, _interrupt)
    if sys.unraisablehook is not _unraisable_hook:
        _hook, sys.unraisablehook = sys.unraisablehook, _unraisable_hook


def was_raised() -> bool:
    """Returns whether Ctrl-C has raised KeyboardInterrupt, which a library may have replaced."""
    return _raised


def program_name() -> str:
    """Returns the name of the program, such as "train.py" or "mixer.tools.predict"."""
    if sys.argv[0] == "-m":  # Python has not found the module yet
        return sys.orig_argv[sys.orig_argv.index("-m") + 1]
    spec = sys.modules["__main__"].__spec__
    return os.path.basename(sys.argv[0]) if spec is None else spec.name.removesuffix(".__main__")


def _leave(signum: int, frame: types.FrameType | None) -> None:
    del signum, frame
    os.write(2, f"{program_name()}: interrupted\n".encode())
    os._exit(CODE)


def _interrupt(signum: int, frame: types.FrameType | None) -> None:
    global _raised
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            _leave(signum, frame)
        if caller.f_code.co_name == _GC_CALLBACK:
            _interrupt_later()
            return
        caller = caller.f_back
    _raised = True
    raise KeyboardInterrupt


def _interrupt_later() -> None:
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _unraisable_hook(unraisable: "sys.UnraisableHookArgs") -> None:
    """Raises an interrupt again that a destructor or a callback could not propagate."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _interrupt_later()
    else:
        _hook(unraisable)
