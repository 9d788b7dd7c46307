"""Metrics of classification for many weightings of the same cases at once.

A bootstrap resample is a vector of case weights (how often each case was drawn), so every function here takes the
cases once and weights of shape (r, n), and returns one value per weighting, (r,). Scores are sorted once, not per
resample. Where a metric does not exist (no positive case drawn, say) its value is not-a-number; all ones as weights
give the plain metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

ECE_BINS = 15
_EPSILON = float(np.finfo(np.float32).eps)

OVERALL = (
    "accuracy",
    "balanced_accuracy",
    "auc",
    "average_precision",
    "macro_f1",
    "sensitivity",
    "specificity",
    "ece",
    "brier",
    "log_loss",
)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    value: Floats = np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)
    return value


def _cumulated(weights: Floats) -> Floats:
    """(r, n + 1): the sum of the first 0, 1, ... n weights."""
    return np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights, axis=1)], axis=1)


def mean(values: Floats, weights: Floats) -> Floats:
    """Weighted mean of (n,) values."""
    return _ratio(weights @ values, weights.sum(axis=1))


def roc_auc(scores: Floats, positive: Flags, weights: Floats) -> Floats:
    """Area under the ROC curve: the share of pairs of a positive and a negative that are in order, ties one half.

    Args:
        scores: (n,) higher means positive.
        positive: (n,) the truth.
        weights: (r, n).
    """
    order = np.argsort(scores, kind="stable")
    ascending, weights = scores[order], weights[:, order]
    positives = np.flatnonzero(positive[order])
    negatives_up_to = _cumulated(weights * ~positive[order])
    below = negatives_up_to[:, np.searchsorted(ascending, ascending[positives], side="left")]
    below_or_equal = negatives_up_to[:, np.searchsorted(ascending, ascending[positives], side="right")]
    positive_weights = weights[:, positives]
    pairs_in_order = (positive_weights * (below + below_or_equal)).sum(axis=1) / 2
    return _ratio(pairs_in_order, positive_weights.sum(axis=1) * negatives_up_to[:, -1])


def average_precision(scores: Floats, positive: Flags, weights: Floats) -> Floats:
    """Mean over the positives of the precision at their score; not-a-number without a positive or a negative.

    Args:
        scores: (n,) higher means positive.
        positive: (n,) the truth.
        weights: (r, n).
    """
    order = np.argsort(-scores, kind="stable")
    descending, weights = -scores[order], weights[:, order]
    positives = np.flatnonzero(positive[order])
    # A threshold at a score takes all the cases tied at it.
    taken = np.searchsorted(descending, descending[positives], side="right")
    hits = _cumulated(weights * positive[order])
    all_taken = _cumulated(weights)
    positive_weights = weights[:, positives]
    # A positive that was not drawn (weight 0) may have an undefined precision, which must not count.
    precision = np.where(positive_weights > 0, _ratio(hits[:, taken], all_taken[:, taken]), 0.0)
    total = hits[:, -1]
    value = _ratio((positive_weights * precision).sum(axis=1), total)
    return np.where(all_taken[:, -1] > total, value, np.nan)


def sensitivity(decided: Flags, positive: Flags, weights: Floats) -> Floats:
    """Share of the positives that are decided positive; (n,) flags, (r, n) weights."""
    return _ratio(weights @ (decided & positive), weights @ positive)


def specificity(decided: Flags, positive: Flags, weights: Floats) -> Floats:
    """Share of the negatives that are decided negative; (n,) flags, (r, n) weights."""
    return sensitivity(~decided, ~positive, weights)


def f1(decided: Flags, positive: Flags, weights: Floats) -> Floats:
    """Harmonic mean of precision and sensitivity; (n,) flags, (r, n) weights. Not-a-number without a positive."""
    value = _ratio(2 * (weights @ (decided & positive)), weights @ decided + weights @ positive)
    return np.where(weights @ positive > 0, value, np.nan)


def calibration_error(confidence: Floats, correct: Flags, weights: Floats) -> Floats:
    """Expected calibration error over 15 bins (m/15, (m+1)/15] of the confidence (Guo et al., ICML 2017).

    Args:
        confidence: (n,) in [0, 1].
        correct: (n,) whether the case came out as predicted.
        weights: (r, n).
    """
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps = np.zeros((len(confidence), ECE_BINS))
    gaps[np.arange(len(confidence)), bins] = correct - confidence
    return _ratio(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))


@dataclass(frozen=True)
class Scored:
    """n labelled cases, k classes, and how probabilities become decisions.

    Attributes:
        truth: (n, k) which classes each case has.
        probabilities: (n, k).
        thresholds: (k,) operating threshold of each class against the rest.
        positive: Index of the positive class of a two-class task, else None.
        multilabel: Whether classes are decided one by one, at their thresholds, instead of by the highest probability.
    """

    truth: Flags
    probabilities: Floats
    thresholds: Floats
    positive: int | None
    multilabel: bool

    @property
    def at_threshold(self) -> Flags:
        """(n, k) which classes reach their threshold."""
        return self.probabilities >= self.thresholds

    @property
    def decided(self) -> Flags:
        """(n, k) which classes are predicted."""
        if self.multilabel:
            return self.at_threshold
        top: Flags = np.eye(self.truth.shape[1], dtype=bool)[np.argmax(self.probabilities, axis=1)]
        return top

    @property
    def comparable(self) -> list[int]:
        """The classes that some cases have and others have not: those that macro averages take in."""
        share = self.truth.mean(axis=0)
        return np.flatnonzero((share > 0) & (share < 1)).tolist()


CLASS_METRICS = ("auc", "average_precision", "sensitivity", "specificity", "f1", "recall")


def per_class(scored: Scored, weights: Floats, names: Sequence[str] = CLASS_METRICS) -> dict[str, Floats]:
    """Metrics of each class against the rest, (r, k) each; `recall` is the sensitivity of `decided`."""
    classes = range(scored.truth.shape[1])
    return {name: np.stack([_of_class(name, scored, at, weights) for at in classes], axis=1) for name in names}


def _of_class(name: str, scored: Scored, index: int, weights: Floats) -> Floats:
    truth, scores = scored.truth[:, index], scored.probabilities[:, index]
    if name == "auc":
        return roc_auc(scores, truth, weights)
    if name == "average_precision":
        return average_precision(scores, truth, weights)
    if name in ("sensitivity", "specificity"):
        reached = scored.at_threshold[:, index]
        return (sensitivity if name == "sensitivity" else specificity)(reached, truth, weights)
    decided = scored.decided[:, index]
    return (f1 if name == "f1" else sensitivity)(decided, truth, weights)


def overall(scored: Scored, weights: Floats, names: Sequence[str] = OVERALL) -> dict[str, Floats]:
    """Some of the metrics of `OVERALL`, (r,) each. See docs/evaluation.md for their meaning in each kind of task."""
    needed = {
        "macro_f1": ("f1",),
        "balanced_accuracy": ("sensitivity", "specificity") if scored.multilabel else ("recall",),
    }
    wanted = [part for name in names for part in needed.get(name, (name,)) if part in CLASS_METRICS]
    classes = per_class(scored, weights, tuple(dict.fromkeys(wanted)))
    comparable = scored.comparable
    truth, probabilities, decided = scored.truth, scored.probabilities, scored.decided

    def macro(values: Floats) -> Floats:
        return values[:, comparable].mean(axis=1) if comparable else np.full(len(weights), np.nan)

    def summary(name: str) -> Floats:
        return macro(classes[name]) if scored.positive is None else classes[name][:, scored.positive]

    def accuracy() -> Floats:
        right = (decided == truth).mean(axis=1) if scored.multilabel else np.any(decided & truth, axis=1)
        return mean(right.astype(np.float64), weights)

    def balanced() -> Floats:
        if scored.multilabel:
            return macro((classes["sensitivity"] + classes["specificity"]) / 2)
        return macro(classes["recall"])

    def ece() -> Floats:
        if scored.multilabel:
            labels = range(truth.shape[1])
            each = [calibration_error(probabilities[:, j], truth[:, j], weights) for j in labels]
            return np.asarray(np.mean(each, axis=0))
        return calibration_error(probabilities.max(axis=1), np.any(decided & truth, axis=1), weights)

    def brier() -> Floats:
        squared = (probabilities - truth) ** 2
        if scored.multilabel:
            return mean(squared.mean(axis=1), weights)
        return mean(squared.sum(axis=1) if scored.positive is None else squared[:, scored.positive], weights)

    def log_loss() -> Floats:
        if scored.multilabel:
            likelihood = np.clip(np.where(truth, probabilities, 1 - probabilities), _EPSILON, 1.0)
            return mean(-np.log(likelihood).mean(axis=1), weights)
        return mean(-np.log(np.clip(probabilities[truth], _EPSILON, 1.0)), weights)

    compute: dict[str, Callable[[], Floats]] = {
        "accuracy": accuracy,
        "balanced_accuracy": balanced,
        "auc": lambda: summary("auc"),
        "average_precision": lambda: summary("average_precision"),
        "macro_f1": lambda: macro(classes["f1"]),
        "sensitivity": lambda: summary("sensitivity"),
        "specificity": lambda: summary("specificity"),
        "ece": ece,
        "brier": brier,
        "log_loss": log_loss,
    }
    return {name: compute[name]() for name in names}
