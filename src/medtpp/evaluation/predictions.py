"""Predictions: the table between a model and its evaluation.

`predictions.csv` has the columns `case,split,patient,site,label,p_<class>...`, one row per case. In a multi-label
file the column is called `labels`: the labels of a case are joined by ";", and a lone ";" says "no finding", since an
empty cell means that the labels are not known.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import DataError
from medtpp.evaluation.tables import UnixLines, invalid_table, read_table, shortened
from medtpp.files import atomic

SEPARATOR = ";"
_FIXED = ("case", "split", "patient", "site")
_PREFIX = "p_"
_SUM_TOLERANCE = 1e-2  # bfloat16 soft-max and tables rounded to three digits pass, logits do not
_RANGE_TOLERANCE = 1e-5  # averages of float32 probabilities end up a little above 1
_KIND = "predictions"

Labels = tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predicted probabilities of n cases for k classes, with what is known of the cases.

    Attributes:
        cases: (n,) unique ids.
        split: (n,) "train", "val", "test", or "" for new cases.
        patients: (n,) patients, None where unknown.
        sites: (n,) hospitals or scanners, None where unknown.
        labels: (n,) each None where unknown, else a tuple: of one class, or of any number of them if `multilabel`.
        classes: (k,) class names, in the order of the columns of `probabilities`.
        probabilities: (n, k) float32 in [0, 1]. Rows sum to 1 unless `multilabel`.
        multilabel: Whether a case may have several labels or none.

    Raises:
        DataError: The fields do not fit together; all problems are listed by case and column.
    """

    cases: tuple[str, ...]
    split: tuple[str, ...]
    patients: tuple[str | None, ...]
    sites: tuple[str | None, ...]
    labels: tuple[Labels, ...]
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    multilabel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=np.float32))
        expected = (len(self.cases), len(self.classes))
        if self.probabilities.shape != expected:
            raise DataError(f"The probabilities have the shape {self.probabilities.shape} instead of {expected}.")
        short = [f.name for f in fields(self)[1:5] if len(getattr(self, f.name)) != len(self.cases)]
        if short:
            raise DataError(f"Predictions for {len(self.cases)} cases need as many entries in: {', '.join(short)}.")
        problems = [
            f"case {self.cases[row]!r}, column {column}: {what}"
            for row, column, what in _find_problems(
                self.cases, self.labels, self.classes, self.probabilities, self.multilabel
            )
        ]
        if problems or not self.classes:
            raise DataError("The predictions are not valid.", shortened(problems) or ["there is no class"])

    def __len__(self) -> int:
        return len(self.cases)

    def select(self, split: str) -> Predictions:
        """The cases of one split.

        Raises:
            DataError: There is none.
        """
        rows = [row for row, name in enumerate(self.split) if name == split]
        if not rows:
            there = ", ".join(sorted({repr(name) for name in self.split}))
            raise DataError(f"There are no predictions for the split {split!r}. There are: {there or 'none at all'}.")
        return self.take(rows)

    def labelled(self) -> Predictions:
        """The cases whose labels are known (may be none)."""
        return self.take([row for row, labels in enumerate(self.labels) if labels is not None])

    def take(self, rows: Sequence[int]) -> Predictions:
        """The cases at these positions."""
        return Predictions(
            cases=tuple(self.cases[row] for row in rows),
            split=tuple(self.split[row] for row in rows),
            patients=tuple(self.patients[row] for row in rows),
            sites=tuple(self.sites[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows),
            classes=self.classes,
            probabilities=self.probabilities[np.asarray(rows, dtype=int)],
            multilabel=self.multilabel,
        )


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write `predictions.csv`. Nine significant digits hold a float32 exactly.

    Raises:
        OutputError: The file cannot be written.
    """
    label_column = "labels" if predictions.multilabel else "label"
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(UnixLines(stream))
        writer.writerow([*_FIXED, label_column, *(_PREFIX + name for name in predictions.classes)])
        for row, case in enumerate(predictions.cases):
            writer.writerow(
                [
                    case,
                    predictions.split[row],
                    predictions.patients[row] or "",
                    predictions.sites[row] or "",
                    _labels_to_text(predictions.labels[row], predictions.multilabel),
                    *(f"{value:.9g}" for value in predictions.probabilities[row].tolist()),
                ]
            )


def read_predictions(path: Path) -> Predictions:
    """Read `predictions.csv`. The columns may come in any order.

    Raises:
        DataError: The file is missing or malformed; all problems are listed by line and column.
    """
    raw = read_table(path, _KIND, _find_header_problems)
    lines, header, table = raw.lines, raw.header, raw.rows
    multilabel = "labels" in header
    column = {name: index for index, name in enumerate(header)}
    classes = tuple(name.removeprefix(_PREFIX) for name in header if name.startswith(_PREFIX))

    problems: list[tuple[int, str, str]] = []
    probabilities = np.zeros((len(table), len(classes)), dtype=np.float32)
    for row, cells in enumerate(table):
        for index, name in enumerate(classes):
            text = cells[column[_PREFIX + name]]
            try:
                probabilities[row, index] = float(text)
            except ValueError:
                problems.append((row, _PREFIX + name, f"{text!r} is not a number"))

    cases, split, patients, sites = ([cells[column[name]] for cells in table] for name in _FIXED)
    labels = [_labels_from_text(cells[column["labels" if multilabel else "label"]], multilabel) for cells in table]
    # A cell that is no number would only show up again as a sum that is not 1.
    problems = problems or list(_find_problems(cases, labels, classes, probabilities, multilabel))
    if problems:
        found = [f"line {lines[row]}, column {name}: {what}" for row, name, what in problems]
        raise invalid_table(path, _KIND, found)
    return Predictions(
        cases=tuple(cases),
        split=tuple(split),
        patients=tuple(name or None for name in patients),
        sites=tuple(name or None for name in sites),
        labels=tuple(labels),
        classes=classes,
        probabilities=probabilities,
        multilabel=multilabel,
    )


def _find_header_problems(header: Sequence[str]) -> list[str]:
    counts = Counter(header)
    problems = [f"column {name}: it appears {count} times" for name, count in counts.items() if count > 1]
    problems += [f"column {name}: it is missing" for name in _FIXED if name not in counts]
    if ("label" in counts) == ("labels" in counts):
        problems.append("column label: need one of `label` and, for several labels per case, `labels`")
    if not any(name.startswith(_PREFIX) for name in counts):
        problems.append("column p_<class>: there is no column of probabilities")
    known = {*_FIXED, "label", "labels"}
    return problems + [
        f"column {name}: unknown; known are case, split, patient, site, label and p_<class>"
        for name in counts
        if name not in known and not name.startswith(_PREFIX)
    ]


def _find_problems(
    cases: Sequence[str],
    labels: Sequence[Labels],
    classes: Sequence[str],
    probabilities: NDArray[np.float32],
    multilabel: bool,
) -> Iterator[tuple[int, str, str]]:
    """Triples of row, column and what is wrong there."""
    label_column = "labels" if multilabel else "label"
    known = set(classes)
    if len(known) < len(classes) or "" in known or (multilabel and any(SEPARATOR in name for name in known)):
        yield 0, _PREFIX, f"class names must be unique, not empty and, for several labels, without {SEPARATOR!r}"
    seen: set[str] = set()
    for row, (case, its) in enumerate(zip(cases, labels, strict=True)):
        if not case or case in seen:
            yield row, "case", f"{case!r} appears twice" if case else "it is empty"
        seen.add(case)
        if its is None:
            continue
        if not multilabel and len(its) != 1:
            yield row, label_column, f"{len(its)} labels; need one, or None where it is unknown"
        if len(set(its)) < len(its):
            yield row, label_column, f"a label is repeated in {SEPARATOR.join(its)!r}"
        for name in its:
            if name not in known:
                yield row, label_column, f"{name!r} has no column {_PREFIX}{name}"

    # Written so that not-a-number, which is in no range, is found.
    inside = (probabilities >= -_RANGE_TOLERANCE) & (probabilities <= 1 + _RANGE_TOLERANCE)
    for row, index in np.argwhere(~inside).tolist():
        yield row, _PREFIX + classes[index], f"{probabilities[row, index]:g} is not a probability from 0 to 1"
    if not multilabel:
        total = probabilities.sum(axis=1, dtype=np.float64)
        for row in np.flatnonzero(inside.all(axis=1) & (np.abs(total - 1) > _SUM_TOLERANCE)).tolist():
            yield row, f"{_PREFIX}*", f"the probabilities sum to {total[row]:.4g} instead of 1"


def _labels_to_text(labels: Labels, multilabel: bool) -> str:
    if labels is None:
        return ""
    return SEPARATOR.join(labels) or SEPARATOR if multilabel else labels[0]


def _labels_from_text(text: str, multilabel: bool) -> Labels:
    if not text:
        return None
    if not multilabel:
        return (text,)
    return () if text == SEPARATOR else tuple(text.split(SEPARATOR))
