"""Every notebook runs from its first cell to its last on the tiny model, and is a page of the site."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from docs.run_notebooks import NOTEBOOKS, execute, load, to_markdown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))
    notebook = load(path)
    printed = execute(notebook, tmp_path)
    stored = ["".join(line for out in cell["outputs"] for line in out["text"]) for cell in code(notebook)]
    # What stands beside a cell is what it prints; figures may differ in their last digits from machine to machine.
    assert [bool(text) for text in printed] == [bool(text) for text in stored], "run `python -m docs.run_notebooks`"
    assert [text.count("\n") for text in printed] == [text.count("\n") for text in stored]


def code(notebook: dict[str, list[dict[str, list[dict[str, str]]]]]) -> list[dict[str, list[dict[str, str]]]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_one_that_jupyter_opens_and_a_page_of_the_site(path: Path) -> None:
    notebook = load(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    page = to_markdown(notebook, path.name)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        assert source in page
        if cell["cell_type"] == "code":
            ast.parse(source)  # no magics: the cells run as they stand anywhere
            assert cell["execution_count"] is None
    text = path.read_text(encoding="utf-8")
    assert f"{os.sep}tmp{os.sep}" not in text
    assert str(Path.home()) not in text
    menu = (path.parents[2] / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"notebooks/{path.stem}.md" in menu


def test_the_four_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["reading_a_report", "whole_path", "your_own_judge", "your_own_loss"]
