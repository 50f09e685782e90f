"""The flags by which the processes of one run find each other; of train.py and evaluate.py."""

import os
import sys

from absl import flags

from mixer import memory

COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, where the run has several processes; it, --num_processes and "
    "--process_id are not needed under Cloud TPU, Slurm, Open MPI and GKE, which say them.",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def join() -> None:
    """Joins the run's other processes, if any; from then on process 0 alone writes to stdout."""
    from mixer import distributed

    memory.compute_in_the_calling_thread()
    distributed.initialize(COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if not distributed.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it is stdout from now on)
