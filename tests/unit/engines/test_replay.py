"""Engine ``replay``: what it takes from the data, and what it says when that lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankalign.data import records
from rankalign.data.records import CandidateSet, Response
from rankalign.engines import Policy
from rankalign.engines.replay import ReplayEngine
from rankalign.errors import InputError


def stored() -> list[CandidateSet]:
    return [
        CandidateSet("a", "one", [Response("x", "human", scores={"j": 1.0}), Response("y", "gpt", finished=False)]),
        CandidateSet("b", [{"role": "user", "content": "two"}], [Response("z", "human", meta={"k": 1})]),
    ]


def test_replay_takes_the_responses_of_the_data() -> None:
    made = ReplayEngine(Policy("old", engine="replay"))
    assert made.batches(stored()) == [[0, 1]]
    (first, second), (third,) = made.generate(stored())
    assert first == Response("x", "old", scores={"j": 1.0}, meta={"replayed_from": "human"})
    assert second == Response("y", "old", finished=False, meta={"replayed_from": "gpt"})
    assert third == Response("z", "old", meta={"k": 1, "replayed_from": "human"})


def test_replay_of_one_policy_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    records.write(path, stored())
    prompts = [CandidateSet("b", "two"), CandidateSet("a", "one")]
    made = ReplayEngine(Policy("human", engine="replay", file=str(path), only="human"))
    assert [[r.text for r in row] for row in made.generate(prompts)] == [["z"], ["x"]]
    assert made.generate(prompts)[1] == [Response("x", "human", scores={"j": 1.0})]


def test_replay_tells_what_lacks(tmp_path: Path) -> None:
    made = ReplayEngine(Policy("gpt", engine="replay", only="gpt"))
    with pytest.raises(InputError, match=r"holds no response of policy 'gpt' for 1 of 2 prompts \('b'\)"):
        made.batches(stored())
    path = tmp_path / "answers.jsonl"
    records.write(path, stored())
    made = ReplayEngine(Policy("old", engine="replay", file=str(path)))
    with pytest.raises(InputError, match=r"answers.jsonl holds no response for 7 of 7 prompts \('0', .*'4', \.\.\.\)"):
        made.batches([CandidateSet(str(i), "one") for i in range(7)])
    with pytest.raises(InputError, match="another prompt under the id 'a'"):
        made.batches([CandidateSet("a", "other")])
