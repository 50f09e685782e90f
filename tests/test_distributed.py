"""Several processes, real ones where it counts: joining, agreement, signals, failures, stalls."""

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

# One process of several; its plan is JSON: how it joins, and what it does one after the other.
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

def show(**what):
    print(json.dumps(what), flush=True)

def talk():
    config = dict(devices=jax.device_count(), local=jax.local_device_count())
    show(**config, main=processes.is_main(), index=jax.process_index())
    processes.say(json.dumps({"said": index}))
    show(broadcast=processes.broadcast({"rows": [index, "x" * 5_000_000]})["rows"][0])
    show(again=processes.broadcast(index), gather=processes.gather(index))
    show(agree=[processes.agree(True), processes.agree(index != 1)])
    processes.check_shared(plan["shared"])
    try:
        processes.check_shared(os.path.join(plan["shared"], str(index)))
    except UserError as error:
        show(refused=str(error))
    show(left=sum(map(len, (files for *_, files in os.walk(plan["shared"])))))

def record():
    # Process 0 alone finds the record, and keeps what is not after step 2.
    writer = metrics.MetricWriter(
        os.path.join(plan["shared"], str(index)), last_step=2, tensorboard=False)
    writer.write(3, {"val/top1": 0.25})
    writer.close()
    show(rows=writer.rows, files=sorted(os.listdir(os.path.join(plan["shared"], str(index)))))

def stop(name, on):
    # Without collectives, so that nothing but the agreement keeps the processes together.
    with signals.catch() as caught:
        for call in range(1, 20_000):
            if index == on and call == 15:
                os.kill(os.getpid(), getattr(signal, name))
            assert not caught
            if caught.poll():
                break
            time.sleep(0.003 * (index + 1))
        show(stopped=call, name=caught.name, agreed=bool(caught), still=caught.poll())

def finish():
    # A signal when another process has done its last poll: none stops, none waits for another.
    with signals.catch() as caught:
        for call in range(30):
            if index == 0 and call == 20:
                processes.barrier("left")
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)  # the others' counts are asked for
            assert not caught.poll()
    if index == 1:
        processes.barrier("left")
    show(finished=True)

def collective():
    from jax.experimental import multihost_utils
    return multihost_utils.process_allgather(jax.numpy.ones(3)).sum()

def mistake(on):
    if index == on:
        time.sleep(0.5)
        raise UserError("data_dir=/nowhere: no such directory")
    collective()  # hangs, or loses its connection
    time.sleep(100)

def fault(on):
    if index == on:
        raise KeyError("labels")
    time.sleep(100)

def killed(on, working):
    collective()
    if index == on:
        os.kill(os.getpid(), signal.SIGKILL)
    while working:
        collective()
    time.sleep(100)

def leave(name):
    raise signals.Stopped(getattr(signal, name))

def main(argv):
    global index
    join.initialize(*plan["join"])
    index = processes.state().process_id
    with watchdog.watch() as watching:
        for name, *arguments in plan["do"]:
            globals()[name](*arguments)

sys.argv = ["worker.py"]
cli.run(main)
"""


def _free_port(low=1):
    """A port from `low` on that nobody has now."""
    for port in [0] if low == 1 else range(low, 65536):
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError:
                continue
            return free.getsockname()[1]


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


def _by_flags(count, **plan):
    address = f"localhost:{_free_port()}"
    return [dict(join=[address, count, index], **plan) for index in range(count)]


def _end(workers):
    """Of each process its exit code, what it has shown merged in one dict, and its errors."""
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    results = []
    for worker, (out, errors) in zip(workers, outputs, strict=True):
        shown, lines = {}, []
        for line in out.splitlines():
            if line.startswith("{"):
                shown.update(json.loads(line))
            else:
                lines.append(line)
        results.append(
            types.SimpleNamespace(
                code=worker.returncode, shown=shown, lines=lines, errors=errors, all=out + errors
            )
        )
    return results


# Real processes.


def test_two_processes_agree_stop_together_and_end_with_the_reason(tmp_path):
    for index in range(2):
        (tmp_path / str(index)).mkdir()
    rows = [{"step": step, "val/top1": step / 10} for step in (1, 2, 3)]
    (tmp_path / "0" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    # Each sees a directory of its own under RUN/0 or RUN/1.
    do = [["talk"], ["record"], ["stop", "SIGTERM", 1], ["stop", "SIGINT", 1], ["finish"]]
    do += [["mistake", 1]]
    first, second = _end(_start(_by_flags(2, shared=str(tmp_path), do=do), devices=2))
    one, two = first.shown, second.shown
    for index, shown in enumerate((one, two)):
        assert (shown["devices"], shown["local"], shown["index"]) == (4, 2, index), first.all
        assert (shown["broadcast"], shown["again"], shown["gather"]) == (0, 0, [0, 1])
        assert shown["agree"] == [True, False]
        assert "process 1 (" in shown["refused"] and "process 0 (" not in shown["refused"]
        assert shown["left"] == 1  # the record
        assert shown["rows"] == [*rows[:2], {"step": 3, "val/top1": 0.25}]
    assert (one["main"], two["main"]) == (True, False)
    assert one["said"] == 0 and "said" not in two
    assert (one["files"], two["files"]) == (["metrics.jsonl"], [])

    # Both at the same call, though one makes twice as many in the same time; the last one shown.
    for shown in (one, two):
        assert (shown["stopped"], shown["name"]) == (one["stopped"], "SIGINT"), (one, two)
        assert shown["agreed"] and shown["still"] and shown["finished"]
    assert one["stopped"] > 15
    for name in ("SIGTERM", "SIGINT"):
        assert any(line.startswith(f"{name} on process 1 (") for line in first.lines), first.lines
    assert not second.lines

    message = "data_dir=/nowhere: no such directory"
    assert (second.code, second.errors.strip()) == (2, f"worker.py: {message}")
    assert first.code == 1
    assert f"process 1 ({socket.gethostname()})" in first.errors and message in first.errors
    assert len(first.errors.strip().splitlines()) == 1


def _slurm(count):
    """What srun sets, on one node."""
    port = _free_port(61440)  # JAX derives it from the job's number
    shared = dict(SLURM_JOB_ID=str(port - 61440), SLURM_STEP_NODELIST="localhost")
    shared.update(SLURM_STEP_NUM_TASKS=str(count), SLURM_NTASKS=str(count))
    return [
        dict(**shared, SLURM_PROCID=str(index), SLURM_LOCALID=str(index)) for index in range(count)
    ]


@pytest.mark.slow
def test_four_processes_of_slurm_end_naming_the_one_that_was_killed():
    do = [["stop", "SIGTERM", 3], ["killed", 2, False]]
    results = _end(_start([dict(join=[], do=do)] * 4, _slurm(4)))
    assert len({result.shown["stopped"] for result in results}) == 1
    assert [result.code for result in results] == [1, 1, -signal.SIGKILL, 1]
    for index in (0, 1, 3):
        errors = results[index].errors.strip()
        assert errors.startswith(f"process 2 ({socket.gethostname()})")
        assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_lost_connection_is_no_traceback_and_names_the_process_that_was_killed():
    first, second, third = _end(_start(_by_flags(3, do=[["killed", 1, True]])))
    assert (first.code, second.code, third.code) == (1, -signal.SIGKILL, 1)
    for result in (first, third):
        assert "Traceback" not in result.all
        assert result.errors.startswith(f"process 1 ({socket.gethostname()})")


@pytest.mark.slow
def test_killed_process_0_ends_the_others_naming_it():
    first, second = _end(_start(_by_flags(2, do=[["killed", 0, False]])))
    assert (first.code, second.code) == (-signal.SIGKILL, 1)
    assert second.errors.splitlines()[-1].startswith("process 0 (localhost)")


@pytest.mark.slow
def test_fault_of_process_0_is_heard_by_all_before_its_service_ends():
    results = _end(_start(_by_flags(4, do=[["fault", 0]])))
    assert [result.code for result in results] == [1] * 4
    assert "Traceback" in results[0].errors and "KeyError: 'labels'" in results[0].errors
    for result in results[1:]:
        assert f"process 0 ({socket.gethostname()})" in result.errors
        assert "KeyError: 'labels'" in result.errors and "Traceback" not in result.errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistake of all", "stopped"])
def test_all_end_by_themselves_with_their_own_code(kind):
    do = [["leave", "SIGTERM"]] if kind == "stopped" else [["mistake", index] for index in (0,)]
    plans = _by_flags(2, do=do)
    if kind != "stopped":
        plans[1]["do"] = [["mistake", 1]]
    results = _end(_start(plans))
    assert [result.code for result in results] == [143 if kind == "stopped" else 2] * 2
    assert not any(re.search(r"process \d", result.errors) for result in results)


def test_laptop_joins_nothing_and_starts_no_thread():
    code = """
import threading
from mixer.parallel import join, processes, signals, watchdog
join.initialize()
with watchdog.watch() as watching, signals.catch() as caught:
    watching.beat(1, "computing")
    assert not caught.poll() and processes.agree(True) and processes.broadcast(3) == 3
    processes.check_shared("/nowhere")
    processes.say("alone")
    assert threading.active_count() == 1
from jax._src import xla_bridge
assert processes.state().client is None and not xla_bridge.backends_are_initialized()
"""
    # In an interactive shell that srun has started: one task, of a job of four.
    job = dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")
    job.update(SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_TASKS="1")
    assert run_python("-c", code, **job).stdout == "alone\n"


# Who is there.


def test_cluster_is_known_by_its_variables(monkeypatch):
    task = dict(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="4")
    tpu = dict(TPU_ML_PLATFORM="JAX")
    indexed = dict(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="0")
    slurm = dict(cluster_detection_method="slurm", num_processes=4)
    for environ, expected in (
        ({}, None),
        (task, slurm),
        ({**task, "SLURM_STEP_NUM_TASKS": "1"}, None),
        (dict(SLURM_PROCID="0", SLURM_NTASKS="4"), None),  # a batch script, outside of srun
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
    for spec, expected in ((None, None), ("found", dict(cluster_detection_method="k8s"))):
        monkeypatch.setattr(join.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert join.cluster(indexed) == expected


def test_gpus_of_a_node_go_to_its_only_process(monkeypatch):
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
def test_wrong_flags_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        join.initialize(*arguments)
    assert "\n" not in str(caught.value)


def _meet(calls, monkeypatch, secs=5.0):
    """What each of the calls (port is filled in) has raised, as text, or None."""
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


def test_processes_meet_or_all_hear_why_not(monkeypatch):
    assert _meet([(3, 0), (3, 1), (3, 2)], monkeypatch) == [None] * 3
    host = socket.gethostname()
    twice = _meet([(3, 0), (3, 1), (3, 1)], monkeypatch)
    assert all("--process_id=1" in each and host in each for each in twice)
    other = _meet([(2, 0), (3, 1)], monkeypatch)
    pattern = rf"process 1 \({host}\).*--num_processes=3.*process 0 \({host}\).*\b2\b"
    assert all(re.search(pattern, each) for each in other)
    late = _meet([(4, 0), (4, 2)], monkeypatch, secs=0.5)
    assert all(re.search(r"\b2 of 4\b.*--process_id=1, 3", each) for each in late)
    (alone,) = _meet([(2, 1)], monkeypatch, secs=0.1)
    assert "process 0" in alone and "Connection refused" in alone
    with socket.create_server(("", 0)) as server:  # two processes 0 on one host
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"\b{port}\b.*--coordinator_address"):
            join.meet(f"localhost:{port}", 2, 0)


def test_strangers_at_the_door_and_restarted_processes_do_no_harm(monkeypatch):
    monkeypatch.setattr(join, "JOIN_SECS", 5.0)
    port, done = _free_port(), []
    address = f"localhost:{port}"
    main = threading.Thread(target=lambda: done.append(join.meet(address, 3, 0)))
    main.start()
    for line in (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b""):
        connection = None
        while connection is None:
            with contextlib.suppress(ConnectionRefusedError):
                connection = socket.create_connection(("localhost", port))
        with connection:
            connection.sendall(line)
    with socket.create_connection(("localhost", port)) as connection:
        hello = dict(process=1, processes=3, host="a")  # dies, and comes again
        connection.sendall((json.dumps(hello) + "\n").encode())
    others = [threading.Thread(target=join.meet, args=(address, 3, index)) for index in (1, 2)]
    for each in others:
        each.start()
    for each in (*others, main):
        each.join()
    assert done == [None]


# Signs of life and stalls, by a clock of our own.


class _Client:
    """The coordination service's store, as far as `Watch` needs it."""

    def __init__(self):
        self.rows = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.rows and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.rows[key] = value

    def key_value_dir_get(self, directory):
        return [(key, text) for key, text in self.rows.items() if key.startswith(directory)]


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def _watch(stall_secs=120):
    clock, lines = _Clock(), []
    return watchdog.Watch(stall_secs=stall_secs, tell=lines.append, clock=clock), clock, lines


def test_stall_of_one_process_is_told_at_each_doubling():
    watching, clock, lines = _watch()
    for doing, secs, expected in (
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
        watching.beat(int(doing in ("computing", "waiting for data", "saving")), doing)
        clock.now += secs
        watching.check()
        assert len(lines) == len(expected), (doing, secs)
        assert all(map(re.search, expected, lines)), lines
        lines.clear()
    for step in range(2, 10):  # steps of 100 s each
        for doing in ("waiting for data", "computing"):
            watching.beat(step, doing)
            clock.now += 50
            watching.check()
    assert lines == []


def test_no_stall_is_told_where_none_is_wanted():
    watching, clock, lines = _watch(stall_secs=None)
    clock.now = 1e6
    watching.check()
    assert lines == []


def _states(*rows):
    return [
        dict(process=index, host=f"h{index}", step=step, doing=doing, secs=secs)
        for index, (step, doing, secs) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("rows", "pattern", "named"),
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
def test_stall_line_names_who_keeps_the_others_waiting(rows, pattern, named):
    line = watchdog.stall_line(120, _states(*rows))
    assert re.search(pattern, line) and "\n" not in line
    assert "".join(re.findall(r"process (\d)", line)) == named


def test_process_0_finds_the_starved_and_the_dead(monkeypatch):
    client = _Client()
    this = types.SimpleNamespace(client=client, process_id=0, num_processes=3)
    monkeypatch.setattr(processes, "state", lambda: this)
    watching, clock, lines = _watch()
    ended = []
    monkeypatch.setattr(watching, "end", ended.append)

    def others(*, dead):
        for process in {1, 2} - dead:
            row = dict(beats=clock.now, host=f"h{process}", step=7, doing="computing", secs=1)
            if process == 2:
                row.update(doing="waiting for data", secs=clock.now)
            client.rows[f"mixer/beat/{process}"] = json.dumps(row)
        watching.check()

    watching.beat(7, "computing")
    for _ in range(13):
        clock.now += 10
        others(dead=set())
    (line,) = lines
    assert re.search(r"120 s.*step 7\b.*process 2 \(h2\).*waiting for data.*120 s", line)
    for _ in range(6):
        clock.now += 10
        others(dead={1})
    assert not ended  # 60 s are not too long
    clock.now += 5
    others(dead={1})
    assert ended[0]["process"] == 1 and "65 s" in ended[0]["reason"]

    # Where a collective has failed, a silence of 11 s is enough.
    ended.clear(), client.rows.pop("mixer/failure/0")
    clock.now += 5
    others(dead=set())
    clock.now += 11
    others(dead={2})
    assert not ended
    client.rows["mixer/suspect/1"] = ""
    others(dead={2})
    assert ended[0]["process"] == 2


# The record.


class _Object:
    """An object of a store, which knows no appending."""

    stored: ClassVar[dict[str, str]] = {}

    def __init__(self, name):
        self._name = os.fspath(name)

    def __fspath__(self):
        return self._name

    def __truediv__(self, name):
        return _Object(f"{self._name}/{name}")

    def exists(self):
        return self._name in self.stored

    def is_dir(self):
        return False

    def read_text(self):
        return self.stored[self._name]

    def read_bytes(self):
        return self.stored[self._name].encode()

    def write_text(self, text):
        self.stored[self._name] = text


def test_record_in_an_object_store_is_written_whole(monkeypatch):
    for module in (metrics, files, run_files):
        monkeypatch.setattr(module, "epath", types.SimpleNamespace(Path=_Object))
    old = '{"step": 1, "a": 2.0}\n{"step": 9, "a": 3.0}\n'
    monkeypatch.setattr(_Object, "stored", {"gs://bucket/run/metrics.jsonl": old})
    writer = metrics.MetricWriter("gs://bucket/run", last_step=3, tensorboard=False)
    writer.write(4, {"a": 1})
    writer.close()
    ((name, text),) = _Object.stored.items()
    assert name == "gs://bucket/run/metrics.jsonl"
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 4]
