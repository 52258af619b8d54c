"""Rewards less the reward of the reference response, which is found by the id of its prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError
from rankalign.scorers.reward_model import RewardModelScorer

# Ids and prompts that a lookup by text, by stripped text or by the text that the model gets to see would mix up.
IDS = ["🙂", "🙂\u200d", " p", "p ", "p", "e\u0301", "\u00e9", "line\nbreak"]
SETS = [
    CandidateSet(
        ident,
        "A post that is too long for the model. " * 12 if i < 4 else f"Post {i}",
        [Response(f"summary {i}", "model"), Response(f"gold {i}", "people"), Response("gold again", "people")],
    )
    for i, ident in enumerate(IDS)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKALIGN_CACHE", str(tmp_path / "cache"))


def scores(sets: list[CandidateSet], **options: str | int) -> list[list[float | None]]:
    return RewardModelScorer("rm", "tiny-rm", max_length=64, **options).score(sets)  # type: ignore[arg-type]


def test_the_reference_is_taken_off_and_scores_zero() -> None:
    plain, normalised = scores(SETS), scores(SETS, reference="people")
    for raw, row in zip(plain, normalised, strict=True):
        assert row[1] == 0.0
        assert row == [pytest.approx((r or 0) - (raw[1] or 0), abs=1e-6) for r in raw]
    assert any(abs(row[0] or 0) > 1e-4 for row in normalised)


def test_references_of_another_file_are_found_by_id(tmp_path: Path) -> None:
    held = [CandidateSet(s.id, s.prompt, [Response("no", "model"), s.responses[1]]) for s in reversed(SETS)]
    write(tmp_path / "held.jsonl", held)
    bare = [CandidateSet(s.id, s.prompt, s.responses[:1]) for s in SETS]
    found = scores(bare, reference="people", reference_file=str(tmp_path / "held.jsonl"))
    expected = scores(SETS, reference="people")
    assert found == [[pytest.approx(row[0], abs=1e-6)] for row in expected]
    assert scores(
        [CandidateSet(s.id, s.prompt) for s in SETS], reference="people", reference_file=f"{tmp_path}/held.jsonl"
    )
    with pytest.raises(InputError, match=r"held\.jsonl has no response of policy 'people' to 'q'"):
        scores([CandidateSet("q", "Q", [Response("a")])], reference="people", reference_file=f"{tmp_path}/held.jsonl")
    with pytest.raises(InputError, match=r"held\.jsonl has another prompt under the id 'p'"):
        scores([CandidateSet("p", "Q", [Response("a")])], reference="people", reference_file=f"{tmp_path}/held.jsonl")


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="the record has no response of policy 'peple' to '🙂'"):
        scores(SETS, reference="peple")
    with pytest.raises(InputError, match="reference_file needs reference"):
        scores(SETS, reference_file="x.jsonl")


def test_the_reference_is_part_of_the_settings(tmp_path: Path) -> None:
    write(tmp_path / "held.jsonl", SETS)

    def told(**options: str) -> object:
        return RewardModelScorer("rm", "tiny-rm", **options).fingerprint()  # type: ignore[arg-type]

    first = told(reference="people", reference_file=str(tmp_path / "held.jsonl"))
    assert first not in (told(), told(reference="people"))
    write(tmp_path / "held.jsonl", SETS[:-1])
    assert first != told(reference="people", reference_file=str(tmp_path / "held.jsonl"))
