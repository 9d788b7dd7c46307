"""What is wrong with a data set, beyond single rows: leaks between splits, contradictions, give-aways, thin classes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medtpp.data.case import SPLITS, Case, Dataset, ImageRecord, Problem
from medtpp.data.sources import first_few
from medtpp.errors import DataError

FEW_CASES = 10
_MOST_CASES_FITTED = 5_000


@dataclass(frozen=True)
class DatasetSummary:
    """A data set in numbers.

    Attributes:
        cases: All cases.
        labelled: Those with a label.
        classes: Labelled cases of each class; a multi-label case counts in each of its classes.
        width: Smallest, median and largest in pixels; None when nothing was decoded.
        height: The same.
        bits: Images by bits per channel.
        colour: Images whose channels differ.
        patients: Different patients; 0 when none is known.
        sites: Cases by site, where known.
        splits: Labelled cases of each class in each prescribed split; empty without prescribed splits.
    """

    cases: int
    labelled: int
    classes: dict[str, int]
    width: tuple[int, float, int] | None
    height: tuple[int, float, int] | None
    bits: dict[int, int]
    colour: int
    patients: int
    sites: dict[str, int]
    splits: dict[str, dict[str, int]]


def describe(dataset: Dataset, records: Mapping[str, ImageRecord]) -> DatasetSummary:
    """Count what the data set holds; unreadable images count as cases alone."""
    labelled = [case for case in dataset.cases if case.labelled]
    decoded = [records[case.id] for case in dataset.cases if case.id in records and records[case.id].error is None]
    by_split: dict[str, list[Case]] = defaultdict(list)
    for case in labelled:
        if case.split:
            by_split[case.split].append(case)
    return DatasetSummary(
        cases=len(dataset.cases),
        labelled=len(labelled),
        classes=_class_counts(dataset, labelled),
        width=_spread([record.width for record in decoded]),
        height=_spread([record.height for record in decoded]),
        bits=dict(sorted(Counter(record.bits for record in decoded).items())),
        colour=sum(record.colour for record in decoded),
        patients=len({case.patient for case in dataset.cases if case.patient}),
        sites=dict(sorted(Counter(case.site for case in dataset.cases if case.site).items())),
        splits={split: _class_counts(dataset, by_split[split]) for split in SPLITS if split in by_split},
    )


def check(dataset: Dataset, records: Mapping[str, ImageRecord]) -> list[Problem]:
    """All problems of a data set: those of its source, and those that labels, splits and decoded images show.

    Args:
        dataset: The cases.
        records: What decoding each image told, by case id. A case without a record is checked by its names alone.

    Returns:
        Errors, which stop a run, before warnings.
    """
    labelled = [case for case in dataset.cases if case.labelled]
    copies = _copies(labelled, records)
    problems = [
        *dataset.problems,
        *_unreadable(dataset, records),
        *_classes(dataset, labelled),
        *_splits(labelled),
        *_copy_problems(copies),
        *_patients(dataset.cases),
        *_giveaways(dataset, labelled, records),
    ]
    return sorted(problems, key=lambda problem: problem.severity != "error")


def raise_errors(dataset: Dataset, problems: Iterable[Problem]) -> None:
    """Raise DataError that lists the errors among some problems; warnings pass."""
    errors = [problem.message for problem in problems if problem.severity == "error"]
    if errors:
        raise DataError(f"The data set {dataset.root} cannot be used as it is:", errors)


def absent_classes(classes: Iterable[str], splits: Mapping[str, Iterable[Case]]) -> list[Problem]:
    """A warning for each split, out of those given, that lacks some classes."""
    problems = []
    for split, cases in splits.items():
        absent = sorted(set(classes).difference(label for case in cases for label in case.labels))
        if absent:
            what = "cannot be learnt" if split == "train" else "does not enter the scores there"
            text = f"No case of {first_few(absent)} is in {split}: what is not there {what}."
            problems.append(Problem("warning", "class-not-in-split", text))
    return problems


def _unreadable(dataset: Dataset, records: Mapping[str, ImageRecord]) -> list[Problem]:
    bad = [(case.id, records[case.id].error) for case in dataset.cases if case.id in records and records[case.id].error]
    if not bad:
        return []
    ids = [case for case, _ in bad]
    which = first_few(f"{case} ({error})" for case, error in bad)
    text = f"{_count(bad, 'image')} cannot be read: {which}. Replace them or leave them out: {_exclude(ids)}."
    return [_problem("error", "unreadable-image", text, ids)]


def _classes(dataset: Dataset, labelled: Sequence[Case]) -> list[Problem]:
    if not labelled:
        text = "No case is labelled: good for pre-training alone."
        return [Problem("warning", "no-labels", text)] if dataset.cases else []
    problems = []
    patterns = {case.labels for case in labelled}
    if len(patterns) < 2:
        only = first_few(dataset.classes) or "no finding"
        text = f"All {len(labelled)} labelled cases are of one class ({only}). At least two are needed."
        problems.append(Problem("error", "one-class", text))
    few = {name: count for name, count in _class_counts(dataset, labelled).items() if count < FEW_CASES}
    if few:
        which = first_few(f"{name} ({count})" for name, count in few.items())
        text = f"Classes with fewer than {FEW_CASES} cases: {which}. Their scores will mean little."
        problems.append(Problem("warning", "few-cases", text))
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in dataset.classes:
        spellings["".join(name.casefold().split()).replace("_", "").replace("-", "")].append(name)
    alike = [" / ".join(map(repr, names)) for names in spellings.values() if len(names) > 1]
    if alike:
        text = f"Class names differ in spelling alone: {first_few(alike)}. If they mean the same, make them one."
        problems.append(Problem("warning", "classes-look-alike", text))
    return problems


def _splits(labelled: Sequence[Case]) -> list[Problem]:
    """Prescribed splits: complete, and no patient in two of them."""
    by_split: dict[str, list[Case]] = defaultdict(list)
    by_patient: dict[str, list[Case]] = defaultdict(list)
    for case in labelled:
        if case.split:
            by_split[case.split].append(case)
            if case.patient:
                by_patient[case.patient].append(case)
    if not by_split:
        return []
    lacking = [split for split in ("train", "test") if split not in by_split]
    problems = []
    if lacking:
        text = (
            f"The prescribed split has no labelled {' and no '.join(lacking)} cases. "
            "Add them, or prescribe no split at all, so that one is drawn."
        )
        problems.append(Problem("error", "split-missing", text))
    torn = {name: cases for name, cases in by_patient.items() if len({case.split for case in cases}) > 1}
    if torn:
        which = first_few(
            f"{name} ({first_few((f'{case.id} in {case.split}' for case in cases), 3)})"
            for name, cases in sorted(torn.items())
        )
        text = f"{_count(torn, 'patient')} in two splits: {which}. Move all images of a patient to one split."
        problems.append(
            _problem("error", "patient-in-two-splits", text, [c.id for cases in torn.values() for c in cases])
        )
    classes = {label for case in labelled for label in case.labels}
    present: dict[str, list[Case]] = {split: by_split[split] for split in ("train", "test") if split in by_split}
    return problems + absent_classes(classes, present)


def _copies(labelled: Sequence[Case], records: Mapping[str, ImageRecord]) -> list[list[Case]]:
    """Sets of labelled cases with the same pixels."""
    by_pixels: dict[str, list[Case]] = defaultdict(list)
    for case in labelled:
        if case.id in records and records[case.id].fingerprint:
            by_pixels[records[case.id].fingerprint].append(case)
    return [cases for cases in by_pixels.values() if len(cases) > 1]


def _copy_problems(copies: Sequence[Sequence[Case]]) -> list[Problem]:
    contradictory, torn, harmless = [], [], []
    for cases in copies:
        two_labels = len({case.labels for case in cases}) > 1
        two_splits = len({case.split for case in cases if case.split}) > 1
        if two_labels:
            contradictory.append(cases)
        if two_splits:
            torn.append(cases)
        if not (two_labels or two_splits):
            harmless.append(cases)
    problems = []
    for code, bad, what, advice in (
        (
            "same-pixels-two-labels",
            contradictory,
            "under different labels",
            "Correct the labels or leave the images out",
        ),
        ("same-pixels-in-two-splits", torn, "in two splits", "Move all copies to one split or leave them out"),
    ):
        if bad:
            ids = [case.id for cases in bad for case in cases]
            which = first_few(" = ".join(_full_name(case) for case in cases) for cases in bad)
            text = f"{_count(ids, 'image')} with exactly the same pixels {what}: {which}. {advice}: {_exclude(ids)}."
            problems.append(_problem("error", code, text, ids))
    if harmless:
        extra = sum(len(cases) - 1 for cases in harmless)
        which = first_few((" = ".join(case.id for case in cases) for cases in harmless), 3)
        text = f"Exact copies of other images: {extra} ({which}). They stay in one split, but count double."
        problems.append(_problem("warning", "duplicates", text, [case.id for cases in harmless for case in cases]))
    return problems


def _patients(cases: Sequence[Case]) -> list[Problem]:
    unknown = [case.id for case in cases if not case.patient and case.labelled]
    if not unknown or not any(case.patient for case in cases):
        return []
    which = first_few(unknown)
    text = f"{_count(unknown, 'labelled case')} without a patient: {which}. Each counts as a patient of its own."
    return [_problem("warning", "patient-missing", text, unknown)]


def _giveaways(dataset: Dataset, labelled: Sequence[Case], records: Mapping[str, ImageRecord]) -> list[Problem]:
    """Labels that can be told without looking at the image."""
    if dataset.multilabel:
        return []
    problems = []
    decoded = [case for case in labelled if case.id in records and records[case.id].error is None]
    shapes = [_shape(records[case.id]) for case in decoded]
    score = predictability(shapes, [case.labels[0] for case in decoded], depth=3)
    if score is not None:
        text = (
            f"The size and format of the images alone tell the classes with a balanced accuracy of {score:.2f}: they "
            "may come from different sources. A model can learn that in place of the disease; crop or resample them "
            "alike."
        )
        problems.append(Problem("warning", "shape-predicts-label", text))
    placed = [case for case in labelled if case.site]
    sites = sorted({case.site for case in placed if case.site})
    one_hot = [[float(case.site == site) for site in sites] for case in placed]
    score = predictability(one_hot, [case.labels[0] for case in placed], depth=None)
    if score is not None:
        text = (
            f"The site alone tells the classes with a balanced accuracy of {score:.2f}. A model can learn the site in "
            "place of the disease; balance the classes within each site or test on another one."
        )
        problems.append(Problem("warning", "site-predicts-label", text))
    return problems


def predictability(features: Sequence[Sequence[float]], labels: Sequence[str], *, depth: int | None) -> float | None:
    """How well a decision tree tells the labels, if that is well above chance.

    Args:
        features: (N, D).
        labels: (N,) class names; classes with few cases are left out.
        depth: Largest depth of the tree.

    Returns:
        Five-fold cross-validated balanced accuracy, if it lies, less two standard errors, a quarter of the way or more
        from chance to certainty; otherwise None.
    """
    counts = Counter(labels)
    rows = [row for row, label in enumerate(labels) if counts[label] >= FEW_CASES]
    classes = sorted({labels[row] for row in rows})
    if len(classes) < 2:
        return None
    order = np.random.default_rng(0).permutation(rows)[:_MOST_CASES_FITTED]
    x: NDArray[np.float64] = np.asarray(features, dtype=np.float64)[order]
    y = np.asarray(labels)[order]
    if (x == x[0]).all() or min(Counter(y.tolist()).values()) < 5:
        return None

    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=depth, min_samples_leaf=3, class_weight="balanced", random_state=0)
    predicted = cross_val_predict(tree, x, y, cv=StratifiedKFold(5, shuffle=True, random_state=0))
    recalls = np.array([(predicted[y == name] == name).mean() for name in classes])
    sizes = np.array([(y == name).sum() for name in classes])
    score = float(recalls.mean())
    error = float(np.sqrt((recalls * (1 - recalls) / sizes).sum()) / len(classes))
    chance = 1 / len(classes)
    return score if score - 2 * error >= chance + 0.25 * (1 - chance) else None


def _shape(record: ImageRecord) -> list[float]:
    return [record.width, record.height, record.width / max(record.height, 1), record.bits, record.colour]


def _class_counts(dataset: Dataset, cases: Iterable[Case]) -> dict[str, int]:
    counts = Counter(label for case in cases for label in case.labels)
    return {name: counts[name] for name in dataset.classes}


def _spread(values: Sequence[int]) -> tuple[int, float, int] | None:
    return (min(values), float(median(values)), max(values)) if values else None


def _count(items: Sized, noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _full_name(case: Case) -> str:
    facts = [" + ".join(case.labels) or "no finding", *([case.split] if case.split else [])]
    return f"{case.id} ({', '.join(facts)})"


def _exclude(ids: Sequence[str]) -> str:
    """The option that leaves some cases out; where they are many, its form with the first."""
    shown = json.dumps(list(ids) if len(ids) <= 10 else [*ids[:2], "..."], ensure_ascii=False)
    return f"--set 'data.exclude={shown}'"


def _problem(severity: Literal["error", "warning"], code: str, text: str, cases: Iterable[str]) -> Problem:
    return Problem(severity, code, text, tuple(cases))
