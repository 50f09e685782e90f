"""`make` on a machine whose only Python is too new: uv provides one."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
TOOLS = ("sh", "bash", "rm", "touch", "make")

# Answers `-c` as Python 3.14 and runs `-m pip` as this Python. uv, which asks otherwise, gets none.
TOO_NEW = f"""#!/bin/sh
if [ "$1" = -c ]; then
  exec {sys.executable} -c "import sys; sys.version_info = (3, 14, 0, 'final', 0)
$2"
fi
[ "$1" = -m ] && exec {sys.executable} "$@"
exit 1
"""


def _make(directory: Path, *arguments: str, interpreters: Path) -> subprocess.CompletedProcess:
    """Runs make in a copy of the Makefile, with Python 3.14 on PATH and no downloads by uv."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, directory / name)
    programs = directory / "bin"
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))
    (programs / "python3").write_text(TOO_NEW)
    (programs / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": str(programs), "UV_PYTHON_INSTALL_DIR": str(interpreters)}
    environment |= {"UV_PYTHON_DOWNLOADS": "never", "HOME": str(directory)}
    return subprocess.run(
        [str(programs / "make"), f"UV_PYTHON={VERSION}", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_uv_makes_the_environment_where_python_is_too_new(tmp_path):
    interpreters = tmp_path / "interpreters"
    name = f"cpython-{platform.python_version()}-linux-{platform.machine()}-gnu"
    (interpreters / name).mkdir(parents=True)
    (interpreters / name / "bin").symlink_to(Path(sys.base_prefix) / "bin")
    result = _make(tmp_path, ".venv/bin/pip", interpreters=interpreters)
    assert result.returncode == 0, result.stderr
    assert f"uv makes the environment with Python {VERSION}" in result.stdout
    version = subprocess.check_output([tmp_path / ".venv/bin/pip", "--version"], text=True)
    assert f"(python {VERSION})" in version


@pytest.mark.slow
def test_failed_download_of_python_says_what_to_install(tmp_path):
    result = _make(tmp_path, "train", interpreters=tmp_path / "interpreters")
    assert result.returncode == 2
    assert "make train PYTHON=" in result.stdout.splitlines()[-1]
    assert not (tmp_path / ".venv").exists()
