import itertools
import re

import pytest

from configs import common
from helpers import ROOT, run_python


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.typo=1"], "config has no key 'typo'"),
        (["--config.optimizer.peak_lrr=1"], "Did you mean 'optimizer.peak_lr'"),
        (["--config.total_step=1"], "Did you mean 'total_steps'"),
        (["--config.total_steps=1e4"], "total_steps=1e4: it must be of type int"),
        (["--config.model.dropout=x"], "model.dropout=x: it must be of type float"),
        (["--config=configs/digitz.py"], "configs/digitz.py: no such file"),
        (["--config=configs/digits.py:foo=1"], "config argument 'foo=1' is not understood"),
        (["--config=configs/folder.py:res=big"], "res='big': it must be of type int"),
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


@pytest.mark.parametrize("program", [["train.py"], ["evaluate.py"], ["-m", "mixer.tools.prepare"]])
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
    obvious = {"dropout", "keep_last", "tensorboard", "eval_preprocess"}
    for before, line in itertools.pairwise(body):
        key = re.match(r"\s+(?:config\.)?(\w+)\s?=", line)
        if key and "dict(" not in line and key[1] not in obvious | {"config"}:
            assert "#" in line or "#" in before, line


# Invariant 4: every shipped config runs, with every documented argument.

SHIPPED = {
    "digits.py": [""],
    "cifar10.py": ["", "folder=/data/cifar10", "epochs=300"],
    "folder.py": ["", "res=32,patch=4"],
}


def test_every_shipped_config_is_listed_here():
    found = {path.name for path in (ROOT / "configs").glob("*.py")} - {"common.py"}
    assert found == set(SHIPPED)


@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name, args in SHIPPED.items() for arg in args]
)
def test_shipped_config_takes_two_steps_on_synthetic_data(name, arg, tmp_path):
    import importlib

    from mixer import trainer
    from mixer.data.preprocess import make_preprocess

    config = importlib.import_module(f"configs.{name[:-3]}").get_config(arg)
    config.lock()
    size = (config.image_size, config.image_size)
    for spec in (config.dataset.train_preprocess, config.dataset.eval_preprocess):
        make_preprocess(spec, size)
    config.dataset.update(name="synthetic", train_split="train", val_split="", test_split="")
    config.update(total_steps=2, global_batch_size=4, tensorboard=False)
    config.schedule.warmup_steps = 1
    config.model.update(num_blocks=1)
    trainer.train(config, tmp_path)
