"""The processes of one run: which one this is, and how all of them agree.

JAX's coordination service, which process 0 hosts, carries the messages in its key-value store:
short texts, which need no device, so that a process can answer while its devices wait for another.
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

TALK_SECS = 3600.0  # at a barrier: a process may prepare data; the watchdog finds dead ones sooner
SHARE_SECS = 15.0  # until all hosts see a new file: caches of network file systems

_counts: dict[str, Iterator[int]] = {}  # of the calls so far, by what they do


def state() -> Any:
    """JAX's coordination client, process_id and num_processes; JAX has no public name for them."""
    return jax._src.distributed.global_state


def is_main() -> bool:
    """Whether this is process 0, which writes the files of the run."""
    return state().num_processes == 1 or jax.process_index() == 0


def process_name(process_id: int | None = None, host: str | None = None) -> str:
    """Such as "process 3 (tpu-w-3)"; by default of this process, also before JAX knows its number.

    Args:
      process_id: number of the process.
      host: name of its machine; None: this machine.
    """
    process_id = state().process_id if process_id is None else process_id
    return f"process {process_id} ({host or socket.gethostname()})"


def say(line: str) -> None:
    """Prints a line, on process 0 only."""
    if is_main():
        print(line, flush=True)


def write_line(line: str, *, descriptor: int) -> None:
    """Writes past Python's buffers, whose locks another thread or this one may hold.

    Args:
      line: without a line break.
      descriptor: 1 for stdout, 2 for stderr; nothing happens where its reader is gone.
    """
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{line}\n".encode())


@contextlib.contextmanager
def helper_thread(run: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Runs `run(done)` in a thread while the block lasts; the end of the block sets `done`."""
    done = threading.Event()
    thread = threading.Thread(target=run, args=(done,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5)


# Agreement. All processes call these functions in the same order.


def _next_key(what: str) -> str:
    """A key that this call has on all processes and no other call has."""
    return f"mixer/{what}/{next(_counts.setdefault(what, itertools.count()))}"


def barrier(name: str) -> None:
    """Waits for all processes; the error names `name` if some do not come."""
    if state().num_processes > 1:
        state().client.wait_at_barrier(_next_key(f"barrier/{name}"), int(TALK_SECS * 1000))


def broadcast(value: Any) -> Any:
    """Returns process 0's value, which JSON can hold, on all; the others' values are ignored."""
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
    """Returns the values of all processes, which JSON can hold, in their order, on all."""
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
    """Whether `ok` is true on every process."""
    return all(gather(bool(ok)))


def check_shared(directory: epath.PathLike) -> None:
    """Checks that all processes see the same directory.

    Raises:
      UserError: process 0 cannot write there, or others do not see its file.
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
            "process 0 writes there; expected a file system that all share, or gs://"
        )
