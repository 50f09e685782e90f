#!/bin/bash
# Slurm with GPUs: sbatch docs/launch/slurm.sh --config=configs/mixer_b16_i1k.py --workdir=/shared/b16
#
# One process a node, which has all of the node's GPUs and cores. What a cluster wants to know
# besides (--partition, --account) goes on sbatch's command line or here.
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
# TERM comes 300 s before the time is up, to all processes: the run saves and ends with 143, and the
# job is put in the queue again. No --kill-on-bad-exit: the processes end together by themselves.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
srun --cpu-bind=none "${PYTHON:-.venv/bin/python}" train.py "$@"
code=$?
if [ "$code" = 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
