#!/usr/bin/env bash
# StackLLaMA's stages on LoRA adapters: fine-tune on accepted answers, train a reward model on pairs, align with DPO by it.
#   bash examples/stack/run.sh [MODEL [OUT]]        run it again after an interruption: it goes on where it stopped
. "$(dirname "$0")/../start.sh"
rankalign convert data/pairs.jsonl pairs.jsonl --from stack-exchange --test-size 0.3
rankalign train --config configs/sft.yaml
[ -d sft ] || rankalign merge sft-lora --output sft
rankalign train --config configs/reward.yaml
rankalign sample --config configs/sample.yaml
rankalign score --config configs/score.yaml
rankalign train --config configs/dpo.yaml --model sft
rankalign sample --config configs/heldout.yaml
rankalign score --config configs/score.yaml --input heldout.raw.jsonl --output heldout.jsonl
python "$root/examples/table.py" heldout.jsonl --judges rm --reference response_j --title "Stack, held-out questions"
