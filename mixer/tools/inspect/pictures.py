"""Pictures of a run, as PNG files: matplotlib's objects, without pyplot and its global state.

Names come from data and may be anything: they are drawn as they are and not as formulas, without a
word where the font lacks a letter, and cut where they are long.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mixer.evaluation import classification, scores
from mixer.tools.inspect.activations import (
    DEAD,
    HOT,
    QUANTILES,
    SMOOTHED_FROM,
    Activations,
    Units,
    clustered,
)
from mixer.tools.inspect.activations import smooth as smoothed

Rows = Sequence[Mapping[str, Any]]

# Title of a panel; its curves in metrics.jsonl; whether its axis begins at 0.
PANELS = (
    ("loss", ("train/loss", "val/loss", "val_ema/loss"), False),
    ("accuracy", ("train/accuracy", "val/top1", "val_ema/top1"), False),
    ("learning rate", ("train/learning_rate",), True),
    ("gradient norm", ("train/grad_norm",), False),
    ("parameter norm", ("train/param_norm",), False),
    ("images per second", ("perf/images_per_second",), True),
    ("share of time waiting for data", ("perf/data_wait_share",), True),
    ("expected calibration error", ("val/ece", "val_ema/ece"), True),
)
# What a curve's name begins with: its label, if it needs one, and its colour.
KINDS = {
    "train": ("training", "C0"),
    "val": ("validation", "C1"),
    "val_ema": ("validation, average", "C2"),
    "perf": ("", "C0"),
}
DPI = 110
LINES = ("-", "--", ":", "-.")  # of runs beyond the tenth, whose colours come again
GREY = 205  # between units, whose zero is white
EXACT = ("train/learning_rate", "train/param_norm")  # curves without noise
MARKED = 60  # points of a curve that are marked one by one
NAMED_CLASSES = 40  # classes of a confusion matrix that are named
LARGEST_MATRIX = 250  # cells along its side
MOST_PAIRS = 320  # drawn of a block
FILTER_PIXELS, UNIT_PIXELS = 24, 28  # side of a drawn filter and unit, about
FEW = 128  # filters and units of which each is drawn twice as large
TITLE_PIXELS = 26
MOST_FIGURE_PIXELS = 900  # height, where blocks share a figure


def draw_curves(rows: Rows, path: epath.PathLike, title: str) -> None:
    """Draws the curves of `metrics.jsonl`'s rows as a PNG at `path`.

    A curve of more than SMOOTHED_FROM points is drawn faint, and its running mean over it.
    """
    with drawing():
        panels = [panel for panel in PANELS if any(_points(rows, key) for key in panel[1])]
        figure, grid = _panels(len(panels), shortened(title, 90))
        for axes, (name, keys, from_zero) in zip(grid, panels, strict=False):
            for key in keys:
                if points := _points(rows, key):
                    _curve(axes, points, key)
            _finish(axes, name, from_zero)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(fontsize=8, framealpha=0.6)
        _save(figure, path)


def draw_comparison(runs: Mapping[str, Rows], path: epath.PathLike) -> None:
    """Draws the curves of several runs over each other; those of training are faint.

    Where a run keeps an average of its parameters, its validation is that of the average.
    """
    from matplotlib.lines import Line2D

    panels = [
        panel
        for panel in PANELS
        if any(_points(rows, key) for rows in runs.values() for key in panel[1])
    ]
    with drawing():
        figure, grid = _panels(len(panels), "", below=0.22 * len(runs) + 0.3)
        for axes, (name, keys, from_zero) in zip(grid, panels, strict=False):
            judged = [key for key in keys if key.startswith("val")]
            for number, rows in enumerate(runs.values()):
                style = {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % len(LINES)]}
                best = [key for key in judged if _points(rows, key)][-1:]
                for key in [key for key in keys if key not in judged] + best:
                    if points := _points(rows, key):
                        faint = 0.35 if best and key not in best else 1
                        width = 1 if faint < 1 else 1.4
                        _line(axes, points, key, alpha=faint, lw=width, **style)
            both = judged and any(key not in judged for key in keys)
            _finish(axes, name + " (training faint)" * bool(both), from_zero)
        figure.legend(
            [
                Line2D([], [], color=f"C{i % 10}", linestyle=LINES[i // 10 % len(LINES)])
                for i in range(len(runs))
            ],
            [legend_label(name) for name in runs],
            loc="outside lower left",
            fontsize=8,
        )
        _save(figure, path)


def draw_results(
    results: Sequence[tuple[str, str, float, tuple[float, float]]], path: epath.PathLike
) -> None:
    """Draws accuracies with their intervals, a line each: (run, split, accuracy, (low, high))."""
    with drawing():
        figure = _figure(8, 0.9 + 0.28 * len(results))
        axes = figure.add_subplot()
        splits = list(dict.fromkeys(split for _, split, _, _ in results))
        for place, (_, split, share, (low, high)) in enumerate(results):
            error = [[max(share - low, 0)], [max(high - share, 0)]]
            color = f"C{splits.index(split)}"
            axes.errorbar(share, place, xerr=error, fmt="o", ms=4, capsize=3, color=color)
        names = [f"{shortened(run, 30)}, {shortened(split, 30)}" for run, split, _, _ in results]
        axes.set_yticks(range(len(results)), names)
        axes.set_ylim(len(results) - 0.5, -0.5)
        axes.xaxis.set_major_formatter(_percent)
        axes.set_xlabel("top-1 accuracy, interval of 95 %")
        axes.grid(axis="x", alpha=0.3)
        _save(figure, path)


def draw_filters(filters: np.ndarray, path: epath.PathLike) -> None:
    """Draws filters (C, P, P, 3) in 0..1 as tiles, in their order row by row."""
    count, side = filters.shape[:2]
    tiles = _enlarged(filters, -(-FILTER_PIXELS * (1 + (count <= FEW)) // side))
    tiles = (tiles * 255).round().astype(np.uint8)
    image = _tiled(tiles, most_columns=int(np.sqrt(count * 2)), gap=2, between=255)
    title = f"{len(filters):,} filters of {side} x {side} pixels, by energy; grey is 0"
    _draw_tiles([(title, image)], path, colors=None)


def unit_figures(units: Sequence[Units]) -> list[range]:
    """The blocks that share a figure: several of a small model, one each of a large one."""
    heights = [TITLE_PIXELS + _unit_image(block).shape[0] for block in units]
    groups, used = [range(0, 0)], 0
    for number, height in enumerate(heights):
        if groups[-1] and used + height > MOST_FIGURE_PIXELS:
            groups.append(range(number, number))
            used = 0
        groups[-1] = range(groups[-1].start, number + 1)
        used += height
    return groups


def draw_units(units: Sequence[Units], first: int, path: epath.PathLike) -> None:
    """Draws the paired units of the blocks `first`, first + 1, ... one below the other."""
    blocks = enumerate(units, first)
    _draw_tiles([(unit_title(block, i), _unit_image(block)) for i, block in blocks], path)


def unit_title(block: Units, number: int) -> str:
    """What stands above the units of a block, also how many of them are drawn."""
    shown = min(len(block.weights), MOST_PAIRS)
    title = f"block {number}: {block.num_units:,} units, {len(block.weights):,} pairs"
    if shown < len(block.weights):
        title += f", {shown} of them drawn, from all frequencies"
    return title + f"; cosine {block.cosine:.2f} (shuffled {block.chance:.2f})"


def draw_activations(found: Activations, path: epath.PathLike) -> None:
    """Draws the statistics of the residual stream over depth."""
    from matplotlib import ticker

    depth = np.arange(len(found.norm))
    blocks = depth[:-1]
    with drawing():
        figure, grid = _panels(6, f"over {found.num_images:,} images; depth 0 is behind the stem")
        for axes, values, name in (
            (grid[0], found.mean, "mean of a channel"),
            (grid[1], found.std, "standard deviation of a channel"),
        ):
            low, lower, middle, upper, high = np.quantile(values, QUANTILES, axis=1)
            axes.fill_between(depth, low, high, alpha=0.2, lw=0, color="C0", label="90 %")
            axes.fill_between(depth, lower, upper, alpha=0.35, lw=0, color="C0", label="50 %")
            axes.plot(depth, middle, color="C0", marker="o", ms=3, label="median channel")
            axes.legend(fontsize=8, framealpha=0.6)
            _finish(axes, name, False, "depth")
        grid[2].plot(depth, found.norm, marker="o", ms=3)
        _finish(grid[2], "norm of the residual stream", True, "depth")
        grid[3].plot(blocks, found.token_update, marker="o", ms=3, label="token mixing")
        grid[3].plot(blocks, found.channel_update, marker="o", ms=3, label="channel mixing")
        grid[3].legend(fontsize=8, framealpha=0.6)
        _finish(grid[3], "norm of the update / norm of the stream", True, "block")
        grid[4].bar(depth - 0.2, found.dead, 0.4, label=f"dead: std < {DEAD:g} x median")
        grid[4].bar(depth + 0.2, found.hot, 0.4, label=f"hot: std > {HOT:g} x median")
        grid[4].legend(fontsize=8, framealpha=0.6)
        _finish(grid[4], f"dead and hot channels of {found.mean.shape[1]:,}", False, "depth")
        grid[4].set_ylim(0, max(3, found.dead.max(), found.hot.max()) * 1.4)
        grid[4].yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        grid[5].plot(depth, found.dimensions, marker="o", ms=3)
        _finish(grid[5], "participation ratio of the channels", True, "depth")
        _save(figure, path)


def draw_confusion(
    result: classification.Classification, class_names: Sequence[str], path: epath.PathLike
) -> None:
    """Draws the confusion matrix, each row the shares of one class, and the classes' accuracies.

    Beyond NAMED_CLASSES the classes are clustered and have no names, and the accuracies are sorted.
    """
    counts = result.confusion.sum(axis=1)
    with np.errstate(invalid="ignore"):
        shares = result.confusion / counts[:, None]
    intervals = np.array(
        [scores.interval(result.confusion[k, k], counts[k]) for k in range(len(counts))]
    )
    with drawing():
        if len(class_names) <= NAMED_CLASSES:
            _draw_named(shares, result.per_class, intervals, class_names, path)
        else:
            order = clustered(result.confusion)
            _draw_many(shares[order][:, order], result.per_class, intervals, path)


def draw_images(
    images: Sequence[np.ndarray], captions: Sequence[str], path: epath.PathLike
) -> None:
    """Draws uint8 images (H, W, 3), four in a row, each with its caption of a line or more."""
    height, width = images[0].shape[:2]
    side, gap, line = 200, 10, 14  # pixels
    lines = max(caption.count("\n") for caption in captions) + 1
    cell = (side + gap, side * height / width + line * lines + gap)
    size = (4 * cell[0] + gap, -(-len(images) // 4) * cell[1] + gap)
    with drawing():
        figure = _figure(size[0] / DPI, size[1] / DPI, layout=None)
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = gap + number % 4 * cell[0]
            bottom = size[1] - (number // 4 + 1) * cell[1]
            box = [left, bottom, side, side * height / width]
            axes = figure.add_axes(np.array(box) / (*size, *size))
            # Pixels of small images are shown as they are.
            axes.imshow(image, interpolation="nearest" if max(height, width) < 64 else None)
            axes.set_axis_off()
            axes.set_title(caption, fontsize=8, pad=3)
        _save(figure, path, colors=None)


def shortened(name: str, most: int) -> str:
    """The name in one line, without its middle where it is longer than `most` letters."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if len(name) <= most:
        return name
    end = most // 3
    return f"{name[: most - end - 1]}…{name[-end:]}"


# Curves.


def _points(rows: Rows, key: str) -> tuple[list[int], list[float]] | None:
    """Steps and values of a curve, None where the rows have none."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    return tuple(map(list, zip(*points, strict=True))) if points else None


def _curve(axes: Any, points: tuple[list[int], list[float]], key: str) -> None:
    label, color = KINDS[key.split("/")[0]]
    if _is_smoothed(points, key):
        axes.plot(*points, color=color, lw=0.4, alpha=0.3)
    _line(axes, points, key, color=color, lw=1.3, label=label)


def _line(axes: Any, points: tuple[list[int], list[float]], key: str, **style: Any) -> None:
    steps, values = points
    values = smoothed(values) if _is_smoothed(points, key) else values
    marker = "o" if len(steps) <= MARKED else None
    axes.plot(steps, values, marker=marker, ms=3, **style)


def _is_smoothed(points: tuple[list[int], list[float]], key: str) -> bool:
    return len(points[0]) > SMOOTHED_FROM and key not in EXACT


def _finish(axes: Any, name: str, from_zero: bool, along: str = "step") -> None:
    """Title, limits and ticks of a panel whose curves are drawn."""
    from matplotlib import ticker

    axes.set_title(name, fontsize=10)
    axes.set_xlabel(along, fontsize=8)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    if along == "step":
        steps = [step for line in axes.lines for step in line.get_xdata()]
        axes.set_xlim(0, max(steps, default=1) * 1.03 or 1)
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    values = np.array([y for line in axes.lines for y in line.get_ydata()], np.float64)
    values = values[np.isfinite(values)]
    if name.startswith(("accuracy", "share", "expected")):
        axes.yaxis.set_major_formatter(_percent)
    elif from_zero or not len(values) or values.min() <= 0 or values.max() < 20 * values.min():
        axes.ticklabel_format(axis="y", useOffset=False)
    else:
        axes.set_yscale("log")
        subs = (1, 2, 5) if values.max() < 1000 * values.min() else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    if from_zero:
        axes.set_ylim(0, 1.08 * values.max() if len(values) and values.max() > 0 else None)


def _percent(value: float, _: Any) -> str:
    return f"{100 * value:.4g}%"


def legend_label(name: str) -> str:
    """A name for a legend, which leaves out those that begin with an underscore."""
    name = shortened(name, 90)
    return f" {name}" if name.startswith("_") else name


# Confusion.


def _draw_named(shares, accuracies, intervals, class_names, path) -> None:
    count = len(class_names)
    side = max(0.3 * count, 2.4)
    longest = max(len(shortened(name, 20)) for name in class_names)
    names = 0.085 * longest + 0.3
    figure = _figure(side + names + 3.2, side + names + 0.3)
    left, right = figure.subplots(1, 2, width_ratios=[side, 2.4])
    names = [shortened(name, 20) for name in class_names]
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
    there = np.flatnonzero(np.isfinite(accuracies))
    error = np.abs(intervals[there].T - accuracies[there])
    right.errorbar(accuracies[there], there, xerr=error, fmt="o", ms=4, capsize=2)
    for place in np.flatnonzero(~np.isfinite(accuracies)):
        right.text(0.02, place, "no images", va="center", fontsize=7)
    right.set_yticks(range(count), [""] * count)
    right.set_ylim(count - 0.5, -0.5)
    right.set_xlim(0, 1.02)
    right.xaxis.set_major_formatter(_percent)
    right.grid(alpha=0.3)
    right.set_title("accuracy, interval of 95 %", fontsize=10)
    _save(figure, path)


def _draw_many(shares, accuracies, intervals, path) -> None:
    count = len(shares)
    group = -(-count // LARGEST_MATRIX)
    shares = np.nan_to_num(shares)
    if group > 1:
        padded = np.pad(shares, (0, -count % group))
        cells = len(padded) // group
        shares = padded.reshape(cells, group, cells, group).max(axis=(1, 3))
    figure = _figure(10, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    # The square root lets a share of 1 % be seen.
    image = left.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    left.set_xticks([])
    left.set_yticks([])
    left.set_xlabel("first guess")
    left.set_ylabel("label")
    title = f"{count:,} classes, clustered"
    if group > 1:
        title += f"; a cell is the largest of {group} x {group}"
    left.set_title(title, fontsize=10)
    bar = figure.colorbar(image, ax=left, fraction=0.046, pad=0.03)
    bar.set_ticks(
        np.sqrt([0, 0.01, 0.1, 0.25, 0.5, 1]), labels=["0", "1%", "10%", "25%", "50%", "100%"]
    )
    there = np.flatnonzero(np.isfinite(accuracies))
    order = there[np.argsort(accuracies[there], kind="stable")]
    place = np.arange(1, len(order) + 1)
    right.fill_between(place, *intervals[order].T, alpha=0.3, lw=0, label="interval of 95 %")
    right.plot(place, accuracies[order], lw=1.4, label="accuracy")
    right.set_xlabel("classes, the worst first")
    right.set_ylim(-0.02, 1.02)
    right.yaxis.set_major_formatter(_percent)
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="lower right")
    missing = count - len(order)
    right.set_title(
        "accuracy of each class" + f" ({missing:,} lack images)" * bool(missing), fontsize=10
    )
    _save(figure, path)


# Tiles.


def _enlarged(tiles: np.ndarray, factor: int) -> np.ndarray:
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def _tiled(tiles: np.ndarray, *, most_columns: int, gap: int, between: int) -> np.ndarray:
    """One uint8 image of tiles (n, h, w, 3), row by row in rows of about the same number.

    Grey `between` of `gap` pixels surrounds them.
    """
    rows = max(-(-len(tiles) // max(most_columns, 1)), 1)
    columns = max(-(-len(tiles) // rows), 1)
    empty = rows * columns - len(tiles)
    around = [(0, empty), (0, gap), (0, gap), (0, 0)]
    tiles = np.pad(tiles, around, constant_values=between)
    _, height, width, _ = tiles.shape
    image = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    image = image.reshape(rows * height, columns * width, 3)
    return np.pad(image, [(gap, 0), (gap, 0), (0, 0)], constant_values=between)


def _unit_image(block: Units) -> np.ndarray:
    """The pairs of a block: the two units close together, blue for negative weights."""
    from matplotlib import colormaps

    weights = block.weights
    if len(weights) > MOST_PAIRS:  # evenly over the frequencies
        weights = weights[np.linspace(0, len(weights) - 1, MOST_PAIRS).round().astype(int)]
    count, _, height, width = weights.shape
    side = UNIT_PIXELS * (1 + (block.num_units <= FEW))
    colors = colormaps["RdBu_r"](0.5 + weights / 2, bytes=True)[..., :3]
    tiles = _enlarged(colors.reshape(-1, height, width, 3), max(side // max(height, width), 1))
    _, height, width, _ = tiles.shape
    both = np.full((count, height, 2 * width + 2, 3), GREY, np.uint8)
    both[:, :, :width], both[:, :, width + 2 :] = tiles[0::2], tiles[1::2]
    return _tiled(both, most_columns=1000 // (2 * width + 10), gap=8, between=GREY)


def _draw_tiles(
    parts: Sequence[tuple[str, np.ndarray]], path: epath.PathLike, colors: int | None = 256
) -> None:
    """Draws images with a title each one below the other, a pixel as a pixel."""
    width = max(560, *(image.shape[1] + 24 for _, image in parts))
    height = sum(image.shape[0] + TITLE_PIXELS for _, image in parts) + 12
    with drawing():
        figure = _figure((width + 0.1) / DPI, (height + 0.1) / DPI, layout=None)
        top = height
        for title, image in parts:
            top -= TITLE_PIXELS
            figure.text(12 / width, (top + 8) / height, title, fontsize=9)
            top -= image.shape[0]
            box = [12 / width, top / height, image.shape[1] / width, image.shape[0] / height]
            axes = figure.add_axes(box)
            axes.imshow(image, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
        _save(figure, path, colors)


# Figures.


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draws names as they are: not as formulas, and without a word on what the font lacks."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def _panels(count: int, title: str, below: float = 0.0) -> tuple[Any, list[Any]]:
    """A figure of at least `count` panels, two in a row; `below` inches are left for a legend."""
    rows = max(-(-count // 2), 1)
    figure = _figure(9.5, 2.5 * rows + below + 0.3)
    if title:
        figure.suptitle(title, fontsize=11)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid


def _save(figure: Any, path: epath.PathLike, colors: int | None = 256) -> None:
    """Writes the figure, of drawings with a palette of their own: half the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    with epath.Path(path).open("wb") as file:
        (image.quantize(colors) if colors else image).save(file, "PNG")
