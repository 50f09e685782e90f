"""The rules of the package: layers, TensorFlow-free imports, no hidden defaults."""

import ast
import re

from helpers import ROOT, run_python


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


def test_packages_import_downward_only():
    """As `make lint` checks; the contract stands in pyproject.toml."""
    lint = "from importlinter.cli import lint_imports"
    run_python("-c", f"import sys; {lint}; sys.exit(lint_imports(no_cache=True))")


def test_only_data_imports_tensorflow_and_nothing_imports_the_programs():
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
from mixer.evaluation.subject import open_subject
trainer.train(tiny_config(total_steps=4, tensorboard=True), {str(tmp_path)!r})
opened = [lambda: open_subject({str(tmp_path)!r}, checkpoint_name="last")]
report.evaluate(opened, report.Options(splits=["test"]))
"""
    done = run_python("-c", code)
    assert "test accuracy" in done.stdout and "written to" in done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_import_mixer_is_cheap():
    heavy = "('jax', 'flax', 'tensorflow')"
    code = f"import sys, mixer; print([name for name in {heavy} if name in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"
