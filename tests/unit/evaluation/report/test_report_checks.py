"""What other commands leave in a run folder: on the page if it is theirs, refused by name if it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.evaluation.report import page as report
from rankalign.evaluation.report.checks import check_tables, training_warnings
from rankalign.evaluation.report.runs import Run, read_run
from rankalign.storage.jsonl import write_rows

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

NUMERICS = {
    "metrics": {"pairs": 9, "bf16_drift": 0.01, "bf16_max_drift": 0.5, "bf16_changed": 1, "bf16_unstable": 2},
    "n": 3,
}


def test_numerics_have_one_row_a_precision() -> None:
    (table,) = check_tables({"numerics.json": NUMERICS})
    assert table.rows == [["bf16", 0.01, 0.5, 1, 2]]
    assert table.note == "against float64, 3 prompts, 9 pairs; drifts in nats"


def test_lint_shows_what_was_found_as_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    responses = [
        Response("same", scores={"j": 1.0}),
        Response("same", scores={"j": 2.0}),
        Response("", scores={"j": 0.0}),
    ]
    write(tmp_path / "f.jsonl", [CandidateSet("odd one", "q", responses)])
    assert main(["lint", str(tmp_path / "f.jsonl"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (table,) = check_tables({"lint.json": content})
    assert {row[0]: row[1] for row in table.rows} == {code: n for code, n in content["findings"].items() if n}
    assert any("odd one" in row[2] for row in table.rows)


def test_audit_is_what_compare_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question_id": q, "answer1_id": x, "answer2_id": y, "text": "", "score": score}
        for q in range(4)
        for x, y, score in (("a", "b", [8, 6]), ("b", "a", [7, 7]), ("b", "c", [9, 2]), ("c", "b", [1, 5]))
    ]
    write_rows(tmp_path / "reviews.jsonl", rows)
    assert main(["compare", "--reviews", str(tmp_path / "reviews.jsonl"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    audit, pairs = check_tables({"audit.json": content})
    facts = {row[0]: row[1] for row in audit.rows}
    assert (facts["parse rate"], facts["alike in both orders"]) == (1.0, 0.5)
    assert facts["points for standing first"] == pytest.approx(((2 + 0) / 2 + (7 - 4) / 2) / 2)
    assert len(pairs.rows) == 2
    assert [s["system"] for s in content["bradley_terry"]["standings"]] == ["a", "b", "c"]
    assert main(["compare", "--reviews", str(tmp_path / "reviews.jsonl")]) == 0
    assert "Bradley-Terry strengths" in capsys.readouterr().out


def test_agreement_and_suites_are_what_eval_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [
        CandidateSet(
            f"p{k}",
            "q",
            [Response("a", scores={"j": 1.0, "people": float(k > 0)}), Response("b", scores={"j": 0.0, "people": 0.5})],
            {"judge:j": {"counts": {"calls": 2, "parsed": 1, "pairs": 1, "consistent": 1}}},
        )
        for k in range(4)
    ]
    write(tmp_path / "f.jsonl", sets)
    assert main(["eval", "agreement", str(tmp_path / "f.jsonl"), "--judge", "j", "--truth", "people", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (table,) = check_tables({"agreement.json": content})
    told = {row[0]: row[1] for row in table.rows}
    assert (told["accuracy"], told["parse_rate"], told["consistency"]) == (0.75, 0.5, 1.0)
    graded = [{"question_id": 1, "model": "m", "turn": 1, "score": 8}]
    write_rows(tmp_path / "mt.jsonl", graded)
    assert main(["eval", "suite", "mt-bench", "--files", str(tmp_path / "mt.jsonl"), "--json"]) == 0
    (table,) = check_tables({"suite.json": json.loads(capsys.readouterr().out)})
    assert table.rows[0][:2] == ["m", 8.0]


@pytest.mark.parametrize("name", ["numerics.json", "lint.json", "audit.json", "agreement.json", "suite.json"])
@pytest.mark.parametrize("content", [{"x": 1}, {"metrics": 3}, {"findings": {"a": 1}, "records": 2}])
def test_foreign_files_are_refused_by_name(name: str, content: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"{name}: not what `rankalign "):
        check_tables({name: content})


def test_a_folder_of_checks_alone_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "numerics.json").write_text(json.dumps(NUMERICS))
    (tmp_path / "kl.json").write_text(json.dumps({"metrics": {"kl": 3.25}}))
    rows = [
        {"id": f"p{k}", "epoch": 1, "step": 1, "loss": 1.0 + k, "margin": k - 1.5, "tau": k - 1.5} for k in range(4)
    ]
    write_rows(tmp_path / "ledger.jsonl", rows)
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert '<th scope="row">bf16</th>' in page
    assert "Probably mislabelled" in page
    assert (
        page.index('<th scope="row">p0</th>') < page.index('<th scope="row">p1</th>') < page.index("Hardest examples")
    )
    assert report.before_after(read_run(tmp_path), {}).rows == [
        ["KL to the start model, nats an answer", None, "3.25", None]
    ]
    (tmp_path / "kl.json").write_text('{"metrics": []}')
    with pytest.raises(InputError, match=r"kl\.json: not what"):
        report.write_report(tmp_path)


def test_warnings_of_training_stand_on_the_page() -> None:
    log = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0, "warnings": {"ties": "too many <b>"}},
        {"warnings": ["odd"]},
    ]
    assert training_warnings(log) == [(2, "ties", "too many <b>")]
    page = report.render(Run("r", log=log))
    assert "<dt>ties, step 2</dt><dd>too many &lt;b&gt;</dd>" in page
