"""mixer.tools.inspect: the numbers in its pictures, drawing at any size, the page in a browser."""

import functools
import html
import http.server
import json
import queue
import re
import shutil
import subprocess
import threading
import warnings

import jax
import numpy as np
import optax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from helpers import GOLDENS, golden_params, run_program, run_python, tiny_config
from mixer.errors import UserError
from mixer.evaluation import classification
from mixer.runs import config as run
from mixer.runs import curves, directory
from mixer.runs import data as run_data
from mixer.tools.inspect import activations as inspection
from mixer.tools.inspect import data, page, pictures
from mixer.training import program
from mixer.training.state import TrainState
from mixer.weights import checkpoint
from mixer.weights import formats as weights
from mixer.weights import load as loading

# Class names that need escaping in HTML or TeX, and one that is too long to draw.
CLASSES = ("$x_1$ & <b>", "<script>alert(1)<", "a class name that is far too long to draw 汉字")


# Numbers.


def test_opposites_are_paired_greedily():
    units = np.random.default_rng(0).standard_normal((31, 6)).astype(np.float32)
    unit = units / np.linalg.norm(units, axis=1, keepdims=True)
    similarity = unit @ unit.T
    unpaired, expected = set(range(31)), set()
    while len(unpaired) > 1:
        pair = min(
            ((i, j) for i in unpaired for j in unpaired if i < j), key=lambda pair: similarity[pair]
        )
        expected.add(pair)
        unpaired -= set(pair)
    pairs, cosine = inspection.pair_opposites(units)
    assert {tuple(pair) for pair in pairs.tolist()} == expected
    np.testing.assert_allclose(cosine, similarity[tuple(pairs.T)], atol=1e-6)


def _waves(frequencies, grid):
    rows = np.arange(grid[0])[:, None] + 0 * np.arange(grid[1])
    return np.stack([np.cos(2 * np.pi * f * rows / grid[0] + 0.3) for f in frequencies])


def test_opposite_units_are_paired_and_sorted_by_frequency():
    grid = (8, 6)
    waves = _waves([3, 1, 2], grid)
    scale = np.array([1, 5, 0.2, 2, 1, 7])[:, None, None]
    units = np.concatenate([waves, -waves])[[4, 0, 2, 3, 1, 5]] * scale
    pairs = inspection.pair_units(units.reshape(6, -1).T, grid)
    assert pairs.weights.shape == (3, 2, *grid) and pairs.num_units == 6
    expected = _waves([1, 2, 3], grid)
    for (unit, opposite), wave in zip(pairs.weights, expected, strict=True):
        np.testing.assert_allclose(unit, -opposite, atol=1e-5)
        np.testing.assert_allclose(np.abs(unit), np.abs(wave) / np.abs(wave).max(), atol=1e-5)
    assert pairs.cosine == pytest.approx(-1) and -0.9 < pairs.chance < 0
    np.testing.assert_allclose(
        inspection.frequencies(expected + 5), [1 / 8, 2 / 8, 3 / 8], rtol=1e-6
    )


@pytest.mark.parametrize("kernel", [np.zeros((12, 5)), np.ones((12, 1))])
def test_identical_or_single_units_cause_no_warning(kernel):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = inspection.pair_units(kernel, (3, 4))
    assert pairs.weights.shape == (kernel.shape[1] // 2, 2, 3, 4)
    assert np.isfinite(pairs.weights).all() and pairs.cosine == pairs.chance == 0


def test_filters_are_sorted_by_energy_and_scaled_separately():
    kernel = np.zeros((2, 2, 3, 3), np.float32)
    kernel[..., 0] = 0.5
    kernel[0, 0, 0, 1], kernel[1, 1, 2, 1] = -8, 4
    filters = inspection.stem_filters(kernel)
    assert filters.shape == (3, 2, 2, 3)
    assert (filters[0, 0, 0, 0], filters[0, 1, 1, 2], filters[0, 0, 1, 0]) == (0, 0.75, 0.5)
    assert (filters[1] == 1).all() and (filters[2] == 0.5).all()


def test_smoothing_is_a_centred_running_mean():
    values = np.random.default_rng(0).standard_normal(1000)
    mean = curves.smooth(values)
    np.testing.assert_allclose(mean[10:-10], np.convolve(values, np.ones(21) / 21, "valid"))
    assert mean[0] == pytest.approx(values[:11].mean())
    assert mean[-1] == pytest.approx(values[-11:].mean())


def _norm(x, weights):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * weights["scale"] + weights["bias"]


def _mlp(x, weights):
    x = x @ weights["Dense_0"]["kernel"] + weights["Dense_0"]["bias"]
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x @ weights["Dense_1"]["kernel"] + weights["Dense_1"]["bias"]


def test_activation_statistics_match_a_float64_reference():
    """Compares five images, in batches of two, with a float64 implementation of the blocks."""
    loaded = loading.read(GOLDENS / "mixer_tiny_official.npz", log=lambda line: None)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    actual = inspection.activations(loaded.model, loaded.params, images, batch_size=2)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), golden_params())
    patches = (images / 127.5 - 1).reshape(5, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(5, 16, 192)
    x = patches @ params["stem"]["kernel"].reshape(192, -1) + params["stem"]["bias"]
    assert actual.num_images == 5 and len(actual.norm) == loaded.card.num_blocks + 1

    def size(x):
        return np.sqrt(np.mean(np.sum(x**2, axis=-1)))

    for i in range(loaded.card.num_blocks + 1):
        flat = x.reshape(-1, x.shape[-1])
        covariance = np.cov(flat.T, bias=True)
        eigenvalues = np.linalg.eigvalsh(covariance)
        std = flat.std(axis=0)
        np.testing.assert_allclose(actual.mean[i], flat.mean(axis=0), atol=2e-5)
        np.testing.assert_allclose(actual.std[i], std, rtol=1e-4)
        assert actual.norm[i] == pytest.approx(size(x), rel=1e-5)
        expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
        assert actual.dimensions[i] == pytest.approx(expected, rel=1e-4)
        assert actual.dead[i] == (std < 0.1 * np.median(std)).sum()
        assert actual.hot[i] == (std > 10 * np.median(std)).sum()
        if i == loaded.card.num_blocks:
            break
        block = params[f"MixerBlock_{i}"]
        tokens = _mlp(_norm(x, block["LayerNorm_0"]).swapaxes(1, 2), block["token_mixing"])
        tokens = tokens.swapaxes(1, 2)
        channels = _mlp(_norm(x + tokens, block["LayerNorm_1"]), block["channel_mixing"])
        assert actual.token_update[i] == pytest.approx(size(tokens) / size(x), rel=1e-4)
        expected = size(channels) / size(x + tokens)
        assert actual.channel_update[i] == pytest.approx(expected, rel=1e-4)
        x = x + tokens + channels


def _result(label, guess, num_classes, probability=None):
    label, guess = np.asarray(label), np.asarray(guess)
    hit = label == guess
    probability = np.full(len(label), 0.5) if probability is None else np.asarray(probability)
    return classification.summarize(
        classification.Predictions(
            label=label,
            labelled=label >= 0,
            guesses=guess[:, None],
            probability=probability.astype(np.float32),
            hit=hit,
            hit5=hit,
            loss=np.ones(len(label), np.float32),
        ),
        num_classes,
    )


def test_confused_classes_become_neighbours():
    """Twelve groups of five classes in random order, and three classes without images."""
    rng = np.random.default_rng(0)
    classes = rng.permutation(60)
    confusion = np.zeros((63, 63), np.int64)
    for group in range(12):
        members = classes[5 * group : 5 * group + 5]
        confusion[np.ix_(members, members)] = rng.integers(1, 5, (5, 5))
    confusion[np.arange(60), np.arange(60)] += 20
    order = inspection.cluster_order(confusion).tolist()
    assert sorted(order) == list(range(63))
    for group in range(12):
        positions = [order.index(k) for k in classes[5 * group : 5 * group + 5]]
        assert max(positions) - min(positions) == 4


def test_frequent_confusions_and_confident_images_are_listed():
    confusion = np.array([[90, 0, 10], [3, 5, 2], [0, 0, 7]])
    confusions = inspection.frequent_confusions(confusion, 2)
    assert [(c.label, c.guess, c.count, c.share) for c in confusions] == [
        (0, 2, 10, 0.1),
        (1, 0, 3, 0.3),
    ]
    assert inspection.frequent_confusions(np.eye(3, dtype=int), 5) == []
    result = _result([0, 1, 1, -1, 0], [0, 1, 0, 0, 0], 2, [0.6, 0.9, 0.7, 0.99, 0.9])
    assert inspection.most_confident(result.predictions, True, 2).tolist() == [1, 4]
    assert inspection.most_confident(result.predictions, False, 2).tolist() == [2]


def test_pixels_are_restored_from_any_value_range():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert data.as_pixels(pixels, "decode|value_range(0, 1)") is pixels
    for low, high in ((0, 1), (-1, 1), (-2, 3)):
        floats = low + (high - low) * pixels.astype(np.float32) / 255
        restored = data.as_pixels(floats, f"decode|value_range({low}, {high})")
        np.testing.assert_array_equal(restored, pixels)


# Drawing.


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="matplotlib|mixer|PIL")
        yield


def _rows(count):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, count + 1):
        noise = float(rng.normal())
        row = {"step": step, "train/loss": 2 + 0.2 * noise, "train/accuracy": 0.5 + 0.1 * noise}
        row |= {"train/learning_rate": 1e-3, "train/grad_norm": 10**noise, "train/param_norm": 9.0}
        row |= {"perf/images_per_second": 100.0, "perf/data_wait_share": 0.0}
        rows.append(row)
    metrics = {"val/loss": 1.0, "val/top1": 0.6, "val_ema/loss": 0.9, "val_ema/top1": 0.7}
    return [*rows, {"step": count, **metrics, "val/ece": 0.1}]


@pytest.mark.slow  # the tests of the page cover one size
@pytest.mark.parametrize("count", [3, 10_000])
def test_curves_of_any_length_are_drawn(tmp_path, count):
    rows = _rows(count)
    curves.draw_curves(rows, tmp_path / "curves.png", "_$a run$ " + "x" * 300)
    curves.draw_comparison({"_a": rows, "$b$" * 50: rows[:-1]}, tmp_path / "both.png")
    for name in ("curves.png", "both.png"):
        assert Image.open(tmp_path / name).size[0] == 1045
        assert (tmp_path / name).stat().st_size < 150_000


@pytest.mark.slow
def test_long_curves_are_thin_lines_with_a_thick_mean(tmp_path, monkeypatch):
    figures = []
    draw = FigureCanvasAgg.draw
    monkeypatch.setattr(
        FigureCanvasAgg, "draw", lambda canvas: (figures.append(canvas.figure), draw(canvas))
    )
    for count in (3, 1000):
        curves.draw_curves(_rows(count), tmp_path / "curves.png", "run")
    short_lines, long_lines = (figure.axes[0].lines for figure in figures)
    assert [line.get_marker() for line in short_lines] == ["o"] * 3
    raw, mean, *_ = long_lines
    assert raw.get_linewidth() < 1 < mean.get_linewidth() and raw.get_marker() == "None"
    assert np.std(mean.get_ydata()) < np.std(raw.get_ydata()) / 3
    rate = next(axes for axes in figures[1].axes if axes.get_title() == "learning rate")
    assert len(rate.lines) == 1
    labels = figures[0].axes[0].get_legend_handles_labels()[1]
    assert labels == ["training", "validation", "validation, average"]


@pytest.mark.slow  # the tests of the page cover one size
@pytest.mark.parametrize("count", [3, 40, 300])
def test_confusion_matrix_of_any_size_is_drawn(tmp_path, count):
    rng = np.random.default_rng(0)
    label = rng.integers(0, count - 1, 5 * count)  # the last class has no image
    guess = np.where(rng.random(len(label)) < 0.7, label, rng.integers(0, count, len(label)))
    names = [CLASSES[k % 3] + str(k) for k in range(count)]
    path = tmp_path / "confusion.png"
    pictures.draw_confusion(_result(label, guess, count), names, path)
    assert 500 < Image.open(path).size[0] < 2000


@pytest.mark.slow  # the tests of the page cover one size
@pytest.mark.parametrize(("side", "count"), [(2, 3), (16, 768), (32, 100)])
def test_filters_of_any_size_are_drawn(tmp_path, side, count):
    kernel = np.random.default_rng(0).standard_normal((side, side, 3, count))
    pictures.draw_filters(inspection.stem_filters(kernel), tmp_path / "stem.png")
    width, height = Image.open(tmp_path / "stem.png").size
    assert 500 < width < 1600 and height < 1200


@pytest.mark.parametrize(("grid", "count"), [((4, 4), 7), ((7, 7), 64), ((28, 28), 700)])
def test_any_number_of_units_is_drawn(tmp_path, grid, count):
    """At most 320 pairs are drawn, and the title says if there are more."""
    kernel = np.random.default_rng(0).standard_normal((grid[0] * grid[1], count))
    units = [inspection.pair_units(kernel, grid)] * 3
    groups = pictures.unit_figures(units)
    assert [block for group in groups for block in group] == [0, 1, 2]
    assert len(groups) == (1 if count < 100 else 3)
    blocks = groups[-1]
    path = tmp_path / "units.png"
    pictures.draw_units(units[blocks.start : blocks.stop], blocks.start, path)
    width, height = Image.open(path).size
    assert width < 1100 and height < 1300
    assert ("320 of them drawn" in pictures.unit_title(units[0], 0)) == (count == 700)


def test_long_names_are_shortened_in_the_middle():
    assert curves.shorten("a  b\nc\x00d", 20) == "a b c d"
    short_name = curves.shorten("abcdefghij" * 5, 12)
    assert len(short_name) == 12 and short_name == "abcdefg…ghij"


# The page.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The directory of a three-step run, whose preprocessing scales pixels to [0, 1]."""
    root = tmp_path_factory.mktemp("inspect")
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 5), ("test", 7)):
        for name in CLASSES:
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    config = tiny_config(
        **dict(
            total_steps=3,
            model__num_blocks=1,
            dataset__name="folder",
            dataset__data_dir=str(root / "data"),
        ),
        **dict(dataset__train_split="train", dataset__val_split="val", dataset__test_split="test"),
        dataset__train_preprocess="decode|value_range(0, 1)",
        dataset__eval_preprocess="decode|value_range(0, 1)",
    )
    workdir = root / "run <b>&"
    workdir.mkdir()
    splits = run_data.open_splits(config, None)
    config.model.num_classes = 3
    run.resolve_model(config, None, None)
    run.write_json(workdir / "config.json", config.to_dict())
    run.write_json(workdir / "data.json", run_data.data_record(splits, 1))
    model = program.build_model(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 3))
    for name in ("checkpoints", "best"):
        with checkpoint.Checkpoints(workdir / name, keep_last=1) as checkpoints:
            checkpoints.save(TrainState(np.int32(3), params, optax.EmptyState(), None))
    lines = "".join(json.dumps(row) + "\n" for row in _rows(3))
    (workdir / "metrics.jsonl").write_text(lines)
    # Older versions recorded no interval.
    val_result = {"count": 50, "top1": 0.5, "top5": 1.0, "loss": 1.0}
    directory.record_result(workdir, "last", {"step": 3}, "val", val_result)
    test_result = {**val_result, "top1": 0.6, "top1_interval": [0.46, 0.72]}
    directory.record_result(workdir, "last", {"step": 3}, "test", test_result)
    return workdir


def _write(workdirs=(), **options):
    """Writes a page and returns its path and the log lines."""
    lines = []
    options = {
        **dict(weights=None, checkpoint_name="last", output=None, split_name=None, data_dir=None),
        **dict(image_size=None, log=lines.append),
        **options,
    }
    return page.write(workdirs=[str(w) for w in workdirs], **options), lines


@pytest.fixture(scope="module")
def written_page(workdir, tmp_path_factory):
    second_workdir = tmp_path_factory.mktemp("other") / "run <b>&"
    shutil.copytree(workdir, second_workdir)
    (second_workdir / "metrics.jsonl").unlink()
    return _write([workdir, second_workdir])


@pytest.mark.slow
def test_page_contains_every_picture_and_loads_nothing(workdir, written_page):
    path, lines = written_page
    assert path == workdir / "inspect" / "index.html"
    text = path.read_text()
    names = {file.name for file in path.parent.glob("*.png")}
    assert names >= {"curves.png", "stem.png", "units_00.png", "activations.png"}
    assert names >= {"confusion.png", "comparison.png", "results.png"}
    assert names & {"right.png", "wrong.png"}
    sources = re.findall(r'src="(.*?)"', text)
    assert len(sources) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|<script|<link|href=|url\(|@import", text)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall("<img.*?>", text))
    assert [line for line in lines if line.startswith("not drawn")] == [
        f"not drawn: curves: {workdir.parent.parent / 'other0' / workdir.name} has no metrics.jsonl"
    ]


@pytest.mark.slow
def test_names_are_escaped_in_the_page(workdir, written_page):
    text = written_page[0].read_text()
    for name in (*CLASSES, str(workdir)):
        assert name not in text or name == CLASSES[2]
        assert html.escape(name) in text
    assert "<b>" not in text


@pytest.mark.slow
def test_page_reports_recorded_and_computed_accuracy(workdir, written_page):
    text = written_page[0].read_text()
    assert "val, step 3</th><td>50.00% (36.64% to 63.36%)" in text  # Wilson's
    assert "test, step 3</th><td>60.00% (46.00% to 72.00%)" in text
    loaded = loading.read(workdir, log=lambda line: None)
    apply, hits = jax.jit(loaded.model.apply), 0
    for k, name in enumerate(CLASSES):
        files = sorted((workdir.parent / "data" / "test" / name).iterdir())
        images = np.stack([np.asarray(Image.open(file), np.float32) / 255 for file in files])
        logits, _ = apply({"params": loaded.params}, images)
        hits += int((np.argmax(logits, axis=1) == k).sum())
    assert 0 < hits < 21
    assert re.search(rf"test, 21 images</th><td>{hits / 21:.2%}", text)


def test_page_of_an_incomplete_run_reports_what_is_missing(workdir, tmp_path):
    incomplete_run = tmp_path / "run"
    shutil.copytree(
        workdir, incomplete_run, ignore=shutil.ignore_patterns("inspect", "metrics.jsonl")
    )
    config = json.loads((incomplete_run / "config.json").read_text())
    config["dataset"]["data_dir"] = str(tmp_path / "gone")
    (incomplete_run / "config.json").write_text(json.dumps(config))
    path, lines = _write([incomplete_run], checkpoint_name="best", output=str(tmp_path / "out"))
    assert path == tmp_path / "out" / "index.html"
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"index.html", "stem.png", "units_00.png"}
    messages = [line for line in lines if line.startswith("not drawn")]
    assert len(messages) == 2 and "metrics.jsonl" in messages[0] and "gone" in messages[1]
    text = html.unescape(path.read_text())
    assert all(line.removeprefix("not drawn: ") in text for line in messages)
    assert "step 3" not in text  # results.json describes another checkpoint


def test_page_is_written_for_a_weight_file_at_another_size(tmp_path):
    """The golden weights have 16 patches, here 2 x 8; a weight file has no curves and no data."""
    golden = str(GOLDENS / "mixer_tiny_official.npz")
    path, lines = _write(weights=golden, output=str(tmp_path), image_size=(16, 64))
    assert "16 x 64 pixels, 2 x 8 patches" in path.read_text()
    assert {file.name for file in tmp_path.iterdir()} >= {"stem.png", "units_00.png"}
    assert any("--data_dir" in line for line in lines)


@pytest.mark.slow
def test_page_is_written_for_a_weight_file_with_images(workdir, tmp_path):
    from flax import traverse_util

    loaded = loading.read(str(workdir), log=lambda line: None)
    arrays = traverse_util.flatten_dict(jax.device_get(loaded.params), sep="/")
    weights.write_file(tmp_path / "x.npz", arrays, loaded.card, layout="published")
    data_dir = run.read_run(workdir)[0].dataset.data_dir
    options = dict(weights=str(tmp_path / "x.npz"), output=str(tmp_path / "page"))
    path, lines = _write(**options, data_dir=data_dir)
    assert not any("images" in line for line in lines if line.startswith("not drawn"))
    assert {file.name for file in path.parent.iterdir()} >= {"confusion.png", "activations.png"}


def test_unusable_arguments_are_errors(workdir, tmp_path):
    golden = str(GOLDENS / "mixer_tiny_official.npz")
    for options, message in (
        (dict(workdirs=[tmp_path]), str(tmp_path)),
        (dict(workdirs=[workdir, workdir]), str(workdir)),
        (dict(workdirs=[workdir], checkpoint_name="7"), "--checkpoint=7"),
        (dict(weights=golden), "--output"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            _write(**options)


@pytest.mark.slow
def test_unusable_data_dir_is_an_error(workdir, tmp_path):
    golden = str(GOLDENS / "mixer_tiny_official.npz")
    for options, message in (
        (dict(workdirs=[workdir], data_dir=str(tmp_path)), str(tmp_path)),
        (dict(weights=golden, output=str(tmp_path), data_dir=str(tmp_path)), "preprocess"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            _write(**options)


def test_invalid_flags_are_one_line_errors():
    for arguments, message in (
        (["--workdir=nothing"], "nothing"),
        ([], "--workdir"),
        (["--workdir=a", "--image_size=8"], "--image_size"),
        (["--weights=a.npz", "--checkpoint=best"], "--checkpoint=best"),
    ):
        result = run_program("mixer.tools.inspect", *arguments)
        assert result.returncode == 2 and message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_command_writes_the_page(workdir, tmp_path):
    command = ["-m", "mixer.tools.inspect"]
    result = run_python(*command, f"--workdir={workdir}", f"--output={tmp_path}", "--split=val")
    assert str(tmp_path / "index.html") in result.stdout and not result.stderr
    assert "val, 15 images" in (tmp_path / "index.html").read_text()


WRAPPER = """<!DOCTYPE html><link rel="icon" href="data:,"><body style="margin: 0">
<iframe id="page" src="index.html" style="width: 360px; height: 800px; border: 0"></iframe>
<script>
window.onload = async () => {
  const page = document.getElementById("page").contentDocument;
  page.querySelectorAll("details").forEach(element => element.open = true);
  const images = [...page.images];
  const decode = image => image.decode().then(() => true, () => false);
  const decoded = await Promise.all(images.map(decode));
  const outside = [...page.querySelectorAll("body *")].filter(element =>
    !element.closest(".wide img") && element.getBoundingClientRect().right > 360.5);
  const report = JSON.stringify({
    width: page.documentElement.scrollWidth,
    outside: outside.map(element => element.outerHTML.slice(0, 80)),
    sizes: images.map((image, i) => decoded[i] && image.naturalWidth),
    fetched: page.defaultView.performance.getEntriesByType("resource").map(entry => entry.name),
    scripts: page.scripts.length,
  });
  await fetch("/report", {method: "POST", body: report});
};
</script>"""


def _chromium(profile):
    """The command that starts a headless browser."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on PATH")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet]
    return [*command, f"--user-data-dir={profile}"]


@pytest.mark.slow
def test_page_fits_a_narrow_screen_in_a_browser(written_page, tmp_path):
    path, _ = written_page
    dump = [*_chromium(tmp_path / "one"), "--dump-dom", "--enable-logging=stderr", "--v=0"]
    result = subprocess.run([*dump, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert "The stem" in result.stdout and "CONSOLE" not in result.stderr, result.stderr

    requests, answers = [], queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            requests.append(f"{self.command} {self.path}")

    directory = tmp_path / "served"
    shutil.copytree(path.parent, directory)
    (directory / "wrapper.html").write_text(WRAPPER)
    handler = functools.partial(Handler, directory=directory)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/wrapper.html"
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with subprocess.Popen([*_chromium(tmp_path / "two"), url], **quiet) as browser:
            try:
                report = answers.get(timeout=120)  # wrapper.html sends its report
            finally:
                browser.kill()
        server.shutdown()
    assert report["width"] <= 360 and not report["outside"]
    assert len(report["sizes"]) >= 8 and all(report["sizes"])
    assert report["fetched"] == [] and report["scripts"] == 0
    assert sorted(requests) == ["GET /index.html", "GET /wrapper.html", "POST /report"]
