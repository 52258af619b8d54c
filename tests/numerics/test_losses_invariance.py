"""What no loss may depend on: order, padding, batch mates, absolute scores; and what ties and extremes must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.cases import VARIANTS
from parity.lists import lists, padded, random_list, value_and_gradient, with_tokens
from torch import Tensor

from rankalign.losses import LOSSES, PARTS
from rankalign.losses.core import present, score_values
from rankalign.losses.ranked import Ranked
from rankalign.losses.reward import REWARD_LOSSES

Function = Callable[[Ranked], Tensor]

SUMS = {"rrhf", "slic_hf", "orpo", "cpo", "pro"}  # with a likelihood of the first best
LIKELIHOODS = {"sft", "raft"}
# Read score gaps, not their order alone; so do those with a temperature or gain="score".
GAPS = {"listnet", "pro", "odpo", "mappo", "rebel", "reward_rpo", "a_star_po", "swepo", "exo_list"}
ADVANTAGES = {"rloo", "rloo_kl", "rloo_clipped", "grpo", "dr_grpo", "gspo"}
SCALED = GAPS | ADVANTAGES
# Read the policy's level beside the log-ratios.
LEVELS = {"alpha_dpo", "wpo", "wpo_aligned", "rloo_kl", "xpo", "nash_md"}
# Hold something still that depends on the policy: a definition knows, differences of the loss do not.
STOPPED = {"gamma_simpo", "gamma_dpo", "alpha_dpo", "wpo", "wpo_aligned", "beta_dpo", "rloo_kl", "tdpo2", "nash_md"}
LARGE = {"sppo", "cal_dpo"}  # values of 1e5 leave differences few digits
DIFFERENCES = {"dpo", "ipo", "sigmoid_norm", "robust", "hinge", "exo", "discopop", "aot", "aot_unpaired"} | {
    *("plackett_luce", "lambdaloss", "odpo", "r_dpo", "focal_dpo", "dr_dpo", "beta_dpo", "rebel", "reward_rpo"),
    *("softmax_dpo", "approx_ndcg", "neural_ndcg", "diff_ndcg", "gamma_dpo", "infonca", "swepo", "exo_list"),
}


def function(name: str, keywords: dict[str, Any]) -> Function:
    return lambda ranked: LOSSES[name].function(with_tokens(ranked), **keywords)  # of these sums, whatever was there


def rank_term(name: str, keywords: dict[str, Any]) -> Function:
    """The loss, or the part of it that compares candidates."""
    if name in SUMS | {"rloo_kl"}:
        return lambda ranked: PARTS[name](ranked, **keywords)["rank_loss"]
    return function(name, keywords)


ALL = [pytest.param(name, k, id=f"{name}-{k}") for name in LOSSES for k in VARIANTS[name]]
RANKING = [
    pytest.param(name, k, id=f"{name}-{k}")
    for name in LOSSES
    for k in VARIANTS[name]
    if name not in LIKELIHOODS and "threshold" not in k
]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-11)


def columns(ranked: Ranked, index: Tensor) -> Ranked:
    """The candidates of ``index`` (P, N) in its order, as a new leaf."""
    fields = {n: getattr(ranked, n).gather(1, index) for n in ("logps", "lengths", "scores", "mask", "ref_logps")}
    return replace(ranked, **fields | {"logps": fields["logps"].detach().requires_grad_()})


@pytest.mark.parametrize(("name", "keywords"), ALL)
def test_order_of_candidates_does_not_matter(name: str, keywords: dict[str, Any]) -> None:
    """Ties included, except at the top and bottom for losses that take the first or last of equals."""
    data = lists()
    if name in SUMS or name == "sft" or keywords.get("pairs") == "best-worst":
        data = [row for row in data if len({c.score for c in row}) == len(row)]
    ranked = padded(data)
    index = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(p)) for p in range(len(data))])
    shuffled = columns(ranked, index)
    value, gradient = value_and_gradient(function(name, keywords)(ranked), ranked.logps)
    other, moved = value_and_gradient(function(name, keywords)(shuffled), shuffled.logps)
    close(value, other)
    close(gradient.gather(1, index), moved)


@pytest.mark.parametrize(("name", "keywords"), ALL)
def test_batch_equals_one_by_one_and_padding_is_inert(name: str, keywords: dict[str, Any]) -> None:
    """K = 2, 4, 6 in a batch padded with NaN and infinities, against each list alone without padding."""
    data = [random_list(2, 1), random_list(4, 2, [0.0, 1.0, 0.0, 2.0]), random_list(6, 3)]
    batch = padded(data)
    value, gradient = value_and_gradient(function(name, keywords)(batch), batch.logps)
    for row, candidates in enumerate(data):
        alone = replace(padded([candidates]), prompt_lengths=batch.prompt_lengths[row : row + 1])
        one, slope = value_and_gradient(function(name, keywords)(alone), alone.logps)
        close(value[row : row + 1], one)
        close(gradient[row, : len(candidates)], slope[0])
    assert (gradient[~batch.mask] == 0).all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_garbage_outside_the_mask_changes_no_bit(name: str, garbage: float) -> None:
    clean = padded([random_list(2, 1), random_list(4, 2)])
    hole = torch.tensor([[False, True, True, False], [False] * 4])  # the list of two loses a candidate, too
    mask = clean.mask & ~hole
    results = []
    for filler in (0.5, garbage):
        names = ("logps", "lengths", "scores", "ref_logps")
        fields = {n: getattr(clean, n).detach().masked_fill(~mask, filler) for n in names}
        ranked = replace(clean, mask=mask, **fields | {"logps": fields["logps"].requires_grad_()})
        results.append(value_and_gradient(function(name, {})(ranked), ranked.logps))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "keywords"), RANKING)
def test_ties_and_lone_candidates_give_exactly_zero(name: str, keywords: dict[str, Any]) -> None:
    data = [random_list(4, 1, [0.5] * 4), random_list(1, 2), random_list(3, 3)]
    ranked = padded(data)
    ranked = replace(ranked, mask=ranked.mask & torch.tensor([[True], [True], [False]]))  # the third list is empty
    value, gradient = value_and_gradient(rank_term(name, keywords)(ranked), ranked.logps)
    assert torch.equal(value, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_empty_list_gives_zero(name: str) -> None:
    ranked = padded([random_list(3, 1)])
    ranked = replace(ranked, mask=torch.zeros_like(ranked.mask))
    value, gradient = value_and_gradient(function(name, {})(ranked), ranked.logps)
    assert value.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(("name", "keywords"), RANKING)
def test_scores_count_up_to_a_shift_or_a_monotone_map(name: str, keywords: dict[str, Any]) -> None:
    ranked = padded(lists())
    raw_scores = keywords.get("gain") == "score"
    by_value = name in SCALED or keywords.get("temperature") or raw_scores or "preference" in keywords
    loss = function(name, keywords)
    if not raw_scores:
        close(loss(ranked), loss(replace(ranked, scores=ranked.scores + 0.75)))
    mapped = loss(replace(ranked, scores=(2 * ranked.scores).exp()))
    if by_value and keywords.get("temperature") != 0.0:
        assert not torch.allclose(loss(ranked), mapped)
    elif name not in SCALED:
        close(loss(ranked), mapped)


@pytest.mark.parametrize(
    ("name", "keywords"), [p for p in RANKING if LOSSES[p.values[0]].needs_reference and p.values[0] not in LEVELS]
)
def test_reference_losses_see_ratios_only(name: str, keywords: dict[str, Any]) -> None:
    """Adding to policy and reference alike changes nothing; to the policy alone, only where levels matter."""
    ranked, loss = padded(lists()), function(name, keywords)
    shift = torch.linspace(-2, 3, 6, dtype=torch.float64)
    if name == "aot":  # sorts the two apart, so only a shift of the whole list leaves it alone
        shift = torch.full_like(shift, 0.8)
    close(loss(ranked), loss(replace(ranked, logps=ranked.logps + shift, ref_logps=ranked.ref_logps + shift)))
    level = loss(replace(ranked, logps=ranked.logps + 1.5))
    plain = keywords.get("f_divergence_type", "reverse_kl") == "reverse_kl" or keywords.get("alpha") == 0.0
    sums = name != "sigmoid_norm" and not LOSSES[name].defaults.get("length_penalty", 0.0)
    sums = keywords.get("length_penalty", 0.0 if sums else 1.0) == 0
    # LD-DPO that weighs the tokens beyond the shorter length as the others is DPO, TDPO without its KLs too.
    is_dpo = (name, keywords.get("alpha")) in (("ld_dpo", 1.0), ("tdpo2", 0.0))
    differences = name in DIFFERENCES or keywords.get("shift") == 1.0 or is_dpo
    if differences and plain and sums:
        close(loss(ranked), level)
    else:
        assert not torch.allclose(loss(ranked), level)


@pytest.mark.parametrize(("name", "keywords"), [p for p in ALL if p.values[0] not in STOPPED])
def test_gradients_by_finite_differences(name: str, keywords: dict[str, Any]) -> None:
    ranked = padded([random_list(2, 1), random_list(4, 2, [0.0, 1.0, 0.0, 2.0]), random_list(3, 3)])
    leaf = torch.where(ranked.mask, ranked.logps, torch.zeros_like(ranked.logps)).detach().requires_grad_()
    scale = 1e-3 if name in LARGE and not keywords.get("beta") else 1.0

    def loss(logps: Tensor) -> Tensor:
        return scale * function(name, keywords)(replace(ranked, logps=logps))

    assert torch.autograd.gradcheck(loss, leaf, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "keywords"), ALL)
def test_extreme_log_probs_stay_finite(name: str, keywords: dict[str, Any], dtype: torch.dtype, size: float) -> None:
    """Sums of -1e3 to -1e4 nats, right and wrong way round, and a response of certainty (log-prob 0)."""
    logps = torch.tensor([[-size, -1.0, 0.0], [0.0, -1.0, -size]], dtype=dtype, requires_grad=True)
    rows = torch.ones(2, 3, dtype=dtype)
    scores = torch.tensor([[2.0, 1.0, 0.0]] * 2, dtype=dtype)
    ranked = Ranked(logps, 3 * rows, scores, rows.bool(), -2 * rows, torch.tensor([4, 4]))
    value, gradient = value_and_gradient(function(name, keywords)(ranked), logps)
    assert value.dtype == gradient.dtype == dtype
    assert value.isfinite().all()
    assert gradient.isfinite().all()


EXTREME_SCORES = ([1e308, -1e308], [1e308, 1e308, 0.0], [1e300, 1e308, -1e308, 5e-324], [-1.7e308, -1.6e308])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "keywords"), [*ALL, ("nca", {"temperature": 1e-3}), ("listnet", {"temperature": 1e-3})]
)
def test_extreme_scores_stay_finite_and_rank_as_small_ones(
    name: str, keywords: dict[str, Any], dtype: torch.dtype
) -> None:
    data = [random_list(len(scores), i, scores) for i, scores in enumerate(EXTREME_SCORES)]
    ranked = replace(padded(data, dtype), scores=padded(data).scores)
    value, gradient = value_and_gradient(LOSSES[name].function(ranked, **keywords), ranked.logps)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    if name in SCALED or {"temperature", "gain", "threshold", "preference"} & keywords.keys():
        return
    places = [[sorted(set(scores)).index(s) for s in scores] for scores in EXTREME_SCORES]
    small = padded([random_list(len(p), i, p) for i, p in enumerate(places)], dtype)
    assert torch.equal(value, LOSSES[name].function(small, **keywords).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bradley_terry", "per_token"])
def test_margins_of_extreme_scores_stay_finite(name: str, dtype: torch.dtype) -> None:
    data = [random_list(len(scores), i, scores) for i, scores in enumerate(EXTREME_SCORES)]
    ranked = replace(padded(data, dtype), scores=padded(data).scores)
    traces = present(ranked, ranked.logps).unsqueeze(2).expand(-1, -1, 3)
    ends = torch.tensor([0, 3]).expand(*ranked.pairs.shape, 2)
    more = (traces, ends[..., 0], ends[..., 1]) if name == "per_token" else ()
    loss = REWARD_LOSSES[name].function(ranked, *more, margin=2.0)
    value, gradient = value_and_gradient(loss, ranked.logps)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert (value > 0).all()


def test_scores_of_common_size_are_used_as_they_stand() -> None:
    data = [random_list(3, 1, [0.1, -7.3, 1e12]), random_list(2, 2, [1e13, -5e12])]
    values = score_values(padded(data))
    assert values[0].tolist() == [0.1, -7.3, 1e12]
    assert values[1].tolist() == [1e12, -5e11, 0.0]


@pytest.mark.parametrize("name", ["rrhf", "slic_hf", "hinge"])
def test_satisfied_candidates_get_exactly_zero(name: str) -> None:
    """Hinge-type rank terms leave candidates alone that are in no violated pair: what the active-set backward uses."""
    logps = torch.tensor([[-2.0, -90.0, -60.0, -300.0]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 4, dtype=torch.float64)
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)  # only the middle two are out of order
    ranked = Ranked(logps, 30 * ones, scores, ones.bool(), -100 * ones)
    _, gradient = value_and_gradient(rank_term(name, {"beta": 1.0} if name == "hinge" else {})(ranked), logps)
    assert gradient[0, 0] == 0
    assert gradient[0, 3] == 0
    assert gradient[0, 1] < 0 < gradient[0, 2]
