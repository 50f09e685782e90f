"""The rules that hold the house up: floors, TensorFlow-free imports, no hidden defaults."""

import ast
import re

from helpers import ROOT, run_python

# DESIGN: a file imports lower floors, or its own without a circle.
FLOORS = {
    "mixer": -1,
    "mixer.errors": -1,
    "mixer.files": -1,
    "mixer.backend": -1,
    "mixer.formatting": -1,
    "mixer.interrupts": -1,
    "mixer.run_files": -1,
    "mixer.data": -1,
    "mixer.data.order": 0,
    "mixer.data.steps": 0,
    "mixer.data.preprocess": 0,
    "mixer.data.synthetic": 0,
    "mixer.data.folder": 0,
    "mixer.data.digits": 0,
    "mixer.data.labels": 0,
    "mixer.data.imagenet_names": 0,
    "mixer.data.permutation": 0,
    "mixer.data.images": 0,
    "mixer.data.policies": 0,
    "mixer.data.imagenet_real": 0,
    "mixer.data.randaugment": 0,
    "mixer.data.autoaugment": 0,
    "mixer.data.imagenet21k_source": 0,
    "mixer.data.imagenet21k": 0,
    "mixer.data.sources": 1,
    "mixer.model": 1,
    "mixer.losses": 1,
    "mixer.mixup": 1,
    "mixer.sharding": 1,
    "mixer.metrics": 1,
    "mixer.console": 1,
    "mixer.distributed": 1,
    "mixer.philox": 1,
    "mixer.augment": 2,
    "mixer.data.resident": 2,
    "mixer.stepping": 4,
    "mixer.flops": 2,
    "mixer.hlo": 1,
    "mixer.program": 5,
    "mixer.benchmarking": -1,
    "mixer.benchmarking.contest": 4,
    "mixer.benchmarking.plain": 4,
    "mixer.benchmarking.jax_side": 4,
    "mixer.benchmarking.agreement": 4,
    "mixer.benchmarking.torch_child": 4,
    "mixer.benchmarking.torch_side": 4,
    "mixer.benchmarking.report": 4,
    "mixer.benchmarking.input": 4,
    "mixer.benchmarking.loop": 4,
    "mixer.layers": 1,
    "mixer.microbatches": 2,
    "mixer.chips": 1,
    "mixer.memory": 1,
    "mixer.profiling": 1,
    "mixer.signals": 1,
    "mixer.foreign": 1,
    "mixer.published": 1,
    "mixer.resolution": 1,
    "mixer.optimizer": 2,
    "mixer.train_state": 2,
    "mixer.weights": 2,
    "mixer.remote": 2,
    "mixer.data.pipeline": 2,
    "mixer.train_step": 3,
    "mixer.checkpoint": 3,
    "mixer.loading": 3,
    "mixer.run": 3,
    "mixer.evaluation": -1,
    "mixer.evaluation.scores": 4,
    "mixer.evaluation.classification": 4,
    "mixer.evaluation.suites": 4,
    "mixer.evaluation.fewshot": 4,
    "mixer.evaluation.throughput": 4,
    "mixer.evaluation.sweeps": 4,
    "mixer.evaluation.report": 4,
    "mixer.pictures": 4,
    "mixer.inspection": 4,
    "mixer.page": 4,
    "mixer.planning": 4,
    "mixer.prediction": 4,
    "mixer.serving": 4,
    "mixer.transfer": 5,
    "mixer.trainer": 5,
    "mixer.cli": 5,
    "mixer.launch": 5,
    "mixer.tools": 5,
    "mixer.tools.prepare": 6,
    "mixer.tools.benchmark": 6,
    "mixer.tools.convert": 6,
    "mixer.tools.predict": 6,
    "mixer.tools.export": 6,
    "mixer.tools.inspect": 6,
    "mixer.tools.sweep": 6,
    "mixer.tools.plan": 6,
}


def _modules():
    for path in sorted((ROOT / "mixer").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(path):
    """Imported module names, each with whether the import stands at the file's top level."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node in top


def test_every_module_has_a_floor():
    assert {name for name, _ in _modules()} == set(FLOORS)


def test_modules_import_lower_floors_and_tensorflow_only_in_data():
    needs_tensorflow = (
        "tensorflow",
        "clu.metric_writers",
        "clu.periodic_actions",
        "clu.preprocess_spec",
    )
    for name, path in _modules():
        for imported, at_top in _imports(path):
            if at_top and not name.startswith("mixer.data."):
                assert not imported.startswith(needs_tensorflow), f"{name} imports {imported}"
            assert not imported.startswith(("configs", "train.", "evaluate.")), (name, imported)
            if name == "mixer" and not at_top:
                continue  # mixer.load, imported on first use
            parts = imported.split(".")
            while parts and ".".join(parts) not in FLOORS:
                parts.pop()
            if parts:
                assert FLOORS[".".join(parts)] <= FLOORS[name], f"{name} imports {imported}"


def test_configs_import_ml_collections_and_common_only():
    for path in (ROOT / "configs").glob("*.py"):
        for imported, _ in _imports(path):
            assert imported.startswith(("ml_collections.", "configs.common")), (path, imported)


def test_no_hidden_defaults_and_no_code_from_data():
    for _, path in _modules():
        text = path.read_text()
        for forbidden in (r"config\.get\(", r"allow_pickle=True", r"\bpickle\b", r"\beval\("):
            assert not re.search(forbidden, text), (path, forbidden)


def test_training_on_synthetic_data_runs_without_tensorflow(tmp_path):
    """As where TensorFlow is not installed: importing it, clu's writers or TFDS fails."""
    code = f"""
import sys
for name in ("tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None
sys.path.insert(0, "tests")
from helpers import tiny_config
from mixer import trainer
from mixer.evaluation import report
trainer.train(tiny_config(total_steps=4, tensorboard=True), {str(tmp_path)!r})
report.evaluate([lambda: report.open_run({str(tmp_path)!r})], splits=["test"])
"""
    done = run_python("-c", code)
    assert "test accuracy" in done.stdout and "written to" in done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_import_mixer_is_cheap():
    heavy = "('jax', 'flax', 'tensorflow')"
    code = f"import sys, mixer; print([name for name in {heavy} if name in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"
