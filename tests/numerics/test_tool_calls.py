"""Training on calls of tools, their results and thoughts, against plain transformers on the templated conversation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rankalign.data.encode import EncodeOptions, Encoder
from rankalign.data.records import CandidateSet, Response
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.rows.logps import list_logps
from rankalign.rows.two_pass import backward_two_pass
from rankalign.training.arguments import parse_settings
from rankalign.training.reference import content_key
from rankalign.training.run import train
from rankalign.training.settings import DataSettings
from rankalign.training.tokens import encode

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
USER = {"role": "user", "content": "Weather in Łódź?"}
RESULT = {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": "c1"}
SAID = {"role": "assistant", "content": "Grey."}


def calls(name: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))


def encoded(*answers: list[dict[str, Any]], **options: Any) -> Any:
    """Lists of tokens of a record with these answers, the first the best."""
    responses = [Response("", messages=a, scores={"j": float(-i)}) for i, a in enumerate(answers)]
    record = CandidateSet("r", [USER], responses, {"tools": TOOLS})
    return Encoder(tiny.build_tokenizer(), EncodeOptions(judge="j", max_length=2000, **options)).encode(record)


def by_hand(model: Any, messages: list[dict[str, Any]], learned: list[str]) -> torch.Tensor:
    """Log-probability of the stretches ``learned`` of a conversation, in order, by the model's own logits."""
    tokenizer = tiny.build_tokenizer()
    text = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    logps, total, start = model(torch.tensor([ids])).logits[0].log_softmax(-1), 0.0, 0
    for stretch in learned:
        start = text.index(stretch, start)
        first = len(tokenizer(text[:start], add_special_tokens=False)["input_ids"])
        last = len(tokenizer(text[: start + len(stretch)], add_special_tokens=False)["input_ids"])
        total = total + sum(logps[i - 1, ids[i]] for i in range(first, last))
        start += len(stretch)
    return total  # type: ignore[return-value]


CHAIN = [calls("get_weather", city="Łódź"), RESULT, SAID]
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Łódź"}}</tool_call><|eos|>'


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_results_of_tools_are_read_and_not_learned(layout: str) -> None:
    model = tiny.build_model().double()
    lists = encoded(CHAIN, [SAID])
    want = torch.stack(
        [by_hand(model, [USER, *CHAIN], [CALL, "Grey.<|eos|>"]), by_hand(model, [USER, SAID], ["Grey.<|eos|>"])]
    )
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64)
    (want @ weights).backward()
    slopes = [p.grad.clone() for p in model.parameters()]
    assert lists.lengths == [len(CALL.encode()) - len("<|eos|>") + 1 + 6, 6]
    ids: tuple[Any, Any] = ([lists.prompt], [lists.responses])
    model.zero_grad()
    found = list_logps(model, *ids, layout=layout, unlearned=[lists.unlearned])
    torch.testing.assert_close(found[0], want.detach(), rtol=0, atol=1e-9, check_dtype=False)
    (found[0] @ weights).backward()
    for parameter, slope in zip(model.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-5, atol=1e-7)
    model.zero_grad()
    backward_two_pass(model, *ids, lambda logps: logps[0] @ weights, 200, layout=layout, unlearned=[lists.unlearned])
    for parameter, slope in zip(model.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-5, atol=1e-7)


def test_thoughts_are_kept_masked_or_dropped() -> None:
    model = tiny.build_model().double()
    answer = [{**SAID, "reasoning_content": "Clouds, surely."}]
    thought, rest = "<think>\nClouds, surely.\n</think>", "\nGrey.<|eos|>"
    for how, learned, told in (
        ("keep", [thought + rest], answer),
        ("mask", [rest], answer),
        ("drop", ["Grey.<|eos|>"], [SAID]),
    ):
        lists = encoded(answer, thoughts=how)
        found = list_logps(model, [lists.prompt], [lists.responses], unlearned=[lists.unlearned])
        want = by_hand(model, [USER, *told], learned)
        torch.testing.assert_close(found[0, 0], want, rtol=0, atol=1e-9, check_dtype=False)
        text = tiny.build_tokenizer().decode(lists.prompt + lists.responses[0])
        assert ("Clouds" in text) == (how != "drop")


@pytest.mark.parametrize("how", ["keep", "mask", "drop"])
def test_thoughts_in_a_text_and_in_sampled_tokens(how: str) -> None:
    tokenizer = tiny.build_tokenizer()
    encoder = Encoder(tokenizer, EncodeOptions(judge="j", thoughts=how))
    said = "<think>Łódź?</think>\n\nGrey."
    drawn = {"tokenizer": encoder.rendering.fingerprint, "ids": tokenizer(said, add_special_tokens=False)["input_ids"]}
    responses = [Response(said, scores={"j": 1.0}), Response(said, scores={"j": 0.0}, tokens=drawn)]
    lists = encoder.encode(CandidateSet("r", [USER], responses))
    assert lists is not None
    for ids, spans in zip(lists.responses, lists.unlearned or [(), ()], strict=True):
        assert tokenizer.decode(ids) == {"drop": "Grey.<|eos|>"}.get(how, f"{said}<|eos|>")
        hidden = "".join(tokenizer.decode(ids[a:b]) for a, b in spans)
        assert hidden == {"mask": "<think>Łódź?</think>"}.get(how, "")


def test_what_counts_is_part_of_what_a_reference_is_kept_by() -> None:
    keys = {content_key([1], [2, 3, 4]), content_key([1], [2, 3, 4], ((0, 1),)), content_key([1], [2, 3, 4], ((1, 2),))}
    assert len(keys) == 3


def test_what_is_not_learned_is_kept_in_the_table_of_tokens(tmp_path: Path) -> None:
    row = {"prompt": [USER], "chosen": CHAIN, "rejected": [SAID], "tools": TOOLS}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    for how in ("keep", "mask"):
        fixed: dict[str, Any] = {"data": str(tmp_path / "pairs.jsonl"), "max_length": 1000, "thoughts": how}
        first, again, bare = (
            encode(DataSettings(**fixed, token_cache=cache), tiny.build_tokenizer(), fixed["data"])[0][0]
            for cache in (str(tmp_path / "tokens"), str(tmp_path / "tokens"), "off")
        )
        assert first == again == bare
        assert len(bare.unlearned[0]) == 1


@pytest.mark.parametrize("how", [{"method": "reward", "thoughts": "mask"}, {"thoughts": "hide"}])
def test_a_wish_about_thoughts_that_cannot_be_had_is_refused(tmp_path: Path, how: dict[str, str]) -> None:
    with pytest.raises(InputError, match="--thoughts"):
        parse_settings({"model": "tiny", "data": "x.jsonl", "output_dir": str(tmp_path), "use_cpu": True, **how})


def test_dpo_learns_the_preferred_call(tmp_path: Path) -> None:
    cities = ["Oslo", "Łódź", "京都", "Lima"]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Weather in {city}?"}],
            "chosen": [calls("get_weather", city=city)],
            "rejected": [calls("get_time", zone=city)],
            "tools": TOOLS,
        }
        for city in cities
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {"model": "tiny", "loss": "dpo", "data": str(tmp_path / "pairs.jsonl"), "max_steps": 20}
    config |= {"output_dir": str(tmp_path / "run"), "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    train(parse_settings({**config, "use_cpu": True, "logging_steps": 1, "max_length": 1000, "save_strategy": "no"}))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert next(entry["loss"] for entry in log if "loss" in entry) == pytest.approx(math.log(2), abs=1e-6)
    after = models.load_policy(str(tmp_path / "run"))
    for row in rows:
        before, now = (
            [
                by_hand(
                    model,
                    [*row["prompt"], *row[side]],
                    [json.dumps(row[side][0]["tool_calls"][0]["function"], ensure_ascii=False)],
                )
                for side in ("chosen", "rejected")
            ]
            for model in (tiny.build_model(), after)
        )
        assert now[0] > now[1]
        assert now[0] - now[1] > before[0] - before[1] + 5
