"""Calls of tools, thoughts, parts of a content and several messages an answer, through every format and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rankalign.config import SampleConfig
from rankalign.data.convert import convert
from rankalign.data.formats import FORMATS
from rankalign.data.records import read
from rankalign.engines import Policy
from rankalign.stages.generation import sample
from tests.unit.data.formats.test_formats import dump, load

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
USER = {"role": "user", "content": "Weather in Łódź?"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Oslo?"}]}
# Arguments as the Chat Completions form has them, a text, and as templates want them, a mapping.
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":  "Łódź"}'}}],
}
OTHER = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "c2", "type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": '{"sky": "grey"}'}
SAID = {"role": "assistant", "content": "Grey.", "reasoning_content": "The tool says so."}
PLAIN = {"role": "assistant", "content": "No idea."}
CHAIN = [CALL, RESULT, SAID]
MORE = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
TURN = {"from": "human", "value": "Weather in Łódź?"}
CALLS = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Łódź"}}'}
TIGHT = {"from": "function_call", "value": '[{"name":"weather","arguments":{}},{"name":"time","arguments":{}}]'}
SEEN, SAYS = {"from": "observation", "value": "grey"}, {"from": "gpt", "value": "Grey."}

ROWS: dict[str, list[dict[str, Any]]] = {
    "trl": [
        {"prompt": [USER], "chosen": [CALL], "rejected": [OTHER], **MORE},
        {"prompt": [PARTS], "chosen": CHAIN, "rejected": [PLAIN], "tools": json.dumps(TOOLS)},
        {"chosen": [USER, *CHAIN], "rejected": [USER, CALL, RESULT, PLAIN], **MORE},
        {"prompt": [USER, CALL, RESULT], "completion": [SAID], "label": True},
        {"prompt": [USER], "completion": CHAIN, "documents": [{"title": "t", "text": "d"}]},
        {"messages": [PARTS, *CHAIN], "tools": TOOLS},
        {"prompt": [USER], "tools": TOOLS},
    ],
    "openrlhf": [
        {"prompt": [USER], "chosen": [CALL], "rejected": [OTHER], **MORE},
        {"input": [USER], "output": CHAIN, "label": False},
    ],
    "ms-swift": [
        {"messages": [USER, *CHAIN], "tools": TOOLS},
        {"messages": [USER, CALL, RESULT, SAID], "rejected_response": "No idea."},
        {"messages": [USER, *CHAIN], "rejected_messages": [USER, PLAIN]},
        {"messages": [USER, CALL], "rejected_response": [OTHER]},
    ],
    "llama-factory": [
        {"conversations": [TURN, CALLS, SEEN, SAYS], "tools": json.dumps(TOOLS), "system": "Be brief."},
        {"conversations": [TURN, TIGHT, SEEN, SAYS], "kto_tag": True},
        {"conversations": [TURN], "chosen": CALLS, "rejected": {"from": "gpt", "value": "No idea."}, "tools": "[]"},
        {"conversations": [TURN, CALLS, SEEN], "chosen": SAYS, "rejected": {"from": "gpt", "value": "No idea."}},
    ],
    "nemo-rl": [
        {
            "context": [USER],
            "completions": [{"rank": 0, "completion": CHAIN}, {"rank": 1, "completion": [OTHER]}],
            "tools": TOOLS,
        }
    ],
    "halos": [
        {"prompt_id": "p", "prompt": [USER], "output": CHAIN, "label": 1, "type": "binary_feedback"},
    ],
    "best-of-n": [{"prompt": [USER], "responses": [[CALL], CHAIN, "No idea."], "rewards": [1.0, 2.0, 0.0]}],
    "pairs": [{"prompt": [USER], "chosen_response": [CALL], "rejected_response": [OTHER], "tools": TOOLS}],
    "helpsteer": [
        {"context": [USER, CALL, RESULT], "response1": "Grey.", "response2": "No.", "overall_preference": -2},
    ],
    "prompt-response": [{"prompt": [USER], "response": CHAIN, "score": 3}],
    "arena-battles": [
        {
            "model_a": "a",
            "model_b": "b",
            "winner": "model_a",
            "conversation_a": [USER, CALL],
            "conversation_b": [USER, PLAIN],
        }
    ],
    "rankalign": [
        {
            "id": "r",
            "prompt": [PARTS],
            "tools": TOOLS,
            "responses": [{"text": "Grey.", "messages": CHAIN, "policy": "p", "finished": True}],
        }
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_a_row_with_messages_in_full_comes_back_to_the_bit(name: str, row: dict[str, Any]) -> None:
    rows, lost = dump(name, *load(name, copy.deepcopy(row)))
    assert (json.dumps(rows), lost) == (json.dumps([row]), {}) or (rows, lost) == ([row], {})


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"table"}))
def test_what_a_format_cannot_hold_is_counted(name: str) -> None:
    """Every format writes a pair whose answers are calls: they are in the rows, or among what is lost."""
    (record,) = load("trl", copy.deepcopy(ROWS["trl"][0]))
    for response, score in zip(record.responses, (1.0, 0.0), strict=True):
        response.scores |= {"label": score}
    rows, lost = dump(name, record)
    written = json.dumps(rows, ensure_ascii=False)
    both = "weather" in written.replace(json.dumps(TOOLS), "") and "CET" in written
    assert both or "response.messages" in lost, (rows, lost)
    assert '"tools"' in written or any("tools" in reason or "meta" in reason for reason in lost), (rows, lost)


def test_a_chain_of_calls_is_the_answer_where_it_follows_the_user() -> None:
    (record,) = load("trl", {"messages": [USER, PLAIN, USER, *CHAIN]})
    assert (len(record.prompt), record.responses[0].messages, record.responses[0].text) == (3, CHAIN, "Grey.")
    (record,) = load("trl", {"chosen": [USER, CALL, RESULT, SAID], "rejected": [USER, CALL, RESULT, PLAIN]})
    assert record.prompt == [USER, CALL, RESULT]
    assert [r.messages for r in record.responses] == [[SAID], None]
    (record,) = load("llama-factory", ROWS["llama-factory"][0])
    calls = record.responses[0].messages
    assert calls is not None
    assert calls[0]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Łódź"}}
    assert [message["role"] for message in calls] == ["assistant", "tool", "assistant"]


def test_the_same_calls_from_one_format_to_another() -> None:
    (record,) = load("llama-factory", ROWS["llama-factory"][2])
    ((row,), lost) = dump("trl", record)
    assert lost == {"meta.llama-factory": 1}  # how the row was laid out
    assert row["chosen"][0]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Łódź"}}
    (record,) = load("trl", ROWS["trl"][0])
    ((row,), lost) = dump("llama-factory", record)
    assert lost == {}
    assert json.loads(row["chosen"]["value"]) == {"name": "weather", "arguments": {"city": "Łódź"}}
    (record,) = load("trl", ROWS["trl"][1])
    assert dump("llama-factory", record) == ([], {"responses of several turns": 1, "prompts without a strict pair": 1})


def test_sampling_gives_the_data_back(tmp_path: Path) -> None:
    rows = ROWS["trl"][:2]
    for number, row in enumerate(rows):
        path, out = tmp_path / f"pairs{number}.jsonl", tmp_path / f"sampled{number}.jsonl"
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        policies = [Policy(name, engine="replay", only=name) for name in ("chosen", "rejected")]
        sample(SampleConfig(prompts=str(path), output=str(out), policies=policies))
        assert [r.messages for r in next(read(out)).responses] != [None, None]
        convert(out, tmp_path / "back.jsonl", to_format="trl")
        assert (tmp_path / "back.jsonl").read_bytes() == path.read_bytes()
