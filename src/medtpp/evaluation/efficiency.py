"""How many labels a start without TPP needs for the score that TPP has: "TPP with n equals standard with m"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medtpp.evaluation.paired import Floats


@dataclass(frozen=True)
class EqualLabels:
    """Numbers of labels; minus infinity is fewer, infinity more than there were.

    Attributes:
        value: At which the baseline's curve has the score.
        low, high: Ends of the interval; not-a-number where no draw has one.
    """

    value: float
    low: float
    high: float


def equal_labels(
    counts: Floats, baseline: Floats, baseline_draws: Floats, scores: Floats, score_draws: Floats, level: float
) -> list[EqualLabels]:
    """Where the baseline's scores over the numbers of labels reach some scores.

    The baseline's mean scores are made to rise with the number of labels (isotonic regression; Barlow et al.,
    Statistical Inference under Order Restrictions, 1972) and joined by straight lines over its logarithm, in each draw
    of patients and seeds anew.

    Args:
        counts: (k,) numbers of labels, ascending, two or more.
        baseline: (k,) its scores, more is better.
        baseline_draws: (k, R) in draws.
        scores: (n,) the scores to reach.
        score_draws: (n, R) in the same draws.
        level: Of the intervals.
    """
    whole = inverse(counts, rising(baseline[None]).repeat(len(scores), 0), scores)
    fitted = rising(baseline_draws.T)
    found = []
    for value, draws in zip(whole, score_draws, strict=True):
        defined = ~np.isnan(draws + fitted.sum(axis=1))
        reached = inverse(counts, fitted[defined], draws[defined])
        # The inverted distribution function takes one of the draws, and so never the mean of two infinities.
        low = high = np.nan
        if len(reached):
            low, high = np.quantile(reached, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        found.append(EqualLabels(float(value), float(low), float(high)))
    return found


def rising(curves: Floats) -> Floats:
    """(R, k) the rising curves that are nearest to (R, k) curves; not-a-number where a curve has one.

    Each value is the largest, over the points before it, of the least mean from there to a point after it: isotonic
    regression in a form that does all curves at once (Robertson, Wright & Dykstra, Order Restricted Statistical
    Inference, 1988, theorem 1.4.4).
    """
    points = curves.shape[1]
    sums = np.concatenate([np.zeros((len(curves), 1)), curves.cumsum(axis=1)], axis=1)
    found = np.full(curves.shape, -np.inf)
    for first in range(points):
        lengths = np.arange(1, points - first + 1)
        means = (sums[:, first + 1 :] - sums[:, [first]]) / lengths
        least = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]  # over the ends at or after each point
        found[:, first:] = np.maximum(found[:, first:], least)
    return np.where(np.isnan(curves).any(axis=1, keepdims=True), np.nan, found)


def inverse(counts: Floats, curves: Floats, scores: Floats) -> Floats:
    """(R,) the least number of labels at which rising curves reach scores; infinite beyond their ends.

    Args:
        counts: (k,) numbers of labels.
        curves: (R, k) scores at them.
        scores: (R,) the scores to reach.
    """
    logs, rows = np.log(counts), np.arange(len(scores))
    after = (curves < scores[:, None]).sum(axis=1)  # how many points lie below the score
    right = np.clip(after, 1, len(counts) - 1)
    low, high = curves[rows, right - 1], curves[rows, right]
    rise = np.where(high > low, high - low, 1.0)
    inside = np.exp(logs[right - 1] + np.clip((scores - low) / rise, 0, 1) * (logs[right] - logs[right - 1]))
    found: Floats = np.where(after == len(counts), np.inf, np.where(scores < curves[:, 0], -np.inf, inside))
    return found
