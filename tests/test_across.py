"""Differences over data sets: their means, the two intervals, and what is said of few sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medtpp.evaluation.across import average, detectable, half_width, pool, student, wilcoxon
from medtpp.evaluation.bootstrap import Estimate
from medtpp.evaluation.paired import drawn_difference


def made(value, spread=0.01, seed=0, size=800, seeds=6):
    """A difference whose draws scatter around its value."""
    draws = value + spread * np.random.default_rng(seed).normal(size=size)
    return drawn_difference(value, draws, 0.95, dict.fromkeys(range(seeds), value))


def test_a_set_of_one_comparison_keeps_its_interval():
    part = made(0.02)
    one = average([(5, part)], 0.95)
    assert one.estimate == part.estimate
    assert one.p == part.p
    assert not np.array_equal(one.draws, part.draws)  # in another order, so that sets with the same seeds are unrelated
    turned = average([(5, part)], 0.95, -1)
    assert (turned.estimate.low, turned.estimate.high) == pytest.approx((-part.estimate.high, -part.estimate.low))
    assert turned.by_seed[0] == -0.02


def test_parts_with_the_same_test_stay_paired_and_others_do_not():
    part = made(0.02, size=20_000)
    same, apart = (average([(1, part), (number, part)], 0.95).draws.std() for number in (1, 2))
    assert same == pytest.approx(part.draws.std())
    assert apart == pytest.approx(part.draws.std() / np.sqrt(2), rel=0.03)


def test_the_mean_of_sets():
    sets = [average([(number, made(value, seed=number))], 0.95) for number, value in enumerate((0.01, 0.02, 0.06))]
    found = pool(sets, 0.95, 0)
    assert found.these.estimate.value == pytest.approx(0.03)
    width = found.these.estimate.high - found.these.estimate.low
    assert width == pytest.approx(2 * 1.96 * 0.01 / np.sqrt(3), rel=0.1)
    assert found.like_these.estimate.low < found.these.estimate.low
    assert found.like_these.p > found.these.p
    assert found.wilcoxon is None
    assert pool(sets[:2], 0.95, 0).like_these is None


@pytest.mark.parametrize("sets", [6, 9])
@pytest.mark.parametrize(("between", "inside"), [(1, 0.2), (1, 1), (0.2, 1), (0, 1)])
def test_the_interval_covers_other_sets(between, inside, sets):
    """Sets whose true differences scatter around a mean, each measured with an error: as often as it says, not more."""
    rng, trials = np.random.default_rng(sets), 600
    covered = dict.fromkeys(("wide", "narrow", "p", "these"), 0)
    for _ in range(trials):
        values = between * rng.normal(size=sets) + inside * rng.normal(size=sets)
        found = pool([made(value, inside, int(rng.integers(10**6)), 60) for value in values], 0.95, 0)
        like = found.like_these
        spans = {"wide": like.estimate, "narrow": like.narrow, "these": found.these.estimate}
        for name, estimate in spans.items():
            covered[name] += estimate.low <= 0 <= estimate.high
        covered["p"] += like.p >= 0.05
    for name, level in {"wide": 0.95, "narrow": 0.9, "p": 0.95}.items():
        assert covered[name] / trials == pytest.approx(level, abs=0.03), name
    assert (covered["these"] / trials < 0.85) == (between >= inside)  # it says nothing of other sets


def test_draws_without_the_metric_are_replaced_by_others_of_their_set():
    one = made(0.02)
    draws = one.draws.copy()
    draws[::4] = np.nan
    found = pool([drawn_difference(0.02, draws, 0.95, {}), made(0.02, seed=1)], 0.95, 0)
    assert found.these.estimate.undefined_share == 0
    assert abs(found.these.estimate.low - 0.02) < 0.03


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=9), st.floats(0.01, 1))
def test_interval_and_p_value_of_students_t_agree(values, spread):
    error = spread / len(values)
    found = student(float(np.mean(values)), error, len(values) - 1, 0.95)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((low, high))
    assert (found.p < 0.05) == (low > 0 or high < 0)
    assert found.estimate.low <= found.narrow.low <= found.narrow.high <= found.estimate.high


def test_students_t_without_any_scatter():
    assert student(0.0, 0.0, 5, 0.95).p == 1
    assert student(0.1, 0.0, 5, 0.95).p == 0


def test_wilcoxon_is_exact():
    assert wilcoxon(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) == pytest.approx(2 / 64)
    assert wilcoxon(np.array([-0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) == pytest.approx(4 / 64)
    assert wilcoxon(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) is None
    assert wilcoxon(np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])) is None


def test_what_could_be_seen():
    assert half_width(Estimate(0.0, -0.02, 0.04, 0.0)) == pytest.approx(0.03)
    assert half_width(Estimate(0.0, None, None, 0.0)) is None
    true = detectable(1.96, 0.95)  # of an estimate with standard error 1
    assert 1 - stats.norm.cdf(1.96 - true) == pytest.approx(0.8, abs=0.001)
