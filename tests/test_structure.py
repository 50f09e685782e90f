"""Checks the rules of the package: import layers, no TensorFlow outside data, no code from data."""

import ast
import re

from helpers import ROOT, run_python


def _modules():
    for path in sorted((ROOT / "mixer").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(path):
    """Yields the name of each imported module, and whether the import is at the top level."""
    tree = ast.parse(path.read_text())
    top_level = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top_level
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node in top_level


def test_packages_import_downward_only():
    """Runs the same check as `make lint`; the contract is in pyproject.toml."""
    lint = "from importlinter.cli import lint_imports"
    run_python("-c", f"import sys; {lint}; sys.exit(lint_imports(no_cache=True))")


def test_only_data_imports_tensorflow_and_nothing_imports_programs():
    tensorflow_modules = (
        "tensorflow",
        "clu.metric_writers",
        "clu.periodic_actions",
        "clu.preprocess_spec",
    )
    for name, path in _modules():
        for module, is_top_level in _imports(path):
            if is_top_level and not name.startswith("mixer.data."):
                assert not module.startswith(tensorflow_modules), f"{name} imports {module}"
            assert not module.startswith(("configs", "train.", "evaluate.")), (name, module)


def test_configs_import_only_ml_collections_and_common():
    for path in (ROOT / "configs").glob("*.py"):
        for module, _ in _imports(path):
            assert module.startswith(("ml_collections.", "configs.common")), (path, module)


def test_no_hidden_config_defaults_and_no_code_from_data():
    for _, path in _modules():
        text = path.read_text()
        for pattern in (r"config\.get\(", r"allow_pickle=True", r"\bpickle\b", r"(?<![.\w])eval\("):
            assert not re.search(pattern, text), (path, pattern)


def test_training_on_synthetic_data_runs_without_tensorflow(tmp_path):
    """Blocks the import of TensorFlow and TFDS, as if they were not installed."""
    code = f"""
import sys
for name in ("tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None
sys.path.insert(0, "tests")
from helpers import tiny_config
from mixer import trainer
from mixer.evaluation import report
from mixer.evaluation.subject import open_subject
config = tiny_config(total_steps=4, tensorboard=True, model__num_blocks=1, model__dropout=0.0)
trainer.train(config, {str(tmp_path)!r})
subjects = [lambda: open_subject({str(tmp_path)!r}, checkpoint_name="last")]
report.evaluate(subjects, report.Options(splits=["test"]))
"""
    result = run_python("-c", code)
    assert "test accuracy" in result.stdout and "written to" in result.stdout
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_import_mixer_does_not_import_jax_or_tensorflow():
    packages = "('jax', 'flax', 'tensorflow')"
    code = f"import sys, mixer; print([name for name in {packages} if name in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"
