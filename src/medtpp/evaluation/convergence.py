"""When one training reaches what another ends with, and the median over seeds of which some never do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Median:
    """A median with its interval; infinite where half of the values are.

    Attributes:
        value: The median.
        low, high: Ends of the interval; None where there are too few values for one.
    """

    value: float
    low: float | None
    high: float | None


def first_reach(steps: ArrayLike, curve: ArrayLike, target: float, *, lower_is_better: bool) -> float:
    """The first step at which a curve is as good as the target; infinity where it never is.

    Args:
        steps: (n,) ascending.
        curve: (n,) a loss, or a score.
        target: To reach.
        lower_is_better: Of a loss.
    """
    values = np.asarray(curve, dtype=np.float64)
    reached = np.flatnonzero(values <= target if lower_is_better else values >= target)
    return float(np.asarray(steps, dtype=np.float64)[reached[0]]) if len(reached) else float("inf")


def median_of(values: ArrayLike, level: float) -> Median:
    """The median, with an interval from order statistics, which is exact for any distribution.

    It needs no value but its order, so infinite ones do no harm (Conover, Practical Nonparametric Statistics, 1999,
    section 3.2). At 95% it takes 6 values or more.

    Args:
        values: (n,) one or more, some of which may be infinite.
        level: The least coverage of the interval.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    # The largest j with which fewer than j values below the median are rare enough, on both sides together.
    outside = int(np.searchsorted(2 * stats.binom.cdf(np.arange(count), count, 0.5), 1 - level, side="right"))
    middle = float(np.median(ordered))
    if outside < 1:
        return Median(middle, None, None)
    return Median(middle, float(ordered[outside - 1]), float(ordered[count - outside]))
