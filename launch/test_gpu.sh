#!/usr/bin/env bash
# Checks and measures kernels and training on one GPU: everything that docs/benchmarks.md lists as not measured yet.
#
#   bash launch/test_gpu.sh OUT [PART ...]
#
#   OUT   folder for logs and json files
#   PART  tests (pytest tests/kernels, compiled), sanitizer (compute-sanitizer on small shapes), kernels, fused,
#         cross_entropy, generate, tiles (benchmarks), doctor, train (benchmark of the 9B model), predict and memorize (proofs
#         with the 9B model), digits (trains and judges 144M parameters; after `launch/digits_gpu.sh data`), fits (a step of
#         the 9B model within 44 GiB). Default: tests, sanitizer, kernels, fused, cross_entropy, generate. Each takes less than ten minutes; one that fails stops no other.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    "" | -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
esac
out="$1"
shift
parts=("$@")
[ "${#parts[@]}" -gt 0 ] || parts=(tests sanitizer kernels fused cross_entropy generate)

source launch/environment.sh
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}"
unset TRITON_INTERPRET
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" # the 9B model fills a card
python -c 'import torch' || { echo "error: no torch here; bash launch/install.sh --dev installs it" >&2; exit 1; }
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no CUDA device")' || exit 1
mkdir -p "$out" || exit 1

small=(tests/kernels/test_attention_kernels.py tests/kernels/test_decode_attention.py tests/kernels/test_norm.py
    tests/kernels/test_mix.py tests/kernels/test_cross_entropy.py)
report=""
failed=0
for part in "${parts[@]}"; do
    case "$part" in
        tests) command=(python -m pytest -q -m "not slow" --durations=5 tests/kernels tests/generation/test_replay.py) ;;
        sanitizer) # plain allocations, so that each tensor has bounds of its own
            command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9
                --target-processes all python -m pytest -q -x "${small[@]}") ;;
        kernels | fused | cross_entropy | generate | tiles)
            command=(python launch/benchmark.py "$part" --json "$out/$part.json") ;;
        doctor) command=(python launch/doctor.py --folder "$out") ;;
        train) command=(python launch/benchmark.py train --json "$out/train.json") ;;
        predict) command=(python launch/prove.py predict --json "$out/predict.json") ;;
        memorize) # 37 GB for some minutes
            command=(python launch/prove.py memorize "${MEMORIZE_DIR:-runs/memorize}" --json "$out/memorize.json") ;;
        digits) command=(bash -c "bash launch/digits_gpu.sh train && cp runs/digits-100m/evaluation/report.json '$out/digits.json'") ;;
        fits) command=(python launch/prove.py fits) ;;
        *) echo "error: unknown part $part; see launch/test_gpu.sh --help" >&2; exit 2 ;;
    esac
    printf '\n== %s\n' "$part"
    start=$SECONDS verdict=passed
    "${command[@]}" 2>&1 | tee "$out/$part.log" || { verdict=FAILED; failed=1; }
    report+="$(printf '%-14s %5d s  %s' "$part" $((SECONDS - start)) "$verdict")"$'\n'
done
printf '\n%s' "$report" | tee "$out/report.txt"
exit "$failed"
