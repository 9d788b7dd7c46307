"""What is wrong with a data set, beyond single rows: leaks between splits, contradictions, give-aways, thin classes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from medtpp.data.case import SPLITS, Case, Dataset, ImageRecord, Problem, Record
from medtpp.data.check_volumes import Spread, VolumeSummary, describe_volumes, scans_of, spread, volume_problems
from medtpp.data.giveaways import FEW_CASES, giveaways
from medtpp.data.problems import agree, count, error, exclude_option, first_few, warning
from medtpp.data.volume_scan import VolumeScan
from medtpp.errors import DataError


@dataclass(frozen=True)
class DatasetSummary:
    """A data set in numbers.

    Attributes:
        cases: All cases.
        labelled: Those with a label.
        classes: Labelled cases of each class; a multi-label case counts in each of its classes.
        width: Smallest, median and largest in pixels; None when no image was read.
        height: The same.
        bits: Images by bits per channel.
        colour: Images whose channels differ.
        volumes: What is known of volumes, and of images with masks; None where there are none.
        patients: Different patients; 0 when none is known.
        sites: Cases by site, where known.
        splits: Labelled cases of each class in each prescribed split; empty without prescribed splits.
    """

    cases: int
    labelled: int
    classes: dict[str, int]
    width: Spread | None
    height: Spread | None
    bits: dict[int, int]
    colour: int
    volumes: VolumeSummary | None
    patients: int
    sites: dict[str, int]
    splits: dict[str, dict[str, int]]


def describe(dataset: Dataset, records: Mapping[str, Record]) -> DatasetSummary:
    """Count what the data set holds; unreadable images count as cases alone."""
    labelled = [case for case in dataset.cases if case.labelled]
    decoded = [record for case in dataset.cases if isinstance(record := records.get(case.id), ImageRecord)]
    decoded = [record for record in decoded if record.error is None]
    scans = scans_of(dataset, records)
    sizes = [(record.height, record.width) for record in decoded]
    sizes += [(scan.shape[0], scan.shape[1]) for scan in scans.values() if len(scan.shape) == 2]
    by_split: dict[str, list[Case]] = defaultdict(list)
    for case in labelled:
        if case.split:
            by_split[case.split].append(case)
    return DatasetSummary(
        cases=len(dataset.cases),
        labelled=len(labelled),
        classes=_class_counts(dataset, labelled),
        width=spread([width for _, width in sizes]),
        height=spread([height for height, _ in sizes]),
        bits=dict(sorted(Counter(record.bits for record in decoded).items())),
        colour=sum(record.colour for record in decoded),
        volumes=describe_volumes(dataset, scans) if scans else None,
        patients=len({case.patient for case in dataset.cases if case.patient}),
        sites=dict(sorted(Counter(case.site for case in dataset.cases if case.site).items())),
        splits={split: _class_counts(dataset, by_split[split]) for split in SPLITS if split in by_split},
    )


def check(dataset: Dataset, records: Mapping[str, Record]) -> list[Problem]:
    """All problems of a data set: those of its source, and those that labels, splits, images and masks show.

    Args:
        dataset: The cases, for classification or for segmentation.
        records: What reading each image told, by case id: ImageRecord or VolumeScan. A case without a record is checked
            by its names alone.

    Returns:
        Errors, which stop a run, before warnings.
    """
    labelled = [case for case in dataset.cases if case.labelled]
    problems = [
        *dataset.problems,
        *_unreadable(dataset, records),
        *volume_problems(dataset, records),
        *_classes(dataset, labelled),
        *_splits(labelled),
        *_copy_problems(_copies(labelled, records), records),
        *_patients(dataset.cases),
        *([] if dataset.multilabel or not dataset.classes else giveaways(labelled, records)),
    ]
    return sorted(problems, key=lambda problem: problem.severity != "error")


def raise_errors(dataset: Dataset, problems: Iterable[Problem]) -> None:
    """Raise DataError that lists the errors among some problems; warnings pass."""
    errors = [problem.message.replace("\n", "\n    ") for problem in problems if problem.severity == "error"]
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
            problems.append(warning("class-not-in-split", text))
    return problems


def _unreadable(dataset: Dataset, records: Mapping[str, Record]) -> list[Problem]:
    found = [record for case in dataset.cases if isinstance(record := records.get(case.id), ImageRecord)]
    bad = {record.case: record.error for record in found if record.error}
    if not bad:
        return []
    ids = list(bad)
    which = first_few(f"{case} ({reason})" for case, reason in bad.items())
    text = f"{count(bad, 'image')} cannot be read: {which}. Replace them or leave them out: {exclude_option(ids)}."
    return [error("unreadable-image", text, ids)]


def _classes(dataset: Dataset, labelled: Sequence[Case]) -> list[Problem]:
    if not labelled:
        text = "No case is labelled: good for pre-training alone."
        return [warning("no-labels", text)] if dataset.cases else []
    problems = []
    patterns = {case.labels for case in labelled}
    if len(patterns) < 2 and not any(case.mask for case in dataset.cases):
        only = first_few(dataset.classes) or "no finding"
        which = agree(labelled, "The only labelled case is", f"All {len(labelled)} labelled cases are")
        text = f"{which} of one class ({only}). At least two are needed."
        problems.append(error("one-class", text))
    few = {name: count for name, count in _class_counts(dataset, labelled).items() if count < FEW_CASES}
    if few:
        which = first_few(f"{name} ({count})" for name, count in few.items())
        text = f"Classes with fewer than {FEW_CASES} cases: {which}. Their scores will mean little."
        problems.append(warning("few-cases", text))
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in dataset.classes:
        spellings["".join(name.casefold().split()).replace("_", "").replace("-", "")].append(name)
    alike = [" / ".join(map(repr, names)) for names in spellings.values() if len(names) > 1]
    if alike:
        text = f"Class names differ in spelling alone: {first_few(alike)}. If they mean the same, make them one."
        problems.append(warning("classes-look-alike", text))
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
        problems.append(error("split-missing", text))
    torn = {name: cases for name, cases in by_patient.items() if len({case.split for case in cases}) > 1}
    if torn:
        which = first_few(
            f"{name} ({first_few((f'{case.id} in {case.split}' for case in cases), 3)})"
            for name, cases in sorted(torn.items())
        )
        text = f"{count(torn, 'patient')} in two splits: {which}. Move all images of a patient to one split."
        problems.append(error("patient-in-two-splits", text, [c.id for cases in torn.values() for c in cases]))
    classes = {label for case in labelled for label in case.labels}
    present: dict[str, list[Case]] = {split: by_split[split] for split in ("train", "test") if split in by_split}
    return problems + absent_classes(classes, present)


def _copies(labelled: Sequence[Case], records: Mapping[str, Record]) -> list[list[Case]]:
    """Sets of labelled cases with the same pixels."""
    by_pixels: dict[str, list[Case]] = defaultdict(list)
    for case in labelled:
        if case.id in records and records[case.id].fingerprint:
            by_pixels[records[case.id].fingerprint].append(case)
    return [cases for cases in by_pixels.values() if len(cases) > 1]


def _copy_problems(copies: Sequence[Sequence[Case]], records: Mapping[str, Record]) -> list[Problem]:
    contradictory, torn, two_masks, harmless = [], [], [], []
    for cases in copies:
        two_labels = len({case.labels for case in cases}) > 1
        two_splits = len({case.split for case in cases if case.split}) > 1
        if two_labels:
            contradictory.append(cases)
        if two_splits:
            torn.append(cases)
        scans = [scan for case in cases if case.mask and isinstance(scan := records[case.id], VolumeScan)]
        masks = {scan.mask_fingerprint for scan in scans}
        if len(masks) > 1:
            two_masks.append(cases)
        if not (two_labels or two_splits or len(masks) > 1):
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
            text = (
                f"{count(ids, 'image')} with exactly the same pixels {what}: {which}. {advice}: {exclude_option(ids)}."
            )
            problems.append(error(code, text, ids))
    if two_masks:
        ids = [case.id for cases in two_masks for case in cases]
        which = first_few((" = ".join(case.id for case in cases) for cases in two_masks), 3)
        text = (
            f"{count(ids, 'image')} with exactly the same pixels have different masks: {which}. Keep one of each, "
            "unless several readers outlined the same image."
        )
        problems.append(warning("same-pixels-two-masks", text, ids))
    if harmless:
        extra = sum(len(cases) - 1 for cases in harmless)
        which = first_few((" = ".join(case.id for case in cases) for cases in harmless), 3)
        text = f"Exact copies of other images: {extra} ({which}). They stay in one split, but count double."
        problems.append(warning("duplicates", text, [case.id for cases in harmless for case in cases]))
    return problems


def _patients(cases: Sequence[Case]) -> list[Problem]:
    unknown = [case.id for case in cases if not case.patient and case.labelled]
    if not unknown or not any(case.patient for case in cases):
        return []
    which = first_few(unknown)
    text = f"{count(unknown, 'labelled case')} without a patient: {which}. Each counts as a patient of its own."
    return [warning("patient-missing", text, unknown)]


def _class_counts(dataset: Dataset, cases: Iterable[Case]) -> dict[str, int]:
    counts = Counter(label for case in cases for label in case.labels)
    return {name: counts[name] for name in dataset.classes}


def _full_name(case: Case) -> str:
    label = " + ".join(case.labels) or ("" if case.mask else "no finding")
    facts = ", ".join(filter(None, (label, case.split)))
    return f"{case.id} ({facts})" if facts else case.id
