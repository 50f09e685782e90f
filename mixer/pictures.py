"""Pictures of a run."""

from collections.abc import Sequence
from typing import Any

from etils import epath

PANELS = (
    ("loss", ("train/loss", "val/loss")),
    ("accuracy", ("train/accuracy", "val/top1")),
    ("learning rate", ("train/learning_rate",)),
    ("norms", ("train/grad_norm", "train/param_norm")),
    ("images per second", ("perf/images_per_second",)),
    ("share of time waiting for data", ("perf/data_wait_share",)),
)


def draw_curves(rows: Sequence[dict[str, Any]], path: epath.PathLike, title: str) -> None:
    """Draws the curves of `metrics.jsonl`'s rows as a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    figure.suptitle(title)
    for axes, (name, keys) in zip(figure.subplots(3, 2).flat, PANELS, strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                marker = "o" if key.startswith("val/") or len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=key)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        if name == "norms":
            axes.set_yscale("log")
        elif name != "accuracy":
            axes.set_ylim(bottom=0)
        if axes.lines and len(keys) > 1:
            axes.legend(fontsize=8)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
