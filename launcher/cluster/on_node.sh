# shellcheck shell=bash disable=SC2154
# Every node of a job runs this, after the lines that set what its platform says: ONECURVE_NUM_NODES and its like, the
# folder $control on a disk that the nodes share, and the function `train`.

say() {
    printf 'onecurve: %s\n' "$*" >&2
}

# The node that is asked to end writes the stop request where rank 0, on whichever node, sees it.
export ONECURVE_STOP_FILE=$control/STOP
export ONECURVE_STATUS_FILE=$control/status.json
mkdir -p "$control"
[[ ${ONECURVE_NODE_RANK-0} != 0 ]] || rm -f "$ONECURVE_STOP_FILE"

num_signals=0
# shellcheck disable=SC2329 # the trap calls it
pass_on() {
    num_signals=$((num_signals + 1))
    kill -TERM "$training" 2>/dev/null || true
}
train &
training=$!
trap pass_on TERM INT
# A signal interrupts `wait`; bash keeps the exit code until the next `wait`.
while true; do
    num_before=$num_signals
    code=0
    wait "$training" || code=$?
    ((num_signals > num_before)) || break
done

case $code in
    0)
        [[ ${ONECURVE_NODE_RANK-0} != 0 ]] || rm -rf "$control"
        ;;
    75)
        if [[ -f $ONECURVE_STOP_FILE ]]; then
            say "stopped with a checkpoint because the platform ends this job; its next start continues"
        else
            say "stopped with a checkpoint, as requested by the file STOP; start the job again to continue"
            code=76 # so that the platform does not start it again
        fi
        ;;
    126 | 127) code=2 ;; # no onecurve on this node
    1 | 2 | 3) ;;
    *) code=1 ;; # killed
esac
exit "$code"
