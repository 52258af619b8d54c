"""What `rankalign push` sends to a hub (here a loopback stub of its API), and what never leaves."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankalign.cli import main
from rankalign.errors import InputError
from rankalign.recipes import push
from rankalign.storage.jsonl import write_rows


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits, as the hub's API does where every file is small."""

    repos: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str]]
    private: dict[str, bool]

    def do_GET(self) -> None:
        self.asked.append(("GET", self.path))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.answer(200 if known else 401, {"name": "me", "type": "user"} if known else {"error": "who are you?"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(("POST", self.path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told.get('organization') or 'me'}/{told['name']}"
            self.repos.setdefault(name, {})
            self.private[name] = told.get("visibility") == "private"
            self.answer(200, {"url": f"{self.address()}/{name}"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.address()}/{name}/commit/abc", "commitOid": "abc", "success": True})
        else:
            self.answer(200, {})

    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    def answer(self, code: int, content: dict[str, Any]) -> None:
        told = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None: ...


TOKEN = "hf_" + "x" * 30


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.repos, Hub.asked, Hub.private = {}, [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()


def pairs(folder: Path) -> str:
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No {i}"} for i in range(8)]
    write_rows(folder / "pairs.jsonl", rows)
    return str(folder / "pairs.jsonl")


def test_a_run_pushes_its_weights_and_card_and_nothing_else(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "aligned"
    measure = ["--eval_split", "0.3", "--eval_strategy", "steps", "--eval_steps", "1"]
    train = ["train", "--model", "tiny", "--loss", "dpo", "--data", pairs(tmp_path), "--max_steps", "1", *measure]
    more = ["--push_to_hub", "True", "--hub_model_id", "me/aligned", "--hub_private_repo", "True"]
    assert main([*train, "--output_dir", str(output), *more, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["pushed"].endswith("/me/aligned/commit/abc")
    sent = hub.repos["me/aligned"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= sent.keys()
    assert hub.private == {"me/aligned": True}
    for name, content in sent.items():
        assert content == (output / name).read_bytes(), name
    here = {path.name for path in output.iterdir()}
    assert {"log.jsonl", "ledger.jsonl", "manifest.json", "training_args.bin", "checkpoint-1"} <= here - sent.keys()
    assert "not pushed: checkpoint-1, " in said.err
    assert not any(str(tmp_path).encode() in content for content in sent.values())

    head = yaml.safe_load(sent["README.md"].decode().split("---\n")[1])
    (result,) = head["model-index"][0]["results"][:1]
    measured = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()][-2]
    told = {m["type"]: m["value"] for r in head["model-index"][0]["results"] for m in r["metrics"]}
    assert told == {name: measured[f"eval_{name}"] for name in told}
    assert {"ranking_accuracy", "loss", "margin"} <= told.keys()
    assert result["dataset"]["name"] == "held-out part of pairs.jsonl"
    assert main([*train, "--output_dir", str(output), *more]) == 0  # finished already: pushed again, trained not
    assert "finished already" in capsys.readouterr().err


def test_before_a_run_begins_the_door_is_tried(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--model", "tiny", "--data", pairs(tmp_path), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main([*train, "--push_to_hub", "True"]) == 1
    error = capsys.readouterr().err
    assert "the hub refused" in error
    assert "hf auth login" in error
    assert "hf_wrong" not in error
    assert not (tmp_path / "out").exists()
    assert main([*train, "--push_to_hub", "True", "--hub_model_id", "a/b/c"]) == 1
    assert "a/b/c: cannot be the name of a repository" in capsys.readouterr().err
    assert main([*train, "--hub_model_id", "a/b"]) == 1
    assert "do nothing without --push_to_hub" in capsys.readouterr().err


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir()
    for name in ("model.safetensors", "config.json", *files):
        (path / name.replace("__", ".")).write_text(files.get(name, "{}"))
    return path


def test_what_may_go(tmp_path: Path) -> None:
    stays = ("journal__jsonl", "scored__jsonl", "optimizer__pt", "pytorch_model__bin", "env", "manifest__json")
    folder = folder_of(tmp_path / "m", **dict.fromkeys(stays, "x"), tokenizer__json="{}")
    os.symlink("/etc/passwd", folder / "README.md")  # a link may name anything
    files, left = push.chosen(folder)
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert left == sorted(["README.md", *(name.replace("__", ".") for name in stays)])


def test_what_is_refused(hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no such folder"):
        push.chosen(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no weights"):
        push.chosen(tmp_path / "empty")
    begun = folder_of(tmp_path / "begun")
    (begun / "checkpoint-3").mkdir()
    with pytest.raises(InputError, match="is not finished"):
        push.chosen(begun)
    leaky = folder_of(tmp_path / "leaky", README__md=f"login with {TOKEN}")
    assert main(["push", str(leaky), "me/leaky"]) == 1
    said = capsys.readouterr().err
    assert "what looks like a secret key" in said
    assert TOKEN not in said
    assert hub.asked == []
    assert main(["push", str(folder_of(tmp_path / "fine")), "me/fine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["repo"], told["files"], told["bytes"]) == ("me/fine", ["config.json", "model.safetensors"], 4)
    assert hub.private == {"me/fine": False}
