# What the examples share; each run.sh sources it with its own arguments, [MODEL [OUT ...]].
# Builds the environment, puts MODEL in the place of `default`, copies the example's settings and data into OUT and goes
# there: every path in the settings is relative to the run, which needs nothing outside its folder but the model.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
root=$(realpath "$here/../..")
model=${1:-${RANKALIGN_DEFAULT_MODEL:-default}}
if [ -d "$model" ]; then model=$(realpath "$model"); fi
out=$(realpath -m "${2:-$root/runs/$(basename "$here")}")
make -s -C "$root" env
mkdir -p "$out"
cp -r "$here/configs" "$here/data" "$out"
cd "$out"
export RANKALIGN_DEFAULT_MODEL=$model PATH=$root/.venv/bin:$PATH
