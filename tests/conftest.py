"""Set before JAX and TensorFlow are loaded: quiet, on the CPU, and compiled programs are shared."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests and the processes they start compile the same small programs again and again.
_cache = tempfile.mkdtemp(prefix="mixer_test_cache_")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A TFDS directory with the digits prepared in it."""
    from mixer.data import sources

    path = tmp_path_factory.mktemp("tfds")
    sources.tfds_builder("digits", str(path))
    return path


@pytest.fixture
def tpu(monkeypatch):
    """What libtpu asks for where there is no TPU."""
    pytest.importorskip("libtpu")
    for key in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
