"""The numbers behind the pictures of `mixer.tools.inspect`; pictures.py draws them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixer.data import splits as pipeline
from mixer.data.preprocessing.spec import pixel_range
from mixer.evaluation import classification
from mixer.models.mlp_mixer import MlpBlock, MlpMixer
from mixer.training.step import normalize

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DEAD, HOT = 0.1, 10.0  # of the median channel's standard deviation


@dataclasses.dataclass(frozen=True)
class Units:
    """Hidden units of one block's token mixing, in pairs.

    Attributes:
      weights: (pairs, 2, H/P, W/P) input weights of both units on the patch grid, each unit divided
        by its largest absolute weight; pairs by frequency, the lowest first.
      cosine: median over all pairs of the cosine similarity of its two units, -1 for opposite ones.
      chance: the same where every unit's weights are shuffled over the grid, then paired.
      num_units: D_S; an odd one is paired with nothing and left out.
    """

    weights: np.ndarray
    cosine: float
    chance: float
    num_units: int


@dataclasses.dataclass(frozen=True)
class Activations:
    """The residual stream behind the stem (depth 0) and behind each of the L blocks.

    Every statistic is over `num_images` images and all their tokens.

    Attributes:
      num_images: how many.
      mean: (L + 1, C) of each channel. std: likewise.
      norm: (L + 1,) root mean square over the tokens of a token's Euclidean norm.
      token_update, channel_update: (L,) the same norm of what each branch adds, over that of the
        stream it is added to.
      dead, hot: (L + 1,) channels whose standard deviation is below DEAD times, above HOT times
        that of the median channel.
      dimensions: (L + 1,) participation ratio of the channels' covariance, (sum of its
        eigenvalues)^2 / sum of their squares: C where all directions vary alike, 1 where one does.
    """

    num_images: int
    mean: np.ndarray
    std: np.ndarray
    norm: np.ndarray
    token_update: np.ndarray
    channel_update: np.ndarray
    dead: np.ndarray
    hot: np.ndarray
    dimensions: np.ndarray

    def summary(self) -> dict[str, Any]:
        """The values by depth, without the channels', as JSON has them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        large = ("mean", "std")
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in fields.items()
            if name not in large
        }


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A pair of classes and how often images of the one were taken for the other."""

    label: int
    guess: int
    count: int
    share: float


def stem_filters(kernel: np.ndarray) -> np.ndarray:
    """The stem's filters as pictures, those with the largest Euclidean norm first.

    Args:
      kernel: (P, P, 3, C).

    Returns:
      (C, P, P, 3) in 0..1. Each filter is divided by its largest absolute weight; grey is 0.
    """
    filters = np.moveaxis(np.asarray(kernel, np.float32), 3, 0)
    order = np.argsort(-np.sum(filters**2, axis=(1, 2, 3)), kind="stable")
    filters = filters[order]
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    return 0.5 + 0.5 * filters / np.maximum(largest, np.finfo(np.float32).tiny)


def paired_units(kernel: np.ndarray, grid: tuple[int, int]) -> Units:
    """Pairs the token-mixing units of a block by opposite phase, as the paper's figure 5 does.

    Pairs are made greedily, the two units whose weights have the lowest cosine similarity first.

    Args:
      kernel: (S, D_S) of Dense_0.
      grid: (H/P, W/P) patches, S in all.
    """
    units = np.asarray(kernel, np.float32).T
    pairs, cosine = opposites(units)
    shuffled = np.random.default_rng(0).permuted(units, axis=1)
    _, chance = opposites(shuffled)
    tiles = units.reshape(-1, *grid)
    largest = np.abs(tiles).max(axis=(1, 2), keepdims=True)
    tiles = tiles / np.maximum(largest, np.finfo(np.float32).tiny)
    first = np.argsort(frequencies(tiles)[pairs].mean(axis=1), kind="stable")
    return Units(
        weights=tiles[pairs[first]],
        cosine=float(np.median(cosine)) if len(cosine) else 0.0,
        chance=float(np.median(chance)) if len(chance) else 0.0,
        num_units=len(units),
    )


def opposites(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs vectors (D, S) greedily by the lowest cosine similarity.

    Returns:
      (D // 2, 2) places of the two, the lower first, and (D // 2,) their similarities.
    """
    norms = np.linalg.norm(units, axis=1, keepdims=True)
    unit = units / np.maximum(norms, np.finfo(np.float32).tiny)
    similarity = unit @ unit.T
    # Both halves the same to the bit: else two units might each hold another for the best.
    similarity = np.triu(similarity, 1) + np.triu(similarity, 1).T
    np.fill_diagonal(similarity, np.inf)
    free, pairs = np.arange(len(units)), []
    while len(free) > 1:
        # Two that are each other's best are what the greedy choice comes to take in any order.
        best = similarity[np.ix_(free, free)].argmin(axis=1)
        place = np.arange(len(free))
        mutual = (best[best] == place) & (place < best)
        pairs.append(np.stack([free[place[mutual]], free[best[mutual]]], axis=1))
        free = np.setdiff1d(free, pairs[-1])
    pairs = np.concatenate(pairs) if pairs else np.zeros((0, 2), int)
    return pairs, similarity[pairs[:, 0], pairs[:, 1]]


def frequencies(tiles: np.ndarray) -> np.ndarray:
    """Mean spatial frequency of each picture (n, h, w): cycles a patch, weighted by power.

    The mean over the grid is left out; of a flat picture it is 0.
    """
    height, width = tiles.shape[1:]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    power = np.abs(np.fft.fft2(tiles)) ** 2
    power[:, 0, 0] = 0
    total = power.sum(axis=(1, 2))
    return (power * radius).sum(axis=(1, 2)) / np.maximum(total, np.finfo(np.float32).tiny)


def activations(
    model: MlpMixer, params: Any, images: np.ndarray, batch_size: int = 64
) -> Activations:
    """Statistics of the residual stream and of what the branches add to it.

    Args:
      model: whose blocks are looked into.
      params: its parameters.
      images: (n, H, W, 3) as preprocessed: uint8, or floats as the model takes them.
      batch_size: images at once.
    """

    def captured(module: Any, method: str) -> bool:
        return isinstance(module, MlpBlock)

    @jax.jit
    def step(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        (_, out), state = model.apply(
            {"params": params}, normalize(images), capture_intermediates=captured
        )
        depths = [out["stem"].reshape(len(images), -1, model.hidden_dim)]
        depths += [out[f"block_{i}"] for i in range(model.num_blocks)]
        depths = [x.astype(jnp.float32).reshape(-1, model.hidden_dim) for x in depths]
        middle, token, channel = [], [], []
        for i in range(model.num_blocks):
            branches = state["intermediates"][f"MixerBlock_{i}"]
            update = branches["token_mixing"]["__call__"][0]
            update = update.astype(jnp.float32).reshape(-1, model.hidden_dim)
            middle.append(jnp.sum((depths[i] + update) ** 2))
            token.append(jnp.sum(update**2))
            channel.append(
                jnp.sum(branches["channel_mixing"]["__call__"][0].astype(jnp.float32) ** 2)
            )
        return {
            "sum": jnp.stack([x.sum(axis=0) for x in depths]),
            "product": jnp.stack([x.T @ x for x in depths]),
            **{name: jnp.stack(x) for name, x in dict(m=middle, t=token, c=channel).items()},
        }

    total: dict[str, np.ndarray] = {}
    for start in range(0, len(images), batch_size):
        part = jax.device_get(step(params, images[start : start + batch_size]))
        total = {k: total.get(k, 0) + v.astype(np.float64) for k, v in part.items()}
    count = len(images) * np.prod(images.shape[1:3]) / model.patch_size**2
    mean, product = total["sum"] / count, total["product"] / count
    energy = np.trace(product, axis1=1, axis2=2)
    covariance = product - mean[:, :, None] * mean[:, None, :]
    variance = np.maximum(np.diagonal(covariance, axis1=1, axis2=2), 0)
    std = np.sqrt(variance)
    median = np.median(std, axis=1, keepdims=True)
    tiny = np.finfo(np.float64).tiny
    return Activations(
        num_images=len(images),
        mean=mean,
        std=std,
        norm=np.sqrt(energy),
        token_update=np.sqrt(total["t"] / count / np.maximum(energy[:-1], tiny)),
        channel_update=np.sqrt(total["c"] / np.maximum(total["m"], tiny)),
        dead=np.sum(std < DEAD * median, axis=1),
        hot=np.sum(std > HOT * median, axis=1),
        dimensions=variance.sum(axis=1) ** 2 / np.maximum((covariance**2).sum(axis=(1, 2)), tiny),
    )


def clustered(confusion: np.ndarray) -> np.ndarray:
    """Order (K,) of the classes in which those taken for each other stand together.

    Average linkage, the distance of two classes being 1 - the share of their images that are taken
    for the other.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    counts = np.maximum(confusion.sum(axis=1), 1)
    taken = (confusion + confusion.T) / (counts[:, None] + counts)
    apart = 1 - np.minimum(taken, 1)
    np.fill_diagonal(apart, 0)
    return hierarchy.leaves_list(hierarchy.average(distance.squareform(apart)))


def frequent_confusions(confusion: np.ndarray, most: int) -> list[Confusion]:
    """The pairs of different classes with the most images, the share being of the label's."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    counts = confusion.sum(axis=1)
    return [
        Confusion(int(i), int(j), int(wrong[i, j]), float(wrong[i, j] / counts[i]))
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]


def surest(predictions: classification.Predictions, hit: bool, most: int) -> np.ndarray:
    """Places of the labelled images that were right (or wrong), the most probable guess first."""
    places = np.flatnonzero(predictions.labelled & (predictions.hit == hit))
    order = np.argsort(-predictions.probability[places], kind="stable")
    return places[order[:most]]


def read_images(split: pipeline.Split, places: Sequence[int]) -> list[np.ndarray]:
    """The images (H, W, 3) at these places of a split, as preprocessed."""
    images = []
    for place in map(int, places):
        batch = next(split.sequential_batches(start=place, stop=place + 1, batch_size=1))
        images.append(batch["image"][0])
    return images


def read_first(split: pipeline.Split, count: int) -> np.ndarray:
    """The first images (n, H, W, 3) of a split; folders mix the classes in their order."""
    stop = min(count, split.num_examples)
    batches = split.sequential_batches(start=0, stop=stop, batch_size=stop)
    return next(batches)["image"]


def as_pixels(images: np.ndarray, preprocess: str | None) -> np.ndarray:
    """uint8 pixels of preprocessed images, also of those that `value_range` has made floats."""
    if images.dtype == np.uint8:
        return images
    low, high = pixel_range(preprocess)
    pixels = (np.asarray(images, np.float32) - low) / (high - low) * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
