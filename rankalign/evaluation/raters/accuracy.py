"""Does a judge order pairs as the truth does? Accuracy of reward models, and of policies read as reward models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from rankalign.data.records import CandidateSet
from rankalign.errors import InputError
from rankalign.evaluation import EvalResult, Row
from rankalign.evaluation.statistics import ratio_interval


def evaluate_agreement(sets: Sequence[CandidateSet], judge: str, truth: str, seed: int = 0) -> EvalResult:
    """Share of pairs that ``judge`` orders as ``truth`` does.

    A pair counts where the truth is strict and both responses have both scores. ``accuracy`` asks for a strictly higher
    score of the better response, as reward-model accuracies are published; ``ties`` is the share the judge scores
    equal, so chance is ``(1 - ties) / 2``. The interval resamples prompts and keeps each prompt's pairs together.

    Args:
        sets: records whose responses carry scores by both.
        judge: who is examined.
        truth: who is believed (of pair data: the judge that marks chosen and rejected).
        seed: seed of the bootstrap.

    Raises:
        InputError: no pair counts.
    """
    rows = [_row(record, judge, truth) for record in sets]
    full = [row for row in rows if row["pairs"]]
    if not full:
        raise InputError(f"no pair is ordered by {truth!r} and scored by {judge!r}")
    pairs = [row["pairs"] for row in full]
    found = {
        name: ratio_interval([row[key] for row in full], pairs, seed=seed)
        for name, key in (("accuracy", "right"), ("ties", "tied"))
    }
    metrics = {name: estimate.value for name, estimate in found.items()} | {
        "pairs": float(sum(pairs)),
        "prompts_without_pairs": float(len(rows) - len(full)),
    }
    return EvalResult(metrics, len(full), {name: estimate.interval for name, estimate in found.items()}, rows)


def _row(record: CandidateSet, judge: str, truth: str) -> Row:
    both = [(r.scores.get(truth), r.scores.get(judge)) for r in record.responses]
    known = [(t, j) for t, j in both if t is not None and j is not None]
    signs = [math.copysign(1, t - u) * (j - k) for (t, j), (u, k) in combinations(known, 2) if t != u]
    right, tied = sum(sign > 0 for sign in signs), sum(sign == 0 for sign in signs)
    return {"id": record.id, "pairs": len(signs), "right": right, "tied": tied}


def add_policy_scores(
    model: Any, tokenizer: Any, sets: Sequence[CandidateSet], name: str = "policy", template: str = "auto"
) -> None:
    """Score every response by the policy itself, in place: mean log-probability (nats) a token given the prompt.

    This is ``p_i`` of RRHF's equation 2, the score by which its Table 5 reads a policy as a reward model. The
    end-of-sequence token counts where the response finished, results of tools do not; an empty response stays without a
    score.
    """
    from rankalign.data.encode import EncodeOptions, Encoder
    from rankalign.rows.logps import token_logps

    encoder = Encoder(tokenizer, EncodeOptions(template=template))
    for record in sets:
        prompt, written = encoder.written(record)
        kept = [i for i, answer in enumerate(written) if answer.learned]
        with torch.no_grad():
            logps = token_logps(model, [prompt], [[written[i].ids for i in kept]])[0] if kept else []
        own = [values.double()[written[i].mask()] for i, values in zip(kept, logps, strict=True)]
        means = dict(zip(kept, (float(values.mean()) for values in own), strict=True))
        for i, response in enumerate(record.responses):
            response.scores = response.scores | {name: means.get(i)}
