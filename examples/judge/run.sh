#!/usr/bin/env bash
# A judge that learns to judge: SFT on right verdicts, then DPO on its own, the right ones against the wrong ones.
#   bash examples/judge/run.sh [MODEL [OUT]]        run it again after an interruption: it goes on where it stopped
. "$(dirname "$0")/../start.sh"
python configs/questions.py data/pairs.jsonl
rankalign train --config configs/sft.yaml
rankalign sample --config configs/sample.yaml
rankalign score --config configs/score.yaml
rankalign train --config configs/dpo.yaml
rankalign sample --config configs/heldout.yaml
rankalign score --config configs/score.yaml --input heldout.raw.jsonl --output heldout.jsonl
python "$root/examples/table.py" heldout.jsonl --judges right --title "Judges, held-out pairs"
