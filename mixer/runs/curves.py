"""Training curves of a run, or of several, as a PNG; and the helpers of every picture.

Figures are matplotlib's objects, without pyplot and its global state. Names come from data: they
are drawn literally, never as formulas, and long names are shortened.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

Rows = Sequence[Mapping[str, Any]]

# Title of a panel, its keys in metrics.jsonl, whether its vertical axis begins at 0.
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
# Prefix of a key: label and colour of the curve.
KINDS = {
    "train": ("training", "C0"),
    "val": ("validation", "C1"),
    "val_ema": ("validation, average", "C2"),
    "perf": ("", "C0"),
}
DPI = 110
LINES = ("-", "--", ":", "-.")  # the colours repeat after ten runs, in another line style
EXACT = ("train/learning_rate", "train/param_norm")  # curves without noise
MARKED = 60  # the most points of a curve that each bear a marker
SMOOTHED_FROM = 200  # a curve of more points is smoothed


def draw_curves(rows: Rows, path: epath.PathLike, title: str) -> None:
    """Draws the curves in the rows of `metrics.jsonl` as a PNG at `path`.

    A curve of more than SMOOTHED_FROM points is drawn faintly under its running mean.
    """
    with drawing():
        panels = [panel for panel in PANELS if any(_points(rows, key) for key in panel[1])]
        figure, grid = make_panels(len(panels), shorten(title, 90))
        for axes, (name, keys, from_zero) in zip(grid, panels, strict=False):
            for key in keys:
                if points := _points(rows, key):
                    _curve(axes, points, key)
            finish_panel(axes, name, from_zero)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(fontsize=8, framealpha=0.6)
        save_figure(figure, path)


def draw_comparison(runs: Mapping[str, Rows], path: epath.PathLike) -> None:
    """Draws the curves of several runs over each other, the training curves faintly.

    A run that keeps an average of its parameters shows the validation of the average.
    """
    from matplotlib.lines import Line2D

    panels = [
        panel
        for panel in PANELS
        if any(_points(rows, key) for rows in runs.values() for key in panel[1])
    ]
    with drawing():
        figure, grid = make_panels(len(panels), "", below=0.22 * len(runs) + 0.3)
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
            finish_panel(axes, name + " (training faint)" * bool(both), from_zero)
        figure.legend(
            [
                Line2D([], [], color=f"C{i % 10}", linestyle=LINES[i // 10 % len(LINES)])
                for i in range(len(runs))
            ],
            [legend_label(name) for name in runs],
            loc="outside lower left",
            fontsize=8,
        )
        save_figure(figure, path)


def smooth(values: Sequence[float]) -> np.ndarray:
    """The running mean of a curve, over a window of 1/50 of its points, shorter at both ends."""
    count, half = len(values), len(values) // 100
    start = np.maximum(np.arange(count) - half, 0)
    stop = np.minimum(np.arange(count) + half + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[stop] - sums[start]) / (stop - start)


# Curves of one panel.


def _points(rows: Rows, key: str) -> tuple[list[int], list[float]] | None:
    """Steps and values of the curve `key`; None if no row has the key."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    return tuple(map(list, zip(*points, strict=True))) if points else None


def _curve(axes: Any, points: tuple[list[int], list[float]], key: str) -> None:
    label, color = KINDS[key.split("/")[0]]
    if _is_smoothed(points, key):
        axes.plot(*points, color=color, lw=0.4, alpha=0.3)
    _line(axes, points, key, color=color, lw=1.3, label=label)


def _line(axes: Any, points: tuple[list[int], list[float]], key: str, **style: Any) -> None:
    steps, values = points
    values = smooth(values) if _is_smoothed(points, key) else values
    marker = "o" if len(steps) <= MARKED else None
    axes.plot(steps, values, marker=marker, ms=3, **style)


def _is_smoothed(points: tuple[list[int], list[float]], key: str) -> bool:
    return len(points[0]) > SMOOTHED_FROM and key not in EXACT


# Figures, for every picture of the package.


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draws names literally: never as formulas, and without warnings about missing glyphs."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def make_figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """A figure of this size in inches at DPI; `layout` is matplotlib's layout engine."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def make_panels(count: int, title: str, below: float = 0.0) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, two in a row, with `below` inches for a legend."""
    rows = max(-(-count // 2), 1)
    figure = make_figure(9.5, 2.5 * rows + below + 0.3)
    if title:
        figure.suptitle(title, fontsize=11)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid


def save_figure(figure: Any, path: epath.PathLike, colors: int | None = 256) -> None:
    """Writes the figure as a PNG with a palette of `colors`, which halves the file; None: none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    with epath.Path(path).open("wb") as file:
        (image.quantize(colors) if colors else image).save(file, "PNG")


def finish_panel(axes: Any, name: str, from_zero: bool, along: str = "step") -> None:
    """Sets title, limits and ticks of a panel after its curves are drawn.

    Args:
      axes: the panel.
      name: its title.
      from_zero: whether the vertical axis begins at 0.
      along: label of the horizontal axis.
    """
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
        axes.yaxis.set_major_formatter(format_percent)
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


def format_percent(value: float, _: Any) -> str:
    """The tick of an axis whose values are shares."""
    return f"{100 * value:.4g}%"


def legend_label(name: str) -> str:
    """A name for a legend; matplotlib omits names that begin with an underscore."""
    name = shorten(name, 90)
    return f" {name}" if name.startswith("_") else name


def shorten(name: str, most: int) -> str:
    """The name in one line; of more than `most` characters, the middle is left out."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if len(name) <= most:
        return name
    end = most // 3
    return f"{name[: most - end - 1]}…{name[-end:]}"
