"""Flags of train.py and evaluate.py for runs of several processes."""

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
    "HOST:PORT of process 0 in a run of several processes. Cloud TPU, Slurm, Open MPI and GKE set "
    "this flag, --num_processes and --process_id by themselves.",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")

# Whether this process has started to join the others, so that they notice a failure by themselves.
_joins = False


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` as `cli.run` does; tells the other processes of an error before they join."""
    global _joins
    _joins = False
    cli.run(main, _tell)


def _tell(reason: str) -> None:
    if _joins:
        return
    values = [_flag_text(flag.name) for flag in (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID)]
    address, num_processes, process_id = values
    if address and num_processes.isdigit() and process_id.isdigit():
        from mixer.parallel import join

        join.tell_failure(address, int(num_processes), int(process_id), reason)


def _flag_text(name: str) -> str:
    """Returns a flag's value on the command line, even if absl cannot parse it; "" if missing."""
    match = re.search(f"^--?{name}[=\n](.*)$", "\n".join(sys.argv[1:]), re.MULTILINE)
    return match[1] if match else ""


def join() -> None:
    """Joins the run's other processes, if any; from then on only process 0 writes to stdout.

    Raises:
      UserError: the processes cannot join, or JAX finds no device.
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
    with watchdog.watch():  # a process whose devices do not start ends the others
        backend.start()
    if not processes.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open as stdout)
