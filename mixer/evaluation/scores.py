"""Metrics of a classification, computed in NumPy from the prediction for every image."""

import numpy as np

Z_95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval
ECE_BINS = 15


def interval(hits: float, count: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of the share `hits` / `count` (Wilson, 1927).

    Unlike the normal approximation, Wilson's interval stays within 0..1 and is accurate for shares
    near 0 and 1 and for few images. For no images it is (0, 1).
    """
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, Z_95**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = share * (1 - share) / count + z2 / (4 * count**2)
    half_width = Z_95 * spread**0.5 / (1 + z2 / count)
    # Return exact ends if there are no hits or no misses: with rounding they could be on the wrong
    # side of the share, by up to 1e-16.
    return (center - half_width if hits else 0.0), (center + half_width if hits < count else 1.0)


def mean_interval(shares: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of K shares, with `counts` images behind each.

    The classes are independent, so the variance of the mean is the sum of their variances over K
    squared. Each variance adds two hits and two misses (Agresti and Coull), so that a class of few
    images that are all hits does not get zero variance.
    """
    adjusted_shares = (shares * counts + 2) / (counts + 4)
    variances = adjusted_shares * (1 - adjusted_shares) / (counts + 4)
    half_width = Z_95 * np.sqrt(np.sum(variances)) / max(len(shares), 1)
    mean = float(np.mean(shares)) if len(shares) else 0.0
    return max(mean - half_width, 0.0), min(mean + half_width, 1.0)


def calibration_error(probability: np.ndarray, hit: np.ndarray) -> float:
    """Returns the expected calibration error with 15 bins of equal width.

    The error of a bin (low, high] is |share of hits - mean probability|; the result is its mean
    over the images (Guo et al., 2017, arXiv 1706.04599).

    Args:
      probability: (n,) probability of the first guess of each image.
      hit: (n,) whether the first guess is correct.
    """
    if not len(hit):
        return 0.0
    edges = np.linspace(0, 1, ECE_BINS + 1)[1:-1]
    bins = np.digitize(probability, edges, right=True)
    gap = np.bincount(bins, hit - probability.astype(np.float64), ECE_BINS)
    return float(np.abs(gap).sum() / len(hit))


def per_class(label: np.ndarray, hit: np.ndarray, num_classes: int) -> tuple[np.ndarray, ...]:
    """Returns hits and images per class as two (K,) arrays, over images with exactly one label."""
    has_one_label = label >= 0
    counts = np.bincount(label[has_one_label], minlength=num_classes)
    return np.bincount(label[has_one_label], hit[has_one_label], num_classes), counts


def mean_per_class(hits: np.ndarray, counts: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Returns the mean accuracy of the classes that have images, and its 95 % interval.

    Args:
      hits: (K,) hits per class.
      counts: (K,) images per class.
    """
    is_present = counts > 0
    shares = hits[is_present] / counts[is_present]
    return float(shares.mean()), mean_interval(shares, counts[is_present])


def confusions(label: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Counts images with exactly one label: sorted (n, 3) rows of label, first guess and count."""
    pairs = np.stack([label, guess], axis=1)[label >= 0]
    cells, counts = np.unique(pairs, axis=0, return_counts=True)
    return np.concatenate([cells, counts[:, None]], axis=1)


def confusion(label: np.ndarray, guess: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the (K, K) numbers of images by label (row) and first guess (column)."""
    result = np.zeros((num_classes, num_classes), np.int64)
    labels, guesses, counts = confusions(label, guess).T
    result[labels, guesses] = counts
    return result
