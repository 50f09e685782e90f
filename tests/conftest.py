"""Set before JAX and TensorFlow are loaded: quiet, on the CPU, and compiled programs are shared."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A TFDS directory with the digits prepared in it."""
    from mixer.data import sources

    path = tmp_path_factory.mktemp("tfds")
    sources.tfds_builder("digits", str(path))
    return path
