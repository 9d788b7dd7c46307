"""The patient-level bootstrap: patients are drawn with replacement, and bring all their cases along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import ConfigError

Key = TypeVar("Key")

_CHUNK = 2_000_000  # weights held at once: 16 MB


class OfPatients(Protocol):
    """Anything that tells its n cases and their patients."""

    @property
    def cases(self) -> tuple[str, ...]:
        """(n,) unique ids."""

    @property
    def patients(self) -> tuple[str | None, ...]:
        """(n,) patients, None where unknown."""


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


def group_by_patient(table: OfPatients) -> NDArray[np.int64]:
    """(n,) the number of each case's patient; a case of unknown patient is a patient of its own."""
    numbers: dict[tuple[str, str], int] = {}
    keys = (
        ("patient", patient) if patient else ("case", case)
        for case, patient in zip(table.cases, table.patients, strict=True)
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


def estimate_all(
    score: Callable[[NDArray[np.float64]], Mapping[Key, NDArray[np.float64]]],
    groups: NDArray[np.int64],
    bootstrap: Bootstrap,
) -> dict[Key, Estimate]:
    """Metrics on all cases, each with its interval; without one where there is a single patient.

    Args:
        score: From (r, n) weights of the cases to (r,) values of each metric; not-a-number means undefined.
        groups: (n,) the number of each case's patient.
        bootstrap: How patients are drawn.
    """
    values = {name: float(value[0]) for name, value in score(np.ones((1, len(groups)))).items()}
    if groups.max() == 0:
        return {name: Estimate(None if np.isnan(value) else value, None, None, 0.0) for name, value in values.items()}
    chunks = [score(weights) for weights in draw_weights(groups, bootstrap.resamples, bootstrap.seed)]
    return {
        name: summarise(value, np.concatenate([chunk[name] for chunk in chunks]), bootstrap.level)
        for name, value in values.items()
    }


def patient_notes(patients: Sequence[str | None], n_patients: int) -> list[str]:
    """What a reader of the intervals must know of the patients."""
    unknown = sum(patient is None for patient in patients)
    notes: list[str] = []
    if unknown == len(patients):
        notes.append("No patient is known: the bootstrap draws cases, and intervals are too narrow if patients repeat.")
    elif unknown:
        notes.append(f"{unknown} cases have no patient and count as patients of their own.")
    if n_patients == 1:
        notes.append("All cases are of one patient: there is nothing to resample, and no interval.")
    return notes


def estimate_text(estimate: Estimate) -> str:
    """An estimate with its interval, for a table."""
    if estimate.value is None:
        return "undefined"
    text = f"{estimate.value:.3f}"
    if estimate.low is not None and estimate.high is not None:
        text += f"  [{estimate.low:.3f}, {estimate.high:.3f}]"
    if estimate.undefined_share > 0:
        text += f"  ({estimate.undefined_share:.1%} undefined)"
    return text
