#!/usr/bin/env bash
# Train with RRHF; the order of the arguments is that of the released RRHF script.
#   bash train_scripts/train.sh [MODEL [SAVE_DIR [DATA_JSONL [more settings of `rankalign train`]]]]
set -euo pipefail
model=${1:-default}
save=$(realpath -m "${2:-runs/rrhf}")
data=${3:-}
shift $(($# < 3 ? $# : 3))
[ -d "$model" ] && model=$(realpath "$model")
[ -n "$data" ] && data=$(realpath "$data")
cd "$(dirname "$0")/.."
make -s env
if [ -z "$data" ]; then
  data=runs/data/scored.jsonl
  [ -f "$data" ] || bash data_generation/response_gen.sh
fi
.venv/bin/rankalign train --config train_scripts/configs/rrhf.yaml --model "$model" --output_dir "$save" \
  --data "$data" "$@"
