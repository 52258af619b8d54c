#!/usr/bin/env bash
# Grade the responses of a file.
#   bash data_generation/scoring_responses.sh IN OUT [more flags of `rankalign score`]
set -euo pipefail
in=$(realpath "${1:-runs/data/candidates.jsonl}")
out=$(realpath -m "${2:-runs/data/scored.jsonl}")
shift $(($# < 2 ? $# : 2))
cd "$(dirname "$0")/.."
make -s env
.venv/bin/rankalign score --config data_generation/configs/score.yaml --input "$in" --output "$out" "$@"
