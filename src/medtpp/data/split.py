"""Training, validation and test cases: patients and exact copies kept together, classes in proportion."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medtpp.data.case import SPLITS, Case, Dataset, Problem, Record
from medtpp.data.check import absent_classes
from medtpp.data.problems import first_few
from medtpp.errors import DataError
from medtpp.files import atomic
from medtpp.seeds import Seeds

Group = list[Case]


def make_split(
    dataset: Dataset, records: Mapping[str, Record], *, seeds: Seeds, val_fraction: float, test_fraction: float
) -> dict[str, str]:
    """Assign each labelled case to train, val or test.

    A prescribed split is kept; where it has no validation cases they are drawn from its training cases. Cases of one
    patient, and cases with the same pixels, stay together. A class with three groups of such cases or more is in each
    split, one with two is in train and test, one with a single group in train alone (see `split_problems`). The result
    depends on the seed and the set of cases, not on their order.

    Args:
        dataset: The cases; unlabelled ones get no split.
        records: What decoding told, by case id.
        seeds: Seeds of the experiment.
        val_fraction: Share of the cases outside the test split.
        test_fraction: Share of all labelled cases, where no split is prescribed.

    Returns:
        "train", "val" or "test" by case id.

    Raises:
        DataError: There are too few groups for two classes (for multi-label: one class) in each split.
    """
    labelled = sorted((case for case in dataset.cases if case.labelled), key=lambda case: case.id)
    split = {case.id: case.split for case in labelled if case.split}
    if not split:
        shares = {
            "train": (1 - test_fraction) * (1 - val_fraction),
            "test": test_fraction,
            "val": (1 - test_fraction) * val_fraction,
        }
        split = assign(groups(labelled, records), shares, seeds.numpy("split"))
    elif "val" not in split.values():
        trained = groups([case for case in labelled if case.split == "train"], records)
        split |= assign(trained, {"train": 1 - val_fraction, "val": val_fraction}, seeds.numpy("split"))
    require_classes(dataset, labelled, records, split)
    return split


def split_problems(dataset: Dataset, split: Mapping[str, str]) -> list[Problem]:
    """Warnings about classes that are in no training, validation or test case."""
    return absent_classes(dataset.classes, _by_split(dataset, split))


def groups(cases: Iterable[Case], records: Mapping[str, Record]) -> list[Group]:
    """Cases that share a patient or their pixels, directly or by way of others (union-find)."""
    cases = list(cases)
    parent = list(range(len(cases)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[tuple[str, str], int] = {}
    for row, case in enumerate(cases):
        for tie in _ties(case, records):
            parent[root(row)] = root(first.setdefault(tie, row))
    joined: dict[int, Group] = defaultdict(list)
    for row, case in enumerate(cases):
        joined[root(row)].append(case)
    return list(joined.values())


def assign(found: Sequence[Group], shares: Mapping[str, float], rng: np.random.Generator) -> dict[str, str]:
    """Assign groups to splits, each class in proportion to the shares.

    First each class gets one small group per split, in the order of the shares, rarest class first. Then each of the
    remaining groups, largest first, goes where its classes lack most (after Sechidis et al., ECML PKDD 2011, who
    stratify multi-label data so).

    Args:
        found: From `groups`.
        shares: Of the cases, by split; they add up to one.
        rng: Decides among groups of one size.

    Returns:
        The split by case id.
    """
    found = [found[row] for row in rng.permutation(len(found))]
    found.sort(key=lambda group: -len(group))  # stable: equal sizes stay in random order
    classes = sorted({label for group in found for case in group for label in case.labels})
    column = {name: at for at, name in enumerate(classes)}
    # (G, K + 1): cases of each class in each group; the last column counts cases without any finding.
    counts: NDArray[np.float64] = np.zeros((len(found), len(classes) + 1))
    for row, group in enumerate(found):
        for case in group:
            for label in case.labels or ("",):
                counts[row, column.get(label, -1)] += 1
    total = counts.sum(axis=0).clip(min=1)
    need = np.array(list(shares.values()))[:, None] * total  # (S, K + 1)
    home = np.full(len(found), -1)

    def put(row: int, place: int) -> None:
        home[row] = place
        need[place] -= counts[row]

    for k in np.argsort((counts[:, :-1] > 0).sum(axis=0), kind="stable"):
        members = np.flatnonzero(counts[:, k])
        for place in range(len(shares)):
            free = members[home[members] < 0]
            if len(free) and place not in home[members]:
                put(free[-1], place)  # the smallest
    for row in np.flatnonzero(home < 0).tolist():
        put(row, int(np.argmax(need @ (counts[row] / total))))
    names = list(shares)
    return {case.id: names[place] for group, place in zip(found, home, strict=True) for case in group}


def tpp_cases(
    dataset: Dataset, records: Mapping[str, Record], split: Mapping[str, str], unlabelled: Sequence[Case] = ()
) -> tuple[list[Case], list[str]]:
    """The cases that TPP may see: training cases, and unlabelled ones that leak nothing.

    Give the whole split, not one that `draw_labels` reduced, for TPP on all training images. A labelled case that is
    not in the split is not used.

    Args:
        dataset: The labelled data set with its own unlabelled cases.
        records: What decoding told, by case id, of the data set and of `unlabelled`.
        split: The split by case id.
        unlabelled: Further cases, from `read_unlabelled`.

    Returns:
        The usable cases, and the ids of unlabelled cases left out: those that share a patient or their pixels with a
        validation or test case, are themselves in a validation or test folder, or cannot be read.
    """
    held_out = {tie for case in dataset.cases if split.get(case.id) in ("val", "test") for tie in _ties(case, records)}
    usable = [case for case in dataset.cases if split.get(case.id) == "train"]
    excluded = []
    for case in [*(case for case in dataset.cases if not case.labelled), *unlabelled]:
        record = records.get(case.id)
        unreadable = record is not None and record.error is not None
        if unreadable or case.split in ("val", "test") or not held_out.isdisjoint(_ties(case, records)):
            excluded.append(case.id)
        else:
            usable.append(case)
    return usable, excluded


def draw_labels(dataset: Dataset, split: Mapping[str, str], n: int, seeds: Seeds) -> dict[str, str]:
    """Reduce a split to n labelled cases in all, validation included; test cases stay.

    Cases are taken one by one: first one of each class in train and val, then always from the class and split that has
    fewest for its size (Sainte-Laguë's method), in a fixed random order. A smaller draw is thus a part of a larger one.

    Raises:
        DataError: n is larger than the training and validation cases, or smaller than twice the number of classes.
    """
    available = sorted((case for case in dataset.cases if split.get(case.id) in ("train", "val")), key=lambda c: c.id)
    least = 2 * max(1, len(dataset.classes))
    if not least <= n <= len(available):
        raise DataError(
            f"data.labels={n} is not possible: there are {len(available)} labelled cases for training and validation, "
            f"and at least {least} are needed for one of each class in both."
        )
    strata: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in available:
        for stratum in _strata(case, split):
            strata[stratum].append(case)
    queues = {
        key: [members[row] for row in seeds.numpy("labels", *key).permutation(len(members))]
        for key, members in sorted(strata.items(), key=lambda item: (not item[0][0], item[0]))  # no finding: last
    }
    taken: dict[str, str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    while len(taken) < n:
        key = max(queues, key=lambda key: len(strata[key]) / (2 * counts[key] + 1) if counts[key] else math.inf)
        while queues[key] and queues[key][-1].id in taken:
            queues[key].pop()
        if not queues[key]:
            del queues[key]
            continue
        case = queues[key].pop()
        taken[case.id] = split[case.id]
        counts.update(_strata(case, split))
    return taken | {case: name for case, name in split.items() if name == "test"}


def write_split(path: Path, dataset: Dataset, split: Mapping[str, str]) -> None:
    """Write a split as a CSV file with the columns case, split, label, patient."""
    rows = [
        (case.id, split[case.id], ";".join(case.labels), case.patient or "")
        for case in dataset.cases
        if case.id in split
    ]
    with atomic(path) as temporary:
        pd.DataFrame(rows, columns=["case", "split", "label", "patient"]).to_csv(temporary, index=False)


def read_split(path: Path, dataset: Dataset) -> dict[str, str]:
    """Read a split file; the columns case and split are enough.

    Raises:
        DataError: The file cannot be read, or names cases that are unknown, unlabelled or doubled, or unknown splits.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the split file {path}: {error}") from error
    if not {"case", "split"} <= set(table.columns):
        raise DataError(f"{path} needs the columns case and split; found are {first_few(table.columns, 20)}.")
    labelled = {case.id for case in dataset.cases if case.labelled}
    findings = {
        "not a labelled case of the data set": table.case[~table.case.isin(labelled)],
        "more than once": table.case[table.case.duplicated()],
        f"with a split other than {', '.join(SPLITS)}": table.case[~table.split.isin(SPLITS)],
    }
    problems = [f"{len(cases)} {what}: {first_few(cases)}" for what, cases in findings.items() if len(cases)]
    if problems:
        raise DataError(f"The split file {path} does not fit the data set {dataset.root}:", problems)
    return dict(zip(table.case, table.split, strict=True))


def require_classes(
    dataset: Dataset, labelled: Sequence[Case], records: Mapping[str, Record], split: Mapping[str, str]
) -> None:
    """Raise DataError unless train, val and test have two classes each (one of several labels); of masks, a case."""
    if not dataset.classes:  # masks
        empty = [name for name, cases in _by_split(dataset, split).items() if not cases]
        if empty:
            raise DataError(
                f"No sensible split of {len(labelled)} cases with masks: {' and '.join(empty)} would have none. Three "
                "or more are needed, of different patients and not copies of one another."
            )
        return
    wanted = 1 if dataset.multilabel else 2
    held = {
        name: {label for case in cases for label in case.labels} for name, cases in _by_split(dataset, split).items()
    }
    poor = [name for name in SPLITS if len(held[name]) < wanted]
    if not poor:
        return
    thin = Counter(
        label for group in groups(labelled, records) for label in {label for case in group for label in case.labels}
    )
    raise DataError(
        f"No sensible split: {' and '.join(poor)} would have fewer than {wanted} classes. A class needs three cases or "
        "more, of different patients and not copies of one another, to be in train, val and test.",
        [f"{name}: {thin[name]} different" for name in dataset.classes if thin[name] < 3],
    )


def _ties(case: Case, records: Mapping[str, Record]) -> list[tuple[str, str]]:
    """What binds a case to others: its patient and its pixels."""
    ties = [("patient", case.patient)] if case.patient else []
    record = records.get(case.id)
    if record is not None and record.fingerprint:
        ties.append(("pixels", record.fingerprint))
    return ties


def _by_split(dataset: Dataset, split: Mapping[str, str]) -> dict[str, list[Case]]:
    cases: dict[str, list[Case]] = {name: [] for name in SPLITS}
    for case in dataset.cases:
        if case.id in split:
            cases[split[case.id]].append(case)
    return cases


def _strata(case: Case, split: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(label, split[case.id]) for label in case.labels or ("",)]
