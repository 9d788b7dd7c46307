"""From test predictions and thresholds to metrics with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medtpp.errors import ConfigError, DataError
from medtpp.evaluation.bootstrap import (
    Bootstrap,
    Estimate,
    estimate_all,
    estimate_text,
    group_by_patient,
    patient_notes,
)
from medtpp.evaluation.metrics import Scored, overall, per_class
from medtpp.evaluation.predictions import Predictions
from medtpp.evaluation.thresholds import Thresholds
from medtpp.files import write_json

SCHEMA = 1
_ONE_VS_REST = ("auc", "average_precision", "sensitivity", "specificity")
_PER_CLASS = (*_ONE_VS_REST, "f1")
_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
    "average_precision": "average precision",
    "macro_f1": "macro F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ece": "expected calibration error",
    "brier": "Brier score",
    "log_loss": "log loss",
}
_LONGEST_NAME = 18
_NEGATIVE = frozenset(
    {"0", "absent", "benign", "control", "false", "healthy", "neg", "negative", "no", "nofinding", "none", "normal"}
)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluation.json` holds.

    Attributes:
        n_cases: Labelled cases evaluated.
        n_patients: Patients they come from; a case of unknown patient counts as one.
        multilabel: Whether cases may have several labels.
        classes: Class name to the number of cases that have it.
        positive: The positive class of a two-class task, else None.
        thresholds: Class name to operating threshold.
        metrics: Name to estimate, in the order of `metrics.OVERALL`.
        per_class: Class name to its metrics against the rest; None where undefined. `n` counts its cases.
        confusion: (k, k) counts, rows the truth, columns the prediction; for multi-label tasks one
            [[tn, fp], [fn, tp]] per class.
        bootstrap: How the intervals were made.
        notes: What a reader must know: cases left out, undefined metrics and why.
    """

    n_cases: int
    n_patients: int
    multilabel: bool
    classes: dict[str, int]
    positive: str | None
    thresholds: dict[str, float]
    metrics: dict[str, Estimate]
    per_class: dict[str, dict[str, float | int | None]]
    confusion: list[Any]
    bootstrap: Bootstrap
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The contents of `evaluation.json`."""
        return {"schema": SCHEMA, **asdict(self), "notes": list(self.notes)}

    def save(self, folder: Path) -> None:
        """Write `evaluation.json`.

        Raises:
            OutputError: The file cannot be written.
        """
        write_json(folder / "evaluation.json", self.to_json())

    def table(self) -> list[tuple[str, str]]:
        """Rows of a title and a value with its interval, at most 80 columns wide together."""
        groups = f"{self.n_patients} patients" if self.bootstrap.unit == "patient" else "patients unknown"
        rows = [("cases", f"{self.n_cases} ({groups})")]
        for name, estimate in self.metrics.items():
            rows.append((self._title(name), estimate_text(estimate)))
        return rows

    def _title(self, name: str) -> str:
        if name not in _ONE_VS_REST or self.positive is None:
            return metric_title(name, macro=self.positive is None)
        short = self.positive[: _LONGEST_NAME - 1] + "…" if len(self.positive) > _LONGEST_NAME else self.positive
        return f"{_TITLES[name]}, {short}"


def metric_title(name: str, *, macro: bool) -> str:
    """A metric in a reader's words; `macro` where every class is compared to the rest."""
    return f"macro {_TITLES[name]}" if macro and name in _ONE_VS_REST else _TITLES[name]


def evaluate(
    test: Predictions,
    *,
    thresholds: Thresholds | Mapping[str, float],
    positive: str | None = None,
    resamples: int = 2000,
    seed: int,
    level: float = 0.95,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Metrics of the labelled cases, each with a percentile interval from a bootstrap over patients.

    Args:
        test: Predictions of the test cases alone (`Predictions.select`); unlabelled ones are left out, with a note.
        thresholds: One per class, from `choose_thresholds` on validation predictions.
        positive: The positive class of a two-class task; None takes what `positive_class` says.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.
        level: Coverage of the intervals.
        notes: What a reader must know beforehand.

    Raises:
        ConfigError: A threshold is missing, or `positive` does not fit the task.
        DataError: No case has a label.
    """
    if not isinstance(thresholds, Thresholds):
        thresholds = Thresholds(dict(thresholds))
    if set(thresholds.values) != set(test.classes):
        raise ConfigError(
            f"Thresholds are for the classes {sorted(thresholds.values)}, the predictions for {sorted(test.classes)}. "
            "Choose the thresholds on predictions of the same model."
        )
    positive = positive_class(test, positive)
    known = test.labelled()
    if not len(known):
        raise DataError("None of the cases to evaluate has a label. Give labels, or use the predictions as they are.")
    scored = score_cases(known, thresholds.values, positive)
    groups = group_by_patient(known)
    bootstrap = Bootstrap(resamples, level, seed, "patient" if any(known.patients) else "case")
    counts = dict(zip(known.classes, scored.truth.sum(axis=0).tolist(), strict=True))
    n_patients = int(groups.max()) + 1
    return Evaluation(
        n_cases=len(known),
        n_patients=n_patients,
        multilabel=known.multilabel,
        classes=counts,
        positive=positive,
        thresholds={name: float(thresholds.values[name]) for name in known.classes},
        metrics=estimate_all(lambda weights: overall(scored, weights), groups, bootstrap),
        per_class=_per_class(scored, counts),
        confusion=_confusion(scored),
        bootstrap=bootstrap,
        notes=(*notes, *thresholds.notes, *_notes(test, known, counts, n_patients)),
    )


def score_cases(known: Predictions, thresholds: Mapping[str, float], positive: str | None) -> Scored:
    """Labelled cases as the metrics take them.

    Args:
        known: Cases that all have labels.
        thresholds: One per class.
        positive: The positive class of a two-class task, else None.
    """
    return Scored(
        truth=np.array([[name in (labels or ()) for name in known.classes] for labels in known.labels], dtype=bool),
        probabilities=known.probabilities.astype(np.float64),
        thresholds=np.array([thresholds[name] for name in known.classes], dtype=np.float64),
        positive=None if positive is None else known.classes.index(positive),
        multilabel=known.multilabel,
    )


def positive_class(predictions: Predictions, positive: str | None = None) -> str | None:
    """The positive class of a single-label task of two classes: the one named, else the one whose name says a finding.

    That is the second in sorted order ("benign", "malignant"), unless the second is a word for health and the first is
    not ("lesion", "normal").

    Returns:
        None for other tasks, in which every class is compared to the rest.

    Raises:
        ConfigError: `positive` is not a class, or the task has no positive class.
    """
    if predictions.multilabel or len(predictions.classes) != 2:
        if positive is not None:
            raise ConfigError(
                f"A positive class ({positive!r}) is for tasks of two classes and one label. Leave it out."
            )
        return None
    if positive is not None and positive not in predictions.classes:
        raise ConfigError(f"The positive class {positive!r} is none of {', '.join(predictions.classes)}.")
    first, second = sorted(predictions.classes)
    return positive or (first if _is_negative(second) and not _is_negative(first) else second)


def _is_negative(name: str) -> bool:
    return name.lower() in _NEGATIVE or name.lower().startswith(
        ("no_", "no ", "no-", "non_", "non-", "not_", "without")
    )


def _per_class(scored: Scored, counts: dict[str, int]) -> dict[str, dict[str, float | int | None]]:
    values = per_class(scored, np.ones((1, len(scored.truth))))
    return {
        name: {**{metric: _number(values[metric][0, index]) for metric in _PER_CLASS}, "n": count}
        for index, (name, count) in enumerate(counts.items())
    }


def _confusion(scored: Scored) -> list[Any]:
    truth, decided = scored.truth.astype(int), scored.decided.astype(int)
    if not scored.multilabel:
        counts: list[Any] = (truth.T @ decided).tolist()
        return counts
    # (k, 2, 2): each class on its own, "not" before "yes".
    pairs = zip(truth.T, decided.T, strict=True)
    return [(np.stack([1 - true, true]) @ np.stack([1 - said, said]).T).tolist() for true, said in pairs]


def _notes(test: Predictions, known: Predictions, counts: dict[str, int], n_patients: int) -> list[str]:
    notes: list[str] = []
    if len(known) < len(test):
        notes.append(f"{len(test) - len(known)} of {len(test)} cases have no label and are left out.")
    for name, count in counts.items():
        if count == 0:
            notes.append(f"No case has the class {name!r}: its specificity is defined, its other metrics are not.")
        elif count == len(known):
            notes.append(
                f"Every case has the class {name!r}: its AUC, average precision and specificity are undefined."
            )
    left_out = [name for name, count in counts.items() if count in (0, len(known))]
    if len(left_out) == len(counts):
        notes.append("No class has cases both in it and out of it: macro averages are undefined.")
    elif left_out:
        notes.append(f"Macro averages leave out: {', '.join(left_out)}.")
    return notes + patient_notes(known.patients, n_patients)


def _number(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
