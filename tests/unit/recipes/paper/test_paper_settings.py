"""The sampling settings of the RRHF paper's table 1 as they are shipped, on two prompts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from rankalign.cli import main
from rankalign.data.records import CandidateSet, Response, read, write

ROOT = Path(__file__).resolve().parents[4]
# By policy, how many answers a prompt; then what the sampling of the model's answers says.
BEAMS = {"num_beams": 4, "max_new_tokens": 128, "stop": ["Human:", "Assistant:"]}
DIVERSE = {**BEAMS, "num_beam_groups": 4, "diversity_penalty": 1.0}
SETTINGS = {
    "bp": ({"beams": 4, "dataset": 2}, BEAMS),
    "dp": ({"diverse": 4, "dataset": 2}, DIVERSE),
    "d": ({"diverse": 4}, DIVERSE),
    "p": ({"dataset": 2}, {}),
    "best_of_n": ({"drawn": 4}, {"temperature": 0.8, "max_new_tokens": 128, "stop": ["Human:", "Assistant:"]}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_takes_its_answers_from_where_it_should(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sets = [
        CandidateSet(f"p{i}", f"Say {i}.", [Response("good", "chosen"), Response("bad", "rejected")]) for i in range(3)
    ]
    write(tmp_path / "prompts.jsonl", sets)
    flags = ["--prompts", f"{tmp_path}/prompts.jsonl", "--output", f"{tmp_path}/out.jsonl"]
    config = f"data_generation/configs/{name}.yaml"
    assert main(["sample", "--config", config, "--model", "tiny", "--max_prompts", "2", *flags]) == 0
    answers, sampling = SETTINGS[name]
    records = list(read(tmp_path / "out.jsonl"))
    assert [record.id for record in records] == ["p0", "p1"]
    for record in records:
        counts: Counter[str] = Counter()
        for response in record.responses:
            counts[response.policy] += response.count
            if response.policy == "dataset":
                assert response.text in ("good", "bad")
                assert response.meta["replayed_from"] in ("chosen", "rejected")
            else:
                assert response.sampling.items() >= sampling.items()
        assert counts == answers


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_finds_the_demo_prompts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `response_gen.sh default OUT --config ...` calls it; the demo has one human answer a prompt."""
    monkeypatch.chdir(ROOT)
    output = f"{tmp_path}/out.jsonl"
    config = f"data_generation/configs/{name}.yaml"
    assert main(["sample", "--config", config, "--model", "tiny", "--max_prompts", "1", "--output", output]) == 0
    (record,) = read(output)
    model = sum(count for policy, count in SETTINGS[name][0].items() if policy != "dataset")
    assert sum(r.count for r in record.responses) == model + ("dataset" in SETTINGS[name][0])
