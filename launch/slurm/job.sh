# Sourced by the job scripts of this folder, which have set repository and run_dir. Says what happens in the job's output.

logs="$run_dir/slurm"
mkdir -p "$logs"
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
source "$repository/launch/environment.sh"
source "$repository/launch/cluster_environment.sh"

say() { printf '== %s  job %s, start %d: %s\n' "$(date '+%F %T')" "$job" "${SLURM_RESTART_COUNT:-0}" "$*"; }

# How programs of the ranks start: options of srun, and words before `python`. The job script of containers sets them.
options=()
inside=()

# choose_nodes N: sets `hosts` to N nodes of the job, MASTER_ADDR to the first. Where the job has more than N, those that
# do not answer or that launch/doctor.py finds sick are left out.
choose_nodes() {
    local all
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [ "${#all[@]}" -gt "$1" ]; then
        mapfile -t all < <(answering "${all[@]}")
        [ "${#all[@]}" -lt "$1" ] || mapfile -t all < <(healthy "${all[@]}")
    fi
    if [ "${#all[@]}" -lt "$1" ]; then
        say "only ${#all[@]} healthy nodes (${all[*]}) and $1 needed: see the lines above, and $logs/$job.doctor.json"
        finish 1
    fi
    hosts="$(IFS=,; echo "${all[*]:0:$1}")"
    export MASTER_ADDR="${all[0]}"
    say "nodes $hosts"
}

# answering NODE...: those on which Python starts. One step each: srun gives up a whole step for one node that fails.
answering() {
    local node answers=()
    for node in "$@"; do
        timeout --kill-after=10 120 srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$node" --cpu-bind=none \
            "${options[@]}" "${inside[@]}" python -c "import torch, megacog" >/dev/null &
        answers+=("$!")
    done
    for node in "$@"; do
        if wait "${answers[0]}"; then
            echo "$node"
        else
            say "$node is sick: it does not start Python with torch and megacog within 120 s" >&2
        fi
        answers=("${answers[@]:1}")
    done
}

# healthy NODE...: those that the doctor finds healthy; all of them when it comes to no end.
healthy() {
    local nodes said report="$logs/$job.doctor.json"
    nodes="$(IFS=,; echo "$*")"
    rm -f "$report"
    said="$(timeout --kill-after=10 600 srun --nodes="$#" --ntasks=$(($# * SLURM_NTASKS_PER_NODE)) --nodelist="$nodes" \
        --cpu-bind=none "${options[@]}" "${inside[@]}" \
        python "$repository/launch/doctor.py" --folder "$run_dir" --report "$report")"
    if [ -s "$report" ]; then
        grep -xF "$(printf '%s\n' "$@")" <<<"$said" # nothing else that libraries print there
    else
        say "the doctor came to no end, so nodes that answer count as healthy: see the lines above" >&2
        printf '%s\n' "$@"
    fi
}

next_job() { # next_job WHY: the same job again, or the next one of a chain
    # From here, not from Python: there is no scontrol in most containers.
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] || scontrol requeue "$SLURM_JOB_ID"; then
        say "$1: goes on in the next job"
    else
        say "$1, and SLURM does not requeue this job: submit it again to go on"
    fi
}

last_job() { # nothing is left to do for the rest of a chain
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
}

place() { # how far the job has come
    cat "$run_dir/checkpoints/latest" 2>/dev/null || echo "no checkpoint"
}

# finish CODE: ends the job with the exit code of its program, after having arranged what follows from it.
finish() {
    local newest faults="$logs/$job.faults"
    case "$1" in
        0) say "done"; last_job ;;
        85)
            if [ -e "$run_dir/STOP" ]; then
                say "saved and stopped by $run_dir/STOP: not started again"
                last_job
            else
                next_job "saved and stopped"
            fi
            ;;
        2 | 75) say "wrong configuration or command line (exit code $1): not started again"; last_job ;;
        *)
            newest="$(place)"
            echo "$newest" >>"$faults"
            if [ "$(tail -n 3 "$faults" | grep -cFx -- "$newest")" = 3 ]; then
                say "failed (exit code $1) three times in a row at the same place ($newest): given up"
                last_job
            else
                next_job "failed (exit code $1) after $newest"
            fi
            ;;
    esac
    exit "$1"
}
