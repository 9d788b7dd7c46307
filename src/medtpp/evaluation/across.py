"""A paired difference over several data sets: what it is on these sets, and on sets like these.

Two intervals answer two questions. With the data sets held fixed, patients and seeds are drawn anew inside each set:
what would come out on these sets again? With the data sets seen as a sample: what would come out on other sets like
these?

The second interval and its p-value are Student's t over the values of the sets. These scatter by what differs between
sets and by the noise inside each, so that their standard error holds both, in the shares that they have. A bootstrap
that draws sets and then patients and seeds inside them counts the noise twice (Davison & Hinkley, Bootstrap Methods and
their Application, 1997, section 3.8: of two stages, the second adds what the values hold already). Sets of unlike size
have unlike noise, which makes the test err on the safe side (Bakirov & Székely 2005; Ibragimov & Müller, t-Statistic
Based Correlation and Heterogeneity Robust Inference, Journal of Business & Economic Statistics 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from medtpp.evaluation.bootstrap import Estimate, summarise
from medtpp.evaluation.paired import Difference, Floats, drawn_difference, p_value

FEWEST_DRAWN = 3  # sets; of two, Student's t is thirteen standard errors wide
FEWEST_JUDGED = 6  # sets; five that happen to have the same sign do so in one of sixteen cases
_POWER = 0.8


@dataclass(frozen=True)
class Spread:
    """A mean difference with what surrounds it; as in `Difference`."""

    estimate: Estimate
    narrow: Estimate
    p: float | None


@dataclass(frozen=True)
class Pooled:
    """A mean difference over data sets.

    Attributes:
        sets: How many.
        these: With the data sets held fixed.
        like_these: With the data sets as a sample; None below 3 of them.
        wilcoxon: p-value of the signed-rank test over the sets; None below 6 sets that differ at all.
    """

    sets: int
    these: Spread
    like_these: Spread | None
    wilcoxon: float | None


def average(parts: Sequence[tuple[int, Difference]], level: float, sign: int = 1) -> Difference:
    """The mean difference over the parts of a data set: its folds, sites and backbones.

    Args:
        parts: Each with the number of what it was tested on. Parts of one number share patients and seeds, and their
            draws stay paired; those of different numbers are drawn independently of each other.
        level: Of the intervals.
        sign: -1 where less is better, so that what helps is above zero.
    """
    size = min(len(part.draws) for _, part in parts)
    orders = {number: np.random.default_rng([number, 1]).permutation(size) for number, _ in parts}
    draws = sign * np.mean([part.draws[:size][orders[number]] for number, part in parts], axis=0)
    values = [np.nan if part.estimate.value is None else part.estimate.value for _, part in parts]
    by_seed: dict[int, float | None] = {}
    for seed in sorted({seed for _, part in parts for seed in part.by_seed}):
        known = [gap for _, part in parts if (gap := part.by_seed.get(seed)) is not None]
        by_seed[seed] = sign * float(np.mean(known)) if known else None
    return drawn_difference(sign * float(np.mean(values)), draws, level, by_seed)


def pool(sets: Sequence[Difference], level: float, seed: int) -> Pooled:
    """The mean over data sets, each of which counts alike.

    Args:
        sets: Their differences, all defined, with draws that are independent between sets, as `average` makes them.
        level: Of the intervals.
        seed: Decides by which other draws those without the metric are replaced.
    """
    rng = np.random.default_rng([seed, 2])
    values = np.array([one.estimate.value for one in sets], dtype=np.float64)
    size = min(len(one.draws) for one in sets)
    draws = np.stack([_defined(one.draws[:size], rng) for one in sets])
    value, count = float(values.mean()), len(sets)
    narrow = 1 - 2 * (1 - level)
    fixed = draws.mean(axis=0)
    these = Spread(summarise(value, fixed, level), summarise(value, fixed, narrow), p_value(fixed))
    if count < FEWEST_DRAWN:
        return Pooled(count, these, None, None)
    error = float(values.std(ddof=1) / np.sqrt(count))
    return Pooled(count, these, student(value, error, count - 1, level), wilcoxon(values))


def student(value: float, error: float, freedom: int, level: float) -> Spread:
    """An estimate with intervals and a p-value from its standard error and the degrees of freedom."""
    reaches = [error * float(stats.t.ppf((1 + one) / 2, freedom)) for one in (level, 1 - 2 * (1 - level))]
    wide, narrow = (Estimate(value, value - reach, value + reach, 0.0) for reach in reaches)
    if error == 0:  # every set has the same difference
        return Spread(wide, narrow, 1.0 if value == 0 else 0.0)
    return Spread(wide, narrow, float(2 * stats.t.sf(abs(value) / error, freedom)))


def wilcoxon(values: Floats) -> float | None:
    """Exact two-sided p-value of the signed-rank test (Wilcoxon 1945; over data sets: Demšar, JMLR 2006).

    Sets without any difference are left out; None where fewer than 6 remain, which could not reach 0.05.
    """
    moved = values[values != 0]
    return float(stats.wilcoxon(moved, method="exact").pvalue) if len(moved) >= FEWEST_JUDGED else None


def half_width(estimate: Estimate) -> float | None:
    """Half the width of an interval: a true difference as large is seen about half of the time."""
    return None if estimate.low is None or estimate.high is None else (estimate.high - estimate.low) / 2


def detectable(half: float, level: float) -> float:
    """The true difference that is seen in four of five repetitions, from the half width of an interval."""
    reach = stats.norm.ppf((1 + level) / 2)
    return float(half * (reach + stats.norm.ppf(_POWER)) / reach)


def _defined(draws: Floats, rng: np.random.Generator) -> Floats:
    """The draws, with others of the same set in the place of those in which the metric does not exist."""
    known = draws[~np.isnan(draws)]
    return draws if len(known) == len(draws) else rng.choice(known, len(draws))
