#!/usr/bin/env bash
# TL;DR: fine-tune on summaries, train a reward model on ranked ones, then RRHF and PPO against it; a table of all four.
#   bash examples/tldr/run.sh [MODEL [OUT]]        run it again after an interruption: it goes on where it stopped
. "$(dirname "$0")/../start.sh"
rankalign train --config configs/sft.yaml
rankalign train --config configs/reward.yaml
rankalign sample --config configs/sample.yaml
rankalign score --config configs/score.yaml
rankalign train --config configs/rrhf.yaml
rankalign train --config configs/ppo.yaml
rankalign sample --config configs/heldout.yaml
rankalign score --config configs/score_heldout.yaml
python "$root/examples/table.py" heldout.jsonl --judges rm --reference human --title "TL;DR, held-out posts"
