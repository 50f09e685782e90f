"""Computes the statistics that `mixer.tools.inspect` shows; pictures.py draws them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mixer.evaluation import classification
from mixer.models.modules import patch_grid
from mixer.models.registry import architecture_of
from mixer.sizes import RGB_CHANNELS
from mixer.training.step import normalize

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DEAD, HOT = 0.1, 10.0  # thresholds, in standard deviations of the median channel


@dataclasses.dataclass(frozen=True)
class Units:
    """The hidden units of one block's token mixing, in pairs.

    Attributes:
      weights: (pairs, 2, H/P, W/P) input weights of both units on the patch grid; each unit is
        divided by its largest absolute weight; pairs are sorted by ascending frequency.
      cosine: median over all pairs of the cosine similarity of the two units; -1 if opposite.
      chance: the same median after the weights of each unit are shuffled over the grid.
      num_units: D_S; if it is odd, one unit has no partner and is not in `weights`.
    """

    weights: np.ndarray
    cosine: float
    chance: float
    num_units: int


@dataclasses.dataclass(frozen=True)
class Activations:
    """Statistics of the residual stream after the stem (depth 0) and after each of the L blocks.

    Every statistic is over all tokens of `num_images` images.

    Attributes:
      num_images: number of images.
      mean, std: (L + 1, C) mean and standard deviation of each channel.
      norm: (L + 1,) root mean square of the Euclidean norms of the tokens.
      token_update, channel_update: (L,) the norm of the branch's output divided by the norm of the
        stream that it is added to.
      dead, hot: (L + 1,) numbers of channels whose standard deviation is below DEAD times, or above
        HOT times, the median over the channels.
      dimensions: (L + 1,) participation ratio of the channels' covariance, (sum of its
        eigenvalues)^2 / sum of their squares: C if all directions have equal variance, 1 if only
        one direction varies.
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


@dataclasses.dataclass(frozen=True)
class Confusion:
    """The number and share of the images of class `label` that the model classifies as `guess`."""

    label: int
    guess: int
    count: int
    share: float


def stem_filters(kernel: np.ndarray) -> np.ndarray:
    """Returns the stem's filters as pictures, largest Euclidean norm first.

    Args:
      kernel: (P, P, channels, C).

    Returns:
      (C, P, P, 3) in 0..1. Each filter is divided by its largest absolute weight; grey is 0. If the
      images are not RGB, the channels of a filter are grey pictures side by side, and the result is
      (C, P, channels * P, 3).
    """
    filters = np.moveaxis(np.asarray(kernel, np.float32), 3, 0)
    order = np.argsort(-np.sum(filters**2, axis=(1, 2, 3)), kind="stable")
    filters = filters[order]
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    filters = 0.5 + 0.5 * filters / np.maximum(largest, np.finfo(np.float32).tiny)
    if filters.shape[-1] == RGB_CHANNELS:
        return filters
    pictures = np.moveaxis(filters, 3, 2).reshape(*filters.shape[:2], -1, 1)  # C, P, channels * P
    return np.repeat(pictures, 3, axis=-1)


def pair_units(kernel: np.ndarray, grid: tuple[int, int]) -> Units:
    """Pairs the token-mixing units of a block by opposite phase, as the paper's figure 5 does.

    Pairing is greedy: the two units with the lowest cosine similarity are paired first.

    Args:
      kernel: (S, D_S) kernel of Dense_0.
      grid: (H/P, W/P), the grid of the S patches.
    """
    units = np.asarray(kernel, np.float32).T
    pairs, cosine = pair_opposites(units)
    shuffled = np.random.default_rng(0).permuted(units, axis=1)
    _, chance = pair_opposites(shuffled)
    tiles = units.reshape(-1, *grid)
    largest = np.abs(tiles).max(axis=(1, 2), keepdims=True)
    tiles = tiles / np.maximum(largest, np.finfo(np.float32).tiny)
    order = np.argsort(frequencies(tiles)[pairs].mean(axis=1), kind="stable")
    return Units(
        weights=tiles[pairs[order]],
        cosine=float(np.median(cosine)) if len(cosine) else 0.0,
        chance=float(np.median(chance)) if len(chance) else 0.0,
        num_units=len(units),
    )


def pair_opposites(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs vectors (D, S) greedily by the lowest cosine similarity.

    Returns:
      (D // 2, 2) indices of the pairs, the lower index first, and (D // 2,) their similarities.
    """
    norms = np.linalg.norm(units, axis=1, keepdims=True)
    unit = units / np.maximum(norms, np.finfo(np.float32).tiny)
    similarity = unit @ unit.T
    # Make both triangles bit-identical, so that "each other's best" is well defined.
    similarity = np.triu(similarity, 1) + np.triu(similarity, 1).T
    np.fill_diagonal(similarity, np.inf)
    unpaired, pairs = np.arange(len(units)), []
    while len(unpaired) > 1:
        # The greedy choice pairs units that are each other's best, so their order is irrelevant.
        best = similarity[np.ix_(unpaired, unpaired)].argmin(axis=1)
        index = np.arange(len(unpaired))
        is_mutual = (best[best] == index) & (index < best)
        pairs.append(np.stack([unpaired[index[is_mutual]], unpaired[best[is_mutual]]], axis=1))
        unpaired = np.setdiff1d(unpaired, pairs[-1])
    pairs = np.concatenate(pairs) if pairs else np.zeros((0, 2), int)
    return pairs, similarity[pairs[:, 0], pairs[:, 1]]


def frequencies(tiles: np.ndarray) -> np.ndarray:
    """Returns the power-weighted mean spatial frequency of pictures (n, h, w), in cycles per patch.

    Frequency 0 is excluded; the result for a constant picture is 0.
    """
    height, width = tiles.shape[1:]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    power = np.abs(np.fft.fft2(tiles)) ** 2
    power[:, 0, 0] = 0
    total = power.sum(axis=(1, 2))
    return (power * radius).sum(axis=(1, 2)) / np.maximum(total, np.finfo(np.float32).tiny)


def activations(
    model: nn.Module, params: Any, images: np.ndarray, batch_size: int = 64
) -> Activations:
    """Computes statistics of the residual stream and of the branches' updates.

    Args:
      model: the model.
      params: parameters of the model.
      images: (n, H, W, channels) preprocessed images: uint8, or floats in the model's input range.
      batch_size: images per batch.
    """
    compute_sums = _make_compute_sums(model)
    sums: dict[str, np.ndarray] = {}
    for start in range(0, len(images), batch_size):
        batch_sums = jax.device_get(compute_sums(params, images[start : start + batch_size]))
        for key, value in batch_sums.items():
            sums[key] = sums.get(key, 0) + value.astype(np.float64)
    num_tokens = sums["count"]
    mean, product = sums["stream"] / num_tokens, sums["product"] / num_tokens
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
        token_update=np.sqrt(sums["token"] / num_tokens / np.maximum(energy[:-1], tiny)),
        channel_update=np.sqrt(sums["channel"] / np.maximum(sums["middle"], tiny)),
        dead=np.sum(std < DEAD * median, axis=1),
        hot=np.sum(std > HOT * median, axis=1),
        dimensions=variance.sum(axis=1) ** 2 / np.maximum((covariance**2).sum(axis=(1, 2)), tiny),
    )


def _make_compute_sums(model: nn.Module) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """Returns a compiled function `(params, images) -> sums` over the tokens of a batch.

    "count" is the number of tokens; "stream" (L + 1, C) and "product" (L + 1, C, C) are sums of the
    stream x and of x^T x at each depth; "token", "middle" and "channel" (L,) are sums of squares of
    a block's update across tokens, of the stream after this update, and of the update within each
    token.
    """
    architecture = architecture_of(model)

    def is_branch(module: nn.Module, method: str) -> bool:
        return module.name in architecture.branches and method == "__call__"

    def tokens(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).reshape(-1, model.hidden_dim)

    @jax.jit
    def compute_sums(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        (_, out), state = model.apply(
            {"params": params}, normalize(images), capture_intermediates=is_branch
        )
        blocks = range(model.num_blocks)
        stream = [
            tokens(out.get("tokens", out["stem"])),
            *(tokens(out[f"block_{i}"]) for i in blocks),
        ]
        updates = traverse_util.flatten_dict(state["intermediates"], sep="/")
        token, channel = (
            [tokens(updates[f"{architecture.block.format(i)}/{name}/__call__"][0]) for i in blocks]
            for name in architecture.branches
        )
        middle = [x + update for x, update in zip(stream, token, strict=False)]
        return {
            "count": jnp.float32(len(stream[0])),
            "stream": jnp.stack([x.sum(axis=0) for x in stream]),
            "product": jnp.stack([x.T @ x for x in stream]),
            "token": jnp.stack([jnp.sum(x**2) for x in token]),
            "middle": jnp.stack([jnp.sum(x**2) for x in middle]),
            "channel": jnp.stack([jnp.sum(x**2) for x in channel]),
        }

    return compute_sums


def attention_maps(
    model: nn.Module, params: Any, images: np.ndarray, batch_size: int = 16
) -> np.ndarray | None:
    """Returns how much each patch is attended to, (L, heads, H/P, W/P), as a mean over images.

    The queries are the class token, or the mean of all tokens if there is none. None: the model's
    blocks have no attention.

    Args:
      model: the model.
      params: parameters of the model.
      images: (n, H, W, channels) preprocessed images: uint8, or floats in the model's input range.
      batch_size: images per batch.
    """
    architecture = architecture_of(model)
    grid = patch_grid(images.shape[1:3], model.patch_size)

    @jax.jit
    def sum_maps(params: Any, images: jax.Array) -> list[jax.Array]:
        _, state = model.apply({"params": params}, normalize(images), mutable=["attention"])
        weights = traverse_util.flatten_dict(state.get("attention", {}), sep="/")
        maps = []
        for name in (f"{architecture.block.format(i)}/" for i in range(model.num_blocks)):
            for value in (weights[key][0] for key in weights if key.startswith(name)):
                num_first = value.shape[-1] - grid[0] * grid[1]  # 1 with a class token
                queries = value[:, :, :num_first] if num_first else value
                maps.append(queries[..., num_first:].mean(2).sum(0))  # heads, patches
        return maps

    total = 0
    for start in range(0, len(images), batch_size):
        maps = jax.device_get(sum_maps(params, images[start : start + batch_size]))
        if not maps:
            return None
        total = total + np.stack(maps)
    return total.reshape(*total.shape[:2], *grid) / len(images)


def cluster_order(confusion: np.ndarray) -> np.ndarray:
    """Returns an order (K,) of the classes in which confused classes are adjacent.

    The order comes from hierarchical clustering with average linkage. The distance of two classes
    is 1 - the share of their images that the model confuses.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    counts = np.maximum(confusion.sum(axis=1), 1)
    confused_share = (confusion + confusion.T) / (counts[:, None] + counts)
    distances = 1 - np.minimum(confused_share, 1)
    np.fill_diagonal(distances, 0)
    return hierarchy.leaves_list(hierarchy.average(distance.squareform(distances)))


def frequent_confusions(confusion: np.ndarray, max_count: int) -> list[Confusion]:
    """Returns the `max_count` most frequent confusions, in descending order."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:max_count]
    counts = confusion.sum(axis=1)
    return [
        Confusion(int(i), int(j), int(wrong[i, j]), float(wrong[i, j] / counts[i]))
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]


def most_confident(
    predictions: classification.Predictions, hit: bool, max_count: int
) -> np.ndarray:
    """Returns indices of images classified correctly (or incorrectly), most confident first."""
    indices = np.flatnonzero(predictions.labelled & (predictions.hit == hit))
    order = np.argsort(-predictions.probability[indices], kind="stable")
    return indices[order[:max_count]]
