"""The page of `mixer.tools.inspect`: the pictures of a run or a file, and the HTML around them."""

import base64
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mixer import files, run_files
from mixer.data import splits
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import classification, results, scores
from mixer.evaluation.classification import Classification
from mixer.evaluation.results import Results
from mixer.evaluation.tables import Table, html_table, html_text, percent, span
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.runs import curves
from mixer.tools.inspect import activations as inspection
from mixer.tools.inspect import pictures
from mixer.tools.predict import prediction
from mixer.weights import checkpoint, published
from mixer.weights import load as loading

IMAGES_LOOKED_INTO = 256  # of whose activations there are statistics
SHOWN = 12  # of the surest right and wrong images
LISTED = 20  # of the most frequent confusions
PER_DEVICE = 64  # images at once

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --quiet: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto;
  padding: 0 1rem 3rem; }
h1, h2, td, th, p, pre, figcaption { overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
figure { margin: 1rem 0; }
.wide { overflow-x: auto; }
.wide img { min-width: 36rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, .missing { color: var(--quiet); font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { text-align: left; vertical-align: top; min-width: 3.6rem; padding: 0.2rem 0.8rem 0.2rem 0;
  border-bottom: 1px solid var(--line); }
pre { white-space: pre-wrap; font-size: 0.8rem; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Page:
    """The directory of the page and its pictures, and a report of what cannot be drawn."""

    def __init__(self, directory: epath.Path, log: Callable[[str], None]):
        self._directory = directory
        self.log = log

    def path(self, name: str) -> epath.Path:
        """The path of the picture called `name`."""
        return self._directory / name

    def missing(self, what: str, why: Any) -> str:
        """Reports in the log, and on the page, that something is not drawn."""
        self.log(f"not drawn: {what}: {why}")
        return f'<p class="missing">Not drawn: {html_text(what)}: {html_text(why)}</p>'

    def write(self, title: str, sections: Iterable[str]) -> epath.Path:
        """Writes index.html, and returns its path."""
        path = self.path("index.html")
        with files.whole(path) as new:
            new.write_text(document(title, sections))
        return path


def write(
    *,
    workdirs: Sequence[str],
    weights: str | None,
    checkpoint_name: str,
    output: str | None,
    which: str | None,
    data_dir: str | None,
    image_size: tuple[int, int] | None,
    log: Callable[[str], None],
) -> epath.Path:
    """Draws what can be drawn of a run, or a file of weights, as PNG files and `index.html`.

    A line in the log and on the page reports what cannot be drawn.

    Args:
      workdirs: runs; the first is looked into, all are compared. Empty with `weights`.
      weights: whatever `mixer.load` takes, in place of runs.
      checkpoint_name: "last", "best" or a step's number.
      output: directory of the files; None: `inspect` in the first run.
      which: split "val" or "test" that is evaluated; None: the test split if there is one.
      data_dir: where the data is now; of a file of weights, a folder of images by split and class.
      image_size: (H, W) of the images that a file of weights is for, or is grown to.
      log: prints a line about what is done or cannot be done.

    Returns:
      The path of `index.html`.

    Raises:
      UserError: no such run, checkpoint or file; data that was asked for and is missing.
    """
    if not output and not workdirs:
        raise UserError("--output is missing: where do the pictures of --weights go?")
    if output:
        output = files.parse_path("--output", output)
    workdirs = [os.fspath(files.parse_path("--workdir", workdir)) for workdir in workdirs]
    configs = {workdir: run.read_run(workdir)[0] for workdir in workdirs}
    if len(configs) < len(workdirs):
        raise UserError(f"--workdir={','.join(workdirs)} names a run twice")
    config = configs[workdirs[0]] if workdirs else None
    source = checkpoint.find_named(workdirs[0], checkpoint_name) if workdirs else weights
    directory = output or epath.Path(workdirs[0]) / "inspect"
    page = Page(files.make_directory(directory, "--output" if output else ""), log)
    mesh = sharding.make_mesh({"data": -1})
    loaded = loading.read(source, image_size=image_size, mesh=mesh, log=log)
    recorded = {workdir: results.read(workdir, checkpoint_name) for workdir in workdirs}
    sections = _run_sections(recorded, page) if workdirs else []
    log("drawing the stem's filters and the token-mixing units")
    sections += [_stem(loaded, page), _units(loaded, page)]
    evaluated = []
    try:
        record = run_files.read_data(workdirs[0])["splits"] if workdirs else None
        split = _open(config, loaded, which, data_dir, record)
    except UserError as error:
        if data_dir or which:
            raise
        reason = page.missing("activations, confusions and images", error)
        sections.append(_section("Data", reason))
    else:
        more, evaluated = _data_sections(loaded, config, split, mesh, page)
        sections += more
    about = [("weights", published.shown(source)), *_described(loaded)]
    if config is not None:
        about += _training(config)
        about += _recorded_rows(recorded[workdirs[0]])
    summary = [html_table(Table((), about + evaluated))]
    if config is not None:
        text = json.dumps(config.to_dict(), indent=2)
        summary.append(f"<details><summary>config</summary><pre>{html_text(text)}</pre></details>")
    title = str(workdirs[0] if workdirs else weights)
    return page.write(title, [_section("Summary", *summary), *sections])


def _run_sections(recorded: Mapping[str, Results | None], page: Page) -> list[str]:
    """The comparison of several runs, and the curves of the first."""
    rows = {workdir: run_files.read_metrics(workdir, page.log) for workdir in recorded}
    sections = []
    if len(rows) > 1:
        page.log(f"comparing {len(rows)} runs")
        sections.append(_comparison(rows, recorded, page))
    workdir = next(iter(rows))
    return [*sections, _curves(workdir, rows[workdir], page)]


def _data_sections(
    loaded: loading.Loaded,
    config: ConfigDict | None,
    split: Split,
    mesh: Mesh,
    page: Page,
) -> tuple[list[str], list[tuple[str, str]]]:
    """What the images of a split show: the sections, and the lines of the summary."""
    count = min(IMAGES_LOOKED_INTO, split.num_examples)
    page.log(f"activations of {count:,} images")
    sections = [_activations(loaded, split, page)]
    if not loaded.card.num_classes:
        reason = page.missing("confusions and images", "the weights have no head")
        return [*sections, _section("Guesses", reason)], []
    page.log(f"evaluating {split.num_examples:,} images of {split.name}")
    result = classification.evaluate_model(
        loaded.model,
        loaded.params,
        split,
        loss=config.loss if config is not None else "softmax",
        mesh=mesh,
        global_batch_size=PER_DEVICE * jax.device_count(),
    )
    sections.append(_confusion(result, split, page))
    sections.append(_images(loaded, result, split, page))
    top1 = _accuracy(result.top1, result.top1_interval)
    summary = [
        (f"here: {split.name}, {result.count:,} images", top1),
        ("here: top-5", _accuracy(result.top5, result.top5_interval)),
        ("here: loss; calibration error", f"{result.loss:.4f}; {result.ece:.2%}"),
    ]
    return sections, summary


# What is drawn.


def _comparison(
    rows: Mapping[str, curves.Rows],
    recorded: Mapping[str, Results | None],
    page: Page,
) -> str:
    names = _short_names(list(rows))
    parts = []
    if drawn := {names[workdir]: part for workdir, part in rows.items() if part}:
        path = page.path("comparison.png")
        curves.draw_comparison(drawn, path)
        parts.append(_picture(path, f"curves of {len(drawn)} runs over each other"))
    for workdir, part in rows.items():
        if not part:
            parts.append(page.missing("curves", f"{workdir} has no metrics.jsonl"))
    lines, body = [], []
    for workdir, saved in recorded.items():
        if saved is None or not saved.splits:
            continue
        for split, result in saved.splits.items():
            lines.append((names[workdir], split, result.top1, result.top1_interval))
            accuracy = _accuracy(result.top1, result.top1_interval)
            body.append((names[workdir], split, f"{saved.step or 0:,}", accuracy))
    if lines:
        path = page.path("results.png")
        pictures.draw_results(lines, path)
        parts.append(_picture(path, "accuracies of the runs with their intervals"))
        head = ("run", "split", "step", "top-1, interval of 95 %")
        parts.append(html_table(Table(head, body)))
    for workdir, saved in recorded.items():
        if saved is None or not saved.splits:
            reason = f"{workdir} has none; evaluate.py makes them"
            parts.append(page.missing("results", reason))
    parts.append(f"<p>The pictures below are of {html_text(next(iter(rows)))}.</p>")
    return _section("Comparison", *parts)


def _curves(workdir: str, rows: curves.Rows, page: Page) -> str:
    if not rows:
        return _section("Curves", page.missing("curves", f"{workdir} has no metrics.jsonl"))
    path = page.path("curves.png")
    curves.draw_curves(rows, path, epath.Path(workdir).name)
    last = rows[-1]["step"]
    return _section(
        "Curves", _picture(path, f"training curves, {len(rows):,} lines, {last:,} steps")
    )


def _stem(loaded: loading.Loaded, page: Page) -> str:
    path = page.path("stem.png")
    kernel = np.asarray(loaded.params["stem"]["kernel"])
    pictures.draw_filters(inspection.stem_filters(kernel), path)
    caption = (
        "The stem's filters, those with the largest norm first. Each has a scale of its own, its "
        "largest weight in size; grey is 0."
    )
    return _section("Stem", _picture(path, "the stem's filters as colour tiles", caption))


def _units(loaded: loading.Loaded, page: Page) -> str:
    grid = loaded.card.grid
    units = [
        inspection.paired_units(
            np.asarray(loaded.params[f"MixerBlock_{i}"]["token_mixing"]["Dense_0"]["kernel"]), grid
        )
        for i in range(loaded.card.num_blocks)
    ]
    parts = [
        "<p>Input weights of the hidden units on the grid of "
        f"{grid[0]} x {grid[1]} patches: red is positive, blue negative, each unit has a scale of "
        "its own. Units of opposite phase stand together, paired greedily; pairs go from low to "
        "high spatial frequency. The median cosine similarity within the pairs says how opposite "
        "they are (-1: exactly), beside what pairing finds among the same weights shuffled.</p>"
    ]
    for blocks in pictures.unit_figures(units):
        path = page.path(f"units_{blocks.start:02}.png")
        pictures.draw_units(units[blocks.start : blocks.stop], blocks.start, path)
        which = ", ".join(map(str, blocks))
        parts.append(_picture(path, f"token-mixing units of block {which}"))
    return _section("Token mixing", *parts)


def _activations(loaded: loading.Loaded, split: Split, page: Page) -> str:
    images = inspection.read_first(split, IMAGES_LOOKED_INTO)
    statistics = inspection.activations(loaded.model, loaded.params, images)
    path = page.path("activations.png")
    pictures.draw_activations(statistics, path)
    caption = (
        "The residual stream behind the stem (depth 0) and behind each block: over all tokens of "
        f"the first {len(images):,} images of {split.name}. The bands are over the channels."
    )
    alt = "statistics of the channels by depth"
    return _section("Activations", _picture(path, alt, caption))


def _confusion(result: Classification, split: Split, page: Page) -> str:
    if not result.confusion.any():
        return _section("Confusions", page.missing("confusions", "no image has one label alone"))
    path, names = page.path("confusion.png"), split.class_names
    pictures.draw_confusion(result, names, path)
    caption = f"{int(result.confusion.sum()):,} images of {split.name}."
    parts = [_picture(path, "confusion matrix and accuracy of each class", caption)]
    if pairs := inspection.frequent_confusions(result.confusion, LISTED):
        body = [(names[c.label], names[c.guess], f"{c.count:,}", f"{c.share:.1%}") for c in pairs]
        head = ("label", "first guess", "images", "of the label's")
        parts += ["<h3>The most frequent confusions</h3>", html_table(Table(head, body))]
    order = np.argsort(np.nan_to_num(result.per_class, nan=2), kind="stable")
    counts = result.confusion.sum(axis=1)
    body = []
    for k in order[: np.count_nonzero(counts)]:
        interval = scores.interval(result.confusion[k, k], counts[k])
        body.append((names[k], f"{counts[k]:,}", _accuracy(result.per_class[k], interval)))
    table = html_table(Table(("class", "images", "accuracy, interval of 95 %"), body))
    parts.append(f"<details><summary>Accuracy of each class</summary>{table}</details>")
    return _section("Confusions", *parts)


def _images(loaded: loading.Loaded, result: Classification, split: Split, page: Page) -> str:
    names, predictions = split.class_names, result.predictions
    parts = []
    for hit, file, what in (
        (True, "right.png", "right with the highest probability"),
        (False, "wrong.png", "wrong with the highest probability"),
    ):
        places = inspection.surest(predictions, hit, SHOWN)
        if not len(places):
            parts.append(page.missing(f"images that were {what}", "there are none"))
            continue
        images = [
            inspection.as_pixels(image, loaded.card.preprocess)
            for image in inspection.read_images(split, places)
        ]
        captions, body = [], []
        for place in places:
            label = "several" if predictions.label[place] < 0 else names[predictions.label[place]]
            guess = names[predictions.guesses[place, 0]]
            probability = f"{predictions.probability[place]:.1%}"
            short = curves.shorten(guess, 20)
            if not hit:
                short += f"\n({curves.shorten(label, 20)})"
            captions.append(f"{probability} {short}")
            body.append((split.example_id(int(place)), label, guess, probability))
        pictures.draw_images(images, captions, page.path(file))
        caption = "Probability and first guess" + "; the label in brackets" * (not hit) + "."
        table = html_table(Table(("image", "label", "first guess", "probability"), body))
        parts += [
            f"<h3>{what.capitalize()}</h3>",
            _picture(page.path(file), f"images that were {what}", caption),
            f"<details><summary>Which they are</summary>{table}</details>",
        ]
    return _section("Images", *parts)


# The data, and the rows of the summary.


def _open(
    config: Any,
    loaded: loading.Loaded,
    which: str | None,
    data_dir: str | None,
    record: dict[str, Any] | None,
) -> Split:
    """The split to evaluate, of a run's config, or of a folder for a file of weights."""
    if config is not None:
        if data_dir is not None:
            config.dataset.data_dir = data_dir
        names = tuple(loaded.card.class_names)
        for name in (which,) if which else ("test", "val"):
            split = run.open_own_split(config, name, names, record)
            if split is not None:
                return split
        raise UserError(f"the config names no split {which or 'test or val'}")
    if data_dir is None:
        raise UserError("no data: --data_dir=FOLDER would give images")
    if loaded.card.preprocess is None:
        raise UserError(f"{loaded.card.source} does not say how its images are preprocessed")
    folder = dict(name="folder", data_dir=data_dir, label_file="", label_key="", exclude="")
    folder = ConfigDict(folder | dict(shuffle_group_size=1))
    split = splits.open_split(
        folder,
        which or "test",
        loaded.card.preprocess,
        image_size=loaded.card.image_size,
        num_classes=loaded.card.num_classes or None,
        class_names=prediction.names_of(loaded.card),
    )
    if loaded.card.num_classes not in (0, len(split.class_names)):
        raise UserError(
            f"{split.name} has {len(split.class_names):,} classes, and {loaded.card.source} "
            f"{loaded.card.num_classes:,}"
        )
    return split


def _described(loaded: loading.Loaded) -> list[tuple[str, str]]:
    card, dims = loaded.card, loaded.card.dimensions
    count = sharding.num_values(loaded.params)
    model = (
        f"{card.num_blocks} blocks, patch {card.patch_size}, {dims['hidden_dim']} channels, MLPs "
        f"of {dims['tokens_mlp_dim']} (tokens) and {dims['channels_mlp_dim']:,} (channels)"
    )
    height, width = card.image_size
    return [
        ("model", f"{card.variant}: {model}" if card.variant else model),
        ("parameters", f"{count:,}"),
        ("images", f"{height} x {width} pixels, {card.grid[0]} x {card.grid[1]} patches"),
        ("preprocessing", card.preprocess or "not known"),
        ("classes", f"{card.num_classes:,}" if card.num_classes else "none: no head"),
    ]


def _training(config: Any) -> list[tuple[str, str]]:
    data, optimizer = config.dataset, config.optimizer
    return [
        ("data", " ".join(filter(None, (data.name, data.data_dir, data.train_split)))),
        ("training", f"{config.total_steps:,} steps of {config.global_batch_size:,} images"),
        (
            "optimizer",
            f"{optimizer.name}, peak learning rate {optimizer.peak_lr:g}, weight decay "
            f"{optimizer.weight_decay:g}, {config.schedule.decay} schedule",
        ),
        ("training images", data.train_preprocess),
    ]


def _recorded_rows(saved: Results | None) -> list[tuple[str, str]]:
    """The accuracies that the run's results.json holds."""
    if saved is None:
        return []
    return [
        (f"{name}, step {saved.step or 0:,}", _accuracy(result.top1, result.top1_interval))
        for name, result in saved.splits.items()
    ]


def _short_names(workdirs: Sequence[str]) -> dict[str, str]:
    """The runs' last parts, or their whole paths where two have the same."""
    names = [epath.Path(workdir).name for workdir in workdirs]
    return dict(zip(workdirs, names if len({*names}) == len(names) else workdirs, strict=True))


# HTML.


def document(title: str, sections: Iterable[str]) -> str:
    """A page that fetches nothing and runs nothing."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html_text(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{html_text(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _picture(path: epath.Path, alt: str, caption: str = "") -> str:
    """A picture inside the page; on a narrow screen it can be scrolled in its own box."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{html_text(alt)}" src="data:image/png;base64,{data}">'
    box = f'<div class="wide" tabindex="0">{image}</div>'
    return f"<figure>{box}<figcaption>{html_text(caption)}</figcaption></figure>"


def _accuracy(share: float, interval: tuple[float, float]) -> str:
    return f"{percent(share)} ({span(interval)})"
