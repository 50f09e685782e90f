"""What a model says of every image of a split, each once, and the figures that come of it.

Of images with several labels a guess that is any of them is a hit; an image without labels counts
in the loss alone, as in ImageNet-ReaL (Beyer et al., 2020, arXiv 2006.07159).
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
from jax.sharding import Mesh

from mixer import files, memory
from mixer.data.prefetch import prefetch
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import scores
from mixer.evaluation.evaluator import Result, Setup, parameter_sets
from mixer.models import layers
from mixer.parallel import sharding
from mixer.training import losses
from mixer.training.step import make_predict


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What was said of n images, in the split's order.

    Attributes:
      label: (n,) int32, the class; -1 where an image has several or none.
      labelled: (n,) bool, whether it has any.
      guesses: (n, min(5, K)) int32 classes, the most probable first.
      probability: (n,) float32 of the first guess: softmax, or sigmoid where that is the loss.
      hit: (n,) bool, whether the first guess is a label.
      hit5: (n,) bool, whether one of the guesses is.
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
    """Result over one split. Shares are in 0..1, intervals (low, high) of 95 %.

    Attributes:
      count: number of examples. labelled: how many of them have a label.
      correct: how many of these the first guess hit.
      top1, top5: shares of them; top5 counts a hit among the first min(5, K) guesses.
      top1_interval, top5_interval: Wilson's.
      loss: mean of the training loss over all.
      ece: expected calibration error of the first guess, in 15 bins.
      mean_per_class: mean over the classes that the split has of the accuracy on their images, and
        its interval, None where images have several labels.
      per_class: (K,) that accuracy, NaN for a class that the split lacks; of the images with one
        label.
      predictions: what all this is made from.
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
        """(K, K) images by label and first guess, of the images with one label.

        Raises:
          NoRoomError: so many classes that it does not fit into memory.
        """
        count = len(self.per_class)
        memory.check_room(8 * count**2, f"a confusion matrix of {count:,} classes", on_host=True)
        return scores.confusion(self.predictions.label, self.predictions.guesses[:, 0], count)

    def summary(self) -> dict[str, Any]:
        """The numbers and intervals, as JSON has them."""
        large = ("per_class", "predictions")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name not in large}


def summarize(predictions: Predictions, num_classes: int) -> Classification:
    """The figures of predictions over `num_classes` classes."""
    p = predictions
    labelled = int(p.labelled.sum())
    correct, correct5 = int(p.hit.sum()), int(p.hit5.sum())
    hits, counts = scores.per_class(p.label, p.hit, num_classes)
    there = counts > 0
    with np.errstate(invalid="ignore"):
        accuracies = hits / counts
    # Where an image has several labels no class is its own.
    single = bool(np.all((p.label >= 0) == p.labelled)) and labelled > 0
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
        mean_per_class=float(accuracies[there].mean()) if single else None,
        mean_per_class_interval=(
            scores.mean_interval(accuracies[there], counts[there]) if single else None
        ),
        per_class=accuracies,
        predictions=p,
    )


def make_eval_step(predict: Callable, loss_fn: Callable, num_classes: int) -> Callable:
    """Returns the compiled `(params, batch) -> columns` of a batch.

    The columns are those of `Predictions` and "index", each image's place in the split, -1 for what
    fills a batch up.
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
        one = jnp.sum(is_label, axis=1) == 1
        return {
            "index": batch["index"],
            "label": jnp.where(one, jnp.argmax(is_label, axis=1), -1).astype(jnp.int32),
            "labelled": jnp.any(is_label, axis=1),
            "guesses": guesses,
            "probability": probability,
            "hit": hits[:, 0],
            "hit5": hits.any(axis=1),
            "loss": loss_fn(logits, labels),
        }

    return eval_step


def _threshold(batch: dict[str, jax.Array], labels: jax.Array) -> jax.Array | float:
    """What the target of a label exceeds: 0, or the row's smallest where rows come dense.

    `one_hot` may leave something for the classes that are no labels.
    """
    if jnp.issubdtype(batch["label"].dtype, jnp.floating):
        return jnp.min(labels, axis=1, keepdims=True)
    return 0.0


class SplitEvaluator:
    """Classifies a whole split, after the updates at which validation is due.

    Attributes:
      name: of the data, such as "val" or "imagenet_real".
      key: of the top-1 accuracy in metrics.jsonl.
    """

    def __init__(self, name: str, split: Split, setup: Setup, eval_step: Callable):
        """Takes the compiled `make_eval_step` of the run, which all splits share."""
        self.name, self.key = name, f"{name}/top1"
        self._split, self._setup, self._eval_step = split, setup, eval_step

    def is_due(self, step: int) -> bool:
        """Whether the split is evaluated after update `step`."""
        return self._setup.is_due(step)

    def run(
        self, params: Any, ema_params: Any | None, should_stop: Callable[[], bool]
    ) -> list[Result] | None:
        """As `Evaluator.run`."""
        results = []
        for weights, suffix, values in parameter_sets(params, ema_params):
            result = evaluate(
                self._eval_step,
                values,
                self._split,
                global_batch_size=self._setup.global_batch_size,
                mesh=self._setup.mesh,
                prefetch_batches=self._setup.prefetch_batches,
                should_stop=should_stop,
            )
            if result is None:
                return None
            results.append(self._result(weights, f"{self.name}{suffix}", result))
        return results

    def _result(self, weights: str, name: str, result: Classification) -> Result:
        summary = result.summary()
        title = {"val": "validation"}.get(self.name, self.name) + " (average)" * (weights == "ema")
        line = (
            f"{title} accuracy {result.top1:.2%} ({result.correct:,} of {result.labelled:,}), "
            f"top-5 {result.top5:.2%}, loss {result.loss:.4f}"
        )
        numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        return Result(
            dataset=self.name,
            weights=weights,
            section="splits",
            name=name,
            metrics={f"{name}/{key}": value for key, value in numbers.items()},
            summary=summary,
            line=line,
        )


def evaluate(
    eval_step: Callable,
    params: Any,
    split: Split,
    *,
    global_batch_size: int,
    mesh: Mesh,
    prefetch_batches: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Classification | None:
    """Evaluates `params` on the whole of `split`; None where `should_stop` ended it early.

    Every process of a run on many hosts computes its part and gets the whole result.

    Raises:
      UserError: the logits are not finite.
      RuntimeError: an example of the split was not seen, or seen twice.
    """
    columns = collect(
        eval_step,
        params,
        split,
        global_batch_size=global_batch_size,
        mesh=mesh,
        prefetch_batches=prefetch_batches,
        should_stop=should_stop,
    )
    if columns is None:
        return None
    predictions = Predictions(**columns)
    bad = ~(np.isfinite(predictions.probability) & np.isfinite(predictions.loss))
    if bad.any():
        raise UserError(
            f"{split.name}: the logits of {int(bad.sum()):,} images are not finite, the first of "
            f"them {split.example_id(int(bad.argmax()))}; the weights are damaged or have diverged"
        )
    return summarize(predictions, len(split.class_names))


def evaluate_model(
    model: nn.Module,
    params: Any,
    split: Split,
    *,
    loss: str,
    mesh: Mesh,
    global_batch_size: int,
    prefetch_batches: int = 2,
) -> Classification:
    """Evaluates a model on one split, where nothing else uses its compiled evaluation step.

    Args:
      model: computes the logits.
      params: of the model.
      split: all of which is evaluated.
      loss: "softmax" or "sigmoid".
      mesh: as for `collect`, like the remaining arguments.
      global_batch_size: images of a step.
      prefetch_batches: batches on their way to the devices.

    Raises:
      UserError: the logits are not finite.
    """
    step = make_eval_step(make_predict(model, mesh), losses.make_loss(loss), model.num_classes)
    return evaluate(
        step,
        params,
        split,
        global_batch_size=global_batch_size,
        mesh=mesh,
        prefetch_batches=prefetch_batches,
    )


def collect(
    step: Callable,
    params: Any,
    split: Split,
    *,
    global_batch_size: int,
    mesh: Mesh,
    prefetch_batches: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray] | None:
    """What `step` says of every example, as arrays (n, ...) in the split's order, on every process.

    Args:
      step: compiled, from parameters and a batch to columns (N, ...), among them "index".
      params: its first argument.
      split: whose examples are read in order, with "index" and "mask" in each batch.
      global_batch_size: images a step, over all devices.
      mesh: of the devices.
      prefetch_batches: batches on their way to the devices.
      should_stop: asked after every batch; None is returned once it says yes, which it does on all
        processes at the same batch.

    Raises:
      RuntimeError: an example was not seen, or seen twice.
    """
    if split.example_spec["image"][0][0] is not None:
        memory.check_batch(
            "eval_batch_size",
            global_batch_size,
            side=max(split.example_spec["image"][0][:2]),
            num_classes=len(split.class_names),
            prefetch_batches=prefetch_batches,
        )
    index, count = sharding.data_processes(mesh)
    batches = split.eval_batches(
        global_batch_size=global_batch_size, process_index=index, process_count=count
    )
    stream = prefetch(batches, lambda b: sharding.put_batch(b, mesh), prefetch_batches)
    result: dict[str, np.ndarray] = {}
    seen = np.zeros(split.num_examples, np.int64)
    for columns in _lagging(step(params, batch) for batch in stream):
        if jax.process_count() > 1:
            columns = multihost_utils.process_allgather(columns, tiled=True)
        columns = jax.device_get(columns)
        index = columns.pop("index")
        there = index >= 0
        np.add.at(seen, index[there], 1)
        for name, values in columns.items():
            if name not in result:
                result[name] = np.empty((split.num_examples, *values.shape[1:]), values.dtype)
            result[name][index[there]] = values[there]
        if should_stop():
            return None
    if not np.all(seen == 1):
        raise RuntimeError(
            f"{split.name}: of {len(seen):,} examples {int(np.sum(seen == 0)):,} were not seen and "
            f"{int(np.sum(seen > 1)):,} were seen twice"
        )
    return result


def write_predictions(path: Any, predictions: Predictions, split: Split) -> None:
    """Writes an npz file of `Predictions`' arrays, whole or not at all.

    Beside them "id" has the images' names, as messages and exclusion lists have them, and
    "class_names" those of the classes.
    """
    ids = np.array([split.example_id(place) for place in range(split.num_examples)], np.str_)
    fields = dataclasses.fields(predictions)
    columns = {field.name: getattr(predictions, field.name) for field in fields}
    buffer = io.BytesIO()  # an object store's files cannot be written here and there
    np.savez(buffer, id=ids, class_names=np.array(split.class_names, np.str_), **columns)
    with files.whole(path) as new:
        new.write_bytes(buffer.getvalue())


def _lagging(results: Iterator[Any]) -> Iterator[Any]:
    """Hands results out two late, so that the device is never idle while one is fetched."""
    pending: collections.deque[Any] = collections.deque()
    for result in results:
        pending.append(result)
        if len(pending) > 2:
            yield pending.popleft()
    yield from pending
