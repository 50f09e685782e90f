"""Several processes of one run: how they find each other, agree, tell stalls and end together.

JAX's coordination service, which process 0 hosts, carries all of it in its key-value store: small
texts that need no device. So a process can be heard although its devices wait for another one.
"""

import atexit
import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mixer.errors import UserError, check_number, first_line, line_of

JOIN_SECS = 300.0  # for all processes to come: the hosts of a pod start minutes apart
TELL_SECS = 20.0  # between lines that say for whom a process waits
TALK_SECS = 3600.0  # at a barrier, where one may still prepare data; `watch` finds the dead sooner
SHARE_SECS = 15.0  # until all hosts see a new file: caches of network file systems
BEAT_SECS = 2.0  # between signs of life
LOST_SECS = 60.0  # without one, a process counts as gone: JAX itself would wait 100 s
SUSPECT_SECS = 10.0  # the same, where a collective has failed already
LEAVE_SECS = 10.0  # for the others to read why a run ends

# What takes its time without being a stall.
QUIET = ("starting", "compiling", "evaluating", "saving")

_watches: list["Watch"] = []  # the one that stands around the run
_counts: dict[str, Iterator[int]] = {}
_exit_codes: list[int] = []  # of this process, once it has printed why it ends
_abort_handlers: list[Any] = []  # libc keeps no reference to them


def state() -> Any:
    """JAX's coordination client, process_id and num_processes, which it shows nowhere publicly."""
    return jax._src.distributed.global_state


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the run's processes; to be called before JAX computes anything.

    Without arguments it does so where a launcher has started several processes (Cloud TPU, Slurm,
    Open MPI, an indexed Kubernetes job), and nothing elsewhere.

    Args:
      coordinator_address: HOST:PORT of process 0, with a free port, as the others reach it.
      num_processes: of the run.
      process_id: this one's, from 0.

    Raises:
      UserError: some of the arguments are missing or wrong, or the processes do not come together.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if state().client is not None:
        return  # joined already, by an earlier run of this program
    if 0 < len(missing) < 3:
        raise UserError(f"{', '.join(given)} belong together; missing: {', '.join(missing)}")
    if missing:
        join = cluster(os.environ)
        if join is None:
            return
    else:
        check_place(coordinator_address, num_processes, process_id)
        if num_processes == 1:
            return
        meet(coordinator_address, num_processes, process_id)
        join = dict(
            coordinator_address=coordinator_address,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Programs with collectives that a CPU runs side by side can meet the wrong ones of the others,
    # and all wait for ever. Accelerators run one after the other anyway.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Its notifier would swallow SIGTERM, and Orbax asks it with step numbers of its own, which
    # would spoil the count of `signals.Signals.poll`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        _interruptibly(jax.distributed.initialize, **join, initialization_timeout=int(JOIN_SECS))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"the processes of this run were not joined: {first_line(error)}; the launcher's "
            f"place can be taken by {', '.join(given)}, all three"
        ) from error
    if _one_process_per_node(os.environ):
        # JAX takes one GPU per process under Slurm, also where a process is alone on its node.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def _interruptibly(function: Callable[..., None], **kwargs: Any) -> None:
    """Calls it in a thread: a signal is handled at once although it waits outside of Python."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function(**kwargs)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="join", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def cluster(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize` under a launcher of several processes, else None.

    Looks at variables alone, and only at those that a launcher sets for each process: a shell
    inside of a Slurm job, a notebook on a pod or a laptop have none and start at once.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return dict(
            cluster_detection_method="slurm",
            num_processes=int(environ["SLURM_STEP_NUM_TASKS"]),
        )
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return dict(cluster_detection_method="ompi")
    # JAX sets the first where it has found TPU chips and their library.
    if environ.get("TPU_ML_PLATFORM") == "JAX" and environ.get("JAX_PLATFORMS") != "cpu":
        names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
        if names is None:  # a Cloud TPU VM, whose metadata JAX asks for the other hosts
            return None if "TPU_SKIP_MDS_QUERY" in environ else {}
        several = "," in names or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
        return {} if several else None
    in_job = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    if in_job and importlib.util.find_spec("kubernetes"):
        return dict(cluster_detection_method="k8s")
    return None


def _one_process_per_node(environ: Mapping[str, str]) -> bool:
    """Whether Slurm has started one process on each node: 1(x4), or 1,1 in older versions."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return bool(re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", tasks))


def check_place(address: str, num_processes: int, process_id: int) -> None:
    """Raises UserError where the three flags cannot be those of a process."""
    if not re.fullmatch(r".+:[0-9]+", address) or not 0 < int(address.rpartition(":")[2]) < 65536:
        raise UserError(f"--coordinator_address={address}: it must be HOST:PORT")
    check_number("--num_processes", num_processes, least=1, whole=True)
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}: with --num_processes={num_processes} it must be from 0 to "
            f"{num_processes - 1}"
        )


def meet(address: str, num_processes: int, process_id: int) -> None:
    """Waits until every process is there, once, at the port that JAX's service will take.

    JAX's own start ends the program without a clear word where one is missing or is there twice.

    Raises:
      UserError: it is so, or one of them has failed; on every process that has come.
    """
    host, _, port = address.rpartition(":")
    if process_id == 0:
        _receive(int(port), num_processes)
    else:
        _report((host.strip("[]"), int(port)), num_processes, process_id)


def tell_failure(address: str, num_processes: int, process_id: int, reason: str) -> None:
    """Tells the others that this process ends before it has met them, where they listen.

    They may start a little later: for `LEAVE_SECS` they are waited for.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or num_processes < 2:
        return
    deadline = time.monotonic() + LEAVE_SECS
    hello = _hello(num_processes, process_id) | {"failed": reason}
    with contextlib.suppress(OSError):
        if process_id:
            peer = _connect((host.strip("[]"), int(port)), deadline)
            with peer:
                peer.settimeout(LEAVE_SECS)
                peer.sendall(_line(hello))
                peer.recv(1)  # process 0 has heard it
            return
        with _open_port(int(port)) as server:
            _refuse(server, num_processes - 1, f"{process_name(process_id)} failed: {reason}")


def _refuse(server: socket.socket, count: int, problem: str) -> None:
    """Tells it to `count` processes that are still to come, for `LEAVE_SECS` at most."""
    deadline = time.monotonic() + LEAVE_SECS
    for _ in range(count):
        with contextlib.suppress(OSError):
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            peer, _ = server.accept()
            with peer:
                peer.settimeout(5)
                peer.makefile().readline()
                peer.sendall(_line({"problem": problem}))
                peer.recv(1)


def _hello(num_processes: int, process_id: int) -> dict[str, Any]:
    return dict(process=process_id, processes=num_processes, host=socket.gethostname())


def _line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _open_port(port: int) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    both = family == socket.AF_INET6
    return socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _connect(address: tuple[str, int], deadline: float) -> socket.socket:
    """Connects as soon as process 0 listens; OSError after `deadline`."""
    while True:
        try:
            return socket.create_connection(address, timeout=5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _receive(port: int, num_processes: int) -> None:
    """Process 0's side: hears who comes, and answers all at once."""
    try:
        server = _open_port(port)
    except OSError as error:
        raise UserError(
            f"port {port} of --coordinator_address cannot be had: {error.strerror}; another "
            "program has it, or another process with --process_id=0"
        ) from None
    deadline = time.monotonic() + JOIN_SECS
    there: dict[int, tuple[str, socket.socket]] = {}
    gone: dict[int, float] = {}  # of those who left again: since when
    problem = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        stack.enter_context(
            _telling(lambda: f"{len(there) + 1} of {num_processes} processes are at port {port}")
        )
        while problem is None:
            # One that has said who it is may be gone since, and come again.
            if len(there) == num_processes - 1 and not any(map(_is_closed, _peers(there))):
                break
            server.settimeout(min(max(deadline - time.monotonic(), 0.001), BEAT_SECS))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                if problem := _left(there, gone):
                    break
                if time.monotonic() < deadline:
                    continue
                missing = sorted({*range(1, num_processes)} - there.keys())
                problem = (
                    f"after {JOIN_SECS:.0f} s {len(there) + 1} of {num_processes} processes are "
                    f"there; missing: --process_id={', '.join(map(str, missing))}"
                )
                break
            stack.enter_context(peer)
            peer.settimeout(5)
            try:
                hello = json.loads(peer.makefile().readline())
                index, count, name = hello["process"], hello["processes"], hello["host"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # no process of ours
            if count != num_processes:
                problem = (
                    f"process {index} ({name}) has --num_processes={count}, process 0 "
                    f"({socket.gethostname()}) has {num_processes}"
                )
            elif "failed" in hello:
                problem = f"{_name(index, name)} failed: {hello['failed']}"
            elif index in there and not _is_closed(there[index][1]):
                problem = f"two processes have --process_id={index}: {there[index][0]} and {name}"
            there[index if problem is None else -1] = name, peer
        for peer in _peers(there):
            with contextlib.suppress(OSError):
                peer.sendall(_line({"problem": problem}))
                peer.recv(1)  # the other side closes first, so that the port is free at once
        if problem and time.monotonic() < deadline:
            _refuse(server, num_processes - 1 - len(there), problem)
    if problem:
        raise UserError(problem)


def _peers(there: Mapping[int, tuple[str, socket.socket]]) -> list[socket.socket]:
    return [peer for _, peer in there.values()]


def _left(there: Mapping[int, tuple[str, socket.socket]], gone: dict[int, float]) -> str | None:
    """What is wrong where a process has left, and was not restarted within `LEAVE_SECS`."""
    now = time.monotonic()
    for index, (name, peer) in there.items():
        if not _is_closed(peer):
            gone.pop(index, None)
        elif now - gone.setdefault(index, now) >= LEAVE_SECS:
            return f"{_name(index, name)} left before all processes had come"
    return None


@contextlib.contextmanager
def _telling(line: Callable[[], str]) -> Iterator[None]:
    """Prints `line()` now and then while the block lasts."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(TELL_SECS):
            print(f"waiting, {JOIN_SECS:.0f} s at most: {line()}", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _is_closed(peer: socket.socket) -> bool:
    """Whether the other side is gone, as a process is that was restarted."""
    try:
        return bool(select.select([peer], [], [], 0)[0]) and peer.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True


def _report(address: tuple[str, int], num_processes: int, process_id: int) -> None:
    """The other processes' side: says who is here, and waits for the answer."""
    where = "--coordinator_address={}:{}".format(*address)
    deadline = time.monotonic() + JOIN_SECS
    with _telling(lambda: f"process {process_id} waits for process 0, {where}"):
        try:
            peer = _connect(address, deadline)
        except OSError as error:
            raise UserError(
                f"{where}: process 0 did not answer in {JOIN_SECS:.0f} s "
                f"({error.strerror or error})"
            ) from None
    with peer:
        peer.settimeout(JOIN_SECS + 10)
        try:
            peer.sendall(_line(_hello(num_processes, process_id)))
            line = peer.makefile().readline()
            problem = json.loads(line)["problem"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{where}: process 0 left before the run began, or another program answers there"
            ) from None
    if problem:
        raise UserError(problem)


# Who says what.


def is_main() -> bool:
    """Whether this is process 0, which writes what the run leaves behind."""
    return state().num_processes == 1 or jax.process_index() == 0


def process_name(process_id: int | None = None) -> str:
    """Such as "process 3 (tpu-w-3)": this one, whose number may not be known to JAX yet."""
    process_id = state().process_id if process_id is None else process_id
    return _name(process_id, socket.gethostname())


def _name(process: int, host: str) -> str:
    return f"process {process} ({host})"


def say(line: str) -> None:
    """Prints a line, on process 0 only."""
    if is_main():
        print(line, flush=True)


# Agreement. All processes call these in the same order.


def _next(what: str) -> str:
    """A key that the same call has on all processes and no other call has."""
    return f"mixer/{what}/{next(_counts.setdefault(what, itertools.count()))}"


def barrier(name: str) -> None:
    """Waits for all processes; `name` is told where they do not come."""
    if state().num_processes > 1:
        state().client.wait_at_barrier(_next(f"barrier/{name}"), int(TALK_SECS * 1000))


def broadcast(value: Any) -> Any:
    """Process 0's value, which JSON can hold, on all; what the others pass does not count."""
    if state().num_processes == 1:
        return value
    client, key = state().client, _next("broadcast")
    if is_main():
        client.key_value_set(key, json.dumps(value))
    value = json.loads(client.blocking_key_value_get(key, int(TALK_SECS * 1000)))
    barrier("broadcast")
    if is_main():
        client.key_value_delete(key)
    return value


def gather(value: Any) -> list[Any]:
    """The values of all processes, which JSON can hold, in their order, on all."""
    this = state()
    if this.num_processes == 1:
        return [value]
    key = _next("gather")
    this.client.key_value_set(f"{key}/{this.process_id}", json.dumps(value))
    barrier("gather")
    rows = dict(this.client.key_value_dir_get(f"{key}/"))
    barrier("gathered")
    this.client.key_value_delete(f"{key}/{this.process_id}")
    return [json.loads(rows[f"{key}/{index}"]) for index in range(this.num_processes)]


def agree(ok: bool) -> bool:
    """Whether it is so on every process."""
    return all(gather(bool(ok)))


def check_shared(directory: epath.PathLike) -> None:
    """Finds out whether all processes see the same directory.

    Raises:
      UserError: process 0 cannot write there, or others do not see what it has written.
    """
    if state().num_processes == 1:
        return
    directory = epath.Path(directory)
    token, problem = directory / f".seen_by_all.{secrets.token_hex(8)}", None
    if is_main():
        try:
            token.write_text(process_name())
        except OSError as error:
            problem = error.strerror or str(error)
    name, problem = broadcast([token.name, problem])
    if problem:
        raise UserError(f"{directory}: process 0 cannot write there: {problem}")
    deadline = time.monotonic() + SHARE_SECS
    while not (seen := (directory / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [who for who, sees in gather([process_name(), seen]) if not sees]
    if is_main():
        token.unlink(missing_ok=True)
    barrier("directory")
    if blind:
        raise UserError(
            f"{directory} is not the same directory for all processes: {', '.join(blind[:4])}"
            f"{' and others' * (len(blind) > 4)} {'do' if len(blind) > 1 else 'does'} not see what "
            "process 0 writes there; it must be on a file system that all share, or gs://"
        )


# Watching over the run.


class Watch:
    """What each process does and since when; made by `watch`."""

    def __init__(
        self, *, stall_secs: float | None, tell: Callable[[str], None], clock: Callable[[], float]
    ):
        self._stall_secs, self._tell, self._clock = stall_secs, tell, clock
        now = clock()
        self._step, self._doing, self._since = 0, "starting", now
        self._progress, self._alarm = now, stall_secs
        self._beats = 0
        self._heard: dict[int, tuple[int, float]] = {}  # of each process: its count, and when
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def beat(self, step: int, doing: str) -> None:
        """Notes what begins now: "computing" step 341, or "waiting for data" of it.

        Args:
          step: the step that is worked on, or for `QUIET` matters the last one done.
          doing: "waiting for data", "computing", one of QUIET, or "leaving", where nothing is due.
        """
        now = self._clock()
        if (step, doing) == (self._step, self._doing):
            return
        if step != self._step or doing in QUIET or self._doing in QUIET:
            self._progress, self._alarm = now, self._stall_secs
        self._step, self._doing, self._since = step, doing, now

    def check(self) -> None:
        """One round of the thread: a sign of life, the others' signs, the stall."""
        now = self._clock()
        if state().num_processes > 1:
            self._publish(now)
            failure = _failure()
            if failure is None and state().process_id == 0:
                self._find_lost(now)
                failure = _failure()
            # Where this process fails too, its main thread tells its own reason.
            if failure is not None and not self._leaving.wait(1):
                self.end(failure)
        quiet = self._doing == "leaving"
        if (
            state().process_id == 0
            and self._alarm
            and not quiet
            and now - self._progress >= self._alarm
        ):
            self._alarm *= 2
            self._tell(stall_line(now - self._progress, self._states(now)))

    def start(self) -> None:
        """Starts the thread, where it has something to do."""
        if state().num_processes > 1:
            self._publish(self._clock())  # now: who gives no first sign is not missed
        if state().num_processes > 1 or self._stall_secs:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._leaving.set()
        if self._thread.ident:
            self._thread.join(5)
        if state().num_processes > 1:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                state().client.key_value_delete(f"mixer/beat/{state().process_id}")

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends; ends it where another's end is the cause."""
        this = state()
        if _is_lost_connection(error):
            # The thread ends this process as soon as process 0 has found out who is gone.
            this.client.key_value_set(f"mixer/suspect/{this.process_id}", "", True)
            time.sleep(2 * SUSPECT_SECS)
        self._leaving.set()
        reason = line_of(error) or _brief(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone
            _publish_failure(this.process_id, socket.gethostname(), f"failed: {reason}")
        # JAX would wait at exit for the others, and for computations that they take part in.
        code = _exit_code(error)
        atexit.register(self.leave, code)
        late = threading.Timer(2 * LEAVE_SECS, _leave, [code])
        late.daemon = True
        late.start()

    def leave(self, code: int) -> None:
        """Ends this process, which has printed its reason; process 0 waits for the others.

        Process 0 hosts the coordination service. JAX aborts every process that is alive when the
        service disappears, so the others acknowledge only after they have printed their own line.
        """
        _exit_codes.append(code)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._acknowledge()
        _leave(code)

    def end(self, failure: Mapping[str, Any]) -> None:
        """Ends this process, whatever its main thread waits for, because of another's failure."""
        who = _name(failure["process"], failure["host"])
        _write(f"{who} {failure['reason']}")
        _exit_codes.append(1)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._acknowledge(failure["process"])
        _leave(1)

    def _acknowledge(self, failed: int | None = None) -> None:
        """Says that this process knows; process 0, who hosts the service, stays until all do."""
        this = state()
        this.client.key_value_set(f"mixer/ended/{this.process_id}", "", True)
        if this.process_id == 0:
            deadline = time.monotonic() + LEAVE_SECS
            wanted = {*range(this.num_processes)} - {failed}
            while not wanted <= _rows("mixer/ended").keys() and time.monotonic() < deadline:
                time.sleep(0.1)

    def _run(self) -> None:
        while not self._leaving.wait(BEAT_SECS):
            # Where the service does not answer, process 0 is gone, and JAX ends this one.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.check()

    def _publish(self, now: float) -> None:
        self._beats += 1
        row = dict(
            **dict(beats=self._beats, host=socket.gethostname(), step=self._step),
            **dict(doing=self._doing, secs=now - self._since),
        )
        state().client.key_value_set(f"mixer/beat/{state().process_id}", json.dumps(row), True)

    def _find_lost(self, now: float) -> None:
        """Publishes as failed the process that has given no sign of life for too long."""
        limit = SUSPECT_SECS if _rows("mixer/suspect") else LOST_SECS
        for process, row in _rows("mixer/beat").items():
            beats = row["beats"]
            if self._heard.get(process, (None, 0))[0] != beats:
                self._heard[process] = beats, now
            silent = now - self._heard[process][1]
            if silent > limit:
                _publish_failure(
                    process,
                    row["host"],
                    f"is gone: no sign of life for {silent:.0f} s; it was killed, ran out of "
                    "memory, or its machine or network is down",
                )
                return

    def _states(self, now: float) -> list[dict[str, Any]]:
        """What each process does, by process."""
        if state().num_processes > 1:
            rows = _rows("mixer/beat")
            for process, row in rows.items():
                _, heard = self._heard.get(process, (None, now))
                if now - heard > 4 * BEAT_SECS:  # what it said last holds no more
                    row.update(doing="silent", secs=now - heard)
            return [dict(process=process, **rows[process]) for process in sorted(rows)]
        return [dict(process=0, step=self._step, doing=self._doing, secs=now - self._since)]


@contextlib.contextmanager
def watch(
    *,
    stall_secs: float | None = None,
    tell: Callable[[str], None] = say,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Watch]:
    """Stands around a whole run, on every process: none waits for one that has failed.

    What leaves it as an exception on one process ends the others within seconds, in one line with
    the reason; so does a process that is killed, within `LOST_SECS`. All leave it together.

    Args:
      stall_secs: after how long without a new step process 0 says who keeps the run waiting, and
        again at each doubling; None or 0: never.
      tell: shows such a line.
      clock: seconds, as time.monotonic.
    """
    watching = Watch(stall_secs=stall_secs, tell=tell, clock=clock)
    _watches[:] = [watching]
    with _naming_lost_coordinator():
        watching.start()
        try:
            yield watching
            barrier("end of the run")
        except BaseException as error:
            if state().num_processes > 1:
                if hasattr(error, "exit_code"):  # signals.Stopped, on all processes
                    barrier("end of the run")
                else:
                    watching.fail(error)
            raise
        finally:
            watching.stop()


def abort(error: BaseException) -> None:
    """Ends all of several processes because of `error`, from a thread of this one.

    For what the main thread does not hear of, because it waits for the others.
    """
    if state().num_processes == 1 or not _watches:
        return
    _watches[0].fail(error)
    _write(str(error))
    _watches[0].leave(_exit_code(error))


def stall_line(seconds: float, states: Sequence[Mapping[str, Any]]) -> str:
    """Why no step was finished for `seconds`, of what each process does.

    Args:
      seconds: since the last progress.
      states: {"process", "host", "step", "doing", "secs"} of each, this one first.
    """
    own = states[0]
    if own["doing"] in QUIET:
        what = {"compiling": "compiling the first step"}.get(own["doing"], own["doing"])
        line = f"still {what} after {seconds:.0f} s (at step {own['step']})"
    else:
        line = f"no step for {seconds:.0f} s: at step {own['step']}"
    if len(states) == 1:
        doing = f"; {own['doing']} since {own['secs']:.0f} s"
        return line + doing * (own["doing"] not in QUIET)
    # The run goes at the pace of the last process; of the last, one without data is the cause.
    last = min(row["step"] for row in states)
    behind = [row for row in states if row["step"] == last]
    blamed = [row for row in states if row["doing"] == "silent"]
    blamed = blamed or [row for row in behind if row["doing"] == "waiting for data"] or behind
    if len(blamed) == len(states):
        if own["doing"] in QUIET:
            return line
        return f"{line}; all processes are {own['doing']} since {own['secs']:.0f} s"
    who = ", ".join(
        f"{_name(row['process'], row['host'])} is {row['doing']} since {row['secs']:.0f} s"
        for row in blamed[:4]
    )
    more = f" and {len(blamed) - 4} more are behind" if len(blamed) > 4 else ""
    return f"{line}; {who}{more}; the others wait for {'it' if len(blamed) == 1 else 'them'}"


def _rows(directory: str) -> dict[int, Any]:
    """What the processes have set under `directory`, by process."""
    rows = state().client.key_value_dir_get(f"{directory}/")
    return {int(key.rpartition("/")[2]): json.loads(text or "null") for key, text in rows}


def _failure() -> dict[str, Any] | None:
    """The first failure of any process."""
    return _rows("mixer/failure").get(0)


def _publish_failure(process: int, host: str, reason: str) -> None:
    row = dict(process=process, host=host, reason=reason)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # an earlier failure stands
        state().client.key_value_set("mixer/failure/0", json.dumps(row))


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether it comes of XLA and may be that another process is gone.

    XLA raises RuntimeError or ValueError, with the status first; Orbax wraps what it gets.
    """
    if error is None:
        return False
    lost = ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN")
    if re.match(f"({'|'.join(lost)}):", str(error)):
        return True
    return _is_lost_connection(error.__cause__ or error.__context__)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def _exit_code(error: BaseException) -> int:
    """With which mixer.cli.config ends the program."""
    if line_of(error) is not None:
        return 2
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _write(line: str) -> None:
    """Past Python's buffers, whose locks another thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def _naming_lost_coordinator() -> Iterator[None]:
    """Says in the last line that process 0 is gone, where JAX aborts the program because of it.

    JAX aborts from a thread of its own, where Python's handlers do not run: libc calls this one.
    """
    this = state()
    if this.num_processes == 1 or this.process_id == 0:
        yield
        return
    host, _, port = this.coordinator_address.rpartition(":")

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(signum: int) -> None:
        if _exit_codes:
            os._exit(_exit_codes[0])
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            _write(
                f"process 0 ({host}) is gone: its coordination service does not answer; it was "
                "killed, ran out of memory, or its machine or network is down"
            )
            os._exit(1)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    _abort_handlers.append(aborted)
    before = libc.signal(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))
    yield
    # Not after a failure: JAX may abort this process until it has ended.
    libc.signal(signal.SIGABRT, before)
