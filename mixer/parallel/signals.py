"""Turns SIGTERM or Ctrl-C on any process into a request that all processes save and exit."""

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from mixer.parallel import processes

NOTICE_SECS = 0.5  # interval of checks for a notice of another process
SAVING = "saving as soon as the step is finished"

_numbers = itertools.count()  # of the `Signals`, which all processes create in the same order


class Stopped(Exception):
    """The run was asked to end by a signal and has saved its state."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum  # 143 for SIGTERM, 130 for Ctrl-C


class Signals:
    """The first SIGTERM or SIGINT that was received.

    It is true once every process has agreed to stop. A single process stops at once; several
    processes agree on a call of `poll`.
    """

    def __init__(self):
        self.received: int | None = None
        # The handler must not call `is_main`: JAX takes a lock that the main thread may hold.
        self.is_main = processes.is_main()
        self._alone = processes.state().num_processes == 1
        self._key = f"mixer/signals/{next(_numbers)}"
        self._calls = 0
        self._stop_at: int | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self.received is not None if self._alone else self._stopped

    @property
    def name(self) -> str:
        """The name of the received signal."""
        return signal.Signals(self.received).name

    def poll(self) -> bool:
        """Returns whether to save and exit now; becomes true at the same call on all processes.

        All processes must make the same sequence of calls. A call sends no message; after a signal,
        one call waits until every process has published its number of calls.
        """
        if self._alone:
            return bool(self)
        with self._lock:
            self._calls += 1
            self._stopped = self._stop_at is not None and self._calls >= self._stop_at
            return self._stopped

    def share(self, stop_event: threading.Event) -> None:
        """Exchanges notices with the other processes until `stop_event` is set; runs in a thread.

        After a notice each process stops counting its calls, publishes its count and reads the
        others' counts. No process has started the call after the highest count, so all stop there.
        """
        # If the service does not answer, process 0 is gone, and JAX ends this process.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._share(stop_event)

    def _share(self, stop_event: threading.Event) -> None:
        state, key = processes.state(), self._key
        notice = None
        while notice is None and not stop_event.wait(NOTICE_SECS):
            if self.received is not None:
                own_notice = dict(signum=self.received, who=processes.process_name())
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                    state.client.key_value_set(f"{key}/notice/0", json.dumps(own_notice))
            for _, text in state.client.key_value_dir_get(f"{key}/notice/"):
                notice = json.loads(text)
        with self._lock:
            state.client.key_value_set(f"{key}/calls/{state.process_id}", str(self._calls))
            if notice is None:
                return  # the run is over: this process makes no more calls
            timeout = int(processes.TALK_SECS * 1000)
            calls = [
                int(state.client.blocking_key_value_get(f"{key}/calls/{process}", timeout))
                for process in range(state.num_processes)
            ]
            if self.received is None and self.is_main:
                name = signal.Signals(notice["signum"]).name
                processes.write_line(f"{name} on {notice['who']}: {SAVING}", descriptor=1)
            self.received = notice["signum"]
            self._stop_at = max(calls) + 1


@contextlib.contextmanager
def catch() -> Iterator[Signals]:
    """Records the first SIGTERM or SIGINT; a second one has its default effect."""
    signals = Signals()

    def receive(signum: int, frame: Any) -> None:
        del frame
        if signals.received is None:
            signals.received = signum
        restore()
        if signals.is_main:
            # stdout may be closed: in `... | tee`, tee receives the same Ctrl-C.
            processes.write_line(f"{signals.name}: {SAVING}", descriptor=1)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {
        signum: signal.signal(signum, receive) for signum in (signal.SIGTERM, signal.SIGINT)
    }
    has_peers = processes.state().num_processes > 1
    thread = processes.helper_thread(signals.share, "signals")
    try:
        with thread if has_peers else contextlib.nullcontext():
            yield signals
    finally:
        restore()
