#!/usr/bin/env bash
# Passes or fails the repository: lint, types, tests. Makes its own environment (see launch/install.sh).
#
#   bash launch/test.sh [--all | --collect-only]
#
#   --all            also the slow tests, tests/cluster, tests/faults, and the quickstart with a tenth of the steps
#   --collect-only   list the tests that would run and stop
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=fast
case "${1:-}" in
    "") ;;
    --all) mode=all ;;
    --collect-only) mode=collect ;;
    -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: unknown option $1; see launch/test.sh --help" >&2; exit 2 ;;
esac

bash launch/install.sh --dev || exit 1
source launch/environment.sh
# Every test process computes on one thread: they share the cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)))')"
workers=$((cores < 2 ? 2 : cores > 8 ? 8 : cores))
parallel=(-n "$workers" --dist worksteal)
apart=(--ignore=tests/cluster --ignore=tests/faults)

if [ "$mode" = collect ]; then
    exec python -m pytest --collect-only -q -m "not slow" "${apart[@]}"
fi

report=""
failed=0
part() { # part NAME COMMAND...: runs a part, notes its seconds, goes on when it fails
    local name="$1" start=$SECONDS verdict=passed
    shift
    printf '\n== %s\n' "$name"
    "$@" || { verdict=FAILED; failed=1; }
    report+="$(printf '%-18s %5d s  %s' "$name" $((SECONDS - start)) "$verdict")"$'\n'
}

part "ruff" ruff check .
part "mypy" mypy
part "tests" python -m pytest -q --durations=10 "${parallel[@]}" -m "not slow" "${apart[@]}"
if [ "$mode" = all ]; then
    part "slow tests" python -m pytest -q --durations=10 "${parallel[@]}" -m slow "${apart[@]}"
    part "tests/faults" python -m pytest -q -rs --durations=10 -n "$workers" --dist loadfile tests/faults
    # One cluster with its daemons at a time.
    part "tests/cluster" python -m pytest -q -rs --durations=10 tests/cluster
    rm -rf runs/smoke # parts of an earlier run would not be run again
    part "quickstart" bash launch/quickstart.sh --smoke
fi

printf '\n%s%-18s %5d s\n' "$report" "total" "$SECONDS"
exit "$failed"
