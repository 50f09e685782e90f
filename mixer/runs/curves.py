"""Draws the training curves of one or more runs as a PNG; provides helpers for all figures.

Figures are matplotlib objects without pyplot and its global state. Names come from user data, so
they are drawn literally, never as formulas, and long names are shortened.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

Rows = Sequence[Mapping[str, Any]]

# Title of a panel, its keys in metrics.jsonl, and whether its vertical axis starts at 0.
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
# For each prefix of a key, the label and the colour of the curve.
KINDS = {
    "train": ("training", "C0"),
    "val": ("validation", "C1"),
    "val_ema": ("validation, average", "C2"),
    "perf": ("", "C0"),
}
DPI = 110
LINE_STYLES = ("-", "--", ":", "-.")  # after ten runs, colours repeat with the next line style
UNSMOOTHED_KEYS = ("train/learning_rate", "train/param_norm")  # curves without noise
MAX_MARKED = 60  # curves with at most this many points have markers
SMOOTHED_FROM = 200  # curves with more points than this are smoothed


def draw_curves(rows: Rows, path: epath.PathLike, title: str) -> None:
    """Draws the curves in rows of `metrics.jsonl` as a PNG at `path`.

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
    """Draws the curves of several runs in the same panels, with faint training curves.

    If a run averages its parameters, its validation curve is that of the average.
    """
    from matplotlib.lines import Line2D

    panels = [
        panel
        for panel in PANELS
        if any(_points(rows, key) for rows in runs.values() for key in panel[1])
    ]
    with drawing():
        figure, grid = make_panels(len(panels), "", legend_inches=0.22 * len(runs) + 0.3)
        for axes, (name, keys, from_zero) in zip(grid, panels, strict=False):
            val_keys = [key for key in keys if key.startswith("val")]
            for number, rows in enumerate(runs.values()):
                best = [key for key in val_keys if _points(rows, key)][-1:]
                for key in [key for key in keys if key not in val_keys] + best:
                    if points := _points(rows, key):
                        alpha = 0.35 if best and key not in best else 1
                        width = 1 if alpha < 1 else 1.4
                        _line(axes, points, key, alpha=alpha, lw=width, **_style(number))
            has_both = val_keys and any(key not in val_keys for key in keys)
            finish_panel(axes, name + " (training faint)" * bool(has_both), from_zero)
        figure.legend(
            [Line2D([], [], **_style(number)) for number in range(len(runs))],
            [legend_label(name) for name in runs],
            loc="outside lower left",
            fontsize=8,
        )
        save_figure(figure, path)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Returns a curve's running mean over 1/50 of its points; the window is shorter at the ends."""
    count, half_width = len(values), len(values) // 100
    start = np.maximum(np.arange(count) - half_width, 0)
    stop = np.minimum(np.arange(count) + half_width + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[stop] - sums[start]) / (stop - start)


# Curves of one panel.


def _points(rows: Rows, key: str) -> tuple[list[int], list[float]] | None:
    """Returns the steps and values of the curve `key`; None if no row has the key."""
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
    marker = "o" if len(steps) <= MAX_MARKED else None
    axes.plot(steps, values, marker=marker, ms=3, **style)


def _style(number: int) -> dict[str, str]:
    """Returns the colour and the line style of a run's curves; `number` is the run's position."""
    line_style = LINE_STYLES[number // 10 % len(LINE_STYLES)]
    return {"color": f"C{number % 10}", "linestyle": line_style}


def _is_smoothed(points: tuple[list[int], list[float]], key: str) -> bool:
    return len(points[0]) > SMOOTHED_FROM and key not in UNSMOOTHED_KEYS


# Helpers for all figures of the package.


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draws names literally: never as formulas, and without warnings about missing glyphs."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def make_figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """Returns a figure with this size in inches at DPI; `layout` is matplotlib's layout engine."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def make_panels(count: int, title: str, legend_inches: float = 0.0) -> tuple[Any, list[Any]]:
    """Returns a figure of `count` panels, two per row, with `legend_inches` below for a legend."""
    rows = max(-(-count // 2), 1)
    figure = make_figure(9.5, 2.5 * rows + legend_inches + 0.3)
    if title:
        figure.suptitle(title, fontsize=11)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid


def save_figure(figure: Any, path: epath.PathLike, colors: int | None = 256) -> None:
    """Writes the figure as a PNG, quantized to `colors` to halve the file, or in full colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    with epath.Path(path).open("wb") as file:
        (image.quantize(colors) if colors else image).save(file, "PNG")


def finish_panel(axes: Any, name: str, from_zero: bool, x_label: str = "step") -> None:
    """Sets the title, limits and ticks of a panel after its curves are drawn.

    Args:
      axes: axes of the panel.
      name: title of the panel.
      from_zero: whether the vertical axis starts at 0.
      x_label: label of the horizontal axis.
    """
    from matplotlib import ticker

    axes.set_title(name, fontsize=10)
    axes.set_xlabel(x_label, fontsize=8)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    if x_label == "step":
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
    """Formats a tick of an axis whose values are fractions."""
    return f"{100 * value:.4g}%"


def legend_label(name: str) -> str:
    """Returns a name for a legend; matplotlib would omit a name that starts with an underscore."""
    name = shorten(name, 90)
    return f" {name}" if name.startswith("_") else name


def shorten(name: str, max_length: int) -> str:
    """Returns the name in one line; cuts out the middle of more than `max_length` characters."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if len(name) <= max_length:
        return name
    end = max_length // 3
    return f"{name[: max_length - end - 1]}…{name[-end:]}"
