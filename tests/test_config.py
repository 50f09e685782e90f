import contextlib
import functools
import importlib.resources
import io
import itertools
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from configs import common, finetune
from helpers import ROOT, run_python


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.typo=1"], "config has no key 'typo'"),
        (["--config.optimizer.peak_lrr=1"], "Did you mean 'optimizer.peak_lr'"),
        (["--config.total_step=1"], "Did you mean 'total_steps'"),
        (["--config.batch_size=1"], "Did you mean 'global_batch_size'"),
        (["--config.learning_rate=1"], "Did you mean 'optimizer.peak_lr'"),
        (["--config.optimizer.lr=1"], "Did you mean 'optimizer.peak_lr'"),
        (["--config.total_steps=1e4"], "total_steps=1e4: it must be of type int"),
        (["--config.model.dropout=x"], "model.dropout=x: it must be of type float"),
        (["--config=configs/digitz.py"], "configs/digitz.py: no such file"),
        (["--config=configs/digits.py:foo=1"], "config argument 'foo=1' is not understood"),
        (["--config=configs/folder.py:res=big"], "res='big': it must be of type int"),
        (["--config=configs/mixer_b16_i1k.py:res=225"], "the nearest sizes are 224 or 240"),
        (["--config=configs/finetune.py:dataset=vtab/typo"], "vtab/caltech101"),
        (["--wrkdir=x"], "wrkdir"),
        (["surplus"], "unexpected argument 'surplus'"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(arguments, message):
    if not any(a.startswith("--config=") for a in arguments):
        arguments = ["--config=configs/digits.py", *arguments]
    done = run_python("train.py", *arguments, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


def test_fault_in_a_config_keeps_its_traceback(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    done = run_python("train.py", f"--config={path}", check=False)
    assert done.returncode not in (0, 2) and "ZeroDivisionError" in done.stderr
    path.write_text("def get_config():\n    return int('x')\n")
    done = run_python("train.py", f"--config={path}", check=False)
    assert "Traceback" in done.stderr and "invalid literal" in done.stderr


@pytest.mark.parametrize(
    "program",
    [
        ["train.py"],
        ["evaluate.py"],
        ["-m", "mixer.tools.prepare"],
        ["-m", "mixer.tools.benchmark"],
    ],
)
def test_help_shows_an_example(program):
    done = run_python(*program, "--help", check=False)
    assert re.search(r"^ +python .*(--config=|--workdir=|tfds)", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_arguments_are_typed():
    arg = common.parse_arg("res=64,name=x,on=true", res=32, name="", on=False, rate=0.5)
    assert arg.to_dict() == {"res": 64, "name": "x", "on": True, "rate": 0.5}
    for text in ("size=3", "res", "res=1.5", "on=yes"):
        with pytest.raises(ValueError, match="config argument"):
            common.parse_arg(text, res=32, on=False)


def test_every_key_has_a_comment():
    """A key without a meaning written beside it is a hidden default."""
    lines = (ROOT / "configs" / "common.py").read_text().splitlines()
    body = lines[lines.index("def base() -> ConfigDict:") :]
    body = body[
        : next(i for i, line in enumerate(body) if line.strip().startswith("return config"))
    ]
    obvious = {"dropout", "keep_last", "tensorboard", "train_split", "eval_preprocess"}
    commented = set()  # total_steps, total_epochs and total_examples share a comment
    for before, line in itertools.pairwise(body):
        key = re.match(r"\s+(?:config\.)?(\w+)\s?=", line)
        if key and "dict(" not in line and key[1] not in obvious | {"config"}:
            stem = re.sub("_(steps|epochs|examples)$", "", key[1])
            assert "#" in line or "#" in before or stem in commented, line
            commented.add(stem)


# Invariant 4: every shipped config runs, with every documented argument.

PRETRAINING = [
    "",
    *(f"model={variant}" for variant in common.VARIANTS),
    *(f"mode={mode}" for mode in common.MODES),
    "epochs=0.5",
    "data=folder",
    "data=synthetic",
    "model=S/8,res=56,mode=gpu8,epochs=90,data=cifar10",
]
SHIPPED = {
    "digits": [""],
    "cifar10": ["", "folder=/data/cifar10", "epochs=300", "recipe=ours", "recipe=record,epochs=3"],
    "folder": ["", "res=32,patch=4"],
    "finetune": [
        "",
        *(f"model={variant}" for variant in common.VARIANTS),
        *(f"dataset={name}" for name in finetune.SETS),
        *(f"dataset=vtab/{task}" for task in finetune.VTAB),
        *(f"dataset=vtab/{task},split=1000" for task in finetune.VTAB),
        *(f"mode={mode}" for mode in common.MODES),
        "split=800",
        "model=L/16,res=448,init=Mixer-L_16.npz,lr=0.003",
        "dataset=folder,res=448,init=L/16-i21k",
    ],
    "mixer_b16_i1k": PRETRAINING,
    "mixer_l16_i1k": PRETRAINING,
    "mixer_b16_sam": [*PRETRAINING, "model=S/16,rho=0.5"],
    "mixer_b16_i21k": PRETRAINING,
    "mixer_l16_i21k": PRETRAINING,
    "mixer_s16_jft": PRETRAINING,
    "mixer_b16_jft": PRETRAINING,
    "mixer_l16_jft": PRETRAINING,
    "mixer_h14_jft": PRETRAINING,
}
CASES = [(name, arg) for name, args in SHIPPED.items() for arg in args]
# In bfloat16 one recipe is compiled each time, the others in the slow tests.
SLOW = {(name, arg) for name, arg in CASES if "mode=gpu8" in arg and name != "mixer_b16_i1k"}


def build(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def test_every_shipped_config_is_listed_here():
    found = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"common"}
    assert found == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_argument_and_choice_is_documented_and_covered(name, monkeypatch):
    """An argument that get_config takes, or a choice of one, and that no case above has, fails."""
    known, choices = {}, {}
    parse_arg, check_choice = common.parse_arg, common.check_choice

    def spy_arg(arg, **defaults):
        known.update(defaults)
        return parse_arg(arg, **defaults)

    def spy_choice(key, value, accepted):
        choices[key] = {str(choice) for choice in accepted}
        check_choice(key, value, accepted)

    monkeypatch.setattr(common, "parse_arg", spy_arg)
    monkeypatch.setattr(common, "check_choice", spy_choice)
    build(name)
    doc = importlib.import_module(f"configs.{name}").__doc__
    given = {}
    for arg in SHIPPED[name]:
        for part in filter(None, arg.split(",")):
            key, _, value = part.partition("=")
            given.setdefault(key, set()).add(value)
    assert given.keys() == known.keys()
    for key in known:
        assert re.search(rf"\b{key}=", doc), key
    for key, accepted in choices.items():
        assert accepted <= given[key], key
        if key not in ("model", "mode") or name == "finetune":
            story = common.VARIANTS if key == "model" else [*re.findall(r"[\w/]+", doc)]
            assert all(choice.removeprefix("vtab/") in story for choice in accepted), key


@pytest.mark.parametrize("name", SHIPPED)
def test_commands_of_the_docstring_are_understood(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    commands = re.findall(r"^python train\.py --config=configs/(\w+)\.py(?::(\S+))?", doc, re.M)
    assert commands
    for file, arg in commands:
        assert file == name
        build(name, arg)
    for key in re.findall(r"--config\.([\w.]+)=", doc):
        node = build(name)
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@functools.cache
def photograph(side=None):
    """JPEG bytes of a photograph, scaled to side x side where a side is given."""
    data = (importlib.resources.files("sklearn.datasets.images") / "china.jpg").read_bytes()
    if side is None:
        return data
    from PIL import Image

    scaled = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((side, side)).save(scaled, "JPEG")
    return scaled.getvalue()


@functools.cache
def check_preprocess(spec, side, stored):
    import tensorflow as tf

    from mixer.data.preprocess import make_preprocess

    preprocess = make_preprocess(spec, (side, side))
    example = {"image": tf.constant(photograph(stored)), "label": tf.constant(3, tf.int32)}
    images = [
        preprocess(example, tf.constant([seed, 0], tf.int64))["image"].numpy() for seed in (0, 1)
    ]
    for image in images:
        assert image.shape == (side, side, 3) and image.dtype == "uint8" and image.std() > 5
    is_random = any(step in spec for step in ("crop(", "flip", "affine")) and "central" not in spec
    assert (images[0] != images[1]).any() == is_random


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_preprocessing_gives_images_of_the_configs_size(name, arg):
    config = build(name, arg)
    # Small pictures are stored at the model's size; large ones are photographs of 640 x 427.
    stored = config.image_size if config.dataset.eval_preprocess == "decode" else None
    for spec in (config.dataset.train_preprocess, config.dataset.eval_preprocess):
        check_preprocess(spec, config.image_size, stored)


@contextlib.contextmanager
def quick_compilation():
    """Two steps are compiled for longer than they run."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def check_two_steps(reduced):
    """Trains two steps; configs that are the same at reduced size share a run."""
    from mixer import trainer

    config = common.base()
    with config.unlocked():
        config.update(json.loads(reduced))
    with tempfile.TemporaryDirectory() as workdir, quick_compilation():
        trainer.train(config.lock(), workdir)
        rows = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    assert last["step"] == 2 and np.isfinite(last["train/loss"]) and last["train/learning_rate"] > 0


@pytest.mark.parametrize(
    ("name", "arg"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES],
)
def test_shipped_config_takes_two_steps_on_synthetic_data(name, arg):
    from mixer import run

    config = build(name, arg)
    config.model.num_classes = config.model.num_classes or 10
    run.check_config(config)
    if config.model.variant or config.model.patch_size:  # else they are those of init_from
        run.build_model(config)  # its own dimensions fit together and the image
    data = common.base().dataset.to_dict()
    config.dataset.update(
        data | dict(name="synthetic", train_split="train", val_split="", test_split="")
    )
    blocks = 2 if config.model.stoch_depth else 1  # the first block is never dropped
    config.model.update(variant=None, patch_size=4, num_blocks=blocks)
    config.model.update(hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=24)
    for stem in ("total", "eval_every"):
        for unit in ("steps", "epochs", "examples"):
            config[f"{stem}_{unit}"] = None
    for unit in ("steps", "epochs", "examples"):
        config.schedule[f"warmup_{unit}"] = None
    config.update(total_steps=2, global_batch_size=4, eval_batch_size=None, image_size=8)
    config.update(log_every_steps=1, tensorboard=False, init_from="")
    config.schedule.warmup_steps = 1
    config.checkpoint.every_steps = 2
    # Numbers that choose no path through the code are made alike.
    config.model.update(num_classes=10, head_bias_init=-1.0)
    config.optimizer.peak_lr = 1e-3
    for group, key in (("optimizer", "weight_decay"), ("mixup", "alpha")):
        config[group][key] = 0.1 if config[group][key] else 0.0
    check_two_steps(json.dumps(config.to_dict()))
