"""Memory of CPU hosts: freed blocks are kept, and what cannot fit is refused."""

import ctypes
import glob
import os
import re
import sys

from mixer.errors import UserError

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


class NoRoomError(UserError):
    """Something takes more of the host's memory than is free."""


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, under Linux and where there is no accelerator.

    XLA there takes its buffers anew from malloc every step. By default glibc hands large freed
    blocks back to the system, which clears them page by page at the next step: a fifth to a half of
    a training step's time (docs/performance.md). Whoever sets one of glibc's own variables has
    decided for himself, and nothing is done here.
    """
    if not keeps():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_TOP_PAD, 256 << 20)


def give_back_freed_memory() -> None:
    """Has glibc hand back at once what it was told to keep; others need it now."""
    if not keeps():
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def compute_in_the_calling_thread() -> None:
    """Has JAX's CPU client compute in the thread that calls it; before its first computation.

    glibc keeps blocks above 64 MiB of the thread alone that the program started with; for others
    it hands them back to the system whatever is set. A CPU gains nothing from being asked ahead.
    """
    if keeps():
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def keeps() -> bool:
    """Whether freed memory is kept here."""
    decided = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return sys.platform == "linux" and not decided and not any(map(glob.glob, _ACCELERATORS))


def threads_for_simulated_devices() -> None:
    """Has XLA start enough threads where XLA_FLAGS makes several devices of one CPU.

    Each device's program waits in a thread for those of the others. XLA starts as many threads as
    there are devices, so that one more task at a wrong moment would make all wait for ever.
    """
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    if devices := re.search(flag, os.environ.get("XLA_FLAGS", "")):
        os.environ.setdefault("NPROC", str(2 * int(devices[1]) + (os.cpu_count() or 1)))


def check_room(num_bytes: int, what: str, *, on_host: bool = False) -> None:
    """Raises NoRoomError where `what` takes more memory than is free, and it is the host's.

    An accelerator's own allocator says so itself; a host would be killed without a word.

    Args:
      num_bytes: that it takes.
      what: it is, for the message.
      on_host: whether the host takes them even if there is an accelerator.
    """
    import jax
    import psutil

    free = psutil.virtual_memory().available
    if num_bytes > free and (on_host or jax.default_backend() == "cpu"):
        raise NoRoomError(
            f"{what} takes {num_bytes / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free"
        )


def check_batch(
    key: str, batch_size: int, *, side: int, num_classes: int, prefetch_batches: int
) -> None:
    """Raises NoRoomError where batches take more of the host's memory than is free.

    Activations, which depend on the compiled program, come on top.

    Args:
      key: of the config, for the message.
      batch_size: images of a batch, over all processes.
      side: of the images in pixels.
      num_classes: that their labels are over.
      prefetch_batches: on their way besides the one that is computed.
    """
    import jax

    values = 3 * side**2
    num_bytes = values * (prefetch_batches + 1)
    if jax.default_backend() == "cpu":  # what the model takes: float32, and dense labels
        num_bytes += 4 * (values + num_classes)
    what = f"{key}={batch_size}: a batch of images of {side} x {side}, {prefetch_batches} ahead,"
    check_room(num_bytes * batch_size // jax.process_count(), what, on_host=True)
