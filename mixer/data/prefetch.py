"""Batches that are made and sent to the device ahead of time."""

import collections
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


def prefetch(
    batches: Iterator[Mapping[str, np.ndarray]],
    put: Callable[[Mapping[str, np.ndarray]], Any],
    depth: int,
) -> Iterator[Any]:
    """Keeps `depth` batches on their way to the device, made and sent by a thread of their own.

    The thread starts at once and ends with the iterator.

    Args:
      batches: made by the thread, one after the other.
      put: sends a batch to the device.
      depth: batches that are made before they are asked for.

    Returns:
      What `put` returns for each batch, in order; an exception of the thread is raised in its turn.
    """
    end = object()

    def fetch() -> Any:
        batch = next(batches, end)
        return batch if batch is end else put(batch)

    thread = ThreadPoolExecutor(1, "prefetch")
    pending = collections.deque(thread.submit(fetch) for _ in range(depth))

    def results() -> Iterator[Any]:
        try:
            while (batch := pending.popleft().result()) is not end:
                pending.append(thread.submit(fetch))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)

    return results()
