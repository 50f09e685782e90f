"""Joins the processes of a run, before JAX computes anything."""

import contextlib
import importlib.util
import json
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mixer.errors import UserError, check_number, first_line
from mixer.parallel import processes

JOIN_SECS = 300.0  # timeout for all processes to arrive; the hosts of a pod start minutes apart
TELL_SECS = 20.0  # interval of the lines that say which processes are missing
LEAVE_SECS = 10.0  # time for a process that left to come back, or to read why the others exit
POLL_SECS = 2.0  # interval of checks for processes that left


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of the run; call it before JAX computes anything.

    Without arguments it detects a launcher of several processes (Cloud TPU, Slurm, Open MPI, an
    indexed Kubernetes job), and does nothing without a launcher.

    Args:
      coordinator_address: HOST:PORT of process 0, with a free port that the others can reach.
      num_processes: number of processes of the run.
      process_id: number of this process, from 0.

    Raises:
      UserError: an argument is missing or invalid, or the processes cannot join.
    """
    place = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing_flags = [name for name, value in place.items() if value is None]
    if processes.state().client is not None:
        return  # an earlier run in this process has joined
    if 0 < len(missing_flags) < 3:
        raise UserError(f"expected all of {', '.join(place)}; missing: {', '.join(missing_flags)}")
    if missing_flags:
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
    # A CPU that runs several programs at once can pair a collective with the wrong one of another
    # process, and all hang. Accelerators always run one program after the other.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # JAX's preemption service would intercept SIGTERM, which `signals.Signals` handles.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        _interruptibly(jax.distributed.initialize, **join, initialization_timeout=int(JOIN_SECS))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"the processes of this run cannot join: {first_line(error)}; {', '.join(place)} "
            "together override the launcher's values"
        ) from error
    if _one_process_per_node(os.environ):
        # Under Slurm JAX takes one GPU per process, even if a node has only one process.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def _interruptibly(function: Callable[..., None], **kwargs: Any) -> None:
    """Calls `function` in a thread, so that Python can handle signals while C++ code waits."""
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
    """Returns arguments for `jax.distributed.initialize`; None without a launcher.

    Only variables that a launcher sets for each process count. A shell inside a Slurm job, a
    notebook on a pod and a laptop lack them, and start at once.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return dict(
            cluster_detection_method="slurm",
            num_processes=int(environ["SLURM_STEP_NUM_TASKS"]),
        )
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return dict(cluster_detection_method="ompi")
    # JAX sets TPU_ML_PLATFORM if it finds TPU chips and their library.
    if environ.get("TPU_ML_PLATFORM") == "JAX" and environ.get("JAX_PLATFORMS") != "cpu":
        names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
        if names is None:  # a Cloud TPU VM; JAX finds the other hosts in its metadata
            return None if "TPU_SKIP_MDS_QUERY" in environ else {}
        several = "," in names or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
        return {} if several else None
    in_job = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    if in_job and importlib.util.find_spec("kubernetes"):
        return dict(cluster_detection_method="k8s")
    return None


def _one_process_per_node(environ: Mapping[str, str]) -> bool:
    """Returns whether Slurm started one process per node: 1(x4), or 1,1 in older versions."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return bool(re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", tasks))


def check_place(address: str, num_processes: int, process_id: int) -> None:
    """Raises UserError if one of the three flags is invalid."""
    if not re.fullmatch(r".+:[0-9]+", address) or not 0 < int(address.rpartition(":")[2]) < 65536:
        raise UserError(f"--coordinator_address={address}; expected HOST:PORT")
    check_number("--num_processes", num_processes, minimum=1, integer=True)
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} with --num_processes={num_processes}; expected a number "
            f"from 0 to {num_processes - 1}"
        )


# The processes meet before JAX's own start, because JAX aborts without a clear message if a process
# is missing or two processes have the same number.


def meet(address: str, num_processes: int, process_id: int) -> None:
    """Waits for all processes at the port that JAX's service uses afterwards.

    Raises:
      UserError: a process is missing, has failed, or was started twice; raised on every process
        that has arrived.
    """
    host, port = processes.host_and_port(address)
    if process_id == 0:
        _receive(port, num_processes)
    else:
        _report((host, port), num_processes, process_id)


def tell_failure(address: str, num_processes: int, process_id: int, reason: str) -> None:
    """Tells the other processes that this one failed before the meeting.

    The others may start a little later, so this process waits `LEAVE_SECS` for them.
    """
    if not address.rpartition(":")[2].isdigit() or num_processes < 2:
        return
    host, port = processes.host_and_port(address)
    deadline = time.monotonic() + LEAVE_SECS
    hello = _hello(num_processes, process_id) | {"failed": reason}
    with contextlib.suppress(OSError):
        if process_id:
            peer = _connect((host, port), deadline)
            with peer:
                peer.settimeout(LEAVE_SECS)
                peer.sendall(_line(hello))
                peer.recv(1)  # returns once process 0 has read the line
            return
        with _open_port(port) as server:
            name = processes.process_name(process_id)
            _refuse(server, num_processes - 1, f"{name} failed: {reason}")


def _hello(num_processes: int, process_id: int) -> dict[str, Any]:
    return dict(process=process_id, processes=num_processes, host=socket.gethostname())


def _line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _open_port(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual)


def _connect(address: tuple[str, int], deadline: float) -> socket.socket:
    """Connects as soon as process 0 listens; raises OSError after `deadline`."""
    while True:
        try:
            return socket.create_connection(address, timeout=5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _refuse(server: socket.socket, count: int, problem: str) -> None:
    """Tells the problem to `count` processes that have not arrived, for at most `LEAVE_SECS`."""
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


class _Meeting:
    """The meeting as process 0 sees it: which processes have arrived, and which have left."""

    def __init__(self, server: socket.socket, num_processes: int):
        self._server, self._num_processes = server, num_processes
        # Host and connection of each process that has arrived, by its number.
        self._arrived: dict[int, tuple[str, socket.socket]] = {}
        self._refused: list[socket.socket] = []  # connections of processes with a problem
        self._absent_since: dict[int, float] = {}  # start of the absence, by process number

    @property
    def peers(self) -> list[socket.socket]:
        """The connections of all processes that wait for a response."""
        return [peer for _, peer in self._arrived.values()] + self._refused

    def progress(self) -> str:
        """Returns a line for the user on how many processes have arrived."""
        port = self._server.getsockname()[1]
        return f"{len(self._arrived) + 1} of {self._num_processes} processes are at port {port}"

    def is_complete(self) -> bool:
        """Returns whether all processes are connected; one that left may come back."""
        return len(self._arrived) == self._num_processes - 1 and not any(
            map(_is_closed, self.peers)
        )

    def accept(self, deadline: float) -> socket.socket | None:
        """Returns the next connection; None after `POLL_SECS` without one."""
        self._server.settimeout(min(max(deadline - time.monotonic(), 0.001), POLL_SECS))
        try:
            return self._server.accept()[0]
        except TimeoutError:
            return None

    def greet(self, peer: socket.socket) -> str | None:
        """Reads a process's number and host; returns its problem, or None if it has none."""
        peer.settimeout(5)
        try:
            hello = json.loads(peer.makefile().readline())
            index, count, host = hello["process"], hello["processes"], hello["host"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # another program, which gets no response
        name = processes.process_name(index, host)
        problem = None
        if count != self._num_processes:
            problem = (
                f"{name} has --num_processes={count}, {processes.process_name(0)} has "
                f"{self._num_processes}"
            )
        elif "failed" in hello:
            problem = f"{name} failed: {hello['failed']}"
        elif index in self._arrived and not _is_closed(self._arrived[index][1]):
            first_host = self._arrived[index][0]
            problem = f"two processes have --process_id={index}: {first_host} and {host}"
        if problem is None:
            self._arrived[index] = host, peer
        else:
            self._refused.append(peer)
        return problem

    def missing(self) -> str:
        """Returns the problem after `JOIN_SECS`: the processes that have not arrived."""
        missing_ids = sorted({*range(1, self._num_processes)} - self._arrived.keys())
        return (
            f"after {JOIN_SECS:.0f} s {len(self._arrived) + 1} of {self._num_processes} processes "
            f"have arrived; missing: --process_id={', '.join(map(str, missing_ids))}"
        )

    def departure(self) -> str | None:
        """Returns the problem if a process left and did not come back within `LEAVE_SECS`."""
        time_now = time.monotonic()
        for index, (host, peer) in self._arrived.items():
            if not _is_closed(peer):
                self._absent_since.pop(index, None)
            elif time_now - self._absent_since.setdefault(index, time_now) >= LEAVE_SECS:
                name = processes.process_name(index, host)
                return f"{name} left before all processes had arrived"
        return None


def _receive(port: int, num_processes: int) -> None:
    """Lets all processes arrive at process 0, and responds to all of them at once."""
    try:
        server = _open_port(port)
    except OSError as error:
        raise UserError(
            f"port {port} of --coordinator_address is not free: {error.strerror}; another program, "
            "or another process with --process_id=0, uses it"
        ) from None
    deadline = time.monotonic() + JOIN_SECS
    meeting, problem = _Meeting(server, num_processes), None
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        stack.enter_context(_print_progress(meeting.progress))
        while problem is None and not meeting.is_complete():
            peer = meeting.accept(deadline)
            if peer is not None:
                stack.enter_context(peer)
                problem = meeting.greet(peer)
            else:
                problem = meeting.departure()
                if problem is None and time.monotonic() >= deadline:
                    problem = meeting.missing()
        for peer in meeting.peers:
            with contextlib.suppress(OSError):
                peer.sendall(_line({"problem": problem}))
                peer.recv(1)  # wait until the peer closes, so that the port is free at once
        if problem and time.monotonic() < deadline:
            _refuse(server, num_processes - 1 - len(meeting.peers), problem)
    if problem:
        raise UserError(problem)


def _print_progress(line: Callable[[], str]) -> contextlib.AbstractContextManager[None]:
    """Prints `line()` every `TELL_SECS` during the block."""

    def tell(stop_event: threading.Event) -> None:
        while not stop_event.wait(TELL_SECS):
            print(f"waiting at most {JOIN_SECS:.0f} s: {line()}", flush=True)

    return processes.helper_thread(tell, "meeting")


def _is_closed(peer: socket.socket) -> bool:
    """Returns whether the peer has closed the connection, for example because it restarted."""
    try:
        return bool(select.select([peer], [], [], 0)[0]) and peer.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True


def _report(address: tuple[str, int], num_processes: int, process_id: int) -> None:
    """Reports this process to process 0, and waits for its response."""
    flag = "--coordinator_address={}:{}".format(*address)
    deadline = time.monotonic() + JOIN_SECS
    with _print_progress(lambda: f"process {process_id} waits for process 0, {flag}"):
        try:
            peer = _connect(address, deadline)
        except OSError as error:
            raise UserError(
                f"{flag}: process 0 did not answer in {JOIN_SECS:.0f} s ({error.strerror or error})"
            ) from None
    with peer:
        peer.settimeout(JOIN_SECS + 10)
        try:
            peer.sendall(_line(_hello(num_processes, process_id)))
            line = peer.makefile().readline()
            problem = json.loads(line)["problem"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{flag}: process 0 exited before the run started, or another program "
                "listens at this address"
            ) from None
    if problem:
        raise UserError(problem)
