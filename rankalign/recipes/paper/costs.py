"""What a row of the table takes: tokens by arithmetic from the files on disk, time and memory as measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankalign.data.encode import EncodeOptions, Encoder, encode_all, encode_prompt
from rankalign.data.records import CandidateSet
from rankalign.engines import Policy
from rankalign.storage.jsonl import read_rows
from rankalign.training.arguments import PPOConfig, TrainConfig, parse_settings
from rankalign.training.online import by_ratio
from rankalign.training.plan.on_card import has_second_copy


@dataclass
class Cost:
    """What making a row's model took, its answers to held-out prompts not counted.

    Attributes:
        seconds: wall time of sampling, scoring and training.
        peak_bytes: most memory of the process that trained; 0 where nothing was trained.
        sampled: tokens that models wrote.
        forward: tokens that went forward through a model: sampled ones with the prompts they answer, those of passes
            for the reference or for scoring, and trained ones. A prompt that several answers share counts once.
        backward: tokens that went backward.
    """

    seconds: float = 0.0
    peak_bytes: float = 0.0
    sampled: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


def add_sampling(cost: Cost, policy: Policy, sets: Sequence[CandidateSet], tokenizer: PreTrainedTokenizerBase) -> None:
    """Count what ``policy`` wrote into records that hold its answers; replayed answers cost nothing."""
    if policy.engine == "replay":
        return
    encoder = Encoder(tokenizer, EncodeOptions(template=policy.template, system=policy.system))
    for record in sets:
        own = [r for r in record.responses if r.policy == policy.name]
        prompt, answers = encoder.tokens(dataclasses.replace(record, responses=own))
        written = sum(len(ids) * response.count for ids, response in zip(answers, own, strict=True))
        cost.sampled += written
        cost.forward += written + (len(prompt) if own else 0)


def add_training(
    cost: Cost,
    config: TrainConfig,
    epochs: float,
    sets: Sequence[CandidateSet],
    tokenizer: PreTrainedTokenizerBase,
    passes: int = 0,
) -> None:
    """Count training on lists of candidates, one pass for the reference where the loss has one, and ``passes`` more."""
    options = EncodeOptions(judge=config.judge, template=config.template, max_length=config.max_length)
    lists, _ = encode_all(sets, tokenizer, options)
    tokens = sum(len(one.prompt) + sum(map(len, one.responses)) for one in lists)
    cost.forward += tokens * (epochs + config.loss_entry.needs_reference + passes)
    cost.backward += tokens * epochs


def add_rounds(
    cost: Cost,
    content: dict[str, Any],
    policies: Sequence[Policy],
    rounds: Sequence[Sequence[CandidateSet]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Count iterative or online training from the candidates of each round.

    Args:
        cost: is added to.
        content: settings of ``rankalign iterate``. A round of OP goes through its candidates once, one of IP as often
            as there are epochs; with a KL in the score, policy and start model read them all once more.
        policies: who answered.
        rounds: each round's records.
        tokenizer: of the model.
    """
    config = parse_settings({"judge": content["judge"], **content["train"]})
    epochs = 1.0 if content.get("refresh_every") else config.num_train_epochs
    for sets in rounds:
        for policy in policies:
            add_sampling(cost, policy, sets, tokenizer)
        add_training(cost, config, epochs, sets, tokenizer, passes=2 if content.get("kl_coef") else 0)


def add_ppo(
    cost: Cost, config: PPOConfig, log: Path, prompts: Sequence[CandidateSet], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Count PPO from its log: each answer is sampled, read by policy and reference, and goes through the updates.

    Prompts take turns, so their mean length stands for each answer's.
    """
    steps = [line for _, line in read_rows(log)]
    written = sum(line["response_tokens"] for line in steps) * config.rollouts
    lengths = [len(encode_prompt(tokenizer, p.prompt, config.template, config.system, p.meta)) for p in prompts]
    tokens = written + len(steps) * config.rollouts * sum(lengths) / len(lengths)
    cost.sampled += written
    cost.forward += tokens * (3 + config.ppo_epochs)  # 3: sampled, read by the policy, by the reference
    cost.backward += tokens * config.ppo_epochs


def models_in_memory(config: TrainConfig | PPOConfig, start: nn.Module, online: Mapping[str, Any] | None = None) -> int:
    """Language models that training holds at once, as the methods load them; an adapter is no second model.

    * Rank losses: the policy, and the start model beside it where the loss has a reference.
    * PPO: the policy; a frozen copy as the reference; a value network and a reward model where they are models
      (``value_model``, ``reward``). A value head is none.
    * Online sampling: the policy, and the start model where a KL is in the score or the loss has a reference that is
      not who wrote the answers.

    Args:
        config: of training.
        start: the start model.
        online: settings of ``rankalign iterate`` of a run that samples anew every few updates.
    """
    if isinstance(config, PPOConfig):
        reward = bool(config.reward) and ":" not in config.reward
        return 1 + (not config.use_lora) + bool(config.value_model) + reward
    if online is None:
        return 1 + has_second_copy(config, start)
    reference = config.loss_entry.needs_reference and not by_ratio(config.loss)
    return 1 + (not config.use_lora and bool(online.get("kl_coef") or reference))
