#!/bin/bash
# Slurm with GPUs: sbatch docs/launch/slurm.sh --config=configs/mixer_b16_i1k.py --workdir=/shared/b16
#
# Starts one process per node, which uses all GPUs and cores of the node. Add the options that your
# cluster needs (--partition, --account) to the sbatch command line or below.
#SBATCH --job-name=mixer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mixer-%j.log
#
# Slurm sends SIGTERM to all processes 300 s before the time limit. The run saves and exits with
# code 143, and this script requeues the job. srun gets no --kill-on-bad-exit, because the processes
# of a run already end together.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
srun --cpu-bind=none "${PYTHON:-.venv/bin/python}" train.py "$@"
code=$?
if [ "$code" = 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
