#!/usr/bin/env bash
# One recipe with many settings: a job array with one trial per task, each in its own run directory. `onecurve sweep
# SWEEP.yaml --slurm` counts the trials and submits this twice; by hand, for 4 trials, at most 2 of them at a time:
#
#   sbatch --array 0-3%2 slurm/sweep.sh --sweep SWEEP.yaml [--key value ...]
#   sbatch --dependency afterany:JOB slurm/sweep.sh --sweep SWEEP.yaml [--key value ...]
#
# The first is the array: each task runs slurm/finetune.sh with the settings of its trial. The second, without an array,
# compares the trials. docs/sweep.md describes the sweep file.
#
#SBATCH --job-name=onecurve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -euo pipefail

if [[ -z ${SLURM_JOB_ID-} ]]; then
    printf 'onecurve: this is a batch script: onecurve sweep SWEEP.yaml --slurm\n' >&2
    exit 2
fi

cd "$SLURM_SUBMIT_DIR"
command -v onecurve >/dev/null || export PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH
if ! onecurve=$(command -v onecurve); then
    printf 'onecurve: not installed: run make setup, or submit from the project folder or with its environment active\n' >&2
    exit 2
fi

task=()
if [[ -n ${SLURM_ARRAY_TASK_ID-} ]]; then
    task=(--task "$SLURM_ARRAY_TASK_ID")
fi
python=${onecurve%/*}/python
[[ -x $python ]] || python=python3
mapfile -d '' -t words < <("$python" -P -m onecurve.launcher.cluster.sweep "${task[@]}" "$@")
wait "$!" # The exit code of the command that mapfile read; if it is not 0, this shell exits with it.

# exec, because Slurm sends its signals to this process.
export COLUMNS=${COLUMNS-160}
exec "${words[@]}"
