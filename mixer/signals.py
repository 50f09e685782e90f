"""SIGTERM and Ctrl-C as a request to save and leave."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any


class Stopped(Exception):
    """The run was asked to end by a signal and has saved its state."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum  # 143 for SIGTERM, 130 for Ctrl-C


@dataclasses.dataclass
class Signals:
    """The first SIGTERM or SIGINT that has arrived, None before."""

    received: int | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    @property
    def name(self) -> str:
        """SIGTERM or SIGINT."""
        return signal.Signals(self.received).name


@contextlib.contextmanager
def catch() -> Iterator[Signals]:
    """Notes the first SIGTERM or SIGINT; a second one ends the program as it would have."""
    signals = Signals()

    def receive(signum: int, frame: Any) -> None:
        del frame
        signals.received = signum
        restore()
        # Written past Python's buffers, which the signal may have interrupted.
        with contextlib.suppress(OSError):  # `| tee` gets the same Ctrl-C and is gone
            os.write(1, f"{signals.name}: saving as soon as the step is done\n".encode())

    def restore() -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {each: signal.signal(each, receive) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        restore()
