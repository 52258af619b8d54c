"""Heads here on states from a server: rewards of plain transformers, what is sent, hostile replies, identity."""

from __future__ import annotations

import base64
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from rankalign.config import ScoreConfig, build
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.engines import openai_client
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.recipes.rollouts import reward_of
from rankalign.scorers.reward_model import RewardModelScorer
from rankalign.scorers.reward_server import RewardServerScorer
from rankalign.stages.generation import score
from rankalign.training.arguments import parse_settings
from tests.faults.openai_helpers import hurry
from tests.faults.server import FaultServer
from tests.unit.models.made_heads import (
    CASES,
    SETS,
    beside,
    conversations,
    gated_by_hand,
    grm_by_hand,
    save_gated,
    save_grm,
)

Reply = dict[str, Any]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def packed(states: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(states.astype("<f4").tobytes()).decode()


def trunk_reply(trunk: Any, body: Reply, as_lists: bool = False) -> Reply:
    """What vLLM answers for a trunk under each task."""
    entries = []
    for index, ids in enumerate(body["input"]):
        with torch.no_grad():
            states = trunk(torch.tensor([ids])).last_hidden_state[0].numpy()
        states = states[-1] if body["task"] == "embed" else states
        entries.append({"index": index, "data": states.tolist() if as_lists else packed(states)})
    return {"data": entries[::-1], "usage": {"prompt_tokens": sum(map(len, body["input"]))}}


@contextmanager
def served(folder: Path, change: Callable[[Reply], Reply] = lambda reply: reply, **more: Any) -> Iterator[FaultServer]:
    trunk = AutoModel.from_pretrained(beside(folder)).eval()
    lists = more.pop("as_lists", False)
    with FaultServer(lambda body: change(trunk_reply(trunk, body, lists)), paths=("/pooling",), **more) as server:
        yield server


def scorer(server: FaultServer, folder: Path, **more: Any) -> RewardServerScorer:
    return RewardServerScorer("rm", f"http://127.0.0.1:{server.port}/pooling", head=str(folder), **more)


def flat(rows: list[list[float | None]]) -> list[float | None]:
    return [value for row in rows for value in row]


@pytest.fixture
def armo(tmp_path: Path) -> Path:
    save_gated(tmp_path / "rm", "ArmoRM")
    return tmp_path / "rm"


@pytest.mark.parametrize("form", ["token_embed", "embed"])
@pytest.mark.parametrize("case", [*CASES, "GRM"])
def test_rewards_are_those_of_plain_transformers(tmp_path: Path, case: str, form: str) -> None:
    folder = tmp_path / "rm"
    if case == "GRM":
        save_grm(folder, 2)
        expected, each = grm_by_hand(folder, 2, torch.float32), None
    else:
        save_gated(folder, case)
        expected, each = gated_by_hand(folder, case, torch.float32)
    with served(folder) as server:
        found = flat(scorer(server, folder, form=form, model="trunk").score(SETS))
        assert found == pytest.approx(expected, abs=1e-6)
        assert len({round(score, 4) for score in expected}) == 4
        if each is not None:
            one = scorer(server, folder, form=form, axis="1:2,0:-1").score(SETS)
            wanted = [float(2 * row[1] - row[0]) for row in each]
            assert flat(one) == pytest.approx(wanted, abs=1e-6)
    ids = [text for text, _ in conversations(folder)]
    bodies = [request.body for request in server.requests][:4]
    assert sorted(body["input"][0] for body in bodies) == sorted(ids)  # ours to the token, forged marks as plain text
    assert {len(body["input"]) for body in bodies} == {2 if form == "embed" and each is not None else 1}
    sent = {"model": "trunk", "task": form, "use_activation": False, "encoding_format": "base64"}
    sent |= {"embed_dtype": "float32", "endianness": "little", "add_special_tokens": False}
    assert all({key: value for key, value in body.items() if key != "input"} == sent for body in bodies)


def test_a_linear_head_reads_where_kind_reward_model_does(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Name a city."}]
    sets = [CandidateSet("a", talk, [Response("Paris.", "m"), Response("Par", "m", finished=False), Response("", "m")])]
    folder = tmp_path / "rm"
    shutil.copytree(models.resolve("tiny-rm"), folder)
    AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(beside(folder))
    for pooling in ("", "last", "first_eos"):
        with served(folder) as server:
            found = flat(scorer(server, folder, form="embed", pooling=pooling).score(sets))
        wanted = flat(RewardModelScorer("rm", str(folder), pooling=pooling, dtype="float32").score(sets))
        assert found == pytest.approx(wanted, abs=1e-6)
        assert len({round(score, 4) for score in wanted if score is not None}) == 3
    with served(folder) as server, pytest.raises(InputError, match="takes the mean over all tokens"):
        scorer(server, folder, pooling="mean")


def test_lists_of_numbers_do_as_well(armo: Path) -> None:
    for form in ("token_embed", "embed"):
        with served(armo) as server, served(armo, as_lists=True) as other:
            first = scorer(server, armo, form=form).score(SETS)
            assert scorer(other, armo, form=form).score(SETS) == first


def first_entry(change: Callable[[np.ndarray[Any, Any]], Any], reply: Reply) -> Reply:
    """A reply whose first text has other states, (T, 32) or (1, 32)."""
    entry = reply["data"][-1]
    states = np.frombuffer(base64.b64decode(entry["data"]), "<f4").reshape(-1, 32)
    found = change(states)
    entry["data"] = packed(found) if isinstance(found, np.ndarray) else found
    return reply


def units(states: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return states / np.linalg.norm(states, axis=1, keepdims=True)


def holed(value: float) -> Callable[[np.ndarray[Any, Any]], Any]:
    def hole(states: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found = states.copy()
        found[0, 3] = value
        return found

    return hole


HOSTILE: dict[str, tuple[Callable[[np.ndarray[Any, Any]], Any] | Reply, str]] = {
    "a token fewer": (lambda s: s[1:] if len(s) > 1 else s[:, :31], "numbers for .* tokens, .* and the head reads 32"),
    "a token more": (lambda s: np.concatenate([s, s[:1]]), "numbers for .* tokens, .* and the head reads 32"),
    "another hidden size": (lambda s: np.repeat(s, 2, axis=1), "64 each, and the head reads 32: does the server hold"),
    "normalised": (units, r"vectors of length 1: it normalises .*--pooler-config"),
    "NaN": (holed(math.nan), "states are not finite"),
    "infinite": (holed(-math.inf), "states are not finite"),
    "no base64": (lambda _: "no base64!", "no float32 numbers in base64"),
    "half a number": (lambda _: "AAAA", "no float32 numbers in base64"),
    "empty": (lambda _: "", "0 numbers for"),
    "nothing": (lambda _: None, "nor lists of finite numbers"),
    "a word": (lambda _: [["0.5"]], "nor lists of finite numbers"),
    "ragged": (lambda s: [row.tolist()[: 31 + n % 2] for n, row in enumerate(s)] or s, "of different sizes|reads 32"),
    "deep": (lambda s: [[[float(x)] for x in row] for row in s], "nor lists of finite numbers"),
    "half deep": (lambda _: [[0.5, [0.5]]], "nor lists of finite numbers"),
    "other tokens": ({"usage": {"prompt_tokens": 3}}, "server read 3 tokens where"),
    "no list": ({"data": {"a": 1}}, "no list data"),
    "no entries": ({"data": []}, "0 entries for"),
    "wrong index": ({"data": [{"index": 7, "data": ""}]}, r"1 entries for . texts, numbered \[7\]"),
    "strange index": ({"data": [{"index": [0], "data": ""}]}, r"numbered \[\]"),
    "an error": ({"data": None, "error": {"message": "busy"}}, "no answer in 2 tries, .*busy"),
}


@pytest.mark.parametrize("form", ["token_embed", "embed"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_gives_no_score(armo: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    monkeypatch.setattr(openai_client, "TRIES", 2)
    how, message = HOSTILE[name]

    def change(reply: Reply) -> Reply:
        if isinstance(how, dict):
            return reply | how
        for _ in reply["data"]:  # each of its texts
            reply["data"] = [reply["data"][-1], *reply["data"][:-1]]
            reply = first_entry(how, reply)
        return reply

    with served(armo, change) as server, pytest.raises(InputError, match=f"(?s)scorer 'rm': .*{message}"):
        scorer(server, armo, form=form).score(SETS[:1])


def test_it_waits_and_asks_again(armo: Path) -> None:
    script = ["429", "500", "reset", "garbage", "truncated"]
    with served(armo, script=script) as server:
        found = scorer(server, armo, concurrency=1).score(SETS)
    assert flat(found) == pytest.approx(gated_by_hand(armo, "ArmoRM", torch.float32)[0], abs=1e-6)
    assert len(server.requests) == 4 + len(script)


def test_a_run_keeps_outputs_and_knows_the_head(armo: Path, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", SETS)

    def run(server: FaultServer, output: str, **more: Any) -> list[float | None]:
        url = f"http://127.0.0.1:{server.port}/pooling"
        one = {"name": "rm", "kind": "reward_server", "url": url, "head": str(armo), **more}
        files = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / output)}
        score(build(ScoreConfig, {**files, "scorers": [one]}, "test"))
        return [r.scores["rm"] for record in read(tmp_path / output) for r in record.responses]

    with served(armo) as server:
        first = run(server, "out.jsonl")
        assert run(server, "out.jsonl") == first
        assert len(server.requests) == 4
        before = scorer(server, armo).fingerprint()
        tensors = load_file(armo / "model.safetensors")
        head = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}
        save_file(head, armo / "model.safetensors")  # the trunk is not needed, and no part of the head's identity
        assert scorer(server, armo).fingerprint() == before
        assert flat(scorer(server, armo).score(SETS)) == first
        save_file(head | {"gating.logit_scale": torch.tensor([3.4])}, armo / "model.safetensors")
        assert scorer(server, armo).fingerprint()["head"]["weights"] != before["head"]["weights"]
        with pytest.raises(InputError, match=r"made with other settings \(scorers\[0\]\.head\.weights"):
            run(server, "out.jsonl")
        assert run(server, "other.jsonl") == pytest.approx([2 * value for value in first if value is not None])
        told = json.loads((armo / "config.json").read_text()) | {"gating_temperature": 3}
        (armo / "config.json").write_text(json.dumps(told))
        assert scorer(server, armo).fingerprint()["head"]["config"] != before["head"]["config"]
        assert scorer(server, armo, axis=0).fingerprint()["head"]["objectives"] is True


def test_a_served_head_is_the_reward_of_ppo(armo: Path, tmp_path: Path) -> None:
    fixed = {"method": "ppo", "model": "tiny", "data": str(tmp_path), "use_cpu": True, "output_dir": str(tmp_path)}
    one = [CandidateSet(s.id, s.prompt, s.responses[:1]) for s in SETS]
    with served(armo) as server:
        options = json.dumps({"head": str(armo), "form": "embed"})
        told = {**fixed, "reward": f"http://127.0.0.1:{server.port}/pooling", "reward_options": options}
        config: Any = parse_settings(told)
        assert reward_of(config)(one) == pytest.approx(gated_by_hand(armo, "ArmoRM", torch.float32)[0][::2], abs=1e-6)


def test_refusals_name_what_is_wrong(armo: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/pooling"
    make = functools.partial(RewardServerScorer, "rm")
    for options, message in (
        ({"head": str(armo), "form": "classify"}, "form 'classify' reads rewards; a head takes token_embed or embed"),
        ({"form": "embed"}, "form 'embed' needs head, a folder"),
        ({"pooling": "last"}, "pooling: is a head's"),
        ({"head": str(armo), "pooling": "last"}, "takes no pooling"),
        ({"head": str(armo), "tokens": "last"}, "a head makes one score"),
        ({"head": str(armo), "value": "data.0"}, "value: form 'token_embed' has states"),
        ({"head": str(armo), "body": {"x": "{text}"}}, "body: form 'token_embed' has its own"),
        ({"head": str(armo), "axis": "safe"}, "no output safe; they are helpsteer-helpfulness, "),
        ({"head": str(armo), "axis": "19"}, "no output 19; they are "),
        ({"head": "some/model"}, "head: some/model is no folder; download"),
        ({"head": "tiny"}, "holds no head that reads states"),
    ):
        with pytest.raises(InputError, match=f"scorer 'rm': .*{message}"):
            make(**{"url": url, **options})
    with pytest.raises(InputError, match=r"record 'a': .*assistant's turn begins"):
        make(url=url, head=str(armo), template="raw").score(SETS)
    short = {"gating.layers.0.weight": torch.zeros(24, 31)}
    save_file(load_file(armo / "model.safetensors") | short, armo / "model.safetensors")
    with pytest.raises(InputError, match="is no ArmoRM as published"):
        make(url=url, head=str(armo))
