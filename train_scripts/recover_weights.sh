#!/usr/bin/env bash
# Recover weights that were published as a delta: the target comes back from its base and the delta, bit for bit.
#   bash train_scripts/recover_weights.sh BASE DELTA TARGET
#   bash train_scripts/recover_weights.sh --base BASE --target TARGET --delta DELTA    (or --base-model-path and so on)
# Without arguments it shows the whole circle on the default model: what train.sh trained -> runs/delta -> runs/recovered.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
delta() { "$python" -m rankalign delta "$@"; }

if [ $# -gt 0 ]; then
  [[ $1 == -* ]] || set -- --base "$1" --delta "${2:?DELTA is missing}" --target "${3:?TARGET is missing}" "${@:4}"
  set -- "${@/#--base-model-path/--base}" && set -- "${@/#--target-model-path/--target}"
  delta apply "${@/#--delta-path/--delta}"
else
  [ -e runs/rrhf/manifest.json ] || bash "$root/train_scripts/train.sh"
  [ -e runs/delta ] || delta make --base default --target runs/rrhf --delta runs/delta
  [ -e runs/recovered ] || delta apply --base default --delta runs/delta --target runs/recovered
  delta verify --base default --delta runs/delta --target runs/recovered
fi
