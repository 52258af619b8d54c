"""The loss that RRHF's released code computes, from logits: arithmetic, quirks included, in our own words."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def shifted_labels(prompt_length: int, lengths: list[int], tokens: Tensor) -> Tensor:
    """(K, prompt + longest) labels as the released collator lays them out: already shifted, so one ignored at the end.

    Row i predicts its first response token at the prompt's last position. ``tokens`` is (K, longest).
    """
    labels = torch.full((len(lengths), prompt_length + max(lengths)), IGNORED)
    for row, length in enumerate(lengths):
        labels[row, prompt_length - 1 : prompt_length - 1 + length] = tokens[row, :length]
    return labels


def released_loss(
    logits: Tensor, labels: Tensor, scores: Tensor, rrhf_weight: float = 1.0, length_penalty: float = 1.0
) -> Tensor:
    """Scalar loss of one prompt: logits (K, L, V), labels (K, L), scores (K,)."""
    labels = labels.clone()
    real = labels != IGNORED
    labels[~real] = 0  # the released code does this in place, before it counts the labels that are not ignored
    token_logps = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * real
    counted = (labels != IGNORED).sum(1).to(logits.dtype)  # hence every position counts, padding and prompt too
    p = token_logps.sum(1) / counted**length_penalty
    rank = torch.zeros((), dtype=logits.dtype)
    for i in range(len(scores)):
        for j in range(len(scores)):
            if scores[i] < scores[j] and p[i] > p[j]:
                rank = rank + p[i] - p[j]
    sft = -token_logps[scores.argmax()].mean()
    return rrhf_weight * rank + sft
