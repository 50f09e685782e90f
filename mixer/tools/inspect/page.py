"""Draws the pictures of `mixer.tools.inspect`, and composes the page that shows them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mixer import files, run_files, sizes
from mixer.data.splits import Split
from mixer.errors import UserError
from mixer.evaluation import classification, results, scores
from mixer.evaluation.classification import Classification
from mixer.evaluation.evaluator import Batching
from mixer.evaluation.results import Results
from mixer.evaluation.tables import Table, html_table, html_text, percent, span
from mixer.models.registry import architecture_of
from mixer.parallel import sharding
from mixer.runs import config as run
from mixer.runs import curves
from mixer.tools.inspect import activations as inspection
from mixer.tools.inspect import data, pictures
from mixer.tools.inspect.document import Page, embed_picture, make_section
from mixer.weights import checkpoint, published
from mixer.weights import load as loading

MAX_ACTIVATION_IMAGES = 256  # images in the statistics of the activations
MAX_SHOWN_IMAGES = 12  # images with the most confident right guesses, and as many wrong ones
MAX_CONFUSIONS = 20  # rows in the table of the most frequent confusions
BATCH_SIZE = 64  # images per device


def write(
    *,
    workdirs: Sequence[str],
    weights: str | None,
    checkpoint_name: str,
    output: str | None,
    split_name: str | None,
    data_dir: str | None,
    image_size: tuple[int, int] | None,
    log: Callable[[str], None],
) -> epath.Path:
    """Draws pictures of a run or of weights as PNG files and writes `index.html`.

    Pictures that cannot be drawn are reported by a line in the log and on the page.

    Args:
      workdirs: runs; the first is drawn in detail, and all are compared. Empty with `weights`.
      weights: weights as `mixer.load` takes them, instead of runs.
      checkpoint_name: "last", "best" or a step number.
      output: directory of the files; None: `inspect` in the first run.
      split_name: split to evaluate, "val" or "test"; None: the test split if there is one.
      data_dir: data directory; for weights, a folder of images by split and class.
      image_size: (H, W) to which weights are resized; None: their own.
      log: prints a line about the progress or about a missing picture.

    Returns:
      The path of `index.html`.

    Raises:
      UserError: the run, checkpoint, file or requested data does not exist.
    """
    if not output and not workdirs:
        raise UserError("--output is missing; expected a directory for the pictures of --weights")
    if output:
        output = files.parse_path("--output", output)
    workdirs = [os.fspath(files.parse_path("--workdir", workdir)) for workdir in workdirs]
    configs = {workdir: run.read_run(workdir)[0] for workdir in workdirs}
    if len(configs) < len(workdirs):
        raise UserError(
            f"--workdir={','.join(workdirs)} lists a run twice; expected different runs"
        )
    config = configs[workdirs[0]] if workdirs else None
    source = checkpoint.find_named(workdirs[0], checkpoint_name) if workdirs else weights
    directory = output or epath.Path(workdirs[0]) / "inspect"
    page = Page(files.make_directory(directory, "--output" if output else ""), log)
    mesh = sharding.make_mesh({"data": -1})
    loaded = loading.read(source, image_size=image_size, mesh=mesh, log=log)
    saved_results = {workdir: results.read(workdir, checkpoint_name) for workdir in workdirs}
    sections = _run_sections(saved_results, page) if workdirs else []
    log("drawing the stem's filters")
    sections.append(_stem(loaded, page))
    if kernel := architecture_of(loaded.model).token_kernel:
        log("drawing the token-mixing units")
        sections.append(_units(loaded, kernel, page))
    metric_rows = []
    try:
        data_record = run_files.read_data(workdirs[0])["splits"] if workdirs else None
        split = data.open_split(config, loaded, split_name, data_dir, data_record)
    except UserError as error:
        if data_dir or split_name:
            raise
        reason = page.missing("activations, confusions and images", error)
        sections.append(make_section("Data", reason))
    else:
        data_sections, metric_rows = _data_sections(loaded, config, split, mesh, page)
        sections += data_sections
    rows = [("weights", published.redact(source)), *_model_rows(loaded)]
    if config is not None:
        rows += _training_rows(config)
        rows += _result_rows(saved_results[workdirs[0]])
    summary = [html_table(Table((), rows + metric_rows))]
    if config is not None:
        text = json.dumps(config.to_dict(), indent=2)
        summary.append(f"<details><summary>config</summary><pre>{html_text(text)}</pre></details>")
    title = str(workdirs[0] if workdirs else weights)
    return page.write(title, [make_section("Summary", *summary), *sections])


def _run_sections(saved_results: Mapping[str, Results | None], page: Page) -> list[str]:
    """Returns the comparison of several runs and the curves of the first run."""
    rows = {workdir: run_files.read_metrics(workdir, page.log) for workdir in saved_results}
    sections = []
    if len(rows) > 1:
        page.log(f"comparing {len(rows)} runs")
        sections.append(_comparison(rows, saved_results, page))
    workdir = next(iter(rows))
    return [*sections, _curves(workdir, rows[workdir], page)]


def _data_sections(
    loaded: loading.Loaded,
    config: ConfigDict | None,
    split: Split,
    mesh: Mesh,
    page: Page,
) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the sections about the images of a split, and rows for the summary."""
    count = min(MAX_ACTIVATION_IMAGES, split.num_examples)
    page.log(f"activations of {count:,} images")
    sections = [_activations(loaded, split, page)]
    if architecture_of(loaded.model).token_kernel is None:
        sections += _attention(loaded, split, page)
    if not loaded.card.num_classes:
        reason = page.missing("confusions and images", "the weights have no head")
        return [*sections, make_section("Guesses", reason)], []
    page.log(f"evaluating {split.num_examples:,} images of {split.name}")
    result = classification.evaluate_model(
        loaded.model,
        loaded.params,
        split,
        loss=config.loss if config is not None else "softmax",
        batching=Batching(mesh, BATCH_SIZE * jax.device_count()),
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


# Sections of the page.


def _comparison(
    rows: Mapping[str, curves.Rows],
    saved_results: Mapping[str, Results | None],
    page: Page,
) -> str:
    names = _short_names(list(rows))
    parts, notes = [], []
    if curves_by_name := {names[workdir]: lines for workdir, lines in rows.items() if lines}:
        path = page.directory / "comparison.png"
        curves.draw_comparison(curves_by_name, path)
        parts.append(embed_picture(path, f"curves of {len(curves_by_name)} runs in one picture"))
    for workdir, lines in rows.items():
        if not lines:
            parts.append(page.missing("curves", f"{workdir} has no metrics.jsonl"))
    drawn_results, table_rows = [], []
    for workdir, saved in saved_results.items():
        if saved is None or not saved.splits:
            reason = f"{workdir} has no results; run evaluate.py"
            notes.append(page.missing("results", reason))
            continue
        for split, result in saved.splits.items():
            drawn_results.append((names[workdir], split, result.top1, result.top1_interval))
            accuracy = _accuracy(result.top1, result.top1_interval)
            table_rows.append((names[workdir], split, f"{saved.step or 0:,}", accuracy))
    if table_rows:
        path = page.directory / "results.png"
        pictures.draw_results(drawn_results, path)
        parts.append(embed_picture(path, "accuracies of the runs with their intervals"))
        header = ("run", "split", "step", "top-1 (95 % interval)")
        parts.append(html_table(Table(header, table_rows)))
    parts += notes
    parts.append(f"<p>The pictures below show {html_text(next(iter(rows)))}.</p>")
    return make_section("Comparison", *parts)


def _curves(workdir: str, rows: curves.Rows, page: Page) -> str:
    if not rows:
        return make_section("Curves", page.missing("curves", f"{workdir} has no metrics.jsonl"))
    path = page.directory / "curves.png"
    curves.draw_curves(rows, path, epath.Path(workdir).name)
    last = rows[-1]["step"]
    return make_section(
        "Curves", embed_picture(path, f"training curves, {len(rows):,} lines, {last:,} steps")
    )


def _stem(loaded: loading.Loaded, page: Page) -> str:
    path = page.directory / "stem.png"
    kernel = sharding.by_name(loaded.params)[next(architecture_of(loaded.model).leaf_names(0))]
    pictures.draw_filters(inspection.stem_filters(kernel), path)
    caption = (
        "The stem's filters, largest norm first. Each filter is divided by its largest absolute "
        "weight; grey is 0."
    )
    if loaded.card.in_channels != sizes.RGB_CHANNELS:
        caption += " A filter's channels are side by side."
    return make_section("Stem", embed_picture(path, "the stem's filters as colour tiles", caption))


def _units(loaded: loading.Loaded, kernel: str, page: Page) -> str:
    grid, params = loaded.card.grid, sharding.by_name(loaded.params)
    kernels = [params[kernel.format(i)] for i in range(loaded.card.num_blocks)]
    groups = ""
    if kernels[0].ndim == 3:
        groups = f"These are the units of the first of {len(kernels[0]):,} groups of channels. "
        kernels = [kernel[0] for kernel in kernels]
    units = [inspection.pair_units(np.asarray(kernel), grid) for kernel in kernels]
    parts = [
        "<p>Input weights of the hidden units on the grid of "
        f"{grid[0]} x {grid[1]} patches: red is positive, blue is negative, and each unit is "
        f"divided by its largest absolute weight. {groups}Units of opposite phase are paired "
        "greedily; the pairs are sorted from low to high spatial frequency. The titles give the "
        "median cosine similarity of the pairs (-1: exactly opposite), and the same figure for "
        "shuffled weights.</p>"
    ]
    for blocks in pictures.unit_figures(units):
        path = page.directory / f"units_{blocks.start:02}.png"
        pictures.draw_units(units[blocks.start : blocks.stop], blocks.start, path)
        numbers = ", ".join(map(str, blocks))
        parts.append(embed_picture(path, f"token-mixing units of block {numbers}"))
    return make_section("Token mixing", *parts)


def _attention(loaded: loading.Loaded, split: Split, page: Page) -> list[str]:
    images = data.read_first(split, MAX_ACTIVATION_IMAGES)
    maps = inspection.attention_maps(loaded.model, loaded.params, images)
    if maps is None:
        return []
    path = page.directory / "attention.png"
    pictures.draw_attention(maps, path)
    caption = (
        "How much the class token, or the mean token if there is none, attends to each patch, over "
        f"the first {len(images):,} images of {split.name}. Each map is divided by its maximum."
    )
    return [
        make_section("Attention", embed_picture(path, "a map for each block and head", caption))
    ]


def _activations(loaded: loading.Loaded, split: Split, page: Page) -> str:
    images = data.read_first(split, MAX_ACTIVATION_IMAGES)
    statistics = inspection.activations(loaded.model, loaded.params, images)
    path = page.directory / "activations.png"
    pictures.draw_activations(statistics, path)
    caption = (
        "The residual stream after the stem (depth 0) and after each block, over all tokens of "
        f"the first {len(images):,} images of {split.name}. Bands show quantiles over the channels."
    )
    alt = "statistics of the channels by depth"
    return make_section("Activations", embed_picture(path, alt, caption))


def _confusion(result: Classification, split: Split, page: Page) -> str:
    if not result.confusion.any():
        return make_section(
            "Confusions", page.missing("confusions", "no image has exactly one label")
        )
    path, names = page.directory / "confusion.png", split.class_names
    pictures.draw_confusion(result, names, path)
    caption = f"{int(result.confusion.sum()):,} images of {split.name}."
    parts = [embed_picture(path, "confusion matrix and accuracy of each class", caption)]
    if pairs := inspection.frequent_confusions(result.confusion, MAX_CONFUSIONS):
        table_rows = [
            (names[c.label], names[c.guess], f"{c.count:,}", f"{c.share:.1%}") for c in pairs
        ]
        header = ("label", "first guess", "images", "share of the label's images")
        parts += ["<h3>The most frequent confusions</h3>", html_table(Table(header, table_rows))]
    order = np.argsort(np.nan_to_num(result.per_class, nan=2), kind="stable")
    counts = result.confusion.sum(axis=1)
    table_rows = []
    for k in order[: np.count_nonzero(counts)]:
        interval = scores.interval(result.confusion[k, k], counts[k])
        table_rows.append((names[k], f"{counts[k]:,}", _accuracy(result.per_class[k], interval)))
    table = html_table(Table(("class", "images", "accuracy (95 % interval)"), table_rows))
    parts.append(f"<details><summary>Accuracy of each class</summary>{table}</details>")
    return make_section("Confusions", *parts)


def _images(loaded: loading.Loaded, result: Classification, split: Split, page: Page) -> str:
    names, predictions = split.class_names, result.predictions
    if loaded.card.in_channels not in (1, sizes.RGB_CHANNELS):
        reason = f"they have {loaded.card.in_channels} channels"
        return make_section("Images", page.missing("images", reason))
    parts = []
    for hit, file, title in (
        (True, "right.png", "correct guesses with the highest probability"),
        (False, "wrong.png", "wrong guesses with the highest probability"),
    ):
        indices = inspection.most_confident(predictions, hit, MAX_SHOWN_IMAGES)
        if not len(indices):
            parts.append(page.missing(title, "there are none"))
            continue
        images = [
            data.as_pixels(image, loaded.card.preprocess)
            for image in data.read_images(split, indices)
        ]
        captions, table_rows = [], []
        for index in indices:
            label = "several" if predictions.label[index] < 0 else names[predictions.label[index]]
            guess = names[predictions.guesses[index, 0]]
            probability = f"{predictions.probability[index]:.1%}"
            short = curves.shorten(guess, 20)
            if not hit:
                short += f"\n({curves.shorten(label, 20)})"
            captions.append(f"{probability} {short}")
            table_rows.append((split.example_id(int(index)), label, guess, probability))
        pictures.draw_images(images, captions, page.directory / file)
        caption = "Probability and first guess" + "; the label in brackets" * (not hit) + "."
        table = html_table(Table(("image", "label", "first guess", "probability"), table_rows))
        parts += [
            f"<h3>{title.capitalize()}</h3>",
            embed_picture(page.directory / file, title, caption),
            f"<details><summary>List of these images</summary>{table}</details>",
        ]
    return make_section("Images", *parts)


def _model_rows(loaded: loading.Loaded) -> list[tuple[str, str]]:
    card = loaded.card
    count = sharding.num_values(loaded.params)
    model = ", ".join(f"{name}={dim}" for name, dim in card.dimensions.items())
    height, width = card.image_size
    return [
        ("model", f"{card.variant}: {model}" if card.variant else model),
        ("parameters", f"{count:,}"),
        ("images", f"{height} x {width} pixels, {card.grid[0]} x {card.grid[1]} patches"),
        ("preprocessing", card.preprocess or "unknown"),
        ("classes", f"{card.num_classes:,}" if card.num_classes else "none: no head"),
    ]


def _training_rows(config: Any) -> list[tuple[str, str]]:
    dataset, optimizer = config.dataset, config.optimizer
    return [
        ("data", " ".join(filter(None, (dataset.name, dataset.data_dir, dataset.train_split)))),
        ("training", f"{config.total_steps:,} steps of {config.global_batch_size:,} images"),
        (
            "optimizer",
            f"{optimizer.name}, peak learning rate {optimizer.peak_lr:g}, weight decay "
            f"{optimizer.weight_decay:g}, {config.schedule.decay} schedule",
        ),
        ("training images", dataset.train_preprocess),
    ]


def _result_rows(saved: Results | None) -> list[tuple[str, str]]:
    """Returns a row for each accuracy in the run's results.json."""
    if saved is None:
        return []
    return [
        (f"{name}, step {saved.step or 0:,}", _accuracy(result.top1, result.top1_interval))
        for name, result in saved.splits.items()
    ]


def _short_names(workdirs: Sequence[str]) -> dict[str, str]:
    """Returns the base names of the runs, or their paths if base names are not unique."""
    names = [epath.Path(workdir).name for workdir in workdirs]
    return dict(zip(workdirs, names if len({*names}) == len(names) else workdirs, strict=True))


def _accuracy(share: float, interval: tuple[float, float]) -> str:
    return f"{percent(share)} ({span(interval)})"
