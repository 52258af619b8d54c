"""The page on the architecture names files and functions that exist, and its picture every room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.unit.test_layers import DOOR, ROOMS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "extending.md"]
NAMED = re.compile(r"`((?:rankalign|tests|docs|benchmarks)/[\w/.-]+)(?::(\w+))?`")


def defined(path: Path) -> set[str]:
    """Names that a module defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    found = NAMED.findall(page.read_text(encoding="utf-8"))
    assert found
    for file, name in found:
        assert (ROOT / file).exists(), file
        assert not name or name in defined(ROOT / file), f"{file}:{name}"


def test_a_wrong_name_is_seen() -> None:
    assert NAMED.findall("`rankalign/rows/tree.py:tree_row`") == [("rankalign/rows/tree.py", "tree_row")]
    assert "tree_tow" not in defined(ROOT / "rankalign" / "rows" / "tree.py")


def test_the_picture_shows_every_room() -> None:
    words = set(re.findall(r"\w+", (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")))
    assert {*ROOMS} | {inner for rooms in ROOMS.values() for inner in rooms} | DOOR <= words
