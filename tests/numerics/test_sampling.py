"""Logits to tokens and beams to answers, against brute force and statistics."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor

from rankalign.engines import SamplingParams, beams, sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.2, -3.0, 0.1, 0.9, -0.4], dtype=torch.float64)


def probabilities(**settings: float) -> list[float]:
    return sampling.probabilities(LOGITS[None], SamplingParams(**settings))[0].tolist()  # type: ignore[arg-type]


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(x / temperature) for x in logits]
    return [w / math.fsum(weights) for w in weights]


# --- the distribution ---------------------------------------------------------------------------------------------


def draws(count: int, **settings: float) -> Counter[int]:
    probs = sampling.probabilities(LOGITS[None], SamplingParams(**settings)).expand(count, -1)  # type: ignore[arg-type]
    return Counter(sampling.draw(probs, sampling.uniforms(7, "chi", "p", 0, count)).tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    counts = draws(20_000, temperature=temperature)
    expected = [20_000 * p for p in softmax(LOGITS.tolist(), temperature)]
    assert stats.chisquare([counts[i] for i in range(8)], expected).pvalue > 0.01


def test_temperature_changes_the_distribution() -> None:
    counts = draws(20_000, temperature=0.8)
    expected = [20_000 * p for p in softmax(LOGITS.tolist(), 1.0)]
    assert stats.chisquare([counts[i] for i in range(8)], expected).pvalue < 1e-6


def test_temperature_one_is_the_softmax() -> None:
    assert probabilities() == pytest.approx(softmax(LOGITS.tolist()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_are_widened(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    expected = softmax(logits.tolist(), 0.7)
    assert sampling.probabilities(logits[None], SamplingParams(temperature=0.7))[0].tolist() == pytest.approx(
        expected, rel=1e-6
    )


def brute_support(probs: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The filters as they are defined: the smallest subset by enumeration, not by sorting."""
    kept = set(range(len(probs)))
    if top_k:
        kept = {i for i in kept if sum(p > probs[i] for p in probs) < top_k}
    mass = math.fsum(probs[i] for i in kept)
    subsets = [set(c) for size in range(1, len(kept) + 1) for c in itertools.combinations(sorted(kept), size)]
    reaching = [s for s in subsets if math.fsum(probs[i] for i in s) >= top_p * mass - 1e-12]
    smallest = min(len(s) for s in reaching)
    kept = max((s for s in reaching if len(s) == smallest), key=lambda s: math.fsum(probs[i] for i in s))
    return {i for i in kept if probs[i] >= min_p * max(probs)}


@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.5])
def test_filters_keep_exactly_the_defined_support(top_k: int, top_p: float, min_p: float) -> None:
    whole = softmax(LOGITS.tolist())
    support = brute_support(whole, top_k, top_p, min_p)
    mass = math.fsum(whole[i] for i in support)
    expected = [p / mass if i in support else 0.0 for i, p in enumerate(whole)]
    assert probabilities(top_k=top_k, top_p=top_p, min_p=min_p) == pytest.approx(expected, rel=1e-12)


def test_a_nucleus_wider_than_the_first_guess_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    whole = sampling.probabilities(logits, SamplingParams(top_p=0.9))
    monkeypatch.setattr(sampling, "NUCLEUS", 2)
    assert torch.equal(sampling.probabilities(logits, SamplingParams(top_p=0.9)), whole)
    assert (whole > 0).sum() > 3 * 2


def test_equals_at_the_border_are_all_kept() -> None:
    probs = sampling.probabilities(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), SamplingParams(top_k=2))
    assert probs[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert sampling.draw(probs, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_uniforms_are_a_pure_function_of_the_answer() -> None:
    stream = hashlib.shake_256(b'[3, "id", "p", 1]').digest(16)
    expected = [(int.from_bytes(stream[i : i + 8], "big") >> 11) / 2**53 for i in (0, 8)]
    assert sampling.uniforms(3, "id", "p", 1, 2).tolist() == expected
    assert sampling.uniforms(3, "id", "p", 1, 5)[:2].tolist() == expected
    others = [(4, "id", "p", 1), (3, "ie", "p", 1), (3, "id", "q", 1), (3, "id", "p", 2)]
    assert len({sampling.uniforms(*other, 1).item() for other in others} | {expected[0]}) == 5
    many = sampling.uniforms(0, "x", "y", 0, 20_000)
    assert stats.kstest(many.numpy(), "uniform").pvalue > 0.01


# --- beams on toy vocabularies ------------------------------------------------------------------------------------

EOS = 0


class Table:
    """A language model that is a table: log-probabilities that depend on everything written so far."""

    def __init__(self, seed: int, vocabulary: int, prompts: int = 1) -> None:
        self.seed, self.vocabulary = seed, vocabulary
        self.texts: list[tuple[int, ...]] = [(100 + prompt,) for prompt in range(prompts)]

    def logps(self, text: tuple[int, ...]) -> list[float]:
        seed = int.from_bytes(hashlib.sha256(repr((self.seed, text)).encode()).digest()[:4], "big")
        logits = torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.log_softmax(logits, dim=-1).tolist()

    # What beams.search needs of decode.Rows:
    @property
    def logits(self) -> Tensor:
        return torch.tensor([self.logps(text) for text in self.texts], dtype=torch.float64)

    def select(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]

    def append(self, tokens: Tensor) -> None:
        self.texts = [(*text, token) for text, token in zip(self.texts, tokens.tolist(), strict=True)]


def ends(ids: Sequence[int]) -> bool:
    return ids[-1] == EOS


def run(table: Table, **settings: float) -> list[list[beams.Hypothesis]]:
    return beams.search(table, SamplingParams(**settings), ends, 1)  # type: ignore[arg-type]


def greedy(table: Table, prompt: tuple[int, ...], limit: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < limit and EOS not in ids:
        logps = table.logps((*prompt, *ids))
        ids.append(logps.index(max(logps)))
    return ids


def brute_groups(
    table: Table, prompt: tuple[int, ...], groups: int, width: int, penalty: float, limit: int, power: float
) -> list[list[tuple[float, tuple[int, ...]]]]:
    """Algorithm 1 of Vijayakumar et al. with every extension of every beam listed: complete answers by group."""
    open_beams: list[dict[tuple[int, ...], float]] = [{(): 0.0} for _ in range(groups)]
    complete: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(groups)]
    for step in range(1, limit + 1):
        used: Counter[int] = Counter()
        for g in range(groups):
            every = [
                (score + logp - penalty * used[token], (*ids, token))
                for ids, score in open_beams[g].items()
                for token, logp in enumerate(table.logps((*prompt, *ids)))
            ]
            every.sort(reverse=True)
            done = [(s, ids) for s, ids in every[:width] if ids[-1] == EOS or step == limit]
            going = [(s, ids) for s, ids in every if ids[-1] != EOS][:width] if step < limit else []
            complete[g] = sorted([*complete[g], *((s / step**power, ids) for s, ids in done)], reverse=True)[:width]
            open_beams[g] = {ids: s for s, ids in going}
            if going and len(complete[g]) == width and going[0][0] / step**power <= complete[g][-1][0]:
                open_beams[g] = {}
            best = [ids for _, ids in every[:width]]
            used.update(ids[-1] for ids in {*best, *open_beams[g]})
    return complete


def greedy_groups(table: Table, groups: int, penalty: float, limit: int) -> list[list[int]]:
    """The same for groups of one beam, read off the paper: earlier groups' tokens of this very step cost a penalty."""
    texts: list[list[int]] = [[] for _ in range(groups)]
    for _ in range(limit):
        taken: list[int] = []
        for text in texts:
            if EOS not in text:
                scores = [s - penalty * taken.count(v) for v, s in enumerate(table.logps((100, *text)))]
                taken.append(scores.index(max(scores)))
                text.append(taken[-1])
    return texts


@pytest.mark.parametrize(("vocabulary", "groups"), [(3, 2), (3, 3), (4, 4), (6, 3)])
def test_a_group_that_ends_costs_later_ones_the_token_that_it_chose_alone(vocabulary: int, groups: int) -> None:
    settings = {"n": groups, "num_beams": groups, "num_beam_groups": groups, "diversity_penalty": 1.0}
    for seed in range(100):
        table = Table(seed, vocabulary)
        expected = greedy_groups(table, groups, 1.0, 5)
        assert [answer.ids for answer in run(table, **settings, max_new_tokens=5)[0]] == expected


def test_the_second_group_goes_on_where_the_first_ends() -> None:
    table = Table(0, 3)
    table.logps = lambda text: torch.tensor([2.0, 1.5, 0.0]).log_softmax(0).tolist()  # type: ignore[method-assign]
    settings = {"n": 2, "num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0, "max_new_tokens": 1}
    assert [answer.ids for answer in run(table, **settings)[0]] == [[EOS], [1]]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("groups", "width"), [(1, 3), (3, 1), (2, 2), (4, 1), (2, 3)])
def test_groups_equal_brute_force(seed: int, groups: int, width: int) -> None:
    vocabulary, penalty, power = 4 + seed % 3, (0.0, 0.3, 1.0, 5.0)[seed % 4], (1.0, 0.0, 2.0)[seed % 3]
    table = Table(seed, vocabulary, prompts=3)
    expected = [brute_groups(table, text, groups, width, penalty, 6, power) for text in table.texts]
    found = run(
        table,
        n=groups * width,
        num_beams=groups * width,
        num_beam_groups=groups,
        diversity_penalty=penalty if groups > 1 else 0.0,
        max_new_tokens=6,
        length_penalty=power,
    )
    for answers, by_group in zip(found, expected, strict=True):
        in_turn = [group[rank] for rank in range(width) for group in by_group if rank < len(group)]
        assert [tuple(answer.ids) for answer in answers] == [ids for _, ids in in_turn]
        assert [answer.score for answer in answers] == pytest.approx([score for score, _ in in_turn], abs=1e-12)
        assert [answer.ended for answer in answers] == [ids[-1] == EOS for _, ids in in_turn]


@pytest.mark.parametrize("seed", range(10))
def test_first_group_is_greedy_and_penalty_0_makes_all_alike(seed: int) -> None:
    settings = {"n": 4, "num_beams": 4, "num_beam_groups": 4, "max_new_tokens": 7}
    table = Table(seed, 6)
    expected = greedy(table, table.texts[0], 7)
    assert [answer.ids for answer in run(Table(seed, 6), **settings)[0]] == [expected] * 4
    diverse = [answer.ids for answer in run(Table(seed, 6), **settings, diversity_penalty=20.0)[0]]
    assert diverse[0] == expected
    assert len({ids[0] for ids in diverse}) == 4  # so high a penalty forbids any token twice at one step


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_beams_wide_enough_find_the_best_of_all_texts(seed: int, power: float) -> None:
    table, limit = Table(seed, 4), 4
    texts: dict[tuple[int, ...], float] = {}
    for ids in itertools.product(range(4), repeat=limit):
        cut = ids[: ids.index(EOS) + 1] if EOS in ids else ids
        logp = math.fsum(table.logps((100, *cut[:i]))[token] for i, token in enumerate(cut))
        texts[cut] = logp / len(cut) ** power
    best = sorted(texts, key=lambda ids: -texts[ids])[:5]
    found = run(table, n=5, num_beams=128, max_new_tokens=limit, length_penalty=power)[0]
    assert [tuple(answer.ids) for answer in found] == best
    assert [answer.score for answer in found] == pytest.approx([texts[ids] for ids in best], abs=1e-12)


def test_prompts_do_not_see_one_another() -> None:
    settings = {"n": 4, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "max_new_tokens": 6}
    together = run(Table(3, 5, prompts=4), **settings)
    for prompt, answers in enumerate(together):
        alone = Table(3, 5)
        alone.texts = [(100 + prompt,)]
        assert run(alone, **settings)[0] == answers
