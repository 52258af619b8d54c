"""The token cache: what a run reads from it is what it would make itself, and nothing half-made is ever read."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rankalign.data import tokenise
from rankalign.data.convert import write_any
from rankalign.data.encode import EncodeOptions, TokenList, encode_all
from rankalign.data.records import CandidateSet, Response, to_dict, write
from rankalign.errors import InputError
from rankalign.models import tiny
from rankalign.storage.jsonl import write_rows
from rankalign.training import tokens
from rankalign.training.settings import DataSettings

TOKENIZER = tiny.build_tokenizer()


def record(i: int, scores: dict[str, float] | None = None, answers: int = 3) -> CandidateSet:
    texts = [f"answer {j} to {i} " * (i % 5) for j in range(answers)]
    rated = [Response(t, scores={"rm": float(j)} if scores is None else dict(scores)) for j, t in enumerate(texts)]
    return CandidateSet(f"p{i}", f"Prompt {i}?", rated)


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    write(tmp_path / "data.jsonl", [record(i) for i in range(12)])
    return DataSettings(data=str(tmp_path / "data.jsonl"), token_cache=str(tmp_path / "kept"), max_length=24)


def encode(settings: DataSettings, alone: bool = False, **more: Any) -> tuple[Sequence[TokenList], dict[str, int]]:
    settings = dataclasses.replace(settings, **more)
    return tokens.encode(settings, TOKENIZER, settings.data, alone)


def folders(settings: DataSettings) -> list[str]:
    return sorted(path.name for path in Path(settings.token_cache).iterdir() if path.is_dir())


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, less where tokens lie and how fast they came."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if not line.startswith(("tokens: ", "tokenising: "))]


# --- the same as without it --------------------------------------------------------------------------------------


def test_a_table_holds_what_memory_would(settings: DataSettings, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [to_dict(record(i)) for i in range(12)]
    for row in rows[2:4]:
        row["extra"] = 1  # a bad row, for a record has no such key
    rows[5]["responses"][1]["text"] = ""
    rows[6]["prompt"] = f"{TOKENIZER.eos_token} spelt"
    write_rows(settings.data, rows)
    found = []
    for where in ("off", settings.token_cache, settings.token_cache):
        lists, counts = encode(settings, token_cache=where, skip_invalid=True)
        found.append((list(lists), list(counts.items()), said(capsys)))
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert dict(found[0][1])["skipped_invalid"] == 2
    assert any("control tokens" in line for line in found[0][2])


def test_notes_of_files_are_said_again_under_the_name_of_now(
    settings: DataSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no", "of": i} for i in range(4)]
    first, second = tmp_path / "a" / "pairs.jsonl", tmp_path / "b" / "pairs.jsonl"
    for path in (first, second):
        write_rows(path, pairs)
        encode(settings, data=str(path))
        told = capsys.readouterr().err
        assert f"{path}: columns that are not read, with their rows (they stay in meta): of (4)" in told
        assert ("tokens: made" if path == first else "tokens: found") in told


def test_every_kind_of_source(settings: DataSettings, tmp_path: Path) -> None:
    rows = [to_dict(record(i)) for i in range(12)]
    expected = list(encode(settings)[0])
    (tmp_path / "parquet").mkdir()
    write_any(tmp_path / "parquet" / "a.parquet", [rows[:5]])
    write_any(tmp_path / "parquet" / "b.parquet", [rows[5:]])
    write_any(tmp_path / "folder", [rows])
    for source in ("parquet", "folder"):
        assert list(encode(settings, data=str(tmp_path / source))[0]) == expected


# --- whose tokens these are --------------------------------------------------------------------------------------


def test_what_changes_a_token_makes_another_table(settings: DataSettings, tmp_path: Path) -> None:
    encode(settings)
    for count, more in enumerate(({"max_length": 20}, {"system": "Be kind."}, {"max_candidates": 2}), start=2):
        encode(settings, **more)
        assert len(folders(settings)) == count
    encode(settings, num_proc=2)
    encode(settings, eval_data="elsewhere.jsonl")
    assert len(folders(settings)) == 4
    longer = tiny.build_tokenizer()
    longer.add_tokens(["answer"])
    tokens.encode(settings, longer, settings.data)
    turned = tiny.build_tokenizer()
    turned.chat_template = (turned.chat_template or "{{ messages[0].content }}") + " "
    tokens.encode(settings, turned, settings.data)
    assert len(folders(settings)) == 6
    write(settings.data, [record(i) for i in range(13)])
    assert len(encode(settings)[0]) == 10  # every fifth prompt's answers are empty
    assert len(folders(settings)) == 7


def test_another_version_of_the_code_makes_another_table(
    settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(settings)
    monkeypatch.setattr(tokens, "_code", lambda: "of tomorrow")
    encode(settings)
    assert len(folders(settings)) == 2


def test_a_damaged_table_is_made_again(settings: DataSettings, capsys: pytest.CaptureFixture[str]) -> None:
    expected = list(encode(settings)[0])
    (folder,) = folders(settings)
    path = Path(settings.token_cache) / folder / tokens.TABLE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert list(encode(settings)[0]) == expected
    assert "is damaged: building it again" in capsys.readouterr().err


def test_without_a_place_tokens_stay_in_memory(settings: DataSettings, capsys: pytest.CaptureFixture[str]) -> None:
    Path(settings.token_cache).write_text("a file")
    assert isinstance(encode(settings)[0], list)
    assert "no tokens can be kept here" in capsys.readouterr().err


# --- the judge, known for certain at the end ---------------------------------------------------------------------

RATED, BARE = [record(i, {"rm": 1.0}) for i in range(6)], [record(i, {}) for i in range(6)]
TWICE, VERDICT = [record(i, {"a": 1.0, "b": 0.0}) for i in range(6)], record(6, {"preference": 1.0})
LATE: dict[str, tuple[list[CandidateSet], str]] = {
    "the verdict of the data comes late": ([*RATED, VERDICT], ""),
    "a second judge comes late": ([*RATED, record(6, {"other": 1.0})], "several judges"),
    "the only judge comes late": ([*BARE, record(6)], ""),
    "two judges, and then the verdict": ([*TWICE, VERDICT], ""),
    "nobody": (BARE, "no response has a score"),
}


@pytest.mark.parametrize("case", LATE)
@pytest.mark.parametrize("kept", [True, False])
def test_the_judge_is_the_one_of_all_records(
    case: str, kept: bool, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE", 2)
    sets, refusal = LATE[case]
    write(settings.data, sets)
    where = settings.token_cache if kept else "off"
    if refusal:
        with pytest.raises(InputError, match=refusal):
            encode(settings, token_cache=where)
        return
    right = "rm" if case == "the only judge comes late" else "preference"
    expected = encode_all(sets, TOKENIZER, EncodeOptions(judge=right, max_length=24))
    lists, counts = encode(settings, token_cache=where)
    assert list(lists) == expected[0]
    assert {**expected[1], "skipped_invalid": 0} == counts


@pytest.mark.parametrize("late", [None, "a list", "a score"])
def test_single_answers_that_nobody_scored(
    late: str | None, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE", 2)
    more = {"a list": [record(6, {}, 2)], "a score": [record(6, {"rm": 2.0}, 1)]}
    write(settings.data, [record(i, {}, 1) for i in range(1, 6)] + more.get(str(late), []))
    if late == "a list":
        with pytest.raises(InputError, match="no response has a score"):
            encode(settings, alone=True)
        return
    lists, counts = encode(settings, alone=True)
    assert [t.scores for t in lists] == ([[2.0]] if late else [[0.0]] * 4)  # the answer of the fifth is empty
    assert counts["unscored"] == (5 if late else 0)


# --- several processes, and killed ones --------------------------------------------------------------------------


def forked(work: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    """A process that has everything loaded already."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def test_processes_make_one_table(settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, made = tokens._Job._build, tmp_path / "made"

    def slow(job: Any, fresh: Path) -> str:
        with open(made, "a") as out:
            out.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return build(job, fresh)

    monkeypatch.setattr(tokens._Job, "_build", slow)

    def work() -> None:
        lists, counts = encode(settings)
        assert (len(lists), counts["prompts"]) == (9, 9)  # every fifth prompt's answers are empty

    children = [forked(work) for _ in range(4)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert len(made.read_text().splitlines()) == 1


@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_at_any_moment_no_half_table_is_read(
    num_proc: int, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "PIECE", 8)
    settings = dataclasses.replace(settings, num_proc=num_proc)
    write(settings.data, [record(i) for i in range(120)])
    expected = list(encode(settings, token_cache="off")[0])
    draw = random.Random(num_proc)
    started = time.monotonic()
    encode(settings, token_cache=settings.token_cache + "-timed")
    takes = time.monotonic() - started
    for _ in range(10):
        child = forked(lambda: encode(settings))
        time.sleep(draw.random() * takes * 1.2)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        for folder in folders(settings) if Path(settings.token_cache).exists() else []:
            if not folder.startswith("."):  # it has its name, so it must be whole
                table = tokens.TokenTable(Path(settings.token_cache) / folder / tokens.TABLE)
                assert list(table) == expected
    assert list(encode(settings)[0]) == expected
    assert not [folder for folder in folders(settings) if folder.startswith(".")]
