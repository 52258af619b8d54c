"""Accuracy by subset and section: hand cases with RewardBench's weights, ties, lists, files."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.raters.reward_bench import SECTIONS, evaluate_subsets, read_subsets
from rankalign.storage.jsonl import write_rows


def pair(ident: str, subset: str, good: float | None, bad: float) -> CandidateSet:
    responses = [
        Response("good", scores={"preference": 1.0, **({"rm": good} if good is not None else {})}),
        Response("bad", scores={"preference": 0.0, "rm": bad}),
    ]
    return CandidateSet(ident, "q", responses, {"subset": subset})


def pairs(subset: str, right: int, wrong: int) -> list[CandidateSet]:
    return [pair(f"{subset}{k}", subset, float(k < right), 0.5) for k in range(right + wrong)]


def test_sections_and_score_by_the_published_weights() -> None:
    sets = [
        *pairs("alpacaeval-easy", 3, 1), *pairs("mt-bench-med", 1, 1),
        *pairs("math-prm", 1, 0), *pairs("hep-go", 0, 2), *pairs("hep-cpp", 1, 1),
        *pairs("shp", 1, 0), *pairs("our own", 1, 4),
    ]  # fmt: skip
    found = evaluate_subsets(sets, "rm").metrics
    chat = (100 * 0.75 + 40 * 0.5) / 140
    reasoning = (984 * 1.0 + 164 * 0.0 + 164 * 0.5) / (984 + 328)
    assert found["section Chat"] == pytest.approx(chat)
    assert found["section Reasoning"] == pytest.approx(reasoning)
    assert found["score"] == pytest.approx((chat + reasoning + 0.5 * 1.0 + 0.2) / 3.5)
    assert found["subset alpacaeval-easy"] == 0.75
    assert sum(SECTIONS["Reasoning"][1].values()) == 2 * 984  # mathematics counts as much as all code


def test_a_subset_alone_is_a_plain_accuracy_with_its_interval() -> None:
    result = evaluate_subsets(pairs("x", 80, 20), "rm")
    assert result.metrics["score"] == result.metrics["section x"] == result.metrics["subset x"] == 0.8
    assert result.ci95["score"] == pytest.approx((0.72, 0.88), abs=0.011)  # 0.8 -+ 1.96 * 0.04
    assert result.n == 100


def test_ties_missing_scores_and_lists() -> None:
    def listed(ident: str, scores: list[float]) -> CandidateSet:
        responses = [Response("t", scores={"preference": float(k == 0), "rm": s}) for k, s in enumerate(scores)]
        return CandidateSet(ident, "q", responses, {"subset": "Math"})

    sets = [
        pair("tied", "p", 0.5, 0.5), pair("right", "p", 0.6, 0.5), pair("silent", "p", None, 0.5),
        listed("first", [4, 1, 2, 3]), listed("shared", [4, 4, 2, 3]), listed("all tied", [1, 1, 1, 1]),
        listed("last", [0, 1, 2, 3]),
    ]  # fmt: skip
    result = evaluate_subsets(sets, "rm")
    assert result.metrics["subset p"] == 0.5
    assert result.metrics["subset Math"] == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)
    assert (result.metrics["unscored"], result.n) == (1, 6)


def test_both_versions_of_the_files_are_read(tmp_path: Path) -> None:
    first = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "chosen_model": "a", "rejected_model": "b"}
    write_rows(tmp_path / "one.jsonl", [first | {"subset": "math-prm", "id": 7}])
    second = {"id": "1", "prompt": "2 + 2?", "chosen": ["4"], "rejected": ["5", "6", "7"], "subset": "Math"}
    write_rows(tmp_path / "two.jsonl", [second])
    for name, subset, texts in (("one", "math-prm", ["4", "5"]), ("two", "Math", ["4", "5", "6", "7"])):
        (record,) = read_subsets(tmp_path / f"{name}.jsonl")
        assert record.meta["subset"] == subset
        assert [r.text for r in record.responses] == texts
        assert [r.scores["preference"] for r in record.responses] == [1.0, *[0.0] * (len(texts) - 1)]
    write_rows(tmp_path / "bad.jsonl", [second, second | {"rejected": "5"}])
    with pytest.raises(RecordError, match="list of texts"):
        read_subsets(tmp_path / "bad.jsonl")


def test_the_command_scores_with_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "longer.py").write_text(
        "def length(samples, prompts, outputs):\n    return [float(len(o)) for o in outputs]\n"
    )
    rows = [
        {"prompt": "q", "chosen": c, "rejected": "bb", "subset": "s", "id": str(k)} for k, c in enumerate(("ccc", "c"))
    ]
    write_rows(tmp_path / "f.jsonl", rows)
    words = ["eval", "subsets", str(tmp_path / "f.jsonl"), "--function", f"{tmp_path / 'longer.py'}:length"]
    assert main(words) == 0
    assert "section s" in capsys.readouterr().out


def test_records_without_subset_or_scores_are_refused() -> None:
    with pytest.raises(InputError, match="names no subset"):
        evaluate_subsets([CandidateSet("x", "q", [Response("t")])], "rm")
    with pytest.raises(InputError, match="no record has scores"):
        evaluate_subsets([pair("a", "s", None, 1.0)], "rm")
