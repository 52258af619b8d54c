"""The random walks of trlX (Carper AI 2022; after Chen et al. 2021, section 3): shortest paths learnt from rewards.

A directed graph of 21 nodes, named by letters, of which the first is the goal. A model is fitted to walks that wander
at random, then PPO rewards walks for being short. Optimality of a walk is 1 for a shortest path and 0 for one that is
not shorter than the limit, uses an edge that is not there, or never arrives.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankalign.data.records import CandidateSet
from rankalign.recipes.rollouts import sampler_of
from rankalign.training.arguments import PPOConfig, parse_settings
from rankalign.training.ppo.trainer import PPOTrainer, Question
from rankalign.training.ppo.value import ActorCritic

NODES, LIMIT, WALKS, EDGE = 21, 10, 1000, 0.1
GOAL, PAD, END = 0, NODES, NODES + 1


class Walks:
    """A random graph, walks on it, and how good a walk is.

    Args:
        seed: of graph and walks; a node with no edge out gets one.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        others = [[n for n in range(NODES) if n != node] for node in range(NODES)]
        self.edges = [{n for n in rest if self._rng.random() < EDGE} or {self._rng.choice(rest)} for rest in others]

    def walk(self) -> list[int]:
        """One that wanders from anywhere but the goal until it arrives or has ``LIMIT`` nodes."""
        nodes = [self._rng.randrange(1, NODES)]
        while nodes[-1] != GOAL and len(nodes) < LIMIT:
            nodes.append(self._rng.choice(sorted(self.edges[nodes[-1]])))
        return nodes

    @cached_property
    def shortest(self) -> list[int]:
        """Nodes on the shortest path from each node to the goal, both counted; ``LIMIT`` where none is that short."""
        found = [LIMIT] * NODES
        found[GOAL] = 1
        for _ in range(NODES):
            found = [1 if n == GOAL else min(LIMIT, 1 + min(found[m] for m in self.edges[n])) for n in range(NODES)]
        return found

    def optimality(self, walk: Sequence[int]) -> float:
        """From 0 to 1."""
        if GOAL not in walk:
            return 0.0
        path = list(walk[: walk.index(GOAL) + 1])
        if any(b not in self.edges[a] for a, b in pairwise(path)):
            return 0.0
        return (LIMIT - min(len(path), LIMIT)) / (LIMIT - self.shortest[path[0]])


class WalkReward:
    """Optimality as a reward."""

    def __init__(self, walks: Walks) -> None:
        self.walks = walks

    def __call__(self, sets: Sequence[CandidateSet]) -> list[Any]:
        texts = [str(record.prompt) + record.responses[0].text for record in sets]
        return [self.walks.optimality([string.ascii_lowercase.index(c) for c in text]) for text in texts]

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "random walks"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [*string.ascii_lowercase[:NODES], "<pad>", "<end>"]
    backend = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


def fitted(walks: Walks, seed: int, steps: int = 200) -> LlamaForCausalLM:
    """A small model of the walks, goal or not, each closed by an end."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=NODES + 2, max_position_embeddings=32, **shape, **ends))
    rows = [[*walk, END] for walk in (walks.walk() for _ in range(WALKS))]
    ids = torch.tensor([row + [PAD] * (LIMIT + 1 - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = ids[torch.randint(WALKS, (100,))]
        loss = model(batch, labels=batch.masked_fill(batch == PAD, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trainer_of(tmp_path: Path, seed: int, steps: int) -> PPOTrainer:
    walks, tokenizer = Walks(1002), build_tokenizer()
    model = fitted(walks, seed)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"method": "ppo", "model": str(tmp_path), "data": "-", "reward": "a:b", "template": "raw", "seed": seed}
    settings |= {"rollouts": 128, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "use_cpu": True}
    settings |= {"max_new_tokens": LIMIT - 1, "learning_rate": 3e-4, "lr_scheduler_type": "constant"}
    settings |= {"kl_coef": 0.0, "vf_coef": 0.5, "warmup_steps": 0, "max_steps": steps, "output_dir": str(tmp_path)}
    config = parse_settings(settings)
    assert isinstance(config, PPOConfig)
    starts = [n for n in range(1, NODES) if walks.shortest[n] < LIMIT]
    questions = [Question(CandidateSet(f"from-{n}", string.ascii_lowercase[n]), [n]) for n in starts]
    return PPOTrainer(ActorCritic(model), questions, config, sampler_of(config), WalkReward(walks))


def test_optimality_by_hand() -> None:
    walks = Walks(0)
    walks.edges = [{1}, {0, 2}, {1, 3}, {2, 0}, *({3} for _ in range(4, NODES))]
    assert walks.shortest[:5] == [1, 2, 3, 2, 3]
    assert walks.optimality([2, 1, 0]) == walks.optimality([2, 3, 0]) == 1.0
    assert walks.optimality([2, 1, 2, 1, 0, 7]) == pytest.approx(5 / 7)  # five nodes in the place of three, of ten
    assert walks.optimality([2, 0]) == walks.optimality([2, 1, 2]) == 0.0
    assert walks.optimality([4, 3, 2, 3, 2, 3, 2, 3, 2, 1, 0]) == 0.0


def test_walks_keep_to_the_graph() -> None:
    walks = Walks(1002)
    found = [walks.walk() for _ in range(200)]
    assert all(b in walks.edges[a] for walk in found for a, b in pairwise(walk))
    assert all(walk[-1] == GOAL or len(walk) == LIMIT for walk in found)
    tokenizer = build_tokenizer()
    assert tokenizer("bac")["input_ids"] == [1, 0, 2]
    assert tokenizer.decode([1, 0, 2, END], skip_special_tokens=True) == "bac"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_shortens_random_walks(tmp_path: Path, seed: int) -> None:
    trainer = trainer_of(tmp_path, seed, steps=60)
    rewards = [trainer.iterate()["reward"] for _ in range(60)]
    print(f"seed {seed}: optimality {rewards[0]:.3f} -> {sum(rewards[-5:]) / 5:.3f}")
    assert rewards[0] < 0.7
    assert sum(rewards[-5:]) / 5 >= 0.9
