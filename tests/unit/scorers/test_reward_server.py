"""Scores by a server: what is posted, what is read, patience, refusals by name, and no key on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankalign.config import ScoreConfig, build
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.engines import openai_client
from rankalign.errors import InputError
from rankalign.scorers.reward_server import RewardServerScorer
from rankalign.stages.generation import score
from rankalign.storage import manifest
from rankalign.storage.journal import peek
from tests.faults.openai_helpers import free_port, hurry
from tests.faults.server import FaultServer

TALK: list[dict[str, Any]] = [{"role": "user", "content": "Grüße {response}?"}]
SETS = [
    CandidateSet("a", TALK, [Response("long answer {prompt}", "m"), Response("нет", "m", finished=False)]),
    CandidateSet("b", "Why?", [Response("yes", "m"), Response("yes", "n"), Response("", "m")]),
]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def size(body: Any) -> float:
    """A reward that anybody can count: characters of the answer, halved, less 3."""
    return len(body["messages"][-1]["content"]) / 2 - 3


def classify(body: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [{"index": 0, "label": "x", "probs": [size(body)], "num_classes": 1}]}


def serve(answer: Callable[[dict[str, Any]], Any], path: str = "/classify", **more: Any) -> FaultServer:
    return FaultServer(answer, paths=(path,), **more)


def scorer(server: FaultServer, path: str = "/classify", **more: Any) -> RewardServerScorer:
    return RewardServerScorer("rm", f"http://127.0.0.1:{server.port}{path}", **more)


def expected() -> list[list[float]]:
    return [[len(r.text) / 2 - 3 for r in record.responses] for record in SETS]


def test_classify_posts_conversations_and_reads_rewards() -> None:
    with serve(classify) as server:
        assert scorer(server, model="m", system="Be short.").score(SETS) == expected()
    bodies = [request.body for request in server.requests]
    assert len(bodies) == 4  # the two that read the same are asked about once
    by_answer = {body["messages"][-1]["content"]: body for body in bodies}
    system = {"role": "system", "content": "Be short."}
    assert by_answer["long answer {prompt}"] == {
        "model": "m",
        "messages": [system, *TALK, {"role": "assistant", "content": "long answer {prompt}"}],
        "add_generation_prompt": False,
        "use_activation": False,
    }
    assert by_answer["нет"]["continue_final_message"] is True  # it was cut, so no end is written behind it


def test_pooling_score_and_texts() -> None:
    cases: list[tuple[str, dict[str, Any], Callable[[dict[str, Any]], Any], dict[str, Any]]] = [
        (
            "/pooling",
            {},
            lambda body: {"data": [{"index": 0, "object": "pooling", "data": [size(body)]}]},
            {"task": "classify"},
        ),
        (
            "/v1/score",
            {},
            lambda body: {"data": [{"index": 0, "object": "score", "score": len(body["documents"]) / 2 - 3}]},
            {"queries": "Why?", "documents": "yes"},
        ),
        (
            "/v1/classify",
            {"template": "hh"},
            lambda body: {"data": [{"probs": [len(body["input"].split("Assistant:")[1]) / 2 - 3]}]},
            {"input": "\n\nHuman: Why?\n\nAssistant:yes"},
        ),
    ]
    for path, options, answer, sent in cases:
        with serve(answer, path) as server:
            assert scorer(server, path, **options).score(SETS) == expected()
        assert any(sent.items() <= request.body.items() for request in server.requests), path


def test_any_post() -> None:
    """OpenRLHF's remote reward model has this shape; a reward server of one's own any other."""
    body = {"query": ["{text}"], "prompts": ["<{prompt}>"], "chat": "{messages}", "n": 1}
    with serve(lambda body: {"rewards": [len(body["query"][0])]}, "/get_reward") as server:
        found = scorer(server, "/get_reward", body=body, value="rewards.0").score(SETS[:1])
    text = "Grüße {response}?long answer {prompt}"  # what stands in braces in a text stays
    assert found == [[len(text), len("Grüße {response}?нет")]]
    assert server.requests[0].body["query"] == [text] or server.requests[1].body["query"] == [text]
    sent = next(request.body for request in server.requests if request.body["query"] == [text])
    assert sent["prompts"] == ["<Grüße {response}?>"]
    assert sent["chat"] == [*TALK, {"role": "assistant", "content": "long answer {prompt}"}]


def test_outputs_and_tokens() -> None:
    three = {"data": [{"probs": [0.5, -2, 7]}]}
    with serve(lambda _: three) as server:
        assert scorer(server, axis=1).score(SETS[:1]) == [[-2.0, -2.0]]
        assert scorer(server, axis="mean").score(SETS[:1]) == [[5.5 / 3] * 2]
        assert scorer(server, axis="2:0.5,0:-2").score(SETS[:1]) == [[0.5 * 7 - 2 * 0.5] * 2]
        for axis, message in (("", "3 outputs; choose one by `axis`"), ("3", "no output 3, it has 3")):
            with pytest.raises(InputError, match=message):
                scorer(server, axis=axis).score(SETS[:1])
    steps = {"data": [{"data": [[0.25], [-1], [0.5]]}]}
    with serve(lambda _: steps, "/pooling") as server:
        for tokens, value in (("last", 0.5), ("mean", -0.25 / 3), ("min", -1.0), ("sum", -0.25)):
            one = scorer(server, "/pooling", tokens=tokens, extra_body={"task": "token_classify"})
            assert one.score(SETS[:1]) == [[value] * 2]
            assert one.explain()[0].responses == [{"token_scores": [[0.25], [-1.0], [0.5]]}] * 2
        with pytest.raises(InputError, match="entry a token; choose by `tokens`"):
            scorer(server, "/pooling").score(SETS[:1])
    assert server.requests[0].body["task"] == "token_classify"


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.5", None, [], [0.5, None], {"x": 1}, 10**400])
def test_what_is_no_number_is_no_score(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setattr(openai_client, "TRIES", 2)
    with (
        serve(lambda _: {"data": [{"probs": value}]}) as server,
        pytest.raises(InputError, match=r"data\.0\.probs|NaN|Infinity|no answer"),
    ):
        scorer(server).score(SETS[:1])


def test_it_waits_and_asks_again() -> None:
    script = ["429", "500", "reset", "garbage", "truncated", "503", "error-200", "429-reset"]
    with serve(classify, script=script) as server:
        assert scorer(server, concurrency=1).score(SETS) == expected()
    assert len(server.requests) == 4 + len(script)


def config(folder: Path, server: FaultServer, **more: Any) -> ScoreConfig:
    write(folder / "in.jsonl", SETS)
    url = f"http://127.0.0.1:{server.port}/classify"
    one = {"name": "rm", "kind": "reward_server", "url": url, "api_key_env": "RM_KEY", "concurrency": 1}
    files = {"input": str(folder / "in.jsonl"), "output": str(folder / "out.jsonl")}
    return build(ScoreConfig, {**files, "scorers": [one], **more}, "test")


def test_a_run_keeps_what_it_was_told_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_KEY", "sk-very-secret")
    with serve(classify, key="sk-very-secret", script=[None, None, "400"]) as server:
        with pytest.raises(InputError, match=r"scorer 'rm': record 'b': the server refuses: 400 .*2 scores are safe"):
            score(config(tmp_path, server))
        assert len(server.requests) == 3
        kept = [value for key, value in peek(tmp_path / "out.jsonl.journal").items() if key[0] == "call"]
        assert kept == [[7.0], [-1.5]]
        assert "secret" not in (tmp_path / "out.jsonl.journal").read_text()
        assert score(config(tmp_path, server))["missing_scores"] == 0
        assert len(server.requests) == 5  # what was answered is not asked again
        found = [[r.scores["rm"] for r in record.responses] for record in read(tmp_path / "out.jsonl")]
    assert found == expected()
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer sk-very-secret"}
    assert all("secret" not in file.read_text() for file in tmp_path.iterdir())


def test_a_refused_answer_is_skipped_counted_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_KEY", "k-1")

    def picky(body: dict[str, Any]) -> dict[str, Any]:
        return {"data": []} if body["messages"][-1]["content"] == "нет" else classify(body)

    with serve(picky) as server:
        result = score(config(tmp_path, server, on_error="skip"))
        assert (result["failed"], result["missing_scores"]) == (1, 1)
        (failure,) = manifest.read(tmp_path / "out.jsonl")["failed"]  # type: ignore[index]
        assert (failure["name"], failure["id"], failure["index"]) == ("rm", "a", 1)
        assert "no data.0.probs" in failure["reason"]
        assert [r.scores["rm"] for r in next(iter(read(tmp_path / "out.jsonl"))).responses] == [7.0, None]
        asked = len(server.requests)
        server.answer = classify
        score(config(tmp_path, server, on_error="skip", retry_failed=True))
        assert len(server.requests) == asked + 1
    assert [[r.scores["rm"] for r in record.responses] for record in read(tmp_path / "out.jsonl")] == expected()


def test_refusals_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9/classify"
    monkeypatch.setenv("RM_KEY", "sk-1")
    for options, message in (
        ({"url": "127.0.0.1:9/classify"}, "url must begin with http"),
        ({"url": "http://u:p@h/classify"}, "no user, password or query"),
        ({"url": "http://h/v1/rewards"}, "form: 'rewards' is unknown .*form post"),
        ({"form": "post"}, "form post needs body"),
        ({"body": {"x": "{prompt}"}, "value": "r"}, "body: holds no answer"),
        ({"form": "classify", "body": {"x": "{text}"}}, "body: form 'classify' has its own"),
        ({"axis": "helpful"}, "servers do not name outputs"),
        ({"tokens": "first"}, "tokens: 'first' is unknown"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"api_key_env": "NOT_SET"}, "NOT_SET"),
        ({"api_key_env": "RM_KEY", "extra_body": {"key": "sk-1"}}, "stands in its settings too"),
    ):
        with pytest.raises(InputError, match=f"scorer 'rm': .*{message}"):
            RewardServerScorer("rm", **{"url": url, **options})
    one = RewardServerScorer("rm", url)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    calls = Response("", "m", messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    tools = CandidateSet("t", "q", [Response("a", "m")], {"tools": [{"type": "function"}]})
    with pytest.raises(InputError, match=r"meta\.tools"):
        one.score([tools])
    with pytest.raises(InputError, match="no place for calls of tools"):
        RewardServerScorer("rm", url, template="raw").score([CandidateSet("t", "q", [calls])])
    with pytest.raises(InputError, match=r"cannot be reached in .* is url right"):
        RewardServerScorer("rm", f"http://127.0.0.1:{free_port()}/classify").score(SETS[:1])
    with (
        serve(classify, "/elsewhere") as server,
        pytest.raises(InputError, match="404 no such model; check url and model"),
    ):
        scorer(server).score(SETS[:1])


def test_squashed_rewards_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    many = CandidateSet("a", "q", [Response(str(i), "m") for i in range(25)])
    with serve(lambda body: {"data": [{"probs": [float(body["messages"][-1]["content"]) / 30]}]}) as server:
        scorer(server).score([many])
        assert "seems to put a sigmoid" in capsys.readouterr().err
        scorer(server, extra_body={"use_activation": True}).score([many])
        assert "sigmoid" not in capsys.readouterr().err
    assert json.dumps(server.requests[-1].body).count("true") == 1
