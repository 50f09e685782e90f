"""Draws pictures of what a model has learnt as PNG files, with the figures of runs/curves.py."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from mixer.evaluation import classification, scores
from mixer.runs import curves
from mixer.tools.inspect.activations import (
    DEAD,
    HOT,
    QUANTILES,
    Activations,
    Units,
    cluster_order,
)

GREY = 205  # background between units, in which zero is white
NAMED_CLASSES = 40  # largest confusion matrix that shows class names
LARGEST_MATRIX = 250  # maximum number of cells along a side of a confusion matrix
MAX_PAIRS = 320  # maximum number of pairs drawn per block
FILTER_PIXELS, UNIT_PIXELS = 24, 28  # approximate side of a drawn filter and a drawn unit
ATTENTION_PIXELS = 56  # approximate side of a drawn attention map
FEW = 128  # up to this number, filters and units are drawn at twice the size
TITLE_PIXELS = 26
MAX_FIGURE_PIXELS = 900  # maximum height of a figure with several blocks


def draw_results(
    results: Sequence[tuple[str, str, float, tuple[float, float]]], path: epath.PathLike
) -> None:
    """Draws accuracies and intervals, one line per (run, split, accuracy, (low, high))."""
    with curves.drawing():
        figure = curves.make_figure(8, 0.9 + 0.28 * len(results))
        axes = figure.add_subplot()
        splits = list(dict.fromkeys(split for _, split, _, _ in results))
        for row, (_, split, share, (low, high)) in enumerate(results):
            error = [[max(share - low, 0)], [max(high - share, 0)]]
            color = f"C{splits.index(split)}"
            axes.errorbar(share, row, xerr=error, fmt="o", ms=4, capsize=3, color=color)
        names = [
            f"{curves.shorten(run, 30)}, {curves.shorten(split, 30)}"
            for run, split, _, _ in results
        ]
        axes.set_yticks(range(len(results)), names)
        axes.set_ylim(len(results) - 0.5, -0.5)
        axes.xaxis.set_major_formatter(curves.format_percent)
        axes.set_xlabel("top-1 accuracy, 95 % interval")
        axes.grid(axis="x", alpha=0.3)
        curves.save_figure(figure, path)


def draw_filters(filters: np.ndarray, path: epath.PathLike) -> None:
    """Draws filters (C, P, P, 3) in 0..1 as tiles, row by row."""
    count, side = filters.shape[:2]
    tiles = _enlarge(filters, -(-FILTER_PIXELS * (1 + (count <= FEW)) // side))
    tiles = (tiles * 255).round().astype(np.uint8)
    image = _tile(tiles, max_columns=int(np.sqrt(count * 2)), gap=2, gap_value=255)
    title = f"{len(filters):,} filters of {side} x {side} pixels, by energy; grey is 0"
    _draw_tiles([(title, image)], path, colors=None)


def unit_figures(units: Sequence[Units]) -> list[range]:
    """Groups blocks into figures: several blocks of a small model, one block of a large model."""
    heights = [TITLE_PIXELS + _unit_image(block).shape[0] for block in units]
    groups, figure_height = [range(0, 0)], 0
    for number, height in enumerate(heights):
        if groups[-1] and figure_height + height > MAX_FIGURE_PIXELS:
            groups.append(range(number, number))
            figure_height = 0
        groups[-1] = range(groups[-1].start, number + 1)
        figure_height += height
    return groups


def draw_units(units: Sequence[Units], first: int, path: epath.PathLike) -> None:
    """Draws the paired units of the blocks `first`, `first` + 1, ... below each other."""
    blocks = enumerate(units, first)
    _draw_tiles([(unit_title(block, i), _unit_image(block)) for i, block in blocks], path)


def unit_title(block: Units, number: int) -> str:
    """Returns the title of the units of a block, with the number of units drawn."""
    num_drawn = min(len(block.weights), MAX_PAIRS)
    title = f"block {number}: {block.num_units:,} units, {len(block.weights):,} pairs"
    if num_drawn < len(block.weights):
        title += f", {num_drawn} of them drawn, from all frequencies"
    return title + f"; cosine {block.cosine:.2f} (shuffled {block.chance:.2f})"


def draw_attention(maps: np.ndarray, path: epath.PathLike) -> None:
    """Draws attention maps (L, heads, H/P, W/P), one row of heads for each block."""
    from matplotlib import colormaps

    parts = []
    for number, block in enumerate(maps):
        heads, height, width = block.shape
        scale = np.maximum(block.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)
        colors = colormaps["viridis"](block / scale, bytes=True)[..., :3]
        tiles = _enlarge(colors, max(ATTENTION_PIXELS // max(height, width), 1))
        image = _tile(tiles, max_columns=heads, gap=4, gap_value=255)
        peak = block.max() * height * width
        parts.append((f"block {number}: {heads} heads; peak {peak:.1f} times uniform", image))
    _draw_tiles(parts, path)


def draw_activations(statistics: Activations, path: epath.PathLike) -> None:
    """Draws the statistics of the residual stream over depth."""
    from matplotlib import ticker

    depth = np.arange(len(statistics.norm))
    blocks = depth[:-1]
    with curves.drawing():
        title = f"over {statistics.num_images:,} images; depth 0 is the output of the stem"
        figure, grid = curves.make_panels(6, title)
        for axes, values, name in (
            (grid[0], statistics.mean, "mean of a channel"),
            (grid[1], statistics.std, "standard deviation of a channel"),
        ):
            low, lower, middle, upper, high = np.quantile(values, QUANTILES, axis=1)
            axes.fill_between(depth, low, high, alpha=0.2, lw=0, color="C0", label="90 %")
            axes.fill_between(depth, lower, upper, alpha=0.35, lw=0, color="C0", label="50 %")
            axes.plot(depth, middle, color="C0", marker="o", ms=3, label="median channel")
            axes.legend(fontsize=8, framealpha=0.6)
            curves.finish_panel(axes, name, False, "depth")
        grid[2].plot(depth, statistics.norm, marker="o", ms=3)
        curves.finish_panel(grid[2], "norm of the residual stream", True, "depth")
        grid[3].plot(blocks, statistics.token_update, marker="o", ms=3, label="token mixing")
        grid[3].plot(blocks, statistics.channel_update, marker="o", ms=3, label="channel mixing")
        grid[3].legend(fontsize=8, framealpha=0.6)
        curves.finish_panel(grid[3], "norm of the update / norm of the stream", True, "block")
        grid[4].bar(depth - 0.2, statistics.dead, 0.4, label=f"dead: std < {DEAD:g} x median")
        grid[4].bar(depth + 0.2, statistics.hot, 0.4, label=f"hot: std > {HOT:g} x median")
        grid[4].legend(fontsize=8, framealpha=0.6)
        title = f"dead and hot channels of {statistics.mean.shape[1]:,}"
        curves.finish_panel(grid[4], title, False, "depth")
        grid[4].set_ylim(0, max(3, statistics.dead.max(), statistics.hot.max()) * 1.4)
        grid[4].yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        grid[5].plot(depth, statistics.dimensions, marker="o", ms=3)
        curves.finish_panel(grid[5], "participation ratio of the channels", True, "depth")
        curves.save_figure(figure, path)


def draw_confusion(
    result: classification.Classification, class_names: Sequence[str], path: epath.PathLike
) -> None:
    """Draws the confusion matrix, with rows normalized by class, and the per-class accuracies.

    With more than NAMED_CLASSES classes, the classes are clustered and unnamed, and the
    accuracies are sorted.
    """
    counts = result.confusion.sum(axis=1)
    with np.errstate(invalid="ignore"):
        shares = result.confusion / counts[:, None]
    intervals = np.array(
        [scores.interval(result.confusion[k, k], counts[k]) for k in range(len(counts))]
    )
    with curves.drawing():
        if len(class_names) <= NAMED_CLASSES:
            _draw_named(shares, result.per_class, intervals, class_names, path)
        else:
            order = cluster_order(result.confusion)
            _draw_clustered(shares[order][:, order], result.per_class, intervals, path)


def draw_images(
    images: Sequence[np.ndarray], captions: Sequence[str], path: epath.PathLike
) -> None:
    """Draws uint8 images (H, W, 3), four per row, with captions of one or more lines."""
    height, width = images[0].shape[:2]
    side, gap, line = 200, 10, 14  # pixels
    lines = max(caption.count("\n") for caption in captions) + 1
    cell = (side + gap, side * height / width + line * lines + gap)
    size = (4 * cell[0] + gap, -(-len(images) // 4) * cell[1] + gap)
    with curves.drawing():
        figure = curves.make_figure(size[0] / curves.DPI, size[1] / curves.DPI, layout=None)
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = gap + number % 4 * cell[0]
            bottom = size[1] - (number // 4 + 1) * cell[1]
            box = [left, bottom, side, side * height / width]
            axes = figure.add_axes(np.array(box) / (*size, *size))
            # Draw small images without interpolation, so that their pixels are visible.
            axes.imshow(image, interpolation="nearest" if max(height, width) < 64 else None)
            axes.set_axis_off()
            axes.set_title(caption, fontsize=8, pad=3)
        curves.save_figure(figure, path, colors=None)


# Confusion.


def _draw_named(
    shares: np.ndarray,
    accuracies: np.ndarray,
    intervals: np.ndarray,
    class_names: Sequence[str],
    path: epath.PathLike,
) -> None:
    """Draws every cell with its share, and the accuracy of each class next to its row."""
    count = len(class_names)
    side = max(0.3 * count, 2.4)
    names = [curves.shorten(name, 20) for name in class_names]
    margin = 0.085 * max(map(len, names)) + 0.3
    figure = curves.make_figure(side + margin + 3.2, side + margin + 0.3)
    left, right = figure.subplots(1, 2, width_ratios=[side, 2.4])
    left.imshow(np.nan_to_num(shares), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if count <= 20:
        for (i, j), share in np.ndenumerate(shares):
            if share >= 0.005:
                color = "white" if share > 0.5 else "black"
                left.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, c=color)
    left.set_xticks(range(count), names, rotation=90)
    left.set_yticks(range(count), names)
    left.set_xlabel("first guess")
    left.set_ylabel("label")
    left.set_title("share of the label's images" + ", %" * (count <= 20), fontsize=10)
    present = np.flatnonzero(np.isfinite(accuracies))
    error = np.abs(intervals[present].T - accuracies[present])
    right.errorbar(accuracies[present], present, xerr=error, fmt="o", ms=4, capsize=2)
    for row in np.flatnonzero(~np.isfinite(accuracies)):
        right.text(0.02, row, "no images", va="center", fontsize=7)
    right.set_yticks(range(count), [""] * count)
    right.set_ylim(count - 0.5, -0.5)
    right.set_xlim(0, 1.02)
    right.xaxis.set_major_formatter(curves.format_percent)
    right.grid(alpha=0.3)
    right.set_title("accuracy, 95 % interval", fontsize=10)
    curves.save_figure(figure, path)


def _draw_clustered(
    shares: np.ndarray, accuracies: np.ndarray, intervals: np.ndarray, path: epath.PathLike
) -> None:
    """Draws a matrix of at most LARGEST_MATRIX cells per side, and the sorted accuracies."""
    count = len(shares)
    group = -(-count // LARGEST_MATRIX)
    shares = np.nan_to_num(shares)
    title = f"{count:,} classes, clustered"
    if group > 1:
        padded = np.pad(shares, (0, -count % group))
        cells = len(padded) // group
        shares = padded.reshape(cells, group, cells, group).max(axis=(1, 3))
        title += f"; a cell is the maximum of {group} x {group}"
    figure = curves.make_figure(10, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    # Draw square roots, so that a share of 1 % is visible.
    image = left.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    left.set_xticks([])
    left.set_yticks([])
    left.set_xlabel("first guess")
    left.set_ylabel("label")
    left.set_title(title, fontsize=10)
    bar = figure.colorbar(image, ax=left, fraction=0.046, pad=0.03)
    ticks = np.array([0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.set_ticks(np.sqrt(ticks), labels=[f"{tick:.0%}" for tick in ticks])
    present = np.flatnonzero(np.isfinite(accuracies))
    order = present[np.argsort(accuracies[present], kind="stable")]
    rank = np.arange(1, len(order) + 1)
    right.fill_between(rank, *intervals[order].T, alpha=0.3, lw=0, label="95 % interval")
    right.plot(rank, accuracies[order], lw=1.4, label="accuracy")
    right.set_xlabel("classes, the worst first")
    right.set_ylim(-0.02, 1.02)
    right.yaxis.set_major_formatter(curves.format_percent)
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="lower right")
    num_absent = count - len(order)
    title = "accuracy of each class" + f" ({num_absent:,} without images)" * bool(num_absent)
    right.set_title(title, fontsize=10)
    curves.save_figure(figure, path)


# Tiles.


def _enlarge(tiles: np.ndarray, factor: int) -> np.ndarray:
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def _tile(tiles: np.ndarray, *, max_columns: int, gap: int, gap_value: int) -> np.ndarray:
    """Arranges tiles (n, h, w, 3) row by row in one uint8 image, in rows of about equal length.

    The tiles are surrounded by `gap` pixels of the grey value `gap_value`.
    """
    rows = max(-(-len(tiles) // max(max_columns, 1)), 1)
    columns = max(-(-len(tiles) // rows), 1)
    empty = rows * columns - len(tiles)
    padding = [(0, empty), (0, gap), (0, gap), (0, 0)]
    tiles = np.pad(tiles, padding, constant_values=gap_value)
    _, height, width, _ = tiles.shape
    image = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    image = image.reshape(rows * height, columns * width, 3)
    return np.pad(image, [(gap, 0), (gap, 0), (0, 0)], constant_values=gap_value)


def _unit_image(block: Units) -> np.ndarray:
    """Returns an image of the pairs of a block; negative weights are blue."""
    from matplotlib import colormaps

    weights = block.weights
    if len(weights) > MAX_PAIRS:  # select pairs evenly over the frequencies
        weights = weights[np.linspace(0, len(weights) - 1, MAX_PAIRS).round().astype(int)]
    count, _, height, width = weights.shape
    side = UNIT_PIXELS * (1 + (block.num_units <= FEW))
    colors = colormaps["RdBu_r"](0.5 + weights / 2, bytes=True)[..., :3]
    tiles = _enlarge(colors.reshape(-1, height, width, 3), max(side // max(height, width), 1))
    _, height, width, _ = tiles.shape
    pairs = np.full((count, height, 2 * width + 2, 3), GREY, np.uint8)
    pairs[:, :, :width], pairs[:, :, width + 2 :] = tiles[0::2], tiles[1::2]
    return _tile(pairs, max_columns=1000 // (2 * width + 10), gap=8, gap_value=GREY)


def _draw_tiles(
    parts: Sequence[tuple[str, np.ndarray]], path: epath.PathLike, colors: int | None = 256
) -> None:
    """Draws images with titles below each other, one image pixel per pixel of the picture."""
    width = max(560, *(image.shape[1] + 24 for _, image in parts))
    height = sum(image.shape[0] + TITLE_PIXELS for _, image in parts) + 12
    with curves.drawing():
        size = (width + 0.1) / curves.DPI, (height + 0.1) / curves.DPI
        figure = curves.make_figure(*size, layout=None)
        top = height
        for title, image in parts:
            top -= TITLE_PIXELS
            figure.text(12 / width, (top + 8) / height, title, fontsize=9)
            top -= image.shape[0]
            box = [12 / width, top / height, image.shape[1] / width, image.shape[0] / height]
            axes = figure.add_axes(box)
            axes.imshow(image, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
        curves.save_figure(figure, path, colors)
