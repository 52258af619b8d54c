#!/usr/bin/env bash
# Wombat: several policies answer instructions in Alpaca's template, a judge grades them in lists, RRHF trains on the order.
#   bash examples/wombat/run.sh [MODEL [OUT [SCORES]]]        SCORES: four-axes (a model judges) or rules (a function)
. "$(dirname "$0")/../start.sh"
scores=${3:-four-axes}
train="rankalign train --config configs/rrhf.yaml --judge"
cp -r "$root/data_generation/judge_prompts" .
rankalign convert data/alpaca.jsonl train.jsonl --from alpaca --test-size 0.25
rankalign sample --config configs/sample.yaml
# A judge of whom nothing can be read, or who puts nothing in order, is exit code 1; the rules' scores are there all the same.
rankalign score --config "configs/$scores.yaml" || [ $? = 1 ]
$train "$scores" || { code=$?; [ $code = 1 ] || exit $code; echo "no order by $scores: the rules rank instead"; $train rules; }
rankalign sample --config configs/heldout.yaml
rankalign score --config "configs/$scores.yaml" --input heldout.raw.jsonl --output heldout.jsonl || [ $? = 1 ]
[ "$scores" = rules ] || rankalign eval agreement candidates.jsonl --judge "$scores" --truth rules || [ $? = 1 ]
python "$root/examples/table.py" heldout.jsonl --judges "$scores" rules --reference output --title "Wombat, held-out instructions"
