"""Engine ``openai`` against a server that fails on purpose, limits rates, refuses, or answers late."""

from __future__ import annotations

import email.utils
import itertools
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rankalign.config import SampleConfig, build
from rankalign.data.records import CandidateSet, read, write
from rankalign.engines import openai_client
from rankalign.engines.openai_client import _delay, wait_asked
from rankalign.errors import InputError
from rankalign.stages.generation import sample
from rankalign.storage import manifest
from tests.faults.openai_helpers import GREEDY, PROMPTS, SAMPLED, ask, engine, fetch, free_port, hurry, wait_for
from tests.faults.server import FAULTS, FaultServer, Request, words

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_that_may_pass_is_tried_again(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "timeout":
        monkeypatch.setattr(openai_client, "TIMEOUT_S", 1.5)
    with FaultServer() as clean:
        expected = ask(clean)
    with FaultServer(script=[fault, None, fault], stall=4) as server:
        made = engine(server)
        assert made.generate(PROMPTS) == expected
        assert made._client.retries == 2 or fault == "timeout"  # a busy machine may make more of those
        assert len(server.requests) == 6 + made._client.retries >= 8
    assert made.usage.requests == 6


def test_seeded_faults_of_all_kinds_change_nothing() -> None:
    with FaultServer() as clean:
        expected = ask(clean, SAMPLED)
    for seed in (1, 2):
        with FaultServer(faults=0.5, seed=seed, stall=0.05) as server:
            assert ask(server, SAMPLED) == expected
            assert sum(r.fault is not None for r in server.requests) > 4


def test_drawn_faults_do_not_depend_on_the_order_of_arrival() -> None:
    met = []
    for order in (range(40), random.Random(0).sample(range(40), 40)):
        server = FaultServer(faults=0.5, seed=3)
        met.append({i: [server.arrive("/v1/x", {"i": i}, {}) for _ in range(4)] for i in order})
    assert met[0] == met[1]
    assert all(None in tries for tries in met[0].values())
    assert 40 < sum(fault is not None for tries in met[0].values() for fault in tries) < 100


def test_a_prompt_that_keeps_failing_ends_the_run_and_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_client, "TRIES", 3)
    write(tmp_path / "prompts.jsonl", [CandidateSet(f"p{i}", f"Say {i}") for i in range(9)])

    def config(server: FaultServer, name: str, **more: Any) -> SampleConfig:
        entry = {"name": "api", "engine": "openai", "model": "m", "base_url": server.url, "temperature": 0, **more}
        files = {"prompts": str(tmp_path / "prompts.jsonl"), "output": str(tmp_path / name)}
        return build(SampleConfig, {**files, "policies": [{"concurrency": 1, **entry}]}, "test")

    with FaultServer(script=[None] * 5 + ["500"] * 3) as server:
        with pytest.raises(InputError) as caught:
            sample(config(server, "out.jsonl"))
        assert str(caught.value).startswith(
            "policy 'api': prompt 'p5': no answer in 3 tries, the last one: 500 on purpose"
        )
        assert "5 answers are safe in the journal" in str(caught.value)
        assert not (tmp_path / "out.jsonl").exists()
        asked = len(server.requests)
        sample(config(server, "out.jsonl", concurrency=2, prompt_price=1.0))
        assert len(server.requests) == asked + 4  # 5 of 9 were there already
        sample(config(server, "whole.jsonl"))
        counts = manifest.read(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [len(record.responses) for record in read(tmp_path / "out.jsonl")] == [1] * 9
    assert counts
    assert not {"api_key_env", "concurrency", "prompt_price"} & counts["settings"]["policies"][0].keys()


def test_a_rate_limit_holds_back_all_requests() -> None:
    def answer(request: Request) -> str:
        time.sleep(0.1)  # behind the refusal, or the third request would be under way before the limit is known
        return words(request)

    with FaultServer(answer, script=["429"], retry_after=0.3) as server:
        engine(server, concurrency=2).generate(PROMPTS[:4])
        times = [r.time for r in server.requests]
    assert len(times) == 5
    assert min(times[2:]) - times[0] >= 0.3  # the second was in flight already


def test_a_limit_that_is_used_up_is_waited_for_before_it_is_met() -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "120ms"}
    with FaultServer(headers=headers) as server:
        engine(server, concurrency=1).generate(PROMPTS[:3])
        times = [r.time for r in server.requests]
    assert all(b - a >= 0.11 for a, b in itertools.pairwise(times))


@pytest.mark.parametrize(
    ("headers", "limited", "seconds"),
    [
        ({}, True, None),
        ({"retry-after": "7"}, False, 7.0),
        ({"retry-after": "0"}, True, 0.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, True, 0.25),
        ({"retry-after": email.utils.formatdate(time.time() - 60, usegmt=True)}, True, 0.0),
        ({"retry-after": "soon"}, True, None),
        ({"x-ratelimit-reset-requests": "1m30.5s"}, True, 90.5),
        ({"x-ratelimit-reset-requests": "1m30.5s"}, False, None),
        ({"x-ratelimit-reset-requests": "20ms", "x-ratelimit-reset-tokens": "1h2s"}, True, 3602.0),
        (
            {
                "x-ratelimit-reset-requests": "20ms",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "9",
            },
            True,
            0.02,
        ),
        ({"x-ratelimit-reset": "12", "x-ratelimit-remaining": "0"}, False, 12.0),
        ({"x-ratelimit-reset": "whenever"}, True, None),
    ],
)
def test_headers_that_ask_for_a_wait(headers: dict[str, str], limited: bool, seconds: float | None) -> None:
    assert wait_asked(headers, limited) == (None if seconds is None else pytest.approx(seconds))


def test_dates_and_points_in_time() -> None:
    then = time.time() + 50
    assert wait_asked({"retry-after": email.utils.formatdate(then, usegmt=True)}, True) == pytest.approx(50, abs=2)
    assert wait_asked({"x-ratelimit-reset": str(int(then))}, True) == pytest.approx(50, abs=2)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"script": ["400"]}, {}, "the server refuses: 400 on purpose: 400"),
        ({"script": ["429-quota"]}, {}, "the server refuses: 429 pay first"),
        ({"script": ["429"], "retry_after": 4000}, {}, "the server asks for a wait of 4000 s: 429 on purpose"),
        ({}, {"model": "missing"}, "the server refuses: 404 no such model; its models: one, two"),
        (
            {"key": "k"},
            {},
            "the server refuses: 401 wrong key: None; name the environment variable that holds the key with api_key_",
        ),
        ({"refuse": ["top_k"]}, {}, "the server refuses: 422 Unexpected fields in the request: ['top_k']"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(options: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with FaultServer(**options) as server:
        made = engine(server, GREEDY | {"top_k": 3}, **more)
        with pytest.raises(InputError) as caught:
            made.generate(PROMPTS[:1])
        assert len(server.requests) == 1
    assert f"policy 'api': prompt 'p0': {message}" in str(caught.value)
    assert "0 answers" in str(caught.value)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "TRIES", 2)
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(InputError, match=f"{url} cannot be reached in 2 tries, .*: connection lost .*base_url"):
        engine(url).generate(PROMPTS[:2])
    monkeypatch.setattr(openai_client, "TRIES", 10)
    waits: list[float] = []
    monkeypatch.setattr(openai_client, "_delay", lambda tries: waits.append(_delay(tries)) or 0)
    with pytest.raises(InputError, match=f"{url} cannot be reached in 4 tries"):
        engine(url, concurrency=1).generate(PROMPTS[:2])
    monkeypatch.undo()
    assert sum(openai_client.FIRST_DELAY_S * 2**k for k in range(len(waits))) <= 10  # the longest that it may take


def test_a_server_that_was_there_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "TRIES", 6)
    made = engine(f"http://127.0.0.1:{free_port()}/v1")
    made._client._reached = True
    with pytest.raises(InputError, match="no answer in 6 tries"):
        made.generate(PROMPTS[:1])


INTERRUPTED = """
import os, signal, threading, time
from rankalign.engines import Policy
from rankalign.engines.openai import OpenAIEngine
from rankalign.data.records import CandidateSet
from tests.faults.server import FaultServer
with FaultServer(delay=60) as server:
    engine = OpenAIEngine(Policy("a", "openai", model="m", base_url=server.url))
    def interrupt():
        while server.in_flight < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    try:
        engine.generate([CandidateSet("p", "x"), CandidateSet("q", "y")])
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_an_interrupt_does_not_wait_for_answers() -> None:
    found = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (found.stdout, found.stderr, found.returncode) == ("interrupted\n", "", 0)


def test_the_fault_server_as_a_process(tmp_path: Path) -> None:
    port = tmp_path / "port"
    command = [sys.executable, "-m", "tests.faults.server", "--port-file", str(port), "--seed", "4", "--faults", "0.4"]
    process = subprocess.Popen([*command, "--stall", "0.02"], cwd=ROOT)
    try:
        wait_for(port.exists, process, 200)
        url = f"http://127.0.0.1:{port.read_text()}"
        rows = engine(f"{url}/v1", SAMPLED).generate(PROMPTS)
        faults = [fault for _, _, fault in fetch(f"{url}/requests")["requests"] if fault]
    finally:
        process.kill()
        process.wait()
    with FaultServer() as clean:
        assert rows == ask(clean, SAMPLED)
    assert faults
