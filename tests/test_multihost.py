"""train.py and evaluate.py as several processes of one run on this machine."""

import json
import re
import signal
import time

import multihost
import numpy as np
import pytest

from helpers import final_state, leaves, read_reproducible_metrics
from mixer.runs.record import read_metrics

# test_distributed.py has a fast test of two processes that stop together.
pytestmark = pytest.mark.slow

TRAIN = ("train.py", "--config=tests/tiny_synthetic.py")


def _difference(actual, expected):
    actual, expected = leaves(final_state(actual)), leaves(final_state(expected))
    assert actual.keys() == expected.keys()
    return max(np.abs(actual[k].astype(np.float64) - expected[k]).max() for k in actual)


def _same_bits(actual, expected):
    actual, expected = leaves(final_state(actual)), leaves(final_state(expected))
    return all(actual[k].tobytes() == expected[k].tobytes() for k in actual)


def _stopped_at(processes, workdir, devices_each, *flags, signum=signal.SIGTERM):
    """Starts an endless run and sends process 1 a signal; returns the step that the run saves."""
    children = multihost.start(
        processes, devices_each, *TRAIN, "--config.total_steps=100000", *flags,
        f"--workdir={workdir}",
    )  # fmt: skip
    deadline = time.time() + 200
    while not any("train/loss" in row for row in read_metrics(workdir)):
        assert time.time() < deadline and children[0].poll() is None, multihost.finish(children, 1)
        time.sleep(0.1)
    children[1].send_signal(signum)
    results = multihost.finish(children)
    assert [code for code, _ in results] == [128 + signum] * processes, results
    assert f"{signal.Signals(signum).name} on process 1" in results[0][1]
    (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert int(final_state(workdir)["step"]) == step
    return step


@pytest.mark.bitwise
def test_run_stopped_on_two_processes_continues_on_two_one_and_four(tmp_path, monkeypatch):
    """A signal to one process stops both.

    Bit for bit the uninterrupted run of one process on the same mesh. XLA adds in another order on
    one device, and gloo adds what four devices compute in another order than XLA.
    """
    mesh = "--config.mesh.fsdp=2"
    step = _stopped_at(2, tmp_path / "two", 1, mesh)
    for name in ("alone", "four"):
        (tmp_path / name).mkdir()
        multihost.copy(tmp_path / "two", tmp_path / name)
    length = f"--config.total_steps={step + 6}"
    command = (*TRAIN, length, "--allow_config_change")
    multihost.run(1, 2, *TRAIN, length, mesh, f"--workdir={tmp_path / 'whole'}")
    out = multihost.run(2, 1, *command, mesh, f"--workdir={tmp_path / 'two'}")
    assert re.search(r"\b2 x cpu.*\b2 processes", out) and re.search(rf"\bstep {step}\b", out)
    assert _same_bits(tmp_path / "whole", tmp_path / "two")
    # One of the processes writes the metrics.
    metrics = read_reproducible_metrics(tmp_path / "whole")
    assert read_reproducible_metrics(tmp_path / "two") == metrics
    # A damaged checkpoint is repeated from the one before it: the file of process 1, cut off.
    newest = tmp_path / "two" / "checkpoints" / f"{step + 6}"
    data = sorted((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    data[-1].write_bytes(data[-1].read_bytes()[:100])
    out = multihost.run(2, 1, *command, mesh, f"--workdir={tmp_path / 'two'}")
    assert str(newest) in out and re.search(rf"\bstep {step}\b", out)
    assert _same_bits(tmp_path / "whole", tmp_path / "two")
    # No more bits are compared.
    for variable in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.setenv(variable, "1")
    multihost.run(1, 1, *command, f"--workdir={tmp_path / 'alone'}")
    assert _difference(tmp_path / "whole", tmp_path / "alone") <= 1e-5
    mesh = (mesh, "--config.mesh.tensor=2")
    out = multihost.run(4, 1, *command, *mesh, f"--workdir={tmp_path / 'four'}")
    assert re.search(r"\b4 x cpu.*\b4 processes", out)
    assert _difference(tmp_path / "whole", tmp_path / "four") <= 1e-5
    for name in ("whole", "two", "four"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["splits"]["test"]["count"] == 256
    for name in ("alone", "four"):
        rows = read_reproducible_metrics(tmp_path / name)
        assert [row["step"] for row in rows] == [row["step"] for row in metrics]


def test_processes_with_different_configs_stop_and_name_the_keys(tmp_path):
    """The process that detects the difference tells the others, which may wait in a collective."""
    address = multihost.free_address()
    flags = [(), ("--config.optimizer.peak_lr=0.2", "--config.seed=3")]
    children = [
        multihost.start_one(
            address, 2, index, *TRAIN, *flags[index], f"--workdir={tmp_path / 'run'}"
        )
        for index in range(2)
    ]
    (code, out), (other_code, other_out) = multihost.finish(children, 120)
    assert other_code == 2 and "process 0" in other_out
    assert re.search(r"optimizer\.peak_lr.*0\.1.*0\.2.*seed.*0.*3", other_out)
    assert code == 1 and "process 1" in out and "seed" in out
    assert "Traceback" not in out + other_out


def test_unshared_directory_is_refused_by_every_process(tmp_path):
    address = multihost.free_address()
    children = [
        multihost.start_one(address, 2, i, *TRAIN, f"--workdir={tmp_path / str(i)}")
        for i in range(2)
    ]
    for code, out in multihost.finish(children, 120):
        assert code == 2 and str(tmp_path) in out, out


def test_evaluate_on_two_processes(tmp_path):
    """The run used four devices, and the evaluation uses two."""
    multihost.run(1, 4, *TRAIN, "--config.mesh.fsdp=4", f"--workdir={tmp_path}")
    train_result = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]
    (tmp_path / "results.json").unlink()
    flags = ("evaluate.py", f"--workdir={tmp_path}", "--split=test")
    multihost.run(2, 1, *flags)
    eval_result = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]
    assert eval_result["top1"] == train_result["top1"]
    assert eval_result["loss"] == pytest.approx(train_result["loss"], abs=1e-6)


def test_failed_background_write_of_one_process_stops_all(tmp_path):
    """As on a full disk. The other process would wait for it in Orbax for minutes."""
    code = """
import errno, sys
sys.path.insert(0, "tests")
import jax
from mixer.cli import config as cli, launch
from absl import flags

def main(argv):
    launch.join()
    from orbax.checkpoint._src.serialization import jax_array_handlers
    from helpers import tiny_config
    from mixer import trainer

    async def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if jax.process_index() == 1:
        jax_array_handlers._async_serialize_replica_slices = full
    config = tiny_config(mesh__fsdp=2, total_steps=400, checkpoint__every_steps=4)
    config.eval_every_steps = None
    trainer.train(config, sys.argv[1].partition("=")[2])

flags.DEFINE_string("workdir", None, "")
cli.run(main)
"""
    script = tmp_path / "fail.py"
    script.write_text(code)
    children = multihost.start(2, 1, script, f"--workdir={tmp_path / 'run'}")
    (code, out), (other_code, other_out) = multihost.finish(children, 150)
    assert other_code == 2 and "No space left on device" in other_out, (other_code, other_out)
    assert code == 1 and "No space left on device" in out, (code, out)
