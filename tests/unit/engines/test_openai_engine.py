"""Engine ``openai``: what it asks, what it makes of replies, what it notices, what it never tells."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import pytest

from rankalign.data.records import CandidateSet, Response
from rankalign.engines import ENGINES, Policy, SamplingParams, openai_client
from rankalign.engines.openai import OpenAIEngine, request_seed
from rankalign.errors import InputError
from tests.faults.openai_helpers import GREEDY, PROMPTS, SAMPLED, ask, engine, hurry, one
from tests.faults.server import FaultServer


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


# --- what is asked ------------------------------------------------------------------------------------------------


def test_each_answer_is_a_request_with_its_own_seed() -> None:
    with FaultServer() as server:
        rows = ask(server, SAMPLED, system="Be brief.")
        asked = {r.body["seed"]: r.body for r in server.requests}
        for prompt, row in zip(PROMPTS, rows, strict=True):
            for index, response in enumerate(row):
                seed = request_seed(5, prompt.id, "api", index)
                body = asked.pop(seed)
                assert body["messages"] == [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": prompt.prompt},
                ]
                told = {"model": "m", "temperature": 0.7, "top_p": 1.0, "max_tokens": 40, "seed": seed}
                assert {key: value for key, value in body.items() if key != "messages"} == told or index == 0
                assert response.text == server.reply("/v1/chat/completions", body)["choices"][0]["message"]["content"]
                assert response.sampling["request_seed"] == seed
                assert (response.sampling["seed"], response.sampling["index"]) == (5, index)
        assert not asked
        assert len({r.text for row in rows for r in row}) == 12
        batch_of_one = engine(server, SAMPLED, system="Be brief.").generate(PROMPTS[3:4])
    assert batch_of_one == rows[3:4]


def test_seeds_fit_31_bits_and_are_the_same_on_every_machine() -> None:
    assert request_seed(0, "p", "a", 0) == 0x10925D36  # by sha256sum of the bytes [0, "p", "a", 0]
    assert all(0 <= request_seed(s, "p", "a", 1) < 2**31 for s in range(200))


def test_greedy_asks_once_for_all() -> None:
    with FaultServer() as server:
        rows = ask(server, GREEDY | {"n": 3})
        assert len(server.requests) == 6
    assert [[r.sampling["index"] for r in row] for row in rows] == [[0, 1, 2]] * 6
    assert all(len({r.text for r in row}) == 1 for row in rows)
    assert [r.sampling["usage"].get("completion_tokens") for r in rows[0]] == [12, None, None]


def test_only_what_ends_where_an_answer_begins_goes_to_completions_and_is_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = ["What does [INST] mean?", 'Is "ASSISTANT:" a label?', "A chat. USER: Hi ASSISTANT:"]
    prompts = [CandidateSet(f"p{i}", text) for i, text in enumerate(said)]
    with FaultServer() as server:
        made = engine(server)
        for batch in made.batches(prompts):
            made.generate([prompts[i] for i in batch])
        bodies = [(request.path, request.body) for request in server.requests]
        paths = {body.get("prompt") or body["messages"][0]["content"]: path for path, body in bodies}
    assert [paths[text].removeprefix("/v1/") for text in said] == ["chat/completions"] * 2 + ["completions"]
    assert "1 string prompts end where an answer begins" in capsys.readouterr().err


def test_a_begun_answer_is_to_be_continued() -> None:
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    with FaultServer() as server:
        engine(server).generate([CandidateSet("p", begun), CandidateSet("q", begun[:1])])
        bodies = {len(request.body["messages"]): request.body for request in server.requests}
    assert (bodies[2]["continue_final_message"], bodies[2]["add_generation_prompt"]) == (True, False)
    assert "continue_final_message" not in bodies[1]


@pytest.mark.parametrize(
    ("template", "prompt", "text"),
    [
        ("hh", "Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("raw", "Once upon", "Once upon"),
        ("auto", "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
    ],
)
def test_other_templates_go_rendered_to_completions(template: str, prompt: str, text: str) -> None:
    with FaultServer() as server:
        engine(server, template=template).generate([CandidateSet("p", prompt)])
        (request,) = server.requests
    assert request.path == "/v1/completions"
    assert request.body["prompt"] == text
    assert request.body.get("stop") == (
        ["\n\nHuman:", "\n\nAssistant:", "\n\nhuman:", "\n\nassistant:"] if template == "hh" else None
    )


def test_extra_body_and_filters_are_sent() -> None:
    with FaultServer() as server:
        ask(server, SAMPLED | {"top_k": 7, "min_p": 0.1, "stop": ("END",)}, extra_body={"logit_bias": {"5": 1}})
        bodies = [r.body for r in server.requests]
    assert all(b["logit_bias"] == {"5": 1} and b["stop"] == ["END"] for b in bodies)
    assert sum(b["top_k"] == 7 and b["min_p"] == 0.1 for b in bodies) == 12 + 2  # of the probes, the seed's two


def test_the_limit_of_requests_in_flight_is_kept_and_used() -> None:
    with FaultServer(delay=0.3) as server:
        made = engine(server, concurrency=3)
        assert made.batches(PROMPTS * 5) == [list(range(12)), list(range(12, 24)), list(range(24, 30))]
        made.generate(PROMPTS)
        assert server.most_in_flight == 3
    assert engine(server, SAMPLED, concurrency=3).batches(PROMPTS * 2) == [list(range(6)), list(range(6, 12))]


def test_it_works_inside_a_running_loop() -> None:
    async def notebook() -> list[list[Response]]:
        with FaultServer() as server:
            return ask(server)

    assert len(asyncio.run(notebook())) == 6


# --- keys ---------------------------------------------------------------------------------------------------------


def test_no_key_is_sent_unless_one_is_named() -> None:
    with FaultServer() as server:
        ask(server)
        sent = [value for r in server.requests for value in r.headers.values()]
    assert not [value for value in sent if "sk-not-for-this-server" in value and value != "sk-not-for-this-server"]
    assert all("authorization" not in r.headers and "openai-organization" not in r.headers for r in server.requests)


def test_the_named_key_is_sent_and_shown_to_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    with FaultServer(key="sk-secret-1") as server:
        made = engine(server, api_key_env="MY_KEY")
        made.generate(PROMPTS)
        made.close()
    assert (
        "sk-secret"
        not in repr(made) + repr(vars(made)) + repr(made.policy) + repr(made._client) + capsys.readouterr().err
    )
    with FaultServer(key="sk-other") as server, pytest.raises(InputError) as caught:
        engine(server, api_key_env="MY_KEY").generate(PROMPTS)
    assert "401 wrong key: Bearer [key]; is the key in $MY_KEY the right one?" in str(caught.value)


def test_a_key_belongs_into_a_variable_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    with pytest.raises(InputError, match=r"policy 'api': the environment variable NOT_SET \(api_key_env\) is not set"):
        engine("http://127.0.0.1:1/v1", api_key_env="NOT_SET")
    with pytest.raises(InputError, match=r"the key in \$MY_KEY stands in its settings too"):
        engine("http://127.0.0.1:1/v1", api_key_env="MY_KEY", extra_body={"key": "sk-secret-1"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"base_url": ""}, "engine 'openai' needs base_url"),
        ({"base_url": "localhost:8000"}, "base_url must begin with http"),
        ({"base_url": "https://me:pass@host/v1"}, "must hold no user, password or query"),
        ({"base_url": "https://host/v1?key=x"}, "must hold no user, password or query"),
        ({"adapter": "a"}, "does not take adapter"),
        ({"dtype": "bfloat16"}, "does not take dtype"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"extra_body": {"n": 3, "seed": 1}}, "extra_body must not hold n, seed"),
        ({"sampling": SamplingParams(num_beams=2)}, "a server searches no beams"),
        ({"template": "chaet"}, "did you mean 'chat'"),
    ],
)
def test_settings_that_no_server_can_follow(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OpenAIEngine(Policy(**{"name": "api", "engine": "openai", "base_url": "http://127.0.0.1:1/v1", **more}))


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    for name in ("openai", "openai_checks", "openai_client"):
        monkeypatch.delitem(sys.modules, f"rankalign.engines.{name}")
    with pytest.raises(InputError) as caught:
        ENGINES.load("openai")
    assert str(caught.value) == "engine 'openai' needs: pip install 'rankalign[judge]'"


# --- what servers do not take, ignore or report ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "sampling", "found"),
    [
        ("seed", SAMPLED, {}),
        ("max_tokens", GREEDY, {"max_completion_tokens": 40}),
        ("stop", GREEDY | {"stop": tuple("VWXYZ")}, {}),
        ("temperature", GREEDY | {"temperature": 1.0}, {}),
        ("top_p", GREEDY, {}),
    ],
)
def test_a_field_that_is_not_taken_is_said_otherwise(
    field: str, sampling: dict[str, Any], found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultServer(refuse=[field]) as server:
        made = engine(server, sampling)
        rows = made.generate(PROMPTS)
        good = [r.body for r in server.requests if field not in r.body]
        assert len(good) >= 6
        assert all(found.items() <= body.items() for body in good)
        before = len(server.requests)
        made.generate(PROMPTS[:1])
        assert len(server.requests) - before == made._copies  # learned once
    assert capsys.readouterr().err.count(f"policy 'api': the server does not take `{field}`") == 1
    assert ("request_seed" in rows[0][0].sampling) == (field != "seed")


def shape(**fields: Any) -> Any:
    """An answer function that replaces fields of the one choice."""
    message = {"content": "fine", **fields.pop("message", {})}
    return lambda request: {"choices": [{"message": message, "finish_reason": "stop", **fields}]}


IGNORED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"ignore": ["stop"], "answer": lambda r: "a b END c"},
        {"stop": ("END",)},
        "sends text behind stop strings, which is cut",
    ),
    ({"ignore": ["max_tokens"]}, {"max_new_tokens": 3}, "does not keep to max_tokens 3"),
    ({"ignore": ["usage"]}, {}, "reports no token usage"),
    ({"ignore": ["finish_reason"]}, {}, "does not say why answers end"),
    ({"answer": lambda r: {"model": "other"}}, {}, "answers as 'other', asked for 'm'"),
    ({"answer": lambda r: {"choices": [{"message": {"content": c}} for c in "ab"]}}, {}, "several answers where one"),
    ({"answer": lambda r: "same"}, SAMPLED, "all answers to a prompt are the same"),
    ({"answer": lambda r: os.urandom(4).hex()}, SAMPLED, "does not repeat an answer under the same seed"),
    ({}, SAMPLED | {"top_k": 5}, "seems to ignore `top_k`"),
    ({}, SAMPLED | {"min_p": 0.2}, "seems to ignore `min_p`"),
]


@pytest.mark.parametrize(("options", "sampling", "sentence"), IGNORED)
def test_what_a_server_ignores_is_noticed_once(
    options: dict[str, Any], sampling: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultServer(**options) as server:
        made = engine(server, GREEDY | sampling)
        made.generate(PROMPTS)
        made.generate(PROMPTS)
    assert [text for text in made.notes.counts if sentence in text]
    assert len(made.notes.counts) == 1 + ("several" in sentence)
    assert capsys.readouterr().err.count(sentence) == 1


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_good_server_gets_no_notes(sampling: dict[str, Any]) -> None:
    def obedient(request: dict[str, Any]) -> str:
        key = request["seed"] if request.get("top_k") != 1 and request["temperature"] else 0
        return f"{key} of {json.dumps(request['messages'])}"

    with FaultServer(obedient) as server:
        made = engine(server, sampling | {"top_k": 5, "stop": ("END",)})
        made.generate(PROMPTS)
    assert not made.notes.counts


def test_stop_strings_are_enforced_here_too() -> None:
    with FaultServer(shape(message={"content": " a b END c"}, finish_reason="length")) as server:
        response = one(server, GREEDY | {"stop": ("END",)})
    assert (response.text, response.finished) == ("a b", True)


@pytest.mark.parametrize(
    ("answer", "text", "finished", "meta"),
    [
        (lambda r: "one two three", "one two", False, {}),
        (lambda r: "one", "one", True, {}),
        (lambda r: "", "", True, {}),
        (shape(message={"content": None, "refusal": "I will not."}), "I will not.", True, {"refusal": True}),
        (shape(finish_reason="content_filter"), "fine", False, {"finish_reason": "content_filter"}),
        (shape(message={"content": None}, finish_reason="length"), "", False, {}),
        (shape(message={"reasoning_content": "Hm."}), "fine", True, {"reasoning": "Hm."}),
        (shape(finish_reason="tool_calls"), "fine", True, {"finish_reason": "tool_calls"}),
    ],
)
def test_how_answers_end(answer: Any, text: str, finished: bool, meta: dict[str, Any]) -> None:
    with FaultServer(answer) as server:
        response = one(server, GREEDY | {"max_new_tokens": 2})
    assert (response.text, response.finished, response.meta) == (text, finished, meta)


def test_a_prompt_that_a_filter_withholds_is_kept_and_marked() -> None:
    with FaultServer(script=["400-filter"]) as server:
        response = one(server)
    assert (response.text, response.finished, response.meta) == ("", False, {"finish_reason": "content_filter"})


@pytest.mark.parametrize("answer", [shape(message={"content": "\ud83d"}), shape(finish_reason="error")])
def test_replies_that_broke_off_are_asked_for_again(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "TRIES", 2)
    with (
        FaultServer(answer) as server,
        pytest.raises(InputError, match="no answer in 2 tries, the last one: the reply"),
    ):
        one(server)


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("message", "finish", "text", "reasoning"),
    [
        (
            {"content": [THOUGHT, {"type": "text", "text": "Bl"}, {"type": "text", "text": "ue."}]},
            "stop",
            "Blue.",
            "hm",
        ),
        ({"content": [{"type": "output_text", "text": "Red."}]}, "stop", "Red.", None),
        ({"content": None}, "stop", "finish_reason stop", None),
        (
            {"content": None, "reasoning_content": "Blue."},
            "stop",
            "5 characters of reasoning, finish_reason stop",
            None,
        ),
        ({"content": [THOUGHT]}, "stop", "its content is a list", None),
        ({"content": 3}, "stop", "its content is a int", None),
        ({"content": None, "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls", "it calls f, finish", None),
        ({}, "stop", "finish_reason stop", None),
        ({"content": "", "reasoning_content": "Blue."}, "stop", "5 characters of reasoning, finish_reason stop", None),
        ({"content": "", "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls", "it calls f, finish", None),
    ],
)
def test_a_whole_reply_is_read_or_fails_at_once(
    message: dict[str, Any], finish: str, text: str, reasoning: str | None
) -> None:
    reply = {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}]}
    with FaultServer(lambda r: reply) as server:
        if text.endswith("."):
            response = one(server)
            assert (response.text, response.meta.get("reasoning")) == (text, reasoning)
        else:
            with pytest.raises(InputError, match=f"prompt 'p0': the reply has no text: .*{text}"):
                one(server)
        assert len(server.requests) == 1


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_go_along_and_their_calls_are_an_answer() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    said = {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "Hm."}
    reply = {"choices": [{"index": 0, "message": said, "finish_reason": "tool_calls"}]}
    asked = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": None, "tool_calls": calls}]
    asked.append({"role": "tool", "tool_call_id": "c1", "content": "done"})
    meta = {"tools": json.dumps(TOOLS), "chat_template_kwargs": {"enable_thinking": False}, "source": "x"}
    with FaultServer(lambda r: reply) as server:
        ((response,),) = engine(server).generate([CandidateSet("p", asked, meta=meta)])
        body = server.requests[-1].body
    assert (body["messages"], body["tools"], body["chat_template_kwargs"]) == (asked, TOOLS, {"enable_thinking": False})
    assert "source" not in body
    assert (response.text, response.finished) == ("", True)
    assert response.messages == [
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": calls}
    ]


def test_the_bill(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"usage": {"prompt_tokens": 1000, "completion_tokens": 20}}
    with FaultServer(lambda r: answer, script=["500"]) as server:
        made = engine(server, prompt_price=0.5, completion_price=2.0)
        rows = made.generate(PROMPTS)
        assert rows[0][0].sampling["usage"] == answer["usage"]
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (6000, 120)
        assert made.usage.cost == pytest.approx(6000 * 0.5e-6 + 120 * 2e-6)
        capsys.readouterr()
        del made  # as a run does when it ends
    line = "policy 'api': 6 requests, 1 retries, 6,000 prompt + 120 completion tokens, cost 0.0032\n"
    assert capsys.readouterr().err == line
