"""Command-line mistakes, and every shipped config with every documented argument."""

import functools
import importlib.resources
import io
import itertools
import json
import re

import numpy as np
import pytest

from configs import cifar10, common, finetune
from helpers import ROOT, run_program, run_python
from mixer.errors import UserError
from mixer.models import vit
from mixer.models.mlp_mixer import VARIANTS
from mixer.runs import config as run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.typo=1"], "'typo'"),
        (["--config.optimizer.peak_lrr=1"], "peak_lrr.*'optimizer.peak_lr'"),
        (["--config.total_step=1"], "total_step'.*'total_steps'"),
        (["--config.batch_size=1"], "'batch_size'.*'global_batch_size'"),
        (["--config.learning_rate=1"], "learning_rate.*'optimizer.peak_lr'"),
        (["--config.optimizer.lr=1"], "optimizer.lr'.*'optimizer.peak_lr'"),
        (["--config.total_steps=1e4"], "total_steps=1e4.*int"),
        (["--config.model.dropout=x"], "model.dropout=x.*float"),
        (["--config=configs/digitz.py"], "configs/digitz.py"),
        (["--config=configs/digits.py:foo=1"], "'foo=1'"),
        (["--config=configs/folder.py:res=big"], "res='big'.*int"),
        (["--config=configs/mixer_b16_i1k.py:res=225"], "225.*224 or 240"),
        (["--config=configs/mixer_h14_jft.py:res=256"], "256.*252 or 266"),
        (["--config=configs/mixer_b16_i1k.py:model=B/17"], "'B/17'.* S/32, S/16"),
        (["--config=configs/finetune.py:model=b16"], "'b16'"),
        (["--config=configs/finetune.py:res=100,init=B/16-i21k,model=B/16"], "100.*96 or 112"),
        (["--config=configs/folder.py:res=33"], "33.*32 or 40"),
        (["--config=configs/finetune.py:dataset=vtab/typo"], "vtab/caltech101"),
        (["--wrkdir=x"], "wrkdir"),
        (["surplus"], "'surplus'"),
    ],
)
def test_command_line_mistake_is_a_one_line_error(arguments, message):
    if not any(a.startswith("--config=") for a in arguments):
        arguments = ["--config=configs/digits.py", *arguments]
    result = run_program("train.py", *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr


def test_exception_in_a_config_is_not_a_user_error(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        run_program("train.py", f"--config={path}")
    path.write_text("def get_config():\n    return int('x')\n")
    with pytest.raises(ValueError, match="'x'") as error:
        run_program("train.py", f"--config={path}")
    assert not isinstance(error.value, UserError)


@pytest.mark.slow
def test_mistake_and_exception_exit_with_different_codes(tmp_path):
    result = run_python("train.py", "--config=configs/digits.py", "--config.typo=1", check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "typo" in result.stderr
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    result = run_python("train.py", f"--config={path}", check=False)
    assert result.returncode not in (0, 2)
    assert "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    "program", ["train.py", "evaluate.py", "mixer.tools.prepare", "mixer.tools.benchmark"]
)
def test_help_shows_an_example(program):
    text = run_program(program, "--help").stdout
    assert re.search(r"^ +python .*(--config=|--workdir=|tfds)", text, re.MULTILINE)


def test_config_arguments_are_typed():
    arg = common.parse_arg("res=64,name=x,on=true", res=32, name="", on=False, rate=0.5)
    assert arg.to_dict() == {"res": 64, "name": "x", "on": True, "rate": 0.5}
    for text in ("size=3", "res", "res=1.5", "on=yes"):
        with pytest.raises(ValueError, match="config argument"):
            common.parse_arg(text, res=32, on=False)


def test_every_key_has_a_comment():
    """Every key in configs/common.py needs a comment unless its name is obvious."""
    lines = (ROOT / "configs" / "common.py").read_text().splitlines()
    body = lines[lines.index("def base() -> ConfigDict:") :]
    body = body[
        : next(i for i, line in enumerate(body) if line.strip().startswith("return config"))
    ]
    obvious_keys = {"dropout", "keep_last", "tensorboard", "train_split", "eval_preprocess"}
    commented_stems = set()  # total_steps, total_epochs and total_examples share a comment
    for previous_line, line in itertools.pairwise(body):
        key = re.match(r"\s+(?:config\.)?(\w+)\s?=", line)
        if key and "dict(" not in line and key[1] not in obvious_keys | {"config"}:
            stem = re.sub("_(steps|epochs|examples)$", "", key[1])
            assert "#" in line or "#" in previous_line or stem in commented_stems, line
            commented_stems.add(stem)


# Every shipped config runs with every documented argument.

PRETRAINING = [
    "",
    *(f"model={variant}" for variant in VARIANTS),
    "model=ViT-B/16",
    *(f"mode={mode}" for mode in common.MODES),
    "epochs=0.5",
    "data=folder",
    "data=synthetic",
    "model=S/8,res=56,mode=gpu8,epochs=90,data=cifar10",
]
SHIPPED = {
    "digits": [""],
    "cifar10": [
        "",
        "folder=/data/cifar10",
        "epochs=300",
        "recipe=ours",
        "recipe=record,epochs=3",
        *(f"model={name}" for name in cifar10.MODELS),
    ],
    "folder": ["", "res=32,patch=4"],
    "finetune": [
        "",
        *(f"model={variant}" for variant in VARIANTS),
        "model=ViT-B/16",
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
    "vit_s16_i1k": [*PRETRAINING, *(f"model=ViT-{variant}" for variant in vit.VARIANTS)],
}
CASES = [(name, arg) for name, args in SHIPPED.items() for arg in args]

# One case for each distinct program that these cases compile at reduced size.
PROGRAMS = [
    ("digits", ""),
    ("cifar10", ""),
    ("cifar10", "epochs=300"),
    ("cifar10", "recipe=record,epochs=3"),
    ("folder", ""),
    ("finetune", ""),
    ("mixer_b16_i1k", ""),
    ("mixer_b16_i1k", "mode=gpu8"),
    ("mixer_b16_sam", ""),
    ("mixer_s16_jft", ""),
    ("vit_s16_i1k", ""),
]
# Those that the fast tests compile; they only lower the others.
COMPILED = [
    ("digits", ""),
    ("mixer_b16_i1k", "mode=gpu8"),
    ("mixer_b16_sam", ""),
]
# In the fast tests one recipe in bfloat16 is enough.
SLOW_PROGRAMS = [
    ("cifar10", "model=small_untied"),
    ("cifar10", "model=small_vit"),
    ("finetune", "mode=gpu8"),
    ("mixer_b16_sam", "mode=gpu8"),
    ("mixer_s16_jft", "mode=gpu8"),
    ("finetune", "model=ViT-B/16"),
    ("mixer_b16_i1k", "model=ViT-B/16"),
    ("mixer_b16_sam", "model=ViT-B/16"),
    ("mixer_s16_jft", "model=ViT-B/16"),
    ("vit_s16_i1k", "mode=gpu8"),
    ("vit_s16_i1k", "model=S/16"),
    ("vit_s16_i1k", "model=S/8,res=56,mode=gpu8,epochs=90,data=cifar10"),
]
# One case and split for each distinct preprocessing.
PREPROCESSINGS = [
    ("digits", "", "train"),
    ("digits", "", "eval"),
    ("cifar10", "", "train"),
    ("cifar10", "", "eval"),
    ("folder", "", "train"),
    ("folder", "", "eval"),
    ("finetune", "", "train"),
    ("finetune", "", "eval"),
    ("finetune", "dataset=imagenet2012", "eval"),
    ("mixer_l16_i21k", "model=S/8,res=56,mode=gpu8,epochs=90,data=cifar10", "train"),
]
SLOW_PREPROCESSINGS = [
    ("cifar10", "epochs=300", "train"),
    ("cifar10", "recipe=record,epochs=3", "train"),
    ("folder", "res=32,patch=4", "train"),
    ("folder", "res=32,patch=4", "eval"),
    ("finetune", "model=L/16,res=448,init=Mixer-L_16.npz,lr=0.003", "train"),
    ("finetune", "model=L/16,res=448,init=Mixer-L_16.npz,lr=0.003", "eval"),
    ("finetune", "dataset=folder,res=448,init=L/16-i21k", "eval"),
    ("mixer_b16_i1k", "", "train"),
    ("mixer_b16_i1k", "model=S/8,res=56,mode=gpu8,epochs=90,data=cifar10", "train"),
    ("mixer_b16_i1k", "model=S/8,res=56,mode=gpu8,epochs=90,data=cifar10", "eval"),
    ("mixer_b16_sam", "", "train"),
    ("mixer_b16_sam", "model=S/8,res=56,mode=gpu8,epochs=90,data=cifar10", "train"),
    ("mixer_b16_i21k", "", "train"),
    ("mixer_b16_i21k", "model=S/8,res=56,mode=gpu8,epochs=90,data=cifar10", "train"),
    ("mixer_l16_i21k", "", "train"),
]


def _cases(fast, slow):
    return [*fast, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def build(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def test_every_shipped_config_is_tested():
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"common", "__init__"}
    assert configs == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_argument_is_documented_and_tested(name, monkeypatch):
    """Every argument of get_config and every choice of it is in the docstring and in SHIPPED."""
    arguments, choices = {}, {}
    parse_arg, check_choice = common.parse_arg, common.check_choice

    def spy_arg(arg, **defaults):
        arguments.update(defaults)
        return parse_arg(arg, **defaults)

    def spy_choice(key, value, accepted):
        choices[key] = {str(choice) for choice in accepted}
        check_choice(key, value, accepted)

    monkeypatch.setattr(common, "parse_arg", spy_arg)
    monkeypatch.setattr(common, "check_choice", spy_choice)
    build(name)
    doc = importlib.import_module(f"configs.{name}").__doc__
    covered_values = {}
    for arg in SHIPPED[name]:
        for part in filter(None, arg.split(",")):
            key, _, value = part.partition("=")
            covered_values.setdefault(key, set()).add(value)
    assert covered_values.keys() == arguments.keys()
    for key in arguments:
        assert re.search(rf"\b{key}=", doc), key
    for key, accepted in choices.items():
        assert accepted <= covered_values[key], key
        if key != "mode" or name == "finetune":
            words = re.findall(r"[\w/]+", doc)
            assert all(choice.removeprefix("vtab/") in words for choice in accepted), key


@pytest.mark.parametrize("name", SHIPPED)
def test_commands_in_config_docstrings_are_valid(name):
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
    """Returns the JPEG bytes of a photograph, resized to side x side if `side` is not None."""
    data = (importlib.resources.files("sklearn.datasets.images") / "china.jpg").read_bytes()
    if side is None:
        return data
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((side, side)).save(file, "JPEG")
    return file.getvalue()


def preprocessing(name, arg, split):
    """Returns the ops, the model's image size, and the stored image size (None: a photograph)."""
    config = build(name, arg)
    # Small images are stored at the model's size; large ones are photographs of 640 x 427.
    stored_size = config.image_size if config.dataset.eval_preprocess == "decode" else None
    return config.dataset[f"{split}_preprocess"], config.image_size, stored_size


def reduce_config(name, arg):
    """Returns the config of a case at the smallest size that takes the same code path."""
    config = build(name, arg)
    data = common.base().dataset.to_dict()
    splits = dict(name="synthetic", train_split="train", val_split="", test_split="")
    config.dataset.update(data | splits)
    blocks = 2 if config.model.stoch_depth else 1  # the first block is never dropped
    config.model.update(variant=None, patch_size=4, num_blocks=blocks, num_classes=10)
    if config.model.name == "vit":
        config.model.update(hidden_dim=16, mlp_dim=24, num_heads=2)
    else:
        config.model.update(hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=24)
        if config.model.token_mixing_groups:
            config.model.token_mixing_groups = 16
    for stem in ("total", "eval_every"):
        for unit in ("steps", "epochs", "examples"):
            config[f"{stem}_{unit}"] = None
    for unit in ("steps", "epochs", "examples"):
        config.schedule[f"warmup_{unit}"] = None
    config.update(total_steps=2, global_batch_size=4, eval_batch_size=None, image_size=8)
    config.update(log_every_steps=1, tensorboard=False, init_from="")
    config.schedule.warmup_steps = 1
    config.checkpoint.every_steps = 2
    # Values that do not change the code path become equal, so that equal programs compare equal.
    config.model.head_bias_init = -1.0
    config.optimizer.peak_lr = 1e-3
    for group, key in (("optimizer", "weight_decay"), ("optimizer", "sam_rho"), ("mixup", "alpha")):
        config[group][key] = 0.1 if config[group][key] else 0.0
    return config


def _text(config):
    return json.dumps(config.to_dict())


def test_selected_programs_and_preprocessings_cover_every_case():
    programs = {_text(reduce_config(*case)) for case in PROGRAMS + SLOW_PROGRAMS}
    assert len(programs) == len(PROGRAMS + SLOW_PROGRAMS)
    preprocessings = {preprocessing(*case) for case in PREPROCESSINGS + SLOW_PREPROCESSINGS}
    assert len(preprocessings) == len(PREPROCESSINGS + SLOW_PREPROCESSINGS)
    for case in CASES:
        assert _text(reduce_config(*case)) in programs, case
        assert {preprocessing(*case, split) for split in ("train", "eval")} <= preprocessings, case


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_shipped_config_is_valid_and_its_model_fits_the_images(name, arg):
    config = build(name, arg)
    config.model.num_classes = config.model.num_classes or 10
    run.check_config(config)
    if config.model.variant or config.model.patch_size:  # otherwise init_from decides them
        from mixer.training import program

        program.build_model(config)


@pytest.mark.parametrize(("name", "arg", "split"), _cases(PREPROCESSINGS, SLOW_PREPROCESSINGS))
def test_preprocessing_gives_images_of_the_configured_size(name, arg, split):
    import tensorflow as tf

    from mixer.data.preprocessing.host import make_preprocess

    spec, side, stored_size = preprocessing(name, arg, split)
    preprocess = make_preprocess(spec, (side, side))
    example = {"image": tf.constant(photograph(stored_size)), "label": tf.constant(3, tf.int32)}
    images = [
        preprocess(example, tf.constant([seed, 0], tf.int64))["image"].numpy() for seed in (0, 1)
    ]
    for image in images:
        assert image.shape == (side, side, 3) and image.dtype == "uint8" and image.std() > 5
    is_random = any(op in spec for op in ("crop(", "flip", "affine")) and "central" not in spec
    assert (images[0] != images[1]).any() == is_random


def _program_and_batch(name, arg):
    """Returns the reduced program of a case and a batch for it."""
    from mixer.parallel import sharding
    from mixer.training import program

    config = reduce_config(name, arg)
    run.resolve_model(config, None, None)
    run.resolve_lengths(config, None)
    train_program = program.make_program(config, sharding.make_mesh(config.mesh))
    images = np.random.default_rng(0).integers(0, 256, (4, *train_program.image_size, 3))
    return train_program, {"image": images.astype(np.uint8), "label": np.arange(4)}


LOWERED = [case for case in PROGRAMS if case not in COMPILED]


@pytest.mark.parametrize(("name", "arg"), LOWERED)
def test_update_of_shipped_config_is_lowered(name, arg):
    """Its operations fit each other and the state; the test below compiles and runs it."""
    import jax

    train_program, batch = _program_and_batch(name, arg)
    state, metrics = train_program.jit_step().lower(train_program.state, batch).out_info

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(state) == shapes(train_program.state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == "float32"


@pytest.mark.parametrize(("name", "arg"), _cases(COMPILED, LOWERED + SLOW_PROGRAMS))
def test_shipped_config_takes_two_steps_on_synthetic_data(name, arg):
    import jax

    train_program, batch = _program_and_batch(name, arg)
    state, update = train_program.init_state(), train_program.jit_step()
    initial_params = jax.device_get(state.params)
    for _ in range(2):
        state, metrics = update(state, batch)
    assert int(state.step) == 2 and np.isfinite(metrics["loss"])
    # The learning rate of the first step is 0, so only the second step changes the parameters.
    assert not np.array_equal(initial_params["head"]["bias"], state.params["head"]["bias"])
