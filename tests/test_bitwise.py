"""Bit-identical runs: stopped, killed and continued, or with the images on the device.

The slow tests compare their runs with `uninterrupted_run`, which streams its images.
"""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
import tiny_digits

from helpers import (
    ROOT,
    assert_same_bits,
    environment,
    final_state,
    raise_signal_at_step,
    read_reproducible_metrics,
    run_program,
)
from mixer import trainer
from mixer.parallel.signals import Stopped
from mixer.training import updates

COMMAND = ["train.py", "--config=tests/tiny_digits.py"]


pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture
def config(tfds_dir, monkeypatch):
    """The config of `COMMAND`: augmentation, mixup, masks, an average and accumulation."""
    monkeypatch.setenv("TFDS_DIR", str(tfds_dir))
    config = tiny_digits.get_config()
    assert config.mixup.alpha and config.model.stoch_depth and config.optimizer.ema_decay
    assert config.optimizer.accumulate_steps > 1 and "random" in config.dataset.train_preprocess
    return config


def _assert_same_run(workdir, expected):
    """Compares the final states and the metrics bit by bit."""
    assert_same_bits(final_state(workdir), final_state(expected))
    assert read_reproducible_metrics(workdir) == read_reproducible_metrics(expected)


def _start(workdir, tfds_dir):
    """Starts `COMMAND` as a process."""
    return subprocess.Popen(
        [sys.executable, *COMMAND, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment(TFDS_DIR=str(tfds_dir)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _read_until_step(process, step):
    """Reads the output of `process` up to the line of `step`; returns the lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        match = re.match(r"step (\d+)/", line)
        if match and int(match[1]) >= step:
            break
    return lines


def _assert_stopped(process, lines, signum):
    """Checks how a process ends after a signal; returns the step that it saves."""
    lines.extend(process.stdout)
    assert process.wait(200) == 128 + signum, lines
    assert any(re.match(rf"{signal.Signals(signum).name}: .*\d+", line) for line in lines)
    assert "Traceback" not in "".join(lines)
    return int(re.search(r"checkpoints/(\d+)", lines[-1])[1])


@pytest.mark.slow
@pytest.mark.bitwise
def test_run_that_is_stopped_three_times_has_the_same_bits(
    tmp_path, config, uninterrupted_run, monkeypatch
):
    """SIGTERM at the first step, at a checkpoint and before the last step."""
    for step in (1, 20, 39):
        with monkeypatch.context() as patch:
            raise_signal_at_step(patch, step, signal.SIGTERM)
            with pytest.raises(Stopped) as caught:
                trainer.train(config, tmp_path)
        assert caught.value.exit_code == 143
        assert (tmp_path / "checkpoints" / str(step)).is_dir()
    trainer.train(config, tmp_path)
    _assert_same_run(tmp_path, uninterrupted_run)


@pytest.mark.bitwise
def test_stopped_and_continued_run_has_the_bits_of_a_resident_one(
    tmp_path, tfds_dir, config, capsys
):
    """Three runs compile for three promises; the slow tests below tell which one is broken.

    SIGTERM stops a process, and this process continues its run: the same bits as without a stop.
    The uninterrupted run has its images on the device: the same bits as from a stream. A second
    process is refused a run's directory.
    """
    stopped_run = tmp_path / "stopped"
    process = _start(stopped_run, tfds_dir)
    lines = [next(process.stdout)]
    second = run_program(*COMMAND, f"--workdir={stopped_run}")
    assert second.returncode == 2
    assert re.fullmatch(rf"train\.py: .*pid {process.pid}\b.*\n", second.stderr)
    lines += _read_until_step(process, 8)
    process.send_signal(signal.SIGTERM)
    step = _assert_stopped(process, lines, signal.SIGTERM)
    assert 8 <= step < 40
    trainer.train(config, stopped_run)
    out = capsys.readouterr().out
    assert f"continuing from step {step}\n" in out and "stay on the device" not in out

    config.dataset.on_device = "on"
    config.log_every_steps = 10  # the device makes several steps a call
    trainer.train(config, tmp_path / "resident")
    assert "stay on the device: 200 of 8 x 8 px" in capsys.readouterr().out
    assert_same_bits(final_state(stopped_run), final_state(tmp_path / "resident"))
    expected = read_reproducible_metrics(tmp_path / "resident")
    rows = [row for row in read_reproducible_metrics(stopped_run) if row["step"] % 10 == 0]
    assert rows == expected and {row["step"] for row in rows} == {10, 20, 30, 40}


@pytest.mark.slow
@pytest.mark.bitwise
def test_killed_and_interrupted_process_resumes_bitwise(
    tmp_path, tfds_dir, config, uninterrupted_run
):
    """SIGKILL before the first checkpoint, Ctrl-C, SIGKILL near a checkpoint; then to the end."""
    for signum, step in ((signal.SIGKILL, 2), (signal.SIGINT, 10), (signal.SIGKILL, 20)):
        process = _start(tmp_path, tfds_dir)
        lines = _read_until_step(process, step)
        time.sleep(0.05 * step % 0.13)
        process.send_signal(signum)
        if signum == signal.SIGKILL:
            assert process.wait() == -signum
        else:
            assert step <= _assert_stopped(process, lines, signum) < 40
        process.stdout.close()
    assert max(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*[0-9]")) < 40
    trainer.train(config, tmp_path)
    _assert_same_run(tmp_path, uninterrupted_run)


@pytest.mark.slow
@pytest.mark.bitwise
def test_resident_run_that_is_stopped_gives_the_bits_of_a_streamed_one(
    config, uninterrupted_run, tmp_path, monkeypatch
):
    """Its calls end at other steps: to log, to evaluate, around a profile."""
    calls, stop_steps = [], []
    next_call = updates.Resident.next

    def record_call(self, step, max_count):
        count, update = next_call(self, step, max_count)
        calls.append((step, count))
        if step >= 7 and not stop_steps:
            os.kill(os.getpid(), signal.SIGTERM)
            stop_steps.append(step + count)
        return count, update

    monkeypatch.setattr(updates.Resident, "next", record_call)
    monkeypatch.setattr(updates, "CALL_SECS", 600.0)  # calls grow even on a slow machine
    config.dataset.on_device = "on"
    config.log_every_steps = 10
    with pytest.raises(Stopped):
        trainer.train(config, tmp_path)
    assert max(count for _, count in calls) > 1
    assert (tmp_path / "checkpoints" / str(stop_steps[0])).is_dir()
    config.update(log_every_steps=2, profile_steps=(14, 17))
    # The real profiler crashed the test process once, while a checkpoint was being written;
    # test_resident and test_trainer use it.
    traces = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: traces.append(directory))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traces.append("end"))
    trainer.train(config, tmp_path)
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted_run))
    rows, expected = (
        [row for row in read_reproducible_metrics(run) if row["step"] > 10]
        for run in (tmp_path, uninterrupted_run)
    )
    assert rows == expected
    assert {13, 17, 20, 30, 40} <= {step + count for step, count in calls}
    assert [str(trace) for trace in traces] == [str(tmp_path / "profile"), "end"]
