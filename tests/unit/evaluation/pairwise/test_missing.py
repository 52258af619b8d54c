"""Two files whose prompts do not match: each fault named, and ways to go on; answers that the limit cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankalign import cli
from rankalign.evaluation.report.runs import read_run


def answers(path: Path, scores: dict[str, float | None], finished: bool = True, policy: str = "m") -> Path:
    rows = []
    for k, (ident, score) in enumerate(scores.items()):
        given = {} if score is None else {"scores": {"j": score}}
        answer = {"text": f"answer {ident} number {k % 3}", "policy": policy, "finished": finished, **given}
        rows.append({"id": ident.strip("*"), "prompt": f"q {ident.strip('*')}", "responses": [answer]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def compare(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code = cli.main(["compare", *map(str, arguments), "--judge", "j", "--json"])
    printed = capsys.readouterr()
    return json.loads(printed.out) if code == 0 else {"error": printed.err}


FIRST = {"A": 3.0, "B": 1.0, "D": 2.0, "C": 4.0}
SECOND = {"A": 1.0, "B": 2.0, "D": 2.0, "Z": 9.0}


def test_every_fault_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = answers(tmp_path / "a.jsonl", FIRST)
    said = compare(capsys, a, answers(tmp_path / "b.jsonl", SECOND))["error"]
    for words in ("the first file only: 'C'", "the second file only: 'Z'", "--on-missing intersect"):
        assert words in said


@pytest.mark.parametrize(
    ("how", "win", "tie", "loss"),
    # A is won, B lost, D tied; of the others C was answered by the first alone, Z by the second.
    [("intersect", 1, 1, 1), ("loss", 2, 1, 2)],
)
def test_ways_to_go_on(
    how: str, win: int, tie: int, loss: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = SECOND | {"Y": 1.0}
    a, b = answers(tmp_path / "a.jsonl", FIRST), answers(tmp_path / "b.jsonl", second)
    found = compare(capsys, a, b, "--on-missing", how)
    (system,) = found["systems"]
    loss += how == "loss"  # Y
    assert [system[key] for key in ("win", "tie", "loss", "n")] == [win, tie, loss, win + tie + loss]
    assert (system["sum_a"], system["sum_b"]) == (6, 5)
    assert system["win_rate"] == pytest.approx((win + tie / 2) / (win + tie + loss))
    assert found["missing"] == {"a": ["Z", "Y"], "b": ["C"]}
    assert any("2 prompts ('Z', 'Y')" in remark for remark in found["remarks"])


def test_cut_answers_are_said_from_five_in_a_hundred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {f"p{k}": float(k % 5) for k in range(20)}
    whole = answers(tmp_path / "whole.jsonl", scores)
    rows = [json.loads(line) for line in answers(tmp_path / "cut.jsonl", scores, policy="n").read_text().splitlines()]
    for count, named in ((0, False), (1, True), (19, True)):
        for k, row in enumerate(rows):
            row["responses"][0]["finished"] = k >= count
        cut = tmp_path / "cut.jsonl"
        cut.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = [flag["message"] for flag in compare(capsys, whole, cut)["flags"] if flag["name"] == "cut"]
        assert bool(flags) is named
        assert not named or f"cut's answers ({count} of 20)" in flags[0]
        assert cli.main(["eval", "lexical", str(cut), "--json"]) == 0
        assert bool(json.loads(capsys.readouterr().out)["warnings"]) is named


# --- names that nobody is called ---------------------------------------------------------------------------------


def test_a_reference_must_be_there_and_have_company(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rouge_score")
    pair = [{"text": "the same words here", "policy": name} for name in ("human", "copy", "other")]
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"id": "x", "prompt": "p", "responses": pair}) + "\n")

    def lexical(*arguments: str) -> tuple[int, str]:
        code = cli.main(["eval", "lexical", str(path), "--json", *arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, said = lexical("--reference", "humna")
    assert (code, "did you mean 'human'?" in said) == (1, True)
    code, said = lexical("--policy", "copi", "--reference", "human")
    assert (code, "did you mean 'copy'?" in said) == (1, True)
    code, said = lexical("--policy", "human", "--reference", "human")
    assert (code, "all answers are by reference" in said) == (1, True)
    code, said = lexical("--policy", "copy", "--reference", "human")
    assert code == 0
    metrics = json.loads(said)["metrics"]
    assert (metrics["rougeL"], metrics["without_reference"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.jsonl", "b.jsonl", "--baseline", "m"],
        ["--reviews", "r.jsonl", "--judge", "j"],
        ["--reviews", "r.jsonl", "a.jsonl"],
    ],
)
def test_flags_without_effect_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *arguments]) == 1
    assert "has no effect" in capsys.readouterr().err


def test_the_report_says_that_answers_were_cut(tmp_path: Path) -> None:
    answers(tmp_path / "before.jsonl", FIRST)
    answers(tmp_path / "after.jsonl", FIRST, finished=False)
    (note,) = read_run(tmp_path).notes
    assert "100% of the trained model's answers (4 of 4)" in note
