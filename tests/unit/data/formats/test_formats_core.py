"""RRHF, TRL and Alpaca: what the record says of a row, what a row says of a record, and what is refused."""

from __future__ import annotations

import ast
import copy
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import ASSISTANT, OTHER, USER, dump, load, refusal, several, texts

from rankalign.data.formats.trl import split_shared
from rankalign.data.records import CandidateSet, Response
from rankalign.data.templates import ALPACA_INPUT, ALPACA_NO_INPUT, render
from rankalign.errors import InputError

# --- RRHF --------------------------------------------------------------------------------------------------------


def test_rrhf_scores_stay_with_their_responses() -> None:
    (record,) = load("rrhf", {"query": "q", "responses": ["a", "b", "c"], "scores": [2, 7.5, -1]})
    assert record.prompt == "q"
    assert {r.text: r.scores for r in record.responses} == {"a": {"score": 2}, "b": {"score": 7.5}, "c": {"score": -1}}


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"scores": [1]}, "scores", "1 scores for 2 responses"),
        ({"scores": [1, 2, 3]}, "scores", "3 scores for 2 responses"),
        ({"responses": ["a"], "scores": [1]}, "responses", "needs at least 2 elements, found 1"),
        ({"responses": [], "scores": []}, "responses", "needs at least 2 elements, found 0"),
        ({"responses": "ab"}, "responses", "expected a list, found a string"),
        ({"responses": ["a", None]}, "responses[1]", "expected a string, found null"),
        ({"scores": [1, float("nan")]}, "scores[1]", "is not a finite number"),
        ({"scores": [1, float("inf")]}, "scores[1]", "is not a finite number"),
        ({"scores": [1, None]}, "scores[1]", "expected a number, found null"),
        ({"scores": [True, 1]}, "scores[0]", "expected a number, found a boolean"),
        ({"scores": ["1", 1]}, "scores[0]", "expected a number, found a string"),
        ({"query": ""}, "query", "is empty"),
        ({"query": "\n"}, "query", "is empty"),
        ({"query": None}, "query", "expected a string, found null"),
    ],
)
def test_rrhf_refuses(change: dict[str, Any], field: str, reason: str) -> None:
    assert refusal("rrhf", {"query": "q", "responses": ["a", "b"], "scores": [1, 2]} | change) == (field, reason)


@pytest.mark.parametrize("missing", ["query", "responses", "scores"])
def test_rrhf_names_the_missing_column(missing: str) -> None:
    row = {"query": "q", "responses": ["a", "b"], "scores": [1, 2]}
    del row[missing]
    assert refusal("rrhf", row) == (missing, f"is missing (found: {', '.join(row)})")


def test_rrhf_leaves_out_what_has_no_score_and_says_so() -> None:
    rows, lost = dump("rrhf", several(1, None, 3), several(None, 2))
    assert rows == [{"query": "p", "responses": ["r0", "r2"], "scores": [1, 3], "id": "s"}]
    assert lost == {"responses without a score": 2, "prompts with fewer than two scored responses": 1}


def test_rrhf_counts_every_detail_it_cannot_hold() -> None:
    responses = [
        Response("a", "m", False, 2, {"t": 1}, {"rm": 1, "judge": 2}, {"tokenizer": "t", "ids": []}, {"x": 1}),
        Response("b", "unknown", scores={"rm": 2, "judge": None}),
    ]
    _, lost = dump("rrhf", CandidateSet("s", [USER], responses, {"trl": {"odd": True}}), judge="rm")
    names = ["policy", "finished", "count", "sampling", "tokens", "meta"]
    assert lost == {f"response.{n}": 1 for n in names} | {"scores.judge": 1, "prompt.messages": 1, "meta.trl": 1}


def test_messages_become_text_for_rrhf() -> None:
    dialogue = several(1, 2)
    dialogue.prompt = [USER, ASSISTANT, {"role": "user", "content": "Really?"}]
    (row,), _ = dump("rrhf", dialogue)
    assert row["query"] == "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant:"
    dialogue.prompt = [USER]
    assert dump("rrhf", dialogue)[0][0]["query"] == "Why?"


def test_a_meta_key_never_overwrites_a_column() -> None:
    rows, lost = dump("rrhf", several(1, 2, meta={"query": "other", "kept": 1}))
    assert rows == [{"query": "p", "responses": ["r0", "r1"], "scores": [1, 2], "id": "s", "kept": 1}]
    assert lost == {"meta.query": 1}


# --- which judge -------------------------------------------------------------------------------------------------


def test_the_judge_is_the_only_one_or_a_default_or_asked_for() -> None:
    both = CandidateSet("s", "p", [Response("a", scores={"x": 1, "y": 2}), Response("b", scores={"x": 2, "y": 1})])
    with pytest.raises(InputError, match=r"'s' has scores of several judges \(x, y\)"):
        dump("trl", both)
    assert dump("trl", both, judge="x")[0][0]["chosen"] == "b"
    assert dump("trl", both, judge="y")[0][0]["chosen"] == "a"
    for response in both.responses:
        response.scores["score"] = response.scores["y"]
    assert dump("trl", both)[0][0]["chosen"] == "a"
    assert dump("trl", both, judge="nobody") == (
        [],
        {"responses without a score": 2, "prompts without a strict pair": 1},
    )


# --- TRL: pairs from lists ---------------------------------------------------------------------------------------

SCORES = st.lists(st.none() | st.integers(0, 3), min_size=2, max_size=6)


@settings(deadline=None)
@given(scores=SCORES)
def test_ranked_lists_give_all_pairs_less_the_ties(scores: list[int | None]) -> None:
    rows, lost = dump("trl", several(*scores))
    known = [(f"r{i}", score) for i, score in enumerate(scores) if score is not None]
    expected = {(a, b) for (a, x), (b, y) in itertools.permutations(known, 2) if x > y}
    assert {(row["chosen"], row["rejected"]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert len(rows) + lost.get("ties", 0) == len(known) * (len(known) - 1) // 2
    assert lost.get("responses without a score", 0) == scores.count(None)
    assert lost.get("prompts without a strict pair", 0) == (not rows)


@settings(deadline=None)
@given(scores=SCORES)
def test_best_worst_gives_one_pair_a_list(scores: list[int | None]) -> None:
    rows, lost = dump("trl", several(*scores), pairs="best-worst")
    known = [score for score in scores if score is not None]
    if len(set(known)) < 2:
        assert rows == []
    else:
        (row,) = rows
        assert (row["score_chosen"], row["score_rejected"]) == (max(known), min(known))
        left_out = sum(x > y for x, y in itertools.permutations(known, 2)) - 1
        assert lost.get("pairs other than best and worst", 0) == left_out


def test_pairs_has_two_values() -> None:
    with pytest.raises(InputError, match="'all' or 'best-worst', got 'some'"):
        dump("trl", several(1, 2), pairs="some")


def test_pairs_take_the_form_of_the_prompt() -> None:
    record = several(1, 2)
    assert dump("trl", record)[0] == [
        {"prompt": "p", "chosen": "r1", "rejected": "r0", "score_chosen": 2, "score_rejected": 1, "id": "s"}
    ]
    record.prompt = [USER]
    (row,), _ = dump("trl", record)
    assert row["prompt"] == [USER]
    assert row["chosen"] == [{"role": "assistant", "content": "r1"}]


def test_a_new_judgement_of_a_pair_is_written_not_the_old_one() -> None:
    (record,) = load("trl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    for response, score in zip(record.responses, (0.0, 1.0), strict=True):
        response.scores["rm"] = score
    assert dump("trl", record)[0] == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    (row,), _ = dump("trl", record, judge="rm")
    assert (row["chosen"], row["rejected"]) == ("b", "a")
    record.responses[0].scores["preference"], record.responses[1].scores["preference"] = 0.0, 1.0
    assert dump("trl", record)[0][0]["chosen"] == "b"


# --- TRL: reading ------------------------------------------------------------------------------------------------


def test_chosen_and_rejected_become_scored_policies() -> None:
    (record,) = load("trl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert [(r.text, r.policy, r.scores) for r in record.responses] == [
        ("a", "chosen", {"preference": 1.0}),
        ("b", "rejected", {"preference": 0.0}),
    ]


def test_labels_become_scores() -> None:
    yes, no = load("trl", *({"prompt": "p", "completion": "a", "label": label} for label in (True, False)))
    assert (yes.responses[0].scores, no.responses[0].scores) == ({"label": 1.0}, {"label": 0.0})


def test_the_last_answer_of_messages_is_the_response() -> None:
    (record,) = load("trl", {"messages": [USER, ASSISTANT, USER, OTHER]})
    assert record.prompt == [USER, ASSISTANT, USER]
    assert texts(record) == ["No idea."]


IMPLICIT = [
    ("\n\nHuman: Hi\n\nAssistant: I think a", "\n\nHuman: Hi\n\nAssistant: I think b", "\n\nHuman: Hi\n\nAssistant:"),
    (
        "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: x\n\nAssistant: y",
        "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: z",
        "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:",
    ),
    ("<|im_start|>assistant\nSo a", "<|im_start|>assistant\nSo b", "<|im_start|>assistant\n"),
    ("Q: Why?\nA: I think it is a", "Q: Why?\nA: I think it is b", "Q: Why?\n"),
    ("The sky is blue.", "The sky is blank.", "The sky is"),
    ("The sky is blue", "The sky is blue and wide", "The sky is"),
    ("\n\n The sky.", "\n\n The sea.", "\n\n The"),
]


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), IMPLICIT)
def test_an_implicit_prompt_ends_at_a_safe_place(chosen: str, rejected: str, prompt: str) -> None:
    (record,) = load("trl", {"chosen": chosen, "rejected": rejected})
    assert record.prompt == prompt
    assert texts(record) == [chosen[len(prompt) :], rejected[len(prompt) :]]


@settings(deadline=None)
@given(a=st.text("ab \n", max_size=12), b=st.text("ab \n", max_size=12), shared=st.text("ab \n", max_size=12))
def test_a_cut_never_falls_behind_the_first_difference_nor_inside_a_word(a: str, b: str, shared: str) -> None:
    cut = split_shared(shared + a, shared + b)
    assert (shared + a)[:cut] == (shared + b)[:cut]
    if cut:
        assert (shared + a)[cut - 1] == "\n" or (shared + a)[cut] == " "
        assert (shared + a)[:cut].strip()


def trl_function(name: str, *helpers: str) -> Any:
    """A pure function of TRL's own source, taken out alone: importing the package takes many seconds."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    tree = ast.parse((Path(spec.origin).parent / "data_utils.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in (name, *helpers)]
    space: dict[str, Any] = {"Any": Any, "Sequence": Sequence}
    exec(compile(tree, spec.origin, "exec"), space)
    return space[name]


def test_implicit_prompts_agree_with_trl_where_both_cut_at_a_turn() -> None:
    maybe_extract_prompt = trl_function("maybe_extract_prompt", "extract_prompt", "is_conversational")
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"chosen": [USER, OTHER, USER, ASSISTANT], "rejected": [USER, OTHER, USER, OTHER]},
        {"prompt": "Why?", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"prompt": "Why?", "chosen": "a", "rejected": "b"},
    ]
    for row, record in zip(rows, load("trl", *rows), strict=True):
        theirs = maybe_extract_prompt(copy.deepcopy(row))
        record.meta = {"trl": {}}
        assert dump("trl", record)[0] == [theirs]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({}, "", "no TRL type has only the columns (none)"),
        ({"text": "x", "y": 1}, "", "no TRL type has only the columns text, y"),
        ({"chosen": "a"}, "rejected", "is missing (found: chosen)"),
        ({"rejected": "a"}, "chosen", "is missing (found: rejected)"),
        ({"chosen": "a", "rejected": "b"}, "prompt", "share no beginning"),
        ({"chosen": "\nab", "rejected": "\nac"}, "prompt", "share no beginning"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt", "is empty"),
        ({"prompt": "p", "chosen": 1, "rejected": "b"}, "chosen", "expected a string or a list of messages"),
        ({"prompt": "p", "chosen": "a", "rejected": [OTHER]}, "rejected", "is a list where chosen is a string"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [OTHER]}, "chosen[0].role", "expected 'assistant'"),
        ({"prompt": [USER], "chosen": [], "rejected": [OTHER]}, "chosen", "holds 0 messages"),
        ({"prompt": [USER], "chosen": [ASSISTANT, USER], "rejected": [OTHER]}, "chosen", "holds 2 messages"),
        ({"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT, OTHER]}, "rejected", "differs from chosen before"),
        ({"chosen": [ASSISTANT], "rejected": [OTHER]}, "chosen", "needs at least 2 elements"),
        ({"chosen": [USER, ASSISTANT], "rejected": "b"}, "rejected", "expected what the other side has"),
        ({"completion": "a"}, "prompt", "is missing"),
        ({"prompt": "p", "completion": "a", "label": 2}, "label", "expected true or false, or 1 or 0, found 2"),
        ({"messages": "hi"}, "messages", "expected a list of messages"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": [{"role": "system"}]}, "messages[0].content", "is missing"),
    ],
)
def test_trl_refuses(row: dict[str, Any], field: str, reason: str) -> None:
    found = refusal("trl", row)
    assert found[0] == field
    assert reason in found[1]


# --- Alpaca ------------------------------------------------------------------------------------------------------


def test_alpaca_prompts_render_to_the_two_templates() -> None:
    rows = [
        {"instruction": "Add {x}.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "", "output": "3"},
    ]
    with_input, without = load("alpaca", *rows)
    assert with_input.prompt == [{"role": "user", "content": "Add {x}.\n\n1 2"}]
    assert [(r.text, r.policy) for r in with_input.responses] == [("3", "output")]
    expected = ALPACA_INPUT.replace("{instruction}", "Add {x}.").replace("{input}", "1 2")
    assert render(with_input.prompt, "alpaca", meta=with_input.meta) == expected
    expected = ALPACA_NO_INPUT.replace("{instruction}", "Add.")
    assert render(without.prompt, "alpaca", meta=without.meta) == expected


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"input": "", "output": "x"}, "instruction", "is missing (found: input, output)"),
        ({"instruction": " ", "input": "", "output": "x"}, "instruction", "is empty"),
        ({"instruction": "i", "input": "", "output": ["a", "b"]}, "output", "expected a string, found a list"),
    ],
)
def test_alpaca_refuses(row: dict[str, Any], field: str, reason: str) -> None:
    assert refusal("alpaca", row) == (field, reason)


def test_alpaca_takes_the_best_of_many() -> None:
    rows, lost = dump("alpaca", several(1, 3, 2), several(), several(None, None))
    assert rows == [
        {"instruction": "p", "input": "", "output": "r1", "id": "s"},
        {"instruction": "p", "input": "", "output": "r0", "id": "s"},
    ]
    assert lost == {"responses other than the best": 3, "prompts without a response": 1, "scores.rm": 1}


def test_an_edited_prompt_is_written_not_the_old_instruction() -> None:
    (record,) = load("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"})
    record.prompt = [{"role": "user", "content": "Subtract."}]
    rows, _ = dump("alpaca", record)
    assert rows == [{"instruction": "Subtract.", "input": "", "output": "3"}]


@pytest.mark.parametrize("value", [True, 1, 1.0, False, 0, 0.0])
def test_thumbs_are_booleans_or_the_numbers_that_tables_make_of_them(value: Any) -> None:
    turns = [USER, ASSISTANT]
    rows = [
        ("trl", {"prompt": "p", "completion": "a", "label": value}),
        ("trl", {"messages": turns, "label": value}),
        ("ms-swift", {"messages": turns, "label": value}),
        ("llama-factory", {"instruction": "p", "output": "a", "kto_tag": value}),
    ]
    for name, row in rows:
        (record,) = load(name, row)
        assert [response.scores for response in record.responses] == [{"label": float(bool(value))}], name
