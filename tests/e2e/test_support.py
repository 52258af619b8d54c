"""The table of supported architectures: what it says is what happens, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import support
from tests.e2e.support import FAMILIES, NO, PAGE, YES, Row

FAST = ("GPT-2", "BLOOM", "gpt-oss")
ALL = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name) for name in FAMILIES]


@pytest.mark.parametrize("family", ALL)
def test_family(family: str, tmp_path: Path) -> None:
    row = support.examine(family, tmp_path)
    assert (row.rrhf, row.lora[:1], row.delta) == (YES, YES, YES)
    assert row.dpo in (YES, NO)
    assert bool(row.why) == (row.layout == "padded")
    assert support.on_page(row), "docs/support.md is out of date: run `python -m tests.e2e.support`"


def test_the_page_has_every_family_and_column() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells[1:]] == list(FAMILIES)
    assert cells[0] == support.HEAD.splitlines()[-2].strip("| ").split(" | ")
    text = PAGE.read_text(encoding="utf-8")
    notes = dict(line[2:].split(": ", 1) for line in text.partition("Why rows are padded:")[2].strip().splitlines())
    version = text.partition("with transformers ")[2].partition(";")[0]
    assert text == support.page([Row(*row, notes.get(row[0], "")) for row in cells[1:]], version)


def test_a_run_goes_on_where_another_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, tried = tmp_path / "found.jsonl", []

    def examined(family: str, folder: Path) -> Row:
        tried.append(family)
        if family == "c" and tried.count("c") == 1:
            raise RuntimeError("once")
        return Row(family, "Kind", YES, YES, NO, YES, "padded", YES, "it shifts tokens")

    monkeypatch.setattr(support, "examine", examined)
    monkeypatch.setattr(support, "PAGE", tmp_path / "support.md")
    assert support.main({"a": 0, "b": 0}, found, seconds=-1) == 1
    assert support.main({"a": 0, "c": 0}, found) == 1
    assert not (tmp_path / "support.md").exists()
    assert support.main({"a": 0, "c": 0, "b": 0}, found) == 0
    assert tried == ["a", "c", "c", "b"]
    text = (tmp_path / "support.md").read_text(encoding="utf-8")
    assert text.splitlines()[-3:] == [f"* {name}: it shifts tokens" for name in ("a", "c", "b")]


def test_files_that_differ_in_a_bit_are_not_the_same(tmp_path: Path) -> None:
    for name, content in (("a", b"\0\1"), ("b", b"\0\1"), ("c", b"\0\0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert support.same_files(tmp_path / "a", tmp_path / "b")
    assert not support.same_files(tmp_path / "a", tmp_path / "c")


def test_a_model_that_did_not_change_is_found_out(tmp_path: Path) -> None:
    support.save("GPT-2", tmp_path / "base")
    assert not support.changed(tmp_path / "base", tmp_path / "base")
