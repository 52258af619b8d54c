"""TRL's own loss code, run on given log-probs.

TRL computes its DPO and KTO losses inside ``_compute_loss(model, inputs)``, which asks the model for token log-probs.
Here the trainer is a bare instance with the attributes that method reads, and the model hands out our log-probs, so the
arithmetic that runs is TRL's, in double precision, and its gradient comes back to our leaf.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PROMPT_TOKENS = 2
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda m: m
)


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Constants TRL builds with the default dtype, and its casts by ``.float()``, stay in double precision."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def token_logps(logps: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S-1) token log-probs, uneven within a response, that sum to ``logps``; and the (B, S) completion mask."""
    width = int(lengths.max())
    position = torch.arange(width)
    real = position < lengths.unsqueeze(1)
    share = real * (1.0 + position)
    share = share / share.sum(1, keepdim=True)
    prompt = torch.zeros(len(logps), PROMPT_TOKENS)
    tokens = torch.cat([prompt[:, 1:].to(logps.dtype), (share * logps.unsqueeze(1)).to(logps.dtype)], dim=1)
    return tokens, torch.cat([prompt, real], dim=1).long()


class GivenModel:
    """A model whose forward returns prepared token log-probs, chosen by the prompt's first token."""

    training, is_gradient_checkpointing = True, False
    _modules: ClassVar[dict[str, object]] = {}  # no part of it is compiled

    def __init__(self, *outputs: Tensor, log_squares: Tensor | None = None) -> None:
        self.outputs, self.log_squares = outputs, log_squares

    def __call__(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        log_probs = self.outputs[int(input_ids[0, 0])]
        zeros = torch.zeros_like(log_probs)
        squares = zeros if self.log_squares is None else self.log_squares
        return SimpleNamespace(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=squares
        )


def _bare(trainer_class: type, **attributes: object) -> object:
    trainer = trainer_class.__new__(trainer_class)
    common = {
        "accelerator": ACCELERATOR,
        "model": GivenModel(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
    }
    metrics = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}
    vars(trainer).update(common | metrics | attributes)
    return trainer


def dpo(logps: Tensor, refs: Tensor, lengths: Tensor, loss_type: str, *, beta: float, **config: object) -> Tensor:
    """Mean DPO loss of B pairs; inputs are (2B,), chosen first. ``loss_type`` may name several, joined by blanks."""
    settings = {"label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "tau": 0.05}
    settings["use_weighting"], squares = False, config.pop("log_squares", None)
    settings |= {"loss_weights": [1.0] * len(loss_type.split())} | config
    trainer = _bare(
        DPOTrainer,
        args=SimpleNamespace(discopop_tau=settings.pop("tau")),
        beta=beta,
        ld_alpha=None,
        loss_types=loss_type.split(),
        loss_weights=settings.pop("loss_weights"),
        **settings,
    )
    tokens, completion_mask = token_logps(logps, lengths)
    ref_chosen, ref_rejected = refs.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    even = None if squares is None else completion_mask[:, 1:] * (squares / lengths)[:, None]
    return trainer._compute_loss(GivenModel(tokens, log_squares=even), inputs, return_outputs=False)


def ld_dpo(tokens: Tensor, ref_tokens: Tensor, lengths: Tensor, alpha: float, beta: float = 0.1) -> Tensor:
    """Mean LD-DPO loss of B pairs from the log-probs (2B, T) of their tokens, chosen first."""
    trainer = _bare(
        DPOTrainer,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        beta=beta,
        ld_alpha=alpha,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        use_weighting=False,
        ref_model=GivenModel(_behind_prompt(ref_tokens)),
    )
    vars(trainer)["precompute_ref_logps"] = False
    _, completion_mask = token_logps(tokens.sum(1), lengths)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    return trainer._compute_loss(GivenModel(_behind_prompt(tokens)), inputs, return_outputs=False)


def _behind_prompt(tokens: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(tokens), PROMPT_TOKENS - 1), tokens], dim=1)


def kto(
    logps: Tensor, refs: Tensor, lengths: Tensor, desirable: Tensor, loss_type: str = "kto", **config: float
) -> tuple[Tensor, float]:
    """Mean KTO loss of B examples and the KL estimate that TRL made from its mismatched responses."""
    settings = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | config
    trainer = _bare(KTOTrainer, loss_type=loss_type, calculate_KL=loss_type == "kto", **settings)
    tokens, completion_mask = token_logps(logps, lengths)
    mismatched = logps.detach().roll(1) + torch.linspace(0, 1, len(logps))
    kl_tokens, kl_mask = token_logps(mismatched, lengths)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "KL_input_ids": torch.ones_like(kl_mask),
        "KL_attention_mask": torch.ones_like(kl_mask),
        "KL_completion_mask": kl_mask,
        "label": desirable,
        "ref_logps": refs,
        "ref_KL_logps": refs.roll(1),
    }
    loss = trainer._compute_loss(GivenModel(tokens, kl_tokens), inputs, return_outputs=False)
    return loss, trainer._metrics["train"]["kl"][-1]


def cpo(
    logps: Tensor, loss_type: str, *, beta: float, gamma: float = 0.0, alpha: float = 0.0, eps: float = 0.0
) -> Tensor:
    """Mean CPO, SimPO or AlphaPO loss of B pairs without its likelihood term; ``logps`` is (2B,), chosen first."""
    trainer = _bare(CPOTrainer, loss_type=loss_type, beta=beta, simpo_gamma=gamma, alpha=alpha, label_smoothing=eps)
    return trainer.cpo_loss(*logps.chunk(2))[0].mean()


def odds_ratio(mean_logps: Tensor) -> Tensor:
    """Mean ORPO odds-ratio loss of B pairs before its weight; ``mean_logps`` is (2B,), chosen first."""
    return -_bare(ORPOTrainer, beta=1.0).odds_ratio_loss(*mean_logps.chunk(2))[0].mean()


def from_logits(logits: Tensor, tokens: Tensor, lengths: Tensor, trainer_class: type, **config: object) -> Tensor:
    """Full loss of one pair, likelihood term included, by TRL's ``get_batch_loss_metrics``.

    Args:
        logits: (2, S, V), chosen first.
        tokens: (2, S) whose first token is the whole prompt: ORPO's likelihood runs over the prompt too, and a prompt
            of one token has nothing to predict.
        lengths: (2,) response lengths.
        trainer_class: CPOTrainer or ORPOTrainer.
        config: attributes of the trainer.
    """
    trainer = _bare(trainer_class, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **config)
    batch: dict[str, Tensor] = {}
    for row, side in enumerate(("chosen", "rejected")):
        end = 1 + int(lengths[row])
        ids = tokens[row : row + 1, :end]
        batch[f"{side}_input_ids"] = ids
        batch[f"{side}_attention_mask"] = torch.ones_like(ids)
        batch[f"{side}_labels"] = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)

    def model(input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=logits[:, : input_ids.shape[1]])

    return trainer.get_batch_loss_metrics(model, batch)[0]
