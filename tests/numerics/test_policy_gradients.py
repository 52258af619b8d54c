"""Policy gradients: the gradients of a plain autograd implementation, and trlX's random walks learnt by `iterate`."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_ppo_random_walks import LIMIT, NODES, Walks, build_tokenizer, fitted
from test_token_losses import LISTS, plain, settings

from rankalign.config import build
from rankalign.data.records import CandidateSet, write
from rankalign.models import tiny
from rankalign.recipes.iterate import IterateConfig, run
from rankalign.training.examples import Example
from rankalign.training.rank import RankTrainer

Rows = list[torch.Tensor]


def leave_one_out(scores: torch.Tensor) -> torch.Tensor:
    n = len(scores)
    return torch.stack([scores[i] - (scores.sum() - scores[i]) / (n - 1) for i in range(n)])


def standard(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean()) / (scores.std() + 1e-4)


def clip(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def rloo(policy: Rows, start: Rows, scores: torch.Tensor) -> torch.Tensor:
    return torch.stack([-a * p.sum() for a, p in zip(leave_one_out(scores), policy, strict=True)]).mean()


def rloo_kl(policy: Rows, start: Rows, scores: torch.Tensor) -> torch.Tensor:
    drift = torch.stack([(p - s).sum().detach() for p, s in zip(policy, start, strict=True)])
    return rloo(policy, start, scores - 0.05 * drift)


def grpo(policy: Rows, start: Rows, scores: torch.Tensor) -> torch.Tensor:
    return torch.stack([-a * p.mean() for a, p in zip(standard(scores), policy, strict=True)]).mean()


def dr_grpo(policy: Rows, start: Rows, scores: torch.Tensor) -> torch.Tensor:
    return torch.stack([-(r - scores.mean()) * p.sum() for r, p in zip(scores, policy, strict=True)]).mean()


def rloo_clipped(policy: Rows, start: Rows, scores: torch.Tensor) -> torch.Tensor:
    rows = zip(policy, start, leave_one_out(scores), strict=True)
    return torch.stack([clip((p - s.detach()).sum().exp(), a, 0.2, 0.2) for p, s, a in rows]).mean()


def gspo(policy: Rows, start: Rows, scores: torch.Tensor) -> torch.Tensor:
    rows = zip(policy, start, standard(scores), strict=True)
    return torch.stack([clip((p - s.detach()).mean().exp(), a, 3e-4, 4e-4) for p, s, a in rows]).mean()


PLAIN: dict[str, Callable[[Rows, Rows, torch.Tensor], torch.Tensor]] = {
    "rloo": rloo,
    "rloo_kl": rloo_kl,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo_clipped": rloo_clipped,
    "gspo": gspo,
}


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_those_of_plain_autograd(tmp_path: Path, name: str) -> None:
    """Every weight's, through transformers' logits of one response at a time; the reference a little elsewhere."""
    model, start = tiny.build_model().double(), tiny.build_model().double().eval()
    generator = torch.Generator().manual_seed(1)
    for weight in start.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    refs = [[row.detach() for row in plain(start, tokens)] for tokens in LISTS]
    values = [
        PLAIN[name](plain(model, tokens), rows, torch.tensor(tokens.scores, dtype=torch.float64))
        for tokens, rows in zip(LISTS, refs, strict=True)
    ]
    torch.stack(values).mean().backward()
    expected = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-4
    examples = [Example(t, torch.stack([r.sum() for r in rows])) for t, rows in zip(LISTS, refs, strict=True)]
    for layout, atol in (("padded", 1e-11), ("tree", 1e-6)):  # norms and angles of tree rows are fp32
        trainer = RankTrainer(model, settings(tmp_path, loss=name), examples, layout=layout)
        model.zero_grad()
        loss = trainer.training_step(model, {"examples": examples}, 2)
        torch.testing.assert_close(loss.double(), torch.stack(values).mean().detach(), atol=atol, rtol=0)
        for n, weight in model.named_parameters():
            if n in expected:
                torch.testing.assert_close(weight.grad, expected[n], atol=atol, rtol=1e-9, msg=f"{n}, {layout}")


REWARD = """
EDGES, SHORTEST = {edges!r}, {shortest!r}
def optimality(samples, prompts, outputs, **meta):
    found = []
    for text in (p + o for p, o in zip(prompts, outputs)):
        walk = [ord(c) - 97 for c in text]
        path = walk[: walk.index(0) + 1] if 0 in walk else []
        there = bool(path) and all(b in EDGES[a] for a, b in zip(path, path[1:]))
        found.append(({limit} - min(len(path), {limit})) / ({limit} - SHORTEST[path[0]]) if there else 0.0)
    return found
"""


def walked(tmp_path: Path, loss: str, seed: int, updates: int) -> list[float]:
    """Mean optimality of the walks before each update; 16 walks from every node that can arrive."""
    walks = Walks(1002)
    fitted(walks, seed).save_pretrained(tmp_path / "start")
    build_tokenizer().save_pretrained(tmp_path / "start")
    told = {"edges": walks.edges, "shortest": walks.shortest, "limit": LIMIT}
    (tmp_path / "reward.py").write_text(REWARD.format(**told))
    starts = [n for n in range(1, NODES) if walks.shortest[n] < LIMIT]
    write(tmp_path / "prompts.jsonl", [CandidateSet(f"from-{n}", string.ascii_lowercase[n], []) for n in starts])
    train = {"loss": loss, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    train |= {"per_device_train_batch_size": len(starts), "gradient_accumulation_steps": 1, "max_steps": updates}
    train |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "template": "raw", "token_budget": 1 << 16}
    content = {
        "output": str(tmp_path / "run"),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "model": str(tmp_path / "start"),
        "policies": [{"name": "walker", "n": 16, "max_new_tokens": LIMIT - 1, "template": "raw"}],
        "scorers": [{"name": "walk", "kind": "function", "function": f"{tmp_path}/reward.py:optimality"}],
        "judge": "walk",
        "refresh_every": 1,
        "seed": seed,
        "train": train,
    }
    result = run(build(IterateConfig, content, "walks"))
    return [row["mean_score"] for row in result["rounds"]]


@pytest.mark.parametrize("loss", ["rloo", "grpo"])
def test_walks_grow_shorter(tmp_path: Path, loss: str) -> None:
    found = walked(tmp_path, loss, 0, 12)
    print(f"{loss}: optimality {found[0]:.3f} -> {sum(found[-5:]) / 5:.3f}")
    assert found[0] < 0.7
    # Rounds of twenty prompts differ by 0.03, and by the processor's rounding: 0.9 is for the longer runs below.
    assert sum(found[-5:]) / 5 >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss", ["rloo", "grpo"])
def test_walks_reach_what_ppo_reaches(tmp_path: Path, loss: str, seed: int) -> None:
    found = walked(tmp_path, loss, seed, 24)
    print(f"{loss}, seed {seed}: optimality {found[0]:.3f} -> {sum(found[-5:]) / 5:.3f}")
    assert found[0] < 0.7
    assert sum(found[-5:]) / 5 >= 0.9
