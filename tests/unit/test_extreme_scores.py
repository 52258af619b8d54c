"""Scores as large as a double goes: every command gives numbers, null or a sentence, and never NaN or a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, write
from rankalign.storage.jsonl import without_nan

EXTREME = [1e308, 1e308, -1e308]


def file(path: Path, scores: list[float], policy: str = "p") -> str:
    """Four records with an answer for each score."""
    sets = [
        CandidateSet(
            f"r{i}", f"q{i}", [Response("so " * (k + 1), policy, scores={"j": s}) for k, s in enumerate(scores)]
        )
        for i in range(4)
    ]
    write(path, sets)
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    """Exit code, what ``--json`` printed, and stderr. A traceback would end the test."""
    code = main([*words, "--json"])
    out, err = capsys.readouterr()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    return code, json.loads(out, parse_constant=refuse) if out else None, err


@pytest.mark.parametrize("scores", [EXTREME, [1.0, 1.0], [3.0]])
def test_lint(tmp_path: Path, capsys: pytest.CaptureFixture[str], scores: list[float]) -> None:
    code, result, _ = told(capsys, "lint", file(tmp_path / "a.jsonl", scores))
    assert code == 0
    baseline = result["longest_answer"]["j"]
    assert (baseline["accuracy"] is None) == (len(set(scores)) == 1)


@pytest.mark.parametrize("more", [(), ("--best_of", "2"), ("--best_of",)])
def test_rewards_are_refused_by_record_and_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    code, result, err = told(capsys, "eval", "reward", file(tmp_path / "a.jsonl", EXTREME), *more)
    assert (code, result) == (1, None)
    assert "record 'r0': the score 1e+308 by judge 'j' is beyond 1e+100" in err
    code, result, _ = told(capsys, "eval", "reward", file(tmp_path / "b.jsonl", [9e99, -9e99]), *more)
    assert code == 0
    assert result["n"] == 4


def test_compare_refuses_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = file(tmp_path / "a.jsonl", [1e308], "a"), file(tmp_path / "b.jsonl", [-1e308], "b")
    code, result, err = told(capsys, "compare", *paths)
    assert (code, result) == (1, None)
    assert "record 'r0': the score 1e+308 by judge 'j'" in err


def test_agreement_needs_the_order_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    both = [{"j": s, "k": s / 1e308} for s in EXTREME]
    write(path, [CandidateSet(str(i), "q", [Response(f"{k}", scores=s) for k, s in enumerate(both)]) for i in range(4)])
    code, result, _ = told(capsys, "eval", "agreement", str(path), "--raters", "j", "k")
    assert code == 0
    assert result["metrics"]["tau_b"] == pytest.approx(1.0)


def test_null_where_json_has_no_number() -> None:
    value = {"a": [1.0, float("nan"), (float("inf"),)], "b": {"c": -float("inf"), "d": "nan"}, "e": True}
    assert without_nan(value) == {"a": [1.0, None, [None]], "b": {"c": None, "d": "nan"}, "e": True}
