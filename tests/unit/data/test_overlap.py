"""Near-duplicates and shared runs of words, against brute force over all pairs."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.data.convert import convert
from rankalign.data.overlap import NearDuplicates, SharedRuns, band_rows
from rankalign.data.records import CandidateSet, read, write
from rankalign.errors import InputError

pytest.importorskip("datasketch")
BANDS = [1, 2, 6, 20]
HAN = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏閏餘成歲律呂調陽雲騰致雨露結為霜金生麗水玉出崑岡"


def brute(text: str, sign: bool, n: int) -> set[str]:
    """Runs of n words, cut by hand: signs of Han text, else what stands between blanks."""
    parts = list(text) if sign else re.sub(r"[^\w\s]", "", text.lower()).split()
    return {" ".join(parts[k : k + n]) for k in range(max(1, len(parts) - n + 1))}


def family(draw: random.Random, sign: bool) -> list[str]:
    """A text, and copies of it with more and more of its words changed."""
    known = list(HAN) if sign else [f"word{n}" for n in range(300)]
    base = draw.choices(known, k=80)
    texts = []
    for changed in (0, 1, 2, 4, 8):
        copy = list(base)
        for place in draw.sample(range(80), changed):
            copy[place] = draw.choice(known)
        texts.append(copy)
    return ["".join(text) if sign else " ".join(text).capitalize() + "!" for text in texts]


@pytest.mark.parametrize("sign", [False, True], ids=["latin", "han"])
@pytest.mark.parametrize("least", [0.5, 0.8])
def test_near_duplicates_are_those_of_brute_force(least: float, sign: bool) -> None:
    draw = random.Random(11)
    texts = [text for _ in range(60) for text in family(draw, sign)]
    draw.shuffle(texts)
    near, kept, missed = NearDuplicates(least), list[tuple[str, set[str]]](), 0
    for number, text in enumerate(texts):
        runs = brute(text, sign, 3)
        alike = {name: len(runs & other) / len(runs | other) for name, other in kept}
        expected = {name for name, value in alike.items() if value >= least}
        found = near.earlier(CandidateSet(str(number), text))
        if found is None:
            kept.append((str(number), runs))
            missed += bool(expected)
        else:
            assert found[0] in expected
            assert found[1] == pytest.approx(alike[found[0]])
    assert len(kept) < 250
    assert missed <= 3  # one in a hundred of those just at the bound, fewer beyond


def test_a_band_finds_what_it_promises() -> None:
    assert [band_rows(least) for least in (0.1, 0.5, 0.8, 1.0)] == BANDS
    for least in (0.2, 0.5, 0.8, 0.9):
        rows = band_rows(least)
        assert 1 - (1 - least**rows) ** (100 // rows) >= 0.99


def test_no_share_is_refused() -> None:
    with pytest.raises(InputError, match=r"above 0 and up to 1, got 1\.5"):
        NearDuplicates(1.5)


@pytest.mark.parametrize("sign", [False, True], ids=["latin", "han"])
def test_shared_runs_are_those_of_brute_force(sign: bool) -> None:
    draw, n = random.Random(5), 26 if sign else 13
    known = list(HAN) if sign else [f"word{k}" for k in range(40)]
    join = "" if sign else " "
    evaluated = [draw.choices(known, k=draw.randrange(n, 60)) for _ in range(20)]
    trained = []
    for _ in range(200):
        text = draw.choices(known, k=draw.randrange(5, 50))
        if draw.random() < 0.5:
            size, source = draw.randrange(n - 4, n + 3), draw.choice(evaluated)
            start = draw.randrange(max(1, len(source) - size))
            text[3:3] = source[start : start + size]
        trained.append(join.join(text))
    shared = SharedRuns(CandidateSet(str(k), join.join(text)) for k, text in enumerate(evaluated))
    grams = set().union(*(brute(join.join(text), sign, n) for text in evaluated))
    found = [shared.shared(CandidateSet("t", text)) is not None for text in trained]
    assert found == [bool({run for run in brute(text, sign, n) if len(run.split()) == n} & grams) for text in trained]
    assert 30 < sum(found) < 170


def test_short_evaluation_prompts_count_whole() -> None:
    nine = "what is the name of the longest river there"
    shared = SharedRuns([CandidateSet("nine", nine), CandidateSet("two", "Hi there")])
    assert shared.sizes == {9}
    asked = CandidateSet("t", "Tell me: What is the name of the longest river there, please? Hi there")
    assert shared.shared(asked) == (
        "nine",
        tuple(nine.split()),
    )
    assert shared.shared(CandidateSet("t", "what is the name of the longest river here? Hi there")) is None


def test_lint_and_convert_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"w{k}" for k in range(40)]
    prompts = [" ".join(words), " ".join([*words[:-1], "other"]), " ".join(words[:20]) + " and quite another end of it"]
    write(tmp_path / "in.jsonl", [CandidateSet(f"r{k}", text) for k, text in enumerate(prompts)])
    write(tmp_path / "test.jsonl", [CandidateSet("e", "Here: " + " ".join(words[10:30]))])
    flags = ["--near_duplicates", "0.8", "--against", str(tmp_path / "test.jsonl"), "--json"]
    assert main(["lint", str(tmp_path / "in.jsonl"), *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["findings"]["L405"], told["findings"]["L406"]) == (1, 2)
    assert (
        told["examples"]["L405"][0]["message"] == "asks nearly the same as 'r0': 95% of their runs of words are shared"
    )
    assert told["examples"]["L406"][0]["message"] == f"shares 13 words in a row with 'e': {' '.join(words[10:23])!r}"
    result = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", dedup=0.8)
    assert (result["read"], result["written"]) == (3, 2)
    assert result["lost"] == {"near-duplicates of an earlier prompt": 1}
    assert [record.id for record in read(tmp_path / "out.jsonl")] == ["r0", "r2"]
