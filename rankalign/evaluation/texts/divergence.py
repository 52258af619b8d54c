"""How far a trained model went from its start: the KL divergence estimated on its own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rankalign.data.records import CandidateSet, by_id
from rankalign.errors import InputError
from rankalign.evaluation import EvalResult, Row
from rankalign.evaluation.statistics import mean_interval, ratio_interval

Draw = tuple[float, float, int]
"""Of one answer: log-probability under the policy, under the start model (nats, summed), and its tokens."""


def evaluate_divergence(
    policy: Any, start: Any, tokenizer: Any, sets: Sequence[CandidateSet], template: str = "auto", seed: int = 0
) -> EvalResult:
    """KL of the policy from its start model, on answers that the policy itself drew (at temperature 1).

    Args:
        policy: the trained model.
        start: the model it started from, with the same tokenizer.
        tokenizer: of both.
        sets: records answered by the policy; answers of somebody else, or greedy ones, estimate no KL.
        template: prompt format.
        seed: seed of the bootstrap over prompts.

    Returns:
        ``kl`` (nats a sequence) and ``kl_per_token``; see :func:`sequence_kl`. Answers without a token are counted.

    Raises:
        InputError: no answer has a token.
    """
    from rankalign.data.encode import EncodeOptions, Encoder
    from rankalign.rows.logps import list_logps

    encoder, draws, empty = Encoder(tokenizer, EncodeOptions(template=template)), {}, 0
    for record in by_id(sets).values():
        prompt, tokens = encoder.written(record)
        answers = [written for r, written in zip(record.responses, tokens, strict=True) for _ in range(r.count)]
        kept = [written for written in answers if written.learned]
        empty += len(answers) - len(kept)
        if kept:
            with torch.no_grad():
                ids, spans = [[w.ids for w in kept]], [[w.unlearned for w in kept]]
                both = [list_logps(model, [prompt], ids, unlearned=spans) for model in (policy, start)]
            sums = [values[0].double().tolist() for values in both]
            draws[record.id] = list(zip(*sums, [written.learned for written in kept], strict=True))
    result = sequence_kl(draws, seed)
    result.metrics["empty"] = float(empty)
    return result


def sequence_kl(draws: dict[str, list[Draw]], seed: int = 0) -> EvalResult:
    """``E log(policy(y) / start(y))`` over answers y drawn from the policy, unbiased; mean over prompts.

    ``kl_per_token`` is the sum of the log-ratios over that of the tokens. A small sample may come out below 0, which a
    divergence cannot be.

    Raises:
        InputError: there is no answer.
    """
    if not draws:
        raise InputError("no answer has a token, so there is nothing to estimate a divergence from")
    rows: list[Row] = []
    for ident, own in draws.items():
        ratios = [policy - start for policy, start, _ in own]
        rows.append({"id": ident, "kl": sum(ratios) / len(own), "sum": sum(ratios), "tokens": sum(n for *_, n in own)})
    found = {
        "kl": mean_interval([row["kl"] for row in rows], seed=seed),
        "kl_per_token": ratio_interval([row["sum"] for row in rows], [row["tokens"] for row in rows], seed=seed),
    }
    metrics = {name: estimate.value for name, estimate in found.items()}
    return EvalResult(metrics, len(rows), {name: estimate.interval for name, estimate in found.items()}, rows)
