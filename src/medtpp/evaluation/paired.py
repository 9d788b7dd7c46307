"""Arms of a comparison: paired differences over the same test patients and seeds, and what may be said of them.

Two things are random: which patients are in the test set, and the seed, which decides the label draw, the initial
weights and the order of the batches. The crossed bootstrap draws both, independently of each other, with replacement
(the pigeonhole bootstrap; Owen, Annals of Applied Statistics 2007), and keeps the arms paired in both.

A handful of seeds, drawn with replacement, scatter too little, by a share of 1 / S, and their percentiles lack the
tails that a scatter known from S values has. `widen` therefore moves the draws out to Student's t over the seeds,
wherever that reaches further. Where patients scatter more than seeds do, it changes nothing. Means of an arm end where
the metric does, so that no interval of an AUC goes beyond 1; differences are not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import special

from medtpp.errors import ConfigError, DataError
from medtpp.evaluation.bootstrap import Bootstrap, Estimate, OfPatients, draw_weights, group_by_patient, summarise
from medtpp.evaluation.evaluate import score_cases
from medtpp.evaluation.metrics import OVERALL, overall
from medtpp.evaluation.predictions import Predictions
from medtpp.evaluation.segmentation import overall_means
from medtpp.evaluation.segmentation_table import METRICS, Segmentations
from medtpp.files import digest

Verdict = Literal["helps", "hurts", "better", "worse", "equivalent", "no difference seen", "too few seeds", "undefined"]
Floats = NDArray[np.float64]

LOWER_IS_BETTER = frozenset({"ece", "brier", "log_loss", "hd95"})
WITHOUT_END = frozenset({"brier", "log_loss", "hd95"})  # other metrics end at 1; all begin at 0
FEWEST_SEEDS = 5  # with fewer, drawing seeds with replacement says too little of how they scatter
SIGNIFICANT = 0.05
_FEWEST_DRAWS = 2000
_MOST_DRAWS = 20_000  # of 10 seeds on 600 cases: 4 seconds and 2 MB for each arm and number of labels
_DRAWS_PER_TEST = 100


class Scorable(OfPatients, Protocol):
    """One trained model's part in a comparison: `cases` are the test cases that have a truth."""

    @property
    def truth(self) -> object:
        """What is known of the cases; its repr() tells test sets apart."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be scored."""

    def scorer(self, metric: str) -> Callable[[Floats], Floats]:
        """A metric as a function of (R, n) weights of the cases, which gives (R,) values."""


@dataclass(frozen=True)
class Run:
    """A classification.

    Attributes:
        predictions: Of the test cases.
        thresholds: Class name to operating threshold, chosen on validation cases.
        positive: The positive class of a two-class task, else None.
    """

    predictions: Predictions
    thresholds: Mapping[str, float]
    positive: str | None = None

    @cached_property
    def known(self) -> Predictions:
        """The labelled cases."""
        return self.predictions.labelled()

    @property
    def cases(self) -> tuple[str, ...]:
        """(n,) ids of the labelled cases."""
        return self.known.cases

    @property
    def patients(self) -> tuple[str | None, ...]:
        """(n,) patients of the labelled cases."""
        return self.known.patients

    @property
    def truth(self) -> object:
        """The labels."""
        return self.known.labels

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of classification."""
        return OVERALL

    def scorer(self, metric: str) -> Callable[[Floats], Floats]:
        """A metric as a function of (R, n) weights."""
        scored = score_cases(self.known, self.thresholds, self.positive)
        return lambda weights: overall(scored, weights, [metric])[metric]


@dataclass(frozen=True)
class SegmentationRun:
    """A segmentation: each metric is the mean over structures of the means over cases.

    Attributes:
        table: Of the test cases.
    """

    table: Segmentations

    @property
    def cases(self) -> tuple[str, ...]:
        """(n,) ids."""
        return self.table.cases

    @property
    def patients(self) -> tuple[str | None, ...]:
        """(n,) patients."""
        return self.table.patients

    @property
    def truth(self) -> object:
        """The sizes of the structures."""
        return self.table.volume_true.tolist()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of segmentation."""
        return METRICS

    def scorer(self, metric: str) -> Callable[[Floats], Floats]:
        """A metric as a function of (R, n) weights."""
        values = self.table.numbers[metric]
        return lambda weights: overall_means(values, weights)


@dataclass(frozen=True, eq=False)
class Scores:
    """A metric of one arm.

    Attributes:
        seeds: (S,) of its runs, ascending.
        values: (S,) on all test cases.
        resampled: (S, R) in R draws of the test patients, the same draws for every arm.
        bootstrap: How the patients were drawn.
        test: What they were tested on, from `tested_on`.
        metric: Its name, which says between what it lies; "" of one without ends.
    """

    seeds: tuple[int, ...]
    values: Floats
    resampled: Floats
    bootstrap: Bootstrap
    test: str = ""
    metric: str = ""

    def select(self, seeds: Sequence[int]) -> Scores:
        """The runs of some seeds, in this order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(self, seeds=tuple(seeds), values=self.values[rows], resampled=self.resampled[rows])

    @property
    def draws(self) -> Floats:
        """(R,) the mean over the seeds in each draw of patients and seeds, widened as far as the metric goes."""
        draws = widen((self.resampled * _seed_weights(self)).sum(axis=0), self.values)
        return np.clip(draws, 0.0, np.inf if self.metric in WITHOUT_END else 1.0) if self.metric else draws

    def mean(self) -> Estimate:
        """The mean over the seeds, with an interval over patients and seeds."""
        return summarise(float(self.values.mean()), self.draws, self.bootstrap.level)


@dataclass(frozen=True)
class Difference:
    """An arm minus its baseline.

    Attributes:
        estimate: Mean paired difference over the seeds, with its interval.
        narrow: The interval at twice the error rate (90% for 95%), for two one-sided tests of equivalence.
        p: Two-sided p-value of the draws; None where no difference can be computed.
        by_seed: Difference of each seed that both arms have; None where the metric is undefined.
        draws: (R,) the mean paired difference in each draw of patients and seeds, widened.
    """

    estimate: Estimate
    narrow: Estimate
    p: float | None
    by_seed: dict[int, float | None]
    draws: Floats = field(default_factory=lambda: np.empty(0), repr=False, compare=False)


def resample(runs: Mapping[int, Scorable], metric: str, bootstrap: Bootstrap) -> Scores:
    """Score the runs of an arm, by seed, on all test cases and on draws of their patients.

    Raises:
        ConfigError: There is no such metric.
        DataError: There is no run, none has a label, or the runs have other test cases.
    """
    if not runs:
        raise DataError("There is no run to score.")
    seeds = tuple(sorted(runs))
    first = runs[seeds[0]]
    if metric not in first.metrics:
        raise ConfigError(f"There is no metric {metric!r}. There are: {', '.join(first.metrics)}.")
    if any(tested_on(runs[seed]) != tested_on(first) for seed in seeds):
        raise DataError("The runs of an arm were tested on different cases or labels, so they cannot be compared.")
    if not first.cases:
        raise DataError("None of the test cases has a label.")
    scorers = [runs[seed].scorer(metric) for seed in seeds]
    whole = np.ones((1, len(first.cases)))
    chunks = [
        np.stack([score(weights) for score in scorers])
        for weights in draw_weights(group_by_patient(first), bootstrap.resamples, bootstrap.seed)
    ]
    return Scores(
        seeds=seeds,
        values=np.array([score(whole)[0] for score in scorers]),
        resampled=np.concatenate(chunks, axis=1),
        bootstrap=bootstrap,
        test=tested_on(first),
        metric=metric,
    )


def tested_on(run: Scorable) -> str:
    """A hash of the cases, patients and truth that a run was tested on."""
    return digest(repr((run.cases, run.patients, run.truth)))


def difference(arm: Scores, baseline: Scores) -> Difference:
    """The paired difference of two arms, over the seeds that both have.

    Raises:
        DataError: They have no seed in common, or were resampled differently.
    """
    shared = sorted(set(arm.seeds) & set(baseline.seeds))
    if not shared:
        raise DataError("The arms have no seed in common.")
    if arm.test != baseline.test:
        raise DataError("The arms were tested on different cases or labels, so they cannot be compared.")
    if arm.bootstrap != baseline.bootstrap:
        raise DataError("The arms were resampled differently, so they are not paired.")
    ours, theirs = arm.select(shared), baseline.select(shared)
    values, gaps = ours.values - theirs.values, ours.resampled - theirs.resampled
    draws = widen((gaps * _seed_weights(ours)).sum(axis=0), values)
    by_seed = {seed: None if np.isnan(gap) else float(gap) for seed, gap in zip(shared, values, strict=True)}
    return drawn_difference(float(values.mean()), draws, arm.bootstrap.level, by_seed)


def widen(draws: Floats, values: Floats) -> Floats:
    """The draws of a mean over seeds, moved outwards to where Student's t over the seeds has them, if that is further.

    The t distribution lies around the mean, is as wide as its standard error over the seeds, and has one degree of
    freedom less than there are seeds. The draws keep their order; each becomes the further out of itself and the
    quantile of that distribution at its rank. So at any level the percentile interval reaches as far as that of the
    bootstrap and that of the t-test do, and the p-value is no smaller than either's, for the draws themselves as for
    what is made from them: the mean over data sets of draws like these is that of Behrens and Fisher.

    Args:
        draws: (R,) not-a-number where the metric does not exist; these stay.
        values: (S,) of the seeds, on all test cases. Nothing moves where there is one, where one is not-a-number, and
            where all are the same.
    """
    count = len(values)
    error = values.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
    if not error > 0:
        return draws
    order = np.argsort(draws, kind="stable")[: int((~np.isnan(draws)).sum())]  # not-a-number comes last
    size = len(order)
    # The ranks of np.quantile, so that intervals are exact; the outermost draws stand for half a draw, not for none.
    shares = np.clip(np.linspace(0, 1, size), 0.5 / max(1, size), 1 - 0.5 / max(1, size))
    reached = values.mean() + error * special.stdtrit(count - 1, shares)
    inner = draws[order]
    wide = draws.copy()
    wide[order] = np.where(shares < 0.5, np.minimum(inner, reached), np.maximum(inner, reached))
    return wide


def drawn_difference(value: float, draws: Floats, level: float, by_seed: dict[int, float | None]) -> Difference:
    """A difference from its value and its (R,) draws, of which not-a-number means undefined."""
    return Difference(
        estimate=summarise(value, draws, level),
        narrow=summarise(value, draws, 1 - 2 * (1 - level)),
        p=p_value(draws),
        by_seed=by_seed,
        draws=draws,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment for several tests at once (Scandinavian Journal of Statistics 1979); None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[index] = highest
    return adjusted


def resamples_for(tests: int) -> int:
    """How many draws p-values take that `holm` adjusts over so many tests.

    None is below 2 / (R + 1), and the smallest is multiplied by the number of tests: 100 draws for each let it come
    down to 0.02. There are 2,000 at least, which is enough for 20 tests, and 20,000 at most, with which no verdict is
    "helps" or "hurts" any more above 500 tests.
    """
    return min(_MOST_DRAWS, max(_FEWEST_DRAWS, _DRAWS_PER_TEST * tests))


def judge(found: Difference, p_adjusted: float | None, *, metric: str, margin: float) -> Verdict:
    """What may be said of a difference.

    Args:
        found: The difference.
        p_adjusted: Its p-value after `holm` over all that were looked at.
        metric: Decides which direction is better.
        margin: Differences smaller than this do not matter; set beforehand.

    Returns:
        "helps" or "hurts" where the adjusted p-value is below 0.05; "equivalent" where the narrow interval lies within
        the margin; "too few seeds" below 5 of them; "undefined" where the metric is. Else "no difference seen", which
        is not "equivalent".
    """
    if found.estimate.value is not None and len(found.by_seed) < FEWEST_SEEDS:
        return "too few seeds"
    return decide(found.estimate, found.narrow, p_adjusted, margin=margin, lower_is_better=metric in LOWER_IS_BETTER)


def decide(
    estimate: Estimate, narrow: Estimate, p_adjusted: float | None, *, margin: float, lower_is_better: bool = False
) -> Verdict:
    """What may be said of a difference as far as its numbers go, however many seeds are behind it; see `judge`."""
    value = estimate.value
    if value is None:
        return "undefined"
    if p_adjusted is not None and p_adjusted < SIGNIFICANT and value:
        return "helps" if (value > 0) != lower_is_better else "hurts"
    if narrow.low is not None and narrow.high is not None and -margin < narrow.low and narrow.high < margin:
        return "equivalent"
    return "no difference seen"


def as_other_method(verdict: Verdict) -> Verdict:
    """The verdict where an arm differs from its baseline in more than TPP, which is then not what helps or hurts."""
    return {"helps": "better", "hurts": "worse"}.get(verdict, verdict)  # type: ignore[return-value]


def _seed_weights(scores: Scores) -> Floats:
    """(S, R) the share of each seed in each resample: as many seeds as there are, drawn with replacement."""
    count, resamples = scores.resampled.shape
    # A stream of its own: patients and seeds are drawn independently of each other.
    rng = np.random.default_rng([scores.bootstrap.seed, 1])
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    shares: Floats = drawn.T / count
    return shares


def p_value(draws: Floats) -> float | None:
    """Twice the smaller share of the resamples at or beyond zero, never below what R resamples can show."""
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return None
    beyond = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(defined) + 1)))
