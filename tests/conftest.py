"""What holds for every test: quiet on the CPU, one compile cache, cheap compilation."""

import contextlib
import fcntl
import gc
import os
import shutil
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# matplotlib and TensorFlow otherwise import each other through Keras (mixer/cli/program.py).
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

CACHE = Path(__file__).parent.parent / ".test_cache"
CACHE_BYTES = 1 << 30


def _cache_key() -> str:
    """Changes with what decides a compiled program: jax, the CPU's features, the locked packages.

    Returns:
      A name for a directory.
    """
    lock = (CACHE.parent / "requirements.txt").read_bytes()
    cpu = b""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        cpu = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    python = sys.version.split()[0]
    return f"{version('jaxlib')}-{python}-{zlib.crc32(cpu):08x}-{zlib.crc32(lock):08x}"


def _prune(directory: Path) -> None:
    """Deletes the caches of other keys, and the programs used longest ago beyond CACHE_BYTES."""
    for cache in CACHE.glob("*"):
        if cache != directory:
            shutil.rmtree(cache, ignore_errors=True)
    files = []
    for file in directory.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another session may have deleted it
            files.append((file, file.stat()))
    total = 0
    for file, stat in sorted(files, key=lambda entry: entry[1].st_mtime, reverse=True):
        total += stat.st_size
        if total > CACHE_BYTES:
            file.unlink(missing_ok=True)


_directory = CACHE / _cache_key()
if "PYTEST_XDIST_WORKER" not in os.environ:
    _directory.mkdir(parents=True, exist_ok=True)
    _prune(_directory)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_directory)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest

_QUICK, _OPTIMIZED, _BITWISE = "quick", "optimized", "bitwise"
_compilation = None


def _compile(mode: str) -> None:
    """Sets how programs are compiled from now on, in this process and the ones it starts."""
    global _compilation
    if mode == _compilation:
        return
    # Not above: the process that hands the tests to xdist's workers needs no JAX.
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if _compilation is not None:
        jax.clear_caches()  # programs compiled in the other mode
    _compilation = mode
    for variable, name, value in (
        ("JAX_DISABLE_MOST_OPTIMIZATIONS", "jax_disable_most_optimizations", mode == _QUICK),
        ("JAX_ENABLE_COMPILATION_CACHE", "jax_enable_compilation_cache", mode != _BITWISE),
    ):
        os.environ[variable] = str(int(value))
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX asks once whether there is one


gc.disable()  # the imports of the tests make no garbage

# If one of these files started last, one process would work on it long after the other has ended.
LONGEST = ["test_bitwise", "test_trainer", "test_readme", "test_loading", "test_multihost"]
LONGEST += ["test_train_step", "test_data", "test_config"]


def pytest_collection_modifyitems(items):
    """Sorts the files that take longest to the start; the others keep their order."""
    items.sort(key=lambda item: [*LONGEST, item.path.stem].index(item.path.stem))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Most tests compile for longer than they compute: XLA optimizes only where numbers count.

    `_cheap_collections` collects garbage once a file; automatic collections, which trainer.train
    enables, cost a twentieth of the time of all tests.
    """
    gc.disable()
    if item.get_closest_marker("bitwise"):
        _compile(_BITWISE)
    else:
        _compile(_OPTIMIZED if item.get_closest_marker("optimized") else _QUICK)
    return (yield)


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections():
    """Keeps what earlier files have made out of the collections of garbage.

    `Checkpoints` collects whenever it opens, closes or reads, which takes a second or more where a
    process has traced many programs.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Likewise what a shared fixture has made, such as a trained run."""
    result = yield
    if fixturedef.scope != "function":
        gc.freeze()
    return result


def _made_once(tmp_path_factory, name, make):
    """A directory that the first process to ask for it fills by `make(path)`, shared by all."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each process has a directory of its own there
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            make(base / f"{name}.new")
            (base / f"{name}.new").rename(base / name)
    return base / name


@pytest.fixture(scope="module")
def no_curves():
    """Drawing the curves takes longer than a tiny training; tests/test_inspect.py draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixer.runs.curves.draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A TFDS directory with the digits prepared in it."""
    from mixer.data.sources import stored as sources

    return _made_once(
        tmp_path_factory, "tfds", lambda path: sources.tfds_builder("digits", str(path))
    )


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tfds_dir):
    """A finished run of `helpers.tiny_config` on the digits, with an average; copy it to change it.

    It is for tests of what reads a run. Tests that compare bits train their own.
    """
    from helpers import tiny_config
    from mixer import trainer

    def train(path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mixer.runs.curves.draw_curves", lambda *_: None)
            trainer.train(tiny_config(tfds_dir), path)

    return _made_once(tmp_path_factory, "run", train)


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory, tfds_dir):
    """A finished run of `tiny_digits`, streamed and never stopped, for tests that compare bits."""
    import tiny_digits

    from mixer import trainer

    def train(path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TFDS_DIR", str(tfds_dir))
            trainer.train(tiny_digits.get_config(), path)

    return _made_once(tmp_path_factory, "uninterrupted", train)


@pytest.fixture
def tpu(monkeypatch):
    """What libtpu asks for where there is no TPU."""
    pytest.importorskip("libtpu")
    for key in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
