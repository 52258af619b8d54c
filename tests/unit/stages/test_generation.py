"""Sampling and scoring as stages: provenance, merging, resumption by content, refusals that name the cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rankalign.config import SampleConfig, ScoreConfig, build
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.errors import InputError, RecordError
from rankalign.models.load import resolve
from rankalign.stages.generation import merge, merge_shards, sample, score
from rankalign.storage import manifest


def prompts(folder: Path) -> str:
    sets = [CandidateSet(f"p{i}", f"Say {i}", [Response(f"person {i}", "human")], {"topic": i}) for i in range(4)]
    write(folder / "prompts.jsonl", sets)
    return str(folder / "prompts.jsonl")


def sampling(folder: Path, **more: Any) -> SampleConfig:
    policies = [
        {"name": "a", "model": "tiny", "n": 2, "max_new_tokens": 5, "temperature": 1.0},
        {"name": "people", "engine": "replay", "only": "human"},
        {"name": "b", "model": "tiny", "n": 1, "max_new_tokens": 5, "temperature": 0.5},
    ]
    content = {"prompts": prompts(folder), "output": str(folder / "out.jsonl"), "policies": policies, **more}
    return build(SampleConfig, content, "test")


def test_each_response_says_who_wrote_it(tmp_path: Path) -> None:
    result = sample(sampling(tmp_path))
    sets = list(read(tmp_path / "out.jsonl"))
    assert [record.id for record in sets] == ["p0", "p1", "p2", "p3"]
    assert [record.meta for record in sets] == [{"topic": i} for i in range(4)]
    for i, record in enumerate(sets):
        assert [r.policy for r in record.responses for _ in range(r.count)] == ["a", "a", "people", "b"]
        assert record.responses[-2].text == f"person {i}"
        assert all(r.sampling["seed"] == 0 for r in record.responses if r.policy in "ab")
    assert result["responses"] == 16
    assert manifest.read(tmp_path / "out.jsonl")["counts"]["prompts"] == 4  # type: ignore[index]


def test_a_finished_stage_does_nothing_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(sampling(tmp_path))
    before = (tmp_path / "out.jsonl").stat().st_mtime_ns
    assert sample(sampling(tmp_path))["already_finished"]
    assert "nothing to do" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"other settings \(policies\[0\]\.sampling\.seed: 0 -> 5"):
        sample(sampling(tmp_path, seed=5))
    assert not sample(sampling(tmp_path, seed=5, overwrite=True))["already_finished"]


def test_an_edited_output_is_not_taken_for_finished(tmp_path: Path) -> None:
    sample(sampling(tmp_path))
    with open(tmp_path / "out.jsonl", "a") as out:
        out.write("\n")
    with pytest.raises(InputError, match="has changed since it was made"):
        sample(sampling(tmp_path))


def test_seeds_make_runs_equal_and_seeds_make_them_differ(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        sample(sampling(tmp_path, output=str(tmp_path / f"{name}.jsonl"), seed=seed))
        texts.append([r.text for record in read(tmp_path / f"{name}.jsonl") for r in record.responses])
    assert texts[0] == texts[1] != texts[2]


def test_the_weights_are_part_of_the_settings(tmp_path: Path) -> None:
    """A model trained anew under the same path must not pass for the one that answered."""
    from rankalign.models import load as models

    model = models.load_policy("tiny")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    models.load_tokenizer("tiny").save_pretrained(folder)
    policy = {"name": "a", "model": str(folder), "max_new_tokens": 3}
    sample(sampling(tmp_path, policies=[policy]))
    model.lm_head.weight.data += 1
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="model_sha256"):
        sample(sampling(tmp_path, policies=[policy]))


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([], "name at least one"),
        ([{"name": "a", "model": "tiny"}, {"name": "a", "model": "tiny"}], "the name a stands twice"),
        ([{"name": "a", "engine": "hff"}], "unknown engine 'hff'"),
        ([{"name": "a", "model": "./nowhere"}], "no such folder"),
        ([{"name": "a", "engine": "replay", "only": "nobody"}], "nobody"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, policies: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample(sampling(tmp_path, policies=policies))


def test_merge_counts_equal_texts_of_one_policy() -> None:
    drawn = [Response("x", "a"), Response("y", "a"), Response("x", "a"), Response("x", "b"), Response("x", "a", False)]
    merged = merge(drawn)
    assert [(r.text, r.policy, r.finished, r.count) for r in merged] == [
        ("x", "a", True, 2),
        ("y", "a", True, 1),
        ("x", "b", True, 1),
        ("x", "a", False, 1),
    ]
    assert drawn[0].count == 1


def test_scores_stand_under_their_judge_beside_older_ones(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "def size(samples, outputs, **m):\n    return [None if 'person 2' == o else len(o) for o in outputs]\n"
    )
    source = prompts(tmp_path)
    scorers = [{"name": name, "kind": "function", "function": f"{tmp_path}/f.py:size"} for name in ("one", "two")]
    content = {"input": source, "output": str(tmp_path / "s.jsonl"), "scorers": scorers}
    result = score(build(ScoreConfig, content, "test"))
    assert (result["scores"], result["missing_scores"]) == (6, 2)
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert rows[0]["responses"][0]["scores"] == {"one": 8, "two": 8}
    assert rows[2]["responses"][0]["scores"] == {"one": None, "two": None}


def test_scoring_in_place_is_refused(tmp_path: Path) -> None:
    source = prompts(tmp_path)
    scorers = [{"name": "v", "kind": "function", "function": "rankalign.scorers.builtin:words"}]
    with pytest.raises(InputError, match="same file"):
        score(build(ScoreConfig, {"input": source, "output": source, "scorers": scorers}, "test"))


def test_unknown_scorer_options_are_named(tmp_path: Path) -> None:
    scorers = [{"name": "rm", "kind": "reward_model", "model": "tiny-rm", "bach_size": 3}]
    content = {"input": prompts(tmp_path), "output": str(tmp_path / "s.jsonl"), "scorers": scorers}
    with pytest.raises(InputError, match="bach_size"):
        score(build(ScoreConfig, content, "test"))


@pytest.fixture
def strict(tmp_path: Path) -> str:
    """The tiny model under a template that refuses system messages."""
    folder = tmp_path / "strict"
    shutil.copytree(resolve("tiny"), folder)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = folder / "chat_template.jinja"
    template.write_text(refuse + template.read_text())
    return str(folder)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_prompt_that_the_template_refuses_is_named_or_left_out(strict: str, tmp_path: Path, shards: int) -> None:
    sets = [CandidateSet(f"p{i}", [{"role": "user", "content": f"Say {i}"}]) for i in range(3)]
    sets[1].prompt.insert(0, {"role": "system", "content": "Be brief."})  # type: ignore[union-attr, arg-type]
    write(tmp_path / "prompts.jsonl", sets)
    policy = {"name": "a", "model": strict, "max_new_tokens": 3}
    given = {"prompts": str(tmp_path / "prompts.jsonl"), "output": str(tmp_path / "o.jsonl"), "policies": [policy]}
    with pytest.raises(RecordError, match=r"prompts\.jsonl:2: prompt: record 'p1'.*no system role"):
        sample(build(SampleConfig, given, "test"))
    for shard in range(shards):
        part = {"shard": f"{shard}/{shards}"} if shards > 1 else {}
        found = sample(build(SampleConfig, {**given, "skip_invalid": True, **part}, "test"))
        assert found["skipped_invalid"] == 1
    if shards > 1:
        merge_shards(given["output"])
    assert [(record.id, len(record.responses)) for record in read(given["output"])] == [("p0", 1), ("p2", 1)]


@pytest.mark.parametrize("name", ["o.csv", "o.tsv.gz", "o.xlsx", "o.parquet"])
def test_records_are_not_written_under_the_name_of_a_table(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"JSON Lines; name the output with \.jsonl"):
        sample(sampling(tmp_path, output=str(tmp_path / name)))
    assert not (tmp_path / name).exists()


def test_a_policy_without_a_name_or_file_is_refused_before_any_work(tmp_path: Path) -> None:
    for entry, said in (
        ({"name": " ", "model": "tiny"}, "each needs a name"),
        ({"name": "p", "engine": "replay", "file": "nosuch.jsonl"}, "nosuch.jsonl: no such file"),
    ):
        with pytest.raises(InputError, match=said):
            sample(sampling(tmp_path, policies=[entry]))
    assert not list(tmp_path.glob("out*"))
