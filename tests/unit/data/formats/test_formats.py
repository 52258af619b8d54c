"""What every format promises: a row comes back as it was, and a bad one is refused by file and line."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_rows import PUBLISHED

from rankalign.data.convert import find_format, find_reader
from rankalign.data.formats import FORMATS, Losses
from rankalign.data.formats.unread import Ignored
from rankalign.data.records import CandidateSet, Response, parse, to_dict
from rankalign.errors import RecordError

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
OTHER = {"role": "assistant", "content": "No idea."}


def load(name: str, *rows: dict[str, Any]) -> list[CandidateSet]:
    """Records of rows, through JSON and back, as a file of records would give them."""
    errors: list[RecordError] = []
    form = find_reader(name, Ignored.of("all"))
    sets = list(form.read(enumerate(copy.deepcopy(rows), 1), "set.jsonl", errors.append))
    assert [str(error) for error in errors] == []
    return [parse(json.loads(json.dumps(to_dict(record)))) for record in sets]


def dump(name: str, *sets: CandidateSet, **options: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    losses = Losses()
    return list(find_format(name, **options).write(sets, losses)), losses.counts


def refusal(name: str, row: dict[str, Any]) -> tuple[str, str]:
    errors: list[RecordError] = []
    assert list(find_format(name).read([(7, row)], "set.jsonl", errors.append)) == []
    (error,) = errors
    assert (error.file, error.line) == ("set.jsonl", 7)
    return error.field, error.reason


def texts(record: CandidateSet) -> list[str]:
    return [response.text for response in record.responses]


def several(*scores: float | None, judge: str = "rm", **more: Any) -> CandidateSet:
    responses = [Response(f"r{i}", scores={judge: score}) for i, score in enumerate(scores)]
    return CandidateSet("s", "p", responses, **more)


# --- rows come back as they were ---------------------------------------------------------------------------------

PAIR = {"chosen": " Good.", "rejected": " Bad."}
DIALOGUE = "\n\nHuman: Is it?\n\nAssistant: Yes.\nIt is.\n\nHuman: Sure?\n\nAssistant:"
INFO = {"id": "t3_2", "post": "My tea is cold.", "title": "Cold", "subreddit": "tea", "site": None}
SUMMARIES = [
    {"text": " My tea is cold, help me", "policy": "sup1", "note": "fine"},
    {"text": " The tea of me is cold", "policy": "ref", "note": None},
]
RATING = {"helpfulness": {"Rating": "4", "Rationale": "ok"}, "honesty": {"Rating": "N/A", "Rationale": ""}}
RATED = {"model": "m", "response": "a", "principle": "p", "annotations": RATING, "overall_score": 7.5, "critique": "c"}
HUMAN, GPT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}
SYSTEM = {"from": "system", "value": "Be brief."}
TURNS = ["<|prompter|>Why?", "<|assistant|>Because.", "<|prompter|>Sure?", "<|assistant|>"]
FEEDBACK = {
    "prompt_id": "p",
    "prompt": [USER],
    "output_A": [ASSISTANT],
    "output_B": [OTHER],
    "label": 1,
    "type": "pairwise_feedback",
}
BOTH_ORDERS = {"order_1": "1", "order_2_swapped": "2", "completion_1": "Output (a)"}
ANNOTATED = {
    "instruction": "Add.",
    "output_1": "3",
    "generator_1": "base",
    "output_2": "4",
    "generator_2": "m",
    "annotator": "gpt",
    "preference": 1.25,
}
LISTWISE = {"question": "Why?", "answers": ["a", "b"], "model_ids": ["m", "n"], "tokens": 3}


def ranked(rank: int, message: dict[str, Any]) -> dict[str, Any]:
    return {"rank": rank, "completion": [message]}


ROWS: dict[str, list[dict[str, Any]]] = {
    **PUBLISHED,
    "table": [
        {"id": "1", "prompt": "p", "policy": "q", "text": "t", "finished": False, "score:rm": 1, "meta.source": "x"},
        {"id": "2", "prompt": "p", "policy": "q", "text": "", "finished": True, "count": 2, "sampling.seed": 3},
        {"id": "3", "prompt": "p", "policy": None, "text": None, "finished": None, "meta.deep": "[null, 1.5]"},
    ],
    "rankalign": [
        {"id": "1", "prompt": "p", "responses": [{"text": "t", "policy": "q", "finished": False, "scores": {"rm": 1}}]},
        {"id": "2", "prompt": [USER], "responses": [], "meta": {"source": {"deep": [None, 1.5]}}},
    ],
    "rrhf": [
        {"query": "Why?", "responses": ["a", "b", ""], "scores": [2, 1.5, -1e-3]},
        {"query": "Why?", "responses": ["a", "a"], "scores": [0, 0], "origin_scores": [[1, 2], [3, 4]]},
        {"prompt_id": 303, "query": "q", "responses": ["a", "b"], "scores": [1, 2], "extra_responses": ["c"]},
        {"id": "x", "query": "q", "responses": ["a", "b"], "scores": [1, 2], "rrhf": "a column", "trl": {"odd": True}},
        {"prompt": "q", "response": ["a", "b"], "scores": [1, 2], "meta": {"kept": None}},
    ],
    "trl": [
        {"prompt": "Why?", **PAIR},
        {"prompt": "Why?", **PAIR, "margin": 0.5, "id": 12, "tools": "[]"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER], "chat_template_kwargs": {"x": 1}},
        {"prompt": [USER, ASSISTANT, USER], "chosen": [ASSISTANT | {"thinking": "hm"}], "rejected": [OTHER]},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": None, "chosen": "Q\n\nAssistant: a", "rejected": "Q\n\nAssistant: b"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {
            "prompt": "Why?",
            "prompt_id": "7f",
            "chosen": [USER, ASSISTANT],
            "rejected": [USER, OTHER],
            "score_chosen": 8,
        },
        {"prompt": "Why?", "chosen": [ASSISTANT], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"prompt": "Why?", "completion": "Because.", "label": True},
        {"prompt": [USER], "completion": [ASSISTANT], "label": False},
        {"prompt": [USER], "completion": "plain", "label": False},
        {"prompt": "Why?", "completion": ""},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "Why?"},
        {"prompt": [{"role": "system", "content": ""}, USER]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER, OTHER | {"tool_calls": []}]},
        {"messages": [USER], "source": "x"},
    ],
    "alpaca": [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "", "output": "", "source": "seed", "text": "kept"},
        {"instruction": "Add.", "output": "3"},
        {"instruction": "Add.", "input": "1\n\n2", "alpaca": "a column"},
        {"instruction": "", "input": "only input", "output": "x"},
    ],
    "hh": [
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi\n\nAssistant: Bad."},
        {"chosen": DIALOGUE + " I think so.", "rejected": DIALOGUE + " I think not.", "source": "x"},
        {"chosen": DIALOGUE + "no blank", "rejected": DIALOGUE + "  two"},
        {"chosen": "\n\nHuman:Hi\n\nAssistant: a", "rejected": "\n\nHuman:Hi\n\nAssistant: b"},
        {"prompt": DIALOGUE, "chosen": " yes", "rejected": "no", "id": "rm-1"},
        {"prompt": "Be brief." + DIALOGUE, "chosen": " yes", "rejected": " no"},
    ],
    "summarize": [
        {
            "id": "t3_1",
            "subreddit": "tea",
            "title": "Cold",
            "post": "My tea is cold.\nWhy?",
            "summary": "Tea went cold.",
        },
        {"info": INFO, "summaries": SUMMARIES, "choice": 0, "worker": "w", "batch": "b", "split": "train", "extra": {}},
        {"info": INFO, "summaries": SUMMARIES, "choice": 1},
        {"info": {"id": "c", "article": "News.", "title": "T"}, "summaries": SUMMARIES, "choice": 1},
        {"info": INFO, "summary": SUMMARIES[0] | {"axes": {"overall": 7, "accuracy": None}}, "worker": "w"},
        {"prompt": "POST: x\nTL;DR:", "label": "It is about x."},
        {"prompt": "POST: x\nTL;DR:", "chosen": "one two three four five", "rejected": "six seven eight nine ten"},
    ],
    "webgpt": [
        {
            "question": {"full_text": "Why?", "id": "q"},
            "answer_0": "a",
            "answer_1": "b",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        {
            "question": {"full_text": "Why?"},
            "answer_0": "a",
            "answer_1": "b",
            "score_0": 0,
            "score_1": 0,
            "tokens_0": {},
        },
    ],
    "shp": [
        {
            "history": "Why?",
            "human_ref_A": "a",
            "human_ref_B": "b",
            "labels": 0,
            "score_A": 2,
            "score_B": 9,
            "post_id": "p",
        },
        {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
    ],
    "stack-exchange": [{"qid": 7, "question": "Why?", "date": "today", "response_j": "a", "response_k": "b"}],
    "gpt4-compare": [
        {"user_input": "Why?", "completion_a": "a", "completion_b": "b"},
        {"user_input": "Why?", "responses_and_scores": [{"response": "a", "source": "gpt4", "score": 9.0}] * 2},
        {
            "user_input": "Why?",
            "responses_and_scores": [{"response": t, "source": t, "score": 1, "n": 0} for t in "abc"],
        },
        {"instruction": "Why?", "input": "now", "output": ["better", "worse"], "source": "x"},
        {"instruction": "Why?", "output": ["a", "b", "c"]},
    ],
    "ultrafeedback": [
        {"source": "s", "instruction": "Why?", "models": ["m", "n"], "completions": [RATED, RATED | {"model": "n"}]},
        {"instruction": "Why?", "completions": [{"model": "m", "response": "a"}], "correct_answers": ["None"]},
        {
            "prompt": "Why?",
            "chosen": [USER, ASSISTANT],
            "rejected": [USER, OTHER],
            "score_chosen": 8,
            "score_rejected": 3,
        },
        {"prompt": "Why?", "messages": [USER, ASSISTANT], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    ],
    "nemo-rl": [
        {"context": [USER], "completions": [ranked(0, ASSISTANT), ranked(1, OTHER)], "task_name": "t"},
        {"context": [USER], "completions": [ranked(2, ASSISTANT), ranked(1, OTHER) | {"n": 1}, ranked(1, OTHER)]},
    ],
    "llama-factory": [
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT | {"value": "No idea."}, "images": []},
        {
            "conversations": [SYSTEM, HUMAN, GPT, HUMAN],
            "chosen": GPT,
            "rejected": GPT | {"value": "No."},
            "system": "Be kind.",
        },
        {"conversations": [HUMAN], "chosen": {"from": "assistant", "value": "a"}, "rejected": GPT, "system": ""},
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                GPT,
            ]
        },
        {"conversations": [HUMAN, GPT], "kto_tag": True, "tools": "[]"},
        {"conversations": [HUMAN]},
        {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"},
        {
            "instruction": "Add.",
            "chosen": "3",
            "rejected": "4",
            "system": "Be kind.",
            "history": [["a", "b"], ["c", "d"]],
        },
        {"instruction": "Add.", "input": "", "output": "3", "kto_tag": False, "history": []},
        {"instruction": "Add.", "input": "", "output": "3"},
    ],
    "ms-swift": [
        {"messages": [USER, ASSISTANT], "rejected_response": "No idea.", "margin": 0.5},
        {"messages": [USER, ASSISTANT], "rejected_response": [OTHER]},
        {"messages": [USER, ASSISTANT], "rejected_messages": [USER, OTHER], "rejected_images": []},
        {"messages": [USER, ASSISTANT | {"loss": True}], "rejected_response": "b"},
        {"messages": [USER, ASSISTANT], "label": False},
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER], "images": ["cat.png"]},
    ],
    "openrlhf": [
        {"prompt": "Why?", "chosen": "a", "rejected": "b", "margin": 1.5},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"input": "Why?", "output": "Because.", "label": True},
        {"input": [USER], "output": "Because."},
        {"input": "Why?", "label": "42"},
        {"prompt": "Why?", "input": "a column", "chosen": "a", "rejected": "b", "output": 1},
        {"prompt": "Why?", "completion": "Because."},
        {"messages": [USER, ASSISTANT]},
    ],
    "pro": [
        {"meta": {"line": 1}, "prefix": [TURNS] * 2, "suffix": ["a", "b"], "reward": [0.5, -1], "sft_index": 0},
        {"prefix": ["POST: x\nTL;DR:"] * 3, "suffix": ["a", "b", "c"], "reward": [1, 1, 2], "sft_index": 2},
        {"prefix": [["Be kind.", *TURNS]], "suffix": ["a"], "reward": [1.0]},
    ],
    "halos": [
        {"prompt_id": 1, "prompt": [USER], "output": [ASSISTANT], "sample_id": 0, "generator": "m", "type": "sample"},
        {"prompt_id": 1, "prompt": [USER], "output": "x", "reward": 2, "type": "scalar_feedback"},
        {"prompt": [USER], "output": "x", "reward": 2},
        {"prompt_id": 1, "prompt": [USER], "output": [OTHER], "label": 1, "reward": 0.5, "type": "binary_feedback"},
        FEEDBACK,
        FEEDBACK | {"label": 0, "reward_A": 1.5, "reward_B": 2, "reward_difference": 0.5, "split": "train"},
    ],
    "text-score": [
        {"text": ["\n\nHuman: Q\n\nAssistant: a", "\n\nHuman: Q\n\nAssistant: b"], "score": [0.5, -1]},
        {
            "text": ["## Human:\nQ\n\n## Assistant:\nI a", "## Human:\nQ\n\n## Assistant:\nI b"],
            "score": [1, 1],
            "id": 3,
        },
    ],
    "columns": [
        {
            "instruction": "Add.",
            "input": "",
            "response1": "a",
            "response2": "b",
            "annotator1": 1,
            "gpt35_result": "Tie",
        },
        {"id": "l", "input": "Add.", "output_1": "a", "output_2": "b", "label": 2, "judges": {"GPT-4": BOTH_ORDERS}},
        {"id": "t", "prompt": "POST", "reference": "a", "summary": "b", "judge_preferred": "ours", "shuffled_index": 1},
        {"instruction": "Add.", "input": "1", "reference": "a", "candidates": {"davinci": "b", "curie": ""}},
        {"id": "d", "query": "Why?", "responses": {"academy": "a", "business": "b"}},
    ],
    "minchatgpt": [
        {"vanilla": "a", "sft": "b", "ppo": "c", "prompt": "Why?"},
        {"sft": "b", "ppo": "c", "prompt": "Who?", "id": 3},
    ],
    "alpaca-eval": [
        {"instruction": "Count.", "output": "3", "generator": "m", "dataset": "d"},
        {"instruction": "Add.", "input": "1 2", "output": "3", "generator": "m"},
        {"prompt_id": 7, "model": "m", "instruction": "Add.", "output": "3", "generator": "m"},
        ANNOTATED,
        ANNOTATED | {"instruction": "Subtract.", "preference": None, "raw_completion": {"logprobs": [1]}},
    ],
    "fastchat": [
        {"answers_of": "m", "question_id": 1, "text": "Why?", "prompt": "### Human: Why?", "generation": "a"},
        {"review_id": 4, "question_id": 1, "order": [2, 1], "metadata": LISTWISE, "text": "2 > 1"},
    ],
    "arena-hard": [
        {
            "uid": "u",
            "ans_id": "1",
            "model": "m",
            "messages": [USER, {"role": "assistant", "content": {"answer": "a"}}],
        },
        {"uid": "u", "model": "m", "messages": [USER, ASSISTANT], "tstamp": 1.5, "metadata": {"token_len": 3}},
    ],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_a_row_comes_back_as_it_was(name: str, row: dict[str, Any]) -> None:
    assert dump(name, *load(name, row)) == ([row], {})


@pytest.mark.parametrize("name", ROWS)
def test_rows_come_back_in_order(name: str) -> None:
    rows = [row for row in ROWS[name] if "id" in row or name != "rankalign"]
    assert dump(name, *load(name, *rows))[0] == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats(allow_nan=False) | st.text("a\n :", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), inner)
    ),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A good row of a format with some columns replaced, dropped or added."""
    row = copy.deepcopy(draw(st.sampled_from(ROWS[name])))
    known = sorted({key for other in ROWS[name] for key in other} | {"extra", "trl"})
    for column in draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)):
        if draw(st.booleans()):
            row[column] = draw(JSON)
        else:
            row.pop(column, None)
    return row


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_spoilt_row_comes_back_or_is_refused_by_name(name: str, data: st.DataObject) -> None:
    row = data.draw(spoilt(name))
    errors: list[RecordError] = []
    sets = list(find_format(name).read([(7, copy.deepcopy(row))], "set.jsonl", errors.append))
    assert len(sets) + len(errors) == 1
    if errors:
        assert str(errors[0]).startswith("set.jsonl:7: ")
    else:
        again = [parse(json.loads(json.dumps(to_dict(record)))) for record in sets]
        rows, lost = dump(name, *again)
        assert rows == [row] or lost or name in ("rankalign", "table")


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_column_comes_back_or_is_counted(name: str) -> None:
    """Also under the name of a format, which keeps notes of its own there."""
    if name in ("rankalign", "table"):
        pytest.skip("a null is as good as no field there")
    for row, column in itertools.product(ROWS[name], ["extra", *FORMATS]):
        if column in row:
            continue
        errors: list[RecordError] = []
        full = copy.deepcopy(row) | {column: None}
        rows, lost = dump(name, *find_format(name).read([(7, copy.deepcopy(full))], "set.jsonl", errors.append))
        assert errors or lost or rows == [full], (column, row)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_row_that_comes_back(name: str) -> None:
    assert ROWS.get(name), f"format {name!r} has no row in ROWS"


# --- ids ---------------------------------------------------------------------------------------------------------


def test_ids_are_the_rows_own_where_fresh_and_else_file_and_line() -> None:
    given_ids = [
        {"id": "a"},
        {"id": 7},
        {"prompt_id": 7},
        {"id": "a"},
        {},
        {"id": True},
        {"id": " "},
        {"prompt_id": "b"},
    ]
    got = [record.id for record in load("trl", *({"prompt": "p"} | own for own in given_ids))]
    assert got == ["a", "7", "set-000003", "set-000004", "set-000005", "set-000006", "set-000007", "b"]


def test_a_made_up_id_never_meets_a_real_one() -> None:
    rows = [{"prompt": "p", "id": "set-000002"}, {"prompt": "p"}, {"prompt": "p", "id": "set-000002+"}]
    assert [record.id for record in load("trl", *rows)] == ["set-000002", "set-000002+", "set-000003"]


def test_a_record_from_elsewhere_takes_its_id_along() -> None:
    (row,), _ = dump("trl", CandidateSet("mine", "p", [], {"source": "x"}))
    assert row == {"prompt": "p", "id": "mine", "source": "x"}
