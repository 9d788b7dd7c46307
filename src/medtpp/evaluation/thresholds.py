"""Operating thresholds, chosen on validation predictions and never on test predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medtpp.evaluation.predictions import Predictions

DEFAULT = 0.5


@dataclass(frozen=True)
class Thresholds:
    """Operating thresholds: a case is positive for a class when its probability is at least the threshold.

    Attributes:
        values: Class name to threshold.
        notes: Why a threshold is not a chosen one, where that is so.
    """

    values: dict[str, float]
    notes: tuple[str, ...] = ()


def choose_thresholds(validation: Predictions) -> Thresholds:
    """The threshold of each class against the rest with the greatest Youden index (Youden, Cancer 1950).

    Candidates lie midway between adjacent scores. Of equally good ones the lowest, the most sensitive, is taken.
    Where no candidate beats chance the threshold is 0.5, and a note says why.
    """
    known = validation.labelled()
    values: dict[str, float] = {}
    notes: list[str] = []
    for index, name in enumerate(known.classes):
        positive = np.array([name in (labels or ()) for labels in known.labels], dtype=bool)
        chosen = _youden(known.probabilities[:, index], positive)
        values[name] = DEFAULT if chosen is None else chosen
        if chosen is None:
            count = int(positive.sum())
            why = (
                "no case has this class"
                if count == 0
                else "every case has this class"
                if count == len(positive)
                else "no threshold is better than chance"
            )
            notes.append(f"The threshold of {name!r} is {DEFAULT}: {why} in the validation set.")
    return Thresholds(values, tuple(notes))


def _youden(scores: NDArray[np.float32], positive: NDArray[np.bool_]) -> float | None:
    """The threshold with the greatest sensitivity + specificity - 1, or None where none is above 0."""
    distinct = np.unique(scores).astype(np.float64)
    positives, negatives = np.sort(scores[positive]), np.sort(scores[~positive])
    if len(distinct) < 2 or not len(positives) or not len(negatives):
        return None
    midpoints = (distinct[1:] + distinct[:-1]) / 2
    above = len(positives) - np.searchsorted(positives, midpoints)
    below = np.searchsorted(negatives, midpoints)
    # Whole numbers, so that equally good thresholds compare as equal.
    score = above * len(negatives) + below * len(positives)
    best = int(np.argmax(score))
    return float(midpoints[best]) if score[best] > len(positives) * len(negatives) else None
