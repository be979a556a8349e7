#!/usr/bin/env bash
# The demo at 64 x 64 pixels with 144 million parameters on one GPU, with torch alone (no DeepSpeed).
#
#   bash launch/digits_gpu.sh data  [FOLDER]    corpus, tokenizers, shards and judge, on a CPU: FOLDER can be moved then
#   bash launch/digits_gpu.sh train [FOLDER]    three stages, 40 clips, digit and direction accuracy
#
#   FOLDER  default: runs/digits-100m
#
# DIGITS_STEPS (default "1500 1500 900") are the steps of the stages, DIGITS_CLIPS (960) is the size of the corpus,
# DIGITS_SETTINGS are further key=value for all stages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    data | train) action="$1" ;;
    -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: data or train; see launch/digits_gpu.sh --help" >&2; exit 2 ;;
esac
folder="${2:-runs/digits-100m}"
read -r base_steps sequential_steps interpolation_steps <<<"${DIGITS_STEPS:-1500 1500 900}"
clips="${DIGITS_CLIPS:-960}"
tokenizer_steps=$((clips < 960 ? 20 : 600))
read -r -a settings <<<"${DIGITS_SETTINGS:-}"

source launch/environment.sh
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}"

shards() { # shards SPLIT
    python launch/prepare.py run "$folder/corpus/$1/captions.csv" --out "$folder/shards/$1" \
        --tokenizer "$folder/frame_tokenizer" --fps 8 --size 64
}

stage() { # stage NAME RUN_DIR STEPS key=value...
    local stage="$1" run_dir="$2" steps="$3"
    shift 3
    python launch/pretrain.py --config configs/digits-100m.yaml \
        train.stage="$stage" train.run_dir="$run_dir" train.steps="$steps" \
        tokenizer.text="$folder/text_tokenizer" tokenizer.frames="$folder/frame_tokenizer" \
        "data.train=[{path: $folder/shards/train-*.h5}]" "$@" ${settings[@]+"${settings[@]}"}
}

if [ "$action" = data ]; then
    python launch/prepare.py digits "$folder/corpus" --clips "$clips" --heldout-clips 80 --scans-per-digit 12 --force
    python launch/train_tokenizer.py text "$folder/corpus/train/captions.csv" --out "$folder/text_tokenizer" \
        --vocab-size 96 --template '{span}s' --null-caption 'a digit moves' --force
    python launch/train_tokenizer.py frames "$folder/corpus/train" --heldout "$folder/corpus/heldout" \
        --out "$folder/frame_tokenizer" --steps "$tokenizer_steps" --size 64 --downsample 4 --levels 8,5,5 \
        --max-videos 600 --frames-per-video 16 --force
    shards train
    python - "$folder/judge" <<'PYTHON'
import sys
from pathlib import Path

from megacog.evaluation.judge import load_or_train_judge

load_or_train_judge(Path(sys.argv[1]))
PYTHON
    echo "made $folder; only its text_tokenizer, frame_tokenizer, shards and judge are needed to train"
    exit 0
fi

start=$SECONDS
stage base "$folder/base" "$base_steps"
stage sequential "$folder/sequential" "$sequential_steps" model.inherit="$folder/base/export"
stage interpolation "$folder/whole" "$interpolation_steps" model.inherit="$folder/sequential/export" \
    model.plus_from=sequential
echo "trained in $((SECONDS - start)) s"
# Real clips to compare with are drawn from scikit-learn's scans.
real=80
python -c 'import sklearn' 2>/dev/null || real=0
python launch/evaluate.py "$folder/whole/export" --clips 40 --real-clips "$real" --out "$folder/evaluation" \
    --judge-cache "$folder/judge"
echo "$((SECONDS - start)) s in all; report: $folder/evaluation/report.json"
