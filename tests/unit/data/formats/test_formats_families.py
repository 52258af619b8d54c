"""Each foreign family: what its verdicts mean, where its prompt ends, what it leaves out, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from test_formats import (
    ANNOTATED,
    ASSISTANT,
    BOTH_ORDERS,
    DIALOGUE,
    FEEDBACK,
    GPT,
    HUMAN,
    INFO,
    LISTWISE,
    OTHER,
    RATED,
    SUMMARIES,
    TURNS,
    USER,
    dump,
    load,
    ranked,
    refusal,
    texts,
)

from rankalign.data.convert import find_format
from rankalign.data.formats import FORMATS
from rankalign.data.formats.alpaca_eval import win_probability
from rankalign.data.formats.common import Dropped
from rankalign.data.records import CandidateSet, Message, Response
from rankalign.data.templates import render
from rankalign.errors import RecordError

ASKED: list[Message] = [{"role": "user", "content": "Why?"}]


def scores(record: CandidateSet, judge: str) -> dict[str, float | None]:
    return {response.text: response.scores.get(judge) for response in record.responses}


def order(sets: list[CandidateSet]) -> set[tuple[str, str]]:
    """Pairs (better, worse) of texts that the scores of any judge order strictly."""
    return {
        (a.text, b.text)
        for record in sets
        for a, b in itertools.permutations(record.responses, 2)
        for judge in a.scores
        if None not in (x := a.scores[judge], y := b.scores.get(judge)) and x > y  # type: ignore[operator]
    }


# --- every format that can say which answer is better says the same ---------------------------------------------

TEXTS_ONLY = {"alpaca", "columns", "minchatgpt", "alpaca-eval", "fastchat", "arena-hard"}
WORDS = ["one two three four five six", "six five four three two one", "seven eight nine ten six two", "a b c d e f"]


@pytest.mark.parametrize("name", sorted(set(FORMATS) - TEXTS_ONLY))
@pytest.mark.parametrize("prompt", ["Why?", ASKED, [*ASKED, ASSISTANT, {"role": "user", "content": "Sure?"}]])
def test_a_ranked_list_keeps_its_order_in_any_format(name: str, prompt: Any) -> None:
    responses = [Response(text, scores={"rm": score}) for text, score in zip(WORDS, (2, 0.5, 2, -3), strict=True)]
    record = CandidateSet("one", prompt, responses)
    rows, lost = dump(name, record)
    sets = load(name, *rows)
    stripped = {(a.strip(), b.strip()) for a, b in order(sets)}
    assert stripped == {(WORDS[i], WORDS[j]) for i, j in ((0, 1), (0, 3), (1, 3), (2, 1), (2, 3))}
    listwise = len(rows) == 1 or name in ("halos", "beavertails", "helpsteer", "prompt-response", "table")
    assert lost.get("ties", 0) == (0 if listwise else 1)


@pytest.mark.parametrize("name", sorted(TEXTS_ONLY - {"alpaca"}))
def test_answers_of_several_models_stay_with_their_models(name: str) -> None:
    record = CandidateSet("7", ASKED, [Response("a", policy="m"), Response("b", policy="n")])
    rows, _ = dump(name, record)
    questions = [{"question_id": 7, "text": "Why?"}] if name == "fastchat" else []
    (again,) = load(name, *questions, *rows)
    assert again.prompt == ASKED
    assert [(response.policy, response.text) for response in again.responses] == [("m", "a"), ("n", "b")]


# --- HH ----------------------------------------------------------------------------------------------------------


def test_hh_splits_at_the_last_assistant() -> None:
    (record,) = load("hh", {"chosen": DIALOGUE + " Quite.", "rejected": DIALOGUE + " No."})
    assert record.prompt == [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes.\nIt is."},
        {"role": "user", "content": "Sure?"},
    ]
    assert scores(record, "preference") == {"Quite.": 1.0, "No.": 0.0}
    assert render(record.prompt, "hh") == DIALOGUE


def test_hh_reads_prompt_columns_alike() -> None:
    whole, cut = (
        load("hh", {"chosen": DIALOGUE + " Quite.", "rejected": DIALOGUE + " No."})[0],
        load("hh", {"prompt": DIALOGUE, "chosen": " Quite.", "rejected": " No."})[0],
    )
    assert (whole.prompt, whole.responses) == (cut.prompt, cut.responses)


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"chosen": DIALOGUE + " ", "rejected": DIALOGUE + " a"}, "chosen", "its last answer is empty"),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE}, "rejected", "its last answer is empty"),
        ({"chosen": DIALOGUE + " a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, "rejected", "differs from chosen"),
        ({"chosen": DIALOGUE + " a\n\nAssistant: b", "rejected": DIALOGUE + " c"}, "rejected", "differs from chosen"),
        ({"chosen": "Hi", "rejected": "Ho"}, "chosen", "has no 'Assistant:' turn"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "prompt", "is empty"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "prompt", "does not end with"),
    ],
)
def test_hh_refuses(row: dict[str, Any], field: str, reason: str) -> None:
    found = refusal("hh", row)
    assert found[0] == field
    assert reason in found[1]


# --- summaries ---------------------------------------------------------------------------------------------------

POST = "SUBREDDIT: r/tea\nTITLE: Cold\nPOST: My tea is cold.\nTL;DR:"


def test_tldr_posts_become_prompts_and_labels() -> None:
    row = {"id": "t", "subreddit": "tea", "title": "Cold", "post": "My tea is cold.", "summary": "Tea cold."}
    (record,) = load("summarize", row)
    assert (record.id, record.prompt, texts(record)) == ("t", POST, ["Tea cold."])
    assert dump("trl", record)[0] == [{"id": "t", "prompt": POST, "completion": "Tea cold."}]
    record.meta = {}
    assert dump("summarize", record)[0] == [{"id": "t", "prompt": POST, "label": "Tea cold."}]


@pytest.mark.parametrize("choice", [0, 1])
def test_a_choice_picks_its_summary(choice: int) -> None:
    (record,) = load("summarize", {"info": INFO, "summaries": SUMMARIES, "choice": choice})
    assert record.prompt == POST
    assert [response.policy for response in record.responses] == ["sup1", "ref"]
    (row,), _ = dump("trl", record)
    assert (row["chosen"], row["rejected"]) == (SUMMARIES[choice]["text"], SUMMARIES[1 - choice]["text"])


def test_axes_are_judges() -> None:
    summary = SUMMARIES[0] | {"axes": {"overall": 7, "accuracy": None}}
    (record,) = load("summarize", {"info": INFO, "summary": summary})
    assert record.responses[0].scores == {"overall": 7, "accuracy": None}


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("one two three four five", "one two three four five", "comparisons of equal summaries"),
        ("one two three four", "one two three four five", "comparisons with a summary of fewer than 5 words"),
        ("one two three four five", " one  two ", "comparisons with a summary of fewer than 5 words"),
    ],
)
def test_useless_comparisons_are_dropped_and_counted(first: str, second: str, reason: str) -> None:
    rows = [
        {"prompt": "p", "chosen": first, "rejected": second},
        {"info": INFO, "summaries": [{"text": first}, {"text": second}], "choice": 0},
    ]
    errors: list[RecordError] = []
    assert list(find_format("summarize").read(enumerate(rows, 1), "f", errors.append)) == []
    assert [(type(error), error.line, error.reason) for error in errors] == [(Dropped, 1, reason), (Dropped, 2, reason)]


@pytest.mark.parametrize("choice", [2, -1, True, "0", None])
def test_a_choice_must_be_one_of_the_summaries(choice: Any) -> None:
    field, reason = refusal("summarize", {"info": INFO, "summaries": SUMMARIES, "choice": choice})
    assert (field, reason) == ("choice", f"expected the index of one of 2 summaries, found {choice!r}")


# --- web ---------------------------------------------------------------------------------------------------------


def test_webgpt_scores_decide_and_ties_stay_ties() -> None:
    row = {"question": {"full_text": "Why?"}, "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": 0.5}
    lower, tie = load("webgpt", row, row | {"score_0": 0.5})
    assert lower.prompt == ASKED
    assert scores(lower, "score") == {"a": -0.5, "b": 0.5}
    assert dump("trl", lower)[0][0]["chosen"] == [{"role": "assistant", "content": "b"}]
    assert dump("trl", tie)[1]["ties"] == 1
    assert refusal("webgpt", row | {"question": "Why?"}) == ("question", "expected an object, found a string")


@pytest.mark.parametrize(("label", "best"), [(1, "a"), (0, "b")])
def test_shp_label_one_is_answer_a(label: int, best: str) -> None:
    row = {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "labels": label, "score_A": 5, "score_B": 3}
    (record,) = load("shp", row)
    assert scores(record, "preference")[best] == 1.0
    assert scores(record, "votes") == {"a": 5, "b": 3}
    assert refusal("shp", row | {"labels": 2}) == ("labels", "expected 0 or 1, found 2")


def test_stack_exchange_j_beats_k() -> None:
    (record,) = load("stack-exchange", {"question": "Why?", "response_j": "a", "response_k": "b"})
    assert order([record]) == {("a", "b")}


# --- GPT-4-LLM, UltraFeedback ------------------------------------------------------------------------------------


def test_gpt4_comparisons_score_two_and_one() -> None:
    (pair,) = load("gpt4-compare", {"user_input": "Why?", "completion_a": "a", "completion_b": "b"})
    assert pair.prompt == ASKED
    assert scores(pair, "score") == {"a": 2, "b": 1}
    assert dump("rrhf", pair)[0][0] == {
        "query": "Why?",
        "responses": ["a", "b"],
        "scores": [2, 1],
        "id": "set-000001",
    }
    (listed,) = load("gpt4-compare", {"instruction": "Why", "input": "now", "output": ["a", "b", "c"]})
    assert listed.prompt == [{"role": "user", "content": "Why\n\nnow"}]
    assert scores(listed, "score") == {"a": 3, "b": 2, "c": 1}


def test_ultrafeedback_ratings_are_judges_and_na_is_missing() -> None:
    (record,) = load("ultrafeedback", {"instruction": "Why?", "models": ["m"], "completions": [RATED]})
    assert record.responses[0].policy == "m"
    assert record.responses[0].scores == {"overall_score": 7.5, "helpfulness": 4.0, "honesty": None}
    rated = {"annotations": {"honesty": {"Rating": "good"}}}
    broken = {"instruction": "Why?", "completions": [RATED | rated]}
    assert refusal("ultrafeedback", broken) == (
        "completions[0].annotations.honesty.Rating",
        "expected a rating, found 'good'",
    )


def test_ultrafeedback_binarised_keeps_the_scores_of_both() -> None:
    row = {
        "prompt": "Why?",
        "chosen": [USER, ASSISTANT],
        "rejected": [USER, OTHER],
        "score_chosen": 8,
        "score_rejected": 3,
    }
    (record,) = load("ultrafeedback", row)
    assert record.prompt == ASKED
    assert scores(record, "score") == {"Because.": 8, "No idea.": 3}
    assert scores(record, "preference") == {"Because.": 1.0, "No idea.": 0.0}


# --- trainers' formats -------------------------------------------------------------------------------------------


def test_nemo_ranks_are_lower_for_better() -> None:
    (record,) = load("nemo-rl", {"context": [USER], "completions": [ranked(0, ASSISTANT), ranked(3, OTHER)]})
    assert scores(record, "rank") == {"Because.": 0, "No idea.": -3}
    record.responses[0].scores, record.responses[1].scores = {"rm": 0.1}, {"rm": 0.1}
    assert [entry["rank"] for entry in dump("nemo-rl", record)[0][0]["completions"]] == [0, 0]


def test_llama_factory_reads_history_and_system() -> None:
    row = {
        "instruction": "Add.",
        "input": "1",
        "chosen": "3",
        "rejected": "4",
        "system": "Be.",
        "history": [["a", "b"]],
    }
    (record,) = load("llama-factory", row)
    roles = [(message["role"], message["content"]) for message in record.prompt if isinstance(message, dict)]
    assert roles == [("system", "Be."), ("user", "a"), ("assistant", "b"), ("user", "Add.\n\n1")]
    assert order([record]) == {("3", "4")}


def test_sharegpt_roles_become_messages() -> None:
    tool = {"from": "observation", "value": "1"}
    call = {"from": "function_call", "value": "{}"}
    (record,) = load("llama-factory", {"conversations": [HUMAN, call, tool, GPT], "kto_tag": False})
    assert record.prompt == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "{}", "from": "function_call"},
        {"role": "tool", "content": "1"},
    ]
    assert record.responses[0].scores == {"label": 0.0}


def test_swift_pairs_share_their_conversation() -> None:
    row = {"messages": [USER, ASSISTANT], "rejected_messages": [USER, OTHER]}
    (record,) = load("ms-swift", row)
    assert (record.prompt, order([record])) == (ASKED, {("Because.", "No idea.")})
    differs = row | {"rejected_messages": [USER, ASSISTANT, OTHER]}
    assert refusal("ms-swift", differs)[0] == "rejected_messages"
    assert refusal("ms-swift", {"messages": [USER], "rejected_response": "b"})[0] == "messages"


def test_openrlhf_names_its_own_columns_in_errors() -> None:
    assert refusal("openrlhf", {"input": "", "output": "a"}) == ("input", "is empty")
    assert refusal("openrlhf", {"input": "Why?", "output": 3})[0] == "output"
    assert refusal("openrlhf", {"input": "Why?", "prompt": "Why?"})[0] == "prompt"


def test_pro_prefixes_are_dialogues() -> None:
    row = {"prefix": [TURNS] * 2, "suffix": ["a", "b"], "reward": [-1, 2], "sft_index": 0}
    (record,) = load("pro", row)
    assert isinstance(record.prompt, list)
    assert [message["role"] for message in record.prompt] == ["user", "assistant", "user"]
    assert scores(record, "reward") == {"a": -1, "b": 2}
    record.meta = {}
    (written,), _ = dump("pro", record)
    assert (written["suffix"], written["reward"], written["sft_index"]) == (["b", "a"], [2, -1], 0)
    assert refusal("pro", row | {"reward": [1]}) == ("reward", "1 entries for 2 in suffix")
    assert refusal("pro", row | {"prefix": [TURNS, ["<|prompter|>x", "<|assistant|>"]]})[0] == "prefix[1]"


def test_halos_label_one_is_output_a() -> None:
    first, second = load("halos", FEEDBACK, FEEDBACK | {"label": 0})
    assert order([first]) == {("Because.", "No idea.")}
    assert order([second]) == {("No idea.", "Because.")}


def test_halos_samples_of_one_prompt_become_one_record() -> None:
    sample = {"prompt_id": 1, "prompt": [USER], "type": "scalar_feedback"}
    rows = [sample | {"output": [ASSISTANT], "reward": 1.5}, sample | {"output": [OTHER], "reward": -1}]
    rows += [sample | {"prompt_id": 2, "output": [OTHER]}, sample | {"output": [OTHER]}]
    sets = load("halos", *rows)
    assert [(record.id, len(record.responses)) for record in sets] == [("1", 2), ("2", 1), ("set-000004", 1)]
    assert scores(sets[0], "reward") == {"Because.": 1.5, "No idea.": -1}
    assert dump("halos", *sets)[0] == rows


def test_text_score_takes_the_shared_beginning_for_the_prompt() -> None:
    row = {"text": [DIALOGUE + " I think a", DIALOGUE + " I think b"], "score": [0, 1]}
    (record,) = load("text-score", row)
    assert record.prompt == DIALOGUE
    assert scores(record, "score") == {" I think a": 0, " I think b": 1}
    assert refusal("text-score", row | {"score": [1]}) == ("score", "1 scores for 2 texts")
    assert refusal("text-score", row | {"text": ["ab", "cd"]})[0] == "text"


# --- one column an answer ----------------------------------------------------------------------------------------


def test_three_annotators_and_two_judges() -> None:
    row = {"instruction": "Add.", "input": "", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2}
    row |= {"annotator3": 0, "gpt35_result": "garbage", "pandalm_result": 2}
    (record,) = load("columns", row)
    first, second = (response.scores for response in record.responses)
    assert first == {"annotator1": 1, "annotator2": 0, "annotator3": 0.5, "gpt35": None, "pandalm": 0}
    assert second == {"annotator1": 0, "annotator2": 1, "annotator3": 0.5, "gpt35": None, "pandalm": 1}


def test_llmbar_judges_count_both_orders() -> None:
    judges = {"split": BOTH_ORDERS, "sure": BOTH_ORDERS | {"order_1": "2"}, "mute": {"order_1": "1"}}
    (record,) = load("columns", {"input": "Add.", "output_1": "a", "output_2": "b", "label": 1, "judges": judges})
    assert record.responses[0].scores == {"label": 1, "split": 0.5, "sure": 0, "mute": None}
    assert record.responses[1].scores == {"label": 0, "split": 0.5, "sure": 1, "mute": None}


@pytest.mark.parametrize(("said", "ours"), [("ours", 1.0), ("reference", 0.0), (None, None)])
def test_judged_summaries(said: str | None, ours: float | None) -> None:
    (record,) = load("columns", {"prompt": "POST", "reference": "a", "summary": "b", "judge_preferred": said})
    assert scores(record, "judge") == {"a": None if ours is None else 1 - ours, "b": ours}


def test_an_answer_that_is_no_text_is_refused() -> None:
    row = {"instruction": "Add.", "input": "", "response1": True, "response2": "b"}
    assert refusal("columns", row) == ("response1", "expected a string, found a boolean")
    assert refusal("columns", {"what": 1}) == ("", "no known layout has the columns what")


# --- AlpacaEval, FastChat, Arena-Hard ----------------------------------------------------------------------------


@pytest.mark.parametrize(("preference", "wins"), [(1, 0.0), (2, 1.0), (0, 0.5), (1.5, 0.5), (None, None), (1.25, 0.25)])
def test_win_probability(preference: float | None, wins: float | None) -> None:
    assert win_probability(preference) == wins


def test_outputs_of_many_models_become_one_record() -> None:
    outputs = [
        {"prompt_id": prompt, "instruction": f"Do {prompt}.", "output": f"{model}{prompt}", "generator": model}
        for model in ("base", "m", "n")
        for prompt in (1, 2)
    ]
    verdicts = [
        {"prompt_id": prompt, "generator_1": "base", "generator_2": model, "annotator": "gpt", "preference": preference}
        for prompt, model, preference in [(1, "m", 2), (1, "n", 1.5), (2, "m", None), (2, "n", 1)]
    ]
    first, second = load("alpaca-eval", *verdicts, *outputs)
    assert [response.policy for response in first.responses] == ["base", "m", "n"]
    assert scores(first, "gpt") == {"base1": None, "m1": 1.0, "n1": 0.5}
    assert scores(second, "gpt") == {"base2": None, "m2": None, "n2": 0.0}
    rows, lost = dump("alpaca-eval", first, second)
    assert rows == outputs
    assert lost == {"scores.gpt": 3}


def test_verdicts_on_absent_outputs_are_dropped_and_counted() -> None:
    verdict = {"prompt_id": 9, "generator_1": "b", "generator_2": "m", "annotator": "gpt", "preference": 2}
    output = {"prompt_id": 1, "instruction": "Do.", "output": "x", "generator": "b"}
    errors: list[RecordError] = []
    rows = enumerate([output, verdict, verdict | {"prompt_id": 1}], 1)
    assert len(list(find_format("alpaca-eval").read(rows, "f", errors.append))) == 1
    assert [(type(error), error.line) for error in errors] == [(Dropped, 2), (Dropped, 3)]


def test_annotations_bring_their_outputs() -> None:
    (record,) = load("alpaca-eval", ANNOTATED)
    assert scores(record, "gpt") == {"3": None, "4": 0.25}
    assert refusal("alpaca-eval", ANNOTATED | {"preference": 3})[0] == "preference"


def fastchat(*rows: dict[str, Any]) -> CandidateSet:
    questions = [{"question_id": 1, "turns": ["Why?", "And?"], "category": "generic"}]
    answers = [
        {"question_id": 1, "answer_id": "A", "model_id": "m", "choices": [{"index": 0, "turns": ["a", "later"]}]},
        {"question_id": 1, "answer_id": "B", "model_id": "n", "text": "b", "metadata": {}},
    ]
    (record,) = load("fastchat", *rows, *answers, *questions)
    return record


def test_fastchat_joins_questions_and_answers() -> None:
    record = fastchat()
    assert (record.id, record.prompt, record.meta["category"]) == ("1", ASKED, "generic")
    assert [(response.policy, response.text) for response in record.responses] == [("m", "a"), ("n", "b")]
    rows, lost = dump("fastchat", record)
    assert rows[0]["choices"] == [{"index": 0, "turns": ["a", "later"]}]
    assert lost == {"meta.turns": 1, "meta.category": 1}


@pytest.mark.parametrize(
    ("score", "first", "second"),
    [([8, 9.5], 8, 9.5), ([-1, -1], None, None), (1, 1.0, 0.0), (2, 0.0, 1.0), (3, 0.5, 0.5), (-1, None, None)],
)
def test_reviews_score_the_answers_they_name(score: Any, first: float | None, second: float | None) -> None:
    review = {
        "review_id": "r",
        "question_id": 1,
        "answer1_id": "B",
        "answer2_id": "A",
        "score": score,
        "reviewer_id": "g",
    }
    assert scores(fastchat(review), "g: n | m") == {"b": first, "a": second}


def test_listwise_reviews_are_records() -> None:
    (record,) = load("fastchat", {"review_id": 4, "question_id": 1, "order": [2, 1], "metadata": LISTWISE})
    assert scores(record, "order") == {"a": -2, "b": -1}


def test_answers_to_an_unknown_question_are_refused() -> None:
    row = {"question_id": 1, "answer_id": "B", "model_id": "n", "text": "b"}
    assert refusal("fastchat", row) == ("", "nothing here says what prompt '1' asks; its answers (1) are left out")


def test_arena_hard_answers_to_one_prompt_meet() -> None:
    answer = {"role": "assistant", "content": {"answer": "a"}}
    rows = [{"uid": "u", "model": model, "messages": [USER, answer]} for model in ("m", "n")]
    (record,) = load("arena-hard", *rows, {"uid": "u", "prompt": "Why?", "category": "c"})
    assert [response.policy for response in record.responses] == ["m", "n"]
    assert record.meta["category"] == "c"
    assert refusal("arena-hard", rows[0] | {"messages": [USER, USER]})[0] == "messages[1].role"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_scores_come_back_with_their_sizes_or_are_counted_as_lost(name: str) -> None:
    """0.7, 0.1 and -3.25 by one judge: the rows that are written hold these numbers, or ``lost`` says so."""
    sizes = {0.7, 0.1, -3.25}
    answers = [Response(t, p, scores={"j": s}) for t, p, s in zip("abc", "xyz", sorted(sizes), strict=True)]
    rows, losses = dump(name, CandidateSet("p", [{"role": "user", "content": "q"}], answers))
    told = " ".join(losses)
    if "scores.j" not in told:
        assert sizes <= set(numbers(rows)), rows


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value
