#!/usr/bin/env bash
# Prompts to a training file: several policies answer, a scorer grades. Resumable: run it again after an interruption.
#   bash data_generation/response_gen.sh [MODEL [OUT_DIR [more flags of `rankalign sample`]]]
set -euo pipefail
model=${1:-default}
out=$(realpath -m "${2:-runs/data}")
shift $(($# < 2 ? $# : 2))
[ -d "$model" ] && model=$(realpath "$model")
cd "$(dirname "$0")/.."
make -s env
.venv/bin/rankalign sample --config data_generation/configs/sample.yaml --model "$model" \
  --output "$out/candidates.jsonl" "$@"
bash data_generation/scoring_responses.sh "$out/candidates.jsonl" "$out/scored.jsonl"
.venv/bin/rankalign convert "$out/scored.jsonl" "$out/train.json" --from rankalign --to rrhf
echo "training data: $out/scored.jsonl (records), $out/train.json (RRHF's form)"
