"""Sheets for raters: blinded and reproducible, the same counts back, agreement against published tables."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.pairwise.sheets import fleiss_kappa, key_of, read_sheets, write_sheet

COUNT = 19


def systems(count: int = COUNT) -> tuple[list[CandidateSet], list[CandidateSet]]:
    sides = []
    for name in ("zebra", "quagga"):
        sides.append(
            [CandidateSet(f"id{i}", f"Question {i}?", [Response(f"of {name[0]} {i}", name)]) for i in range(count)]
        )
    return sides[0], sides[1]


def rows_of(sheet: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(sheet.read_text(encoding="utf-8-sig"))))


def fill(sheet: Path, rater: str, wishes: list[str], delimiter: str = ",") -> Path:
    """A filled copy: ``wishes[i]`` is win, tie, loss of zebra on prompt i, or nothing."""
    target, rows = sheet.parent / f"{rater}.csv", rows_of(sheet)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        wish = wishes[int(row["prompt"].split()[1].rstrip("?"))]
        first = row["answer_1"].startswith("of z")
        row["verdict"] = {"win": "1" if first else "2", "loss": "2" if first else " 1 ", "tie": "Tie", "": ""}[wish]
        writer.writerow(row)
    target.write_text(out.getvalue(), encoding="utf-8")
    return target


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "sheet.csv"
    write_sheet(path, *systems(), names=("zebra", "quagga"))
    return path


def test_the_sheet_is_blind_shuffled_and_reproducible(sheet: Path, tmp_path: Path) -> None:
    rows = rows_of(sheet)
    text = sheet.read_text(encoding="utf-8")
    assert "zebra" not in text
    assert "id3" not in text
    assert sorted(row["prompt"] for row in rows) == sorted(f"Question {i}?" for i in range(COUNT))
    assert [row["prompt"] for row in rows] != [f"Question {i}?" for i in range(COUNT)]
    assert 4 <= sum(row["answer_1"].startswith("of z") for row in rows) <= 15
    key = json.loads(key_of(sheet).read_text())
    assert all((key["items"][r["item"]]["first"] == "zebra") == r["answer_1"].startswith("of z") for r in rows)
    write_sheet(tmp_path / "again.csv", *systems(), names=("zebra", "quagga"))
    assert (tmp_path / "again.csv").read_bytes() == sheet.read_bytes()
    write_sheet(tmp_path / "other.csv", *systems(), names=("zebra", "quagga"), seed=1)
    assert (tmp_path / "other.csv").read_bytes() != sheet.read_bytes()


def test_no_cell_is_a_formula_and_every_text_comes_back(tmp_path: Path) -> None:
    texts = ['=HYPERLINK("x")', "@SUM(A1)", 'a, "b"\nc; d', "-1"]
    a = [CandidateSet(str(i), "+q", [Response(text)]) for i, text in enumerate(texts)]
    write_sheet(tmp_path / "s.csv", a, a)
    rows = rows_of(tmp_path / "s.csv")
    assert all(row[name][0] not in "=+-@" for row in rows for name in ("prompt", "answer_1", "answer_2"))
    assert sorted(row["answer_1"].removeprefix("'") for row in rows) == sorted(texts)


def test_the_same_counts_come_back(sheet: Path) -> None:
    wishes = ["win"] * 9 + ["tie"] * 4 + ["loss"] * 5 + [""]
    found = read_sheets([fill(sheet, "ann", wishes)], key_of(sheet))
    system = found.system
    assert (system.a, system.win, system.tie, system.loss, system.n, found.unrated) == ("zebra", 9, 4, 5, 18, 1)
    assert system.win_rate == pytest.approx(11 / 18)
    assert found.raters == {"ann": (9, 4, 5)}
    assert found.blank == {"ann": 1}
    assert (found.pairs, found.fleiss, found.alpha) == ([], None, None)
    assert read_sheets([fill(sheet, "bob", wishes, ";")], key_of(sheet)).raters == {"bob": (9, 4, 5)}


def test_agreement_is_counted_as_in_papers(sheet: Path) -> None:
    """12/19 with one colleague, 18/19 with another; kappas by hand."""
    ann = ["win"] * 10 + ["loss"] * 5 + ["tie"] * 4
    bob = ["win"] * 7 + ["loss"] * 3 + ["loss"] * 3 + ["tie"] * 2 + ["tie"] * 2 + ["win"] * 2
    cid = ["win"] * 10 + ["loss"] * 5 + ["tie"] * 3 + ["win"]
    files = [fill(sheet, name, wishes) for name, wishes in (("ann", ann), ("bob", bob), ("cid", cid))]
    found = read_sheets(files, key_of(sheet))
    first, second, _ = found.pairs
    assert (first.raters, first.same, first.n) == (("ann", "bob"), 12, 19)
    assert (first.decided_same, first.decided) == (10, 13)
    chance = (10 * 9 + 5 * 6 + 4 * 4) / 19**2
    assert first.kappa == pytest.approx((12 / 19 - chance) / (1 - chance))
    assert (second.same, second.n, second.decided_same, second.decided) == (18, 19, 15, 15)
    cells = found.tables()[1].rows
    assert [row[1] for row in cells[:2]] == ["12/19", "18/19"]
    assert found.alpha is not None
    assert found.fleiss is not None


def test_an_item_goes_to_who_has_more_points(sheet: Path) -> None:
    wishes = {"r1": ["win", "win", "win"], "r2": ["win", "loss", "tie"], "r3": ["loss", "tie", ""]}
    files = [fill(sheet, name, [*own, *["tie"] * 16]) for name, own in wishes.items()]
    system = read_sheets(files, key_of(sheet)).system
    assert (system.win, system.tie, system.loss) == (2, 17, 0)


def test_fleiss_kappa_is_that_of_the_textbook() -> None:
    """Ten subjects, fourteen raters, five classes: the example by which the statistic is taught, kappa 0.210."""
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
             [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    ratings = [[float(k) for k, n in enumerate(row) for _ in range(n)] for row in table]
    assert fleiss_kappa(ratings) == pytest.approx(0.20993, abs=5e-6)
    assert fleiss_kappa([[1.0, 1.0], [1.0, 1.0]]) is None


def test_bad_cells_are_named(sheet: Path) -> None:
    text = fill(sheet, "ann", ["tie"] * COUNT).read_text()
    bad = sheet.parent / "bad.csv"
    bad.write_text(text.replace("Tie", "3", 1))
    with pytest.raises(RecordError, match=r"bad.csv:2: verdict: expected 1, 2, tie or nothing, found '3'"):
        read_sheets([bad], key_of(sheet))
    bad.write_text(text + "99,q,x,y,1\n")
    with pytest.raises(RecordError, match="'99' is not in the key"):
        read_sheets([bad], key_of(sheet))


def test_what_is_no_sheet_or_key_is_refused(sheet: Path, tmp_path: Path) -> None:
    filled = fill(sheet, "ann", ["win"] * COUNT)
    with pytest.raises(InputError, match="not the key of a sheet"):
        read_sheets([filled], sheet)
    (tmp_path / "plain.csv").write_text("x,y\n1,2\n")
    with pytest.raises(InputError, match="has no column item and no column verdict"):
        read_sheets([tmp_path / "plain.csv"], key_of(sheet))
    with pytest.raises(InputError, match="same file name"):
        read_sheets([filled, filled], key_of(sheet))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sets in zip(("before", "after"), systems(), strict=True):
        write(tmp_path / f"{name}.jsonl", sets)
    files, sheet = [str(tmp_path / f"{name}.jsonl") for name in ("before", "after")], tmp_path / "s.csv"
    assert main(["sheet", "make", *files, "--output", str(sheet)]) == 0
    assert "19 items" in capsys.readouterr().out
    filled = [str(fill(sheet, rater, ["win"] * 19)) for rater in ("ann", "bob")]
    assert main(["sheet", "read", *filled, "--key", str(key_of(sheet)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["system"]["a"], found["system"]["win"]) == ("before", 19)
    assert found["agreement"][0]["same"] == 19
    assert main(["sheet", "read", *filled]) == 1
