"""Published shapes: the format is told, the better answer is the better one, and nothing that speaks is left unread."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from published_rows import ASSISTANT, OTHER, PUBLISHED, USER
from test_formats import ROWS, load, texts

from rankalign.cli import main
from rankalign.data.convert import Intake, convert, find_reader
from rankalign.data.formats import FORMATS
from rankalign.data.formats.answers import AnswerFormat
from rankalign.data.formats.common import RowFormat
from rankalign.data.formats.detect import detect_row
from rankalign.data.formats.unread import Ignored, describes
from rankalign.data.lint import lint
from rankalign.data.records import CandidateSet, choose_judge, read
from rankalign.errors import InputError, RecordError
from rankalign.storage.jsonl import write_rows


def read_as(row: dict[str, Any], name: str = "", more: tuple[dict[str, Any], ...] = ()) -> list[CandidateSet]:
    errors: list[RecordError] = []
    rows = enumerate([copy.deepcopy(row), *copy.deepcopy(more)], 1)
    sets = list(find_reader(name or detect_row(row)).read(rows, "set.jsonl", errors.append))
    assert [str(error) for error in errors] == []
    return sets


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in PUBLISHED.items() for row in rows])
def test_a_published_row_is_told_by_its_columns(name: str, row: dict[str, Any]) -> None:
    assert detect_row(row) == ("trl" if name == "prompt-response" and "messages" in row else name)


PAIR = {"prompt": "Q?", "chosen": "a", "rejected": "b"}
CAPYBARA = {"source": "s", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}
UNLIKE = [USER, ASSISTANT, USER, ASSISTANT]
SAFE = {"prompt": "Q?", "response_0": "a", "response_1": "b", "is_response_0_safe": False, "is_response_1_safe": True}
MARKED = "Q?\n<extra_id_1>Assistant\nA.\n<extra_id_1>User\nB?\n<extra_id_1>Assistant\n"
HARM = {"response_0_severity_level": 3, "response_1_severity_level": 0}
STEPS = {"instruction": "Q?", "generations": ["a", "b"], "generation_models": ["m", "n"]}
HERMES = {"prompt": "Q?", "candidates_completions": ["a", "b"], "candidate_policies": ["m", "n"]}
NAMED = {"prompt": "Q?", "output1": "a", "output2": "b", "model_1": "m", "model_2": "n"}
NECTAR = [{"answer": "a", "model": "m", "rank": 3}, {"answer": "b", "model": "n", "rank": 1}]
BATTLE = {
    "question_id": 7,
    "model_a": "m",
    "model_b": "n",
    "conversation_a": [USER, ASSISTANT],
    "conversation_b": [USER, OTHER],
}
KAGGLE = {"id": 1, "model_a": "m", "model_b": "n", "prompt": '["Q?"]', "response_a": '["a"]', "response_b": '["b"]'}
WINS = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0}
GRADES = {
    "orig_instruction": "Q?",
    "orig_response_A": "a",
    "orig_response_B": "b",
    "instruction": "Judge.",
    "output": "B",
}
TREE = [{"from": "user", "value": "Q?"}, {"from": "assistant", "value": "Step 1."}, {"from": "user", "value": "Go on."}]

# A row, the judge, and the scores that its published meaning gives the answers.
MEANING: list[tuple[dict[str, Any], str, list[float | None]]] = [
    (SAFE | {"better_response_id": 0, "safer_response_id": 1}, "preference", [1, 0]),
    (SAFE | {"better_response_id": 0, "safer_response_id": 1}, "safer", [0, 1]),
    (SAFE | {"better_response_id": 0, "safer_response_id": 1}, "safe", [0, 1]),
    (
        SAFE | {"better_response_id": 1, "response_0_severity_level": 3, "response_1_severity_level": 0},
        "severity",
        [-3, 0],
    ),
    ({"prompt": "Q?", "response_1": "a", "response_2": "b", "preference_strength": -3}, "preference", [1, 0]),
    ({"prompt": "Q?", "response_1": "a", "response_2": "b", "preference_strength": 0}, "preference", [0.5, 0.5]),
    ({"context": [USER], "response1": "a", "response2": "b", "overall_preference": 1}, "preference", [0, 1]),
    ({"prompt": "\n\nHuman: Q?\n\nAssistant: ", "answers": NECTAR, "good_natured": True}, "rank", [-3, -1]),
    ({"prompt": "Q?", "answers": NECTAR}, "rank", [-3, -1]),
    (BATTLE | {"winner": "model_a"}, "preference", [1, 0]),
    (BATTLE | {"winner": "tie (bothbad)"}, "preference", [0.5, 0.5]),
    (KAGGLE | WINS | {"winner_model_b": 1}, "preference", [0, 1]),
    (KAGGLE | WINS | {"winner_tie": 1}, "preference", [0.5, 0.5]),
    ({"prompt": "Q?", "response": "a", "category": {"x": True}, "is_safe": False}, "safe", [0]),
    ({"instruction": "Q?", "generations": ["a", "b"], "ratings": [4, None]}, "rating", [4, None]),
    (
        {"instruction": "Q?", "generations": ["a", "b"], "ratings": ["4", "5"], "generation_models": ["m", "n"]},
        "rating",
        [4, 5],
    ),
    (
        {"prompt": "Q?", "candidates_completions": ["a", "b"], "candidate_policies": ["m", "n"], "ranks": [2, 1]},
        "rank",
        [-2, -1],
    ),
    (GRADES | {"orig_preference": "B", "orig_score_A": "2", "orig_score_B": "4"}, "preference", [0, 1]),
    (GRADES | {"orig_preference": "B", "orig_score_A": "2", "orig_score_B": "4"}, "score", [2, 4]),
    ({"orig_instruction": "Q?", "orig_response": "a", "orig_score": "4", "output": "[RESULT] 4"}, "score", [4]),
    ({"trajectory": TREE, "chosen": "a", "rejected": "b", "task": "Math"}, "preference", [1, 0]),
    ({"prompt": "Q?", "responses": ["a", "b", "c"], "rewards": [1, 2.5, None]}, "reward", [1, 2.5, None]),
    ({"prompt": [USER], "candidates": [{"text": "a", "reward": 1}, {"text": "b", "reward": 0}]}, "reward", [1, 0]),
    ({"question": "Q?", "samples": [{"response": "a", "score": "1"}, {"response": "b"}]}, "score", [1, None]),
    ({"prompt": "Q?", "completions": ["a", "b"], "is_correct": [True, False]}, "label", [1, 0]),
    ({"messages": [USER, ASSISTANT], "label": False}, "label", [0]),
    ({"prompt": "Q?", "response": "a", "label": True}, "label", [1]),
    (CAPYBARA | {"rating_chosen": 5, "rating_rejected": 2, "chosen_model": "m"}, "rating", [5, 2]),
    (CAPYBARA | {"prompt": "Why?", "score_chosen": 8.0, "score_rejected": 3.5}, "score", [8, 3.5]),
    (CAPYBARA | {"prompt": "Why?", "question": "Why?"}, "preference", [1, 0]),
    (PAIR | {"chosen_score": 9, "rejected_score": 1}, "score", [9, 1]),
    ({"system": "Be kind.", "question": "Q?", "chosen": "a", "rejected": "b"}, "preference", [1, 0]),
    ({"system": "Be kind.", "input": "Q?", "chosen": "a", "rejected": "b"}, "preference", [1, 0]),
    ({"instruction": "Q?", "chosen_response": "a", "rejected_response": "b"}, "preference", [1, 0]),
    ({"prompt": "Q?", "response_a": "a", "response_b": "b", "winner": "B"}, "preference", [0, 1]),
    ({"prompt": "Q?", "answer_1": "a", "answer_2": "b", "preference": "answer_2"}, "preference", [0, 1]),
    (
        {"prompt": "Q?", "output1": "a", "output2": "b", "model_1": "m", "model_2": "n", "winner": "m"},
        "preference",
        [1, 0],
    ),
    ({"prompt": "Q?", "response_a": "a", "response_b": "b", "winner": "tie"}, "preference", [0.5, 0.5]),
]


@pytest.mark.parametrize(("row", "judge", "scores"), MEANING)
def test_the_verdict_is_what_the_columns_mean(row: dict[str, Any], judge: str, scores: list[float | None]) -> None:
    (record,) = read_as(row)
    assert record.scores(judge) == scores
    assert [response.text for response in record.responses][:2] in (
        [["a", "b"], ["a"], [ASSISTANT["content"], OTHER["content"]], [ASSISTANT["content"]]]
    )


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (MEANING[7][0], [{"role": "user", "content": "Q?"}]),
        (
            {
                "prompt": "Q?\n<extra_id_1>Assistant\nA.\n<extra_id_1>User\nB?\n<extra_id_1>Assistant\n",
                "response": "a",
                "helpfulness": 1,
            },
            [
                {"role": "user", "content": "Q?"},
                {"role": "assistant", "content": "A."},
                {"role": "user", "content": "B?"},
            ],
        ),
        (
            {"trajectory": TREE, "chosen": "a", "rejected": "b"},
            [{"role": turn["from"], "content": turn["value"]} for turn in TREE],
        ),
        (
            {"instruction": "Sum up.", "context": "News.", "response": "a"},
            [{"role": "user", "content": "Sum up.\n\nNews."}],
        ),
        (
            {"system_prompt": "Be kind.", "question": "Q?", "response": "a"},
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q?"}],
        ),
        ({"system": "Be kind.", "messages": [USER, ASSISTANT]}, [{"role": "system", "content": "Be kind."}, USER]),
        (
            {"system": "Be kind.", "prompt": "Q?"},
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q?"}],
        ),
        (
            {"system": "Be kind.", "instruction": "Q?", "output": "a"},
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q?"}],
        ),
        ({"conversation": [USER, ASSISTANT]}, [USER]),
    ],
)
def test_the_prompt_is_what_the_columns_mean(row: dict[str, Any], prompt: Any) -> None:
    (record,) = read_as(row)
    assert record.prompt == prompt


def test_answers_to_one_prompt_become_one_record() -> None:
    first = {"prompt": "Q?", "response": "a", "helpfulness": 3, "correctness": 4}
    rows = (first | {"response": "b", "helpfulness": 0}, first | {"prompt": "R?", "response": "c"})
    sets = read_as(first, more=rows)
    assert [[response.text for response in record.responses] for record in sets] == [["a", "b"], ["c"]]
    assert sets[0].scores("helpfulness") == [3, 0]
    form = find_reader("helpsteer")
    assert list(form.write(sets, Intake(False).losses)) == [first, *rows]


def test_battles_that_part_before_the_last_answer_are_counted(tmp_path: Path) -> None:
    row = BATTLE | {"winner": "model_a", "conversation_a": UNLIKE, "conversation_b": [USER, OTHER, USER, OTHER]}
    write_rows(tmp_path / "in.jsonl", [row, BATTLE | {"winner": "model_b"}])
    report = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (report["written"], report["lost"]) == (1, {"battles over several turns, whose answers share no prompt": 1})


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "Q?", "response_a": "a", "response_b": "b", "winner": 1}, "winner"),
        ({"prompt": "Q?", "response_a": "a", "response_b": "b", "label": 0}, "label"),
        ({"prompt": "Q?", "responses": ["a", "b"], "rewards": [1]}, "rewards"),
        ({"prompt": "Q?", "completions": ["Step 1.", "Step 2."], "labels": [True, False]}, "labels"),
        (SAFE | {"better_response_id": 2}, "better_response_id"),
        ({"prompt": "Q?", "response_1": "a", "response_2": "b", "preference_strength": 7}, "preference_strength"),
        (KAGGLE | WINS, "winner_model_a"),
        (BATTLE | {"winner": "model_c"}, "winner"),
        ({"system": "One.", "messages": [{"role": "system", "content": "Two."}, USER, ASSISTANT]}, "system"),
        ({"messages": [USER, ASSISTANT], "label": "good"}, "label"),
    ],
)
def test_what_has_no_one_meaning_is_refused_by_name(row: dict[str, Any], field: str) -> None:
    errors: list[RecordError] = []
    assert list(find_reader(detect_row(row)).read([(3, row)], "set.jsonl", errors.append)) == []
    assert [(error.line, error.field) for error in errors] == [(3, field)]


# --- columns that nobody reads -----------------------------------------------------------------------------------

STRANGE = {"zz_response": "an answer", "zz_score": 4, "better_zz_id": 1, "zz": [{"role": "assistant", "content": "x"}]}
READERS = [name for name in FORMATS if name != "rankalign"]


@pytest.mark.parametrize("column", STRANGE)
@pytest.mark.parametrize("name", READERS)
def test_a_column_that_nobody_reads_is_named(name: str, column: str) -> None:
    for row in ROWS[name]:
        if name == "minchatgpt" and isinstance(STRANGE[column], str):
            continue  # every column of text is the answer of a policy named so
        errors: list[RecordError] = []
        form = find_reader(name)
        sets = list(form.read([(1, copy.deepcopy(row) | {column: STRANGE[column]})], "set.jsonl", errors.append))
        assert isinstance(form, RowFormat | AnswerFormat)
        named = {found for record in sets for found in form.unread(record)}
        assert column in named or column in "".join(f"{error.field} {error.reason}" for error in errors), row


@pytest.mark.parametrize("name", [name for name in READERS if isinstance(find_reader(name), RowFormat)])
def test_a_null_column_is_an_absent_one(name: str) -> None:
    """Tables have every column in every row: what one row lacks is null there."""
    for row in ROWS[name]:
        others = {key: None for other in ROWS[name] for key in other if key not in row}
        form = find_reader(name, Ignored.of("all"))
        plain, nulls = ([], [])  # type: ignore[var-annotated]
        for found, given in ((plain, row), (nulls, row | others)):
            for record in form.read([(1, copy.deepcopy(given))], "set.jsonl", lambda error: None):
                found.append((record.prompt, [(r.text, r.policy, r.scores) for r in record.responses]))
        assert plain == nulls


def test_a_catch_all_stops_and_goes_on_by_wish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Q?", "my_reply": "a", "stars_given": 5, "source": "s"}]
    source = tmp_path / "in.jsonl"
    write_rows(source, rows)
    with pytest.raises(
        RecordError, match=r"in\.jsonl:1: my_reply, stars_given: .*--ignore_columns my_reply,stars_given"
    ):
        convert(source, tmp_path / "out.jsonl")
    for wish in ("my_reply,stars_given", "all"):
        assert main(["convert", str(source), str(tmp_path / "out.jsonl"), "--ignore_columns", wish, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["unread"] == {"my_reply": 1, "stars_given": 1}
    (record,) = read(tmp_path / "out.jsonl")
    assert record.meta["my_reply"] == "a"
    assert main(["lint", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"]["L404"] == 2


def test_a_scored_row_goes_on_and_its_unread_columns_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "in.jsonl", [PAIR | {"margin": 0.5, "response_c": "c"}] * 2)
    report = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (report["written"], report["lost"], report["unread"]) == (2, {}, {"margin": 2, "response_c": 2})
    assert "columns that are not read, with their rows (they stay in meta): margin (2)" in capsys.readouterr().err


def test_an_ignored_column_is_hidden_from_the_reader() -> None:
    intake = Intake(False, "system,label")
    form = find_reader("trl", intake.ignored)
    row = {"system": "Be kind.", "messages": [USER, ASSISTANT], "label": False}
    (record,) = form.read([(1, row)], "set.jsonl", intake)
    assert (record.prompt, record.responses[0].scores) == ([USER], {})
    assert record.meta["system"] == "Be kind."


@pytest.mark.parametrize(
    "name", ["id", "prompt_id", "source", "conversation_hash", "num_tokens", "created_at", "modelName"]
)
def test_names_that_describe(name: str) -> None:
    assert describes(name)


@pytest.mark.parametrize(
    "name",
    [
        "better_response_id",
        "winner_id",
        "response_b",
        "score",
        "labels",
        "chosen_model_rank",
        "turns",
        "is_safe",
        "conversation",
        "best_source",
    ],
)
def test_names_that_speak(name: str) -> None:
    assert not describes(name)


def test_lint_names_columns_that_wait_unread_in_old_records() -> None:
    (record,) = read_as(PAIR)
    record.meta |= {"response_c": "an answer", "source": "s"}
    report = lint([record])
    assert report.counts()["L404"] == 1
    assert "response_c" in report.findings["L404"][0].message


def test_a_pairs_own_verdict_ranks_where_no_judge_is_named() -> None:
    (record,) = read_as(PAIR | {"chosen_score": 9, "rejected_score": 1})
    assert choose_judge([record]) == "preference"
    assert choose_judge([record], "score") == "score"


def test_arena_hards_questions_and_answers_become_one_set(tmp_path: Path) -> None:
    for model, word in (("m1", "Red."), ("m2", "Blue.")):
        answer = {"role": "assistant", "content": {"answer": word}}
        rows = [{"uid": f"u{n}", "ans_id": "x", "model": model, "messages": [USER, answer]} for n in range(5)]
        write_rows(tmp_path / f"{model}.jsonl", rows)
    write_rows(tmp_path / "q.jsonl", [{"uid": f"u{n}", "category": "c", "prompt": "Why?"} for n in range(5)])
    files = [tmp_path / name for name in ("m1.jsonl", "q.jsonl", "m2.jsonl")]
    assert convert(files, tmp_path / "out.jsonl")["written"] == 5
    assert {len(record.responses) for record in read(tmp_path / "out.jsonl")} == {2}


def test_a_format_that_cannot_be_told_says_which_there_are(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"foo": 1}])
    with pytest.raises(InputError, match="cannot tell the format from the keys foo"):
        convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_questions_in_two_turns_are_prompts_and_the_later_turns_are_counted(tmp_path: Path) -> None:
    questions = [{"question_id": 81 + n, "category": "writing", "turns": [f"Write {n}.", "Shorter."]} for n in range(3)]
    write_rows(tmp_path / "question.jsonl", questions)
    report = convert(tmp_path / "question.jsonl", tmp_path / "out.jsonl")
    assert (report["written"], report["lost"], report["unread"]) == (3, {}, {"turns[1:]": 3})
    first = next(iter(read(tmp_path / "out.jsonl")))
    assert (first.id, first.prompt) == ("81", [{"role": "user", "content": "Write 0."}])
    assert first.meta == {"category": "writing", "turns": ["Write 0.", "Shorter."]}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_battles_written_as_lists_in_text_are_turns_however_they_are_spaced(separators: tuple[str, str]) -> None:
    cells = {"prompt": ["Hi", "Or/und?"], "response_a": ["Hey", "So"], "response_b": ["Hey", "Nein"]}
    row = {key: json.dumps(turns, separators=separators) for key, turns in cells.items()}
    row |= {"model_a": "x", "model_b": "y", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    (record,) = load("arena-battles", row)
    assert [(m["role"], m["content"]) for m in record.prompt] == [  # type: ignore[index]
        ("user", "Hi"), ("assistant", "Hey"), ("user", "Or/und?"),
    ]  # fmt: skip
    assert texts(record) == ["So", "Nein"]
    assert find_reader("arena-battles").unread(record) == []  # type: ignore[attr-defined]
    single = row | {"prompt": "[1, 2] means?", "response_a": "[]", "response_b": '["a"]'}
    (record,) = load("arena-battles", single)
    assert texts(record) == ["[]", '["a"]']
