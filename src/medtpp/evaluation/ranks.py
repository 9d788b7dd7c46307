"""Several arms over several data sets, by their ranks, which need no common scale: other metrics count alike.

The tests are those that Demšar recommends (Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from medtpp.evaluation.paired import Floats

FEWEST_SETS = 3
FEWEST_ARMS = 3


@dataclass(frozen=True)
class Ranking:
    """Mean ranks with what may be said of them.

    Attributes:
        ranks: Mean rank of each arm; 1 is best.
        p: Of Friedman's test that all arms are alike, by the F distribution (Iman & Davenport 1980), which is less
            conservative than the chi-squared one.
        critical: Nemenyi's critical difference: mean ranks closer than this are not told apart.
        groups: Indices of arms that are not told apart, best first; groups may overlap, arms alone are no group.
    """

    ranks: tuple[float, ...]
    p: float
    critical: float
    groups: tuple[tuple[int, ...], ...]


def rank_arms(scores: Floats, level: float = 0.95) -> Ranking:
    """Rank arms on each data set, 1 for the best, equal ones sharing the mean of theirs, and compare the mean ranks.

    Args:
        scores: (D, A) of 3 or more arms on 3 or more data sets, more is better.
        level: One minus the error rate of the critical difference.
    """
    count, arms = scores.shape
    ranks = stats.rankdata(-scores, axis=1).mean(axis=0)
    critical = critical_difference(arms, count, level)
    return Ranking(tuple(ranks.tolist()), friedman(scores), critical, alike(ranks, critical))


def friedman(scores: Floats) -> float:
    """P-value of Friedman's test, in Iman and Davenport's form; 1 where no arm differs anywhere."""
    count, arms = scores.shape
    if (scores == scores[:, :1]).all():
        return 1.0
    chi = float(stats.friedmanchisquare(*scores.T).statistic)
    most = count * (arms - 1)
    if most - chi < 1e-9 * most:  # the same order everywhere
        return 0.0
    return float(stats.f.sf((count - 1) * chi / (most - chi), arms - 1, (arms - 1) * (count - 1)))


def critical_difference(arms: int, count: int, level: float = 0.95) -> float:
    """Nemenyi's critical difference of mean ranks.

    Args:
        arms: How many are compared.
        count: Over how many data sets.
        level: One minus the error rate.
    """
    quantile = stats.studentized_range.ppf(level, arms, np.inf) / np.sqrt(2)
    return float(quantile * np.sqrt(arms * (arms + 1) / (6 * count)))


def alike(ranks: Floats, critical: float) -> tuple[tuple[int, ...], ...]:
    """The largest runs of arms, in the order of their ranks, whose ends lie closer than the critical difference."""
    order = np.argsort(ranks, kind="stable")
    found: list[tuple[int, ...]] = []
    reached = 0
    for first in range(len(order)):
        end = first
        while end + 1 < len(order) and ranks[order[end + 1]] - ranks[order[first]] < critical:
            end += 1
        if end > first and end + 1 > reached:
            found.append(tuple(order[first : end + 1].tolist()))
            reached = end + 1
    return tuple(found)
