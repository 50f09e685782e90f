"""SIGTERM and Ctrl-C as a request to save and leave, on any process of a run for all of them."""

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from mixer.parallel import processes

NOTICE_SECS = 0.5  # between looks for another process's notice
SAVING = "saving as soon as the step is done"

_catches = itertools.count()  # in the same order on all processes


class Stopped(Exception):
    """The run was asked to end by a signal and has saved its state."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum  # 143 for SIGTERM, 130 for Ctrl-C


class Signals:
    """The first SIGTERM or SIGINT that has arrived.

    True once every process has agreed to stop: at once in a run of one process, otherwise from an
    agreed call of `poll` on.
    """

    def __init__(self):
        self.received: int | None = None
        # Not in the handler: JAX takes a lock to answer, and the main thread may hold it.
        self.is_main = processes.is_main()
        self._alone = processes.state().num_processes == 1
        self._calls = 0
        self._stop_at: int | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self.received is not None if self._alone else self._stopped

    @property
    def name(self) -> str:
        """SIGTERM or SIGINT."""
        return signal.Signals(self.received).name

    def poll(self) -> bool:
        """Whether to save and leave now; True on all processes at the same call.

        Every process calls it at the same places in the same order. It costs a lock, and no message
        until there is a signal; then it waits, once, until every process has published its count.
        """
        if self._alone:
            return bool(self)
        with self._lock:
            self._calls += 1
            self._stopped = self._stop_at is not None and self._calls >= self._stop_at
            return self._stopped

    def share(self, key: str, done: threading.Event) -> None:
        """Exchanges notices with the other processes, in a thread, until `done`.

        Each process stops counting, publishes its count and reads the others'. No process has begun
        the call after the highest count, so all stop there.
        """
        state = processes.state()
        notice = None
        while notice is None and not done.wait(NOTICE_SECS):
            if self.received is not None:
                mine = dict(signum=self.received, who=processes.process_name())
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
                    state.client.key_value_set(f"{key}/notice/0", json.dumps(mine))
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
    """Notes the first SIGTERM or SIGINT; a second one has its usual effect."""
    signals = Signals()

    def receive(signum: int, frame: Any) -> None:
        del frame
        if signals.received is None:
            signals.received = signum
        restore()
        if signals.is_main:
            # `| tee` gets the same Ctrl-C and may be gone
            processes.write_line(f"{signals.name}: {SAVING}", descriptor=1)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {
        signum: signal.signal(signum, receive) for signum in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        with _sharing(signals):
            yield signals
    finally:
        restore()


@contextlib.contextmanager
def _sharing(signals: Signals) -> Iterator[None]:
    """Runs the thread that shares notices, where there are several processes."""
    if processes.state().num_processes == 1:
        yield
        return
    key = f"mixer/signals/{next(_catches)}"

    def share(done: threading.Event) -> None:
        # If the service does not answer, process 0 is gone, and JAX ends this process.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            signals.share(key, done)

    with processes.helper_thread(share, "signals"):
        yield
