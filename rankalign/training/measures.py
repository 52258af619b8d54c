"""Names of what a measurement while training gives, known before one is made."""

from __future__ import annotations

import torch

from rankalign.errors import InputError
from rankalign.losses.ranked import Ranked
from rankalign.training.settings import LossSettings

# Of every loss, and what :class:`rankalign.evaluation.texts.while_training.Watch` adds.
FIGURES = ("loss", "ranking_accuracy", "accuracy_low", "accuracy_high", "margin")
WATCHED = ("win_rate", "win_rate_low", "win_rate_high", "repetition")
BY_PAIRS = ("ranking_accuracy", "accuracy_low", "accuracy_high", "margin", "reward_accuracy")


def measured_names(loss: LossSettings) -> set[str]:
    """What can pick the best checkpoint, without ``eval_``. The loss is tried once, with its keywords.

    Raises:
        InputError: a keyword that the loss does not have, or whose value it cannot take.
    """
    found, keywords = set(FIGURES), loss.keywords()
    if loss.grades:
        return found | {"mean_reward"}
    ranked = _two_answers()
    try:
        loss.entry.function(ranked, **keywords)
        parts = loss.entry.parts(ranked, **keywords)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"loss {loss.loss!r} cannot take {keywords}: {error}") from None
    return found | {"best_logp"} | set(parts) | ({"reward_accuracy"} if loss.entry.needs_reference else set())


def _two_answers() -> Ranked:
    logps = torch.tensor([[-2.0, -3.0]])
    true, lengths = torch.ones_like(logps, dtype=torch.bool), torch.tensor([[4, 5]])
    tokens = (logps / lengths)[:, :, None].expand(1, 2, 5)
    more = {"token_logps": tokens, "ref_token_logps": tokens - 0.1, "log_squares": logps, "ref_kls": -0.1 * logps}
    more["own"] = torch.tensor([[True, False]])
    return Ranked(logps, lengths, torch.tensor([[1.0, 0.0]]), true, logps - 0.5, torch.tensor([3]), **more)
