"""The notebooks: every code cell runs in order, on a run that was trained for a few seconds."""

import base64
import json
import shutil

import pytest

from helpers import ROOT, run_python

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Runs a notebook's code cells as Jupyter would, without Jupyter, then one more line. It skips the
# lines that start with % or !, which install the package and train the run.
RUN = """
import json, sys
sys.modules["tensorflow"] = None
cells = json.load(open(sys.argv[1]))["cells"]
space = {"__name__": "__main__"}
for cell in cells:
    if cell["cell_type"] == "code":
        lines = [line for line in cell["source"] if not line.startswith(("%", "!"))]
        exec(compile("".join(lines), cell["id"], "exec"), space)
exec(sys.argv[2], space)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tfds_dir):
    """A folder with the notebooks and runs/digits, a short run of `configs/digits.py`."""
    from configs import digits
    from mixer import trainer

    path = tmp_path_factory.mktemp("notebooks")
    config = digits.get_config()
    config.update(total_steps=120, eval_every_steps=120, tensorboard=False)
    config.schedule.warmup_steps = 10
    config.dataset.update(data_dir=str(tfds_dir), train_preprocess="decode")
    trainer.train(config, path / "runs" / "digits")
    shutil.copytree(ROOT / "notebooks", path / "notebooks")
    return path


def _run(place, name, last_line):
    """Runs a notebook and then `last_line`; returns what that prints as JSON."""
    path = place / "notebooks" / f"{name}.ipynb"
    process = run_python("-c", RUN, path.name, last_line, cwd=path.parent, MPLBACKEND="Agg")
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_use_a_checkpoint(place):
    last_line = (
        "import json; "
        "print(json.dumps([int(correct[test].sum()), accuracy, units.shape, len(least_sure)]))"
    )
    correct, accuracy, units, num_shown = _run(place, "use_a_checkpoint", last_line)
    results = json.loads((place / "runs" / "digits" / "results.json").read_text())
    # The notebook classifies the same images correctly as the run's own evaluation.
    assert correct == results["splits"]["test"]["correct"] > 0.8 * 360
    assert units == [32, 4, 4] and num_shown == 12
    for shots in ("1", "2", "5"):
        pixels, features = accuracy[shots]
        assert features > pixels + 0.02 and features > 0.6


@pytest.mark.slow
def test_fine_tune(place):
    last_line = (
        "import json; right = float(np.mean(predicted == test_labels)); "
        "print(json.dumps([difference, right, curve.tolist(), from_scratch.tolist()]))"
    )
    difference, accuracy, curve, from_scratch = _run(place, "fine_tune", last_line)
    assert 0 < difference < 1e-4  # a grown model computes the same function
    assert curve[-1] == [200, pytest.approx(accuracy, abs=1e-6)]
    assert accuracy > 0.5 and accuracy > from_scratch[-1][1] + 0.05
    card = json.loads((place / "runs" / "letters.npz.json").read_text())
    assert "".join(card["class_names"]) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert card["image_size"] == [16, 16] and card["tokens_mlp_dim"] == 4 * 32


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_shipped_with_its_outputs(path):
    text = path.read_text()
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len(text) < 300_000 and not any(word in text for word in ("/tmp/", "/home/", "/work/"))
    cells = notebook["cells"]
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(
        output.get("name") == "stdout" or "image/png" in output["data"] for output in outputs
    )
    pictures = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert len(pictures) == text.count("plt.show()")
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_fine_tuning_takes_ten_cells_after_the_installation():
    cells = json.loads((ROOT / "notebooks" / "fine_tune.ipynb").read_text())["cells"]
    ids = [cell["id"] for cell in cells if cell["cell_type"] == "code"]
    assert ids[:2] == ["install", "digits-run"] and len(ids) == 2 + 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_installs_the_package_and_trains_its_own_run(path):
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}
    # Without -e: a running kernel does not find an editable installation.
    assert cells["install"].startswith("%pip install -q -c ../requirements.txt ..")
    assert "train.py --config=configs/digits.py" in cells["digits-run"]
