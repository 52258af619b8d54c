"""Scripts here run under any Python: where rankalign is not installed, `make env` builds its environment first."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def enter() -> None:
    """Go on in this interpreter if it has rankalign, else start the script again in the project's own."""
    if importlib.util.find_spec("rankalign") and importlib.util.find_spec("transformers"):
        return
    subprocess.run(["make", "-s", "-C", str(ROOT), "env"], check=True, stdout=sys.stderr)
    python = str(ROOT / ".venv" / "bin" / "python")
    if sys.executable == python:
        sys.exit(f"{python} has no rankalign although `make env` has run; remove .venv and run it again")
    os.execv(python, [python, *sys.argv])
