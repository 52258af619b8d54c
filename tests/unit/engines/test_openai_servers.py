"""Engine ``openai`` against a real server, ``transformers serve``, on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankalign.engines import Policy, SamplingParams
from rankalign.engines.hf import HFEngine
from rankalign.engines.openai import OpenAIEngine
from rankalign.errors import InputError
from rankalign.models import load as models
from tests.faults.openai_helpers import PROMPTS, engine, fetch, free_port, wait_for


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """``transformers serve`` with the tiny model: its URL and the model's name."""
    model, port = models.resolve("tiny"), free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    quiet: dict[str, Any] = {
        "stdout": subprocess.DEVNULL,
        "stderr": (tmp_path_factory.mktemp("serve") / "log").open("wb"),
    }
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, **quiet)

    def ready() -> bool:
        try:
            return bool(fetch(f"http://127.0.0.1:{port}/health"))
        except OSError:
            return False

    try:
        wait_for(ready, process, 300)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("template", ["chat", "raw"])
def test_transformers_serve_answers_as_engine_hf(transformers_serve: tuple[str, str], template: str) -> None:
    url, model = transformers_serve
    more: dict[str, Any] = {"template": template, "sampling": SamplingParams(temperature=0, max_new_tokens=12)}
    made = OpenAIEngine(Policy("api", "openai", model=model, base_url=url, concurrency=2, **more))
    rows = made.generate(PROMPTS[:3])
    expected = HFEngine(Policy("api", model="tiny", **more)).generate(PROMPTS[:3])
    assert [[(r.text, r.finished) for r in row] for row in rows] == [
        [(r.text, r.finished) for r in row] for row in expected
    ]
    assert made.usage.completion_tokens == 36
    assert not made.notes.counts


def test_what_transformers_serve_ignores_is_noticed(transformers_serve: tuple[str, str]) -> None:
    url, model = transformers_serve
    settings: dict[str, Any] = {"n": 2, "temperature": 1.0, "max_new_tokens": 8}
    greedy = engine(url, settings, model=model, concurrency=1)
    greedy.generate(PROMPTS)
    assert list(greedy.notes.counts) == [
        "all answers to a prompt are the same: the server seems to ignore temperature or seed"
    ]
    draws = {"generation_config": json.dumps({"do_sample": True})}
    rows = [engine(url, settings, model=model, concurrency=1, extra_body=draws).generate(PROMPTS[:2]) for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0][0][0].text != rows[0][0][1].text
    with pytest.raises(InputError, match=r"422 Unexpected fields in the request: \{'top_k'\}"):
        engine(url, settings | {"top_k": 5}, model=model).generate(PROMPTS[:1])
