# shellcheck shell=bash
# Jobs that go on where they were stopped. To be sourced.

readonly REQUEUE_ME=75 # the exit code of `pnode-dist train` once it has saved a snapshot because it was told to stop

# run_and_requeue COMMAND...: ends with the command's exit code, or queues this job again if it asks for that.
run_and_requeue() {
    local step status=0 taken_away=no
    # Slurm tells the ranks themselves. A job that is cancelled stays so; one that it preempts it requeues by itself.
    trap 'taken_away=yes' TERM
    "$@" &
    step=$!
    while :; do
        status=0
        wait "$step" || status=$?
        # A signal ends the waiting too.
        kill -0 "$step" 2>/dev/null || break
    done
    if [ "$status$taken_away" = "${REQUEUE_ME}no" ]; then
        printf 'job %s has stopped in time and is queued again (restart %d)\n' "$SLURM_JOB_ID" $((${SLURM_RESTART_COUNT:-0} + 1))
        trap - TERM
        scontrol requeue "$SLURM_JOB_ID"
        exec sleep 60 # Slurm ends this run of the job now
    fi
    exit "$status"
}
