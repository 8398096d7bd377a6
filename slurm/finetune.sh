#!/usr/bin/env bash
# Fine-tunes on 1 to N nodes with 0 to 8 GPUs each. Submit it from the project's folder as it is:
#
#   sbatch slurm/finetune.sh --config RECIPE.yaml [--key value ...]
#   sbatch --nodes 2 --gpus-per-node 4 --time 12:00:00 slurm/finetune.sh --config RECIPE.yaml
#
# Options in front of the script are sbatch's and beat the lines below. Before the time limit the training writes a
# checkpoint and the job goes back into the queue; it goes on from there, as often as it takes. It is not queued again
# when it has finished or failed. Exit codes: 0 finished, 2 bad input, 3 diverged, 75 stopped with a checkpoint, 1 else.
#
#   slurm-JOB.out         what became of the job, start by start
#   slurm-JOB-node0.out   what the training says, a file for each node; node0 has the losses
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

say() {
    printf 'onecurve: %s\n' "$*" >&2
}

if [[ -z ${SLURM_JOB_ID-} ]]; then
    say "this is a batch script: sbatch ${BASH_SOURCE[0]} --config RECIPE.yaml (without Slurm: onecurve run RECIPE.yaml)"
    exit 2
fi

recipe=""
words=()
while (($#)); do
    case $1 in
        --config)
            recipe=${2-}
            shift $(($# > 1))
            ;;
        --config=*) recipe=${1#*=} ;;
        *) words+=("$1") ;;
    esac
    shift
done
if [[ -z $recipe ]]; then
    say "no recipe: sbatch slurm/finetune.sh --config RECIPE.yaml [--key value ...]"
    exit 2
fi

# sbatch runs a copy of this script from a spool folder: only the place it was submitted from is known.
cd "$SLURM_SUBMIT_DIR"
command -v onecurve >/dev/null || PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH
# For containers (docs/slurm.md): options of srun, and a command in front of the one that each node runs.
read -ra srun_options <<<"${ONECURVE_SRUN_OPTIONS-}"
read -ra container <<<"${ONECURVE_CONTAINER-}"
if [[ -z ${srun_options[*]}${container[*]} ]] && ! command -v onecurve >/dev/null; then
    say "onecurve is not installed: run make setup, or submit from the project's folder or an active environment"
    exit 2
fi

# Where this shell and the nodes talk to each other, on the disk that they share; rank 0 writes the status.
control=$SLURM_SUBMIT_DIR/.onecurve-job-$SLURM_JOB_ID
mkdir -p "$control"
rm -f "$control/STOP" "$control/status.before.json" "$control/failed-node"*
[[ ! -f $control/status.json ]] || mv "$control/status.json" "$control/status.before.json"
export ONECURVE_STOP_FILE=$control/STOP
export ONECURVE_STATUS_FILE=$control/status.json

# srun does not take over the job's cores by itself, and would take over --export=NONE.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK-1}
unset SLURM_EXPORT_ENV
# Compute nodes often have no network, where asking the hub means to wait; `onecurve fetch RECIPE` fills the cache before.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1}

# The time limit is near; or scancel or preemption, where Slurm decides what becomes of the job.
limit_is_near=0
job_is_ended=0
num_signals=0
# shellcheck disable=SC2329 # the traps call it
ask_for_stop() {
    : >"$ONECURVE_STOP_FILE"
    num_signals=$((num_signals + 1))
    say "$1: asked for a checkpoint"
}
trap 'limit_is_near=1; ask_for_stop "the time limit is near"' USR1
trap 'job_is_ended=1; ask_for_stop "Slurm ends the job"' TERM

job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job+=" (${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID)"
say "job $job, start $((${SLURM_RESTART_COUNT-0} + 1)), on $SLURM_JOB_NODELIST; logs: slurm-$SLURM_JOB_ID-node*.out"
say "trains $recipe ${words[*]}"

# One task a node. Each finds its rank inside the task, and starts the processes of its node. A node that lost its power is
# waited for: Slurm misses it after SlurmdTimeout (300 s by default), and queues the job again.
# No signal reaches them: torch's agent would die of it. The STOP file is what they look for.
# A node that fails says so to this shell; a signal to the whole step must not end the shell that waits for that.
# shellcheck disable=SC2016 # expanded on the node
on_node='trap : HUP INT TERM USR1
"$@"
code=$?
case $code in 0 | 75) ;; *) echo "$code" >"$0/failed-node$SLURM_NODEID" ;; esac
exit "$code"'
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=600 \
    --open-mode=append --output="slurm-$SLURM_JOB_ID-node%n.out" \
    "${srun_options[@]}" sh -c "$on_node" "$control" "${container[@]}" onecurve run "$recipe" "${words[@]}" &
step=$!

# Before the training begins, which rank 0's status tells, the others would wait for a node that has failed until srun gives
# up. They get some seconds to say what they have found themselves. Later they see by themselves that one is missing.
(
    until compgen -G "$control/failed-node*" >/dev/null; do sleep 2; done
    sleep 20
    if [[ ! -f $control/status.json ]]; then
        say "a node failed before the training began: the others are ended"
        scancel --signal=KILL "$SLURM_JOB_ID.0"
    fi
) &
lookout=$!

# A controller that is busy or starting anew refuses for some seconds; that must not end a chain of starts.
queue_again() {
    local attempt answer
    for attempt in 1 2 3 4; do
        answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && return
        say "scontrol requeue: $answer"
        [[ $answer != *disabled* ]] || break # --no-requeue
        ((attempt == 4)) || sleep 5
    done
    return 1
}

# A signal interrupts `wait`; bash remembers how the step ended until it is asked once more.
while true; do
    num_before=$num_signals
    code=0
    wait "$step" || code=$?
    ((num_signals > num_before)) || break
done
kill "$lookout" 2>/dev/null || true

case $code in
    0)
        say "finished"
        rm -rf "$control"
        exit 0
        ;;
    75)
        # One start without a step is not yet a job that gets nowhere: for a task of an array, scancel may hear "try again
        # later" from Slurm although its signal has arrived, and sends it once more, into the next start.
        num_idle=0
        if cmp -s "$control/status.json" "$control/status.before.json"; then
            # No file where the last start lost its power.
            num_idle=$(($(cat "$control/num_idle" 2>/dev/null || echo 0) + 1))
        fi
        printf '%s\n' "$num_idle" >"$control/num_idle"
        if ((job_is_ended || !limit_is_near)); then
            say "stopped with a checkpoint, as asked; submit it again to go on"
        elif ((num_idle >= 2)); then
            say "no step was made in two starts: ask for more --time, or an earlier --signal=B:USR1@SECONDS"
        elif queue_again; then
            say "queued again, to go on from the checkpoint"
            exit 75
        else
            say "this job could not be queued again; submit it again to go on"
        fi
        ;;
    *)
        # srun tells the highest code, which is that of the nodes that were ended because another had failed.
        failed=("$control"/failed-node*)
        if [[ -f ${failed[0]} ]]; then
            ((code < 128)) || code=$(cat "${failed[0]}")
        else
            failed=(node0)
        fi
        case $code in
            1 | 2 | 3) ;;
            126 | 127) code=2 ;; # there is no onecurve on the node, or in the container
            *) code=1 ;;         # a node's launcher was killed
        esac
        for node in "${failed[@]##*failed-}"; do
            say "failed with exit code $code; the last lines of slurm-$SLURM_JOB_ID-$node.out:"
            tail -n 10 "slurm-$SLURM_JOB_ID-$node.out" >&2 || true
        done
        ;;
esac
rm -rf "$control"
exit "$code"
