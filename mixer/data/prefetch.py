"""Makes batches and sends them to the device ahead of time."""

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
    """Makes batches and sends them to the device in a thread, `depth` batches ahead.

    The thread starts immediately and ends with the iterator.

    Args:
      batches: the batches; only the thread advances this iterator.
      put: sends a batch to the device.
      depth: number of batches that are made before they are requested.

    Returns:
      The results of `put` in order. An exception in the thread is raised in place of its batch.
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
