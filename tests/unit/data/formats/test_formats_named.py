"""Named data sets: three rows of each, in the columns they are published with, and what they must become.

The expected texts follow from the columns' meaning; where an older loader is known to have read them wrong, a row here
would show it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankalign.data.convert import Intake, convert, find_reader, load
from rankalign.data.formats import FORMATS
from rankalign.data.formats.named import DATASETS
from rankalign.data.records import CandidateSet, read
from rankalign.data.templates import render
from rankalign.errors import InputError, RecordError
from rankalign.storage.jsonl import write_rows

# The prompt as the `hh` template spells it, and the answers as (policy, text, preference).
Expected = tuple[str, list[tuple[str, str, float | None]]]


def human(text: str) -> str:
    return f"\n\nHuman: {text}\n\nAssistant:"


def expected(prompt: str, *answers: tuple[str, str, float | None]) -> Expected:
    return prompt, list(answers)


def pair(prompt: str, chosen: str, rejected: str) -> Expected:
    return expected(prompt, ("chosen", chosen, 1.0), ("rejected", rejected, 0.0))


def single(prompt: str, answer: str, policy: str = "output") -> Expected:
    return expected(prompt, (policy, answer, None))


N = (1, 2, 3)
LONG = "a summary of five words"
DIALOGUE = "\n\nHuman: Is {0} odd?\n\nAssistant: Yes.\n\nHuman: Sure {0}?\n\nAssistant:"
INSTRUCTIONS = ([{"instruction": f"Add {n}.", "input": "" if n == 1 else f"{n} 4", "output": f"{n + 4}"} for n in N],
                [single(human(f"Add {n}." if n == 1 else f"Add {n}.\n\n{n} 4"), f"{n + 4}") for n in N])  # fmt: skip
HH = ([{"prompt": DIALOGUE.format(n), "chosen": f" Yes {n}.", "rejected": f" No {n}."} for n in N],
      [pair(DIALOGUE.format(n), f"Yes {n}.", f"No {n}.") for n in N])  # fmt: skip
MIRACL = (
    [
        {
            "query": f"{n}?",
            "positive_passages": [{"docid": "1", "text": f"yes {n}", "title": "t"}],
            "negative_passages": [{"docid": "2", "text": f"no {n}", "title": "t"}, {"docid": "3", "text": "x"}],
        }
        for n in N
    ],
    [pair(human(f"{n}?"), f"yes {n}", f"no {n}") for n in N],
)
BOTS = (
    [{"text": f"<human>: Is {n} odd?\n<bot>: Yes.\n<human>: Sure {n}?\n<bot>: Quite {n}.", "lang": "en"} for n in N],
    [single(DIALOGUE.format(n), f"Quite {n}.") for n in N],
)
SUMMARIES = [{"text": f"{LONG} {side}", "policy": "p", "note": ""} for side in "ab"]
POST = {"id": "t3_1", "title": "T", "subreddit": "s", "post": "P"}
POSTED = "SUBREDDIT: r/s\nTITLE: T\nPOST: P\nTL;DR:"

CASES: dict[str, tuple[list[dict[str, Any]], list[Expected]]] = {
    "Anthropic/hh-rlhf": (
        # The first reply, which a split at the first 'Assistant:' would give, is the same on both sides.
        [{"chosen": DIALOGUE.format(n) + f" Yes {n}.", "rejected": DIALOGUE.format(n) + f" No {n}."} for n in N],
        HH[1],
    ),
    "Dahoas/rm-static": HH,
    "Dahoas/full-hh-rlhf": HH,
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        [{"prompt": f"Why {n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in N],
        [pair(human(f"Why {n}?"), f"yes {n}", f"no {n}") for n in N],
    ),
    "yitingxie/rlhf-reward-datasets": (
        [
            {"prompt": f"\n\nHuman: Why {n}?\n\n", "chosen": f"Assistant: yes {n}", "rejected": f"Assistant: no {n}"}
            for n in N
        ],
        [pair(human(f"Why {n}?"), f"yes {n}", f"no {n}") for n in N],
    ),
    "openai/webgpt_comparisons": (
        [
            {"question": {"full_text": f"{n}?"}, "answer_0": "a", "answer_1": "b", "score_0": n - 2, "score_1": 2 - n}
            for n in N
        ],
        # The scores are judge `score`: -1 < 1, then a tie, then 1 > -1. See the test on ties.
        [expected(human(f"{n}?"), ("answer_0", "a", None), ("answer_1", "b", None)) for n in N],
    ),
    "stanfordnlp/SHP": (
        [{"history": f"{n}?", "human_ref_A": "a", "human_ref_B": "b", "labels": n % 2} for n in N],
        [expected(human(f"{n}?"), ("human_ref_A", "a", n % 2), ("human_ref_B", "b", 1 - n % 2)) for n in N],
    ),
    "lvwerra/stack-exchange-paired": (
        [{"qid": n, "question": f"{n}?", "response_j": "a", "response_k": "b"} for n in N],
        [expected(human(f"{n}?"), ("response_j", "a", 1.0), ("response_k", "b", 0.0)) for n in N],
    ),
    "openai/summarize_from_feedback": (
        [{"info": POST, "summaries": SUMMARIES, "choice": choice} for choice in (0, 1, 0)],
        [expected(POSTED, ("p", f"{LONG} a", 1.0 - choice), ("p", f"{LONG} b", float(choice))) for choice in (0, 1, 0)],
    ),
    "CarperAI/openai_summarize_tldr": (
        [{"prompt": POSTED, "label": f"about {n}"} for n in N],
        [single(POSTED, f"about {n}", "human") for n in N],
    ),
    "CarperAI/openai_summarize_comparisons": (
        [{"prompt": POSTED, "chosen": f"{LONG} {n}", "rejected": LONG} for n in N],
        [pair(POSTED, f"{LONG} {n}", LONG) for n in N],
    ),
    "OAPrivate": (
        [
            {"prompt": f"Sure {n}?", "history": [[f"Is {n} odd?", "Yes."]], "pos": "y", "neg_replies": ["n"] * n}
            for n in N
        ],
        [expected(DIALOGUE.format(n), ("chosen", "y", 1.0), *[("rejected", "n", 0.0)] * n) for n in N],
    ),
    "wangrui6/Zhihu-KOL": (
        [{"INSTRUCTION": f"{n}?", "RESPONSE": f"{n}.", "SOURCE": "Zhihu", "METADATA": "{}"} for n in N],
        [single(human(f"{n}?"), f"{n}.") for n in N],
    ),
    "Cohere/miracl-zh-queries-22-12": MIRACL,
    "Cohere/miracl-ja-queries-22-12": MIRACL,
    "Hello-SimpleAI/HC3-Chinese": (
        [{"question": f"{n}?", "human_answers": [f"{n}.", "x"], "chatgpt_answers": ["y"]} for n in N],
        [single(human(f"{n}?"), f"{n}.", "human") for n in N],
    ),
    **{
        f"mkqa-{name}": (
            [{"query": "?", "queries": {key: f"{n}?"}, "answers": {key: [{"text": f"{n}.", "type": "x"}]}} for n in N],
            [single(human(f"{n}?"), f"{n}.") for n in N],
        )
        for name, key in (("Chinese", "zh_cn"), ("Japanese", "ja"))
    },
    "lmqg/qg_jaquad": (
        [{"question": f"{n}?", "sentence": f"{n}.", "answer": "x", "paragraph": "p"} for n in N],
        [single(human(f"{n}?"), f"{n}.") for n in N],
    ),
    "lmqg/qag_jaquad": (
        [{"questions": [f"{n}?", "x?"], "answers": ["x"], "paragraph": f"{n}."} for n in N],
        [single(human(f"{n}?"), f"{n}.") for n in N],
    ),
    "databricks/databricks-dolly-15k": (
        [{"instruction": f"{n}?", "context": "" if n == 1 else "C", "response": f"{n}.", "category": "qa"} for n in N],
        [single(human(f"{n}?" if n == 1 else f"{n}?\n\nC"), f"{n}.") for n in N],
    ),
    "mosaicml/dolly_hhrlhf": (
        [
            {"prompt": f"Below is an instruction.\n\n### Instruction:\n{n}?\n\n### Response:\n", "response": "x"}
            for n in N
        ],
        [single(f"Below is an instruction.\n\n### Instruction:\n{n}?\n\n### Response:\n", "x") for n in N],
    ),
    "YeungNLP/firefly-train-1.1M": (
        [{"kind": "NLI", "input": f"{n}?", "target": f"{n}."} for n in N],
        [single(human(f"{n}?"), f"{n}.") for n in N],
    ),
    "OpenAssistant/oasst1": BOTS,
    "laion/OIG": BOTS,
    "fnlp/moss-002-sft-data": (
        [
            {
                "plain_text": f"[Human]: Is {n} odd?<eoh> [MOSS]: Yes.<eoa>"
                f"[Human]: Sure {n}?<eoh> [MOSS]: Quite {n}.<eoa>",
                "num_turns": 2,
            }
            for n in N
        ],
        BOTS[1],
    ),
    "nomic-ai/gpt4all-j-prompt-generations": (
        # There is no column `chosen`, for which a loader once asked.
        [{"prompt": f"{n}?", "response": f"{n}.", "source": "unified_chip2"} for n in N],
        [single(human(f"{n}?"), f"{n}.") for n in N],
    ),
    **{name: INSTRUCTIONS for name, entry in DATASETS.items() if getattr(entry, "form", "") == "alpaca"},
}


def spelt(record: CandidateSet) -> Expected:
    prompt = record.prompt if isinstance(record.prompt, str) else render(record.prompt, "hh")
    return prompt, [(r.policy, r.text, r.scores.get("preference")) for r in record.responses]


def read_rows_as(name: str, *rows: dict[str, Any]) -> tuple[list[CandidateSet], list[str]]:
    errors: list[RecordError] = []
    sets = list(find_reader(name).read(enumerate(rows, 1), "set.jsonl", errors.append))
    return sets, [str(error) for error in errors]


def test_every_name_of_the_ancestors_has_a_case() -> None:
    # The 35 of Open-ChatGPT's get_raw_dataset, and four of the other loaders.
    assert CASES.keys() == DATASETS.keys()
    assert len(CASES) == 39


@pytest.mark.parametrize("name", DATASETS)
def test_three_rows_become_what_they_mean(name: str, tmp_path: Path) -> None:
    rows, results = CASES[name]
    write_rows(tmp_path / "in.jsonl", rows)
    report = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", name)
    assert (report["read"], report["written"], report["skipped"], report["lost"]) == (3, 3, 0, {})
    assert [spelt(record) for record in read(tmp_path / "out.jsonl")] == results


@pytest.mark.parametrize("name", DATASETS)
def test_a_row_without_its_columns_is_named_not_dropped(name: str) -> None:
    sets, errors = read_rows_as(name, {"unknown": 1})
    assert sets == []
    assert len(errors) == 1
    assert errors[0].startswith("set.jsonl:1: ")


@pytest.mark.parametrize("name", sorted(name for name, entry in DATASETS.items() if not hasattr(entry, "form")))
def test_columns_without_a_place_are_kept(name: str) -> None:
    (record,), _ = read_rows_as(name, CASES[name][0][0] | {"extra": {"kept": [1]}})
    assert record.meta["extra"] == {"kept": [1]}


def test_ties_are_ties_and_never_the_first_answer(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", CASES["openai/webgpt_comparisons"][0])
    report = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "openai/webgpt_comparisons", "trl")
    assert (report["written"], report["lost"]["ties"]) == (2, 1)
    pairs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        ("b", "a"),
        ("a", "b"),
    ]


def test_equal_pairs_are_counted_and_left_out(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "same", "rejected": "same"}
    write_rows(tmp_path / "in.jsonl", [row, row | {"rejected": "other"}])
    for name in ("Dahoas/synthetic-instruct-gptj-pairwise", "trl"):
        report = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", name)
        assert (report["read"], report["written"], report["skipped"]) == (2, 1, 0)
        assert report["lost"] == {"pairs of equal answers": 1}


def test_every_passage_of_a_reply_list_is_an_answer() -> None:
    row = {"prompt": "q", "pos": "a", "neg_replies": ["b", "c"]}
    (record,), errors = read_rows_as("OAPrivate", row)
    assert errors == []
    assert record.scores("preference") == [1.0, 0.0, 0.0]
    assert read_rows_as("OAPrivate", row | {"neg_replies": []})[1] == [
        "set.jsonl:1: neg_replies: needs at least 1 elements, found 0"
    ]


@pytest.mark.parametrize(
    ("name", "row", "error"),
    [
        ("nomic-ai/gpt4all-j-prompt-generations", {"prompt": "q"}, "response: is missing (found: prompt)"),
        ("wangrui6/Zhihu-KOL", {"INSTRUCTION": "q", "RESPONSE": None}, "RESPONSE: expected a string, found null"),
        (
            "mkqa-Japanese",
            {"queries": {"ja": "q"}, "answers": {"ja": []}},
            "answers.ja: needs at least 1 elements, found 0",
        ),
        ("mkqa-Japanese", {"queries": {"en": "q"}, "answers": {}}, "queries.ja: is missing (found: en)"),
        ("laion/OIG", {"text": "<human>: Hi"}, "text: does not end with a turn of '<bot>:'"),
        ("laion/OIG", {"text": "plain"}, "text: does not end with a turn of '<bot>:'"),
        ("laion/OIG", {"text": "<bot>: Hi"}, "text: is empty"),
        ("lmqg/qg_jaquad", {"question": " ", "sentence": "s"}, "question: is empty"),
    ],
)
def test_what_is_refused_is_named(name: str, row: dict[str, Any], error: str) -> None:
    assert read_rows_as(name, row) == ([], [f"set.jsonl:1: {error}"])


def test_dolly_keeps_instruction_and_context_apart_for_the_template() -> None:
    (record,), _ = read_rows_as("databricks/databricks-dolly-15k", CASES["databricks/databricks-dolly-15k"][0][1])
    text = render(record.prompt, "alpaca", meta=record.meta)
    assert text.endswith("### Instruction:\n2?\n\n### Input:\nC\n\n### Response:")


def test_what_stands_before_the_first_turn_is_a_system_message() -> None:
    (record,), _ = read_rows_as("laion/OIG", {"text": "Background: tea.\n<human>: Hot?\n<bot>: Cold."})
    assert record.prompt == [
        {"role": "system", "content": "Background: tea."},
        {"role": "user", "content": "Hot?"},
    ]


# --- OpenAssistant's trees ---------------------------------------------------------------------------------------


def message(ident: str, parent: str | None, role: str, **more: Any) -> dict[str, Any]:
    return {"message_id": ident, "parent_id": parent, "text": f"text {ident}", "role": role, **more}


TREE = [
    message("p", None, "prompter", lang="en", rank=None),
    message("a", "p", "assistant", rank=1),
    message("b", "p", "assistant", rank=0),
    message("q", "b", "prompter"),
    message("c", "q", "assistant", rank=None),
]


def test_a_tree_gives_a_record_for_each_question_with_ranked_answers() -> None:
    sets, errors = read_rows_as("OpenAssistant/oasst1", *TREE, message("r", "c", "prompter"))
    assert [record.id for record in sets] == ["p", "q"]
    assert sets[0].meta == {"lang": "en"}
    assert [(r.text, r.policy, r.scores) for r in sets[0].responses] == [
        ("text a", "human", {"rank": -1}),
        ("text b", "human", {"rank": 0}),
    ]
    assert render(sets[1].prompt, "hh") == "\n\nHuman: text p\n\nAssistant: text b\n\nHuman: text q\n\nAssistant:"
    assert [(r.text, r.scores) for r in sets[1].responses] == [("text c", {})]
    assert errors == ["set.jsonl:6: questions without an answer"]


def test_the_order_of_a_trees_rows_does_not_matter() -> None:
    forth, _ = read_rows_as("OpenAssistant/oasst1", *TREE)
    back, _ = read_rows_as("OpenAssistant/oasst1", *reversed(TREE))
    answers = [{record.id: {r.text: r.scores for r in record.responses} for record in sets} for sets in (forth, back)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (
            [message("a", None, "assistant"), message("a", None, "assistant")],
            "2: message_id: 'a' stands already on line 1",
        ),
        ([message("a", None, "bot")], "1: role: expected one of prompter, assistant, found 'bot'"),
        ([message("a", None, "assistant", rank="1")], "1: rank: expected a number, found a string"),
        (
            [message("q", "x", "prompter"), message("a", "q", "assistant")],
            "1: parent_id: 'x' leads to no root in this file",
        ),
        (
            [message("q", "a", "prompter"), message("a", "q", "assistant")],
            "2: parent_id: 'q' leads to no root in this file",
        ),
    ],
)
def test_broken_trees_are_named(rows: list[dict[str, Any]], error: str) -> None:
    assert read_rows_as("OpenAssistant/oasst1", *rows) == ([], [f"set.jsonl:{error}"])


# --- names -------------------------------------------------------------------------------------------------------


def test_names_are_listed_with_the_formats() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "rankalign", "ls", "formats", "--json"], capture_output=True, check=True, text=True
    )
    assert [row["name"] for row in json.loads(listed.stdout)] == [*FORMATS, *DATASETS]


def test_a_name_is_for_reading(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", HH[0])
    with pytest.raises(InputError, match="unknown format 'Dahoas/rm-static'"):
        convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "hh", "Dahoas/rm-static")
    with pytest.raises(InputError, match=r"did you mean 'Dahoas/rm-static'\?"):
        load([tmp_path / "in.jsonl"], "Dahoas/rmstatic", Intake(skip_invalid=False))
