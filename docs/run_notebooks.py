"""Runs the notebooks in docs/notebooks from their first cell to their last, and keeps what they print beside the cells.

python -m docs.run_notebooks

Cells are plain Python: no magics, no shell. So they run here in one namespace, without Jupyter, as they run in it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("notebooks")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def load(path: Path) -> dict[str, Any]:
    """A notebook as its JSON holds it."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def execute(notebook: dict[str, Any], folder: Path) -> list[str]:
    """What each code cell printed, its last value included; run in ``folder``, in order.

    Raises:
        Exception: whatever a cell raises.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    with contextlib.chdir(folder):
        for number, cell in enumerate(notebook["cells"]):
            if cell["cell_type"] == "code":
                printed.append(_run("".join(cell["source"]), f"cell {number}", names))
    return printed


def _run(source: str, name: str, names: dict[str, Any]) -> str:
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, name, "exec"), names)
        value = eval(compile(last, name, "eval"), names) if last else None
    # Libraries log a line with the time when they are first imported, which is another cell in another process.
    text = re.sub(r"^\[\d{4}-\d\d-\d\d .*\n", "", out.getvalue(), flags=re.MULTILINE)
    return text + (f"{value!r}\n" if value is not None else "")


def with_outputs(notebook: dict[str, Any], printed: list[str]) -> dict[str, Any]:
    """The notebook with what its cells printed."""
    texts = iter(printed)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            text = next(texts)
            lines = text.splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if text else []
            cell["execution_count"] = None
    return notebook


def to_markdown(notebook: dict[str, Any], name: str) -> str:
    """The notebook as a page: texts, code, and what it printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        text = "".join(line for output in cell["outputs"] for line in output.get("text", []))
        if text.strip():
            parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join([*parts, f"[The notebook]({name})"]) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("RANKALIGN_CACHE", cache)  # one for all: what is made once is known by where it lies
        for path in NOTEBOOKS:
            with tempfile.TemporaryDirectory() as place:
                made = with_outputs(load(path), execute(load(path), Path(place)))
            path.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            print(path.name)
