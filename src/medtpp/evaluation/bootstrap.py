"""The patient-level bootstrap: patients are drawn with replacement, and bring all their cases along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import ConfigError
from medtpp.evaluation.predictions import Predictions

_CHUNK = 2_000_000  # weights held at once: 16 MB


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        resamples: How many times patients are drawn.
        level: Coverage that the interval aims at.
        seed: The same seed gives the same interval.
        unit: "patient", or "case" where no patient is known.
    """

    resamples: int
    level: float
    seed: int
    unit: Literal["patient", "case"]

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.level < 1:
            raise ConfigError(
                f"The bootstrap needs 1 resample or more and a level between 0 and 1, not {self.resamples} and "
                f"{self.level}. 2000 and 0.95 are usual."
            )


@dataclass(frozen=True)
class Estimate:
    """A metric with its interval.

    Attributes:
        value: None where the metric does not exist for these cases.
        low: Lower end of the percentile interval, or None.
        high: Upper end of the percentile interval, or None.
        undefined_share: Share of the resamples in which the metric does not exist; they are left out.
    """

    value: float | None
    low: float | None
    high: float | None
    undefined_share: float


def group_by_patient(predictions: Predictions) -> NDArray[np.int64]:
    """(n,) the number of each case's patient; a case of unknown patient is a patient of its own."""
    numbers: dict[tuple[str, str], int] = {}
    keys = (
        ("patient", patient) if patient else ("case", case)
        for case, patient in zip(predictions.cases, predictions.patients, strict=True)
    )
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def draw_weights(groups: NDArray[np.int64], resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each case is drawn in each resample, (r, n) in chunks of r that add up to `resamples`.

    Args:
        groups: (n,) the number of each case's patient, from 0 on.
        resamples: How many times to draw as many patients as there are.
        seed: The same seed gives the same draws, however they are chunked.
    """
    patients = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(groups))
    for start in range(0, resamples, rows):
        drawn = rng.multinomial(patients, np.full(patients, 1 / patients), size=min(rows, resamples - start))
        yield drawn[:, groups].astype(np.float64)


def summarise(value: float, resampled: NDArray[np.float64], level: float) -> Estimate:
    """An estimate from a metric's value and its (r,) values in resamples; not-a-number means undefined."""
    defined = resampled[~np.isnan(resampled)]
    low: float | None = None
    high: float | None = None
    if len(defined) and not np.isnan(value):
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Estimate(None if np.isnan(value) else float(value), low, high, 1 - len(defined) / len(resampled))
