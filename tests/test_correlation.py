import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.theory.correlation import rank_correlation


def problem(seed, draws=3, choices=12, strength=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(draws, choices))
    return x, strength * x.mean(axis=0) + rng.normal(size=(draws, choices)), rng.normal(size=(draws, choices))


@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_one_problem_equals_scipy(seed, ties):
    x, y, z = problem(seed)
    if ties:
        x, y = np.round(x), np.round(y)
    found = rank_correlation([x], [y], [[z]], resamples=20)
    a, b, c = (part.mean(axis=0) for part in (x, y, z))
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert found.kendall == pytest.approx(scipy.stats.kendalltau(a, b).statistic)
    (rab, rac, rbc) = (scipy.stats.spearmanr(*pair).statistic for pair in ((a, b), (a, c), (b, c)))
    assert found.partial == pytest.approx((rab - rac * rbc) / ((1 - rac**2) * (1 - rbc**2)) ** 0.5)
    assert (found.choices, found.draws) == (12, 3)


def test_p_value_equals_scipys_permutation_test():
    x, y, _ = problem(0, choices=8, strength=0.5)
    found = rank_correlation([x], [y], resamples=4000)
    a, b = x.mean(axis=0), y.mean(axis=0)
    exact = scipy.stats.permutation_test(
        (a,), lambda v: scipy.stats.spearmanr(v, b).statistic, permutation_type="pairings", n_resamples=4000
    )
    assert found.p_value == pytest.approx(exact.pvalue, abs=0.04)


def test_differences_between_problems_do_not_count():
    parts = [problem(seed, strength=0.0)[:2] for seed in range(4)]
    x = [part[0] + 100 * k for k, part in enumerate(parts)]
    y = [part[1] + 100 * k for k, part in enumerate(parts)]
    found = rank_correlation(x, y, resamples=400)
    each = [rank_correlation([a], [b], resamples=1).spearman for a, b in zip(x, y, strict=True)]
    assert found.spearman == pytest.approx(np.mean(each))
    assert (found.choices, found.problems) == (12, 4)
    assert found.spearman_interval[0] < 0 < found.spearman_interval[1]
    assert found.p_value > 0.05


@pytest.mark.slow
def test_what_choices_share_in_all_problems_counts_once():
    """Under the null, choices with effects common to five tasks: the test rejects about as often as it says."""
    rejected = covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        effects = rng.normal(size=(2, 20))
        x, y = ([effect + 0.2 * rng.normal(size=(2, 20)) for _ in range(5)] for effect in effects)
        found = rank_correlation(x, y, resamples=200)
        rejected += found.p_value < 0.05
        covered += found.spearman_interval[0] <= 0 <= found.spearman_interval[1]
    assert rejected <= 9  # of 60: 5 % and two standard errors
    assert covered >= 50


def test_problems_in_which_a_side_is_constant_do_not_count():
    x, y, _ = problem(3)
    alone = rank_correlation([x], [y], resamples=50)
    found = rank_correlation([x, np.ones_like(x)], [y, y], resamples=50)
    assert (found.spearman, found.kendall, found.problems) == (alone.spearman, alone.kendall, 1)
    assert np.isfinite(found.kendall_interval).all()


def test_groups_are_other_choices():
    (a, b, _), (c, d, _) = problem(4, choices=5), problem(5, choices=9)
    found = rank_correlation([a, c], [b, d], groups=[0, 1], resamples=50)
    parts = [rank_correlation([x], [y], resamples=1).spearman for x, y in ((a, b), (c, d))]
    assert found.spearman == pytest.approx((5 * parts[0] + 9 * parts[1]) / 14)
    assert found.choices == 14
    with pytest.raises(jl.InputError, match="name them apart by groups"):
        rank_correlation([a, c], [b, d])
    with pytest.raises(jl.InputError, match="expected one each"):
        rank_correlation([a, c], [b, d], groups=[0])


def test_interval_covers_what_was_put_in():
    """Of a strong relation: the interval is narrow, excludes 0, and holds the estimate."""
    rng = np.random.default_rng(1)
    effect = rng.normal(size=60)
    x, y, z = (a * effect + 0.3 * rng.normal(size=(3, 60)) for a in (1.0, 2.0, 0.0))
    found = rank_correlation([x], [y], [[z]], resamples=400)
    assert 0.5 < found.spearman_interval[0] < found.spearman < found.spearman_interval[1] <= 1
    assert found.kendall_interval[0] < found.kendall < found.kendall_interval[1]
    assert found.p_value < 0.01


def test_partial_removes_a_common_cause():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 400))
    x, y = z + 0.3 * rng.normal(size=(1, 400)), z + 0.3 * rng.normal(size=(1, 400))
    found = rank_correlation([x], [y], [[z]], resamples=100)
    assert found.spearman > 0.8
    assert abs(found.partial) < 0.15
    assert np.isnan(rank_correlation([x], [y], [[x]], resamples=10).partial)  # nothing of x is left


def test_degenerate_and_bad_values():
    x, y, _ = problem(0)
    constant = rank_correlation([x], [np.ones_like(y)], resamples=10)
    assert np.isnan(constant.spearman)
    assert np.isnan(constant.p_value)
    assert np.isnan(constant.spearman_interval[0])
    for bad, message in (
        (([], []), "at least one problem"),
        (([x], [y[:, :5]]), "expected the same"),
        (([x[:, :2]], [y[:, :2]]), "at least 3 choices"),
        (([x], [y * np.nan]), "NaN"),
    ):
        with pytest.raises(jl.InputError, match=message):
            rank_correlation(*bad)
