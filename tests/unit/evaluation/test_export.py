"""``--table``: what is shown, in a file that other programs read, whatever the texts in it hold."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import openpyxl
import pandas as pd
import pytest

from rankalign.cli import COMMANDS, main
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.evaluation.export import ENDINGS, check_target, frame, write_tables
from rankalign.evaluation.tables import Table

HOSTILE = '=1+1 <b>&amp;</b> 50% of a_b {x} | "q"\n\\textbf{y}\x1b[31m'
TABLES = [
    Table("Wins & losses", ["system", "win rate", "n"], [["a", 0.625, 1200], [HOSTILE, None, 3]], "n = 4 <prompts>"),
    Table("Flags/marks", ["", "x"], [["one", "two"]]),
    Table("Flags/marks", ["x", "x"], []),
]


class Cells(HTMLParser):
    """Texts of the cells of a page, and every tag in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data.removesuffix("\n")


def test_a_frame_holds_values_not_their_spelling() -> None:
    found = frame(TABLES[0])
    assert found["win rate"].tolist() == [0.625, None]
    assert list(frame(TABLES[2]).columns) == ["x", "x 2"]
    assert list(frame(TABLES[1]).columns) == ["1", "x"]


def test_csv_has_a_file_a_table(tmp_path: Path) -> None:
    written = write_tables(tmp_path / "t.csv", TABLES)
    assert [Path(path).name for path in written] == ["t.csv", "t-flags-marks.csv", "t-flags-marks 2.csv"]
    found = pd.read_csv(tmp_path / "t.csv")
    assert found["win rate"].tolist()[0] == 0.625
    assert found["n"].tolist() == [1200, 3]
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as lines:
        row = list(csv.DictReader(lines))[1]
    assert row["system"].startswith("'=1+1 <b>")
    assert "\x1b" not in row["system"]
    assert row["guarded"] == '["system"]'


def test_xlsx_has_a_sheet_a_table(tmp_path: Path) -> None:
    assert write_tables(tmp_path / "t.xlsx", TABLES) == [str(tmp_path / "t.xlsx")]
    book = openpyxl.load_workbook(tmp_path / "t.xlsx")
    assert book.sheetnames == ["Wins & losses", "Flags marks", "Flags marks 2", "notes"]
    cells = list(book["Wins & losses"].iter_rows())
    assert [cell.value for cell in cells[1]] == ["a", 0.625, 1200]
    assert cells[2][0].data_type == "s"
    assert [cell.value for cell in list(book["notes"].iter_rows())[1]] == ["Wins & losses", "n = 4 <prompts>"]
    assert pd.read_excel(tmp_path / "t.xlsx", sheet_name=None)["Wins & losses"]["n"].tolist() == [1200, 3]


def test_html_shows_texts_as_texts(tmp_path: Path) -> None:
    write_tables(tmp_path / "t.html", TABLES)
    page = Cells((tmp_path / "t.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert page.cells[:3] == ["system", "win rate", "n"]
    assert page.cells[6] == HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert page.cells[4:6] == ["0.625", "1\N{THIN SPACE}200"]
    assert page.tags.count("table") == 3


def test_markdown_and_latex_are_escaped(tmp_path: Path) -> None:
    write_tables(tmp_path / "t.md", TABLES)
    lines = (tmp_path / "t.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "## Wins & losses"
    assert lines[3] == "| --- | ---: | ---: |"
    assert lines[5].startswith(r"| =1+1 \<b\>&amp;\</b\> 50% of a\_b \{x\} \| ")
    write_tables(tmp_path / "t.tex", TABLES)
    text = (tmp_path / "t.tex").read_text(encoding="utf-8")
    assert r"\caption{Wins \& losses}" in text
    assert r"=1+1 \textless{}b\textgreater{}\&amp;" in text
    assert r"50\% of a\_b \{x\} \textbar{}" in text
    assert r"\textbackslash{}textbf\{y\}" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    assert r"a & 0.625 & 1\,200 \\" in text


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_second_run_replaces_and_nothing_half_written_stays(tmp_path: Path, ending: str) -> None:
    for _ in range(2):
        write_tables(tmp_path / f"t{ending}", TABLES[:1])
    assert [path.name for path in tmp_path.iterdir()] == [f"t{ending}"]


def test_unknown_endings_and_no_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--table t.xls: unknown ending '.xls' \(did you mean '.xlsx'"):
        check_target("t.xls")
    with pytest.raises(InputError, match="there is no table"):
        write_tables(tmp_path / "t.csv", [])


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path: Path) -> str:
    sets = [
        CandidateSet(f"p{i}", "Why?", [Response("a b", "a", scores={"j": i}), Response("a b", "b", scores={"j": 1})])
        for i in range(4)
    ]
    write(tmp_path / "r.jsonl", sets)
    return str(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    ("words", "cells"),
    [
        (["compare", "{0}:a", "{0}:b"], ["a", "b"]),
        (["eval", "reward", "{0}"], ["mean"]),
        (["eval", "variety", "{0}"], []),
        (["lint", "{0}"], ["code"]),
        (["ls", "engines"], ["hf"]),
    ],
)
def test_commands_write_their_table(
    tmp_path: Path, scored: str, words: list[str], cells: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = [word.format(scored) for word in words]
    assert main([*said, "--json"]) == 0
    alone = capsys.readouterr().out
    assert main([*said, "--json", "--table", str(tmp_path / "t.csv")]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads(alone)
    assert f"table: {tmp_path / 't.csv'}" in shown.err
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as lines:
        found = [cell for row in csv.reader(lines) for cell in row]
    assert set(cells) <= set(found)


def test_a_wrong_name_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "nowhere.jsonl", "nor.jsonl", "--table", "t.doc"]) == 1
    assert "unknown ending '.doc'" in capsys.readouterr().err


def test_every_command_that_shows_tables_takes_the_flag() -> None:
    import importlib

    for command, (name, _) in COMMANDS.items():
        module = importlib.import_module(f"rankalign.commands.{name}")
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert hasattr(module, "tables") or "render(" not in text, command
