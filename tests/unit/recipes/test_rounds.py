"""The parts of iterative training: blocks of an online run, derived scores, divergence, seeds and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankalign.config import ScorerConfig, build
from rankalign.data.encode import EncodeOptions, Encoder, encode_prompt
from rankalign.data.records import CandidateSet, Response, write
from rankalign.engines import Policy
from rankalign.errors import InputError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.recipes.iterate import IterateConfig, run
from rankalign.recipes.rounds import STRIDE, Current, Divergence, Gatherer, is_current, kept, penalised, ranked_by
from rankalign.training.arguments import parse_settings
from rankalign.training.online import StartModel, blocks, plan

NOW = Current(3, 7, "f" * 64, model=object())


def settings(folder: Path, **more: Any) -> IterateConfig:
    write(folder / "prompts.jsonl", [CandidateSet("p0", "Say it.")])
    content = {
        "output": f"{folder}/run",
        "prompts": f"{folder}/prompts.jsonl",
        "policies": [{"name": "own"}],
        "scorers": [{"name": "length", "kind": "function", "function": "rankalign.scorers.builtin:words"}],
        "judge": "length",
        "model": "tiny",
        **more,
    }
    return build(IterateConfig, content, "test")


# --- blocks ------------------------------------------------------------------------------------------------------


def brute_blocks(prompts: int, per_update: int, updates: int, every: int) -> list[tuple[int, int, list[int]]]:
    """(step, updates, prompts) of each block, from a walk prompt by prompt."""
    walk: list[list[int]] = []
    while len(walk) < updates:
        left = list(range(prompts))
        while left:
            walk.append(left[:per_update])
            left = left[per_update:]
    walk = walk[:updates]
    found = []
    for start in range(0, updates, every):
        seen: list[int] = []
        for i in (i for update in walk[start : start + every] for i in update):
            if i not in seen:
                seen.append(i)
        found.append((start, len(walk[start : start + every]), seen))
    return found


@pytest.mark.parametrize("every", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(("prompts", "per_update", "updates"), [(8, 2, 8), (7, 3, 10), (5, 8, 4), (9, 4, 7)])
def test_blocks_walk_through_the_prompts_in_order(prompts: int, per_update: int, updates: int, every: int) -> None:
    found = list(blocks(prompts, per_update, updates, every))
    assert [(b.step, b.updates, b.prompts) for b in found] == brute_blocks(prompts, per_update, updates, every)
    assert [b.number for b in found] == list(range(1, len(found) + 1))


def test_answers_written_ahead_are_a_block_old() -> None:
    assert [(b.step, b.written) for b in blocks(10, 4, 7, 2)] == [(0, 0), (2, 2), (4, 4), (6, 6)]
    assert [(b.step, b.written) for b in blocks(10, 4, 7, 2, ahead=1)] == [(0, 0), (2, 0), (4, 2), (6, 4)]


def training(**more: Any) -> Any:
    return parse_settings({"use_cpu": True, "train_sampling_strategy": "sequential", **more})


def test_a_plan_has_as_many_updates_as_the_trainer_makes() -> None:
    config = training(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1.5)
    assert sum(block.updates for block in plan(config, 9, 2)) == 5  # ceil(1.5 * 3)
    assert sum(block.updates for block in plan(training(max_steps=7), 9, 2)) == 7


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"train_sampling_strategy": "random"}, "in order"),
        ({"dataloader_drop_last": True}, "every prompt"),
    ],
)
def test_what_an_online_run_cannot_have_is_refused(more: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        plan(training(**more), 4, 1)


# --- scores ------------------------------------------------------------------------------------------------------


def scored(rows: list[dict[str, float | None]]) -> CandidateSet:
    return CandidateSet("p", "x", [Response(f"t{i}", "own", scores=dict(row)) for i, row in enumerate(rows)])


def test_the_penalty_is_kl_coef_times_the_divergence() -> None:
    record = scored([{"s": 1.0, "kl": 3.0}, {"s": -2.0, "kl": -0.5}, {"s": None, "kl": 1.0}])
    assert penalised(record, "s", 0.25) == [0.25, -1.875, None]
    assert penalised(record, "s", 0.0) == [1.0, -2.0, None]


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_answers_at_or_above_the_quantile_are_kept(quantile: float) -> None:
    values = [0.5, 2.0, -1.0, 2.0, 7.0]
    border = np.quantile(values, quantile)
    record = scored([{"s": value} for value in [*values, None]])
    assert kept(record, "s", quantile) == [*(float(value >= border) for value in values), None]
    assert kept(scored([{"s": None}]), "s", quantile) == [None]


def test_the_highest_quantile_keeps_the_arg_max_alone() -> None:
    assert kept(scored([{"s": v} for v in (0.1, 0.7, 0.3)]), "s", 1.0) == [0, 1, 0]


def test_what_a_round_is_trained_by(tmp_path: Path) -> None:
    assert ranked_by(settings(tmp_path), 1) == "length"
    assert ranked_by(settings(tmp_path, kl_coef=0.1), 1) == "length-kl"
    both = settings(tmp_path, kl_coef=0.1, keep_above=[0.5, 0.9])
    assert ranked_by(both, 2) == "length-kl-top"


def by_hand(model: Any, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt) from the model's own logits, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(sum(row[token] for row, token in zip(rows, answer, strict=True)))


def test_the_divergence_is_a_difference_of_log_probabilities() -> None:
    tokenizer, start = models.load_tokenizer("tiny"), models.load_policy("tiny")
    policy = tiny.build_model()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.1)
    answers = [Response("yes", "own", finished=True), Response("n", "own", finished=False), Response("", "own")]
    answers[2].finished = False
    record = CandidateSet("p", "Say it.", answers)
    encoder = Encoder(tokenizer, EncodeOptions(judge="kl"))
    now = dataclasses.replace(NOW, model=policy)
    (found,) = Divergence(now, encoder, StartModel("tiny")).score([record])
    prompt = encode_prompt(tokenizer, "Say it.")
    for response, value in zip(answers[:2], found, strict=False):
        ids = tokenizer(response.text, add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * response.finished
        assert value == pytest.approx(by_hand(policy, prompt, ids) - by_hand(start, prompt, ids), abs=1e-4)
        assert abs(value or 0) > 1e-2
    assert found[2] == 0.0
    assert record.responses[0].scores == {}
    same = dataclasses.replace(NOW, model=start)
    assert Divergence(same, encoder, StartModel("tiny")).score([record]) == [[0.0, 0.0, 0.0]]


# --- policies ----------------------------------------------------------------------------------------------------


def test_only_the_trained_model_samples_with_the_weights_of_the_moment() -> None:
    assert is_current(Policy("a"))
    assert is_current(Policy("a", model="current", engine="vllm"))
    assert not is_current(Policy("a", model="tiny"))
    assert not is_current(Policy("a", engine="replay"))
    assert not is_current(Policy("a", engine="openai"))


def test_each_round_draws_its_own_numbers_for_the_trained_model_alone(tmp_path: Path) -> None:
    policies = [{"name": "own", "seed": 5}, {"name": "other", "model": "tiny", "seed": 5}]
    config = settings(tmp_path, policies=policies)
    gatherer = Gatherer(config, training().data_settings, StartModel("tiny"))
    own, other = (gatherer._placed(policy, NOW) for policy in config.policies)
    assert (own.sampling.seed, own.model) == (5 + 2 * STRIDE, "current")
    assert other == config.policies[1]
    first = gatherer._placed(config.policies[0], dataclasses.replace(NOW, number=1, folder="m", model=None))
    assert (first.sampling.seed, first.model) == (5, "m")


def test_what_stays_the_same_is_made_once(tmp_path: Path) -> None:
    config = settings(tmp_path, policies=[{"name": "own"}, {"name": "other", "model": "tiny"}])
    gatherer = Gatherer(config, training().data_settings, StartModel("tiny"))
    own, other = config.policies
    assert gatherer._answerer(NOW, other) is gatherer._answerer(NOW, other)
    assert gatherer._answerer(NOW, own) is not gatherer._answerer(NOW, own)
    assert gatherer._answerer(NOW, own).engine.model is NOW.model  # type: ignore[attr-defined]
    told = gatherer._describe(NOW, own)
    assert (told["model_sha256"], told["round"], told["step"]) == ("f" * 64, 3, 7)
    assert gatherer._describe(NOW, other)["model_sha256"] == models.weights_fingerprint(models.resolve("tiny"))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"judge": "rm"}, "none of the scorers"),
        ({"rounds": 0}, "rounds"),
        ({"refresh_every": -1}, "refresh_every"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"kl_coef": float("nan")}, "kl_coef"),
        ({"keep_above": [1.5]}, "quantiles"),
        ({"keep": "none"}, "unknown keep"),
        ({"ahead": 1}, "ahead is 0 or 1, and needs refresh_every"),
        ({"ahead": 2, "refresh_every": 2}, "ahead is 0 or 1"),
        ({"policies": [{"name": "a", "model": "tiny"}]}, "none samples"),
        ({"policies": [{"name": "a", "adapter": "x"}]}, "adapter"),
        ({"policies": [{"name": "a", "engine": "vllm"}], "refresh_every": 2}, "needs: pip install"),
        ({"prompts": "nowhere.jsonl"}, "no such file"),
        ({"train": {"method": "reward"}}, "method reward"),
        ({"train": {"method": "ppo"}}, "method ppo"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path: Path, more: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        run(settings(tmp_path, **more))
    assert not (tmp_path / "run").exists()


def test_the_name_of_the_divergence_is_taken(tmp_path: Path) -> None:
    config = settings(tmp_path, kl_coef=0.1)
    with pytest.raises(InputError, match="'kl' is taken"):
        run(dataclasses.replace(config, scorers=[*config.scorers, ScorerConfig("kl", "function")]))


def test_a_run_with_bad_settings_has_not_begun(tmp_path: Path) -> None:
    """So that mending them needs no --overwrite. What a begun one holds to: tests/faults/test_other_settings.py."""
    missing = [ScorerConfig("length", "function", {"function": "nosuch:f"})]
    with pytest.raises(InputError, match="'nosuch'"):
        run(dataclasses.replace(settings(tmp_path), scorers=missing))
    assert not (tmp_path / "run").exists()
