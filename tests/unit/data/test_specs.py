"""Data sets by name, split, number and weight; hub ids against a stand-in for the hub that lives in this process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from rankalign.data.load import load
from rankalign.data.specs import Part, held_out, located, parse
from rankalign.errors import InputError
from rankalign.storage.jsonl import write_rows


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"id": f"{name}{i}", "prompt": f"{name} {i}?", "chosen": "yes", "rejected": "no"} for i in range(count)]


def ids(path: str) -> list[str]:
    return [record.id for record in load(path)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("org/name", [Part("org/name")]),
        ("org/name:train_prefs#500", [Part("org/name", "train_prefs", 500)]),
        ("a.jsonl*2, b.jsonl*0.5", [Part("a.jsonl", "", 0, 2.0), Part("b.jsonl", "", 0, 0.5)]),
        ("s3://bucket/x.jsonl#3", [Part("s3://bucket/x.jsonl", "", 3)]),
    ],
)
def test_specifications(text: str, told: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankalign.data.specs.is_there", lambda path: False)
    assert parse(text) == told


def test_parts_weights_and_names_with_marks(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows("a", 30))
    write_rows(tmp_path / "b#2.jsonl", rows("b", 10))
    cache, a, b = tmp_path / "cache", str(tmp_path / "a.jsonl"), str(tmp_path / "b#2.jsonl")
    assert located(a, cache) == a  # a plain path is itself, and nothing is written
    assert located(b, cache) == b
    assert not cache.exists()
    few, more = (ids(located(f"{a}#{count}", cache)) for count in (5, 12))
    assert (len(few), len(more), set(few) < set(more)) == (5, 12, True)
    mixed = ids(located(f"{a}*2,{b}*1", cache))
    assert (sum(i[0] == "a" for i in mixed), sum(i[0] == "b" for i in mixed)) == (20, 10)
    assert sorted(ids(located(f"{a},{b}#4", cache))) == sorted(ids(a) + ids(located(f"{b}#4", cache)))
    before = located(f"{a}#5", cache)
    write_rows(tmp_path / "a.jsonl", rows("c", 30))
    assert located(f"{a}#5", cache) != before  # other bytes under the same name
    train, test = held_out(a, 0.2, cache)
    assert sorted(ids(train) + ids(test)) == sorted(ids(a))
    assert 1 <= len(ids(test)) <= 12


def test_a_format_in_a_file_counts_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows("a.jsonl", [{"q": f"{i}?", "a": "yes"} for i in range(4)])
    code = """
from rankalign import CandidateSet, Response
def read(row):
    return CandidateSet("", row["q"], [Response(row["a"] + "{end}")])
"""
    found = []
    for end in ("!", "?"):
        Path("own.py").write_text(code.replace("{end}", end))
        path = located("a.jsonl#2", tmp_path / "cache", from_format="own.py:read")
        found.append([record.responses[0].text for record in load(path)])
    assert found == [["yes!"] * 2, ["yes?"] * 2]


def test_splits_of_folders(tmp_path: Path) -> None:
    every = {"train": rows("t", 6), "test": rows("e", 2)}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(found) for name, found in every.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    for name in ("train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "train_sft-00000-of-00001"):
        datasets.Dataset.from_list(rows(name[6], 3)).to_parquet(str(tmp_path / "hub" / "data" / f"{name}.parquet"))
    cache = tmp_path / "cache"
    assert len(ids(located(f"{tmp_path}/saved:train", cache))) == 6
    assert len(ids(located(f"{tmp_path}/hub:train_prefs", cache))) == 6
    assert len(ids(located(f"{tmp_path}/hub:train_sft", cache))) == 3
    with pytest.raises(InputError, match="has no split 'train'; it has data, train_prefs, train_sft"):
        located(f"{tmp_path}/hub:train", cache)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nofile.jsonl", "nofile.jsonl: no such file"),
        ("runs/nothing", "no such file here, and the hub does not give it"),
        ("a.jsonl,,b.jsonl", "missing between two commas"),
        ("a.jsonl#0", "takes no record"),
    ],
)
def test_what_is_not_there(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        located(text, tmp_path)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as fetching a data set takes."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    commit = "a" * 40

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/api/datasets/org/prefs/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in self.files.items()
            ]
            self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/api/datasets/org/prefs"):
            listed = [{"rfilename": name, "size": len(body), "type": "file"} for name, body in self.files.items()]
            told = {"id": "org/prefs", "sha": self.commit, "siblings": listed, "private": False}
            self.answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        elif (name := self.path.rpartition(f"{self.commit}/")[2]) in self.files:
            body = self.files[name]
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.answer(200, body, {"ETag": etag, "X-Repo-Commit": self.commit})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_a_hub_id_is_fetched_once_and_its_data_alone(tmp_path: Path) -> None:
    lines = {name: "".join(json.dumps(row) + "\n" for row in rows(name, 5)).encode() for name in ("train", "test")}
    Hub.files = {"README.md": b"# card", "loader.py": b"raise SystemExit('ran')", "train.jsonl": lines["train"],
                 "test.jsonl": lines["test"]}  # fmt: skip
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The hub's address is read when its library is imported, so each look is a process of its own.
    code = (
        "import sys; from pathlib import Path; from rankalign.data.specs import located; "
        "from rankalign.data.load import load; "
        "print([record.id for record in load(located(sys.argv[1], Path('cache')))])"
    )
    address = f"http://127.0.0.1:{server.server_port}"
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env = {**clean, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[3]), env.get("PYTHONPATH", "")])

    def look(text: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, text]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    try:
        first = look("org/prefs")  # no split is named: train
        assert first.stdout.strip() == str([f"train{i}" for i in range(5)]), first.stderr[-2000:]
        fetched = [path for path in Hub.asked if "/resolve/" in path]
        assert not any("README" in path or "loader" in path for path in fetched)
        assert look("org/prefs:test").stdout.strip() == str([f"test{i}" for i in range(5)])
        missing = look("org/nothing")
        assert "org/nothing: no such file here, and the hub does not give it" in missing.stderr
    finally:
        server.shutdown()
        server.server_close()
    env["HF_HUB_OFFLINE"] = "1"  # what was fetched is still there
    assert look("org/prefs:test").stdout.strip() == str([f"test{i}" for i in range(5)])
