# Sourced by the job scripts of this folder, which have set repository and run_dir. Says what happens in the job's output.

logs="$run_dir/slurm"
mkdir -p "$logs"
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
source "$repository/launch/environment.sh"
source "$repository/launch/cluster_environment.sh"

say() { printf '== %s  job %s, start %d: %s\n' "$(date '+%F %T')" "$job" "${SLURM_RESTART_COUNT:-0}" "$*"; }

# choose_nodes N: sets `hosts` to N nodes of the job, MASTER_ADDR to the first. Where the job has more than N, those that
# launch/doctor.py finds sick are left out.
choose_nodes() {
    local all report="$logs/$job.doctor.json"
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [ "${#all[@]}" -gt "$1" ]; then
        srun --time=10 --cpu-bind=none python "$repository/launch/doctor.py" --folder "$run_dir" --json >"$report"
        mapfile -t all < <(python - "$report" "${all[@]}" <<'PYTHON'
import json, sys
with open(sys.argv[1]) as file:
    report = json.load(file)
for node, checks in report["nodes"].items():
    for check in checks:
        if check["verdict"] == "sick":
            print(f"{node} is sick: {check['name']}: {check['value']}; {check['fix']}", file=sys.stderr)
print(*(node for node in sys.argv[2:] if node in report["nodes"] and node not in report["sick"]), sep="\n")
PYTHON
        )
    fi
    if [ "${#all[@]}" -lt "$1" ]; then
        say "only ${#all[@]} healthy nodes (${all[*]}) and $1 needed: see $report"
        finish 1
    fi
    hosts="$(IFS=,; echo "${all[*]:0:$1}")"
    export MASTER_ADDR="${all[0]}"
    say "nodes $hosts"
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
