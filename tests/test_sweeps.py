"""Sweeps of given weights over the image size and the share of shuffled patches or pixels."""

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
    ("preprocess", "old", "new", "wanted"),
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
        ("decode|resize((64, 32), 'area')|central_crop(32)", 32, 48, None),
    ],
)
def test_steps_at_another_size(preprocess, old, new, wanted):
    wanted = wanted or "decode|resize((96, 48), 'area')|central_crop(48)"
    assert sweeps.preprocess_at(preprocess, old, new) == wanted


@pytest.fixture(scope="module")
def config(tfds_dir):
    """The data: digits."""
    return tiny_config(tfds_dir)


@pytest.fixture(scope="module")
def file(config, tmp_path_factory):
    """Weights for them that tell the images apart, a head's random ones too."""
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
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = card.model().init(next(keys), np.zeros((1, 8, 8, 3), np.float32))["params"]
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    weights.write_file(path, flat, card, layout="published")
    return path


def _subject(path, config):
    subject = open_subject(str(path), config=config)
    sweeps.check_subject(subject)
    return subject


def _evaluated(path, config, preprocess, size=8, resize="grow"):
    """The test split after these steps, evaluated as a run's is."""
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
def test_permutation_shuffles_on_the_device_what_the_step_shuffles_in_the_data(
    file, config, monkeypatch, tmp_path
):
    monkeypatch.setattr(sweeps, "SEEDS", (0, 3))
    sweep = sweeps.permutation([_subject(file, config)], [1, 0], split_name="test", say=print)
    patches, pixels = sweep.curves
    assert (patches.shuffled, pixels.shuffled) == ("patches", "pixels")
    plain = _evaluated(file, config, "decode")
    assert len(set(plain.predictions.guesses[:, 0])) > 2
    for curve in sweep.curves:
        assert [point.x for point in curve.points] == [0, 1]
        first, last = curve.points
        assert first.top1_by_seed == (plain.top1,) and first.top1_interval == plain.top1_interval
        assert first.loss == pytest.approx(plain.loss, rel=1e-6) != last.loss
        assert len(last.top1_by_seed) == 2 and last.top1 == np.mean(last.top1_by_seed)
        assert last.top1_interval == sweeps.interval(last.top1_by_seed, 360) and last.count == 360
    shuffled = [_evaluated(file, config, f"decode|permute_pixels(8, seed={s})") for s in (0, 3)]
    assert pixels.points[-1].top1_by_seed == tuple(result.top1 for result in shuffled)
    assert pixels.points[-1].loss == pytest.approx(np.mean([r.loss for r in shuffled]), rel=1e-5)

    # The numbers, the table and the picture.
    numbers, picture = sweeps.write(sweep, sweeps.output_directory([], str(tmp_path / "new")))
    curves = json.loads(numbers.read_text())["curves"]
    assert curves[1]["points"][1]["top1_by_seed"] == list(pixels.points[-1].top1_by_seed)
    assert curves[0]["data"] == "digits/1.0.0 test" and curves[0]["weights"] == str(file)
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 500
        assert picture.stat().length > 10_000  # curves are in it
    low, high = min(shuffled[0].top1, shuffled[1].top1), max(shuffled[0].top1, shuffled[1].top1)
    assert f"{low:.2%} to {high:.2%}" in sweeps.make_table(sweep).rows[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("resize", "sizes"), [("grow", [16]), ("interpolate", [6])])
def test_resolution_evaluates_resized_weights_on_resized_images(file, config, resize, sizes):
    said = []
    sweep = sweeps.resolution(
        [_subject(file, config)], sizes, resize=resize, split_name="test", say=said.append
    )
    (curve,) = sweep.curves
    assert [point.x for point in curve.points] == sizes and sweep.resize == resize
    for size, point in zip(sizes, curve.points, strict=True):
        preprocess = f"decode|resize({size}, antialias=True)"
        assert point.preprocess == preprocess
        assert f"at {size} px: {preprocess}" in " ".join(said)
        wanted = _evaluated(file, config, preprocess, size, resize)
        assert (point.top1, point.loss) == (wanted.top1, pytest.approx(wanted.loss, rel=1e-6))
        assert point.top1_by_seed == (wanted.top1,)


def test_weights_of_a_file_take_the_data_of_a_config(file, config, tmp_path):
    with pytest.raises(UserError, match="--config=CONFIG"):
        _subject(file, None)
    with pytest.raises(UserError, match="--output"):
        sweeps.output_directory([_subject(file, config)], None)

    # A permutation of the config's is the data's too.
    config = config.copy_and_resolve_references()
    config.dataset.permutation = "patches"
    subject = _subject(file, config)
    assert subject.config.dataset.eval_preprocess == "decode|permute_patches(8, 2, seed=0)"
    with pytest.raises(UserError, match=r"permutation .*16 x 16"):
        sweeps.resolution([subject], [8, 16], resize="grow", split_name="test", say=print)

    # Of other data the classes are others.
    for split, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    config.dataset.update(name="folder", data_dir=str(tmp_path), permutation="")
    with pytest.raises(UserError, match="classes"):
        sweeps.permutation([_subject(file, config)], [0], split_name="test", say=print)


@pytest.mark.parametrize(
    ("sizes", "resize", "message"),
    [
        ([8, 12], "grow", "12 x 12.*nearest"),
        ([4, 8], "grow", "4 x 4"),
        ([8, 9], "interpolate", "patch size 2 .* 9"),
    ],
)
def test_sizes_that_do_not_work_are_refused_before_anything_is_computed(
    file, config, monkeypatch, sizes, resize, message
):
    monkeypatch.setattr(sweeps.classification, "evaluate", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(UserError, match=message):
        sweeps.resolution(
            [_subject(file, config)], sizes, resize=resize, split_name="test", say=print
        )


def test_other_mistakes_are_one_line(file, config, tmp_path):
    with pytest.raises(UserError, match=r"--shares: 1\.5"):
        sweeps.permutation([_subject(file, config)], [0, 1.5], split_name="test", say=print)
    other = config.copy_and_resolve_references()
    other.dataset.eval_preprocess = "decode|resize(8"
    with pytest.raises(UserError, match=r"'resize\(8'"):
        sweeps.resolution(
            [_subject(file, other)], [16], resize="grow", split_name="test", say=print
        )
    other.dataset.test_split = ""
    with pytest.raises(UserError, match="test_split"):
        sweeps.permutation([_subject(file, other)], [0], split_name="test", say=print)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output="):
        sweeps.output_directory([], str(tmp_path / "file" / "sweep"))


def test_mistakes_of_the_flags():
    for arguments, message in (
        (["sideways"], "resolution or permutation"),
        (["resolution", "--weights=x"], "--sizes"),
        (["resolution", "--weights=x", "--sizes=8,big"], "--sizes=big"),
        (["resolution", "--weights=x", "--shares=1"], "--shares"),
    ):
        done = run_program("mixer.tools.sweep", *arguments)
        assert done.returncode == 2 and message in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.slow
def test_command_takes_the_data_of_runs(finished_run, tmp_path):
    """Two in one drawing; and one, whose results are in the run."""
    path = shutil.copytree(finished_run, tmp_path / "run")
    step = path / "checkpoints" / "12"
    command = ["-m", "mixer.tools.sweep", "permutation", "--shares=0,1"]
    done = run_python(*command, f"--weights={path},{step}", f"--output={tmp_path / 'two'}")
    assert done.stdout and "Traceback" not in done.stderr
    curves = json.loads((tmp_path / "two" / "sweep_permutation.json").read_text())["curves"]
    assert [curve["weights"] for curve in curves] == [str(path)] * 2 + [str(step)] * 2
    assert curves[0]["points"] == curves[2]["points"]
    top1 = json.loads((path / "results.json").read_text())["splits"]["test_ema"]["top1"]
    assert curves[0]["points"][0]["top1"] == top1
    done = run_program("mixer.tools.sweep", "resolution", "--sizes=6,8", f"--weights={path}")
    assert done.returncode == 0, done.stderr
    (curve,) = json.loads((path / "sweep_resolution.json").read_text())["curves"]
    assert [point["x"] for point in curve["points"]] == [6, 8]
    assert curve["points"][1]["top1"] == top1 and (path / "sweep_resolution.png").exists()


def test_interval_covers_images_and_permutations():
    from mixer.evaluation import scores

    assert sweeps.interval([0.6], 400) == scores.interval(240, 400)
    low, high = sweeps.interval([0.5, 0.6, 0.7], 10_000_000)  # the images alone leave no doubt
    half = 4.302652729911275 * 0.1 / 3**0.5  # Student's with two degrees of freedom
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-3)
    assert sweeps.interval([0.1, 0.9], 100) == (0.0, 1.0)
