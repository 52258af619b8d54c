"""Which of two answer files is better: `python eval/compare.py A.jsonl B.jsonl [flags of rankalign compare]`.

Without arguments: the start model against what train.sh trained, on the held-out prompts.
"""

import os
import subprocess
import sys

from environment import ROOT, enter

enter()

from rankalign.cli import main  # noqa: E402 - only now is it sure to be there


def answers(name: str, model: str) -> str:
    """Greedy answers of ``model`` to the held-out prompts."""
    output = f"runs/compare/{name}.jsonl"
    if code := main(["sample", "--config", "eval/configs/heldout.yaml", "--model", model, "--output", output]):
        sys.exit(code)
    return output


if len(sys.argv) > 1:
    sys.exit(main(["compare", *sys.argv[1:]]))
os.chdir(ROOT)
if not os.path.exists("runs/rrhf/manifest.json"):
    subprocess.run(["bash", "train_scripts/train.sh"], check=True)
files = [answers("before", "default"), answers("after", "runs/rrhf")]
sys.exit(main(["compare", *files, "--function", "rankalign.scorers.builtin:vader"]))
