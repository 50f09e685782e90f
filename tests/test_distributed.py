"""Multi-process runs: joining, agreement, signals, failures and stalls."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types
from typing import ClassVar

import jax
import pytest

from helpers import ROOT, environment, run_python
from mixer import files, run_files
from mixer.errors import UserError
from mixer.parallel import join, processes, watchdog
from mixer.runs import record as metrics

# One worker process. Its plan is JSON: the arguments of `join.initialize`, and a list of the
# functions below to call, with their arguments.
WORKER = """
import json, os, signal, sys, time
plan = json.loads(sys.argv[1])
import jax
from mixer.cli import config as cli
from mixer.parallel import join, processes, signals, watchdog
from mixer.runs import record as metrics
from mixer.errors import UserError
watchdog.BEAT_SECS, watchdog.SUSPECT_SECS, watchdog.LOST_SECS = 0.2, 2.5, 4.0
processes.SHARE_SECS, signals.NOTICE_SECS = 0.5, 0.05

def show(**values):
    print(json.dumps(values), flush=True)

def talk():
    config = dict(devices=jax.device_count(), local=jax.local_device_count())
    show(**config, main=processes.is_main(), index=jax.process_index())
    processes.say(json.dumps({"speaker": index}))
    show(broadcast=processes.broadcast({"rows": [index, "x" * 5_000_000]})["rows"][0])
    show(second_broadcast=processes.broadcast(index), gather=processes.gather(index))
    show(agree=[processes.agree(True), processes.agree(index != 1)])
    processes.check_shared(plan["shared"])
    try:
        processes.check_shared(os.path.join(plan["shared"], str(index)))
    except UserError as error:
        show(error=str(error))
    show(num_files=sum(map(len, (files for *_, files in os.walk(plan["shared"])))))

def record():
    # Only process 0 sees metrics.jsonl, and drops the rows after step 2.
    writer = metrics.MetricWriter(
        os.path.join(plan["shared"], str(index)), last_step=2, tensorboard=False)
    writer.write(3, {"val/top1": 0.25})
    writer.close()
    show(rows=writer.rows, files=sorted(os.listdir(os.path.join(plan["shared"], str(index)))))

def stop(name, process):
    # There are no collectives here, so only the agreement keeps the processes together.
    with signals.catch() as stop_signal:
        for call in range(1, 20_000):
            if index == process and call == 15:
                os.kill(os.getpid(), getattr(signal, name))
            assert not stop_signal
            if stop_signal.poll():
                break
            time.sleep(0.003 * (index + 1))
        show(last_call=call, name=stop_signal.name, agreed=bool(stop_signal),
            next_poll=stop_signal.poll())

def finish():
    # The signal comes after the last poll of the other process: no process may stop or hang.
    with signals.catch() as stop_signal:
        for call in range(30):
            if index == 0 and call == 20:
                processes.barrier("last poll")
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)  # process 0 asks the others for their counts
            assert not stop_signal.poll()
    if index == 1:
        processes.barrier("last poll")
    show(finished=True)

def collective():
    from jax.experimental import multihost_utils
    return multihost_utils.process_allgather(jax.numpy.ones(3)).sum()

def mistake(process):
    if index == process:
        time.sleep(0.5)
        raise UserError("data_dir=/nowhere: no such directory")
    collective()  # hangs, or loses its connection
    time.sleep(100)

def fault(process):
    if index == process:
        raise KeyError("labels")
    time.sleep(100)

def kill(process, busy):
    collective()
    if index == process:
        os.kill(os.getpid(), signal.SIGKILL)
    while busy:
        collective()
    time.sleep(100)

def leave(name):
    raise signals.Stopped(getattr(signal, name))

def main(argv):
    global index
    join.initialize(*plan["join"])
    index = processes.state().process_id
    with watchdog.watch():
        for name, *arguments in plan["calls"]:
            globals()[name](*arguments)

sys.argv = ["worker.py"]
cli.run(main)
"""


def _free_port(low=1):
    """Returns a free port that is at least `low`."""
    for port in [0] if low == 1 else range(low, 65536):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return listener.getsockname()[1]


def _start(plans, environments=None, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(plan)],
            cwd=ROOT,
            env=environment(XLA_FLAGS=flags, **extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for plan, extra in zip(plans, environments or [{}] * len(plans), strict=True)
    ]


def _make_plans(count, **plan):
    address = f"localhost:{_free_port()}"
    return [dict(join=[address, count, index], **plan) for index in range(count)]


def _wait(workers):
    """Waits for the workers and returns the exit code, merged `show` values and errors of each."""
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    results = []
    for worker, (stdout, errors) in zip(workers, outputs, strict=True):
        values, lines = {}, []
        for line in stdout.splitlines():
            if line.startswith("{"):
                values.update(json.loads(line))
            else:
                lines.append(line)
        results.append(
            types.SimpleNamespace(
                code=worker.returncode,
                values=values,
                lines=lines,
                errors=errors,
                output=stdout + errors,
            )
        )
    return results


# Real processes.


@pytest.mark.slow
def test_two_processes_agree_stop_together_and_report_the_failure(tmp_path):
    for index in range(2):
        (tmp_path / str(index)).mkdir()
    rows = [{"step": step, "val/top1": step / 10} for step in (1, 2, 3)]
    (tmp_path / "0" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    # `record` uses a directory per process, so only process 0 has a metrics.jsonl.
    calls = [["talk"], ["record"], ["stop", "SIGTERM", 1], ["stop", "SIGINT", 1], ["finish"]]
    calls += [["mistake", 1]]
    process_0, process_1 = _wait(
        _start(_make_plans(2, shared=str(tmp_path), calls=calls), devices=2)
    )
    values_0, values_1 = process_0.values, process_1.values
    for index, values in enumerate((values_0, values_1)):
        assert (values["devices"], values["local"], values["index"]) == (4, 2, index), (
            process_0.output
        )
        assert (values["broadcast"], values["second_broadcast"], values["gather"]) == (0, 0, [0, 1])
        assert values["agree"] == [True, False]
        assert "process 1 (" in values["error"] and "process 0 (" not in values["error"]
        assert values["num_files"] == 1  # metrics.jsonl
        assert values["rows"] == [*rows[:2], {"step": 3, "val/top1": 0.25}]
    assert (values_0["main"], values_1["main"]) == (True, False)
    assert values_0["speaker"] == 0 and "speaker" not in values_1
    assert (values_0["files"], values_1["files"]) == (["metrics.jsonl"], [])

    # Both stop at the same call, although process 0 polls twice as often. `values` holds the
    # second stop.
    for values in (values_0, values_1):
        assert (values["last_call"], values["name"]) == (values_0["last_call"], "SIGINT"), (
            values_0,
            values_1,
        )
        assert values["agreed"] and values["next_poll"] and values["finished"]
    assert values_0["last_call"] > 15
    for name in ("SIGTERM", "SIGINT"):
        assert any(line.startswith(f"{name} on process 1 (") for line in process_0.lines), (
            process_0.lines
        )
    assert not process_1.lines

    message = "data_dir=/nowhere: no such directory"
    assert (process_1.code, process_1.errors.strip()) == (2, f"worker.py: {message}")
    assert process_0.code == 1
    assert f"process 1 ({socket.gethostname()})" in process_0.errors and message in process_0.errors
    assert len(process_0.errors.strip().splitlines()) == 1


def _slurm_environments(count):
    """Returns the environment variables that srun sets for each process on one node."""
    port = _free_port(61440)  # JAX derives the port from the job id
    shared = dict(SLURM_JOB_ID=str(port - 61440), SLURM_STEP_NODELIST="localhost")
    shared.update(SLURM_STEP_NUM_TASKS=str(count), SLURM_NTASKS=str(count))
    return [
        dict(**shared, SLURM_PROCID=str(index), SLURM_LOCALID=str(index)) for index in range(count)
    ]


@pytest.mark.slow
def test_slurm_processes_name_the_killed_process():
    calls = [["stop", "SIGTERM", 3], ["kill", 2, False]]
    results = _wait(_start([dict(join=[], calls=calls)] * 4, _slurm_environments(4)))
    assert len({result.values["last_call"] for result in results}) == 1
    assert [result.code for result in results] == [1, 1, -signal.SIGKILL, 1]
    for index in (0, 1, 3):
        errors = results[index].errors.strip()
        assert errors.startswith(f"process 2 ({socket.gethostname()})")
        assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_failed_collective_names_the_killed_process_without_traceback():
    process_0, process_1, process_2 = _wait(_start(_make_plans(3, calls=[["kill", 1, True]])))
    assert (process_0.code, process_1.code, process_2.code) == (1, -signal.SIGKILL, 1)
    for result in (process_0, process_2):
        assert "Traceback" not in result.output
        assert result.errors.startswith(f"process 1 ({socket.gethostname()})")


@pytest.mark.slow
def test_other_processes_end_when_process_0_is_killed():
    process_0, process_1 = _wait(_start(_make_plans(2, calls=[["kill", 0, False]])))
    assert (process_0.code, process_1.code) == (-signal.SIGKILL, 1)
    assert process_1.errors.splitlines()[-1].startswith("process 0 (localhost)")


@pytest.mark.slow
def test_all_processes_report_an_exception_of_process_0():
    results = _wait(_start(_make_plans(4, calls=[["fault", 0]])))
    assert [result.code for result in results] == [1] * 4
    assert "Traceback" in results[0].errors and "KeyError: 'labels'" in results[0].errors
    for result in results[1:]:
        assert f"process 0 ({socket.gethostname()})" in result.errors
        assert "KeyError: 'labels'" in result.errors and "Traceback" not in result.errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistake", "signal"])
def test_processes_that_fail_together_keep_their_own_exit_codes(kind):
    calls = [["leave", "SIGTERM"]] if kind == "signal" else [["mistake", 0]]
    plans = _make_plans(2, calls=calls)
    if kind == "mistake":
        plans[1]["calls"] = [["mistake", 1]]
    results = _wait(_start(plans))
    assert [result.code for result in results] == [143 if kind == "signal" else 2] * 2
    assert not any(re.search(r"process \d", result.errors) for result in results)


def test_single_process_joins_nothing_and_starts_no_thread():
    code = """
import threading
from mixer.parallel import join, processes, signals, watchdog
join.initialize()
with watchdog.watch() as watch, signals.catch() as stop_signal:
    watch.beat(1, "computing")
    assert not stop_signal.poll() and processes.agree(True) and processes.broadcast(3) == 3
    processes.check_shared("/nowhere")
    processes.say("alone")
    assert threading.active_count() == 1
from jax._src import xla_bridge
assert processes.state().client is None and not xla_bridge.backends_are_initialized()
"""
    # The environment of an interactive shell started by srun: one task in a job of four.
    job = dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")
    job.update(SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_TASKS="1")
    assert run_python("-c", code, **job).stdout == "alone\n"


# Joining.


def test_cluster_is_detected_from_environment_variables(monkeypatch):
    task = dict(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="4")
    tpu = dict(TPU_ML_PLATFORM="JAX")
    indexed = dict(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="0")
    slurm = dict(cluster_detection_method="slurm", num_processes=4)
    for environ, expected in (
        ({}, None),
        (task, slurm),
        ({**task, "SLURM_STEP_NUM_TASKS": "1"}, None),
        (dict(SLURM_PROCID="0", SLURM_NTASKS="4"), None),  # a batch script without srun
        (dict(OMPI_COMM_WORLD_SIZE="2"), dict(cluster_detection_method="ompi")),
        (dict(OMPI_COMM_WORLD_SIZE="1"), None),
        (tpu, {}),
        ({**tpu, "TPU_SKIP_MDS_QUERY": "1"}, None),
        ({**tpu, "JAX_PLATFORMS": "cpu"}, None),
        ({**tpu, "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({**tpu, "TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({**tpu, "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook
    ):
        assert join.cluster(environ) == expected, environ
    for spec, expected in ((None, None), ("spec", dict(cluster_detection_method="k8s"))):
        monkeypatch.setattr(join.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert join.cluster(indexed) == expected


def test_only_process_of_a_node_gets_all_its_gpus(monkeypatch):
    for name, value in dict(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="4").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **join: None)
    for tasks, expected in (
        *(("1(x4)", True), ("1", True), ("1,1", True)),
        *(("4", False), ("", False), ("11(x2)", False)),
    ):
        settings = {}
        monkeypatch.setattr(jax.config, "update", settings.__setitem__)
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
        join.initialize()
        assert (settings.get("jax_cuda_visible_devices") == "all") is expected, tasks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "--process_id"),
        ((None, None, 0), "--coordinator_address, --num_processes"),
        (("host", 2, 0), "--coordinator_address=host"),
        (("host:70000", 2, 0), "host:70000"),
        (("host:1", 0, 0), "--num_processes=0"),
        (("host:1", 2, 2), "--process_id=2.*--num_processes=2"),
        (("host:1", 2, -1), "--process_id=-1"),
    ],
)
def test_invalid_join_flags_are_one_line_errors(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        join.initialize(*arguments)
    assert "\n" not in str(error.value)


def _meet(calls, monkeypatch, secs=5.0):
    """Calls `join.meet` in parallel threads and returns the error message of each, or None."""
    monkeypatch.setattr(join, "JOIN_SECS", secs)
    address, results = f"localhost:{_free_port()}", [None] * len(calls)

    def call(index):
        try:
            join.meet(address, *calls[index])
        except UserError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_meet_or_all_report_the_reason(monkeypatch):
    assert _meet([(3, 0), (3, 1), (3, 2)], monkeypatch) == [None] * 3
    host = socket.gethostname()
    messages = _meet([(3, 0), (3, 1), (3, 1)], monkeypatch)
    assert all("--process_id=1" in message and host in message for message in messages)
    messages = _meet([(2, 0), (3, 1)], monkeypatch)
    pattern = rf"process 1 \({host}\).*--num_processes=3.*process 0 \({host}\).*\b2\b"
    assert all(re.search(pattern, message) for message in messages)
    messages = _meet([(4, 0), (4, 2)], monkeypatch, secs=0.5)
    assert all(re.search(r"\b2 of 4\b.*--process_id=1, 3", message) for message in messages)
    (error,) = _meet([(2, 1)], monkeypatch, secs=0.1)
    assert "process 0" in error and "Connection refused" in error
    with socket.create_server(("", 0)) as server:  # the port is in use, as with two processes 0
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"\b{port}\b.*--coordinator_address"):
            join.meet(f"localhost:{port}", 2, 0)


def test_meeting_tolerates_stray_connections_and_restarts(monkeypatch):
    monkeypatch.setattr(join, "JOIN_SECS", 5.0)
    port, results = _free_port(), []
    address = f"localhost:{port}"
    leader = threading.Thread(target=lambda: results.append(join.meet(address, 3, 0)))
    leader.start()
    for line in (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b""):
        connection = None
        while connection is None:
            with contextlib.suppress(ConnectionRefusedError):
                connection = socket.create_connection(("localhost", port))
        with connection:
            connection.sendall(line)
    with socket.create_connection(("localhost", port)) as connection:
        hello = dict(process=1, processes=3, host="a")  # process 1 dies here and is restarted below
        connection.sendall((json.dumps(hello) + "\n").encode())
    followers = [threading.Thread(target=join.meet, args=(address, 3, index)) for index in (1, 2)]
    for thread in followers:
        thread.start()
    for thread in (*followers, leader):
        thread.join()
    assert results == [None]


# Heartbeats and stalls, by a fake clock.


class _Client:
    """The part of the coordination service's key-value store that `Watch` needs."""

    def __init__(self):
        self.rows = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.rows and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.rows[key] = value

    def key_value_dir_get(self, directory):
        return [(key, text) for key, text in self.rows.items() if key.startswith(directory)]


class _Clock:
    secs = 0.0

    def __call__(self):
        return self.secs


def _watch(stall_secs=120):
    clock, lines = _Clock(), []
    return watchdog.Watch(stall_secs=stall_secs, tell=lines.append, clock=clock), clock, lines


def test_stall_is_reported_whenever_its_length_doubles():
    watch, clock, lines = _watch()
    for activity, secs, expected in (
        ("starting", 125, [r"starting.*125 s"]),
        ("compiling", 130, [r"compiling.*130 s"]),
        ("waiting for data", 119, []),
        ("waiting for data", 6, [r"125 s.*step 1\b.*waiting for data"]),
        ("waiting for data", 100, []),
        ("waiting for data", 20, [r"245 s.*step 1\b.*waiting for data"]),
        ("evaluating", 100, []),
        ("saving", 100, []),
        ("computing", 100, []),
        ("computing", 21, [r"121 s.*step 1\b.*computing"]),
    ):
        watch.beat(int(activity in ("computing", "waiting for data", "saving")), activity)
        clock.secs += secs
        watch.check()
        assert len(lines) == len(expected), (activity, secs)
        assert all(map(re.search, expected, lines)), lines
        lines.clear()
    for step in range(2, 10):  # steps of 100 s each
        for activity in ("waiting for data", "computing"):
            watch.beat(step, activity)
            clock.secs += 50
            watch.check()
    assert lines == []


def test_stall_reports_can_be_disabled():
    watch, clock, lines = _watch(stall_secs=None)
    clock.secs = 1e6
    watch.check()
    assert lines == []


def _states(*rows):
    return [
        dict(process=index, host=f"h{index}", step=step, doing=doing, secs=secs)
        for index, (step, doing, secs) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "pattern", "indices"),
    [
        (
            [(341, "computing", 119), (341, "computing", 119), (341, "waiting for data", 118)],
            r"120 s.*step 341.*process 2 \(h2\).*waiting for data.*118 s",
            "2",
        ),
        (
            [(341, "computing", 119), (339, "computing", 120), (341, "waiting for data", 3)],
            r"120 s.*step 341.*process 1 \(h1\).*computing.*120 s",
            "1",
        ),
        (
            [(341, "waiting for data", 119)] * 2 + [(341, "computing", 1)],
            r"120 s.*step 341.*process 0 \(h0\).*waiting for data.*119 s.*process 1 \(h1\)",
            "01",
        ),
        ([(341, "computing", 119)] * 2, r"120 s.*step 341.*computing.*119 s", ""),
        (
            [(341, "waiting for data", 119)] * 6 + [(342, "computing", 1)],
            r"process 3 \(h3\).*waiting for data.*119 s.*\b2\b",
            "0123",
        ),
        ([(341, "saving", 120)] * 2, r"saving.*120 s.*step 341", ""),
        (
            [(341, "evaluating", 120), (340, "computing", 130)],
            r"evaluating.*120 s.*step 341.*process 1 \(h1\).*computing.*130 s",
            "1",
        ),
    ],
)
def test_stall_report_names_the_processes_that_block_the_others(rows, pattern, indices):
    line = watchdog.stall_line(120, _states(*rows))
    assert re.search(pattern, line) and "\n" not in line
    assert "".join(re.findall(r"process (\d)", line)) == indices


def test_process_0_detects_starved_and_dead_processes(monkeypatch):
    client = _Client()
    state = types.SimpleNamespace(client=client, process_id=0, num_processes=3)
    monkeypatch.setattr(processes, "state", lambda: state)
    watch, clock, lines = _watch()
    failures = []
    monkeypatch.setattr(watch, "end", failures.append)
    # A process waits a second before it ends, in case that it fails too.
    monkeypatch.setattr(threading.Event, "wait", lambda event, timeout: event.is_set())

    def beat_others(*, dead_processes):
        for process in {1, 2} - dead_processes:
            row = dict(beats=clock.secs, host=f"h{process}", step=7, doing="computing", secs=1)
            if process == 2:
                row.update(doing="waiting for data", secs=clock.secs)
            client.rows[f"mixer/beat/{process}"] = json.dumps(row)
        watch.check()

    watch.beat(7, "computing")
    for _ in range(13):
        clock.secs += 10
        beat_others(dead_processes=set())
    (line,) = lines
    assert re.search(r"120 s.*step 7\b.*process 2 \(h2\).*waiting for data.*120 s", line)
    for _ in range(6):
        clock.secs += 10
        beat_others(dead_processes={1})
    assert not failures  # silence of 60 s is tolerated
    clock.secs += 5
    beat_others(dead_processes={1})
    assert failures[0]["process"] == 1 and "65 s" in failures[0]["reason"]

    # After a failed collective, 11 s of silence are enough.
    failures.clear(), client.rows.pop("mixer/failure/0")
    clock.secs += 5
    beat_others(dead_processes=set())
    clock.secs += 11
    beat_others(dead_processes={2})
    assert not failures
    client.rows["mixer/suspect/1"] = ""
    beat_others(dead_processes={2})
    assert failures[0]["process"] == 2


# metrics.jsonl in an object store.


class _Object:
    """An object in a store that cannot append."""

    contents: ClassVar[dict[str, str]] = {}

    def __init__(self, name):
        self._name = os.fspath(name)

    def __fspath__(self):
        return self._name

    def __truediv__(self, name):
        return _Object(f"{self._name}/{name}")

    def exists(self):
        return self._name in self.contents

    def is_dir(self):
        return False

    def read_text(self):
        return self.contents[self._name]

    def read_bytes(self):
        return self.contents[self._name].encode()

    def write_text(self, text):
        self.contents[self._name] = text


def test_metrics_file_in_an_object_store_is_rewritten_on_close(monkeypatch):
    for module in (metrics, files, run_files):
        monkeypatch.setattr(module, "epath", types.SimpleNamespace(Path=_Object))
    old_text = '{"step": 1, "a": 2.0}\n{"step": 9, "a": 3.0}\n'
    monkeypatch.setattr(_Object, "contents", {"gs://bucket/run/metrics.jsonl": old_text})
    writer = metrics.MetricWriter("gs://bucket/run", last_step=3, tensorboard=False)
    writer.write(4, {"a": 1})
    writer.close()
    ((name, text),) = _Object.contents.items()
    assert name == "gs://bucket/run/metrics.jsonl"
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 4]
