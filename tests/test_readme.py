"""The README's commands that a laptop can run, run as written, in a fresh copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT


def _blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files, with this environment as its .venv."""
    path = tmp_path_factory.mktemp("clone")
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True).stdout.split():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path / name)
    (path / ".venv").symlink_to(sys.prefix)
    return path


def _run(command, clone, timeout=400):
    paths = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]])
    process = subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env={**os.environ, "PATH": paths, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    output = process.stdout + process.stderr
    assert process.returncode in (0, 1 if "--help" in command else 0), output
    assert "Traceback" not in output
    return output


@pytest.mark.slow
@pytest.mark.optimized  # they train models of the real sizes
def test_commands_run_as_written(clone):
    (block,) = _blocks("bash")
    outputs = {}
    for command in block.strip().replace("\\\n", "").splitlines():
        if command.startswith(("source", "#")):
            continue
        outputs.setdefault(command.split("#")[0].strip(), []).append(_run(command, clone))
    (trained, resumed) = outputs[
        "python train.py --config=configs/digits.py --workdir=runs/seed1 --config.seed=1"
    ]
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", trained)[1])
    assert accuracy >= 97.5
    assert "is at step 2000" in resumed and f"test accuracy {accuracy:.2f}%" in resumed
    assert {path.name for path in (clone / "runs" / "seed1").iterdir()} >= {
        "checkpoints",
        "curves.png",
        "metrics.jsonl",
        "results.json",
        "tensorboard",
    }


@pytest.mark.slow
def test_python_examples_run(clone):
    for block in _blocks("python"):
        process = subprocess.run(
            [sys.executable, "-c", block], cwd=clone, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr


def test_every_linked_file_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), (page, target)


def test_configs_on_command_lines_can_be_built():
    """With their arguments, as they stand in README and docs."""
    import importlib

    configs = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        configs |= set(
            re.findall(r"--config=configs/([a-z]\w*)\.py(?::([^\s`]+))?", page.read_text())
        )
    assert len(configs) > 15
    for name, arg in configs:
        importlib.import_module(f"configs.{name}").get_config(arg)


def test_documented_keys_and_ops_exist():
    """Keys in backticks and on command lines of README and docs are keys of the config."""
    from configs import common
    from mixer.data.preprocessing.ops import OPS

    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(r"--config\.([a-z_.0-9]+)=", page.read_text()):
            node = common.base()
            for part in path.split("."):
                assert part in node, (page, path)
                node = node[part]
        for group, name in re.findall(
            r"`(checkpoint|dataset|mixup|model|optimizer|schedule)\.(?!py\b|safetensors\b|bv\b)(\w+)",
            page.read_text(),
        ):
            assert name in common.base()[group], (page, group, name)
    text = (ROOT / "docs" / "preprocessing.md").read_text()
    for op in OPS:
        assert re.search(rf"^\| `{op}[`(]", text, re.MULTILINE), op


def test_every_decay_is_documented():
    from mixer.training.optimizer import DECAYS

    comment = re.search(r"^ +decay=.*", (ROOT / "configs" / "common.py").read_text(), re.MULTILINE)[
        0
    ]
    row = re.search(
        r"^\| `schedule\.decay`.*", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE
    )[0]
    for name in DECAYS:
        assert name in comment and f"`{name}`" in row, name
