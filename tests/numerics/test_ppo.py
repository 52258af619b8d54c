"""PPO's arithmetic against definitions in plain loops, exact sums over a small vocabulary, and numbers by hand."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from torch import Tensor

from rankalign.errors import InputError
from rankalign.training.ppo import math as ppo_math
from rankalign.training.ppo.math import KLController, RunningMoments
from rankalign.training.ppo_settings import KL_ESTIMATORS

LENGTHS = [5, 1, 3, 7]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def widened(values: Tensor, by: int = 4, fill: float = 1e6) -> Tensor:
    """The same rows with more padding behind them, full of rubbish."""
    return torch.cat([values, torch.full((len(values), by), fill, dtype=values.dtype)], 1)


# --- masks -------------------------------------------------------------------------------------------------------


def test_a_response_ends_with_its_first_end() -> None:
    ids = torch.tensor([[5, 2, 6, 2], [2, 5, 5, 5], [5, 6, 7, 8], [5, 6, 7, 9]])
    mask = ppo_math.end_mask(ids, {2, 9})
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert ppo_math.last_index(mask).tolist() == [1, 0, 3, 3]


def test_flat_values_come_to_stand_in_their_rows() -> None:
    mask = ppo_math.length_mask([2, 0, 3])
    assert ppo_math.unflatten(torch.arange(1.0, 6.0), mask).tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert ppo_math.length_mask([1], width=3).tolist() == [[True, False, False]]


# --- rewards -----------------------------------------------------------------------------------------------------


def test_a_score_lands_on_the_end_or_else_on_the_last_token() -> None:
    ids = torch.tensor([[5, 6, 2, 0, 0], [5, 6, 7, 8, 9]])  # the first finished by token 2, the second was cut
    rewards = ppo_math.place_scores([1.5, -2.0], ppo_math.end_mask(ids, {2}))
    assert rewards.tolist() == [[0, 0, 1.5, 0, 0], [0, 0, 0, 0, -2.0]]


def test_scores_a_token_go_to_the_first_tokens() -> None:
    mask = ppo_math.length_mask([3, 3, 2])
    rewards = ppo_math.place_scores([[1.0, 2.0], [4.0], [0.5, 0.25]], mask)
    assert rewards.tolist() == [[1, 2, 0], [0, 0, 4], [0.5, 0.25, 0]]


@pytest.mark.parametrize("score", [[1.0, 1.0, 1.0, 1.0], []])
def test_scores_that_do_not_fit_the_tokens_are_refused(score: list[float]) -> None:
    with pytest.raises(InputError, match="3 tokens"):
        ppo_math.place_scores([score], ppo_math.length_mask([3]))


def test_reference_normalised_scores_go_by_id() -> None:
    baseline = {"a ": 2.0, "\N{GRINNING FACE}": -1.0}
    found = ppo_math.reference_normalised([2.0, [1.0, 1.0]], ["a ", "\N{GRINNING FACE}"], baseline)
    assert found == [0.0, [1.0, 2.0]]  # the reference's own score becomes 0
    with pytest.raises(InputError, match="'a'"):
        ppo_math.reference_normalised([2.0], ["a"], baseline)


def test_clipping_scores() -> None:
    assert [ppo_math.clipped(s, 2.0) for s in (3.0, -3.0, [5.0, 1.0])] == [2.0, -2.0, [2.0, 1.0]]
    assert ppo_math.clipped(300.0, 0.0) == 300.0


def test_shaped_rewards_by_hand_and_without_penalty() -> None:
    mask = ppo_math.length_mask([2, 3])
    scores = ppo_math.place_scores([1.0, 2.0], mask)
    kl = torch.tensor([[0.5, -0.25, 9.0], [1.0, 0.0, 2.0]])
    shaped = ppo_math.shape_rewards(scores, kl, mask, 0.1)
    assert torch.allclose(shaped, torch.tensor([[-0.05, 1.025, 0.0], [-0.1, 0.0, 1.8]]))
    assert torch.equal(ppo_math.shape_rewards(scores, kl, mask, 0.0), scores)


# --- advantages --------------------------------------------------------------------------------------------------


def gae_by_definition(rewards: Tensor, values: Tensor, length: int, gamma: float, lam: float) -> list[float]:
    """Eq. 16 of arXiv:1506.02438 as its double sum, for one response."""
    r, v = rewards.tolist()[:length], [*values.tolist()[:length], 0.0]
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition_whatever_the_padding_holds(gamma: float, lam: float) -> None:
    mask = ppo_math.length_mask(LENGTHS)
    rewards, values = widened(noise(4, 7)), widened(noise(4, 7, seed=1), fill=-1e6)
    advantages, returns = ppo_math.gae(rewards, values, torch.cat([mask, mask[:, :4] & False], 1), gamma, lam)
    for row, length in enumerate(LENGTHS):
        wanted = torch.tensor(gae_by_definition(rewards[row], values[row], length, gamma, lam), dtype=torch.float64)
        torch.testing.assert_close(advantages[row, :length], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(returns[row, :length], wanted + values[row, :length], rtol=1e-12, atol=1e-12)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_with_lambda_1_a_return_is_the_discounted_sum_of_rewards() -> None:
    rewards, mask = noise(2, 4), ppo_math.length_mask([4, 3])
    _, returns = ppo_math.gae(rewards, noise(2, 4, seed=1), mask, 0.9, 1.0)
    for row, length in ((0, 4), (1, 3)):
        wanted = [sum(0.9 ** (k - t) * float(rewards[row, k]) for k in range(t, length)) for t in range(length)]
        assert returns[row, :length].tolist() == pytest.approx(wanted, abs=1e-12)


# --- moments -----------------------------------------------------------------------------------------------------


def test_whitening_counts_what_the_mask_lets_count() -> None:
    values, mask = 3.0 + 5.0 * noise(4, 7), ppo_math.length_mask(LENGTHS)
    white = ppo_math.masked_whiten(values, mask)
    kept = [float(v) for v in values[mask]]
    mean, std = statistics.fmean(kept), statistics.pstdev(kept)  # the population's, not the sample's
    assert white[mask].tolist() == pytest.approx([(v - mean) / std for v in kept], abs=1e-7)
    assert not white[~mask].any()
    wider = ppo_math.masked_whiten(widened(values), torch.cat([mask, mask[:, :4] & False], 1))
    assert torch.equal(wider[:, :7], white)


def test_whitening_by_the_sums_of_all_processes() -> None:
    values, mask = noise(4, 7), ppo_math.length_mask(LENGTHS)
    sums = sum(ppo_math.masked_sums(values[rows], mask[rows]) for rows in ([0, 1], [2, 3]))
    assert isinstance(sums, Tensor)
    halves = [ppo_math.masked_whiten(values[rows], mask[rows], sums) for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(torch.cat(halves), ppo_math.masked_whiten(values, mask), rtol=1e-12, atol=1e-12)


def test_whitening_nothing_and_one_value() -> None:
    assert not ppo_math.masked_whiten(noise(1, 2), ppo_math.length_mask([0], width=2)).any()
    assert ppo_math.masked_whiten(noise(1, 2), ppo_math.length_mask([1], width=2)).tolist() == [[0.0, 0.0]]


def test_running_moments_are_those_of_all_values() -> None:
    rng, seen, running = random.Random(0), [], RunningMoments()
    for size in (1, 7, 0, 30):
        batch = [rng.gauss(100, 3) for _ in range(size)]
        seen += batch
        running.update(batch)
        assert running.mean == pytest.approx(statistics.fmean(seen), abs=1e-11)
        assert running.variance == pytest.approx(statistics.pvariance(seen), abs=1e-11)
    assert running.count == 38


def test_scaled_scores_by_hand() -> None:
    running = RunningMoments()
    running.update([1.0, 5.0])  # mean 3, population deviation 2
    assert running.scaled(7.0, "none") == 7.0
    assert running.scaled(7.0, "running") == running.scaled(7.0, "ref") == 3.5
    assert running.scaled(7.0, "whiten") == 2.0
    spread = running.scaled([1.0, 4.0, 2.0], "whiten")
    assert ppo_math.total(spread) == pytest.approx(running.scaled(7.0, "whiten"))
    assert RunningMoments(count=3, mean=2.0).scaled(7.0, "running") == 7.0  # nothing varied


# --- KL ----------------------------------------------------------------------------------------------------------


def test_kl_estimators_against_exact_sums_over_a_vocabulary() -> None:
    policy, reference = (noise(5, seed=seed).log_softmax(0) for seed in (0, 1))
    kl = float((policy.exp() * (policy - reference)).sum())
    means = {
        kind: float((policy.exp() * ppo_math.kl_per_token(policy, reference, kind)).sum()) for kind in KL_ESTIMATORS
    }
    assert means["k1"] == pytest.approx(kl, abs=1e-12)
    assert means["k3"] == pytest.approx(kl, abs=1e-12)
    assert means["k2"] == pytest.approx(float((policy.exp() * (policy - reference) ** 2).sum()) / 2, abs=1e-12)
    assert bool((ppo_math.kl_per_token(policy, reference, "k3") >= 0).all())
    for kind in KL_ESTIMATORS:
        assert not ppo_math.kl_per_token(policy, policy, kind).any()


def test_adaptive_controller_follows_its_formula() -> None:
    kl = KLController(1.0, target=6.0, horizon=10000)
    kl.update(12.0, 4)  # twice the target: 1 / 5 at most, on 4 of 10,000
    assert kl.coef == pytest.approx(1.00008, abs=1e-15)
    kl = KLController(0.5, target=2.0, horizon=100)
    trajectory = []
    for current in (2.0, 2.2, 9.0, 0.0, 1.9):
        kl.update(current, 10)
        trajectory.append(kl.coef)
    wanted = [0.5]
    for error in (0.0, 0.1, 0.2, -0.2, -0.05):
        wanted.append(wanted[-1] * (1 + error * 10 / 100))
    assert trajectory == pytest.approx(wanted[1:], abs=1e-15)


def test_fixed_controller_stays() -> None:
    kl = KLController(0.3)
    kl.update(100.0, 1000)
    assert kl.coef == 0.3


# --- losses ------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand() -> None:
    ratios = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0, 3.0])
    old = torch.full((6,), -1.0)
    losses, cut = ppo_math.policy_loss(old + ratios.log(), old, advantages, 0.2)
    torch.testing.assert_close(losses, torch.tensor([-2.0, -2.4, 3.0, -1.0, 1.6, -3.3]))
    assert cut.tolist() == [False, True, False, False, True, False]


def test_a_clipped_sample_has_no_gradient() -> None:
    logps = torch.tensor([math.log(1.5), math.log(1.5), 0.0], requires_grad=True)
    losses, _ = ppo_math.policy_loss(logps, torch.zeros(3), torch.tensor([1.0, -1.0, 2.0]), 0.2)
    losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([0.0, 1.5, -2.0])


def test_value_loss_by_hand() -> None:
    values, old = torch.tensor([1.0, 1.0, 0.1, -1.0]), torch.zeros(4)
    returns = torch.tensor([2.0, 0.5, 1.0, -1.0])
    losses, cut = ppo_math.value_loss(values, old, returns, 0.2)
    # near the old value are 0.2, 0.2, 0.1 and -0.2
    torch.testing.assert_close(losses, torch.tensor([1.8**2 / 2, 0.5**2 / 2, 0.9**2 / 2, 0.8**2 / 2]))
    assert cut.tolist() == [True, False, False, True]


# --- what to watch -----------------------------------------------------------------------------------------------


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3.0), -torch.inf, -torch.inf]])
    wanted = [math.log(4), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    assert ppo_math.entropy(logits).tolist() == pytest.approx(wanted, abs=1e-6)


def test_explained_variance() -> None:
    returns, mask = widened(noise(4, 7)), torch.cat([ppo_math.length_mask(LENGTHS), torch.zeros(4, 4).bool()], 1)
    assert ppo_math.explained_variance(returns + 3.0, returns, mask).item() == pytest.approx(1.0, abs=1e-12)
    assert ppo_math.explained_variance(torch.zeros_like(returns), returns, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert ppo_math.explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0, abs=1e-12)
    assert ppo_math.explained_variance(returns, torch.ones_like(returns), mask).item() == 0.0
