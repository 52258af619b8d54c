"""`python eval/perplexity.py FILE [flags of rankalign eval perplexity]`; by default of what compare.py left."""

import os
import sys

from environment import ROOT, enter

enter()

from rankalign.cli import main  # noqa: E402 - only now is it sure to be there

DEFAULT = str(ROOT / "runs" / "compare" / "after.jsonl")
if len(sys.argv) == 1 and not os.path.exists(DEFAULT):
    sys.exit("run `python eval/compare.py` first, or name a file")
sys.exit(main(["eval", "perplexity", *(sys.argv[1:] or [DEFAULT])]))
