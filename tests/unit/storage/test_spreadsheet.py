"""CSV, TSV and XLSX: rated tables become records by what their columns are, and records come back from a sheet."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import openpyxl
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankalign.data.convert import Intake, convert
from rankalign.data.formats.layout import Layout, parse_columns
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, Response, read, to_dict, write
from rankalign.errors import InputError, RecordError
from rankalign.storage import workbook
from rankalign.storage.delimited import GUARDED
from rankalign.storage.spreadsheet import read_cells, write_sheet

ENDINGS = ["csv", "tsv", "csv.gz", "xlsx"]


def fail(error: RecordError) -> None:
    raise error


def sheet(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


def records_of(path: Path, columns: str = "", ignore: str = "", skip: bool = False) -> list[CandidateSet]:
    return list(load(path, "auto", Intake(skip, ignore, columns)))


def brief(sets: list[CandidateSet]) -> list[Any]:
    """Prompt, and text, policy and scores of each answer."""
    return [(s.prompt, [(r.text, r.policy, r.scores) for r in s.responses]) for s in sets]


# --- any text and any record come back ---------------------------------------------------------------------------

HARD = [
    "=1+1",
    "'=x",
    "''-",
    "-a",
    "+1",
    "@SUM",
    "\r\n",
    "a\rb",
    "\t",
    " x ",
    "_x0041_",
    "_x005F_x0041_",
    "\x00",
    "\ufffe",
    "1.50",
    "007",
    "null",
    "true",
    '"q"',
    "[1]",
    '[{"role": "user", "content": "x"}]',
    "\ufeffx",
    "a;b",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6) | st.sampled_from(HARD)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.fixed_dictionaries({"a": TEXT, "b": TEXT}), min_size=1, max_size=3), st.sampled_from(ENDINGS))
def test_any_text_comes_back(rows: list[dict[str, str]], ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{ending}"
        assert write_sheet(path, rows) == len(rows)
        assert [row for _, row in read_cells(path, fail)] == rows


JSON = (
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
META = st.dictionaries(st.sampled_from(["source", "=x", "n.m"]), JSON | st.lists(JSON, max_size=2), max_size=2)
NUMBERS = st.integers(-5, 5) | st.floats(-9, 9)
RESPONSE = st.builds(
    Response,
    text=TEXT | st.just(""),
    policy=st.sampled_from(["m", "=n", "unknown", "7"]),
    finished=st.booleans(),
    count=st.integers(1, 2),
    sampling=st.dictionaries(st.sampled_from(["seed", "stop"]), JSON, max_size=2),
    scores=st.dictionaries(st.sampled_from(["rm", "a judge"]), st.none() | NUMBERS, max_size=2),
    tokens=st.none() | st.just({"tokenizer": "t", "ids": [1, 2]}),
    meta=META,
)
PROMPT = TEXT.filter(str.strip) | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT.filter(str.strip)}),
    min_size=1,
    max_size=2,
)


RECORD = st.builds(CandidateSet, st.just(""), PROMPT, st.lists(RESPONSE, max_size=3), META)


@settings(max_examples=100, deadline=None)
@given(st.lists(RECORD, min_size=1, max_size=3), st.sampled_from(ENDINGS))
def test_any_record_comes_back(sets: list[CandidateSet], ending: str) -> None:
    named = [CandidateSet(f"{i:03}", s.prompt, s.responses, s.meta) for i, s in enumerate(sets)]
    with tempfile.TemporaryDirectory() as folder:
        source, middle, back = (Path(folder) / name for name in ("a.jsonl", f"b.{ending}", "c.jsonl"))
        write(source, named)
        assert convert(source, middle)["lost"] == {}
        convert(middle, back)
        assert [to_dict(record) for record in read(back)] == [to_dict(record) for record in read(source)]


def test_no_text_is_a_formula_to_a_spreadsheet_program(tmp_path: Path) -> None:
    texts = ['=HYPERLINK("http://x","y")', "+1", "-1", "@A1", "\t=1", " =1", "\uff1d1", "plain", "'=1"]
    rows = [{"text": text, "score": -1.5} for text in texts]
    write_sheet(tmp_path / "x.csv", rows)
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as lines:
        cells = list(csv.DictReader(lines))
    assert [row["text"][0] for row in cells[:7]] == ["'"] * 7
    assert [row["text"] for row in cells[7:]] == ["plain", "'=1"]
    assert [row[GUARDED] for row in cells] == ['["text"]'] * 7 + [""] * 2
    assert {row["score"] for row in cells} == {"-1.5"}
    write_sheet(tmp_path / "x.xlsx", rows)
    book = openpyxl.load_workbook(tmp_path / "x.xlsx")
    found = [cell for (cell,) in book.worksheets[0].iter_rows(min_row=2, max_col=1)]
    assert [cell.value for cell in found] == texts
    assert {cell.data_type for cell in found} == {"s"}
    assert [bool(cell.quotePrefix) for cell in found] == [True] * 7 + [False] * 2
    with pytest.raises(InputError, match="would take the column name '=a' for a formula"):
        write_sheet(tmp_path / "y.csv", [{"=a": 1}])


def test_a_foreign_apostrophe_is_a_letter(tmp_path: Path) -> None:
    path = sheet(tmp_path / "x.csv", "prompt,answer", "'-ing' forms?,'=' is a sign")
    assert brief(records_of(path)) == [("'-ing' forms?", [("'=' is a sign", "unknown", {})])]


def test_pandas_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    frame = pd.DataFrame({"prompt": ["a, b", "a, b", "c\nd"], "answer": ['"x"', "y", "z"], "score": [1.5, None, 2.0]})
    for ending, put in (("csv", frame.to_csv), ("tsv", lambda p, index: frame.to_csv(p, sep="\t", index=index)),
                        ("xlsx", frame.to_excel)):  # fmt: skip
        put(tmp_path / f"x.{ending}", index=False)
        assert brief(records_of(tmp_path / f"x.{ending}")) == [
            ("a, b", [('"x"', "unknown", {"score": 1.5}), ("y", "unknown", {})]),
            ("c\nd", [("z", "unknown", {"score": 2.0})]),
        ]
        convert(tmp_path / f"x.{ending}", tmp_path / "y.csv")
        assert pd.read_csv(tmp_path / "y.csv")["text"].tolist() == frame["answer"].tolist()


# --- what the columns are ----------------------------------------------------------------------------------------


def test_long_tables_are_grouped_by_prompt_in_their_order(tmp_path: Path) -> None:
    path = sheet(
        tmp_path / "x.csv", "q,a,stars,len,who,src", "Why?,b,4,1,m,web", "Who?,me,1,2,m,book", "Why?,c,2.5,1,n,web"
    )
    sets = records_of(path, "prompt=q, response=a, score=stars, score:length=len, policy=who, meta=src")
    assert brief(sets) == [
        ("Why?", [("b", "m", {"score": 4, "length": 1}), ("c", "n", {"score": 2.5, "length": 1})]),
        ("Who?", [("me", "m", {"score": 1, "length": 2})]),
    ]
    assert [s.meta for s in sets] == [{"src": "web"}, {"src": "book"}]
    assert [s.id for s in sets] == ["x-000002", "x-000003"]


def test_wide_tables_have_all_answers_in_a_row(tmp_path: Path) -> None:
    path = sheet(tmp_path / "x.tsv", "q\tA\tB\tC\tsA\tsB\tsC", "Why?\ta\tb\t\t1\t2\t", "Who?\t\tb\tc\t\t\t3")
    columns = "prompt=q,responses=A|B|C,scores:human=sA|sB|sC"
    assert brief(records_of(path, columns)) == [
        ("Why?", [("a", "A", {"human": 1}), ("b", "B", {"human": 2})]),
        ("Who?", [("b", "B", {}), ("c", "C", {"human": 3})]),
    ]


def test_several_raters_of_one_answer_are_judges_of_it(tmp_path: Path) -> None:
    lines = ["prompt,answer,rater,rating", "p,a,ann,4", "p,a,bob,3", "p,b,ann,1"]
    path = sheet(tmp_path / "x.csv", *lines)
    assert brief(records_of(path)) == [("p", [("a", "unknown", {"ann": 4, "bob": 3}), ("b", "unknown", {"ann": 1})])]
    sheet(path, *lines, "p,a,bob,5")
    with pytest.raises(RecordError, match=r"x.csv:5: rater: bob has scored this answer already"):
        records_of(path)


def test_a_score_beside_prompt_and_completion_is_read(tmp_path: Path) -> None:
    path = sheet(tmp_path / "x.csv", "prompt,completion,score", "p,good,5", "p,bad,1")
    assert brief(records_of(path)) == [("p", [("good", "unknown", {"score": 5}), ("bad", "unknown", {"score": 1})])]


def test_ids_are_those_of_prompts_or_stay_with_the_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = sheet(tmp_path / "p.csv", "id,prompt,answer", "7,p,a", "7,p,b", "8,q,c")
    assert [s.id for s in records_of(prompts)] == ["7", "8"]
    rows = sheet(tmp_path / "r.csv", "id,prompt,answer", "1,p,a", "2,p,b", "3,q,c")
    sets = records_of(rows)
    assert [s.id for s in sets] == ["r-000002", "r-000004"]
    assert [r.meta for s in sets for r in s.responses] == [{"id": "1"}, {"id": "2"}, {"id": "3"}]
    assert "'id' tells rows apart, not prompts" in capsys.readouterr().err
    assert [s.id for s in records_of(rows, "prompt=prompt,response=answer,id=id")] == ["1", "2", "3"]
    sheet(rows, "id,prompt,answer", "1,p,a", "1,q,b")
    with pytest.raises(RecordError, match=r"r.csv:3: prompt: is another than in line 2, which has the same id"):
        records_of(rows, "prompt=prompt,response=answer,id=id")


def test_a_system_column_is_the_system_message_and_json_messages_are_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    with (tmp_path / "x.csv").open("w", newline="") as out:
        csv.writer(out).writerows(
            [["prompt", "system", "answer"], ["p", "Be brief.", "a"], [json.dumps(turns), "", "b"]]
        )
    first, second = records_of(tmp_path / "x.csv")
    assert first.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p"}]
    assert second.prompt == turns


def test_what_was_taken_for_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records_of(sheet(tmp_path / "x.csv", "Question,Model,Answer,Stars", "p,m,a,5"))
    told = capsys.readouterr().err
    assert "prompt from 'Question', answers from 'Answer', scores from 'Stars', policy from 'Model'" in told


def test_a_column_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = sheet(tmp_path / "x.csv", "prompt,answer,notes,verdict", "p,a,,", "p,b,n,v")
    with pytest.raises(
        RecordError, match=r"x.csv:3: notes, verdict: is read as nothing: .* \(meta=notes\|verdict keeps"
    ):
        records_of(path)
    for ignore in ("all", "notes, verdict"):
        (record,) = records_of(path, ignore=ignore)
        assert [r.meta for r in record.responses] == [{}, {"notes": "n", "verdict": "v"}]
    assert records_of(path, "prompt=prompt,response=answer,meta=notes|verdict") == [record]


def test_other_formats_are_read_from_sheets_too(tmp_path: Path) -> None:
    a, b = ([{"role": "assistant", "content": text}] for text in "ab")
    rows = [
        {"prompt": "p", "chosen": a, "rejected": b, "margin": 0.5},
        {"prompt": "q", "chosen": "[1]", "rejected": "-2", "margin": 1},
    ]
    for ending in ENDINGS:
        path = tmp_path / f"x.{ending}"
        write_sheet(path, rows)
        sets = records_of(path, ignore="all")
        assert [[r.text for r in s.responses] for s in sets] == [["a", "b"], ["[1]", "-2"]]
        assert [s.meta["margin"] for s in sets] == [0.5, 1]
    source = tmp_path / "r.jsonl"
    source.write_text(json.dumps({"query": "q", "responses": ["a", "=b"], "scores": [1, 2.5]}))
    convert(source, tmp_path / "r.csv", to_format="rrhf")
    convert(tmp_path / "r.csv", tmp_path / "again.jsonl", to_format="rrhf")
    assert json.loads((tmp_path / "again.jsonl").read_text()) == json.loads(source.read_text())


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("prompt=q", Layout("q")),
        ('"prompt=What, then?", response=a', Layout("What, then?", ("a",))),
        ("prompt=q,responses=a", Layout("q", ("a",), wide=True)),
        ("prompt=q,responses=a|b,policies=m|n", Layout("q", ("a", "b"), policies=("m", "n"), wide=True)),
        ("prompt=q,response=a,score=s,judge=j", Layout("q", ("a",), {"score": ("s",)}, judge="j")),
    ],
)
def test_columns_are_told(text: str, layout: Layout) -> None:
    assert parse_columns(text) == layout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("promt=q", "did you mean 'prompt'"),
        ("response=a", "name the prompt's column"),
        ("prompt", "write KEY=COLUMN"),
        ("prompt=q,responses=a|b,scores=s", "1 columns of scores of score for 2 of answers"),
        ("prompt=q|r", "names one column"),
        ("prompt=q,response=a,score=s,score=t", "stands once"),
        ("prompt=q,responses=a|b,scores=s|t,judge=j", "one answer a row"),
        ("prompt=q,policy:x=a", "cannot read"),
    ],
)
def test_columns_told_wrongly_are_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason.replace("(", r"\(")):
        parse_columns(text)


# --- what is wrong in a file is named ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [
        (["prompt,answer,score", "p,a,4", "p,b"], 3, "2 cells for 3 columns"),
        (["prompt,answer", "p,a, and more"], 2, "3 cells for 2 columns"),
        (["prompt,answer,score", "p,a,4", "", "p,b,good"], 4, "score: expected a number such as 4.5, found 'good'"),
        (["prompt,answer,score", 'p,a,"4,5"'], 2, "expected a number such as 4.5"),
        (["prompt,answer,score", "p,a,inf"], 2, "expected a number"),
        (["prompt,answer,score", "p,a,1e999"], 2, "not a finite number"),
        (["prompt,answer,score", "p,,4"], 2, "answer: is empty, though it has a score"),
        (["prompt,answer", ",a"], 2, "prompt: is empty; where cells were merged"),
        (["prompt,answer", '"multi', 'line",a', "p,b,c"], 4, "3 cells"),
        (["prompt,answer", 'p,"a"b'], 2, "not valid CSV"),
        (["prompt,answer,guarded", "p,=a,x"], 2, "guarded: must list the columns"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path: Path, lines: list[str], line: int, reason: str) -> None:
    path = sheet(tmp_path / "x.csv", *lines)
    with pytest.raises(RecordError, match=rf"x.csv:{line}: .*{reason}"):
        records_of(path)
    sheet(
        path, *lines, *([",".join(["good", "row", "7"][: lines[0].count(",") + 1])] if GUARDED not in lines[0] else [])
    )
    kept = brief(records_of(path, skip=True))
    assert GUARDED in lines[0] or kept[-1][0] == "good"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"prompt,prompt\np,q\n", "two columns are called 'prompt'"),
        (b'prompt,answer\np,"a\np,b\n', "x.csv:2: a quote opens in this row and never closes"),
        (b"p\0r\0", "zero bytes"),
        (b"PK\x03\x04....", "is a workbook and no text"),
        (b"a,b\n1,2\n", "cannot tell the format from the keys a, b"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        records_of(path)


def test_bytes_that_are_no_utf8_are_named_and_other_encodings_with_a_mark_are_read(tmp_path: Path) -> None:
    lines = ["prompt,answer", "p,caf\xe9", "p,tea"]
    path = sheet(tmp_path / "x.csv", *lines, encoding="latin-1")
    with pytest.raises(RecordError, match=r"x.csv:2: not UTF-8: .*CSV UTF-8"):
        records_of(path)
    assert brief(records_of(path, skip=True)) == [("p", [("tea", "unknown", {})])]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert len(records_of(sheet(path, *lines, encoding=encoding))[0].responses) == 2, encoding
    packed = tmp_path / "x.csv.gz"
    packed.write_bytes(gzip.compress("prompt;answer\r\np;a\r\n".encode("utf-8-sig")))
    assert brief(records_of(packed)) == [("p", [("a", "unknown", {})])]
    sheet(path, "sep=;", "prompt;answer", "p;a", "p;b;c")
    with pytest.raises(RecordError, match=r"x.csv:4: "):
        records_of(path)


def test_a_long_answer_is_read(tmp_path: Path) -> None:
    path = sheet(tmp_path / "x.csv", "prompt,answer", f"p,{'a' * 200_000}")
    assert len(records_of(path)[0].responses[0].text) == 200_000


def book(path: Path, *rows: list[Any]) -> Path:
    made = openpyxl.Workbook()
    for row in rows:
        made.active.append(row)
    made.save(path)
    return path


def test_what_excel_makes_of_ids_and_numbers(tmp_path: Path) -> None:
    path = book(
        tmp_path / "x.xlsx", ["id", "prompt", "answer", "score"], [3.0, "p", 42.0, 4], [3, "p", True, "2.5"], []
    )
    (record,) = records_of(path)
    assert record.id == "3"
    assert [(r.text, r.scores["score"]) for r in record.responses] == [("42", 4), ("true", 2.5)]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (datetime.datetime(2026, 3, 4), "x.xlsx:2: answer: is a date; a spreadsheet makes dates of texts such as 3-4"),
        ("=1+1", "x.xlsx:2: B2: holds a formula without a stored value"),
        ("#N/A", "x.xlsx:2: B2: holds the error #N/A"),
        (1.2345678901234568e17, "x.xlsx:2: B2: is a number of so many digits"),
    ],
)
def test_cells_that_say_something_else_than_was_typed_are_named(tmp_path: Path, cell: Any, reason: str) -> None:
    path = book(tmp_path / "x.xlsx", ["prompt", "answer"], ["p", cell], ["p", "b"])
    with pytest.raises(RecordError, match=reason):
        records_of(path)
    assert [r.text for r in records_of(path, skip=True)[0].responses] == ["b"]


def test_a_workbook_of_several_sheets_is_refused_and_limits_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = openpyxl.Workbook()
    made.active.append(["prompt", "answer"])
    made.create_sheet("more").append(["x"])
    made.save(tmp_path / "x.xlsx")
    with pytest.raises(InputError, match=r"several sheets hold something \(Sheet, more\)"):
        records_of(tmp_path / "x.xlsx")
    (tmp_path / "y.xlsx").write_bytes(b"prompt,answer\n")
    with pytest.raises(InputError, match="is no workbook that can be read"):
        records_of(tmp_path / "y.xlsx")
    with pytest.raises(InputError, match=r"a text has 32768 characters, where \.xlsx holds 32767; write \.csv"):
        write_sheet(tmp_path / "z.xlsx", [{"text": "x" * 32_768}])
    monkeypatch.setattr(workbook, "_MOST_ROWS", 3)
    with pytest.raises(InputError, match=r"3 rows, where \.xlsx holds 2"):
        write_sheet(tmp_path / "z.xlsx", [{"text": "x"}] * 3)
    assert not (tmp_path / "z.xlsx").exists()


def test_a_missing_openpyxl_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(InputError, match=r"x.xlsx: an .xlsx file needs: pip install 'rankalign\[tables\]'"):
        write_sheet(tmp_path / "x.xlsx", [{"a": 1}])


def test_the_command_line_takes_columns(tmp_path: Path) -> None:
    path = sheet(tmp_path / "x.csv", "q,a,s", "p,x,5", "p,y,1")
    words = [str(path), str(tmp_path / "out.tsv"), "--columns", "prompt=q,response=a,score=s", "--json"]
    done = subprocess.run([sys.executable, "-m", "rankalign", "convert", *words], capture_output=True, text=True)
    assert json.loads(done.stdout)["written"] == 2, done.stderr
    assert (tmp_path / "out.tsv").read_text().splitlines()[1] == "x-000002\tp\tunknown\tx\ttrue\t5"
