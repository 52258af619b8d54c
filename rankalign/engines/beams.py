"""Beam search and diverse beam search over any causal language model.

Diverse beam search (Vijayakumar et al. 2016, https://arxiv.org/abs/1610.02424, algorithm 1): the beams fall into groups
that take turns at every step; a group searches for itself, but a token's log-probability is lowered by the penalty for
every beam of an earlier group that has just chosen the same token (Hamming diversity). A beam that ends has chosen its
last token; what would have gone on in its place counts only if its group searches on. The lowered scores add up along a
beam. One group, or penalty 0, is plain beam search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankalign.engines import SamplingParams
from rankalign.engines.decode import Rows

Ends = Callable[[Sequence[int]], bool]
Candidate = tuple[float, int, int]
"""Score, place of the beam it continues, token."""


@dataclass(frozen=True)
class Hypothesis:
    """A complete answer.

    Attributes:
        ids: its tokens, a closing end-of-sequence token included.
        score: (penalised) log-probability / length ** length_penalty, in nats.
        ended: False where the token limit cut it.
    """

    ids: list[int]
    score: float
    ended: bool


@dataclass
class Group:
    """Beams of one prompt that compete with one another only.

    Attributes:
        prompt: index of the prompt.
        order: which group of its prompt this is; earlier ones choose first.
        beams: scores and tokens of the open beams, best first; a place that none fills scores minus infinity.
        complete: the best answers so far, best first, at most as many as there are beams.
        chosen: the tokens that its beams took at the last step, those that ended among them.
        closed: no open beam can still be better than the complete answers.
    """

    prompt: int
    order: int
    beams: list[tuple[float, list[int]]]
    complete: list[Hypothesis] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    closed: bool = False

    @property
    def scores(self) -> list[float]:
        """Penalised log-probabilities of the open beams."""
        return [score for score, _ in self.beams]

    def advance(self, candidates: Sequence[Candidate], ends: Ends, last: bool, length_penalty: float) -> list[int]:
        """Take one step.

        A complete answer counts only if it is among the ``width`` best candidates; the best ``width`` of the others go
        on. The group closes when its best open beam, at its present length, does not beat its worst complete answer.
        So a group of one beam is greedy search: all that it passes over for its first answer is worse at equal length.

        Args:
            candidates: continuations of the beams, best first, enough of them that ``width`` do not end here.
            ends: whether an answer is complete.
            last: the limit is reached: every candidate is complete, though not ended.
            length_penalty: exponent of the length.

        Returns:
            The place in the old beams that each new beam continues.
        """
        width, going, parents = len(self.beams), list[tuple[float, list[int]]](), list[int]()
        chosen: list[tuple[int, int]] = []
        for rank, (score, parent, token) in enumerate(candidates):
            ids = [*self.beams[parent][1], token]
            ended = ends(ids)
            if (ended or last) and rank < width:
                self.complete.append(Hypothesis(ids, score / len(ids) ** length_penalty, ended))
            elif not ended and not last and len(going) < width:
                going.append((score, ids))
                parents.append(parent)
            else:
                continue
            chosen.append((rank, token))
        self.complete = sorted(self.complete, key=lambda answer: -answer.score)[:width]
        self.closed = not going or self._beaten(*going[0], length_penalty)
        # Beyond the width best stand those that fill the places of ended beams, which a closed group no longer has.
        self.chosen = [token for rank, token in chosen if rank < width or not self.closed]
        fill = width - len(going)
        self.beams = going + [(-math.inf, ids) for _, ids in going[:1] * fill]
        return parents + parents[:1] * fill

    def _beaten(self, score: float, ids: Sequence[int], length_penalty: float) -> bool:
        """Whether there are answers enough and the best open beam is worse than each of them."""
        full = len(self.complete) == len(self.beams)
        return full and score / len(ids) ** length_penalty <= self.complete[-1].score


def search(rows: Rows, params: SamplingParams, ends: Ends, ends_per_step: int) -> list[list[Hypothesis]]:
    """Search the answers to each prompt.

    Args:
        rows: the prompts; used up.
        params: how to search.
        ends: whether an answer is complete.
        ends_per_step: how many continuations of one beam may end it at once (the number of end-of-sequence ids).

    Returns:
        ``n`` answers a prompt: the best of each group in turn, then the second best of each, and so on. Fewer only
        where fewer exist.
    """
    width = params.num_beams // params.num_beam_groups
    prompts = len(rows.logits)
    groups = [
        # All beams begin alike, so one alone is open: the others would find the same answers.
        Group(prompt, order, [(0.0, []), *[(-math.inf, [])] * (width - 1)])
        for prompt in range(prompts)
        for order in range(params.num_beam_groups)
    ]
    rows.select([group.prompt for group in groups for _ in range(width)])
    active = groups
    for step in range(params.max_new_tokens):
        last = step == params.max_new_tokens - 1
        turn = _step_at_once if rows.logits.is_cuda else _step
        parents = turn(rows, active, params, ends, ends_per_step, last)
        going = [place for place, group in enumerate(active) if not group.closed]
        if not going:
            break
        rows.select([place * width + parent for place in going for parent in parents[place]])
        active = [active[place] for place in going]
        rows.append(torch.tensor([ids[-1] for group in active for _, ids in group.beams]))
    return [_in_turn([g for g in groups if g.prompt == prompt], params.n) for prompt in range(prompts)]


def _step_at_once(
    rows: Rows, active: Sequence[Group], params: SamplingParams, ends: Ends, ends_per_step: int, last: bool
) -> list[list[int]]:
    """As :func:`_step`, but one wait for a GPU and not two for every group of a prompt.

    What earlier groups choose lowers so many continuations of a group at most, and no other can rise: with as many more
    of the best by their own scores, the best of the lowered ones are there, and the host lowers them.
    """
    width = params.num_beams // params.num_beam_groups
    count = (1 + ends_per_step) * width
    before = (params.num_beam_groups - 1) * 2 * width if params.diversity_penalty else 0  # tokens earlier groups take
    logps = rows.logits.double().log_softmax(dim=-1).view(len(active), width, -1)
    scores = logps + logps.new_tensor([group.scores for group in active]).unsqueeze(-1)
    vocabulary = scores.shape[-1]
    top = scores.flatten(1).topk(min(count + before * width, width * vocabulary), dim=-1)
    # Places are far below 2 ** 53, so that one tensor of doubles holds both.
    numbers = rows.told(torch.cat([top.values, top.indices.double()], dim=1).flatten())
    size = top.values.shape[1]
    chosen: dict[int, list[int]] = {group.prompt: [] for group in active}
    parents: dict[int, list[int]] = {}
    for order in range(params.num_beam_groups):
        for place, group in enumerate(active):
            if group.order != order:
                continue
            own = numbers[2 * size * place : 2 * size * (place + 1)]
            pairs = [(s, int(at)) for s, at in zip(own[:size], own[size:], strict=True)]
            candidates = [(s, at // vocabulary, at % vocabulary) for s, at in pairs]
            lowered = [(_lowered(s, chosen[group.prompt].count(t), params), b, t) for s, b, t in candidates]
            best = sorted((c for c in lowered if c[0] > -math.inf), key=lambda c: -c[0])[:count]
            parents[place] = group.advance(best, ends, last, params.length_penalty)
            chosen[group.prompt] += group.chosen
    return [parents[place] for place in range(len(active))]


def _lowered(score: float, times: int, params: SamplingParams) -> float:
    for _ in range(times):  # one after the other, as the other way rounds
        score -= params.diversity_penalty
    return score


def _step(
    rows: Rows, active: Sequence[Group], params: SamplingParams, ends: Ends, ends_per_step: int, last: bool
) -> list[list[int]]:
    """One step of all open groups, earlier groups of a prompt first; returns the parents of each group's beams."""
    width = params.num_beams // params.num_beam_groups
    logps = rows.logits.double().log_softmax(dim=-1).view(len(active), width, -1)
    chosen: dict[int, list[int]] = {group.prompt: [] for group in active}
    parents: dict[int, list[int]] = {}
    for order in range(params.num_beam_groups):
        turn = [place for place, group in enumerate(active) if group.order == order]
        scores = logps[turn] + logps.new_tensor([active[place].scores for place in turn]).view(len(turn), width, 1)
        for row, place in enumerate(turn):
            for token in chosen[active[place].prompt]:
                scores[row, :, token] -= params.diversity_penalty
        # A beam has so many continuations that end it, so at least `width` others are among the best.
        for place, candidates in zip(turn, _best(scores, (1 + ends_per_step) * width), strict=True):
            parents[place] = active[place].advance(candidates, ends, last, params.length_penalty)
            chosen[active[place].prompt] += active[place].chosen
    return [parents[place] for place in range(len(active))]


def _best(scores: Tensor, count: int) -> list[list[Candidate]]:
    """The best ``count`` continuations of each group, best first; ``scores`` is (groups, width, V)."""
    _, width, vocabulary = scores.shape
    top = scores.flatten(1).topk(min(count, width * vocabulary), dim=-1)
    return [
        [(s, place // vocabulary, place % vocabulary) for s, place in zip(*row, strict=True) if s > -math.inf]
        for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _in_turn(groups: Sequence[Group], n: int) -> list[Hypothesis]:
    ranks = range(max(len(group.complete) for group in groups))
    return [group.complete[rank] for rank in ranks for group in groups if rank < len(group.complete)][:n]
