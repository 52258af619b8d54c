"""Several judges with weights."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from rankalign.data.encode import EncodeOptions, Encoder
from rankalign.data.judges import combined, weighted
from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.models import tiny
from rankalign.training.settings import DataSettings
from rankalign.training.tokens import encode


def test_weights_are_read() -> None:
    assert weighted("rm:0.7, vader:0.3") == {"rm": 0.7, "vader": 0.3}
    assert weighted("gpt:4:1,len:-2") == {"gpt:4": 1.0, "len": -2.0}
    assert weighted("rm") == weighted("rm:1") == weighted("a,b") == {}
    for wrong in ("a:1,b", "a:1,a:2", "a:0,b:1", "a:nan,b:1", ":1,b:2"):
        with pytest.raises(InputError, match="--judge"):
            weighted(wrong)


def test_each_judge_is_standardised_over_the_list() -> None:
    rm, length = [3.0, -1.0, 10.0, 0.0], [120.0, 700.0, 80.0, 300.0]
    ours = combined(list(zip(rm, length, strict=True)), {"rm": 2.0, "length": -1.0})
    z = [[(x - statistics.fmean(xs)) / statistics.pstdev(xs) for x in xs] for xs in (rm, length)]
    assert ours == pytest.approx([(2 * a - b) / 3 for a, b in zip(*z, strict=True)], abs=1e-12)
    moved = combined([(5 * a + 7, b / 9) for a, b in zip(rm, length, strict=True)], {"rm": 2.0, "length": -1.0})
    assert moved == pytest.approx(ours, abs=1e-12)
    assert combined([(1.0, 0.1), (2.0, 0.1)], {"a": 1.0, "b": 1.0}) == [-0.5, 0.5]  # the second calls all equal
    assert combined([(1e308, 1.0), (-1e308, 2.0)], {"a": 1.0, "b": 1.0}) == [0.0, 0.0]
    assert combined([(0.1, 0.3), (0.1, 0.3), (0.2, 0.1)], {"a": 0.7, "b": 0.3})[0] == pytest.approx(
        combined([(0.1, 0.3), (0.1, 0.3), (0.2, 0.1)], {"a": 0.7, "b": 0.3})[1], abs=0
    )


def test_lists_rank_by_both_and_who_lacks_a_score_is_counted(tmp_path: Path) -> None:
    answers = [
        Response("blue", scores={"a": 1.0, "b": 0.0}),
        Response("green", scores={"a": 0.0, "b": 50.0}),
        Response("red", scores={"a": 0.0, "b": None}),
    ]
    record = CandidateSet("1", "say", answers)
    encoder = Encoder(tiny.build_tokenizer(), EncodeOptions(judge="a:0.6,b:0.4"))
    tokens = encoder.encode(record)
    assert tokens is not None
    assert tokens.scores == pytest.approx([0.2, -0.2], abs=1e-12)
    assert encoder.counts["unscored"] == 1
    write(tmp_path / "data.jsonl", [record])
    settings = DataSettings(judge="a:0.4,b:0.6", token_cache="off")
    lists, _ = encode(settings, tiny.build_tokenizer(), str(tmp_path / "data.jsonl"), False)
    assert lists[0].scores == pytest.approx([-0.2, 0.2], abs=1e-12)
    with pytest.raises(InputError, match="nothing is scored by 'c'"):
        encode(
            DataSettings(judge="a:1,c:1", token_cache="off"),
            tiny.build_tokenizer(),
            str(tmp_path / "data.jsonl"),
            False,
        )
