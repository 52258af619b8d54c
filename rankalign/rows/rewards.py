"""Rewards of responses: a linear head named ``score`` on the hidden state at each text's last token, as transformers'
decoders for sequence classification read it, with prompts shared in tree rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankalign.errors import InputError
from rankalign.rows.logps import (
    TOLERANCE,
    as_exact_as_can_be,
    causal_lm,
    inside,
    label_states,
    lay_out,
    precision,
    supports_tree,
    why_padded,
)
from rankalign.rows.tree import Lists, Tokens
from rankalign.rows.upload import to_device
from rankalign.rows.wide import all_digits, in_float32

# How a config may say where the reward is read: at the last token; at the last one whose id is not the padding id, as
# transformers does and a config that says nothing means; at the answer's first end; or as the mean over all tokens.
LAST, LAST_NON_PAD, FIRST_EOS, MEAN = "last", "last_non_pad", "first_eos", "mean"
POOLINGS = (LAST, LAST_NON_PAD, FIRST_EOS, MEAN)


def list_rewards(model: nn.Module, prompts: Sequence[Tokens], responses: Lists, *, layout: str = "auto") -> Tensor:
    """Reward of each response to its prompt.

    Args:
        model: a decoder with a linear head ``score``, bare, in PEFT or wrapped for distributed training.
        prompts: P prompts as token ids, at least one token each.
        responses: for each prompt its responses as token ids; lists may differ in length.
        layout: as in :func:`rankalign.rows.logps.list_logps`.

    Returns:
        (P, N), fp32 (fp64 for an fp64 model), 0 where a prompt has fewer than N responses; (P, N, A) for a head of A
        outputs. Differentiable.
    """
    pieces = token_rewards(model, prompts, responses, layout=layout)
    rule = pooling_of(reward_lm(model).config)
    ends = torch.stack([_pooled(values, rule) for row in pieces for values in row])
    places = torch.tensor([(p, n) for p, row in enumerate(pieces) for n in range(len(row))])
    (where,) = to_device(ends.device, places)
    room = ends.new_zeros(len(pieces), max(map(len, pieces)), *ends.shape[1:])
    return room.index_put(where.unbind(1), ends)


def token_rewards(
    model: nn.Module, prompts: Sequence[Tokens], responses: Lists, *, layout: str = "auto"
) -> list[list[Tensor]]:
    """What the head says at the end of the prompt and at each token of a response, up to where its reward is read.

    Args:
        model: as in :func:`list_rewards`.
        prompts: as in :func:`list_rewards`.
        responses: as in :func:`list_rewards`.
        layout: as in :func:`list_rewards`.

    Returns:
        ``[p][n]`` is a tensor of shape (1 + read tokens of response n of prompt p,), or (..., A); the last entry is its
        reward. For a model that pools by ``mean`` the entries are those of all tokens, and their mean is the reward.
    """
    lm = reward_lm(model)
    rows, counts = _rows(lm, prompts, responses, layout)

    def compute() -> Tensor:
        return _say(lm, label_states(lm, rows)) if rows is not None else _say(lm, _no_states(lm))

    pieces = iter(torch.split(inside(model, compute), [n for row in counts for n in row]))
    return [[next(pieces) for _ in row] for row in counts]


def end_states(model: nn.Module, prompts: Sequence[Tokens], responses: Lists, *, layout: str = "auto") -> list[Tensor]:
    """The hidden states that the head reads as rewards: a tensor (N, H) for each prompt.

    Args:
        model: as in :func:`list_rewards`; not sharded.
        prompts: as in :func:`list_rewards`.
        responses: as in :func:`list_rewards`.
        layout: as in :func:`list_rewards`.
    """
    lm = reward_lm(model)
    rows, counts = _rows(lm, prompts, responses, layout)
    states = label_states(lm, rows) if rows is not None else _no_states(lm)
    pieces = iter(torch.split(states, [n for row in counts for n in row]))
    rule = pooling_of(lm.config)
    return [torch.stack([_pooled(next(pieces), rule) for _ in row]) for row in counts]


def _pooled(values: Tensor, rule: str) -> Tensor:
    """What counts of the values, or states, of a text's tokens (T, ...); the head is linear, so means may go first."""
    return values.mean(0) if rule == MEAN else values[-1]


def rewards_of(model: nn.Module, states: Sequence[Tensor]) -> Tensor:
    """(P, N), or (P, N, A), rewards from the states of :func:`end_states`, 0 where a prompt has fewer than N.

    Differentiable.
    """
    lm = reward_lm(model)
    values = torch.split(inside(model, lambda: _say(lm, torch.cat(list(states)))), [len(rows) for rows in states])
    return nn.utils.rnn.pad_sequence(list(values), batch_first=True)


def _rows(lm: Any, prompts: Sequence[Tokens], responses: Lists, layout: str) -> tuple[Any, list[list[int]]]:
    """Rows of all that is read, and how many states each response of each prompt has in them."""
    texts = [read_part(p, candidates, lm.config) for p, candidates in zip(prompts, responses, strict=True)]
    # Rows leave the last token of a response out, which predicts nothing; with one more token, they hold all we read.
    longer = [[[*r, 0] for r in candidates] for _, candidates in texts]
    return lay_out(lm, [p for p, _ in texts], longer, layout), [[len(r) for r in row] for row in longer]


def _say(lm: Any, states: Tensor) -> Tensor:
    """What the head says of each state (T, H): (T,), or (T, A) where it has A outputs; fp32 or wider."""
    weight: Tensor = next(lm.score.parameters())
    # Differences of rewards need every digit.
    with torch.autocast(states.device.type, enabled=False), all_digits(states.device):
        values: Tensor = lm.score(states.to(weight.dtype))
    values = values[:, 0] if values.shape[1] == 1 else values
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _no_states(lm: Any) -> Tensor:
    weight: Tensor = next(lm.score.parameters())
    return weight.new_zeros(0, weight.shape[-1])


def reward_lm(model: nn.Module) -> Any:
    """The transformers model inside wrappers.

    Raises:
        InputError: it has no linear head ``score`` over every token (encoders pool in ways of their own).
    """
    lm = causal_lm(model)
    if not isinstance(getattr(lm, "score", None), nn.Module):
        raise InputError(f"{lm.config.model_type} models have no reward head that reads a text's last token")
    return lm


def read_part(prompt: Tokens, responses: Sequence[Tokens], config: Any) -> tuple[list[int], list[list[int]]]:
    """A list cut behind the token at which each reward is read: what comes later has no bearing on it.

    A prompt that ends in padding ids hands them to its responses, so that it too ends where a reward may be read. Where
    a mean is taken, all but the first token of a text count as its response, so that every token is read.

    Args:
        prompt: token ids.
        responses: token ids of each response.
        config: the model's.

    Raises:
        InputError: the config names a rule that is not known.
    """
    rule, pad = pooling_of(config), pad_of(config)
    if rule == MEAN:
        return list(prompt[:1]), [[*prompt[1:], *r] for r in responses]
    if rule == FIRST_EOS:
        return list(prompt), [cut_behind_end(r, config) for r in responses]
    split = max(_read_length(prompt, pad), 1)
    whole = [[*prompt[split:], *r] for r in responses]
    return list(prompt[:split]), [r[: _read_length(r, pad)] for r in whole]


def pooling_of(config: Any) -> str:
    """The rule by which a reward is read, one of :data:`POOLINGS`.

    Raises:
        InputError: the config names a rule that is not known.
    """
    rule = getattr(config, "rankalign_pooling", None) or LAST_NON_PAD
    if rule not in POOLINGS:
        raise InputError(
            f"the reward model pools by {rule!r}, which this version does not know (known: {', '.join(POOLINGS)})"
        )
    return str(rule)


def pad_of(config: Any) -> int | None:
    """The id that never counts as the last token, or None where any may.

    Raises:
        InputError: the config names a rule that is not known.
    """
    return config.get_text_config().pad_token_id if pooling_of(config) == LAST_NON_PAD else None


def cut_behind_end(answer: Tokens, config: Any) -> list[int]:
    """An answer up to and with its first end-of-sequence token; the whole answer where there is none.

    Ends in the prompt do not count: under a chat template every turn has one, the same for all answers.

    Raises:
        InputError: the config names no end.
    """
    ends = config.get_text_config().eos_token_id
    if ends is None:
        raise InputError(f"the reward model pools by {FIRST_EOS!r}, and its config names no eos_token_id")
    known = set(ends) if isinstance(ends, list | tuple) else {ends}
    first = next((i for i, token in enumerate(answer) if token in known), len(answer) - 1)
    return list(answer[: first + 1])


def _read_length(ids: Tokens, pad: int | None) -> int:
    return next((i for i in range(len(ids), 0, -1) if ids[i - 1] != pad), 0)


@torch.no_grad()
def choose_layout(model: nn.Module, prompts: Sequence[Tokens], responses: Lists) -> tuple[str, str]:
    """Decide how to lay out rows by computing these lists both ways; the model must be in eval mode.

    Args:
        model: as in :func:`list_rewards`.
        prompts: a first batch.
        responses: its responses.

    Returns:
        ``"tree"`` or ``"padded"``, and the reason in words.

    Raises:
        InputError: the model's own forward gives another reward.
    """
    lm = reward_lm(model)
    ids = torch.tensor([[*prompts[0], *responses[0][0]]], device=lm.device)
    with as_exact_as_can_be(lm) as kind:
        ours = list_rewards(model, prompts[:1], [responses[0][:1]], layout="padded")[0, 0]
        theirs = lm(input_ids=ids, use_cache=False).logits[0] if pooling_of(lm.config) == LAST_NON_PAD else ours
    if not _close(ours, theirs, TOLERANCE[kind] * (1 + float(ours.abs().max()))):
        raise InputError(f"{lm.config.model_type} models compute their score in a way that rankalign does not know")
    if not supports_tree(model):
        return "padded", why_padded(model)
    padded, tree = (_all_rewards(model, prompts, responses, layout) for layout in ("padded", "tree"))
    if precision(lm).itemsize > 2:
        alike = _close(tree, padded, TOLERANCE[precision(lm)] * (1 + float(padded.abs().max())))
    else:  # twice what padded rows lose by it, as for log-probabilities: a mean over tokens, where one would be chance
        with in_float32(lm):
            lost = (padded - _all_rewards(model, prompts, responses, "padded")).abs().mean()
        alike = bool((tree - padded).abs().mean() <= max(2 * float(lost), TOLERANCE[torch.float32]))
    if alike:
        return "tree", "the first batch's packed and padded rewards agree"
    return "padded", "the first batch's packed and padded rewards differ by more than rounding"


def _all_rewards(model: nn.Module, prompts: Sequence[Tokens], responses: Lists, layout: str) -> Tensor:
    """(tokens,) what the head says at every token that is read."""
    pieces = token_rewards(model, prompts, responses, layout=layout)
    return torch.cat([values for row in pieces for values in row])


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance)
