#!/usr/bin/env bash
# Fine-tunes on 1 to N nodes with 0 to 8 GPUs each. Submit it from the project's folder; it needs no editing:
#
#   sbatch slurm/finetune.sh --config RECIPE.yaml [--key value ...]
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 16 --time 12:00:00 slurm/finetune.sh --config RECIPE.yaml
#
# Options before the script are sbatch's and override the lines below. Before the time limit the training writes a
# checkpoint and the job is requeued to continue from it, as often as needed. A job that has finished or failed is not
# requeued. Exit codes: 0 finished, 2 bad input, 3 diverged, 75 stopped with a checkpoint, 1 anything else.
#
#   slurm-JOB.out         each start of the job and how it ended
#   slurm-JOB-node0.out   output of the training, one file per node; node0 has the losses
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

# Each GPU has a process, which needs a core for itself and one for its threads.
gpus=${SLURM_GPUS_ON_NODE-0}
cpus=${SLURM_CPUS_PER_TASK-1}
if ((gpus > 0 && cpus < 2 * gpus)); then
    say "$cpus cores for $gpus GPUs would slow every step: submit it with --cpus-per-task $((4 * gpus)) (at least $((2 * gpus)))"
    exit 2
fi

# sbatch runs a copy of this script from a spool folder, so paths start at the folder that it was submitted from.
cd "$SLURM_SUBMIT_DIR"
command -v onecurve >/dev/null || PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH
# For containers (docs/slurm.md): options of srun, and a prefix of the command that each node runs.
read -ra srun_options <<<"${ONECURVE_SRUN_OPTIONS-}"
read -ra container <<<"${ONECURVE_CONTAINER-}"
if [[ -z ${srun_options[*]}${container[*]} ]] && ! command -v onecurve >/dev/null; then
    say "onecurve is not installed: run make setup, or submit from the project's folder or with its environment active"
    exit 2
fi

# Files between this shell and the nodes, on their shared disk: the stop request, rank 0's status, failed nodes.
control=$SLURM_SUBMIT_DIR/.onecurve-job-$SLURM_JOB_ID
mkdir -p "$control"
rm -f "$control/STOP" "$control/status.before.json" "$control/failed-node"*
[[ ! -f $control/status.json ]] || mv "$control/status.json" "$control/status.before.json"
export ONECURVE_STOP_FILE=$control/STOP
export ONECURVE_STATUS_FILE=$control/status.json

# Without these srun would not use all of the job's cores, and would inherit --export=NONE.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK-1}
unset SLURM_EXPORT_ENV
# Compute nodes often have no network, so a request to the hub would only time out; `onecurve fetch RECIPE` fills the
# cache beforehand.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1}

# USR1: the time limit is near. TERM: scancel or preemption; Slurm decides whether the job is requeued.
limit_is_near=0
job_is_ended=0
num_signals=0
# shellcheck disable=SC2329 # the traps call it
ask_for_stop() {
    : >"$ONECURVE_STOP_FILE"
    num_signals=$((num_signals + 1))
    say "$1: requested a checkpoint"
}
trap 'limit_is_near=1; ask_for_stop "the time limit is near"' USR1
trap 'job_is_ended=1; ask_for_stop "Slurm ends the job"' TERM

job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job+=" (${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID)"
say "job $job, start $((${SLURM_RESTART_COUNT-0} + 1)), on $SLURM_JOB_NODELIST; logs: slurm-$SLURM_JOB_ID-node*.out"
say "training $recipe ${words[*]}"

# One task per node. Each finds its rank inside the task, and starts the processes of its node. After a node has lost its
# power, srun waits: Slurm notices after SlurmdTimeout (300 s by default) and requeues the job.
# No signal is sent to the tasks, because torch's agent would die of it; they watch the STOP file instead.
# A node that fails writes its exit code to a file. The trap keeps the node's shell alive for that if the whole step is
# signalled.
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

# If a node fails before the training has started (rank 0 has written no status), the others would wait for it until srun
# gives up, so they are killed. The delay lets them report errors of their own. Later the ranks notice a lost node themselves.
(
    until compgen -G "$control/failed-node*" >/dev/null; do sleep 2; done
    sleep 20
    if [[ ! -f $control/status.json ]]; then
        say "a node failed before the training started: killing the others"
        scancel --signal=KILL "$SLURM_JOB_ID.0"
    fi
) &
node_watch=$!

# A controller that is busy or restarting refuses for some seconds; the job must be requeued all the same.
requeue() {
    local attempt answer
    for attempt in 1 2 3 4; do
        answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && return
        say "scontrol requeue: $answer"
        [[ $answer != *disabled* ]] || break # --no-requeue
        ((attempt == 4)) || sleep 5
    done
    return 1
}

# A signal interrupts `wait`; bash keeps the step's exit code until the next `wait`.
while true; do
    num_before=$num_signals
    code=0
    wait "$step" || code=$?
    ((num_signals > num_before)) || break
done
kill "$node_watch" 2>/dev/null || true

case $code in
    0)
        say "finished"
        rm -rf "$control"
        exit 0
        ;;
    75)
        # A single start without a step is tolerated: for a task of an array, Slurm may answer scancel with "try again
        # later" although the signal has arrived, and scancel sends it again, to the next start.
        num_idle=0
        if cmp -s "$control/status.json" "$control/status.before.json"; then
            # The file is missing if the last start lost its power.
            num_idle=$(($(cat "$control/num_idle" 2>/dev/null || echo 0) + 1))
        fi
        printf '%s\n' "$num_idle" >"$control/num_idle"
        if ((job_is_ended || !limit_is_near)); then
            say "stopped with a checkpoint, as requested; submit it again to continue"
        elif ((num_idle >= 2)); then
            say "no step was made in two starts: use a longer --time, or an earlier --signal=B:USR1@SECONDS"
        elif requeue; then
            say "requeued, to continue from the checkpoint"
            exit 75
        else
            say "this job could not be queued again; submit it again to continue"
        fi
        ;;
    *)
        # srun returns the highest exit code, which is that of the nodes that were killed because another one failed.
        failed=("$control"/failed-node*)
        if [[ -f ${failed[0]} ]]; then
            ((code < 128)) || code=$(cat "${failed[0]}")
        else
            failed=(node0)
        fi
        case $code in
            1 | 2 | 3) ;;
            126 | 127) code=2 ;; # no onecurve on the node or in the container
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
