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


def _difference(one, other):
    one, other = leaves(final_state(one)), leaves(final_state(other))
    assert one.keys() == other.keys()
    return max(np.abs(one[k].astype(np.float64) - other[k]).max() for k in one)


def _same_bits(one, other):
    one, other = leaves(final_state(one)), leaves(final_state(other))
    return all(one[k].tobytes() == other[k].tobytes() for k in one)


@pytest.mark.bitwise
def test_two_processes_give_the_bits_of_one(tmp_path):
    """On the same mesh of two devices."""
    for processes, devices, name in ((1, 2, "one"), (2, 1, "many")):
        out = multihost.run(
            processes, devices, *TRAIN, "--config.mesh.fsdp=2", f"--workdir={tmp_path / name}"
        )
    assert re.search(r"\b2 x cpu.*\b2 processes", out)
    assert _same_bits(tmp_path / "one", tmp_path / "many")
    # One of the two processes writes the metrics.
    assert read_reproducible_metrics(tmp_path / "one") == read_reproducible_metrics(
        tmp_path / "many"
    )
    for name in ("one", "many"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["splits"]["test"]["count"] == 256


def _stopped_at(processes, workdir, devices_each, *flags, signum=signal.SIGTERM):
    """Starts an endless run and sends process 1 a signal; returns the step that the run saves."""
    started = multihost.start(
        processes, devices_each, *TRAIN, "--config.total_steps=100000", *flags,
        f"--workdir={workdir}",
    )  # fmt: skip
    deadline = time.time() + 200
    while not any("train/loss" in row for row in read_metrics(workdir)):
        assert time.time() < deadline and started[0].poll() is None, multihost.finish(started, 1)
        time.sleep(0.1)
    started[1].send_signal(signum)
    results = multihost.finish(started)
    assert [code for code, _ in results] == [128 + signum] * processes, results
    assert f"{signal.Signals(signum).name} on process 1" in results[0][1]
    (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert int(final_state(workdir)["step"]) == step
    return step


@pytest.mark.bitwise
def test_run_stopped_on_two_processes_continues_on_two_one_and_four(tmp_path):
    """A signal to one process stops both.

    Bit for bit the uninterrupted run on the same mesh. XLA adds in another order on one device, and
    gloo adds what four devices compute in another order than XLA.
    """
    step = _stopped_at(2, tmp_path / "two", 1)
    for name in ("alone", "four"):
        (tmp_path / name).mkdir()
        multihost.copy(tmp_path / "two", tmp_path / name)
    length = f"--config.total_steps={step + 6}"
    command = (*TRAIN, length, "--allow_config_change")
    multihost.run(1, 2, *TRAIN, length, f"--workdir={tmp_path / 'whole'}")
    out = multihost.run(2, 1, *command, f"--workdir={tmp_path / 'two'}")
    assert re.search(rf"\bstep {step}\b", out)
    assert _same_bits(tmp_path / "whole", tmp_path / "two")
    multihost.run(1, 1, *command, f"--workdir={tmp_path / 'alone'}")
    assert _difference(tmp_path / "whole", tmp_path / "alone") <= 1e-5
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    out = multihost.run(4, 1, *command, *mesh, f"--workdir={tmp_path / 'four'}")
    assert re.search(r"\b4 x cpu.*\b4 processes", out)
    assert _difference(tmp_path / "whole", tmp_path / "four") <= 1e-5
    results = json.loads((tmp_path / "four" / "results.json").read_text())
    assert results["splits"]["test"]["count"] == 256
    # One of the processes writes the metrics, and each log step once.
    steps = [row["step"] for row in read_reproducible_metrics(tmp_path / "whole")]
    for name in ("two", "alone", "four"):
        assert [row["step"] for row in read_reproducible_metrics(tmp_path / name)] == steps


def test_processes_with_different_configs_stop_and_name_the_keys(tmp_path):
    """The process that detects the difference tells the others, which may wait in a collective."""
    address = multihost.free_address()
    flags = [(), ("--config.optimizer.peak_lr=0.2", "--config.seed=3")]
    started = [
        multihost.start_one(
            address, 2, index, *TRAIN, *flags[index], f"--workdir={tmp_path / 'run'}"
        )
        for index in range(2)
    ]
    (code, out), (other_code, other_out) = multihost.finish(started, 120)
    assert other_code == 2 and "process 0" in other_out
    assert re.search(r"optimizer\.peak_lr.*0\.1.*0\.2.*seed.*0.*3", other_out)
    assert code == 1 and "process 1" in out and "seed" in out
    assert "Traceback" not in out + other_out


def test_unshared_directory_and_damaged_checkpoint(tmp_path):
    address = multihost.free_address()
    started = [
        multihost.start_one(address, 2, i, *TRAIN, f"--workdir={tmp_path / str(i)}")
        for i in range(2)
    ]
    for code, out in multihost.finish(started, 120):
        assert code == 2 and str(tmp_path) in out, out
    run = tmp_path / "run"
    flags = ("--config.checkpoint.every_steps=4", "--config.mesh.fsdp=2")
    multihost.run(2, 1, *TRAIN, *flags, f"--workdir={run}")
    before = leaves(final_state(run))
    # Truncates the file that process 1 has written for the newest checkpoint.
    data = sorted(
        (run / "checkpoints" / "8" / "state").rglob("d/*"), key=lambda p: p.stat().st_size
    )
    data[-1].write_bytes(data[-1].read_bytes()[:100])
    out = multihost.run(2, 1, *TRAIN, *flags, f"--workdir={run}")
    assert str(run / "checkpoints" / "8") in out and re.search(r"\bstep 4\b", out)
    after = leaves(final_state(run))
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)


def test_evaluate_on_two_processes(tmp_path):
    """The run used four devices, and the evaluation uses two."""
    multihost.run(1, 4, *TRAIN, "--config.mesh.fsdp=4", f"--workdir={tmp_path}")
    one = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]
    (tmp_path / "results.json").unlink()
    flags = ("evaluate.py", f"--workdir={tmp_path}", "--split=test")
    multihost.run(2, 1, *flags)
    two = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]
    assert two["top1"] == one["top1"] and two["loss"] == pytest.approx(one["loss"], abs=1e-6)


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
    started = multihost.start(2, 1, script, f"--workdir={tmp_path / 'run'}")
    (code, out), (other_code, other_out) = multihost.finish(started, 150)
    assert other_code == 2 and "No space left on device" in other_out, (other_code, other_out)
    assert code == 1 and "No space left on device" in out, (code, out)
