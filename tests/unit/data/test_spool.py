"""Records in a temporary file are the records, whoever reads them; outputs do not tell where records waited."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankalign.config import ScoreConfig, ScorerConfig
from rankalign.data import spool
from rankalign.data.convert import convert
from rankalign.data.load import load
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.data.spool import Spool, View
from rankalign.errors import InputError, Line
from rankalign.evaluation.pairwise.scores import compare_by_score
from rankalign.evaluation.texts.lexical import evaluate_lexical
from rankalign.stages.generation import score


def made(count: int = 50) -> list[CandidateSet]:
    texts = ["plain", "日本語の答え", "line\n\u2028 x", ""]
    found = []
    for n in range(count):
        answers = [
            Response(
                f"{text} {n}", f"p{k}", k % 2 == 0, 1 + k, {"temperature": 0.1 * k}, {"rm": n / 7 - k}, None, {"k": k}
            )
            for k, text in enumerate(texts)
        ]
        prompt = f"asked {n}?" if n % 2 else [{"role": "user", "content": f"asked {n}?"}]
        found.append(
            CandidateSet(f"id-{n}", prompt, answers, {"n": n, "big": 2**70 if n == 3 else None}, ("f.jsonl", n))
        )
    return found


def test_what_waits_in_a_file_comes_back() -> None:
    records = made()
    records[5].origin = ("f", Line.of(3, 4, "shard.jsonl", 9))
    kept = Spool(iter(records), in_memory=0)
    assert list(kept) == records
    assert [kept[n] for n in range(-50, 50)] == records + records
    assert [record.origin for record in kept] == [record.origin for record in records]
    line = kept[5].origin[1]  # type: ignore[index]
    assert isinstance(line, Line)
    assert (line.element, line.file, line.row) == (4, "shard.jsonl", 9)
    assert list(kept[10:30:3]) == records[10:30:3]
    assert list(View(kept, [4, 2], lambda record: record.id)) == ["id-4", "id-2"]
    assert kept[0] is not kept[0]
    with pytest.raises(IndexError):
        kept[50]


def test_few_records_are_kept_as_they_are() -> None:
    records = made(3)
    kept = Spool(records)
    assert kept[1] is records[1]
    assert list(kept[:2]) == records[:2]


@pytest.mark.parametrize("runner", ["local", "processes"])
def test_outputs_do_not_tell_where_records_waited(runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in.jsonl", made(100))
    scorer = ScorerConfig("words", "function", {"function": "rankalign.scorers.builtin:words"})
    score(ScoreConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "kept.jsonl"), [scorer]))
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    config = ScoreConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), [scorer], runner=runner)
    assert score(config)["scores"] == 2 * 400
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "kept.jsonl").read_bytes()


def test_measures_do_not_tell_either(tmp_path: Path) -> None:
    records = made(60)
    kept = Spool(records, in_memory=0)
    assert evaluate_lexical(kept).as_dict() == evaluate_lexical(records).as_dict()
    shuffled = Spool(records[::-1], in_memory=0)
    assert compare_by_score(kept, shuffled, "rm").as_dict() == compare_by_score(records, records, "rm").as_dict()


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_shards_are_the_rows_in_their_order(ending: str, tmp_path: Path) -> None:
    records = [CandidateSet(f"id-{n}", f"asked {n}?", [Response(f"said {n}")]) for n in range(11)]
    write(tmp_path / "in.jsonl", records)
    target = tmp_path / f"out{ending}"
    assert convert(tmp_path / "in.jsonl", target, output_shards=4)["written"] == 11
    assert sorted(path.name for path in target.iterdir()) == [f"part-{n:05d}-of-00004{ending}" for n in range(4)]
    assert [len(list(read(path))) for path in sorted(target.iterdir())] == [2, 3, 3, 3]
    assert list(load(target)) == records
    with pytest.raises(InputError, match="is there already"):
        convert(tmp_path / "in.jsonl", target, output_shards=4)
    with pytest.raises(InputError, match="shards are files: name an ending"):
        convert(tmp_path / "in.jsonl", tmp_path / "folder", output_shards=4)
