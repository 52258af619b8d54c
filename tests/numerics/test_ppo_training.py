"""The PPO loop against arithmetic written out apart from it: first ratios, one update, references, rewards, resume."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankalign.data.records import CandidateSet, Response, write
from rankalign.errors import InputError, RecordError
from rankalign.models import load as models
from rankalign.models import tiny
from rankalign.recipes.rollouts import ScorerReward, reward_of, sampler_of
from rankalign.scorers.function import FunctionScorer
from rankalign.storage.files import sha256_file
from rankalign.training.arguments import PPOConfig, parse_settings
from rankalign.training.ppo import math as ppo_math
from rankalign.training.ppo.run import load_actor, load_questions, train_ppo
from rankalign.training.ppo.trainer import PPOTrainer, Question, Rollouts
from rankalign.training.ppo.value import ActorCritic

TOKENIZER = tiny.build_tokenizer()
PROMPTS = [CandidateSet(f"p{i}", "say " + "x" * i) for i in range(5)]


class Early:
    """A reward that wants letters from the first half of the alphabet; None for answers that hold a digit."""

    def __call__(self, sets: Sequence[CandidateSet]) -> list[Any]:
        return [self.grade(record.responses[0].text) for record in sets]

    @staticmethod
    def grade(text: str) -> float | None:
        return None if any(c.isdigit() for c in text) else sum(c.lower() < "n" for c in text) / 4

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "early"}


def settings(tmp_path: Path, **more: Any) -> PPOConfig:
    write(tmp_path / "prompts.jsonl", PROMPTS)
    fixed = {"method": "ppo", "model": "tiny", "reward": "a:b", "data": str(tmp_path / "prompts.jsonl")}
    fixed |= {"output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "template": "raw"}
    fixed |= {"rollouts": 16, "max_new_tokens": 6, "max_length": 40, "warmup_steps": 0, "max_steps": 4}
    config = parse_settings({**fixed, **more})
    assert isinstance(config, PPOConfig)
    return config


def trainer_of(config: PPOConfig, reward: Any = None) -> PPOTrainer:
    torch.manual_seed(0)
    questions, _ = load_questions(config, TOKENIZER)
    return PPOTrainer(load_actor(config, questions), questions, config, sampler_of(config), reward or Early())


def one_by_one(policy: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a response's tokens from the model's own logits, no batch, no padding, no cache."""
    logps = (policy(torch.tensor([prompt + response])).logits[0] / temperature).log_softmax(-1)
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(response)])


def values_one_by_one(actor: ActorCritic, prompt: list[int], response: list[int]) -> Tensor:
    policy: Any = actor.policy
    states = policy(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0]
    assert actor.value_head is not None
    values: Tensor = actor.value_head(states[len(prompt) - 1 : -1])
    return values


# --- actor and critic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_values_are_those_of_one_response_at_a_time(layout: str, temperature: float) -> None:
    actor = ActorCritic(tiny.build_model(), None, layout, temperature)
    assert actor.value_head is not None
    torch.nn.init.normal_(actor.value_head.down.weight, generator=torch.Generator().manual_seed(0))
    prompts, responses = [[1, 40, 41], [1, 50]], [[60, 61, 2], [70, 71, 72, 73]]
    logps, values = actor(prompts, responses)
    pairs = list(zip(prompts, responses, strict=True))
    wanted = torch.cat([one_by_one(actor.policy, p, r, temperature) for p, r in pairs])
    torch.testing.assert_close(logps, wanted, rtol=0, atol=2e-6)
    wanted = torch.cat([values_one_by_one(actor, p, r) for p, r in pairs])
    torch.testing.assert_close(values, wanted, rtol=0, atol=2e-6)


def test_values_move_the_trunk_where_log_probabilities_do_not() -> None:
    """Rows may leave out responses to which the head sends no gradient; values have gradients of their own."""
    prompts, responses = [[1, 40, 41], [1, 50]], [[60, 61, 2], [70, 71, 72, 73]]

    def gradients(flat: Callable[[ActorCritic], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        actor = ActorCritic(tiny.build_model().double(), None, "tree")
        assert actor.value_head is not None
        actor.value_head.double()
        for layer in (actor.value_head.up, actor.value_head.down):
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        logps, values = flat(actor)
        (logps[:3].sum() + values[4:].square().sum()).backward()
        return {name: p.grad for name, p in actor.named_parameters() if p.grad is not None}

    def apart(actor: ActorCritic) -> tuple[Tensor, Tensor]:
        pairs = list(zip(prompts, responses, strict=True))
        logps = torch.cat([one_by_one(actor.policy, p, r) for p, r in pairs])
        return logps, torch.cat([values_one_by_one(actor, p, r) for p, r in pairs])

    found, wanted = gradients(lambda actor: actor(prompts, responses)), gradients(apart)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9, msg=name)


def referred(trainer: PPOTrainer, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    with trainer.reference.policy() as policy:
        return trainer.reference.logps(policy, prompts, responses)


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_start_model_before_and_after_training(tmp_path: Path, lora: bool) -> None:
    trainer = trainer_of(settings(tmp_path, use_lora=lora, learning_rate=1e-2, max_steps=2))
    start, ids = tiny.build_model(), torch.tensor([[1, 40, 41, 42, 60]])
    prompts, responses = [[1, 40, 41]], [[42, 60, 2]]
    wanted, first = start(ids).logits, referred(trainer, prompts, responses)
    for _ in range(3):
        with trainer.reference.policy() as policy:
            assert torch.equal(policy(ids).logits, wanted)
        assert torch.equal(referred(trainer, prompts, responses), first)
        trainer.iterate()
    torch.testing.assert_close(first, one_by_one(start, prompts[0], responses[0]), rtol=0, atol=2e-6)
    trained: Any = trainer.actor.policy
    assert float((trained(ids).logits - wanted).detach().abs().max()) > 1e-2
    assert trainer.reference.shared == lora  # one model in memory, or two


def test_a_value_net_of_its_own_leaves_the_policy_alone(tmp_path: Path) -> None:
    config = settings(tmp_path, value_model="tiny-rm")
    actor = trainer_of(config).actor
    prompts, responses = [[1, 40, 41], [1, 50]], [[60, 61, 2], [70, 71]]
    _, values = actor(prompts, responses)
    net: Any = tiny.build_tiny_reward_model()
    wanted = [
        float(net(torch.tensor([p + r[:t]])).logits[0, 0])  # its own forward reads the last token
        for p, r in zip(prompts, responses, strict=True)
        for t in range(len(r))
    ]
    assert values.tolist() == pytest.approx(wanted, abs=2e-6)
    values.sum().backward()
    assert all(p.grad is None for p in actor.policy.parameters())
    assert actor.value_head is None


# --- rollouts ----------------------------------------------------------------------------------------------------


def test_every_prompt_is_drawn_once_an_epoch_in_an_order_of_its_own(tmp_path: Path) -> None:
    trainer = trainer_of(settings(tmp_path, rollouts=10))
    drawn = [(q.record.id, number) for step in (0, 1) for q, number in trainer.draws(step)]
    assert [number for _, number in drawn] == list(range(20))
    epochs = [[ident for ident, _ in drawn[start : start + 5]] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == ["p0", "p1", "p2", "p3", "p4"] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_an_answer_does_not_depend_on_its_batch_mates(tmp_path: Path) -> None:
    config = settings(tmp_path)
    sampler, model = sampler_of(config), tiny.build_model()
    prompts, keys = [[1, 40], [1, 50, 51, 52], [1, 60, 61]], [("a", 0), ("b", 1), ("c", 2)]
    together = sampler(model, prompts, keys)
    assert together == [sampler(model, [p], [k])[0] for p, k in zip(prompts, keys, strict=True)]
    assert sampler(model, prompts[:1], [("a", 7)]) != together[:1]
    for answer in together:
        assert answer.finished == (answer.ids[-1] == 2)
        assert len(answer.ids) == 6 or answer.finished


@pytest.mark.parametrize(("lora", "layout"), [(False, "tree"), (True, "tree"), (False, "padded")])
def test_the_first_ratio_is_exactly_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool, layout: str
) -> None:
    trainer = trainer_of(settings(tmp_path, use_lora=lora, layout=layout, learning_rate=1e-2))
    seen: list[Tensor] = []
    plain = ppo_math.policy_loss

    def watched(logps: Tensor, old: Tensor, *more: Any) -> Any:
        seen.append((logps - old).exp().detach())
        return plain(logps, old, *more)

    monkeypatch.setattr(ppo_math, "policy_loss", watched)
    for _ in range(2):
        seen.clear()
        trainer.iterate()
        assert bool((seen[0] == 1).all())
        assert bool((seen[1] == 1).all())  # the second micro-batch of the first update
        assert not bool((seen[2] == 1).all())  # the policy has moved
    assert len(seen) == 2 * 4  # two micro-batches of eight, four epochs


def test_whitened_advantages_and_returns_are_those_of_the_definition(tmp_path: Path) -> None:
    trainer = trainer_of(settings(tmp_path, kl_coef=0.3, gamma=0.9, gae_lambda=0.8, learning_rate=1e-2))
    trainer.iterate()  # so that policy and reference, and values and zero, differ
    trainer.actor.eval()
    rollouts, line = trainer._collect()
    start, kls, everything = tiny.build_model(), [], []
    for prompt, ids in zip(rollouts.prompts, rollouts.responses, strict=True):
        score = Early.grade(TOKENIZER.decode([i for i in ids if i != 2], skip_special_tokens=True))
        if score is None:
            continue
        with torch.no_grad():
            kl = (one_by_one(trainer.actor.policy, prompt, ids) - one_by_one(start, prompt, ids)).double()
            values = [*values_one_by_one(trainer.actor, prompt, ids).tolist(), 0.0]
        rewards = [-0.3 * k for k in kl.tolist()]
        rewards[-1] += score
        deltas = [r + 0.9 * values[t + 1] - values[t] for t, r in enumerate(rewards)]
        everything += [sum(0.72 ** (k - t) * deltas[k] for k in range(t, len(ids))) for t in range(len(ids))]
        kls.append(float(kl.sum()))
    mean = sum(everything) / len(everything)
    std = math.sqrt(sum((a - mean) ** 2 for a in everything) / len(everything))
    found = rollouts.advantages[rollouts.mask].tolist()
    assert found == pytest.approx([(a - mean) / std for a in everything], abs=2e-4)
    assert line["kl"] == pytest.approx(sum(kls) / len(kls), abs=2e-5)
    assert line["scored"] == pytest.approx(len(kls) / 16)


# --- updates -----------------------------------------------------------------------------------------------------


def plain_update(trainer: PPOTrainer, r: Rollouts, rate: float) -> dict[str, Tensor]:
    """Parameters after one SGD step on the loss in plain loops, over the tokens of all scored responses."""
    total, count = torch.zeros(()), 0
    for b, (prompt, ids) in enumerate(zip(r.prompts, r.responses, strict=True)):
        if not r.mask[b].any():
            continue
        logps, values = one_by_one(trainer.actor.policy, prompt, ids), values_one_by_one(trainer.actor, prompt, ids)
        for t in range(len(ids)):
            ratio, advantage = (logps[t] - r.logps[b, t]).exp(), r.advantages[b, t]
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            near = r.values[b, t] + (values[t] - r.values[b, t]).clamp(-0.2, 0.2)
            errors = torch.stack([(values[t] - r.returns[b, t]) ** 2, (near - r.returns[b, t]) ** 2])
            total = total + 0.5 * 0.5 * errors.max()
            count += 1
    named = dict(trainer.actor.named_parameters())
    gradients = torch.autograd.grad(total / count, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), gradients, strict=True)
    return {name: (p - rate * (0.0 if g is None else g)).detach() for (name, p), g in pairs}


@pytest.mark.parametrize("size", [16, 4])
def test_one_update_is_the_loss_in_plain_loops(tmp_path: Path, size: int) -> None:
    more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size, "vf_coef": 0.5}
    more |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = trainer_of(settings(tmp_path, ppo_epochs=1, **more))
    trainer.iterate()  # values leave zero
    trainer.actor.eval()
    rollouts, _ = trainer._collect()
    assert not rollouts.mask.any(1).all(), "an unscored response must be among them"
    # As if the policy had moved since, so that clips are active.
    shift = 0.5 * torch.randn(rollouts.logps.shape, generator=torch.Generator().manual_seed(0))
    rollouts = dataclasses.replace(rollouts, logps=rollouts.logps + shift, values=rollouts.values + shift)
    wanted = plain_update(trainer, rollouts, 0.1)
    line = trainer._update(rollouts)
    for name, p in trainer.actor.named_parameters():
        torch.testing.assert_close(p.detach(), wanted[name], rtol=0, atol=3e-6, msg=name)
    assert 0.1 < line["clip_fraction"] < 0.9
    assert 0.1 < line["value_clip_fraction"] < 0.9


def test_gradients_are_clipped_after_they_are_there(tmp_path: Path) -> None:
    more = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e-3}
    trainer = trainer_of(settings(tmp_path, ppo_epochs=1, **more))
    before = [p.detach().clone() for p in trainer.parameters]
    line = trainer.iterate()
    moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(trainer.parameters, before, strict=True))
    assert line["grad_norm"] > 1e-2
    assert math.sqrt(moved) == pytest.approx(1e-3, rel=1e-2)


def test_the_controller_moves_by_the_measured_kl(tmp_path: Path) -> None:
    trainer = trainer_of(settings(tmp_path, kl_coef=0.1, kl_target=0.001, kl_horizon=100, learning_rate=1e-2))
    lines = [trainer.iterate() for _ in range(3)]
    for now, then in itertools.pairwise(lines):
        error = min(max(now["kl"] / 0.001 - 1, -0.2), 0.2)
        assert then["kl_coef"] == pytest.approx(now["kl_coef"] * (1 + error * 16 / 100), rel=1e-12)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)


# --- rewards -----------------------------------------------------------------------------------------------------


def answers(*texts: str) -> list[CandidateSet]:
    return [CandidateSet(f"p{i}", f"prompt {i}", [Response(text)], {"n": i}) for i, text in enumerate(texts)]


def test_other_reward_weights_give_other_rewards_and_another_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    found, hashes = [], []
    for name, scale in (("one", 1.0), ("two", -2.0)):
        net = tiny.build_tiny_reward_model()
        net.score.weight.data *= scale
        net.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
        config = settings(tmp_path, reward=str(tmp_path / name), max_steps=1, output_dir=str(tmp_path / f"run-{name}"))
        reward = reward_of(config)
        found.append(reward(answers("hello", "bye")))
        train_ppo(config, sampler_of(config), reward)
        assert models.weights_fingerprint(net) in (told := capsys.readouterr().err)
        assert models.weights_fingerprint(tiny.build_model()) in told
        hashes.append(reward.fingerprint()["weights"])
    assert found[1] == pytest.approx([-2.0 * float(x) for x in found[0]], rel=1e-4)  # type: ignore[arg-type]
    assert hashes[0] != hashes[1]
    lines = [json.loads((tmp_path / f"run-{name}" / "log.jsonl").read_text()) for name in ("one", "two")]
    assert lines[1]["reward"] == pytest.approx(-2.0 * lines[0]["reward"], rel=1e-4)


def test_reward_functions_follow_trlx(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def whole(samples, prompts, outputs, **metadata):\n"
        "    assert samples == [p + o for p, o in zip(prompts, outputs)]\n"
        "    return [len(o) + n for o, n in zip(outputs, metadata['n'])]\n"
        "def dense(samples, outputs, tokenizer, **metadata):\n"
        "    return [[0.5] * len(tokenizer(o, add_special_tokens=False)['input_ids']) for o in outputs]\n"
        "def short(samples):\n"
        "    return [None for s in samples]\n"
    )

    def graded(name: str) -> list[Any]:
        config = settings(tmp_path, reward=f"{tmp_path}/rewards.py:{name}")
        return reward_of(config)(answers("hello", "bye"))

    assert graded("whole") == [5.0, 4.0]
    assert graded("dense") == [[0.5] * 5, [0.5] * 3]
    assert graded("short") == [None, None]
    scorer = FunctionScorer(
        "f",
        f"{tmp_path}/rewards.py:dense",
    )
    scorer.tokenizer = TOKENIZER
    assert scorer.score(answers("hello", "bye")) == [[2.5], [1.5]]
    assert ScorerReward(scorer).fingerprint()["sha256"] == sha256_file(tmp_path / "rewards.py")


def test_the_baseline_is_the_score_of_the_same_prompts_answer(tmp_path: Path) -> None:
    config = settings(tmp_path, reward_baseline="human", clip_reward=0.0)
    for i, record in enumerate(PROMPTS):
        record.responses = [Response("a" * i, "human"), Response("zzz", "other")]
    try:
        questions = [Question(record, [1, 40]) for record in PROMPTS]
        actor = ActorCritic(tiny.build_model())
        trainer = PPOTrainer(actor, questions, config, sampler_of(config), Early())
        assert trainer.baseline == {f"p{i}": i / 4 for i in range(5)}
        assert trainer._scaled([i / 4 for i in range(5)], questions) == [0.0] * 5
        PROMPTS[3].responses.pop(0)
        with pytest.raises(InputError, match="1 prompts have no response"):
            PPOTrainer(actor, questions, config, sampler_of(config), Early())
    finally:
        for record in PROMPTS:
            record.responses = []


@pytest.mark.parametrize(("kind", "divisors"), [("none", [1, 1]), ("running", [2, math.sqrt(14)]), ("ref", [2, 2])])
def test_scaling_of_scores(tmp_path: Path, kind: str, divisors: list[float]) -> None:
    trainer = trainer_of(settings(tmp_path, scale_rewards=kind, clip_reward=1.0))
    questions = [trainer.questions[0]] * 3
    for scores, divisor in zip(([1.0, 5.0, None], [9.0, 9.0, 0.5 * 12]), divisors, strict=True):
        found = trainer._scaled(scores, questions)
        wanted = [0.0 if s is None else min(s / divisor, 1.0) for s in scores]
        if kind == "running" and scores[2] is not None:
            seen = [1.0, 5.0, 9.0, 9.0, 6.0]
            std = math.sqrt(sum((x - 6.0) ** 2 for x in seen) / 5)
            wanted = [min(s / std, 1.0) for s in scores if s is not None]
        assert found == pytest.approx(wanted)


def test_a_step_without_any_score_stops(tmp_path: Path) -> None:
    class Silent(Early):
        def __call__(self, sets: Sequence[CandidateSet]) -> list[Any]:
            return [None] * len(sets)

    with pytest.raises(InputError, match="no answer"):
        trainer_of(settings(tmp_path), Silent()).iterate()


# --- whole runs --------------------------------------------------------------------------------------------------


def weights_and_log(folder: Path) -> dict[str, str]:
    names = ("model.safetensors", "adapter_model.safetensors", "value_head.safetensors", "log.jsonl")
    return {name: sha256_file(folder / name) for name in names if (folder / name).exists()}


class Breaking(Early):
    """Early, until it has been called so many times."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, sets: Sequence[CandidateSet]) -> list[Any]:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("the machine was switched off")
        return super().__call__(sets)


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, lora: bool) -> None:
    more = {"max_steps": 5, "save_steps": 2, "save_total_limit": 1, "use_lora": lora, "learning_rate": 1e-2}
    more |= {"kl_target": 0.01, "scale_rewards": "running"}
    whole = settings(tmp_path, output_dir=str(tmp_path / "whole"), **more)
    train_ppo(whole, sampler_of(whole), Early())
    parts = settings(tmp_path, output_dir=str(tmp_path / "parts"), **more)
    for calls in (3, 1, 0):  # stops in step 4, again in step 4, again in step 3 of those left
        with pytest.raises(RuntimeError, match="switched off"):
            train_ppo(parts, sampler_of(parts), Breaking(calls))
    with pytest.raises(InputError, match="other settings"):
        train_ppo(dataclasses.replace(parts, kl_coef=0.5), sampler_of(parts), Early())
    result = train_ppo(parts, sampler_of(parts), Early())
    assert result["steps"] == 5
    assert weights_and_log(tmp_path / "parts") == weights_and_log(tmp_path / "whole")
    assert len(weights_and_log(tmp_path / "whole")) == 3
    assert [p.name for p in sorted((tmp_path / "parts").glob("checkpoint-*"))] == ["checkpoint-4"]
    assert train_ppo(parts, sampler_of(parts), Early())["already_finished"]


def test_what_is_left_loads_without_us(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = settings(tmp_path, max_steps=1, learning_rate=1e-2)
    train_ppo(config, sampler_of(config), Early())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert models.weights_fingerprint(saved) != models.weights_fingerprint(tiny.build_model())
    listed = json.loads((tmp_path / "run" / "manifest.json").read_text())["outputs"]
    assert {Path(name).name for name in listed} >= {"model.safetensors", "value_head.safetensors", "log.jsonl"}


def test_an_adapter_cannot_be_the_start(tmp_path: Path) -> None:
    config = settings(tmp_path, max_steps=1, use_lora=True)
    train_ppo(config, sampler_of(config), Early())
    again = settings(tmp_path, model=str(tmp_path / "run"))
    with pytest.raises(InputError, match="is an adapter"):
        load_actor(again, [])


def test_it_learns_to_write_early_letters(tmp_path: Path) -> None:
    more = {"max_steps": 12, "rollouts": 64, "learning_rate": 1e-2, "per_device_train_batch_size": 32}
    more |= {"gradient_accumulation_steps": 1, "kl_coef": 0.0, "max_new_tokens": 4, "lr_scheduler_type": "constant"}
    trainer = trainer_of(settings(tmp_path, **more))
    lines = [trainer.iterate() for _ in range(12)]

    def interval(some: list[dict[str, float]]) -> tuple[float, float]:
        """Mean reward and half of its 95 % interval."""
        mean = sum(line["reward"] for line in some) / len(some)
        return mean, 1.96 * math.sqrt(sum(line["reward_std"] ** 2 for line in some) / len(some) / (len(some) * 64))

    (first, wide), (last, narrow) = interval(lines[:2]), interval(lines[-2:])
    assert last - narrow > first + wide + 0.2


def test_a_long_prompt_keeps_its_start_and_a_refused_one_is_named_or_left_out(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "the sea " * 30}, {"id": "b", "prompt": [{"role": "tool", "content": "x"}]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PPOConfig(data=str(path), output_dir=str(tmp_path), max_length=64, max_new_tokens=8, reward="tiny-rm")
    picky = copy.deepcopy(TOKENIZER)
    picky.chat_template = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + str(
        TOKENIZER.chat_template
    )
    with pytest.raises(RecordError, match=r"prompts\.jsonl:2: prompt: record 'b': .* no tools"):
        load_questions(config, picky)
    config.skip_invalid = True
    questions, counts = load_questions(config, picky)
    text = picky.decode(questions[0].tokens)
    assert len(questions[0].tokens) == 56
    assert text.startswith("<|bos|><|user|>\n")
    assert text.endswith("sea <|eos|>\n<|assistant|>\n")
    assert (counts["prompts"], counts["prompt_truncated"], counts["skipped_invalid"]) == (1, 1, 1)
