"""Ranks over data sets, against Demšar's worked values (JMLR 2006) and SciPy; medians of which some are infinite."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.isotonic import isotonic_regression

from medtpp.evaluation.convergence import first_reach, median_of
from medtpp.evaluation.efficiency import equal_labels, inverse, rising
from medtpp.evaluation.ranks import alike, critical_difference, friedman, rank_arms

# Demšar, table 5a: the critical values of Nemenyi's test at 0.05, for 2 to 10 classifiers.
CRITICAL = (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164)


@pytest.mark.parametrize(("arms", "value"), [*enumerate(CRITICAL, start=2)])
def test_critical_values(arms, value):
    assert critical_difference(arms, 6) / np.sqrt(arms * (arms + 1) / 36) == pytest.approx(value, abs=0.0016)


def test_demsars_example():
    """Four classifiers on 14 data sets: at 0.10 the first is told from the two best, at 0.05 nothing is."""
    ranks = np.array([3.143, 2.000, 2.893, 1.964])
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert critical_difference(4, 14, 0.9) == pytest.approx(1.12, abs=0.005)
    assert alike(ranks, critical_difference(4, 14)) == ((3, 1, 2, 0),)
    assert alike(ranks, critical_difference(4, 14, 0.9)) == ((3, 1, 2), (2, 0))


def test_friedman_in_the_form_of_iman_and_davenport():
    scores = np.random.default_rng(0).normal(size=(9, 4)) + np.array([0, 0.3, 0.5, 1.0])
    chi = stats.friedmanchisquare(*scores.T).statistic
    assert friedman(scores) == pytest.approx(stats.f.sf(8 * chi / (9 * 3 - chi), 3, 24))
    assert friedman(np.ones((5, 3))) == 1
    assert friedman(np.arange(15.0).reshape(5, 3)) == 0


def test_ties_share_their_ranks():
    found = rank_arms(np.array([[0.9, 0.8, 0.8], [0.7, 0.9, 0.5], [0.6, 0.6, 0.6]]))
    assert found.ranks == pytest.approx(((1 + 2 + 2) / 3, (2.5 + 1 + 2) / 3, (2.5 + 3 + 2) / 3))


@given(st.lists(st.floats(1, 6), min_size=3, max_size=8), st.floats(0.05, 3))
def test_groups_are_the_largest_runs(ranks, critical):
    ranks = np.array(ranks)
    groups = alike(ranks, critical)
    together = {frozenset((one, other)) for group in groups for one in group for other in group if one != other}
    for one in range(len(ranks)):
        for other in range(one):
            assert (frozenset((one, other)) in together) == (abs(ranks[one] - ranks[other]) < critical)
    assert not any(set(one) < set(other) for one in groups for other in groups)


# Labels


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_rising_curves_are_isotonic_regression(curves):
    curves = np.array(curves)
    np.testing.assert_allclose(rising(curves), [isotonic_regression(curve) for curve in curves], atol=1e-12)


def test_labels_on_an_exact_curve():
    """Where the score is 0.1 for each factor of ten, a gain of 0.03 saves a factor of 10 ** 0.3."""
    counts = np.array([10.0, 100.0, 1000.0])
    baseline = 0.5 + 0.1 * np.log10(counts)
    noise = 0.01 * np.random.default_rng(0).normal(size=4000)  # of the gain alone
    gains = np.array([0.03, 0.03, 0.03])
    found = equal_labels(
        counts,
        baseline,
        np.repeat(baseline[:, None], 4000, 1),
        baseline + gains,
        baseline[:, None] + gains[:, None] + noise,
        0.95,
    )
    assert [one.value for one in found] == pytest.approx([10 * 10**0.3, 100 * 10**0.3, np.inf])
    ends = 10 * 10 ** (0.3 + 10 * np.quantile(noise, [0.025, 0.975]))
    assert (found[0].low, found[0].high) == pytest.approx(ends, rel=0.01)
    assert found[2].high == np.inf


def test_labels_beyond_the_curve_and_on_a_flat_one():
    counts = np.array([10.0, 100.0, 1000.0])
    curves = np.array([[0.6, 0.6, 0.7]] * 4)
    found = inverse(counts, curves, np.array([0.5, 0.6, 0.65, 0.8]))
    assert found == pytest.approx([-np.inf, 10, 10**2.5, np.inf])


def test_draws_without_the_metric_give_no_labels():
    counts, draws = np.array([10.0, 100.0]), np.full((2, 5), np.nan)
    (found,) = equal_labels(counts, np.array([0.5, 0.7]), draws, np.array([0.6]), draws[:1], 0.95)
    assert found.value == pytest.approx(10**1.5)
    assert np.isnan(found.low)


# Steps


def test_the_first_step_that_reaches():
    steps = [10, 20, 30]
    assert first_reach(steps, [0.9, 0.5, 0.4], 0.5, lower_is_better=True) == 20
    assert first_reach(steps, [0.9, 0.5, 0.4], 0.9, lower_is_better=False) == 10
    assert first_reach(steps, [0.9, 0.5, 0.4], 0.3, lower_is_better=True) == np.inf


@pytest.mark.parametrize("count", [6, 9, 10, 25])
def test_the_interval_of_a_median_is_exact(count):
    """Its coverage, counted over all numbers of values below the median, is 95% or more; one further in has less."""
    found = median_of(np.arange(count), 0.95)
    outside = int(found.low)
    coverage = 1 - 2 * stats.binom.cdf(outside, count, 0.5)
    assert coverage >= 0.95
    assert 1 - 2 * stats.binom.cdf(outside + 1, count, 0.5) < 0.95
    assert found.high == count - 1 - outside


def test_a_median_of_values_that_may_never_come():
    found = median_of([5, np.inf, 3, 4, np.inf, 6, 2], 0.95)
    assert (found.value, found.low, found.high) == (5, 2, np.inf)
    few = median_of([1, 2, np.inf], 0.95)
    assert (few.value, few.low, few.high) == (2, None, None)
