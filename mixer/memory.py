"""Manages host memory: keeps freed blocks for reuse, and checks that allocations fit."""

import ctypes
import glob
import math
import os
import re
import sys

from mixer.errors import UserError

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


class NoRoomError(UserError):
    """An allocation needs more memory than is free on the host."""


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, on Linux without an accelerator.

    On a CPU, XLA allocates its buffers with malloc in every step. By default glibc returns large
    freed blocks to the kernel, which zeroes their pages in the next step; this takes a fifth to a
    half of a training step (docs/performance.md). If the user has set a variable of glibc's malloc,
    this function does nothing.
    """
    if not keeps_freed_memory():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_TOP_PAD, 256 << 20)


def give_back_freed_memory() -> None:
    """Makes glibc return kept memory to the system, for use by other processes."""
    if not keeps_freed_memory():
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def compute_in_the_calling_thread() -> None:
    """Makes JAX's CPU client compute in the calling thread; call it before the first computation.

    glibc keeps blocks above 64 MiB only for the main thread, and returns those of other threads to
    the system in any case. Asynchronous dispatch gains nothing on a CPU.
    """
    if keeps_freed_memory():
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def keeps_freed_memory() -> bool:
    """Returns whether this process keeps freed memory."""
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return sys.platform == "linux" and not is_set and not any(map(glob.glob, _ACCELERATORS))


def threads_for_simulated_devices() -> None:
    """Makes XLA start enough threads if XLA_FLAGS simulates several devices on one CPU.

    Each device's program blocks a thread while it waits for the other devices. XLA starts only as
    many threads as there are devices, so one additional task could cause a deadlock.
    """
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    if devices := re.search(flag, os.environ.get("XLA_FLAGS", "")):
        os.environ.setdefault("NPROC", str(2 * int(devices[1]) + (os.cpu_count() or 1)))


def check_room(num_bytes: int, subject: str, *, on_host: bool = False) -> None:
    """Raises NoRoomError if `num_bytes` of host memory are not free.

    An accelerator's allocator reports a lack of memory, but the kernel would kill the process on
    the host without a message.

    Args:
      num_bytes: bytes that are needed.
      subject: what needs them, for the message.
      on_host: whether the bytes are on the host even if there is an accelerator.
    """
    import jax
    import psutil

    free = psutil.virtual_memory().available
    if num_bytes > free and (on_host or jax.default_backend() == "cpu"):
        raise NoRoomError(
            f"{subject} needs {num_bytes / 1e9:,.1f} GB of memory; {free / 1e9:,.1f} GB are free"
        )


def check_batch(
    key: str,
    batch_size: int,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    prefetch_batches: int,
) -> None:
    """Raises NoRoomError if batches need more host memory than is free.

    Activations, which depend on the compiled program, are not included.

    Args:
      key: config key of the batch size, for the message.
      batch_size: number of images in a batch, over all processes.
      image_shape: (H, W, channels) of the images.
      num_classes: number of classes of the labels.
      prefetch_batches: number of prefetched batches besides the current one.
    """
    import jax

    values = math.prod(image_shape)
    num_bytes = values * (prefetch_batches + 1)
    if jax.default_backend() == "cpu":  # the model's inputs: float32 images and dense labels
        num_bytes += 4 * (values + num_classes)
    height, width, _ = image_shape
    images = f"a batch of {height} x {width} images with {prefetch_batches} prefetched"
    subject = f"{key}={batch_size}: {images}"
    check_room(num_bytes * batch_size // jax.process_count(), subject, on_host=True)
