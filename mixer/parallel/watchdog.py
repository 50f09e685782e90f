"""The watchdog of a run: reports stalls, and ends all processes when one of them fails."""

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mixer.errors import exit_code, first_line, line_of
from mixer.parallel import processes

BEAT_SECS = 2.0  # interval of the heartbeats
LOST_SECS = 60.0  # a process without a heartbeat for this long is gone; JAX alone waits 100 s
SUSPECT_SECS = 10.0  # the same after a collective has failed
LEAVE_SECS = 10.0  # time for the other processes to read why a run ends

# Activities that may take long without being a stall.
QUIET = ("starting", "compiling", "evaluating", "saving")

_watches: list["Watch"] = []  # the watch of the run
_exit_codes: list[int] = []  # exit code of this process, once it has printed why it ends
_abort_handlers: list[Any] = []  # keeps the handlers alive, because libc holds no reference


class Watch:
    """Tracks the activity of this process, and reads the heartbeats of the others.

    `watch` creates it.

    Args:
      stall_secs: as for `watch`.
      tell: shows a line to the user.
      clock: returns seconds, like `time.monotonic`.
    """

    def __init__(
        self,
        *,
        stall_secs: float | None,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stall_secs, self._tell, self._clock = stall_secs, tell, clock
        start_time = clock()
        self._step, self._doing, self._since = 0, "starting", start_time
        self._progress, self._alarm = start_time, stall_secs
        self._beats = 0
        # For each process, its number of heartbeats and the time of the last one.
        self._heard: dict[int, tuple[int, float]] = {}
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def beat(self, step: int, doing: str) -> None:
        """Records the start of an activity, such as "computing" step 341.

        Args:
          step: the step in progress; for an activity in `QUIET`, the last finished step.
          doing: "waiting for data", "computing", one of `QUIET`, or "leaving", which never stalls.
        """
        time_now = self._clock()
        if (step, doing) == (self._step, self._doing):
            return
        if step != self._step or doing in QUIET or self._doing in QUIET:
            self._progress, self._alarm = time_now, self._stall_secs
        self._step, self._doing, self._since = step, doing, time_now

    def check(self) -> None:
        """Publishes a heartbeat, and checks for failures and stalls; the thread repeats it."""
        this, time_now = processes.state(), self._clock()
        if this.num_processes > 1:
            self._publish(time_now)
            failure = _failure()
            if failure is None and this.process_id == 0:
                self._find_lost(time_now)
                failure = _failure()
            # If this process fails too, its main thread prints its own reason.
            if failure is not None and not self._leaving.wait(1):
                self.end(failure)
        stall = time_now - self._progress  # seconds
        reports_stalls = this.process_id == 0 and self._alarm and self._doing != "leaving"
        if reports_stalls and stall >= self._alarm:
            self._alarm *= 2
            self._tell(stall_line(stall, self._states(time_now)))

    def start(self) -> None:
        """Starts the thread; a single process needs it only to report stalls."""
        several = processes.state().num_processes > 1
        if several:
            # Process 0 does not miss a process that never published a heartbeat.
            self._publish(self._clock())
        if several or self._stall_secs:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._leaving.set()
        if self._thread.ident:
            self._thread.join(5)
        this = processes.state()
        if this.num_processes > 1:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                this.client.key_value_delete(f"mixer/beat/{this.process_id}")

    def fail(self, error: BaseException) -> None:
        """Tells the other processes why this one ends.

        If another process caused the error by ending, the thread ends this process meanwhile.
        """
        this = processes.state()
        if _is_lost_connection(error):
            # The thread ends this process once process 0 knows which process is gone.
            this.client.key_value_set(f"mixer/suspect/{this.process_id}", "", True)
            time.sleep(2 * SUSPECT_SECS)
        self._leaving.set()
        reason = line_of(error) or _summary(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone
            _publish_failure(this.process_id, socket.gethostname(), f"failed: {reason}")
        # At exit JAX would wait for the other processes and for unfinished collectives.
        code = exit_code(error)
        atexit.register(self.leave, code)
        timer = threading.Timer(2 * LEAVE_SECS, _leave, [code])
        timer.daemon = True
        timer.start()

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
        """Ends this process, even if its main thread waits, because another process failed."""
        who = processes.process_name(failure["process"], failure["host"])
        processes.write_line(f"{who} {failure['reason']}", descriptor=2)
        _exit_codes.append(1)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._acknowledge(failure["process"])
        _leave(1)

    def _acknowledge(self, failed_id: int | None = None) -> None:
        """Acknowledges the failure; process 0 waits until all processes have acknowledged it."""
        this = processes.state()
        this.client.key_value_set(f"mixer/ended/{this.process_id}", "", True)
        if this.process_id == 0:
            deadline = time.monotonic() + LEAVE_SECS
            live_processes = {*range(this.num_processes)} - {failed_id}
            while not live_processes <= _rows("mixer/ended").keys() and time.monotonic() < deadline:
                time.sleep(0.1)

    def _run(self) -> None:
        while not self._leaving.wait(BEAT_SECS):
            # If the service does not answer, process 0 is gone, and JAX ends this process.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.check()

    def _publish(self, time_now: float) -> None:
        self._beats += 1
        row = self._own_state(time_now) | dict(beats=self._beats, host=socket.gethostname())
        this = processes.state()
        this.client.key_value_set(f"mixer/beat/{this.process_id}", json.dumps(row), True)

    def _find_lost(self, time_now: float) -> None:
        """Publishes the failure of a process whose last heartbeat is too old."""
        limit = SUSPECT_SECS if _rows("mixer/suspect") else LOST_SECS
        for process, row in _rows("mixer/beat").items():
            beats = row["beats"]
            if self._heard.get(process, (None, 0))[0] != beats:
                self._heard[process] = beats, time_now
            silent_secs = time_now - self._heard[process][1]
            if silent_secs > limit:
                _publish_failure(
                    process,
                    row["host"],
                    f"is gone: no sign of life for {silent_secs:.0f} s; it was killed, ran out of "
                    "memory, or its machine or network is down",
                )
                return

    def _states(self, time_now: float) -> list[dict[str, Any]]:
        """Returns the activity of each process, in the order of the processes."""
        if processes.state().num_processes > 1:
            rows = _rows("mixer/beat")
            for process, row in rows.items():
                _, beat_time = self._heard.get(process, (None, time_now))
                if time_now - beat_time > 4 * BEAT_SECS:  # its last heartbeat is outdated
                    row.update(doing="silent", secs=time_now - beat_time)
            return [dict(process=process, **rows[process]) for process in sorted(rows)]
        return [dict(process=0, **self._own_state(time_now))]

    def _own_state(self, time_now: float) -> dict[str, Any]:
        return dict(step=self._step, doing=self._doing, secs=time_now - self._since)


@contextlib.contextmanager
def watch(
    *,
    stall_secs: float | None = None,
    tell: Callable[[str], None] = processes.say,
) -> Iterator[Watch]:
    """Watches a whole run on every process, so that no process waits for one that has failed.

    An exception that leaves the block on one process ends the others within seconds, with the
    reason in one line; a killed process ends the others within `LOST_SECS`. All processes leave the
    block together.

    Args:
      stall_secs: seconds without a new step after which process 0 prints which process the others
        wait for; it repeats the line whenever the time has doubled. None or 0: never.
      tell: shows a line to the user.
    """
    run_watch = Watch(stall_secs=stall_secs, tell=tell)
    _watches[:] = [run_watch]
    with _naming_lost_coordinator():
        run_watch.start()
        try:
            yield run_watch
            processes.barrier("end of the run")
        except BaseException as error:
            if processes.state().num_processes > 1:
                if hasattr(error, "exit_code"):  # signals.Stopped, which all processes raise
                    processes.barrier("end of the run")
                else:
                    run_watch.fail(error)
            raise
        finally:
            run_watch.stop()


def abort(error: BaseException) -> None:
    """Ends all processes because of `error` in a thread other than the main thread.

    The main thread may wait for the other processes and would never see the error. In a run of one
    process this does nothing.
    """
    if processes.state().num_processes == 1 or not _watches:
        return
    _watches[0].fail(error)
    processes.write_line(str(error), descriptor=2)
    _watches[0].leave(exit_code(error))


def stall_line(seconds: float, states: Sequence[Mapping[str, Any]]) -> str:
    """Returns the line that says why no step was finished for `seconds`.

    Args:
      seconds: time since the last progress.
      states: {"process", "host", "step", "doing", "secs"} of each process, this one first.
    """
    main = states[0]
    if main["doing"] in QUIET:
        activity = {"compiling": "compiling the first step"}.get(main["doing"], main["doing"])
        line = f"still {activity} after {seconds:.0f} s (at step {main['step']})"
    else:
        line = f"no step for {seconds:.0f} s: at step {main['step']}"
    if len(states) == 1:
        doing = f"; {main['doing']} for {main['secs']:.0f} s"
        return line + doing * (main["doing"] not in QUIET)
    # The slowest process sets the pace; among the slowest, one that waits for data is the cause.
    lowest_step = min(row["step"] for row in states)
    slowest = [row for row in states if row["step"] == lowest_step]
    causes = [row for row in states if row["doing"] == "silent"]
    causes = causes or [row for row in slowest if row["doing"] == "waiting for data"] or slowest
    if len(causes) == len(states):
        if main["doing"] in QUIET:
            return line
        return f"{line}; all processes have been {main['doing']} for {main['secs']:.0f} s"
    who = ", ".join(
        f"{processes.process_name(row['process'], row['host'])} has been {row['doing']} for "
        f"{row['secs']:.0f} s"
        for row in causes[:4]
    )
    suffix = f" and {len(causes) - 4} more are behind" if len(causes) > 4 else ""
    return f"{line}; {who}{suffix}; the others wait for {'it' if len(causes) == 1 else 'them'}"


def _rows(directory: str) -> dict[int, Any]:
    """Returns the values that the processes have set under `directory`, by process."""
    rows = processes.state().client.key_value_dir_get(f"{directory}/")
    return {int(key.rpartition("/")[2]): json.loads(text or "null") for key, text in rows}


def _failure() -> dict[str, Any] | None:
    """Returns the first failure of any process; None if there is none."""
    return _rows("mixer/failure").get(0)


def _publish_failure(process: int, host: str, reason: str) -> None:
    row = dict(process=process, host=host, reason=reason)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # an earlier failure is kept
        processes.state().client.key_value_set("mixer/failure/0", json.dumps(row))


def _is_lost_connection(error: BaseException | None) -> bool:
    """Returns whether XLA raised `error`, perhaps because another process is gone.

    XLA raises RuntimeError or ValueError, whose text starts with the status; Orbax wraps them.
    """
    if error is None:
        return False
    error_codes = (
        "ABORTED",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "INTERNAL",
        "UNAVAILABLE",
        "UNKNOWN",
    )
    if re.match(f"({'|'.join(error_codes)}):", str(error)):
        return True
    return _is_lost_connection(error.__cause__ or error.__context__)


def _summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def _naming_lost_coordinator() -> Iterator[None]:
    """Prints that process 0 is gone, if JAX aborts the program for that reason.

    JAX aborts from its own thread, where Python's signal handlers do not run; libc calls this one.
    """
    this = processes.state()
    if this.num_processes == 1 or this.process_id == 0:
        yield
        return
    address = processes.host_and_port(this.coordinator_address)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle_abort(signum: int) -> None:
        if _exit_codes:
            os._exit(_exit_codes[0])
        try:
            socket.create_connection(address, timeout=5).close()
        except OSError:
            processes.write_line(
                f"process 0 ({address[0]}) is gone: its coordination service does not answer; it "
                "was killed, ran out of memory, or its machine or network is down",
                descriptor=2,
            )
            os._exit(1)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    _abort_handlers.append(handle_abort)
    previous = libc.signal(signal.SIGABRT, ctypes.cast(handle_abort, ctypes.c_void_p))
    yield
    # After an exception the handler stays: JAX may abort this process until it has ended.
    libc.signal(signal.SIGABRT, previous)
