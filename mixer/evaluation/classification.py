"""Predictions of a model for every image of a split, and the metrics computed from them.

For an image with several labels, a guess of any of them is a hit; an image without labels counts
only in the loss, as in ImageNet-ReaL (Beyer et al., 2020, arXiv 2006.07159).
"""

import collections
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mixer import files, memory
from mixer.data.prefetch import prefetch
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import scores
from mixer.evaluation.evaluator import Batching, Evaluator, Setup
from mixer.models import layers
from mixer.parallel import sharding
from mixer.training import losses
from mixer.training.step import make_predict


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions for n images, in the order of the split.

    Attributes:
      label: (n,) int32, the label; -1 for an image with several labels or none.
      labelled: (n,) bool, whether the image has a label.
      guesses: (n, min(5, K)) int32 classes, the most probable first.
      probability: (n,) float32, probability of the first guess: softmax, or sigmoid if the loss is
        the sigmoid loss.
      hit: (n,) bool, whether the first guess is a label.
      hit5: (n,) bool, whether any of the guesses is a label.
      loss: (n,) float32.
    """

    label: np.ndarray
    labelled: np.ndarray
    guesses: np.ndarray
    probability: np.ndarray
    hit: np.ndarray
    hit5: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Classification:
    """The result for one split. Accuracies are in 0..1; intervals are (low, high) at 95 %.

    Attributes:
      count: number of examples.
      labelled: number of examples that have a label.
      correct: number of labelled examples whose first guess is a hit.
      top1, top5: accuracy on the labelled examples; top5 counts a hit among the first min(5, K)
        guesses.
      top1_interval, top5_interval: Wilson score intervals.
      loss: mean training loss over all examples.
      ece: expected calibration error of the first guess, with 15 bins.
      mean_per_class, mean_per_class_interval: mean of the per-class accuracies over the classes
        present in the split, and its interval; None if images have several labels.
      per_class: (K,) accuracy on the images of each class, over images with exactly one label; NaN
        for a class that is not in the split.
      predictions: the predictions that the metrics are computed from.
    """

    count: int
    labelled: int
    correct: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    loss: float
    ece: float
    mean_per_class: float | None
    mean_per_class_interval: tuple[float, float] | None
    per_class: np.ndarray
    predictions: Predictions

    @functools.cached_property
    def confusion(self) -> np.ndarray:
        """(K, K) numbers of images by label and first guess, over images with exactly one label.

        Raises:
          NoRoomError: the matrix does not fit into memory.
        """
        count = len(self.per_class)
        memory.check_room(8 * count**2, f"a confusion matrix of {count:,} classes", on_host=True)
        return scores.confusion(self.predictions.label, self.predictions.guesses[:, 0], count)

    def summary(self) -> dict[str, Any]:
        """The metrics and intervals as JSON."""
        large_fields = ("per_class", "predictions")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name not in large_fields}


def summarize(predictions: Predictions, num_classes: int) -> Classification:
    """Computes the metrics of predictions over `num_classes` classes."""
    p = predictions
    labelled = int(p.labelled.sum())
    correct, correct5 = int(p.hit.sum()), int(p.hit5.sum())
    hits, counts = scores.per_class(p.label, p.hit, num_classes)
    with np.errstate(invalid="ignore"):
        accuracies = hits / counts
    mean, mean_interval = None, None
    # Per-class accuracy is undefined if an image has several labels.
    if np.all((p.label >= 0) == p.labelled) and labelled > 0:
        mean, mean_interval = scores.mean_per_class(hits, counts)
    return Classification(
        count=len(p.loss),
        labelled=labelled,
        correct=correct,
        top1=correct / max(labelled, 1),
        top1_interval=scores.interval(correct, labelled),
        top5=correct5 / max(labelled, 1),
        top5_interval=scores.interval(correct5, labelled),
        loss=float(np.mean(p.loss, dtype=np.float64)),
        ece=scores.calibration_error(p.probability[p.labelled], p.hit[p.labelled]),
        mean_per_class=mean,
        mean_per_class_interval=mean_interval,
        per_class=accuracies,
        predictions=p,
    )


def make_eval_step(predict: Callable, loss_fn: Callable, num_classes: int) -> Callable:
    """Returns the compiled evaluation step `(params, batch) -> columns`.

    The columns are the fields of `Predictions` and "index", the index of each image in the split,
    or -1 for padding.
    """
    options = layers.compiler_options(jax.default_backend())

    @functools.partial(jax.jit, compiler_options=options)
    def eval_step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = predict(params, batch["image"])
        labels = losses.dense_labels(batch, num_classes)
        best, guesses = jax.lax.top_k(logits, min(5, num_classes))
        probability = jnp.exp(best[:, 0] - jax.nn.logsumexp(logits, axis=-1))
        if loss_fn is losses.sigmoid:
            probability = jax.nn.sigmoid(best[:, 0])
        is_label = labels > _threshold(batch, labels)
        hits = jnp.take_along_axis(is_label, guesses, axis=1)
        has_one_label = jnp.sum(is_label, axis=1) == 1
        return {
            "index": batch["index"],
            "label": jnp.where(has_one_label, jnp.argmax(is_label, axis=1), -1).astype(jnp.int32),
            "labelled": jnp.any(is_label, axis=1),
            "guesses": guesses,
            "probability": probability,
            "hit": hits[:, 0],
            "hit5": hits.any(axis=1),
            "loss": loss_fn(logits, labels),
        }

    return eval_step


def _threshold(batch: dict[str, jax.Array], labels: jax.Array) -> jax.Array | float:
    """Returns the value that the targets of labels exceed.

    It is the minimum of each row if the batch has dense targets, because the `one_hot` op can give
    a positive target to the other classes; else it is 0.
    """
    if jnp.issubdtype(batch["label"].dtype, jnp.floating):
        return jnp.min(labels, axis=1, keepdims=True)
    return 0.0


class SplitEvaluator(Evaluator):
    """Evaluates the accuracy on a split after the updates at which validation is due."""

    section = "splits"

    def __init__(self, name: str, split: Split, setup: Setup, eval_step: Callable):
        """Takes the compiled evaluation step of the run, which all splits share.

        Args:
          name: name of the data, such as "val" or "imagenet_real".
          split: the split.
          setup: the settings of the run.
          eval_step: the function that `make_eval_step` returns.
        """
        super().__init__(name, setup)
        self.name, self.key = name, f"{name}/top1"
        self._split, self._eval_step = split, eval_step

    def evaluate(self, params: Any, should_stop: Callable[[], bool]) -> Classification | None:
        """Evaluates one set of parameters, as `Evaluator.evaluate` specifies."""
        return evaluate(
            self._eval_step,
            params,
            self._split,
            batching=self._setup.batching,
            should_stop=should_stop,
        )

    def metrics(self, result: Classification) -> dict[str, float]:
        """Returns all numbers of the summary."""
        summary = result.summary()
        return {key: value for key, value in summary.items() if isinstance(value, int | float)}

    def line(self, result: Classification, suffix: str) -> str:
        """Returns the accuracies and the loss."""
        title = {"val": "validation"}.get(self.name, self.name) + " (average)" * bool(suffix)
        return (
            f"{title} accuracy {result.top1:.2%} ({result.correct:,} of {result.labelled:,}), "
            f"top-5 {result.top5:.2%}, loss {result.loss:.4f}"
        )


def evaluate(
    eval_step: Callable,
    params: Any,
    split: Split,
    *,
    batching: Batching,
    should_stop: Callable[[], bool] = lambda: False,
) -> Classification | None:
    """Evaluates `params` on all examples of `split`; returns None if `should_stop` returned True.

    On several hosts each process computes a part, and all processes return the complete result.

    Raises:
      UserError: the logits are not finite.
      RuntimeError: an example of the split was evaluated twice or not at all.
    """
    columns = collect(eval_step, params, split, batching=batching, should_stop=should_stop)
    if columns is None:
        return None
    predictions = Predictions(**columns)
    is_bad = ~(np.isfinite(predictions.probability) & np.isfinite(predictions.loss))
    if is_bad.any():
        raise UserError(
            f"{split.name}: the logits of {int(is_bad.sum()):,} images are not finite, first for "
            f"{split.example_id(int(is_bad.argmax()))}; the weights are damaged or have diverged"
        )
    return summarize(predictions, len(split.class_names))


def evaluate_model(
    model: nn.Module, params: Any, split: Split, *, loss: str, batching: Batching
) -> Classification:
    """Evaluates a model on one split, with an evaluation step that is compiled for this call only.

    Args:
      model: the model.
      params: parameters of the model.
      split: the split; all its examples are evaluated.
      loss: "softmax" or "sigmoid".
      batching: the batches of images.

    Raises:
      UserError: the logits are not finite.
    """
    predict = make_predict(model, batching.mesh)
    step = make_eval_step(predict, losses.make_loss(loss), model.num_classes)
    return evaluate(step, params, split, batching=batching)


def collect(
    step: Callable,
    params: Any,
    split: Split,
    *,
    batching: Batching,
    should_stop: Callable[[], bool],
) -> dict[str, np.ndarray] | None:
    """Collects the output of `step` for every example of a split.

    Args:
      step: compiled function from parameters and a batch to columns (N, ...), including "index".
      params: first argument of `step`.
      split: the split; its examples are read in order, with "index" and "mask" in each batch.
      batching: the batches of images.
      should_stop: called after every batch; must return True at the same batch on all processes.

    Returns:
      The columns as arrays (n, ...) in the order of the split, on every process; None if
      `should_stop` returned True.

    Raises:
      RuntimeError: an example was evaluated twice or not at all.
    """
    mesh, global_batch_size = batching.mesh, batching.global_batch_size
    if split.example_spec["image"][0][0] is not None:
        memory.check_batch(
            "eval_batch_size",
            global_batch_size,
            image_shape=split.example_spec["image"][0],
            num_classes=len(split.class_names),
            prefetch_batches=batching.prefetch_batches,
        )
    index, count = sharding.data_processes(mesh)
    batches = split.eval_batches(
        global_batch_size=global_batch_size, process_index=index, process_count=count
    )
    stream = prefetch(batches, lambda b: sharding.put_batch(b, mesh), batching.prefetch_batches)
    result: dict[str, np.ndarray] = {}
    visits = np.zeros(split.num_examples, np.int64)
    for columns in _lagging(step(params, batch) for batch in stream):
        if jax.process_count() > 1:
            columns = multihost_utils.process_allgather(columns, tiled=True)
        columns = jax.device_get(columns)
        index = columns.pop("index")
        is_example = index >= 0  # padding has the index -1
        np.add.at(visits, index[is_example], 1)
        for name, values in columns.items():
            if name not in result:
                result[name] = np.empty((split.num_examples, *values.shape[1:]), values.dtype)
            result[name][index[is_example]] = values[is_example]
        if should_stop():
            return None
    if not np.all(visits == 1):
        raise RuntimeError(
            f"{split.name}: of {len(visits):,} examples {int(np.sum(visits == 0)):,} were not "
            f"evaluated and {int(np.sum(visits > 1)):,} were evaluated twice"
        )
    return result


def write_predictions(path: Any, predictions: Predictions, split: Split) -> None:
    """Writes the arrays of `Predictions` to an npz file, atomically.

    The file also has "id", the names of the images as in messages and exclusion lists, and
    "class_names".
    """
    ids = np.array([split.example_id(index) for index in range(split.num_examples)], np.str_)
    fields = dataclasses.fields(predictions)
    columns = {field.name: getattr(predictions, field.name) for field in fields}
    buffer = io.BytesIO()  # np.savez seeks, and files of an object store cannot be rewritten
    np.savez(buffer, id=ids, class_names=np.array(split.class_names, np.str_), **columns)
    with files.atomic_write(path) as new:
        new.write_bytes(buffer.getvalue())


def _lagging(results: Iterator[Any]) -> Iterator[Any]:
    """Yields results with a delay of two, so that the device is busy while a result is fetched."""
    pending: collections.deque[Any] = collections.deque()
    for result in results:
        pending.append(result)
        if len(pending) > 2:
            yield pending.popleft()
    yield from pending
