#!/usr/bin/env bash
# The RRHF paper's comparison, run again at the default model's size; the page is docs/results.md. Resumable: run it again
# after an interruption. With more flags (some rows, other seeds) it is another comparison: its page is OUT_DIR/results.md.
#   bash train_scripts/paper_table.sh [OUT_DIR [more flags of `rankalign table`]]
set -euo pipefail
out=$(realpath -m "${1:-runs/paper_table}")
shift $(($# < 1 ? $# : 1))
cd "$(dirname "$0")/.."
make -s env
page=docs/results.md
(($# == 0)) || page=$out/results.md
.venv/bin/rankalign table --config train_scripts/configs/paper_table.yaml --output "$out" --page "$page" "$@"
