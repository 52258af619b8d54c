"""TRL's own code of policy gradients and of advantage regression, run on given log-probs as in :mod:`.trl_oracle`.

Advantages come from here, by the means and deviations of torch: TRL computes them while it samples.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from .trl_oracle import _bare, token_logps

# A folder of tests named vllm passes for the package, whose version TRL then cannot read.
with mock.patch("trl.import_utils.is_vllm_available", return_value=False):
    from trl import GRPOTrainer, RLOOTrainer
    from trl.experimental.a2po import A2POTrainer

ACCELERATOR = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)


def standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / (scores.std() + 1e-4)


def _inputs(logps: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs of the completions, and what a trainer wants to know of them beside."""
    tokens, mask = token_logps(logps, lengths)
    tokens, mask = tokens[:, 1:], mask[:, 2:]
    one = torch.ones(len(logps), 1, dtype=torch.long)
    return tokens, {
        "prompt_ids": one,
        "prompt_mask": one,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
    }


def _policy(trainer_class: type, tokens: Tensor, **attributes: object) -> object:
    trainer = _bare(trainer_class, **attributes)
    vars(trainer)["accelerator"] = ACCELERATOR
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (tokens, torch.zeros_like(tokens), None)
    return trainer


def rloo(logps: Tensor, old: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    """RLOOTrainer's loss of one prompt's answers; ``old`` are their log-probs at sampling."""
    tokens, inputs = _inputs(logps, lengths)
    trainer = _policy(RLOOTrainer, tokens, epsilon_low=0.2, epsilon_high=0.2)
    others = (scores.sum() - scores) / (len(scores) - 1)
    return trainer._compute_loss(trainer.model, {**inputs, "old_logps": old, "advantages": scores - others})


def grpo(
    logps: Tensor,
    lengths: Tensor,
    advantages: Tensor,
    loss_type: str,
    old: Tensor | None = None,
    max_tokens: int = 1,
    epsilon: tuple[float, float] = (0.2, 0.2),
) -> Tensor:
    """GRPOTrainer's loss of one prompt's answers; by ratios of whole responses where given log-probs at sampling."""
    tokens, inputs = _inputs(logps, lengths)
    trainer = _policy(
        GRPOTrainer,
        tokens,
        args=SimpleNamespace(delta=None),
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=epsilon[1],
        epsilon_low=epsilon[0],
        importance_sampling_level="token" if old is None else "sequence",
        loss_type=loss_type,
        max_completion_length=max_tokens,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )
    more = {} if old is None else {"old_per_token_logps": token_logps(old, lengths)[0][:, 1:]}
    return trainer._compute_loss(trainer.model, {**inputs, **more, "advantages": advantages})


def a2po(logps: Tensor, refs: Tensor, scores: Tensor, beta1: float, beta2: float) -> Tensor:
    """A2POTrainer's loss of one prompt's answers; the value is its formula, which it has where it samples."""
    trainer = _bare(A2POTrainer, args=SimpleNamespace(beta1=beta1, beta2=beta2))
    trainer._get_sequence_logps = lambda *_: logps
    value = beta1 * ((scores / beta1).exp().mean().log())
    inputs = {"input_ids": None, "attention_mask": None, "logits_to_keep": None, "ref_logps": refs}
    return trainer.compute_loss(trainer.model, {**inputs, "rewards": scores, "v_star": value.expand(len(scores))})
