"""Shards: any division joins to the file of one process; gaps, doubles, strangers and unfinished ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rankalign.config import SampleConfig, ScoreConfig, build
from rankalign.data.records import CandidateSet, Response, read, write
from rankalign.engines import hf
from rankalign.errors import InputError
from rankalign.stages import stage as stages
from rankalign.stages.generation import merge_shards, sample, score
from rankalign.stages.shards import Shard
from rankalign.storage import manifest
from rankalign.storage.journal import Journal

PROMPTS = 7


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "MAX_ROWS", 4)
    monkeypatch.setattr("rankalign.stages.generation.SCORE_BATCH", 2)


def sampling(folder: Path, **more: Any) -> SampleConfig:
    sets = [
        CandidateSet(f"p{i}", "word " * (1 + i * 5 % 7), [Response(f"person {i}", "human")]) for i in range(PROMPTS)
    ]
    if not (folder / "prompts.jsonl").exists():
        write(folder / "prompts.jsonl", sets)
    policies = [
        {"name": "warm", "model": "tiny", "n": 2, "max_new_tokens": 5},
        {"name": "people", "engine": "replay", "only": "human"},
    ]
    content = {"prompts": str(folder / "prompts.jsonl"), "output": str(folder / "out.jsonl"), "policies": policies}
    return build(SampleConfig, {**content, **more}, "test")


def scoring(folder: Path, **more: Any) -> ScoreConfig:
    scorers = [
        {"name": "rm", "kind": "reward_model", "model": "tiny-rm"},
        {"name": "words", "kind": "function", "function": "rankalign.scorers.builtin:words"},
    ]
    content = {"input": str(folder / "whole.jsonl"), "output": str(folder / "scored.jsonl"), "scorers": scorers}
    return build(ScoreConfig, {**content, **more}, "test")


def both(folder: Path) -> None:
    """Shards 0/2 and 1/2 of out.jsonl."""
    for index in range(2):
        sample(sampling(folder, shard=f"{index}/2"))


@pytest.mark.parametrize("parts", [3, 11])  # of 7 batches in all when sampling
def test_any_division_joins_to_the_file_of_one_process(tmp_path: Path, parts: int) -> None:
    sample(sampling(tmp_path, output=str(tmp_path / "whole.jsonl")))
    for index in reversed(range(parts)):
        result = sample(sampling(tmp_path, shard=f"{index}/{parts}"))
        assert result["output"].endswith(f"out.jsonl.shard-{index}-of-{parts}")
    joined = merge_shards(str(tmp_path / "out.jsonl"))
    assert (joined["prompts"], joined["responses"]) == (PROMPTS, 3 * PROMPTS)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    score(scoring(tmp_path, output=str(tmp_path / "alone.jsonl")))
    for index in range(parts):
        score(scoring(tmp_path, shard=f"{index}/{parts}"))
    merge_shards(str(tmp_path / "scored.jsonl"))
    assert (tmp_path / "scored.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.journal"))


def test_what_each_shard_left_out_is_told_once(tmp_path: Path) -> None:
    sampling(tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as more:
        more.write('{"id": "bad", "prompt": 3}\n')
    whole = sample(sampling(tmp_path, output=str(tmp_path / "whole.jsonl"), skip_invalid=True))
    for index in range(2):
        sample(sampling(tmp_path, shard=f"{index}/2", skip_invalid=True))
    joined = merge_shards(str(tmp_path / "out.jsonl"))
    assert joined["skipped_invalid"] == whole["skipped_invalid"] == 1
    assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["skipped_invalid"] == 1


def test_shards_are_whole_batches_dealt_out_in_turn(tmp_path: Path) -> None:
    """Every item once, the halves as equal as batches of two allow."""
    both(tmp_path)
    keys = [
        [tuple(json.loads(line)["key"]) for line in (tmp_path / f"out.jsonl.shard-{i}-of-2").open()] for i in range(2)
    ]
    assert len(keys[0]) + len(keys[1]) == 2 * PROMPTS == len({*keys[0], *keys[1]})
    assert sum(key[0] == "warm" for key in keys[0]) == 4  # batches of 2, 2, 2, 1 prompts
    assert keys[0] == sorted(keys[0])


def test_a_joined_output_is_finished_for_the_single_process_too(tmp_path: Path) -> None:
    both(tmp_path)
    merge_shards(str(tmp_path / "out.jsonl"))
    told = manifest.read(tmp_path / "out.jsonl")
    assert told is not None
    assert (told["stage"], told["shards"]) == ("sample", 2)
    assert sample(sampling(tmp_path))["already_finished"]
    assert merge_shards(str(tmp_path / "out.jsonl"))["already_finished"]
    assert not merge_shards(str(tmp_path / "out.jsonl"), overwrite=True)["already_finished"]


def test_an_unfinished_shard_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sampling(tmp_path, shard="0/2")
    real = Journal.append
    with monkeypatch.context() as patch:

        def once(self: Journal, items: Any) -> None:
            if len(self.done) > 1:
                raise KeyboardInterrupt
            real(self, items)

        patch.setattr(Journal, "append", once)
        with pytest.raises(KeyboardInterrupt):
            sample(config)
    sample(sampling(tmp_path, shard="1/2"))
    with pytest.raises(InputError, match=r"shard 0/2 of .*out\.jsonl is unfinished: run the stage with --shard 0/2"):
        merge_shards(str(tmp_path / "out.jsonl"))
    assert sample(config)["items"] == 4 + PROMPTS
    assert merge_shards(str(tmp_path / "out.jsonl"))["prompts"] == PROMPTS


def test_a_kill_between_manifest_and_journal_is_no_harm(tmp_path: Path) -> None:
    both(tmp_path)
    left = tmp_path / "out.jsonl.shard-1-of-2.journal"
    left.write_bytes(b"")
    assert sample(sampling(tmp_path, shard="1/2"))["already_finished"]
    assert not left.exists()


def test_merge_refuses_what_is_not_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            merge_shards(str(out))
        assert not out.exists()

    refused("has no shards")
    sample(sampling(tmp_path, shard="1/2"))
    refused(r"shard 0/2 of .* is missing: run the stage with --shard 0/2")

    first, second = (Shard(i, 2).path(out) for i in range(2))
    shutil.copy(second, first)
    refused(r"shard 0/2 of .* is unfinished")
    shutil.copy(manifest.path_for(second), manifest.path_for(first))
    refused(r"shard-0-of-2 is shard 1/2 under another name, so shard 1/2 stands twice")
    first.unlink()
    manifest.path_for(first).unlink()

    sample(sampling(tmp_path, shard="0/2", seed=5))
    refused(r"shard 1/2 was made with other settings than shard 0/2 \(policies\[0\]\.sampling\.seed: 5 -> 0")
    sample(sampling(tmp_path, shard="0/2", overwrite=True))
    sample(sampling(tmp_path, shard="2/3"))
    refused(r"several divisions \(0/2, 1/2, 2/3\)")
    Shard(2, 3).path(out).unlink()

    whole = first.read_bytes()
    first.write_bytes(whole[:-2])
    refused(r"shard-0-of-2 has changed since it was made: run the stage with --shard 0/2 and --overwrite")
    first.write_bytes(whole)
    (tmp_path / "prompts.jsonl").write_text((tmp_path / "prompts.jsonl").read_text() + "\n")
    refused(r"prompts\.jsonl has changed since the shards")


def test_merge_refuses_batches_cut_by_another_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of the package might cut them: the settings agree, the items do not."""
    sample(sampling(tmp_path, shard="0/2"))
    monkeypatch.setattr(hf, "MAX_ROWS", 6)
    sample(sampling(tmp_path, shard="1/2"))
    with pytest.raises(InputError, match=r"stands in another shard|do not add up"):
        merge_shards(str(tmp_path / "out.jsonl"))


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "0/0", "a/b", "1/2/3"])
def test_a_shard_is_i_of_n_from_zero(text: str) -> None:
    with pytest.raises(InputError, match=r"write i/n, where i counts from 0"):
        Shard.parse(text)


def test_the_local_runner_is_one_process(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--runner ray"):
        sample(sampling(tmp_path, workers=2))
    with pytest.raises(InputError, match=r"unknown runner 'rai' \(did you mean 'ray'"):
        sample(sampling(tmp_path, runner="rai"))


def test_a_worker_travels_as_its_settings(tmp_path: Path) -> None:
    """What the runner ray sends to its actors: no model goes with it, and it answers alike there."""
    import copy

    from rankalign.stages.generation import Answerer, Grader

    config, record = sampling(tmp_path), next(read(tmp_path / "prompts.jsonl"))
    answerer = Answerer(config.policies[0])
    answers = answerer([record])
    arrived = copy.copy(answerer)  # by __reduce__, as pickle does
    assert "model" not in vars(arrived.engine)
    assert arrived([record]) == answers
    grader = Grader(scoring(tmp_path).scorers[1])
    assert copy.copy(grader)([record]) == grader([record])
    assert grader([record])[0]["scores"] == [2.0]
    assert list(stages.RUNNERS) == ["local", "processes", "ray"]
