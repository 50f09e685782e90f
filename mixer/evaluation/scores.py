"""Figures of a classification, from what was said of every image: NumPy alone."""

import numpy as np

Z_95 = 1.959963984540054  # of a two-sided interval of 95 % under a normal distribution
ECE_BINS = 15


def interval(hits: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of 95 % for a share `hits` / `count` (Wilson, 1927).

    It stays within 0..1 and is sound near both ends and for few images, where that of the normal
    distribution is not. Of no image: (0, 1).
    """
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = share * (1 - share) / count + z2 / (4 * count**2)
    half = Z_95 * spread**0.5 / (1 + z2 / count)
    # Rounding leaves no more than 1e-16 of these ends, on the wrong side of the share.
    return (middle - half if hits else 0.0), (middle + half if hits < count else 1.0)


def mean_interval(shares: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Interval of 95 % of the mean of K shares, each of its own `counts` images.

    The classes are independent: the variance of the mean is the sum of theirs over K squared, each
    taken with Agresti and Coull's two hits and two misses more, so that a class of few images that
    were all hit is not sure.
    """
    guarded = (shares * counts + 2) / (counts + 4)
    half = Z_95 * np.sqrt(np.sum(guarded * (1 - guarded) / (counts + 4))) / max(len(shares), 1)
    mean = float(np.mean(shares)) if len(shares) else 0.0
    return max(mean - half, 0.0), min(mean + half, 1.0)


def calibration_error(probability: np.ndarray, hit: np.ndarray) -> float:
    """Expected calibration error: 15 bins of equal width (Guo et al., 2017, arXiv 1706.04599).

    The mean over the images of |share of hits - mean probability| of the bin (low, high] that the
    image is in.

    Args:
      probability: (n,) of each first guess.
      hit: (n,) whether it was right.
    """
    if not len(hit):
        return 0.0
    edges = np.linspace(0, 1, ECE_BINS + 1)[1:-1]
    place = np.digitize(probability, edges, right=True)
    gap = np.bincount(place, hit - probability.astype(np.float64), ECE_BINS)
    return float(np.abs(gap).sum() / len(hit))


def per_class(label: np.ndarray, hit: np.ndarray, num_classes: int) -> tuple[np.ndarray, ...]:
    """Hits and images of each class: two (K,) arrays, from the images that have one label."""
    single = label >= 0
    counts = np.bincount(label[single], minlength=num_classes)
    return np.bincount(label[single], hit[single], num_classes), counts


def confusions(label: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """(n, 3) rows of label, first guess and number of images, those with one label; sorted."""
    pairs = np.stack([label, guess], axis=1)[label >= 0]
    cells, counts = np.unique(pairs, axis=0, return_counts=True)
    return np.concatenate([cells, counts[:, None]], axis=1)


def confusion(label: np.ndarray, guess: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) numbers of images by label (row) and first guess (column)."""
    result = np.zeros((num_classes, num_classes), np.int64)
    labels, guesses, counts = confusions(label, guess).T
    result[labels, guesses] = counts
    return result
