#!/usr/bin/env bash
# From nothing to judged clips: makes a corpus of moving digits, trains both tokenizers, prepares shards,
# pretrains the three stages with DeepSpeed, generates a clip for every caption and judges the clips.
#
#   bash launch/quickstart.sh [--smoke]
#
#   --smoke   every part with a tenth of the work, in runs/smoke; the clips will look bad
#
# Needs Python >= 3.11 and two CPU cores. Interrupted, it continues where it was when run again; to start over,
# remove runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=quickstart divisor=1 corpus_clips=960 judged_clips=40
case "${1:-}" in
    "") ;;
    --smoke) name=smoke divisor=10 corpus_clips=120 judged_clips=4 ;;
    -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: unknown option $1; see launch/quickstart.sh --help" >&2; exit 2 ;;
esac

bash launch/install.sh
source launch/environment.sh

run=runs/$name
mkdir -p "$run/parts"
started=$SECONDS

# Parts are kept only together with the settings that made them.
settings="$(cat launch/quickstart.sh configs/digits.yaml | cksum)"
if [ -f "$run/settings" ] && [ "$(cat "$run/settings")" != "$settings" ]; then
    echo "error: $run was begun with another launch/quickstart.sh or configs/digits.yaml;" \
        "remove it to start over: rm -r $run" >&2
    exit 2
fi
echo "$settings" >"$run/settings"

part() { # part NAME COMMAND...: run a part of the demo once and note its seconds
    local part="$1" start=$SECONDS
    shift
    if [ -f "$run/parts/$part" ]; then
        printf '\n== %s: done before in %s s\n' "$part" "$(cat "$run/parts/$part")"
        return
    fi
    printf '\n== %s (%d s so far)\n' "$part" $((SECONDS - started))
    "$@"
    echo $((SECONDS - start)) >"$run/parts/$part"
}

shards() { # shards SPLIT: code one split of the corpus
    python launch/prepare.py run "$run/corpus/$1/captions.csv" --out "$run/shards/$1" \
        --tokenizer "$run/frame_tokenizer" --fps 8 --size 32
}

stage() { # stage NAME RUN_DIR STEPS key=value...: pretrain one stage on two ranks
    local stage="$1" run_dir="$2" steps=$(($3 / divisor))
    shift 3
    deepspeed --num_accelerators 2 launch/pretrain.py --config configs/digits.yaml \
        train.stage="$stage" train.run_dir="$run_dir" train.steps="$steps" \
        tokenizer.text="$run/text_tokenizer" tokenizer.frames="$run/frame_tokenizer" \
        "data.train=[{path: $run/shards/train-*.h5}]" "data.eval=[{path: $run/shards/heldout-*.h5}]" "$@"
}

part corpus python launch/prepare.py digits "$run/corpus" --clips "$corpus_clips" --heldout-clips 80 \
    --scans-per-digit 12 --force
part text_tokenizer python launch/train_tokenizer.py text "$run/corpus/train/captions.csv" \
    --out "$run/text_tokenizer" --vocab-size 96 --template '{span}s' --null-caption 'a digit moves' --force
part frame_tokenizer python launch/train_tokenizer.py frames "$run/corpus/train" --heldout "$run/corpus/heldout" \
    --out "$run/frame_tokenizer" --steps $((300 / divisor)) --size 32 --downsample 4 --levels 5,5 \
    --max-videos 600 --frames-per-video 16 --force
part train_shards shards train
part heldout_shards shards heldout
part base stage base "$run/base" 700
part sequential stage sequential "$run/sequential" 860 model.inherit="$run/base/export" \
    train.global_batch_size=8 train.micro_batch_size=4
part interpolation stage interpolation "$run" 450 model.inherit="$run/sequential/export" \
    model.plus_from=sequential train.global_batch_size=8 train.micro_batch_size=4
part evaluation python launch/evaluate.py "$run/export" --clips "$judged_clips" --out "$run/evaluation" \
    --judge-cache "$run/judge"

python - "$run" <<'PYTHON'
"""The evaluation's report with the seconds of every part."""
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
report = json.loads((run / "evaluation/report.json").read_text())
seconds = {part.name: int(part.read_text()) for part in (run / "parts").iterdir()}
report["seconds"] = dict(sorted(seconds.items()))
(run / "report.json").write_text(json.dumps(report, indent=1) + "\n")
print(f"\ndigit accuracy {report['digit_accuracy']:.2f}, direction accuracy {report['direction_accuracy']:.2f}, "
      f"{len(report['clips'])} clips, {sum(seconds.values())} s in all")
PYTHON
if [ ! -e prompts.txt ]; then
    printf 'the digit %s\n' '3 moves right' '7 moves up' '0 moves left' '4 moves down' >prompts.txt
fi
echo "look at:   $run/evaluation/grid.png and $run/evaluation/clips/"
echo "report:    $run/report.json"
echo "your own:  bash launch/infer.sh prompts.txt"
