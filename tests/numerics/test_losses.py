"""Losses by hand, listwise likelihoods by enumeration, the registry, and the terms of sums."""

from __future__ import annotations

import itertools
from math import exp, log, log2
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.lists import lists, padded, random_list

from rankalign.errors import InputError
from rankalign.losses import LOSSES, PARTS, listmle, listnet
from rankalign.losses.ranked import Ranked

# Three responses, best first by score: A, C, B.      A     B      C
#   logps                                            -6    -4    -12
#   lengths                                           2     4      3
#   mean log-prob a token, p                         -3    -1     -4
#   reference                                        -8    -4     -9
#   log-ratio, u                                      2     0     -3
#   scores                                            3     1      2
# Strict pairs, winner first: (A, C), (A, B), (C, B).
HAND = Ranked(
    logps=torch.tensor([[-6.0, -4.0, -12.0]], dtype=torch.float64),
    lengths=torch.tensor([[2, 4, 3]]),
    scores=torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64),
    mask=torch.ones(1, 3, dtype=torch.bool),
    ref_logps=torch.tensor([[-8.0, -4.0, -9.0]], dtype=torch.float64),
    prompt_lengths=torch.tensor([6]),
)


def sig(x: float) -> float:
    return 1 / (1 + exp(-x))


def nls(x: float) -> float:
    return log(1 + exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


Case = tuple[dict[str, Any], float]

CASES: dict[str, list[Case]] = {
    "rrhf": [
        ({}, (0 + 2 + 3) + 6),  # p_C < p_A: fine; p_B exceeds p_A by 2 and p_C by 3; the best has NLL 6
        ({"rrhf_weight": 10.0, "sft_reduction": "mean"}, 10 * 5 + 3),
        ({"length_penalty": 0.0}, (0 + 2 + 8) + 6),
        ({"compat": "release"}, (0 + 2 + 8) / (6 + 4) + 6 / (6 + 4)),  # all over prompt 6 + longest 4
    ],
    "slic_hf": [
        ({}, (0 + (1 + 2) + (1 + 8)) / 3 + 0.5 * 6),
        ({"pairs": "best-worst", "sft_weight": 0.0}, 1 + 2),
        ({"length_penalty": 1.0, "reduction": "sum", "sft_reduction": "mean"}, (0 + (1 + 2) + (1 + 3)) + 0.5 * 3),
    ],
    "orpo": [
        (
            {"pairs": "best-worst", "beta": 0.5},
            3 + 0.5 * nls(log(odds(exp(-3)) / odds(exp(-1)))),
        ),
    ],
    "cpo": [({}, (nls(0.6) + nls(-0.2) + nls(-0.8)) / 3 + 3)],
    "simpo": [({"beta": 2.0, "gamma": 0.5}, (nls(2 * 1 - 0.5) + nls(2 * -2 - 0.5) + nls(2 * -3 - 0.5)) / 3)],
    "alphapo": [
        (
            {"alpha": 0.5, "beta": 1.0, "gamma": 0.25, "pairs": "best-worst"},
            nls(((1 - exp(1.5)) - (1 - exp(0.5))) / 0.5 - 0.25),
        ),
    ],
    "ranknet": [({"reduction": "sum"}, nls(1) + nls(-2) + nls(-3))],
    "dpo": [
        ({}, (nls(0.5) + nls(0.2) + nls(-0.3)) / 3),
        ({"label_smoothing": 0.1, "pairs": "best-worst"}, 0.9 * nls(0.2) + 0.1 * nls(-0.2)),
        ({"f_divergence_type": "forward_kl", "pairs": "best-worst"}, nls(0.1 * ((1 - exp(-2)) - (1 - exp(0))))),
        (
            {"f_divergence_type": "js_divergence", "pairs": "best-worst"},
            nls(0.1 * (log(2 * exp(2) / (exp(2) + 1)) - log(2 * 1 / (1 + 1)))),
        ),
        (
            {"f_divergence_type": "alpha_divergence", "alpha": 0.5, "pairs": "best-worst"},
            nls(0.1 * ((1 - exp(-1)) / 0.5 - 0)),
        ),
    ],
    "sigmoid_norm": [({"beta": 5.0}, (nls(5 * (1 + 1)) + nls(5 * (1 - 0)) + nls(5 * (-1 - 0))) / 3)],
    "ipo": [
        ({"beta": 0.25}, ((2 - 2) ** 2 + (1 - 2) ** 2 + (-1 - 2) ** 2) / 3),
        ({"beta": 0.25, "length_penalty": 0.0}, ((5 - 2) ** 2 + (2 - 2) ** 2 + (-3 - 2) ** 2) / 3),
    ],
    "robust": [({"label_smoothing": 0.1, "pairs": "best-worst"}, (0.9 * nls(0.2) - 0.1 * nls(-0.2)) / 0.8)],
    "hinge": [({"beta": 0.25}, (0 + (1 - 0.5) + (1 + 0.75)) / 3)],
    "exo": [
        (
            {"label_smoothing": 0.1, "pairs": "best-worst"},
            sig(0.2) * log(sig(0.2) / 0.9) + sig(-0.2) * log(sig(-0.2) / 0.1),
        ),
    ],
    "sppo": [({"beta": 0.5}, (((2 - 1) ** 2 + (-3 + 1) ** 2) + ((2 - 1) ** 2 + 1) + ((-3 - 1) ** 2 + 1)) / 3)],
    "apo_zero": [({"beta": 1.0, "pairs": "best-worst"}, (1 - sig(2)) + sig(0))],
    "apo_down": [({"beta": 1.0}, (sig(2) + 1 - sig(5) + sig(2) + 1 - sig(2) + sig(-3) + 1 - sig(-3)) / 3)],
    "bco": [
        ({"beta": 1.0, "delta": 0.5, "pairs": "best-worst"}, nls(2 - 0.5) + nls(-(0 - 0.5))),
        ({"beta": 1.0, "threshold": 1.5}, (nls(2) + nls(-3) + nls(0)) / 3),  # A, C good, B not
    ],
    "discopop": [
        (
            {"beta": 0.5, "tau": 0.5, "pairs": "best-worst"},
            (1 - sig(2)) * nls(1) + sig(2) * exp(-1),  # margin 0.5 * 2, over tau 2
        ),
    ],
    # policy margins A-C 6, A-B -2, C-B -8; reference's 1, -4, -5: sorted -8 -2 6 against -5 -4 1
    "aot": [({}, (nls(0.1 * (-8 + 5)) + nls(0.1 * (-2 + 4)) + nls(0.1 * (6 - 1))) / 3)],
    # winners' u 2, 2, -3, losers' -3, 0, 0: sorted -3 2 2 against -3 0 0
    "aot_unpaired": [({}, (nls(0) + nls(0.2) + nls(0.2)) / 3)],
    "kto": [
        ({"beta": 1.0, "kl": 1.0, "undesirable_weight": 2.0, "pairs": "best-worst"}, (sig(1 - 2) + 2 * sig(0 - 1)) / 2),
        ({"beta": 1.0, "threshold": 1.5}, (sig(-2) + sig(3) + sig(0)) / 3),  # A, C desirable, B not
    ],
    "plackett_luce": [
        ({}, -log(exp(0.2) / (exp(0.2) + exp(-0.3) + exp(0.0))) - log(exp(-0.3) / (exp(-0.3) + exp(0.0)))),
    ],
    # ranked by u: A 1st, B 2nd, C 3rd; wins A 1, C 1/2, B 0
    "lambdaloss": [
        (
            {"beta": 1.0},
            (2 - 2**0.5) * (1 / log2(2) - 1 / log2(4)) * nls(5)
            + (2 - 1) * (1 / log2(2) - 1 / log2(3)) * nls(2)
            + (2**0.5 - 1) * (1 / log2(3) - 1 / log2(4)) * nls(-3),
        ),
    ],
    "nca": [
        ({"beta": 1.0}, nls(2) + (nls(-2) + nls(0) + nls(3)) / 3),
        (
            {"beta": 1.0, "temperature": 1.0},
            (exp(3) * nls(2) + exp(1) * nls(0) + exp(2) * nls(-3)) / (exp(3) + exp(1) + exp(2))
            + (nls(-2) + nls(0) + nls(3)) / 3,
        ),
    ],
    # A: gaps 2 to B, 1 to C, so p_A at 2; C: gap 1 to B
    "pro": [
        (
            {},
            -log(exp(-3 * 2) / (exp(-3 * 2) + exp(-1 * 2) + exp(-4 * 1)))
            - log(exp(-4 * 1) / (exp(-4 * 1) + exp(-1 * 1)))
            + 0.05 * 2**2 * 6,
        ),
    ],
    "listnet": [
        (
            {},
            log(exp(-3) + exp(-1) + exp(-4)) + (3 * exp(3) + 1 * exp(1) + 4 * exp(2)) / (exp(3) + exp(1) + exp(2)),
        ),
    ],
    "listmle": [
        ({}, -log(exp(-3) / (exp(-3) + exp(-4) + exp(-1))) - log(exp(-4) / (exp(-4) + exp(-1)))),
    ],
    "raft": [({}, 3), ({"sft_reduction": "sum"}, 6)],
    "sft": [({}, 3), ({"sft_reduction": "sum"}, 6)],
}


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
    without = Ranked(HAND.logps, HAND.lengths, HAND.scores, HAND.mask)
    if LOSSES[name].needs_reference:
        with pytest.raises(ValueError, match="ref_logps"):
            LOSSES[name].function(without)
    else:
        torch.testing.assert_close(LOSSES[name].function(without), LOSSES[name].function(HAND), atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "reduction" in loss.defaults])
def test_pairs_and_reduction(name: str) -> None:
    """Best-worst on a list is the loss of those two alone; a sum over three pairs is three times their mean."""
    loss = LOSSES[name].function if name not in WEIGHTS else lambda r, **k: PARTS[name](r, **k)["rank_loss"]
    two = Ranked(*(t[:, :2] for t in (HAND.logps, HAND.lengths, HAND.scores, HAND.mask, HAND.ref_logps)))
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
        listed = dict(word.split("=") for word in rows[name].split(" | ")[-2].replace("`", "").split(", "))
        assert listed == {key: str(default) for key, default in loss.defaults.items() if key not in COMMON}, name
