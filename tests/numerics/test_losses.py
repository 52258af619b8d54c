"""Losses by hand, listwise likelihoods by enumeration, the registry, and the terms of sums."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from math import log, log2
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.by_hand import CASES, HAND
from parity.lists import lists, padded, random_list

from rankalign.errors import InputError
from rankalign.losses import LOSSES, PARTS, listmle, listnet
from rankalign.losses.ranked import Ranked


@pytest.mark.parametrize(
    ("name", "keywords", "expected"), [(name, *case) for name, cases in CASES.items() for case in cases]
)
def test_by_hand(name: str, keywords: dict[str, Any], expected: float) -> None:
    assert LOSSES[name].function(HAND, **keywords).item() == pytest.approx(expected, abs=1e-12, rel=1e-12)


def test_every_loss_has_a_hand_worked_case() -> None:
    assert CASES.keys() == LOSSES.keys()


def with_scores(scores: tuple[float, ...]) -> Ranked:
    """A list of as many candidates as scores, otherwise the same every time."""
    candidates = random_list(len(scores), 3)
    ranked = padded([candidates])
    score = torch.tensor([scores], dtype=torch.float64)
    return Ranked(ranked.logps.detach(), ranked.lengths, score, ranked.mask, ranked.ref_logps)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", ["listmle", "plackett_luce"])
def test_plackett_luce_is_a_distribution_over_rankings(name: str, size: int) -> None:
    """The likelihoods of all n! rankings add up to 1."""
    rankings = itertools.permutations(range(size))
    total = sum(LOSSES[name].function(with_scores(tuple(map(float, r)))).neg().exp().item() for r in rankings)
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_listnet_is_the_cross_entropy_of_first_places(temperature: float) -> None:
    """The chance to come first, under the policy and under the scores, from the likelihoods of all rankings."""
    scores = (0.3, -1.0, 1.2, 0.9)
    ours = with_scores(scores)
    judge = Ranked(torch.tensor([scores], dtype=torch.float64), torch.ones(1, 4), ours.scores, ours.mask)
    first = torch.zeros(2, 4, dtype=torch.float64)
    for ranking in itertools.permutations(range(4)):
        order = torch.tensor([ranking], dtype=torch.float64)
        for row, (source, beta) in enumerate([(ours, 1.0), (judge, 1 / temperature)]):
            likelihood = listmle(Ranked(source.logps, source.lengths, order, source.mask), beta=beta).neg().exp()
            first[row, ranking.index(3)] += likelihood.item()
    expected = -(first[1] * first[0].log()).sum().item()
    assert listnet(ours, temperature=temperature).item() == pytest.approx(expected, abs=1e-12)


def test_lambdaloss_starts_from_the_ideal_ranking() -> None:
    """Where policy and reference agree all s are 0; the weights are then those of the list in the right order."""
    logps = torch.full((1, 3), -5.0, dtype=torch.float64, requires_grad=True)
    ranked = Ranked(logps, HAND.lengths, HAND.scores, HAND.mask, logps.detach())
    loss = LOSSES["lambdaloss"].function(ranked)
    best_third = (2 - 1) * (1 - 1 / log2(4))
    best_second, second_third = (2 - 2**0.5) * (1 - 1 / log2(3)), (2**0.5 - 1) * (1 / log2(3) - 1 / log2(4))
    assert loss.item() == pytest.approx((best_third + best_second + second_third) * log(2), abs=1e-12)
    loss.sum().backward()
    assert logps.grad is not None
    assert logps.grad[0, 0] < 0 < logps.grad[0, 1]


def test_sppo_over_all_pairs_is_least_at_the_share_of_wins() -> None:
    """u_i = (share of pairs won - 1/2) / beta: 1, 1/2 and 0 of the pairs for A, C and B."""
    u = torch.tensor([[5.0, -5.0, 0.0]], dtype=torch.float64, requires_grad=True)
    ranked = Ranked(u, HAND.lengths, HAND.scores, HAND.mask, torch.zeros_like(u))
    (gradient,) = torch.autograd.grad(LOSSES["sppo"].function(ranked, beta=0.1).sum(), u)
    assert gradient.abs().max() < 1e-12


WEIGHTS: dict[str, Any] = {
    "rrhf": {"rank_loss": "rrhf_weight", "sft_loss": 1.0},
    "slic_hf": {"rank_loss": 1.0, "sft_loss": "sft_weight"},
    "orpo": {"rank_loss": "beta", "sft_loss": 1.0},
    "cpo": {"rank_loss": 1.0, "sft_loss": "sft_weight"},
    "pro": {"rank_loss": 1.0, "sft_loss": "sft_weight"},
    "rloo_kl": {"rank_loss": 1.0, "kl_loss": "beta"},
    "xpo": {"rank_loss": 1.0, "explore_loss": "alpha"},
    "nash_md": {"rank_loss": 1.0, "kl_loss": "beta"},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_terms_times_weights_are_the_loss(name: str) -> None:
    ranked = padded(lists())
    weights = {term: 0.7 if isinstance(weight, str) else weight for term, weight in WEIGHTS[name].items()}
    keywords = {weight: 0.7 for weight in WEIGHTS[name].values() if isinstance(weight, str)}
    terms = PARTS[name](ranked, **keywords)
    assert terms.keys() == WEIGHTS[name].keys()
    if name == "pro":
        terms["sft_loss"] = terms["sft_loss"] * (ranked.mask.sum(1) - 1) ** 2
    total = sum(weights[term] * values for term, values in terms.items())
    torch.testing.assert_close(LOSSES[name].function(ranked, **keywords), total, atol=1e-12, rtol=0)


COMMON = {"nll_weight": 0.0, "nll_reduction": "mean"}


def test_registry_describes_every_loss() -> None:
    for loss in LOSSES.values():
        assert loss.summary.endswith(".")
        assert len(loss.summary) <= 120
        assert all(isinstance(default, float | str | None) for default in loss.defaults.values())
    assert LOSSES["rrhf"].defaults == {
        "rrhf_weight": 1.0,
        "length_penalty": 1.0,
        "sft_reduction": "sum",
        "compat": "paper",
        **COMMON,
    }
    assert {name for name in LOSSES if PARTS[name](HAND)} == WEIGHTS.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_reference_is_needed_where_it_says_so(name: str) -> None:
    without = replace(HAND, ref_logps=None)
    if LOSSES[name].needs_tokens:
        with pytest.raises(ValueError, match="token_logps"):
            LOSSES[name].function(replace(HAND, token_logps=None))
    for field in [*LOSSES[name].beyond, *(["own"] if LOSSES[name].needs_own else [])]:
        with pytest.raises(ValueError, match=field):
            LOSSES[name].function(replace(HAND, **{field: None}))
    if LOSSES[name].needs_reference:
        with pytest.raises(ValueError, match="ref_logps"):
            LOSSES[name].function(without)
    else:
        torch.testing.assert_close(LOSSES[name].function(without), LOSSES[name].function(HAND), atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if {"pairs", "reduction"} <= {*loss.defaults}])
def test_pairs_and_reduction(name: str) -> None:
    """Best-worst on a list is the loss of those two alone; a sum over three pairs is three times their mean."""
    loss = LOSSES[name].function if name not in WEIGHTS else lambda r, **k: PARTS[name](r, **k)["rank_loss"]
    names = [f.name for f in fields(Ranked) if f.name not in ("prompt_lengths", "seeds")]
    two = Ranked(**{name: getattr(HAND, name)[:, :2] for name in names})
    torch.testing.assert_close(loss(HAND, pairs="best-worst"), loss(two), atol=1e-12, rtol=0)
    torch.testing.assert_close(loss(HAND, reduction="sum"), 3 * loss(HAND), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("dpo", {"pairs": "best_worst"}),
        ("dpo", {"reduction": "avg"}),
        ("dpo", {"f_divergence_type": "kl"}),
        ("dpo", {"label_smoothing": 0.5}),
        ("exo", {"label_smoothing": 0.0}),
        ("robust", {"label_smoothing": -0.1}),
        ("rrhf", {"compat": "code"}),
        ("sft", {"sft_reduction": "token"}),
        ("discopop", {"tau": 0.0}),
        ("lambdaloss", {"gain": "ndcg"}),
        ("lambdaloss", {"gain_function": "power"}),
        ("lambdaloss", {"discount": "log10"}),
        ("odpo", {"offset": "sqrt"}),
        ("dpo_shift", {"shift": 0.0}),
        ("alpha_dpo", {"spread": 0.0}),
        ("chi_po", {"r_max": 0.0}),
        ("focal_dpo", {"gamma": -1.0}),
        ("dr_dpo", {"beta_prime": 0.0}),
        ("rebel", {"eta": 0.0}),
        ("ld_dpo", {"alpha": 1.1}),
        ("gamma_dpo", {"tau": 0.0}),
        ("gamma_simpo", {"gamma": 30.0}),
        ("neural_ndcg", {"tau": 0.0}),
        ("diff_ndcg", {"tau": 0.0}),
        ("a_star_po", {"beta1": 0.0}),
        ("point_mse", {"gain": "rank"}),
        ("point_sigmoid", {"reduction": "max"}),
        ("exo_list", {"temperature": 0.0}),
        ("approx_ndcg", {"tau": -1.0}),
        ("dr_grpo", {"max_tokens": 0.0}),
        ("grpo", {"std_epsilon": -1.0}),
        ("rloo_clipped", {"epsilon_low": 1.0}),
        ("gspo", {"epsilon_high": -0.1}),
    ],
)
def test_bad_keywords_are_the_users_to_mend(name: str, keywords: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(keywords))):
        LOSSES[name].function(HAND, **keywords)


def test_release_mode_needs_prompt_lengths() -> None:
    ranked = Ranked(HAND.logps, HAND.lengths, HAND.scores, HAND.mask)
    with pytest.raises(ValueError, match="prompt_lengths"):
        LOSSES["rrhf"].function(ranked, compat="release")


def test_the_manual_lists_every_loss_with_its_defaults() -> None:
    manual = (Path(__file__).resolve().parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = {
        line.split("`")[1]: line for line in manual.splitlines() if line.startswith("| `") and line.count(" | ") == 4
    }
    for name, loss in LOSSES.items():
        words = rows[name].split(" | ")[-2].replace("`", "").split(", ")
        listed = dict(word.split("=") for word in words if word)
        assert listed == {key: str(default) for key, default in loss.defaults.items() if key not in COMMON}, name
