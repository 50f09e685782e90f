"""Flags of train.py and evaluate.py by which the processes of one run find each other."""

import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags

from mixer import memory
from mixer.cli import config as cli
from mixer.parallel import backend

COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, where the run has several processes; it, --num_processes and "
    "--process_id are not needed under Cloud TPU, Slurm, Open MPI and GKE, which say them.",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


_joins = False  # whether this process has begun to join; the others then hear of a failure


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`cli.run`; if this process ends before it joins the others, they hear of it too."""
    global _joins
    _joins = False
    cli.run(main, _tell)


def _tell(reason: str) -> None:
    if _joins:
        return
    values = [_given(flag.name) for flag in (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID)]
    address, num_processes, process_id = values
    if address and num_processes.isdigit() and process_id.isdigit():
        from mixer.parallel import join

        join.tell_failure(address, int(num_processes), int(process_id), reason)


def _given(name: str) -> str:
    """A flag's text on the command line, "" without one; absl may fail on another flag."""
    match = re.search(f"^--?{name}[=\n](.*)$", "\n".join(sys.argv[1:]), re.MULTILINE)
    return match[1] if match else ""


def join() -> None:
    """Joins the run's other processes, if any; from then on process 0 alone writes to stdout.

    Raises:
      UserError: they do not come together, or JAX finds no device.
    """
    from mixer.parallel import processes, watchdog
    from mixer.parallel.join import check_place, initialize

    global _joins
    memory.compute_in_the_calling_thread()
    place = (COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if None not in place:
        check_place(*place)
    _joins = True
    initialize(*place)
    with watchdog.watch():  # all hear of a process whose devices do not start
        backend.start()
    if not processes.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it is stdout from now on)
