#!/usr/bin/env bash
# Positive sentiment: continue neutral openings cheerfully. RRHF, and PPO with its KL term and without.
#   bash examples/sentiment/run.sh [MODEL [OUT]]        run it again after an interruption: it goes on where it stopped
. "$(dirname "$0")/../start.sh"
rankalign sample --config configs/sample.yaml
rankalign score --config configs/score.yaml
rankalign train --config configs/rrhf.yaml
rankalign train --config configs/ppo.yaml --output_dir ppo --kl_coef 0.1
rankalign train --config configs/ppo.yaml --output_dir ppo-no-kl --kl_coef 0
rankalign sample --config configs/heldout.yaml
rankalign score --config configs/score.yaml --input heldout.raw.jsonl --output heldout.jsonl
python "$root/examples/table.py" heldout.jsonl --judges vader --start default --template raw --title "Sentiment, held-out openings"
