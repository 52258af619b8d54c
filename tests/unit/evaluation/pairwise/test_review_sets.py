"""Reviews and annotations as a set: what stands twice, is missing, unknown or beyond the scale is counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankalign import cli
from rankalign.errors import InputError, RecordError
from rankalign.evaluation.pairwise.reviews import parse_class, parse_tolerant
from rankalign.evaluation.pairwise.stored import read_categories, recompute


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def review(
    question: int, text: str, score: Any = None, names: tuple[str, str] = ("x", "y"), **more: Any
) -> dict[str, Any]:
    row = {"question_id": question, "model_1": names[0], "model_2": names[1], "text": text}
    return row | ({} if score is None else {"score": score}) | more


@pytest.mark.parametrize("parser", ["tolerant", "strict", "stored"])
def test_scores_beyond_the_scale_are_not_parsed(parser: str, tmp_path: Path) -> None:
    given = [(8, 5), (-1, 5), (11, 3), (85, 90), (-1, -1), (2023, 2024)]
    rows = [review(k, f"{a} {b}\nwords", [a, b]) for k, (a, b) in enumerate(given)]
    found = recompute(rows_file(tmp_path / "r.jsonl", rows), parser).as_dict()
    (system,) = found["systems"]
    assert [system[key] for key in ("sum_a", "sum_b", "n", "unparsed")] == [8, 5, 1, 5]
    assert found["parse_rate"] == pytest.approx(1 / 6)
    (remark,) = (remark for remark in found["remarks"] if "beyond 0 to 10" in remark)
    assert "'1', '2', '3'" in remark


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("\n\n  \n8 9\nBoth", (8, 9)), ("2023 2024\nIn the end: (7, 8)", (7, 8)), ("85 90", None), ("0 10", (0, 10))],
)
def test_first_lines(text: str, wanted: tuple[float, float] | None) -> None:
    assert parse_tolerant(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("so\nOutput (a)", (1, 0)), ("Output (b)", (0, 1)), ("**Output (b)** is better.", (0, 1)), ("Output (c)", None)],
)
def test_outputs_by_letter(text: str, wanted: tuple[float, float] | None) -> None:
    assert parse_class(text) == wanted


def test_duplicates_repeats_and_half_questions_are_named(tmp_path: Path) -> None:
    rows = [review(k, f"{k} 5\n", [k, 5], review_id=f"r{k}", reviewer_id="j") for k in range(4)]
    rows += [*rows[:2], review(3, "9 5\n", [9, 5], review_id="again", reviewer_id="j")]
    rows += [review(k, "5 6\n", [5, 6], ("y", "x")) for k in (0, 1, 2)]
    found = recompute(rows_file(tmp_path / "r.jsonl", rows)).as_dict()
    assert (found["duplicates"], found["reviews"], found["systems"][0]["n"]) == (2, 8, 3)
    text = " ".join(found["remarks"])
    for words in ("2 reviews stand in the file twice", "1 questions were judged several times", "one order only ('3')"):
        assert words in text
    # Question 3: once 3 to 5, once 9 to 5.
    assert found["repeatability"] == 0.0


def test_questions_of_the_other_file_are_named(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "r.jsonl", [review(k, "8 9\n") for k in (1, 2, 9)])
    rows = [{"question_id": k, "category": "math"} for k in (1, 2, 3, 4)]
    found = recompute(path, questions=rows_file(tmp_path / "q.jsonl", rows)).as_dict()
    text = " ".join(found["remarks"])
    assert "2 questions of the question file have no review: '3', '4'" in text
    assert "1 reviewed questions are not in the question file: '9'" in text
    with pytest.raises(RecordError, match="twice"):
        read_categories(rows_file(tmp_path / "twice.jsonl", rows[:1] * 2))


def test_reviews_of_several_pairs_must_cover_the_same_questions(tmp_path: Path) -> None:
    rows = [review(k, "8 9\n") for k in (1, 2, 3)] + [review(1, "8 9\n", names=("z", "y"))]
    found = recompute(rows_file(tmp_path / "r.jsonl", rows)).as_dict()
    assert any("y and z: 2 questions of the file were not judged ('2', '3')" in remark for remark in found["remarks"])
    winners = [{"winner": "x", "x": "", name: ""} for name in ("y", "z")]  # whose questions are not known
    assert len(recompute(rows_file(tmp_path / "w.jsonl", winners)).as_dict()["remarks"]) == 1


def test_a_pair_of_which_nothing_can_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    rows = [review(k, "8 9\n") for k in (1, 2)] + [review(k, "?", names=("z", "y")) for k in (1, 2)]
    found = recompute(rows_file(tmp_path / "r.jsonl", rows)).as_dict()
    assert [(system["a"], system["b"]) for system in found["systems"]] == [("x", "y")]
    assert "z and y: none of 2 questions has points" in found["remarks"]
    with pytest.raises(InputError, match="no prompt has a score"):
        recompute(rows_file(tmp_path / "none.jsonl", rows[2:]))


# --- whose answers -----------------------------------------------------------------------------------------------


def fastchat(tmp_path: Path) -> tuple[Path, list[str]]:
    rows = [{"question_id": k, "answer1_id": f"a{k}", "answer2_id": f"b{k}", "text": f"{k} 5\n"} for k in range(1, 5)]
    answers = []
    for letter, model in (("a", "alpaca"), ("b", "vicuna")):
        own = [{"answer_id": f"{letter}{k}", "question_id": k, "model_id": model, "text": "t"} for k in range(1, 5)]
        answers.append(str(rows_file(tmp_path / f"answer_{model}.jsonl", own)))
    return rows_file(tmp_path / "review.jsonl", rows), answers


def test_answer_ids_are_no_systems(tmp_path: Path) -> None:
    path, answers = fastchat(tmp_path)
    with pytest.raises(InputError, match="--answers"):
        recompute(path)
    (system,) = recompute(path, answers=answers).as_dict()["systems"]
    assert [system[key] for key in ("a", "b", "n", "sum_a", "sum_b")] == ["alpaca", "vicuna", 4, 10, 20]
    with pytest.raises(RecordError, match="'b1' is in none"):
        recompute(path, answers=answers[:1])


def test_the_published_reviews_without_names_join_through_their_answers(tmp_path: Path, data_kit: Path) -> None:
    lines = (data_kit / "vicuna" / "reviews.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in ("model_1", "model_2")} for line in lines]
    path = rows_file(tmp_path / "r.jsonl", rows)
    found = recompute(path, "stored", answers=[data_kit / "vicuna" / "answers.jsonl"]).as_dict()
    published = [json.loads(line) for line in (data_kit / "vicuna" / "published_totals.jsonl").read_text().splitlines()]
    sums = {(round(s["sum_a"], 2), round(s["sum_b"], 2)) for s in found["systems"]}
    wanted = {(513, 694), (583, 704), (664, 655.5), (693, 638)}
    assert sums == wanted
    assert {tuple(sorted((row["total_1"], row["total_2"]))) for row in published} >= {
        tuple(sorted(pair)) for pair in wanted
    }


# --- AlpacaEval --------------------------------------------------------------------------------------------------


def annotation(
    prompt: str, preference: float, model: str = "m", reference: str = "ref", by: str = "gpt"
) -> dict[str, Any]:
    return {
        "instruction": prompt,
        "preference": preference,
        "generator_1": reference,
        "generator_2": model,
        "annotator": by,
    }


def test_a_row_is_one_generator_reference_and_annotator(tmp_path: Path) -> None:
    rows = [
        annotation(f"q{k}", 2, reference=ref, by=by)
        for k in range(3)
        for ref in ("ref_one", "ref_two")
        for by in ("g", "h")
    ]
    path = rows_file(tmp_path / "a.jsonl", rows)
    found = recompute(path).as_dict()
    assert [(row["reference"], row["annotator"], row["n"]) for row in found["leaderboard"]] == [
        (ref, by, 3) for ref in ("ref_one", "ref_two") for by in ("g", "h")
    ]
    assert [row["reference"] for row in recompute(path, baseline="ref_two").as_dict()["leaderboard"]] == [
        "ref_two",
        "ref_two",
    ]
    with pytest.raises(InputError, match="did you mean 'ref_two"):
        recompute(path, baseline="ref_twoo")


def test_duplicates_are_dropped_with_a_count_and_contradictions_refused(tmp_path: Path) -> None:
    rows = [annotation(f"q{k}", 1 + k % 2) for k in range(8)] + [annotation("q0", 2, "other")]
    once = recompute(rows_file(tmp_path / "once.jsonl", rows)).as_dict()
    twice = recompute(rows_file(tmp_path / "twice.jsonl", rows + rows[:5])).as_dict()
    assert twice["leaderboard"] == once["leaderboard"]
    assert (once["duplicates"], twice["duplicates"]) == (0, 5)
    assert any("other: 7 prompts that others answered are missing: 'q1'" in remark for remark in once["remarks"])
    with pytest.raises(InputError, match="'q1' was judged twice"):
        recompute(rows_file(tmp_path / "no.jsonl", [*rows, annotation("q1", 1)]))


# --- judges who look elsewhere -----------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert cli.main(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_judge_that_always_says_a_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [review(k, "9 5\n", names=names) for k in range(30) for names in (("x", "y"), ("y", "x"))]
    for rows in (both, [row for row in both if row["model_1"] == "x"]):
        found = shown(capsys, "--reviews", rows_file(tmp_path / "r.jsonl", rows))
        assert [flag["name"] for flag in found["flags"]] == ["judge-follows-position"]
    facts = {
        row[0]: row[1] for row in shown(capsys, "--reviews", rows_file(tmp_path / "b.jsonl", both))["tables"][0]["rows"]
    }
    assert facts["first answer wins"] == 1.0
    assert "detectable a − b" in found["table"]["columns"]


def test_an_unreadable_judge_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [review(k, "8 9\n" if k < 3 else "no idea") for k in range(30)]
    found = shown(capsys, "--reviews", rows_file(tmp_path / "r.jsonl", rows))
    assert "Only 3 of 30 verdicts" in next(f["message"] for f in found["flags"] if f["name"] == "unreadable-judge")


@pytest.mark.parametrize(("score", "named"), [("length", True), ("noise", False)])
def test_a_judge_of_length_is_named(
    score: str, named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for side in (0, 1):
        rows = []
        for k in range(24):
            text = "word " * (5 + (k * 7 + side * 11) % 13)
            value = len(text) if score == "length" else (k * 5 + side * 3) % 7
            answer = {"text": text, "policy": f"m{side}", "scores": {"j": value}}
            rows.append({"id": f"p{k}", "prompt": f"q{k}", "responses": [answer]})
        files.append(rows_file(tmp_path / f"{score}{side}.jsonl", rows))
    found = shown(capsys, *files, "--judge", "j")
    assert ("judge-follows-length" in [flag["name"] for flag in found["flags"]]) is named
