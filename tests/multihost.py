"""Starts the processes of one run on this machine."""

import shutil
import socket
import subprocess
import sys
import tempfile

from helpers import ROOT, environment, run_python


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start_one(address, count, index, *arguments, devices=1):
    """Starts process `index` of `count`: `python ARGUMENTS` with the flags that join it."""
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read once the process has ended)
    join = [f"--coordinator_address={address}", f"--num_processes={count}"]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments), *join, f"--process_id={index}"],
        cwd=ROOT,
        env=environment(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}"),
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    process.output = output
    return process


def start(count, devices_each, *arguments):
    """Starts all processes of a run."""
    address = free_address()
    return [
        start_one(address, count, index, *arguments, devices=devices_each) for index in range(count)
    ]


def finish(processes, timeout=300):
    """Waits for all; returns (exit code, output) of each. Those that hang are killed: code -9."""
    results = []
    for process in processes:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.output.seek(0)
        results.append((process.returncode, process.output.read()))
    return results


def run(count, devices_each, *arguments, timeout=300):
    """Runs to the end; asserts that all went well; returns process 0's output."""
    if count == 1:
        flags = f"--xla_force_host_platform_device_count={devices_each}"
        return run_python(*arguments, timeout=timeout, XLA_FLAGS=flags).stdout
    results = finish(start(count, devices_each, *arguments), timeout)
    assert all(code == 0 for code, _ in results), results
    return results[0][1]


def copy(run, target):
    shutil.copytree(run, target, dirs_exist_ok=True)
