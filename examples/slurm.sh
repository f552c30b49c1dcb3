#!/usr/bin/env bash
# Share a job list among the tasks of a Slurm array, one GPU each, without Ray:
#
#     sbatch --array=0-7 examples/slurm.sh
#
# Each task does the part of the jobs that its number names, and writes a journal of its own into one output folder on a
# file system that all nodes see. Submit it again and what is left is done; a task that is requeued goes on where it was.
#SBATCH --job-name=emt
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=emt-%A-%a.log
set -euo pipefail

CLIPS=${CLIPS:-clips}
PROMPTS=${PROMPTS:-prompts.txt}
MODEL=${MODEL:-models/rv}
OUT=${OUT:-out}

# The parts are those of the whole array, whichever of its tasks are submitted: 0 to n-1.
first=${SLURM_ARRAY_TASK_MIN:-0}
shard="$((${SLURM_ARRAY_TASK_ID:-0} - first))/${SHARDS:-${SLURM_ARRAY_TASK_COUNT:-1}}"

# Two minutes before the time is up, Slurm sends SIGTERM here: emt finishes its running batch and ends with 130.
emt transfer "$CLIPS" --prompts "$PROMPTS" --model "$MODEL" --out "$OUT" --shard "$shard" "$@" &
trap 'kill -TERM $! 2>/dev/null || true' TERM INT
code=0
wait $! || code=$?
if [ "$code" -gt 128 ] && kill -0 $! 2>/dev/null; then # the signal ended the waiting, not emt
    code=0
    wait $! || code=$?
fi
if [ "$code" -eq 130 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
