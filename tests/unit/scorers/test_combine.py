"""Several judges into one score: against numpy and scipy, with what is missing, equal, huge or a shard."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.errors import InputError
from rankalign.scorers.combine import Combination, combined, parse_judges, spreads
from rankalign.storage import manifest

JUDGES = {"helpful": 2.0, "safe": 1.0, "kürze": 0.5}


def records(missing: float = 0.0) -> list[CandidateSet]:
    rng = random.Random(4)
    sets = []
    for i in range(12):
        responses = []
        for k in range(rng.randint(1, 5)):
            scores: dict[str, float | None] = {
                "helpful": rng.gauss(50, 20),
                "safe": float(rng.randint(0, 2)),
                "kürze": rng.gauss(-3, 1e-3),
                "other": 9.0,
            }
            scores = {judge: None if rng.random() < missing else score for judge, score in scores.items()}
            responses.append(Response(f"{i}-{k}", "m", scores=scores))
        sets.append(CandidateSet(f"p{i}", "q", responses))
    return sets


def table(sets: list[CandidateSet]) -> list[np.ndarray[Any, Any]]:
    """A matrix (responses, judges) a record, NaN where a score is missing."""
    return [
        np.array([[math.nan if (s := r.scores[j]) is None else s for j in JUDGES] for r in record.responses])
        for record in sets
    ]


def by_numpy(sets: list[CandidateSet], rule: str, normalize: str, missing: str) -> list[list[float | None]]:
    rows = table(sets)
    whole = np.concatenate(rows)
    weights = np.array(list(JUDGES.values())) if rule != "min" else np.ones(3)
    found: list[list[float | None]] = []
    for row in rows:
        if rule == "rank":
            ranks = np.full_like(row, math.nan)
            for j in range(3):
                there = ~np.isnan(row[:, j])
                n = there.sum()
                ranks[there, j] = (rankdata(row[there, j]) - 1) / (n - 1) if n > 1 else 0.5
            scaled = ranks
        elif normalize == "none":
            scaled = row
        else:
            over = whole if normalize == "file" else row
            with np.errstate(all="ignore"):
                deviation = np.nanstd(over, axis=0)
                scaled = (row - np.nanmean(over, axis=0)) / np.where(deviation < 1e-12, np.inf, deviation)
        out: list[float | None] = []
        for line in scaled:
            there = ~np.isnan(line)
            if not there.any() or (missing == "null" and not there.all()):
                out.append(None)
            else:
                values = line[there]
                out.append(float(values.min() if rule == "min" else np.average(values, weights=weights[there])))
        found.append(out)
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("missing", ["null", "rest"])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rule", "normalize"),
    [(rule, scale) for rule in ("mean", "min") for scale in ("file", "prompt", "none")] + [("rank", "")],
)
def test_it_is_what_numpy_says(rule: str, normalize: str, share: float, missing: str) -> None:
    sets = records(share)
    judges = dict.fromkeys(JUDGES, 1.0) if rule == "min" else JUDGES
    how = Combination("all", judges, rule, normalize, missing)
    known = spreads(sets, how)
    for record, row in zip(sets, by_numpy(sets, rule, normalize, missing), strict=True):
        ours = combined(record, how, known)
        assert [score is None for score in ours] == [score is None for score in row]
        for a, b in zip(ours, row, strict=True):
            assert a is None or b is None or a == pytest.approx(b, rel=1e-9, abs=1e-9)


def test_equal_and_huge_scores_give_numbers() -> None:
    def row(*scores: float) -> CandidateSet:
        return CandidateSet("p", "q", [Response(str(i), "m", scores={"a": s}) for i, s in enumerate(scores)])

    for rule in ("mean", "min"):
        for scale in ("file", "prompt"):
            how = Combination("all", {"a": 1e308}, rule, scale)
            # Three times 0.1 has a mean that is not 0.1 in floats.
            assert combined(row(0.1, 0.1, 0.1), how, spreads([row(0.1, 0.1, 0.1)], how)) == [0.0] * 3
    how = Combination("all", {"a": 1.0}, "mean", "prompt")
    assert combined(row(1e200, -1e200), how, {"a": spreads([row(1, 2)], how)["a"]}) == [1.0, -1.0]
    with pytest.raises(InputError, match="scores of 'a' are too large to normalise, up to 1e\\+200"):
        spreads([row(1e200, -1e200)], how)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, records(0.3))
    words = ["score", "--input", str(source), "--output", str(output), "--combine", "mean", "--name", "all"]
    words += ["--judges", "helpful=2,safe,kürze=0.5"]
    assert main(words) == 0
    assert "lacking" in capsys.readouterr().out
    found = [[r.scores["all"] for r in record.responses] for record in read(output)]
    for row, expected in zip(found, by_numpy(records(0.3), "mean", "file", "null"), strict=True):
        assert row == [None if e is None else pytest.approx(e, rel=1e-9, abs=1e-9) for e in expected]
    told: Any = manifest.read(output)
    column = np.concatenate(table(records(0.3)))[:, 0]
    assert told["scale"]["helpful"]["mean"] == pytest.approx(float(np.nanmean(column)))
    kept = [r.scores | {"all": None} for record in read(output) for r in record.responses]
    assert kept == [r.scores | {"all": None} for record in records(0.3) for r in record.responses]
    assert main(words) == 0
    assert "nothing to do" in capsys.readouterr().err
    for more, message in (
        (["--missing", "rest"], 'other settings (missing: "null" -> "rest")'),
        (["--shard", "0/2"], "--shard does not go with --combine"),
        (["--judges", "nobody"], "'nobody' is not in the file, which has helpful, kürze, other, safe"),
        (["--name", "other", "--output", str(tmp_path / "x")], "'other' is a judge of the file already"),
        (["--judges", "safe=-1"], "the weight of 'safe' must be above 0"),
        (["--judges", "safe=x"], "is no number"),
        (["--judges", "safe,safe=2"], "'safe' stands twice"),
        (["--combine", "min"], "rule min knows no weights"),
        (["--combine", "rank", "--normalize", "file"], "takes no other scale"),
        (["--output", str(source)], "the same file"),
    ):
        extra = [] if "--output" in more or "--missing" in more else ["--output", str(tmp_path / "other.jsonl")]
        assert main([*words, *more, *extra]) == 1
        assert message in capsys.readouterr().err
    assert main(["score", "--input", str(source), "--output", "x", "--function", "a:b", "--judges", "a"]) == 1
    assert "--judges goes with --combine" in capsys.readouterr().err
    part = tmp_path / "in.jsonl.shard-0-of-2"
    part.write_bytes(source.read_bytes())
    assert main([*words, "--input", str(part), "--output", str(tmp_path / "y.jsonl")]) == 1
    assert "is a shard" in capsys.readouterr().err


def test_weights_are_read() -> None:
    assert parse_judges("a=2, b ,c=d=0.5") == {"a": 2.0, "b": 1.0, "c=d": 0.5}
    with pytest.raises(InputError, match="has no name"):
        parse_judges("=2")


@pytest.mark.parametrize("command", ["compare", "convert", "eval"])
def test_judges_with_weights_are_refused_with_the_way_to_one_score(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [
        CandidateSet("p", "q", [Response("a", scores={"rm": 1.0, "x": 2.0}), Response("b", scores={"rm": 0, "x": 1})])
    ]
    path = str(tmp_path / "f.jsonl")
    write(path, sets)
    words = {
        "compare": ["compare", path, path, "--names", "a", "b"],
        "convert": ["convert", path, str(tmp_path / "out.jsonl"), "--to", "trl"],
        "eval": ["eval", "reward", path],
    }[command]
    assert main([*words, "--judge", "rm:0.7,x:0.3"]) == 1
    said = capsys.readouterr().err
    assert "rankalign score --combine mean --judges rm=0.7,x=0.3 --name both" in said
