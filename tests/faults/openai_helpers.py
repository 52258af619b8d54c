"""What the tests of engine ``openai`` share."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from typing import Any

import pytest

from rankalign.data.records import CandidateSet, Response
from rankalign.engines import Policy, SamplingParams, openai_client
from rankalign.engines.openai import OpenAIEngine
from tests.faults.server import FaultServer

PROMPTS = [CandidateSet(f"p{i}", f"Say {i}") for i in range(6)]
SAMPLED: dict[str, Any] = {"n": 2, "temperature": 0.7, "max_new_tokens": 40, "seed": 5}
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40}


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, and keys in the environment that nobody named."""
    monkeypatch.setattr(openai_client, "FIRST_DELAY_S", 0.002)
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.setenv(name, "Authorization: sk-not-for-this-server")


def engine(server: FaultServer | str, sampling: dict[str, Any] | None = None, **more: Any) -> OpenAIEngine:
    """An engine that asks ``server`` or the one at that URL; greedy unless told otherwise."""
    url = server if isinstance(server, str) else server.url
    settings: dict[str, Any] = {"model": "m", "base_url": url, **more}
    return OpenAIEngine(Policy("api", "openai", sampling=SamplingParams(**(sampling or GREEDY)), **settings))


def ask(server: FaultServer, sampling: dict[str, Any] | None = None, **more: Any) -> list[list[Response]]:
    """The answers to all prompts."""
    return engine(server, sampling, **more).generate(PROMPTS)


def one(server: FaultServer, sampling: dict[str, Any] | None = None, **more: Any) -> Response:
    """The only answer to the first prompt."""
    ((response,),) = engine(server, sampling, **more).generate(PROMPTS[:1])
    return response


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(url: str) -> Any:
    """JSON behind a URL."""
    with urllib.request.urlopen(url, timeout=5) as reply:
        return json.load(reply)


def wait_for(ready: Any, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until ``ready()`` holds, as long as the process lives."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server is not ready"
        time.sleep(0.05)
