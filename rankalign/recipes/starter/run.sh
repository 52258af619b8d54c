#!/usr/bin/env bash
# The whole path on one model. Run it again after an interruption: it goes on.
#   bash run.sh [MODEL [more settings of `rankalign train`]]
set -euo pipefail
cd "$(dirname "$0")"
model=${1:-default}
shift $(($# < 1 ? $# : 1))
rankalign sample --config data_generation/configs/sample.yaml --model "$model" --output runs/data/candidates.jsonl
rankalign score --config data_generation/configs/score.yaml
rankalign lint runs/data/scored.jsonl
rankalign train --config train_scripts/configs/rrhf.yaml --model "$model" --output_dir runs/rrhf "$@"
rankalign sample --config eval/configs/heldout.yaml --model "$model" --output runs/heldout/before.jsonl
rankalign sample --config eval/configs/heldout.yaml --model runs/rrhf --output runs/heldout/after.jsonl
rankalign compare runs/heldout/before.jsonl runs/heldout/after.jsonl --function rankalign.scorers.builtin:vader
