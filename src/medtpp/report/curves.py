"""The numbers behind the plots: ROC and precision-recall curves, reliability, smoothed losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from medtpp.evaluation import Predictions
from medtpp.evaluation.metrics import ECE_BINS

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassCurve:
    """One class against the rest.

    Attributes:
        name: Of the class.
        false_positive_rate, true_positive_rate: Of the ROC curve.
        recall, precision: Of the precision-recall curve, from the lowest threshold on.
        prevalence: Share of the cases that have the class: the precision of guessing.
        threshold: Where the class is decided.
        found, positives: Cases of the class at or above the threshold, and all of them.
        cleared, negatives: Cases without it below the threshold, and all of them.
    """

    name: str
    false_positive_rate: Floats
    true_positive_rate: Floats
    recall: Floats
    precision: Floats
    prevalence: float
    threshold: float
    found: int
    positives: int
    cleared: int
    negatives: int

    @property
    def sensitivity(self) -> float:
        """At the threshold."""
        return self.found / self.positives

    @property
    def specificity(self) -> float:
        """At the threshold."""
        return self.cleared / self.negatives

    @property
    def precision_there(self) -> float | None:
        """Precision at the threshold; None where no case reaches it."""
        called = self.found + self.negatives - self.cleared
        return self.found / called if called else None


def class_curves(known: Predictions, thresholds: Mapping[str, float], classes: Sequence[str]) -> list[ClassCurve]:
    """Curves of those of the classes that some labelled cases have and others have not."""
    curves = []
    for name in classes:
        truth = np.array([name in (labels or ()) for labels in known.labels])
        if truth.all() or not truth.any():
            continue
        scores = known.probabilities[:, known.classes.index(name)].astype(np.float64)
        false_positive_rate, true_positive_rate, _ = roc_curve(truth, scores)
        precision, recall, _ = precision_recall_curve(truth, scores)
        above = scores >= thresholds[name]
        curves.append(
            ClassCurve(
                name=name,
                false_positive_rate=false_positive_rate,
                true_positive_rate=true_positive_rate,
                recall=recall,
                precision=precision,
                prevalence=float(truth.mean()),
                threshold=thresholds[name],
                found=int((above & truth).sum()),
                positives=int(truth.sum()),
                cleared=int((~above & ~truth).sum()),
                negatives=int((~truth).sum()),
            )
        )
    return curves


def reliability(known: Predictions) -> pd.DataFrame:
    """Bins of the stated probability, of the width that the calibration error has.

    The probability is that of the predicted class, right when the class is; in multi-label tasks that of each label.

    Returns:
        A row for each bin that holds something: low, high, count, stated (mean probability), observed (share right).
    """
    truth = np.array([[name in (labels or ()) for name in known.classes] for labels in known.labels])
    probabilities = known.probabilities.astype(np.float64)
    if known.multilabel:
        stated, right = probabilities.ravel(), truth.ravel()
    else:
        top = probabilities.argmax(axis=1)
        rows = np.arange(len(top))
        stated, right = probabilities[rows, top], truth[rows, top]
    bins = np.clip(np.ceil(stated * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    table = pd.DataFrame({"bin": bins, "stated": stated, "observed": right.astype(np.float64)})
    found = table.groupby("bin").agg(count=("stated", "size"), stated=("stated", "mean"), observed=("observed", "mean"))
    found["low"], found["high"] = found.index / ECE_BINS, (found.index + 1) / ECE_BINS
    return found.reset_index(drop=True)


def smooth(values: pd.Series, share: float = 0.06) -> pd.Series:
    """A centred running mean over a share of the values."""
    window = max(1, round(len(values) * share))
    return values.rolling(window, center=True, min_periods=1).mean()


@dataclass(frozen=True, eq=False)
class Band:
    """A loss over several seeds.

    Attributes:
        step: (n,) optimiser steps.
        mean, low, high: (n,) of the smoothed losses over the seeds: mean, least, greatest.
    """

    step: Floats
    mean: Floats
    low: Floats
    high: Floats


def loss_band(logs: Sequence[pd.DataFrame], points: int = 100) -> Band:
    """The smoothed losses of several logs, at steps that all of them reach."""
    steps = np.linspace(max(log.step.min() for log in logs), min(log.step.max() for log in logs), points)
    losses = np.stack([np.interp(steps, log.step, smooth(log.loss)) for log in logs])
    return Band(steps, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0))
