"""Freed memory is kept, on CPU hosts: XLA there takes its buffers anew from malloc every step."""

import ctypes
import os
import sys

import jax

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, where the computation runs on the CPU under Linux.

    By default glibc hands large freed blocks back to the system, which clears them page by page at
    the next step: half of the time of a small Mixer's step (docs/performance.md). Whoever sets one
    of glibc's own variables (MALLOC_TRIM_THRESHOLD_=131072, say) decides for himself, and nothing
    is done here.
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 256 << 20)
