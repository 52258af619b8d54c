"""Intervals and tests against closed forms, SciPy and the enumeration of every possible resample."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from rankalign.data import shares
from rankalign.evaluation import statistics as st


def every_resample(columns: np.ndarray) -> np.ndarray:
    """Sums of all P^P ordered resamples of P prompts, each equally likely."""
    prompts = len(columns)
    return np.array([columns[list(draw)].sum(axis=0) for draw in itertools.product(range(prompts), repeat=prompts)])


@pytest.mark.parametrize("values", [[3.0, -1.0, 4.5, 0.25, 2.0], [0.0, 1.0, 1.0, 0.0], [7.0, 7.0, 7.0]])
def test_mean_interval_is_that_of_all_resamples(values: list[float]) -> None:
    columns = np.column_stack([values, np.ones(len(values))])
    exact = every_resample(columns)
    wanted = np.quantile(exact[:, 0] / exact[:, 1], [0.025, 0.975])
    found = st.mean_interval(values, draws=200_000, seed=1)
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    # Quantiles of a discrete distribution: 200,000 draws land on the very same atoms.
    assert found.interval == pytest.approx(wanted, abs=1e-9)


def test_ratio_interval_is_that_of_all_resamples() -> None:
    above, below = np.array([3.0, 10.0, 1.0, 8.0, 2.0]), np.array([1.0, 7.0, 2.0, 3.0, 3.0])
    exact = every_resample(np.column_stack([above, below]))
    wanted = np.quantile(exact[:, 0] / exact[:, 1], [0.05, 0.95])
    found = st.ratio_interval(above, below, level=0.9, draws=200_000, seed=2)
    assert found.value == pytest.approx(24 / 16)
    assert found.interval == pytest.approx(wanted, abs=1e-9)


def test_bootstrap_mean_has_the_variance_of_the_plug_in_formula() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=60)
    draws = st.bootstrap(np.column_stack([values, np.ones(60)]), lambda s: s[:, 0] / s[:, 1], draws=100_000)
    # sd of an estimate of a variance from B draws is about var * sqrt(2 / B): 0.45 % here.
    assert draws.var() == pytest.approx(values.var() / 60, rel=0.02)
    assert draws.mean() == pytest.approx(values.mean(), abs=4 * values.std() / math.sqrt(60 * 100_000))


def test_bootstrap_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.column_stack([np.arange(50.0), np.ones(50)])
    whole = st.bootstrap(columns, lambda s: s[:, 0], draws=999)
    monkeypatch.setattr(st, "_CELLS", 50 * 7)
    assert np.array_equal(st.bootstrap(columns, lambda s: s[:, 0], draws=999), whole)


def test_seed_decides_the_draws() -> None:
    values = np.arange(30.0) ** 2
    assert st.mean_interval(values, seed=5) == st.mean_interval(values, seed=5)
    assert st.mean_interval(values, seed=5) != st.mean_interval(values, seed=6)


def test_paired_difference_sees_the_pairing() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(scale=10, size=40)
    found = st.paired_difference(base + 1 + rng.normal(scale=0.1, size=40), base)
    assert found.value == pytest.approx(1, abs=0.1)
    assert 0.9 < found.interval.low < found.value < found.interval.high < 1.1
    with pytest.raises(ValueError, match="one shape"):
        st.paired_difference([1.0, 2.0], [1.0])


def test_percentile_interval_is_linear_between_order_statistics() -> None:
    assert st.percentile_interval(np.arange(101.0), level=0.9) == pytest.approx((5.0, 95.0), abs=1e-12)
    assert st.percentile_interval([0.0, 1.0], level=0.5) == (0.25, 0.75)


def test_cluster_means_and_empty_input() -> None:
    assert st.cluster_means([[1.0, 2.0, 6.0], [4.0]]).tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="no mean"):
        st.cluster_means([[1.0], []])
    with pytest.raises(ValueError, match="nothing to resample"):
        st.mean_interval([])


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (136, 153), (500, 805)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_binomial_intervals_equal_scipy(successes: int, trials: int, level: float) -> None:
    reference = stats.binomtest(successes, trials)
    for ours, method in ((st.clopper_pearson, "exact"), (st.wilson, "wilson")):
        wanted = reference.proportion_ci(level, method=method)
        assert ours(successes, trials, level) == pytest.approx((wanted.low, wanted.high), abs=1e-11)


def test_clopper_pearson_closed_forms() -> None:
    # No success in n trials: (1 - p)^n = 0.025.
    assert st.clopper_pearson(0, 20).high == pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-14)
    assert st.clopper_pearson(20, 20).low == pytest.approx(0.025 ** (1 / 20), abs=1e-14)


@pytest.mark.parametrize(("successes", "trials", "chance"), [(0, 5, 0.3), (2, 5, 0.3), (4, 5, 0.99), (40, 1000, 0.05)])
def test_binomial_tail_is_the_sum_of_its_terms(successes: int, trials: int, chance: float) -> None:
    terms = (math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(successes + 1))
    assert st.binomial_tail(successes, trials, chance) == pytest.approx(math.fsum(terms), rel=1e-11)


def test_binomial_tail_at_its_ends() -> None:
    assert [st.binomial_tail(k, 4, 0.5) for k in (-1, 4, 9)] == [0.0, 1.0, 1.0]
    assert (st.binomial_tail(2, 4, 0.0), st.binomial_tail(2, 4, 1.0)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (8, 1), (5, 5), (7, 6), (36, 44), (300, 250), (49_900, 50_300)]
)
def test_sign_test_is_exact(wins: int, losses: int) -> None:
    trials = wins + losses
    if trials < 1000:
        tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1)) / 2**trials
        assert st.sign_test(wins, losses) == pytest.approx(min(1.0, 2 * tail), rel=1e-11)
    if trials:
        assert st.sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, trials).pvalue, rel=1e-13)


@pytest.mark.parametrize("bad", [(5, 4), (-1, 4), (0, 0)])
def test_impossible_counts_are_refused(bad: tuple[int, int]) -> None:
    for interval in (st.clopper_pearson, st.wilson):
        with pytest.raises(ValueError, match="successes in"):
            interval(*bad)


def test_detectable_difference_is_found_with_the_power_it_says() -> None:
    values = [0.0, 2.0, 5.0, -1.0, 3.0]
    found = st.detectable_difference(values)
    error = np.std(values, ddof=1) / math.sqrt(5)
    # A z-test at the 5 % level rejects beyond 1.96 errors; at this truth it does so four times in five.
    assert stats.norm.sf(stats.norm.ppf(0.975) - found / error) == pytest.approx(0.8, abs=1e-12)
    assert st.detectable_difference([1.0]) == st.detectable_difference([2.0, 2.0]) == 0.0


# --- against arithmetic with 40 digits ---------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(1, 5), (3, 10), (136, 153), (500, 805), (1, 2000), (499, 500)])
def test_exact_intervals_and_tails_to_twelve_digits(k: int, n: int) -> None:
    with mpmath.workdps(40):

        def tail(upto: int, p: mpmath.mpf) -> mpmath.mpf:
            return mpmath.fsum(mpmath.binomial(n, i) * p**i * (1 - p) ** (n - i) for i in range(upto + 1))

        low, high = st.clopper_pearson(k, n)
        # A quantile that is right to 1e-12 leaves a tail right to 1e-12 times the density of it.
        assert float(1 - tail(k - 1, mpmath.mpf(low))) == pytest.approx(0.025, abs=1e-12 * n)
        assert float(tail(k, mpmath.mpf(high))) == pytest.approx(0.025, abs=1e-12 * n)
        assert st.binomial_tail(k, n, 0.4) == pytest.approx(float(tail(k, mpmath.mpf(0.4))), rel=1e-12, abs=1e-300)
        assert st.sign_test(k, n - k) == pytest.approx(
            float(min(mpmath.mpf(1), 2 * tail(min(k, n - k), mpmath.mpf(0.5)))), rel=1e-12, abs=1e-300
        )


@pytest.mark.parametrize(("share", "trials"), [(0.5, 1), (0.25, 2), (0.7, 10.4), (1.0, 3), (0.61, 805)])
def test_wilson_is_where_the_score_test_turns(share: float, trials: float) -> None:
    z = float(mpmath.sqrt(2) * mpmath.erfinv(0.95))
    for bound in shares.wilson(share, trials):
        assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / trials, abs=1e-12)


def test_detectable_difference_is_the_closed_form() -> None:
    values = [0.0, 1.0, 1.0, 2.0]
    z = [float(mpmath.sqrt(2) * mpmath.erfinv(2 * q - 1)) for q in (0.975, 0.8)]
    assert st.detectable_difference(values) == pytest.approx(sum(z) * math.sqrt(2 / 3) / 2, rel=1e-12)
