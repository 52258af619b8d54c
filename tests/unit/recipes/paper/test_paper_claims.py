"""The paper's claims on hand-made figures: each can hold, fail and stay open."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from torch import nn

from rankalign.evaluation.statistics import Interval
from rankalign.recipes.paper.claims import (
    STATEMENTS,
    Claim,
    Finding,
    Resamples,
    Results,
    Verdict,
    claims,
    divergence_bound,
)
from rankalign.recipes.paper.costs import models_in_memory
from rankalign.recipes.paper.page import budget, claim_text, spent
from rankalign.recipes.paper.power import Z, half_width, needed
from rankalign.training.arguments import parse_settings

HELD, FAILED, OPEN = Verdict.HELD, Verdict.FAILED, Verdict.OPEN
ROWS = (
    "start",
    "rrhf_d",
    "rrhf_p",
    "rrhf_dp",
    "no_rank",
    "rrhf_op",
    "ppo",
    "rloo",
    "grpo",
    "rebel",
    "dpo",
    "online_dpo",
    "rrhf_op_kl",
)
SEEDS, PROMPTS, TRAIN = 3, 40, 30
NOISE = np.random.default_rng(0).normal(size=(len(ROWS), SEEDS, PROMPTS))


def results(noise: float = 0.01, **figures: dict[str, float]) -> Results:
    """All rows alike, but for the figures given by row; ``noise`` on rewards, and a tenth of it on repetition."""
    held: dict[str, Any] = {}
    pool: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    for row, wobble in zip(ROWS, NOISE, strict=True):
        own = {"reward": 0.3, "ppl": 10.0, "repetition": 0.05, "mean": 0.2, "max": 0.6, "models": 1, "peak": 3e9}
        own |= {"seconds": 100}
        own |= figures.get(row, {})
        tokens = np.full((SEEDS, PROMPTS), 20.0)
        held[row] = {
            "reward": own["reward"] + noise * wobble,
            "nats": tokens * np.log(own["ppl"]) * (1 + noise * wobble),
            "tokens": tokens,
            "repetition": own["repetition"] + noise / 10 * wobble,
        }
        pool[row] = {name: np.full((SEEDS, TRAIN), own[name]) for name in ("mean", "max")}
        spent = {"models": own["models"], "peak_bytes": own["peak"], "seconds": own["seconds"]}
        costs[row] = {name: np.full(SEEDS, value) for name, value in spent.items()}
    return Results(held, pool, costs)


def verdicts(given: Results) -> list[Verdict]:
    return [claim.verdict for claim in claims(Resamples(given, draws=500))]


DP = {"rrhf_dp": {"reward": 0.5}}
CASES = [
    # claim, figures, noise, verdict
    (0, DP, 0.01, HELD),
    (0, {"rrhf_dp": {"reward": 0.5, "ppl": 20.0}}, 0.01, FAILED),  # more reward, but other text
    (0, {"ppo": {"reward": 0.5}}, 0.01, FAILED),
    (0, {"ppo": {"reward": 0.35}}, 0.2, OPEN),
    (1, {"ppo": {"models": 2, "peak": 4e9}}, 0.01, HELD),
    (1, {"ppo": {"models": 2, "peak": 2e9}}, 0.01, FAILED),
    (1, {}, 0.01, FAILED),  # as much is not less
    (2, DP, 0.01, HELD),
    (2, {"no_rank": {"reward": 0.5}}, 0.01, FAILED),
    (2, {"rrhf_dp": {"reward": 0.301}}, 0.2, OPEN),
    (3, DP, 0.01, HELD),
    (3, {**DP, "rrhf_p": {"reward": 0.6}}, 0.01, FAILED),  # against D alone it would hold
    (3, {**DP, "rrhf_p": {"reward": 0.5}}, 0.2, OPEN),
    (4, {row: {"reward": 0.5} for row in ROWS}, 0.01, HELD),
    (4, {**{row: {"reward": 0.5} for row in ROWS}, "rrhf_d": {"reward": 0.35}}, 0.01, FAILED),
    (4, {row: {"reward": 0.41} for row in ROWS}, 0.2, OPEN),
    (5, {"rrhf_op": {"repetition": 0.2}}, 0.01, HELD),
    (5, {"rrhf_op": {"ppl": 20.0}}, 0.01, HELD),  # either sign is enough
    (5, {}, 0.01, FAILED),
    (5, {"rrhf_op": {"repetition": 0.07}}, 0.2, OPEN),
    (6, {}, 0.01, HELD),  # as good is within the margin
    (6, {"grpo": {"reward": 0.2}}, 0.01, FAILED),
    (6, {"grpo": {"reward": 0.25}}, 0.2, OPEN),
    (7, {}, 0.01, HELD),
    (7, {"rebel": {"reward": 0.2}}, 0.01, FAILED),
    (7, {"rebel": {"reward": 0.25}}, 0.2, OPEN),
    (8, {"online_dpo": {"reward": 0.4}}, 0.01, HELD),
    (8, {"online_dpo": {"reward": 0.2}}, 0.01, FAILED),
    (8, {"online_dpo": {"reward": 0.301}}, 0.2, OPEN),
    (9, {"rrhf_op_kl": {"reward": 0.5, "seconds": 90}}, 0.01, HELD),
    (9, {"rrhf_op_kl": {"reward": 0.5, "seconds": 110}}, 0.01, FAILED),
    (9, {"rrhf_op_kl": {"reward": 0.301, "seconds": 90}}, 0.2, OPEN),
]


@pytest.mark.parametrize(("claim", "figures", "noise", "verdict"), CASES)
def test_verdicts(claim: int, figures: dict[str, dict[str, float]], noise: float, verdict: Verdict) -> None:
    assert verdicts(results(noise, **figures))[claim] == verdict


def test_every_claim_is_tested_with_every_verdict() -> None:
    seen = {(claim, verdict) for claim, _, _, verdict in CASES}
    wanted = {(i, verdict) for i in range(len(STATEMENTS)) for verdict in Verdict} - {(1, OPEN)}
    assert seen >= wanted
    memory = results()
    memory.costs["ppo"]["models"][:] = 2
    memory.costs["ppo"]["peak_bytes"][:] = [2.5e9, 3.5e9, 4e9]  # some seeds so, some so
    assert verdicts(memory)[1] == OPEN


@pytest.mark.parametrize(
    ("interval", "above", "verdict"),
    [
        ((0.1, 0.2), True, HELD), ((-0.2, -0.1), True, FAILED), ((-0.1, 0.1), True, OPEN), ((0.0, 0.0), True, FAILED),
        ((0.1, 0.2), False, FAILED), ((-0.2, -0.1), False, HELD), ((-0.1, 0.1), False, OPEN), ((0, 0), False, FAILED),
    ],
)  # fmt: skip
def test_a_finding_is_decided_by_its_interval(interval: tuple[float, float], above: bool, verdict: Verdict) -> None:
    assert Finding("", 0.0, Interval(*interval), 0.0, above).verdict == verdict


@pytest.mark.parametrize(
    ("found", "every", "verdict"),
    [
        ((HELD, HELD), True, HELD), ((HELD, OPEN), True, OPEN), ((HELD, FAILED), True, FAILED),
        ((OPEN, FAILED), True, FAILED), ((HELD, FAILED), False, HELD), ((OPEN, FAILED), False, OPEN),
        ((FAILED, FAILED), False, FAILED), ((), True, OPEN), ((), False, OPEN),
    ],
)  # fmt: skip
def test_findings_together(found: tuple[Verdict, ...], every: bool, verdict: Verdict) -> None:
    interval = {HELD: Interval(1, 2), FAILED: Interval(-2, -1), OPEN: Interval(-1, 1)}
    assert Claim("", "", tuple(Finding("", 0, interval[v], 0) for v in found), every).verdict == verdict


def test_a_claim_without_its_rows_stays_open() -> None:
    full = results()
    few = Results({name: full.held[name] for name in ("start", "rrhf_dp")}, full.pool, full.costs)
    found = claims(Resamples(few, draws=10))
    assert {claim.verdict for claim in found} == {OPEN}
    assert found[0].missing == ("ppo",)
    assert found[3].missing == ("rrhf_d", "rrhf_p")


def test_bootstrap_over_seeds_and_prompts() -> None:
    """Of values a_s + b_p, the bootstrap's variance is var(a) / S + var(b) / P; the figures stand in front."""
    a, b = np.array([0.0, 3.0, 6.0]), np.linspace(-2, 2, 20)
    column = {"reward": a[:, None] + b, "nats": np.ones((3, 20)), "tokens": np.full((3, 20), 4.0)}
    of = Resamples(Results({"x": column}, {"x": {"mean": a[:, None] + np.zeros((3, 7))}}, {}), draws=40_000)
    means = of.mean("x", "reward")
    assert means[0] == pytest.approx(3.0, abs=1e-12)
    assert means[1:].var() == pytest.approx(a.var() / 3 + b.var() / 20, rel=0.03)
    assert of.perplexity("x") == pytest.approx(np.full(40_001, np.exp(0.25)))
    assert np.corrcoef(of.pool_mean("x", "mean")[1:], means[1:])[0, 1] > 0.9  # the same seeds in each draw
    alone = Resamples(Results({"x": {"reward": b[None]}}, {}, {}), draws=40_000).mean("x", "reward")
    assert alone[1:].var() == pytest.approx(b.var() / 20, rel=0.03)  # of one seed, the bootstrap over prompts


def test_divergence_bound() -> None:
    assert divergence_bound(1) == 0
    assert divergence_bound(4) == pytest.approx(0.6362943611198906)


def test_models_in_memory() -> None:
    start = nn.Linear(2, 2)

    def held(online: dict[str, Any] | None = None, **train: Any) -> int:
        return models_in_memory(parse_settings({"model": "tiny", "data": "x.jsonl"} | train), start, online)

    judged = {"judge": "j"}
    assert held(loss="rrhf", **judged) == 1
    assert held(loss="dpo", **judged) == 2  # the start model lies beside
    assert held(loss="dpo", references="before", **judged) == held(loss="dpo", use_lora=True, **judged) == 1
    own = {"refresh_every": 1}
    assert held(own, loss="rrhf", **judged) == held(own, loss="rloo_clipped", **judged) == 1  # its reference: who wrote
    assert held(own | {"kl_coef": 0.01}, loss="rrhf", **judged) == held(own, loss="dpo", **judged) == 2
    assert held(own, loss="dpo", use_lora=True, **judged) == 1
    ppo = {"method": "ppo", "reward": "a.py:b"}
    assert held(**ppo) == 2  # policy and reference; a value head is no model
    assert held(**ppo, use_lora=True) == 1  # the reference is the policy with its adapter off
    assert held(**ppo | {"value_model": "rm", "reward": "rm"}) == 4  # the paper's count


def test_the_page_says_whose_budget_differs() -> None:
    names = {"start": "start", "rrhf_d": "RRHF D", "ppo": "PPO", "rrhf_op": "OP"}

    def costs(**sampled: float) -> Results:
        keys = ("seconds", "peak_bytes", "models", "forward", "backward")
        return Results(
            {}, {}, {k: dict.fromkeys(keys, np.ones(2)) | {"sampled": np.full(2, v)} for k, v in sampled.items()}
        )

    equal = costs(start=0, rrhf_d=1000, ppo=1050, rrhf_op=950)
    assert budget(equal, names).startswith("All rows that learn from sampled answers had the same budget")
    assert budget(costs(start=0, rrhf_d=1000, ppo=1050, rrhf_op=2000), names).endswith("of that of RRHF D: OP 2.00.")
    assert spent(equal, names)[0] == ["start", "1", "1e-09", "1", "–", "0.001", "0.001"]
    assert spent(equal, names)[1][4] == "1"


def test_a_claim_on_the_page() -> None:
    findings = (Finding("x", 0.5, Interval(0.4, 0.6), 0.0), Finding("y", 0.0, Interval(-0.1, 0.1), 0.0))
    text = claim_text(Claim("a beats b", "table 9", findings))
    assert text.splitlines() == [
        "**a beats b** (table 9): **not decided**. All of these have to hold:", "",
        "* x: 0.5 [0.4, 0.6], held", "* y: 0 [-0.1, 0.1], not decided",
    ]  # fmt: skip
    assert "lacks the rows it needs: ppo." in claim_text(Claim("a", "b", missing=("ppo",)))


def test_sample_sizes_by_hand() -> None:
    """Additive values have no part of both: prompts alone, seeds alone, and each beside the other."""
    a, b = np.array([-1.0, 0.0, 1.0]), np.array([-3.0, -1.0, 1.0, 3.0])  # variances 1 and 20 / 3
    prompts = needed([np.zeros((3, 1)) + b], 0.98 * Z)
    assert prompts.factor == pytest.approx(20 / 3 / 4 / 0.98**2)  # (20/3) / P = distance^2 / Z^2
    assert prompts.prompts == (7,)
    seeds = needed([a[:, None] + np.zeros((1, 4))], 0.5 * Z)
    assert (seeds.factor, seeds.prompts, seeds.seeds) == (None, (), 4)  # 1 / S = 0.25, which no prompt changes
    both = needed([a[:, None] + b], 2.0 * Z)
    assert both.factor == pytest.approx(max(20 / 3 / 4 / (4 - 1 / 3), 1.0))
    assert both.seeds == 3  # as many as there are are enough
    both = needed([a[:, None] + b], 0.5 * Z)  # 1 / S alone is 0.25, (20/3) / P alone 1.67: (1/3 + 20/12) / f = 0.25
    assert (both.factor, both.seeds, both.both) == (None, None, (24, (32,)))
    assert str(both) == "24 seeds with 32 prompts"
    two = needed([np.zeros((3, 1)) + b, np.zeros((3, 1)) + 2 * np.array([-1.0, 1.0])], Z)
    assert two.factor == pytest.approx(20 / 3 / 4 + 8 / 2)
    assert two.prompts == (23, 12)
    assert str(needed([np.zeros((3, 1)) + b], 0.98 * Z)).startswith("7 prompts at these seeds")
    assert str(needed([a[:, None] + 0 * b], 1e-9)).endswith("seeds at these prompts")


def test_sample_sizes_are_what_it_takes() -> None:
    """With so many prompts, drawn from what the values were drawn from, the interval ends about at the bound."""
    rng = np.random.default_rng(3)

    def draw(seeds: int, prompts: int) -> Any:
        own, shared = rng.normal(size=(seeds, 1)) * 0.05, rng.normal(size=(1, prompts)) * 0.6
        return 0.2 + own + shared + rng.normal(size=(seeds, prompts)) * 0.8

    told = [needed([draw(8, 20)], 0.15).factor for _ in range(400)]
    more = round(20 * float(np.median([factor for factor in told if factor is not None])))
    means = [draw(8, more).mean() for _ in range(3000)]
    assert Z * np.std(means) == pytest.approx(0.15, rel=0.06)


def test_what_is_open_asks_for_more_than_there_is() -> None:
    """The bootstrap's interval, twice as wide as the closed form's, decides; four times the prompts then do."""
    part = np.zeros((3, 1)) + np.array([-3.0, -1.0, 1.0, 3.0]) + 2.0
    half = half_width([part])
    assert half == pytest.approx(Z * math.sqrt(20 / 3 / 4))
    wide = Finding("x", 2.0, Interval(2 - 2 * half, 2 + 2 * half), 2.0 - half, parts=(part,))
    assert (wide.verdict, half) == (OPEN, pytest.approx(wide.value - wide.bound))
    assert wide.needed is not None
    assert wide.needed.factor == pytest.approx(4.0)
    narrow = Finding("x", 2.0, Interval(2 - half / 2, 2 + half), 2.0 - half / 4, parts=(part,))  # no looser than alone
    assert narrow.needed is not None
    assert narrow.needed.factor == pytest.approx(16.0)


def test_open_claims_say_what_would_decide_them() -> None:
    found = claims(Resamples(results(0.2, ppo={"reward": 0.35}), draws=500))[0]
    shown = claim_text(found)
    (reward, factor) = found.findings
    assert reward.verdict == OPEN
    assert reward.needed is not None
    assert f"{reward.needed} would decide it if the figure stays" in shown
    assert factor.needed is None or factor.verdict == OPEN
    by_hand = reward.parts[0].mean()
    assert by_hand == pytest.approx(reward.value, abs=1e-12)


def test_linear_parts_have_the_variance_of_the_ratio() -> None:
    """The interval of a ratio of perplexities is that of the mean of its linear parts."""
    given = results(0.1, rrhf_dp={"ppl": 11.0})
    of = Resamples(given, draws=20_000)
    _, factor = claims(of)[0].findings
    spread = factor.parts[0]
    moved = Resamples(Results({"x": {"reward": spread}}, {}, {}), draws=20_000).mean("x", "reward")
    exact = of.perplexity("rrhf_dp") / of.perplexity("ppo")
    assert moved[1:].std() == pytest.approx(exact[1:].std(), rel=0.05)
