"""convert: counts, errors, skipping, lists, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankalign.convert import convert
from rankalign.errors import InputError, RecordError
from rankalign.records import read, read_rows

# --- convert -----------------------------------------------------------------------------------------------------


def put(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


RRHF_LINE = json.dumps({"query": "q", "responses": ["a", "b", "c"], "scores": [1, 1, 2]})


def test_convert_reports_what_it_did(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE, RRHF_LINE)
    report = convert(source, tmp_path / "out.jsonl", "rrhf", "trl")
    lost = {"ties": 2}
    assert report == {"read": 2, "written": 4, "skipped": 0, "errors": [], "lost": lost}
    rows = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    assert [(row["id"], row["chosen"], row["rejected"]) for row in rows] == [
        ("in-000001", "c", "a"),
        ("in-000001", "c", "b"),
        ("in-000002", "c", "a"),
        ("in-000002", "c", "b"),
    ]


BROKEN = ["{broken", '{"query": "q"}', RRHF_LINE.replace("[1, 1, 2]", "[1, NaN, 2]")]


@pytest.mark.parametrize("broken", BROKEN)
def test_convert_stops_at_a_bad_line_and_writes_nothing(tmp_path: Path, broken: str) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE, RRHF_LINE, broken)
    with pytest.raises(RecordError, match=r"in\.jsonl:3: "):
        convert(source, tmp_path / "out.jsonl", "rrhf", "rankalign")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("broken", BROKEN)
def test_convert_skips_bad_lines_when_told_to(tmp_path: Path, broken: str) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE, broken, RRHF_LINE)
    report = convert(source, tmp_path / "out.jsonl", "rrhf", "rankalign", skip_invalid=True)
    assert (report["read"], report["written"], report["skipped"]) == (3, 2, 1)
    (error,) = report["errors"]
    assert (error["file"], error["line"]) == (str(source), 2)
    assert error["reason"]
    assert [record.id for record in read(tmp_path / "out.jsonl")] == ["in-000001", "in-000003"]


def test_convert_writes_a_list_where_the_name_says_so(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE, RRHF_LINE)
    convert(source, tmp_path / "out.json", "rrhf", "trl")
    assert [row["chosen"] for row in json.loads((tmp_path / "out.json").read_text())] == ["c"] * 4
    convert(tmp_path / "out.json", tmp_path / "back.json", "trl", "trl")
    assert (tmp_path / "back.json").read_text() == (tmp_path / "out.json").read_text()
    convert(source, tmp_path / "train.json", "rrhf", "rrhf")
    assert len((tmp_path / "train.json").read_text().splitlines()) == 2
    put(tmp_path / "empty.json", "[]")
    convert(tmp_path / "empty.json", tmp_path / "none.json", "trl", "trl")
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_convert_may_write_over_its_source(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE)
    convert(source, source, "rrhf", "rankalign")
    assert [len(record.responses) for record in read(source)] == [3]


def test_convert_knows_no_such_format(tmp_path: Path) -> None:
    source = put(tmp_path / "in.jsonl", RRHF_LINE)
    with pytest.raises(InputError, match=r"unknown format 'rrfh' \(did you mean 'rrhf'\?\)"):
        convert(source, tmp_path / "out.jsonl", "rrfh", "trl")


def test_duplicate_records_are_refused(tmp_path: Path) -> None:
    line = '{"id": "a", "prompt": "p"}'
    with pytest.raises(RecordError, match="'a' stands already on line 1"):
        convert(put(tmp_path / "in.jsonl", line, line), tmp_path / "out.jsonl", "rankalign", "trl")
