"""Top-1, top-5 and loss over a whole split, every example counted once.

Of images with several labels a guess that is any of them is a hit; an image without labels counts
in the loss alone, as in ImageNet-ReaL (Beyer et al., 2020, arXiv 2006.07159).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixer import losses, sharding
from mixer.data import pipeline


@dataclasses.dataclass(frozen=True)
class Classification:
    """Result over one split.

    Attributes:
      count: number of examples. labelled: how many of them have a label.
      correct: how many of these the first guess hit.
      top1, top5: shares of them in 0..1; top5 counts a hit among the first min(5, K) guesses.
      loss: mean of the training loss over all.
    """

    count: int
    labelled: int
    correct: int
    top1: float
    top5: float
    loss: float


def make_eval_step(predict: Callable, loss_fn: Callable, num_classes: int) -> Callable:
    """Returns the compiled `(params, batch) -> (5,)` sums over a batch.

    They are: examples, those with a label, top-1 hits, top-5 hits, losses.
    """

    @jax.jit
    def eval_step(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits, mask = predict(params, batch["image"]), batch["mask"]
        labels = losses.dense_labels(batch, num_classes)
        _, guesses = jax.lax.top_k(logits, min(5, num_classes))
        hits = jnp.take_along_axis(labels, guesses, axis=1) > _threshold(batch, labels)
        columns = (
            jnp.ones_like(mask),
            jnp.any(labels > 0, axis=1),
            hits[:, 0],
            hits.any(axis=1),
            loss_fn(logits, labels),
        )
        return jnp.stack([jnp.sum(jnp.where(mask > 0, column, 0)) for column in columns])

    return eval_step


def _threshold(batch: dict[str, jax.Array], labels: jax.Array) -> jax.Array | float:
    """What the target of a label exceeds: 0, or half the row's largest where rows come dense.

    `one_hot` may leave something for the other classes, which makes them no labels.
    """
    if jnp.issubdtype(batch["label"].dtype, jnp.floating):
        return jnp.max(labels, axis=1, keepdims=True) / 2
    return 0.0


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
    total = np.zeros(5)
    for sums in _lagging(eval_step(params, batch) for batch in stream):
        total += jax.device_get(sums).astype(np.float64)
        if should_stop():
            return None
    count = round(total[0])
    if count != split.num_examples:
        raise RuntimeError(f"{split.name}: {count} examples counted of {split.num_examples}")
    labelled = round(total[1])
    return Classification(
        count=count,
        labelled=labelled,
        correct=round(total[2]),
        top1=total[2] / max(labelled, 1),
        top5=total[3] / max(labelled, 1),
        loss=total[4] / count,
    )


def _lagging(results: Iterator[jax.Array]) -> Iterator[jax.Array]:
    """Hands results out two late, so that the device is never idle while one is fetched."""
    pending: collections.deque[jax.Array] = collections.deque()
    for result in results:
        pending.append(result)
        if len(pending) > 2:
            yield pending.popleft()
    yield from pending
