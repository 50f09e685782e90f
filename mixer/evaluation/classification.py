"""Top-1, top-5 and loss over a whole split, every example counted once."""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixer import sharding
from mixer.data import pipeline


@dataclasses.dataclass(frozen=True)
class Classification:
    """Result over one split.

    Attributes:
      count: number of examples. correct: how many of them the first guess hit.
      top1, top5: shares in 0..1; top5 counts a hit among the first min(5, K) guesses.
      loss: mean of the training loss.
    """

    count: int
    correct: int
    top1: float
    top5: float
    loss: float


def make_eval_step(predict: Callable, loss_fn: Callable, num_classes: int) -> Callable:
    """Returns the compiled `(params, batch) -> (count, top-1 hits, top-5 hits, sum of losses)`."""

    @jax.jit
    def eval_step(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits, label, mask = predict(params, batch["image"]), batch["label"], batch["mask"]
        _, guesses = jax.lax.top_k(logits, min(5, num_classes))
        hits = guesses == label[:, None]
        loss = loss_fn(logits, jax.nn.one_hot(label, num_classes))
        columns = (jnp.ones_like(mask), hits[:, 0], hits.any(-1), loss)
        return jnp.stack([jnp.sum(jnp.where(mask > 0, column, 0)) for column in columns])

    return eval_step


def evaluate(
    eval_step: Callable,
    params: Any,
    split: pipeline.Split,
    *,
    global_batch_size: int,
    mesh: Mesh,
    prefetch_batches: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Classification | None:
    """Evaluates `params` on the whole of `split`; None where `should_stop` ended it early.

    Raises:
      RuntimeError: the examples counted are not the size of the split.
    """
    batches = pipeline.eval_batches(
        split,
        global_batch_size=global_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    stream = sharding.prefetch(batches, lambda b: sharding.put_batch(b, mesh), prefetch_batches)
    total = np.zeros(4)
    for sums in _lagging(eval_step(params, batch) for batch in stream):
        total += jax.device_get(sums).astype(np.float64)
        if should_stop():
            return None
    count = round(total[0])
    if count != split.num_examples:
        raise RuntimeError(f"{split.name}: {count} examples counted of {split.num_examples}")
    return Classification(
        count=count,
        correct=round(total[1]),
        top1=total[1] / count,
        top5=total[2] / count,
        loss=total[3] / count,
    )


def _lagging(results: Iterator[jax.Array]) -> Iterator[jax.Array]:
    """Hands results out two late, so that the device is never idle while one is fetched."""
    pending: collections.deque[jax.Array] = collections.deque()
    for result in results:
        pending.append(result)
        if len(pending) > 2:
            yield pending.popleft()
    yield from pending
