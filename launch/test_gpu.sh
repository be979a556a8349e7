#!/usr/bin/env bash
# Checks and measures kernels and training on one GPU: everything that docs/benchmarks.md lists as not measured yet.
#
#   bash launch/test_gpu.sh [--wheels FOLDER] OUT [PART ...]
#
#   --wheels  folder of wheels (launch/fetch_wheels.sh) that are installed for this run, in a folder of their own
#   OUT       folder for logs and json files
#   PART      with torch, triton, pytest and hypothesis:
#               tests (pytest tests/kernels, compiled), sanitizer (compute-sanitizer on small shapes);
#               kernels, fused, cross_entropy, fp8_products, tiles (benchmarks)
#             and pydantic with its three packages, pyyaml, safetensors, tqdm, sentencepiece, h5py:
#               replay (pytest tests/generation/test_replay.py: CUDA graphs), generate (benchmark of the 9B model), doctor,
#               train (benchmark of the 9B model), any_order (the same with train.deterministic=false), predict and
#               memorize (proofs with the 9B model; memorize takes 37 GB of /dev/shm or of MEMORIZE_DIR, and key=value
#               from MEMORIZE_SETTINGS), fp8 (loss gap of a base in e4m3)
#             and scikit-learn, and runs/digits-100m from `launch/digits_gpu.sh data`:
#               digits (trains and judges 144M parameters; mp4 files with av only)
#             and deepspeed, hjson:
#               fits (a step of the 9B model within 42.9 GiB)
#             Default: tests, replay, sanitizer, kernels, fused, cross_entropy, generate. Each takes less than ten
#             minutes; one that fails stops no other. What is missing is said before the first one starts.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheels=""
while :; do
    case "${1:-}" in
        "" | -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        --wheels) wheels="${2:-}"; shift $(($# < 2 ? $# : 2)) ;;
        --*) echo "error: unknown option $1; see launch/test_gpu.sh --help" >&2; exit 2 ;;
        *) break ;;
    esac
done
out="$1"
shift
parts=("$@")
[ "${#parts[@]}" -gt 0 ] || parts=(tests replay sanitizer kernels fused cross_entropy generate)

source launch/environment.sh
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}"
unset TRITON_INTERPRET
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" # the 9B model fills a card

small=(tests/kernels/test_attention_kernels.py tests/kernels/test_decode_attention.py tests/kernels/test_norm.py
    tests/kernels/test_mix.py tests/kernels/test_cross_entropy.py)
memorize_dir="${MEMORIZE_DIR:-runs/memorize}" # 37 GB, which memory takes faster than a disk
shared="/dev/shm/megacog-memorize.$$"
if [ -z "${MEMORIZE_DIR:-}" ] && [ "$(df -k --output=avail /dev/shm 2>/dev/null | tail -n 1)" -ge 45000000 ] 2>/dev/null; then
    memorize_dir="$shared"
fi
scratch=""
trap 'rm -rf "$shared" ${scratch:+"$scratch"}' EXIT

# plan PART: sets `command`, and `needs`: modules, and paths with a slash
plan() {
    local package=(pydantic pydantic_core annotated_types typing_inspection yaml safetensors tqdm sentencepiece h5py)
    local settings=()
    needs=(torch triton numpy)
    case "$1" in
        tests | replay | sanitizer) needs+=(pytest hypothesis) ;;
    esac
    case "$1" in
        replay | generate | doctor | train | any_order | predict | memorize | fp8 | digits | fits) needs+=("${package[@]}") ;;
    esac
    case "$1" in
        tests) command=(python -m pytest -q -m "not slow" --durations=5 tests/kernels) ;;
        replay) command=(python -m pytest -q -m "not slow" tests/generation/test_replay.py) ;;
        sanitizer) # plain allocations, so that each tensor has bounds of its own
            command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9
                --target-processes all python -m pytest -q -x "${small[@]}") ;;
        kernels | fused | cross_entropy | fp8_products | generate | tiles | train)
            command=(python launch/benchmark.py "$1" --json "$out/$1.json") ;;
        any_order)
            command=(python launch/benchmark.py train --only "sequential, micro batch 8" --json "$out/any_order.json"
                train.deterministic=false) ;;
        doctor) command=(python launch/doctor.py --folder "$out") ;;
        predict | fp8) command=(python launch/prove.py "$1" --json "$out/$1.json") ;;
        memorize)
            read -r -a settings <<<"${MEMORIZE_SETTINGS:-}"
            command=(python launch/prove.py memorize "$memorize_dir" --save-at 50 --seconds 480 --json "$out/memorize.json"
                ${settings[@]+"${settings[@]}"}) ;;
        digits)
            needs+=(sklearn runs/digits-100m/judge)
            command=(bash -c "bash launch/digits_gpu.sh train && cp runs/digits-100m/evaluation/report.json '$out/digits.json'") ;;
        fits)
            needs+=(deepspeed hjson)
            command=(python launch/prove.py fits) ;;
        *) echo "error: unknown part $1; see launch/test_gpu.sh --help" >&2; exit 2 ;;
    esac
}

lacks() { # lacks NEED...: those that are not here, on one line
    python - "$@" <<'PYTHON'
import importlib.util
import os
import sys

there = (os.path.exists(need) if "/" in need else importlib.util.find_spec(need) for need in sys.argv[1:])
print(*(need for need, found in zip(sys.argv[1:], there) if not found))
PYTHON
}

if [ -n "$wheels" ]; then
    ls "$wheels"/*.whl >/dev/null 2>&1 ||
        { echo "error: no wheels in $wheels; bash launch/fetch_wheels.sh $wheels fetches them where a network is" >&2; exit 1; }
    scratch="$(mktemp -d)"
    python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$scratch:$PYTHONPATH"
fi
declare -A missing
for part in "${parts[@]}"; do
    plan "$part"
    missing[$part]="$(lacks "${needs[@]}")" || exit 1
    [ -z "${missing[$part]}" ] || echo "part $part will not run: ${missing[$part]} missing here (see --help)" >&2
done
python -c 'import torch' || { echo "error: no torch here; bash launch/install.sh --dev installs it" >&2; exit 1; }
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no CUDA device")' || exit 1
mkdir -p "$out" || exit 1

report=""
failed=0
for part in "${parts[@]}"; do
    plan "$part"
    printf '\n== %s\n' "$part"
    start=$SECONDS verdict=passed
    if [ -n "${missing[$part]}" ]; then
        verdict="NOT RUN: ${missing[$part]} missing" failed=1
    else
        "${command[@]}" 2>&1 | tee "$out/$part.log" || { verdict=FAILED; failed=1; }
    fi
    report+="$(printf '%-14s %5d s  %s' "$part" $((SECONDS - start)) "$verdict")"$'\n'
done
printf '\n%s' "$report" | tee "$out/report.txt"
exit "$failed"
