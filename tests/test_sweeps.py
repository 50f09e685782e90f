"""Tests sweeps of weights over the image size and the share of shuffled patches or pixels."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from helpers import run_program, run_python, tiny_config
from mixer.errors import UserError
from mixer.evaluation import classification, sweeps
from mixer.evaluation.evaluator import Batching
from mixer.evaluation.subject import open_subject
from mixer.models.registry import ARCHITECTURES
from mixer.parallel import sharding
from mixer.runs import data as run_data
from mixer.training import losses
from mixer.training.step import make_predict
from mixer.weights import formats as weights
from mixer.weights import load as loading
from mixer.weights.card import Card


@pytest.mark.parametrize(
    ("preprocess", "size", "new_size", "expected"),
    [
        ("decode|resize(32)", 32, 32, "decode|resize(32)"),
        ("decode", 32, 48, "decode|resize(48, antialias=True)"),
        (
            "decode|one_hot(3)|value_range(0, 1)",
            *(8, 16),
            "decode|one_hot(3)|resize(16, antialias=True)|value_range(0, 1)",
        ),
        (
            "decode|resize_small(256, method='area')|central_crop(224)",
            *(224, 448),
            "decode|resize_small(512, method='area')|central_crop(448)",
        ),
        (
            "decode|resize_small(size=256)|central_crop(size=224)|value_range",
            *(224, 112),
            "decode|resize_small(size=128)|central_crop(size=112)|value_range",
        ),
        (
            "decode|resize((64, 32), 'area')|central_crop(32)",
            *(32, 48),
            "decode|resize((96, 48), 'area')|central_crop(48)",
        ),
    ],
)
def test_preprocessing_is_scaled_to_another_image_size(preprocess, size, new_size, expected):
    assert sweeps.preprocess_at(preprocess, size, new_size) == expected


@pytest.fixture(scope="module")
def config(tfds_dir):
    """The config of the data set, digits."""
    return tiny_config(tfds_dir)


@pytest.fixture(scope="module")
def weights_file(config, tmp_path_factory):
    """Random weights for digits, also in the head, so that predictions differ between images."""
    path = tmp_path_factory.mktemp("weights") / "digits.npz"
    dimensions = {name: config.model[name] for name in ARCHITECTURES["mixer"].dimensions}
    card = Card(
        architecture="mixer",
        variant=None,
        dimensions=dimensions,
        num_classes=10,
        image_size=(8, 8),
        gelu="tanh",
        preprocess="decode",
        class_names=tuple("0123456789"),
        source="",
    )
    images = np.zeros((1, 8, 8, 3), np.float32)
    params = jax.jit(card.model().init)(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    flat = {
        name: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in traverse_util.flatten_dict(jax.device_get(params), sep="/").items()
    }
    weights.write_file(path, flat, card, layout="published")
    return path


def _subject(path, config):
    subject = open_subject(str(path), config=config)
    sweeps.check_subject(subject)
    return subject


def _evaluate(path, config, preprocess, size=8, resize="grow"):
    """Evaluates the weights on the preprocessed test split, as training does."""
    config = config.copy_and_resolve_references()
    config.image_size = size
    config.dataset.eval_preprocess = preprocess
    loaded = loading.read(path, image_size=size, resize=resize, log=print)
    loss_fn, mesh = losses.make_loss(config.loss), sharding.make_mesh(config.mesh)
    return classification.evaluate(
        classification.make_eval_step(make_predict(loaded.model, mesh), loss_fn, 10),
        loaded.params,
        run_data.open_split(config, "test", None),
        batching=Batching(mesh, global_batch_size=64),
    )


@pytest.mark.slow
def test_permutation_sweep_matches_the_permutation_op(weights_file, config, monkeypatch, tmp_path):
    monkeypatch.setattr(sweeps, "SEEDS", (0, 3))
    sweep = sweeps.permutation(
        [_subject(weights_file, config)], [1, 0], split_name="test", say=print
    )
    patches, pixels = sweep.curves
    assert (patches.shuffled, pixels.shuffled) == ("patches", "pixels")
    reference = _evaluate(weights_file, config, "decode")
    assert len(set(reference.predictions.guesses[:, 0])) > 2
    for curve in sweep.curves:
        assert [point.x for point in curve.points] == [0, 1]
        share_0, share_1 = curve.points
        assert share_0.top1_by_seed == (reference.top1,)
        assert share_0.top1_interval == reference.top1_interval
        assert share_0.loss == pytest.approx(reference.loss, rel=1e-6) != share_1.loss
        assert len(share_1.top1_by_seed) == 2 and share_1.top1 == np.mean(share_1.top1_by_seed)
        assert share_1.top1_interval == sweeps.interval(share_1.top1_by_seed, 360)
        assert share_1.count == 360
    shuffled_results = [
        _evaluate(weights_file, config, f"decode|permute_pixels(8, seed={seed})") for seed in (0, 3)
    ]
    assert pixels.points[-1].top1_by_seed == tuple(result.top1 for result in shuffled_results)
    assert pixels.points[-1].loss == pytest.approx(
        np.mean([result.loss for result in shuffled_results]), rel=1e-5
    )

    # The JSON file, the plot and the table.
    json_path, plot_path = sweeps.write(sweep, sweeps.output_directory([], str(tmp_path / "new")))
    curves = json.loads(json_path.read_text())["curves"]
    assert curves[1]["points"][1]["top1_by_seed"] == list(pixels.points[-1].top1_by_seed)
    assert curves[0]["data"] == "digits/1.0.0 test" and curves[0]["weights"] == str(weights_file)
    with Image.open(plot_path) as image:
        assert image.format == "PNG" and image.width > 500
        assert plot_path.stat().length > 10_000  # an empty plot is smaller
    low, high = sorted(result.top1 for result in shuffled_results)
    assert f"{low:.2%} to {high:.2%}" in sweeps.make_table(sweep).rows[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("resize", "sizes"), [("grow", [16]), ("interpolate", [6])])
def test_resolution_evaluates_resized_weights_on_resized_images(
    weights_file, config, resize, sizes
):
    lines = []
    sweep = sweeps.resolution(
        [_subject(weights_file, config)], sizes, resize=resize, split_name="test", say=lines.append
    )
    (curve,) = sweep.curves
    assert [point.x for point in curve.points] == sizes and sweep.resize == resize
    for size, point in zip(sizes, curve.points, strict=True):
        preprocess = f"decode|resize({size}, antialias=True)"
        assert point.preprocess == preprocess
        assert f"at {size} px: {preprocess}" in " ".join(lines)
        expected = _evaluate(weights_file, config, preprocess, size, resize)
        assert (point.top1, point.loss) == (expected.top1, pytest.approx(expected.loss, rel=1e-6))
        assert point.top1_by_seed == (expected.top1,)


def test_sweep_of_a_file_needs_a_config_with_matching_data(weights_file, config, tmp_path):
    with pytest.raises(UserError, match="--config=CONFIG"):
        _subject(weights_file, None)
    with pytest.raises(UserError, match="--output"):
        sweeps.output_directory([_subject(weights_file, config)], None)

    # The permutation of the config also applies to the data of a sweep.
    config = config.copy_and_resolve_references()
    config.dataset.permutation = "patches"
    subject = _subject(weights_file, config)
    assert subject.config.dataset.eval_preprocess == "decode|permute_patches(8, 2, seed=0)"
    with pytest.raises(UserError, match=r"permutation .*16 x 16"):
        sweeps.resolution([subject], [8, 16], resize="grow", split_name="test", say=print)

    # A data set with other classes is an error.
    for split, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    config.dataset.update(name="folder", data_dir=str(tmp_path), permutation="")
    with pytest.raises(UserError, match="classes"):
        sweeps.permutation([_subject(weights_file, config)], [0], split_name="test", say=print)


@pytest.mark.parametrize(
    ("sizes", "resize", "message"),
    [
        ([8, 12], "grow", "12 x 12.*nearest"),
        ([4, 8], "grow", "4 x 4"),
        ([8, 9], "interpolate", "patch size 2 .* 9"),
    ],
)
def test_invalid_sizes_are_rejected_before_evaluation(
    weights_file, config, monkeypatch, sizes, resize, message
):
    monkeypatch.setattr(
        sweeps.classification, "evaluate", lambda *_, **__: pytest.fail("evaluated")
    )
    with pytest.raises(UserError, match=message):
        sweeps.resolution(
            [_subject(weights_file, config)], sizes, resize=resize, split_name="test", say=print
        )


def test_invalid_shares_configs_and_outputs_are_errors(weights_file, config, tmp_path):
    with pytest.raises(UserError, match=r"--shares: 1\.5"):
        sweeps.permutation([_subject(weights_file, config)], [0, 1.5], split_name="test", say=print)
    bad_config = config.copy_and_resolve_references()
    bad_config.dataset.eval_preprocess = "decode|resize(8"
    with pytest.raises(UserError, match=r"'resize\(8'"):
        sweeps.resolution(
            [_subject(weights_file, bad_config)], [16], resize="grow", split_name="test", say=print
        )
    bad_config.dataset.test_split = ""
    with pytest.raises(UserError, match="test_split"):
        sweeps.permutation([_subject(weights_file, bad_config)], [0], split_name="test", say=print)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output="):
        sweeps.output_directory([], str(tmp_path / "file" / "sweep"))


def test_invalid_flags_are_one_line_of_error():
    for arguments, message in (
        (["sideways"], "resolution or permutation"),
        (["resolution", "--weights=x"], "--sizes"),
        (["resolution", "--weights=x", "--sizes=8,big"], "--sizes=big"),
        (["resolution", "--weights=x", "--shares=1"], "--shares"),
    ):
        result = run_program("mixer.tools.sweep", *arguments)
        assert result.returncode == 2 and message in result.stderr
        assert len(result.stderr.splitlines()) == 1 and not result.stdout


@pytest.mark.slow
def test_command_sweeps_runs_on_their_own_data(finished_run, tmp_path):
    """Two runs share one plot; the results of a single run are written into the run."""
    path = shutil.copytree(finished_run, tmp_path / "run")
    step = path / "checkpoints" / "12"
    command = ["-m", "mixer.tools.sweep", "permutation", "--shares=0,1"]
    result = run_python(*command, f"--weights={path},{step}", f"--output={tmp_path / 'two'}")
    assert result.stdout and "Traceback" not in result.stderr
    curves = json.loads((tmp_path / "two" / "sweep_permutation.json").read_text())["curves"]
    assert [curve["weights"] for curve in curves] == [str(path)] * 2 + [str(step)] * 2
    assert curves[0]["points"] == curves[2]["points"]
    top1 = json.loads((path / "results.json").read_text())["splits"]["test_ema"]["top1"]
    assert curves[0]["points"][0]["top1"] == top1
    result = run_program("mixer.tools.sweep", "resolution", "--sizes=6,8", f"--weights={path}")
    assert result.returncode == 0, result.stderr
    (curve,) = json.loads((path / "sweep_resolution.json").read_text())["curves"]
    assert [point["x"] for point in curve["points"]] == [6, 8]
    assert curve["points"][1]["top1"] == top1 and (path / "sweep_resolution.png").exists()


def test_interval_includes_images_and_permutations():
    from mixer.evaluation import scores

    assert sweeps.interval([0.6], 400) == scores.interval(240, 400)
    low, high = sweeps.interval([0.5, 0.6, 0.7], 10_000_000)  # so many images add no uncertainty
    half_width = 4.302652729911275 * 0.1 / 3**0.5  # Student's t with two degrees of freedom
    assert (low, high) == pytest.approx((0.6 - half_width, 0.6 + half_width), abs=1e-3)
    assert sweeps.interval([0.1, 0.9], 100) == (0.0, 1.0)
