"""The processes of a run: their names, and how they agree on a value.

Messages are short texts in the key-value store of JAX's coordination service, which process 0
hosts. They use no device, so a process can answer while its devices wait for another process.
"""

import contextlib
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from mixer.errors import UserError

# Timeout of a barrier. A process may take long to prepare data; the watchdog detects dead ones.
TALK_SECS = 3600.0
SHARE_SECS = 15.0  # timeout until all hosts see a new file; network file systems have caches

_counters: dict[str, Iterator[int]] = {}  # numbers of the calls, by the kind of call


def state() -> Any:
    """Returns JAX's coordination client, process_id and num_processes (a private JAX object)."""
    return jax._src.distributed.global_state


def is_main() -> bool:
    """Returns whether this is process 0, which writes the files of the run."""
    return state().num_processes == 1 or jax.process_index() == 0


def process_name(process_id: int | None = None, host: str | None = None) -> str:
    """Returns a name such as "process 3 (tpu-w-3)".

    Args:
      process_id: number of the process; None: this process.
      host: name of its machine; None: this machine.
    """
    process_id = state().process_id if process_id is None else process_id
    return f"process {process_id} ({host or socket.gethostname()})"


def host_and_port(address: str) -> tuple[str, int]:
    """Splits HOST:PORT; the host may be an IPv6 address in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def say(line: str) -> None:
    """Prints a line on process 0 only."""
    if is_main():
        print(line, flush=True)


def write_line(line: str, *, descriptor: int) -> None:
    """Writes a line directly to a file descriptor; ignores a closed pipe.

    This bypasses Python's buffers, whose locks another thread, or an interrupted function of this
    one, may hold.

    Args:
      line: the line, without a line break.
      descriptor: 1 for stdout, 2 for stderr.
    """
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{line}\n".encode())


@contextlib.contextmanager
def helper_thread(run: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Runs `run(stop_event)` in a thread; the end of the block sets `stop_event`."""
    stop_event = threading.Event()
    thread = threading.Thread(target=run, args=(stop_event,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop_event.set()
        thread.join(5)


# Agreement. All processes call these functions in the same order.


def _next_key(kind: str) -> str:
    """Returns a key that is the same on all processes, and different for each call."""
    return f"mixer/{kind}/{next(_counters.setdefault(kind, itertools.count()))}"


def barrier(name: str) -> None:
    """Waits for all processes; `name` appears in the error after a timeout."""
    if state().num_processes > 1:
        state().client.wait_at_barrier(_next_key(f"barrier/{name}"), int(TALK_SECS * 1000))


def broadcast(value: Any) -> Any:
    """Returns the JSON value of process 0 on all processes; the others' values are ignored."""
    if state().num_processes == 1:
        return value
    client, key = state().client, _next_key("broadcast")
    if is_main():
        client.key_value_set(key, json.dumps(value))
    value = json.loads(client.blocking_key_value_get(key, int(TALK_SECS * 1000)))
    barrier("broadcast")
    if is_main():
        client.key_value_delete(key)
    return value


def gather(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, in the order of the processes, on all of them."""
    this = state()
    if this.num_processes == 1:
        return [value]
    key = _next_key("gather")
    this.client.key_value_set(f"{key}/{this.process_id}", json.dumps(value))
    barrier("gather")
    rows = dict(this.client.key_value_dir_get(f"{key}/"))
    barrier("gathered")
    this.client.key_value_delete(f"{key}/{this.process_id}")
    return [json.loads(rows[f"{key}/{index}"]) for index in range(this.num_processes)]


def agree(ok: bool) -> bool:
    """Returns whether `ok` is true on every process."""
    return all(gather(bool(ok)))


def check_shared(directory: epath.PathLike) -> None:
    """Checks that all processes see the same directory.

    Raises:
      UserError: process 0 cannot write to the directory, or other processes do not see its file.
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
        raise UserError(f"{directory}: process 0 cannot write to it: {problem}")
    deadline = time.monotonic() + SHARE_SECS
    while not (is_visible := (directory / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [process for process, sees in gather([process_name(), is_visible]) if not sees]
    if is_main():
        token.unlink(missing_ok=True)
    barrier("directory")
    if blind:
        raise UserError(
            f"{directory} is not the same directory for all processes: {', '.join(blind[:4])}"
            f"{' and others' * (len(blind) > 4)} {'do' if len(blind) > 1 else 'does'} not see the "
            "files of process 0; expected a shared file system, or gs://"
        )
