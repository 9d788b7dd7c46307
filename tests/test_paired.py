from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from medtpp.errors import ConfigError, DataError
from medtpp.evaluation.across import average
from medtpp.evaluation.bootstrap import Bootstrap, Estimate, draw_weights
from medtpp.evaluation.paired import Difference, Run, Scores, difference, holm, judge, resample, resamples_for, widen
from prediction_tables import binary, halves

BOOTSTRAP = Bootstrap(resamples=400, level=0.95, seed=3, unit="patient")


def runs(strength, truth, seeds=range(6), noise=1.0):
    """Runs whose scores follow the truth with some strength."""
    made = {}
    for seed in seeds:
        rng = np.random.default_rng([seed, 7])
        logits = strength * truth + noise * rng.normal(size=len(truth))
        made[seed] = run_of(1 / (1 + np.exp(-logits)), truth)
    return made


def run_of(scores, truth, patients=None):
    predictions = binary(scores, truth, patients)
    return Run(predictions, halves(predictions), "positive")


TRUTH = np.random.default_rng(0).random(80) < 0.4


def test_values_are_the_metric_of_each_run():
    made = runs(1.0, TRUTH)
    scores = resample(made, "auc", BOOTSTRAP)
    expected = [roc_auc_score(TRUTH, run.predictions.probabilities[:, 1]) for run in made.values()]
    np.testing.assert_allclose(scores.values, expected)
    assert scores.resampled.shape == (6, 400)
    assert scores.mean().value == pytest.approx(np.mean(expected))


def test_a_better_arm_helps_and_a_worse_one_hurts():
    strong, weak = (resample(runs(strength, TRUTH), "auc", BOOTSTRAP) for strength in (2.5, 0.5))
    gap = difference(strong, weak)
    assert gap.estimate.low > 0
    assert judge(gap, gap.p, metric="auc", margin=0.005) == "helps"
    assert judge(difference(weak, strong), gap.p, metric="auc", margin=0.005) == "hurts"
    losses = [resample(runs(strength, TRUTH), "brier", BOOTSTRAP) for strength in (2.5, 0.5)]
    lower = difference(*losses)
    assert lower.estimate.value < 0
    assert judge(lower, lower.p, metric="brier", margin=0.005) == "helps"


def test_an_arm_is_equivalent_to_itself():
    scores = resample(runs(1.0, TRUTH), "auc", BOOTSTRAP)
    gap = difference(scores, scores)
    assert gap.estimate.value == gap.estimate.low == gap.estimate.high == 0
    assert gap.p == 1
    assert judge(gap, gap.p, metric="auc", margin=0.005) == "equivalent"
    assert judge(gap, gap.p, metric="auc", margin=0.0) == "no difference seen"


def test_pairing_takes_out_what_the_arms_share():
    """Arms that rank the same patients wrongly differ by less than their own intervals are wide."""
    base = runs(1.0, TRUTH)
    nudged = {
        seed: run_of(np.clip(run.predictions.probabilities[:, 1] + 0.02 * TRUTH, 0, 1), TRUTH)
        for seed, run in base.items()
    }
    one, other = resample(nudged, "auc", BOOTSTRAP), resample(base, "auc", BOOTSTRAP)
    gap, mean = difference(one, other).estimate, one.mean()
    assert gap.high - gap.low < (mean.high - mean.low) / 4


def test_patients_are_drawn_whole():
    """Doubling every case under the same patient changes nothing; doubling it as new patients narrows the interval."""
    made = runs(1.0, TRUTH, seeds=[0])
    probabilities = made[0].predictions.probabilities[:, 1]
    twice, names = np.concatenate([probabilities] * 2), [f"p{i}" for i in range(len(TRUTH))]
    truth = np.concatenate([TRUTH] * 2)
    single, same, apart = (
        resample({0: run_of(*cases)}, "auc", BOOTSTRAP)
        for cases in ((probabilities, TRUTH, names), (twice, truth, names * 2), (twice, truth))
    )
    np.testing.assert_allclose(single.resampled, same.resampled)
    assert apart.resampled.std() < 0.85 * single.resampled.std()


def scored(cases, resamples=400):
    """Scores of (S, n) values of cases, and those of an arm that has zero everywhere."""
    seeds, patients = cases.shape
    bootstrap = Bootstrap(resamples, 0.95, 0, "case")
    weights = np.concatenate(list(draw_weights(np.arange(patients), resamples, 0)))
    shares = weights / weights.sum(axis=1, keepdims=True)
    nothing = Scores(tuple(range(seeds)), np.zeros(seeds), np.zeros((seeds, resamples)), bootstrap)
    return replace(nothing, values=cases.mean(axis=1), resampled=cases @ shares.T), nothing


def test_the_interval_covers_the_truth():
    """Of a difference that has a patient, a seed and a residual part, in simulated comparisons."""
    rng = np.random.default_rng(1)
    patients, seeds, truth, trials, covered = 40, 10, 0.3, 300, 0
    for _ in range(trials):
        noise = rng.normal(size=patients) + 0.3 * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, patients))
        estimate = difference(*scored(truth + noise)).estimate
        covered += estimate.low <= truth <= estimate.high
    assert 0.9 <= covered / trials <= 0.995


@pytest.mark.parametrize("seeds", [5, 10])
def test_intervals_hold_where_seeds_are_what_scatters(seeds):
    """Means and differences, at 95% and 90%, and the p-value: the crossed bootstrap alone covers 84% and 91%."""
    rng, trials = np.random.default_rng(seeds), 600
    covered = dict.fromkeys(("mean", "wide", "narrow", "p"), 0)
    for _ in range(trials):
        noise = rng.normal(size=(seeds, 1)) + 0.1 * rng.normal(size=(seeds, 30))
        ours, nothing = scored(noise)
        gap = difference(ours, nothing)
        for name, estimate in {"mean": ours.mean(), "wide": gap.estimate, "narrow": gap.narrow}.items():
            covered[name] += estimate.low <= 0 <= estimate.high
        covered["p"] += gap.p >= 0.05
    for name, level in {"mean": 0.95, "wide": 0.95, "narrow": 0.9, "p": 0.95}.items():
        assert covered[name] / trials == pytest.approx(level, abs=0.025), name


@pytest.mark.parametrize("scatter", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("seeds", [2, 5, 10])
def test_no_interval_is_narrower_than_students_t_over_the_seeds(seeds, scatter):
    rng = np.random.default_rng([seeds, 1])
    ours, nothing = scored(0.4 + rng.normal(size=(seeds, 1)) + scatter * rng.normal(size=(seeds, 30)))
    gap, test = difference(ours, nothing), stats.ttest_1samp(ours.values, 0.0)
    plain = replace(ours, values=np.zeros(seeds)).draws  # of the bootstrap, as it is without a scatter of values
    for found, level in ((gap.estimate, 0.95), (gap.narrow, 0.9), (ours.mean(), 0.95)):
        t, drawn = test.confidence_interval(level), np.quantile(plain, [(1 - level) / 2, (1 + level) / 2])
        assert (found.low, found.high) == pytest.approx((min(t.low, drawn[0]), max(t.high, drawn[1])), rel=0.01)
        assert found.low <= t.low + 1e-12
        assert found.high >= t.high - 1e-12
    assert gap.p >= test.pvalue
    # The draws tell the same to whatever is made from them: here the mean over the one part of a data set.
    again = average([(7, gap)], 0.95)
    assert (again.estimate, again.narrow, again.p) == (gap.estimate, gap.narrow, gap.p)


def test_draws_are_only_moved_outwards():
    draws = np.array([0.3, np.nan, -0.4, 0.1, 0.2, np.nan, -0.1])
    wide = widen(draws, np.array([-2.0, 0.0, 2.0]))
    assert np.array_equal(np.isnan(wide), np.isnan(draws))
    assert np.array_equal(np.argsort(wide), np.argsort(draws))
    assert wide[2] < -0.4 < 0.3 < wide[0]
    for same in (np.array([1.0]), np.array([0.5, 0.5, 0.5]), np.array([0.1, np.nan, 0.3])):
        np.testing.assert_array_equal(widen(draws, same), draws)
    np.testing.assert_array_equal(widen(np.full(3, np.nan), np.array([0.1, 0.2])), np.full(3, np.nan))
    far = np.linspace(-1, 1, 2001)  # patients scatter far more than seeds do
    kept = widen(far, np.array([-0.01, 0.0, 0.01, 0.0, 0.0]))
    np.testing.assert_array_equal(kept[:900], far[:900])


def test_intervals_of_means_end_where_the_metric_does():
    """Student's t of two seeds reaches far: an AUC is no less than 0 and no more than 1, a loss may be large."""
    made = runs(1.5, TRUTH, seeds=[0]) | runs(-0.5, TRUTH, seeds=[1])
    auc, loss = (resample(made, metric, BOOTSTRAP) for metric in ("auc", "log_loss"))
    assert (auc.mean().low, auc.mean().high) == (0.0, 1.0)
    assert loss.mean().low == 0.0
    assert loss.mean().high > 1.0
    other = resample(runs(-0.5, TRUTH, seeds=[0]) | runs(1.5, TRUTH, seeds=[1]), "auc", BOOTSTRAP)
    assert difference(auc, other).estimate.low < -1
    assert difference(auc, other).estimate.high > 1


def test_few_seeds_say_nothing():
    strong, weak = (resample(runs(strength, TRUTH, seeds=range(4)), "auc", BOOTSTRAP) for strength in (3.0, 0.0))
    gap = difference(strong, weak)
    assert judge(gap, gap.p, metric="auc", margin=0.005) == "too few seeds"


def test_only_shared_seeds_count():
    one, other = (resample(runs(1.0, TRUTH, seeds), "auc", BOOTSTRAP) for seeds in (range(6), range(3, 9)))
    assert list(difference(one, other).by_seed) == [3, 4, 5]
    with pytest.raises(DataError, match="no seed in common"):
        difference(one.select([0, 1]), other)


def test_what_cannot_be_compared_is_refused():
    made = runs(1.0, TRUTH)
    with pytest.raises(ConfigError, match="no metric 'dice'"):
        resample(made, "dice", BOOTSTRAP)
    with pytest.raises(DataError, match="no run"):
        resample({}, "auc", BOOTSTRAP)
    mixed = {**made, 0: run_of(np.linspace(0, 1, 10), np.arange(10) % 2)}
    with pytest.raises(DataError, match="different cases"):
        resample(mixed, "auc", BOOTSTRAP)
    other = resample(made, "auc", Bootstrap(400, 0.95, 4, "patient"))
    with pytest.raises(DataError, match="not paired"):
        difference(resample(made, "auc", BOOTSTRAP), other)


def test_an_undefined_metric_gives_no_verdict():
    everyone = np.ones(20, dtype=bool)
    scores = resample(runs(1.0, everyone), "auc", BOOTSTRAP)
    gap = difference(scores, scores)
    assert gap.estimate.value is None
    assert gap.p is None
    assert judge(gap, gap.p, metric="auc", margin=0.005) == "undefined"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("tests", [1, 20, 21, 60, 200, 500])
def test_a_family_can_come_out_however_many_tests_it_has(tests):
    least = 2 / (resamples_for(tests) + 1)
    assert holm([least] * tests)[0] < 0.05
    assert resamples_for(tests) == 2000 or tests > 20
    assert resamples_for(10**6) == resamples_for(500)  # memory and time


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_never_lowers(p_values):
    adjusted = holm(p_values)
    assert all(0 <= before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [
        (0.01, 0.03, 0.01, "helps"),
        (-0.03, -0.01, 0.01, "hurts"),
        (0.01, 0.03, 0.06, "no difference seen"),  # Holm took it back
        (-0.003, 0.004, 0.8, "equivalent"),
        (-0.003, 0.006, 0.8, "no difference seen"),
    ],
)
def test_verdicts(low, high, p, verdict):
    estimate = Estimate((low + high) / 2, low, high, 0.0)
    gap = Difference(estimate, estimate, p, dict.fromkeys(range(10), 0.0))
    assert judge(gap, p, metric="auc", margin=0.005) == verdict
