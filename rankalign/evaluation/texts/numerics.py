"""What a precision does to log-probabilities: drift from float64, and the pairs of candidates whose order it blurs.

Rank losses live on small differences of large sums, so a drift that no perplexity shows can turn pairs round.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import numpy as np
import torch

from rankalign.data.records import CandidateSet
from rankalign.errors import InputError
from rankalign.evaluation import EvalResult, Row
from rankalign.registry import did_you_mean

# By name: type of the weights, type of autocast, layout of the rows. ``--bf16`` of `rankalign train` is autocast.
MODES: dict[str, tuple[torch.dtype, torch.dtype | None, str]] = {
    "float32": (torch.float32, None, "auto"),
    "float32_padded": (torch.float32, None, "padded"),
    "bfloat16_autocast": (torch.float32, torch.bfloat16, "auto"),
    "bfloat16": (torch.bfloat16, None, "auto"),
    "float16": (torch.float16, None, "auto"),
}
DEFAULT_MODES = ("float32", "float32_padded", "bfloat16_autocast", "bfloat16")
TRUSTED = 0.95  # a gap counts as safe above this quantile of the drifts between two candidates

TokenIds = tuple[list[int], list[list[int]]]  # prompt, responses


def evaluate_numerics(
    model: Any,
    tokenizer: Any,
    sets: Sequence[CandidateSet],
    modes: Sequence[str] = DEFAULT_MODES,
    template: str = "auto",
    max_length: int = 512,
) -> EvalResult:
    """Log-probabilities in several precisions against float64 of the same weights, and the pairs they put in doubt.

    Candidates are compared by log-probability a token, as RRHF does. A pair ``changed`` where its order is not that of
    float64; it is ``unstable`` where its gap in float64 is no larger than the drifts apart of 95 % of all pairs, so
    that the order is a matter of rounding whether it changed here or not.

    Args:
        model: a causal language model; copies of it are made, one at a time.
        tokenizer: its tokenizer.
        sets: records; responses need no scores.
        modes: names in ``MODES``.
        template: prompt format.
        max_length: most tokens of prompt and response together.

    Returns:
        For each mode ``<mode>_drift`` (mean absolute drift of a token's log-probability, nats), ``<mode>_max_drift``
        (largest of a response's sum), ``<mode>_changed`` and ``<mode>_unstable`` (pairs). ``n`` counts prompts; rows
        are the unstable pairs, closest first.

    Raises:
        InputError: an unknown mode, or no prompt with two responses.
    """
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"unknown mode {mode!r}{did_you_mean(mode, MODES)}")
    lists = [
        (record.id, ids) for record in sets if len((ids := encode(tokenizer, record, template, max_length))[1]) > 1
    ]
    if not lists:
        raise InputError("no prompt has two responses to compare")
    exact = token_values(model, [ids for _, ids in lists], torch.float64, None, "auto")
    pairs = [(p, i, j) for p, rows in enumerate(exact) for i, j in combinations(range(len(rows)), 2)]
    metrics = {"pairs": float(len(pairs)), "responses": float(sum(map(len, exact)))}
    unstable: list[Row] = []
    for mode in modes:
        found = token_values(model, [ids for _, ids in lists], *MODES[mode])
        metrics |= {f"{mode}_{name}": value for name, value in drift(exact, found).items()}
        doubts, changed = judge_pairs(exact, found, pairs)
        metrics |= {f"{mode}_changed": float(changed), f"{mode}_unstable": float(len(doubts))}
        unstable += [{"id": lists[p][0], "a": i, "b": j, "mode": mode, "gap": gap} for p, i, j, gap in doubts]
    return EvalResult(metrics, len(lists), rows=sorted(unstable, key=lambda row: row["gap"]))


def encode(tokenizer: Any, record: CandidateSet, template: str, max_length: int) -> TokenIds:
    """Prompt and responses that have a token, cut to ``max_length`` as in training."""
    from rankalign.data.encode import EncodeOptions, Encoder

    encoder = Encoder(tokenizer, EncodeOptions(template=template, max_length=max_length))
    prompt, responses = encoder.fitted(record, [encoder.answer(response) for response in record.responses])
    return prompt, [ids for ids in responses if ids]


@torch.no_grad()
def token_values(
    model: Any, lists: Sequence[TokenIds], weights: torch.dtype, autocast: torch.dtype | None, layout: str
) -> list[list[np.ndarray]]:
    """``[p][n]``: float64 log-probability of every token of a response, computed in this precision."""
    from rankalign.rows.logps import token_logps

    same = next(model.parameters()).dtype == weights
    cast = model if same else copy.deepcopy(model).to(weights)  # what is handed in must keep its precision
    device = next(cast.parameters()).device.type
    with nullcontext() if autocast is None else torch.autocast(device, dtype=autocast):
        return [
            [values.double().cpu().numpy() for values in token_logps(cast, [prompt], [responses], layout=layout)[0]]
            for prompt, responses in lists
        ]


def drift(exact: list[list[np.ndarray]], found: list[list[np.ndarray]]) -> dict[str, float]:
    """Mean absolute drift of a token, largest absolute drift of a response's sum."""
    gaps = [b - a for rows, others in zip(exact, found, strict=True) for a, b in zip(rows, others, strict=True)]
    return {
        "drift": float(np.abs(np.concatenate(gaps)).mean()),
        "max_drift": float(max(abs(gap.sum()) for gap in gaps)),
    }


def judge_pairs(
    exact: list[list[np.ndarray]], found: list[list[np.ndarray]], pairs: Sequence[tuple[int, int, int]]
) -> tuple[list[tuple[int, int, int, float]], int]:
    """The unstable pairs with their gaps, and how many changed order."""
    before = np.array([exact[p][i].mean() - exact[p][j].mean() for p, i, j in pairs])
    after = np.array([found[p][i].mean() - found[p][j].mean() for p, i, j in pairs])
    doubt = np.abs(before) <= np.quantile(np.abs(after - before), TRUSTED)
    unstable = [(*pair, float(abs(gap))) for pair, gap, is_doubt in zip(pairs, before, doubt, strict=True) if is_doubt]
    return unstable, int((np.sign(before) != np.sign(after)).sum())
