"""What reading volumes and masks shows: what does not go together, values nobody named, spacings that are odd."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from medtpp.data.case import SPLITS, Case, Dataset, Problem, Record
from medtpp.data.problems import agree, count, error, exclude_option, first_few, listed, warning
from medtpp.data.restore import ANISOTROPY
from medtpp.data.volume_scan import MOST_VALUES, VolumeScan

WHITE = 255  # of 8 bits, as what is not background is often saved
MOST_LISTED = 5  # cases whose fault is told in full
ODD_SPACING = 3.0  # times the median, or a third of it: a header in another unit, or slices of another protocol

# Sources that look into headers tell why these files cannot be read.
_TOLD = {"unreadable-dicom", "film", "no-pixel-spacing", "missing-mask", "no-series", "several-series"}

Spread: TypeAlias = tuple[float, float, float]  # smallest, median, largest
K = TypeVar("K", int, str)


@dataclass(frozen=True)
class VolumeSummary:
    """Volumes, or images with masks, in numbers; axes are in RAS order: D, H, W run to the head, front and right.

    Attributes:
        size: Of each axis in voxels.
        spacing: Of each axis in mm, of the cases whose file tells it; () where none does.
        unknown: Cases whose file tells no spacing.
        units: Cases by the unit of their values: "HU", "levels" (8 bit) or "none".
        channels: Cases by their number of channels.
        masks: Cases whose mask was read.
        structures: In how many masks each structure appears.
        splits: Masks in each prescribed split.
    """

    size: tuple[Spread, ...]
    spacing: tuple[Spread, ...]
    unknown: int
    units: dict[str, int]
    channels: dict[int, int]
    masks: int
    structures: dict[str, int]
    splits: dict[str, int]


def scans_of(dataset: Dataset, records: Mapping[str, Record]) -> dict[Case, VolumeScan]:
    """The cases that were read as volumes or with masks, without those that cannot be used."""
    found = {case: scan for case in dataset.cases if isinstance(scan := records.get(case.id), VolumeScan)}
    return {case: scan for case, scan in found.items() if scan.error is None}


def spread(values: Sequence[float]) -> Spread | None:
    """Smallest, median and largest; None of nothing."""
    return (min(values), median(values), max(values)) if values else None


def describe_volumes(dataset: Dataset, scans: Mapping[Case, VolumeScan]) -> VolumeSummary:
    """Count what some scans hold; at least one. Images among volumes are left out of sizes and spacings."""
    dims = _usual_dims(scans.values())
    usual = [scan for scan in scans.values() if len(scan.shape) == dims]
    known = [scan for scan in usual if scan.known]
    masks = {case: scan.values for case, scan in scans.items() if case.mask is not None and scan.values is not None}
    return VolumeSummary(
        size=_spreads([scan.shape for scan in usual]),
        spacing=_spreads([scan.spacing for scan in known]),
        unknown=sum(not scan.known for scan in scans.values()),
        units=dict(Counter(scan.units for scan in scans.values()).most_common()),
        channels=dict(Counter(scan.channels for scan in scans.values()).most_common()),
        masks=len(masks),
        structures={
            structure.name: sum(not set(structure.values).isdisjoint(values) for values in masks.values())
            for structure in dataset.structures
        },
        splits={split: number for split in SPLITS if (number := sum(case.split == split for case in masks))},
    )


def volume_problems(dataset: Dataset, records: Mapping[str, Record]) -> list[Problem]:
    """What is wrong with scans and masks.

    Args:
        dataset: With its structures, also where the values in masks are their only names.
        records: By case id; those of other kinds are passed over.
    """
    scans = scans_of(dataset, records)
    dims = _usual_dims(scans.values())
    return [
        *_unusable(dataset, records),
        *_together(scans),
        *_masks(dataset, scans),
        *_turned(scans),
        *_shared_masks(dataset),
        *_constant(scans),
        *_spacings({case: scan for case, scan in scans.items() if len(scan.shape) == dims}),
    ]


def _unusable(dataset: Dataset, records: Mapping[str, Record]) -> list[Problem]:
    """Scans and masks that cannot be read, less those of which reading their headers has told already."""
    told = {case for problem in dataset.problems if _is_about_files(problem) for case in problem.cases}
    reasons = {}
    for case in dataset.cases:
        scan = records.get(case.id)
        if isinstance(scan, VolumeScan) and scan.error and case.id not in told:
            # A reader's reason begins with a path.
            reason = scan.error if ": " in scan.error else f"{case.id}: {scan.error}"
            reasons[case.id] = reason.removeprefix(f"{dataset.root}{os.sep}").replace("\n", "\n  ")
    if not reasons:
        return []
    lines = listed(reasons.values(), MOST_LISTED)
    advice = f"Mend them, or leave them out: {exclude_option(list(reasons))}"
    text = f"{count(reasons, 'case')} cannot be used:\n{lines}\n{advice}"
    return [error("unreadable-case", text, reasons)]


def _is_about_files(problem: Problem) -> bool:
    return problem.severity == "error" and (problem.code in _TOLD or problem.code.startswith("slices-"))


def _together(scans: Mapping[Case, VolumeScan]) -> list[Problem]:
    """Cases that one network cannot take."""
    problems = []
    dims = _grouped((case.id, len(scan.shape)) for case, scan in scans.items())
    if len(dims) > 1:
        images, volumes = dims.get(2, []), dims.get(3, [])
        text = (
            f"{count(images, 'image')} and {count(volumes, 'volume')} are mixed: {first_few(images, 3)}; "
            f"{first_few(volumes, 3)}. Make a data set of each, or leave the fewer out: "
            f"{exclude_option(_minority(dims))}."
        )
        problems.append(error("images-and-volumes", text, _minority(dims)))
    units = _grouped((case.id, scan.units) for case, scan in scans.items())
    channels = _grouped((case.id, scan.channels) for case, scan in scans.items())
    if len(channels) > 1 and set(units) != {"levels"}:  # grey and coloured photographs go together
        which = "; ".join(f"{number} ({_some(ids)})" for number, ids in sorted(channels.items()))
        text = f"Cases have different numbers of channels: {which}. Leave some out, or make a data set of each kind."
        problems.append(error("different-channels", text, _minority(channels)))
    if "HU" in units and len(units) > 1:
        others = [case for unit, ids in units.items() if unit != "HU" for case in ids]
        text = (
            f"{_some(units['HU'])} {agree(units['HU'], 'is', 'are')} in Hounsfield units, {_some(others)} "
            f"{agree(others, 'is', 'are')} not. If all are CT, use --set data.modality=ct; otherwise make a data set "
            "of each."
        )
        problems.append(error("different-units", text, others))
    return problems


def _masks(dataset: Dataset, scans: Mapping[Case, VolumeScan]) -> list[Problem]:
    """Values that mean nothing, structures that are nowhere, masks that show nothing."""
    masks = {
        case: (_within(dataset.root, case.mask), scan)
        for case, scan in scans.items()
        if case.mask is not None and scan.values is not None
    }
    if not masks:
        return []
    holders: dict[int, list[str]] = defaultdict(list)  # names of masks by value
    for name, scan in masks.values():
        for value in scan.values or ():
            holders[value].append(name)
    values = sorted(set(holders) - {0})
    above = [value for value in values if value > 0]
    if not dataset.structures and len(values) > MOST_VALUES:
        text = (
            f"The masks hold {len(values)} different values, from {values[0]} to {values[-1]}: more grey levels than "
            f"labels, for example in {first_few(dict.fromkeys(holders[values[len(values) // 2]]), 3)}. Save masks "
            "without smoothing or lossy compression (PNG, not JPEG), or name the values that mean something: "
            "--set 'data.structures={lesion: 255}'."
        )
        return [error("grey-masks", text)]
    named = {structure.name: structure.values for structure in dataset.structures}
    wanted = ", ".join(f"{name} {first_few(numbers)}" for name, numbers in named.items())
    empty = {case.id: name for case, (name, scan) in masks.items() if not scan.labelled}
    problems = _negative(masks, holders)
    if len(empty) == len(masks):
        looked = f" of the structures ({wanted})" if wanted else ""
        none = agree(masks, "The only mask shows none", f"None of the {len(masks)} masks shows any")
        hold = agree(masks, "it holds", "they hold")
        text = f"{none}{looked}; {hold} {first_few(sorted(holders))}."
        if wanted:
            text += " Correct data.structures, or dataset.json."
        return [error("no-structures", text, empty), *problems]
    foreign = set(above).difference(*named.values()) if named else set()
    if foreign:
        text = (
            f"Values in masks that belong to no structure count as background: {_where(foreign, holders)}. Structures "
            f"are {wanted}; name the others in data.structures if they mean something."
        )
        problems.append(warning("values-of-no-structure", text, _with_values(masks, foreign)))
    if named == {str(value): (value,) for value in above}:  # nobody has named them
        problems += _foregrounds(above, holders)
    absent = [f"{name} ({first_few(numbers)})" for name, numbers in named.items() if holders.keys().isdisjoint(numbers)]
    if absent:
        text = f"No mask shows {first_few(absent)}: what is not there cannot be learnt."
        problems.append(warning("structure-absent", text))
    if empty:
        text = (
            f"{len(empty)} of {len(masks)} masks {agree(empty, 'is', 'are')} empty: {first_few(empty.values())}. That "
            "is right where there is nothing to find; leave out what nobody has outlined: "
            f"{exclude_option(list(empty))}."
        )
        problems.append(warning("empty-mask", text, empty))
    return problems


def _negative(masks: Mapping[Case, tuple[str, VolumeScan]], holders: Mapping[int, Sequence[str]]) -> list[Problem]:
    """Values below 0, which are no structures.

    Args:
        masks: The name of each case's mask, and what reading it told.
        holders: Names of masks by value.
    """
    negative = {value for value in holders if value < 0}
    if not negative:
        return []
    text = (
        f"Negative values in masks count as background: {_where(negative, holders)}. Often they mark what is to be "
        "ignored, which is not possible here: it is learnt as background. Write a value above 0 in their place if they "
        "mean a structure."
    )
    return [warning("negative-values", text, _with_values(masks, negative))]


def _foregrounds(values: Sequence[int], holders: Mapping[int, Sequence[str]]) -> list[Problem]:
    """Two values that no mask holds together, one of them 255: the foreground, as two programs save it.

    Args:
        values: Above 0, sorted.
        holders: Names of masks by value.
    """
    if len(values) != 2 or values[1] != WHITE or set(holders[values[0]]) & set(holders[values[1]]):
        return []
    where = " and ".join(_where([value], holders) for value in values)
    text = (
        f"Masks hold {where}, none holds both: these count as two structures. If they mean the same: "
        f"--set 'data.structures={{foreground: {list(values)}}}'."
    )
    return [warning("two-foregrounds", text)]


def _where(values: Iterable[int], holders: Mapping[int, Sequence[str]]) -> str:
    """Values, and which masks hold them."""
    return first_few((f"{value} (in {_some(holders[value])})" for value in sorted(values)), 8)


def _with_values(masks: Mapping[Case, tuple[str, VolumeScan]], values: Set[int]) -> list[str]:
    """Ids of the cases whose masks hold any of some values."""
    return [case.id for case, (_, scan) in masks.items() if not values.isdisjoint(scan.values or ())]


def _turned(scans: Mapping[Case, VolumeScan]) -> list[Problem]:
    """Masks of which nobody can say on which view of their image they were drawn."""
    turned = [case.id for case, scan in scans.items() if scan.turned]
    if not turned:
        return []
    text = (
        f"{count(turned, 'image')} with another EXIF orientation than the mask: {first_few(turned)}. Images are turned "
        "upright as their EXIF says; whether a mask was drawn on that view or on the pixels as they are stored cannot "
        "be seen, since both have one size. Lay the masks over the images; save images and masks upright, without "
        f"an orientation, or leave them out: {exclude_option(turned)}."
    )
    return [warning("turned-image", text, turned)]


def _shared_masks(dataset: Dataset) -> list[Problem]:
    """Masks that several images have, as a slip in a table gives them."""
    cases = _grouped((case.id, _within(dataset.root, case.mask)) for case in dataset.cases if case.mask)
    shared = {mask: ids for mask, ids in cases.items() if len(ids) > 1}
    if not shared:
        return []
    text = (
        f"{count(shared, 'mask')} {agree(shared, 'belongs', 'belong')} to several images: "
        f"{first_few((f'{mask} ({first_few(ids, 3)})' for mask, ids in shared.items()), 3)}. That is right for several "
        "images of one view, such as the sequences of an examination; otherwise correct which mask is whose."
    )
    return [warning("shared-mask", text, [case for ids in shared.values() for case in ids])]


def _constant(scans: Mapping[Case, VolumeScan]) -> list[Problem]:
    """Images that show nothing, as a failed export gives them."""
    constant = [case.id for case, scan in scans.items() if scan.constant]
    if not constant:
        return []
    text = (
        f"{count(constant, 'image')} with the same value everywhere, or in all of a channel: {first_few(constant)}. "
        f"There is nothing to see: export {agree(constant, 'it', 'them')} again, or leave "
        f"{agree(constant, 'it', 'them')} out: {exclude_option(constant)}."
    )
    return [warning("constant-image", text, constant)]


def _spacings(scans: Mapping[Case, VolumeScan]) -> list[Problem]:
    """Steps that are unknown, far from the others', or uneven; scans have the same number of dimensions."""
    problems = []
    known = {case.id: np.array(scan.spacing) for case, scan in scans.items() if scan.known}
    unknown = [case.id for case, scan in scans.items() if not scan.known]
    if known and unknown:
        text = (
            f"{len(unknown)} of {len(scans)} files {agree(unknown, 'tells', 'tell')} no spacing: {first_few(unknown)}. "
            "One spacing for all cases is chosen only where all are known; set data.volume.spacing, or leave them out: "
            f"{exclude_option(unknown)}."
        )
        problems.append(warning("unknown-spacing", text, unknown))
    if not known:
        return problems
    middle = np.median([*known.values()], axis=0)
    odd = {
        case: steps
        for case, steps in known.items()
        if max(np.max(steps / middle), np.max(middle / steps)) > ODD_SPACING
    }
    if odd:
        which = first_few(f"{case} ({_steps(steps)})" for case, steps in odd.items())
        text = (
            f"{count(odd, 'spacing')} more than {ODD_SPACING:g} times from the median ({_steps(middle)}): {which}. See "
            f"whether the headers are right; correct them, or leave the cases out: {exclude_option(list(odd))}."
        )
        problems.append(warning("odd-spacing", text, odd))
    thick = {case: steps for case, steps in known.items() if steps.max() > ANISOTROPY * steps.min() and case not in odd}
    if thick:
        text = (
            f"Slices are more than {ANISOTROPY:g} times as far apart as pixels in {len(thick)} of "
            f"{count(scans, 'case')}: {first_few(thick, 3)} "
            f"(median {_steps(np.median([*thick.values()], axis=0))}). What is thinner than a slice may not be "
            "seen, and slices are not mixed where such scans are resampled."
        )
        problems.append(warning("thick-slices", text, thick))
    return problems


def _usual_dims(scans: Iterable[VolumeScan]) -> int:
    """2 or 3, whichever most have; 0 of no scans."""
    dims = Counter(len(scan.shape) for scan in scans).most_common(1)
    return dims[0][0] if dims else 0


def _spreads(rows: Sequence[Sequence[float]]) -> tuple[Spread, ...]:
    """The spread of each axis."""
    return tuple((min(values), median(values), max(values)) for values in zip(*rows, strict=True))


def _grouped(pairs: Iterable[tuple[str, K]]) -> dict[K, list[str]]:
    """Ids by what they have."""
    groups: dict[K, list[str]] = defaultdict(list)
    for case, key in pairs:
        groups[key].append(case)
    return groups


def _minority(groups: Mapping[K, list[str]]) -> list[str]:
    """All ids but those of the largest group."""
    largest = max(groups.values(), key=len)
    return [case for ids in groups.values() if ids is not largest for case in ids]


def _some(ids: Sequence[str]) -> str:
    """A few names by name, many by their number and the first."""
    return first_few(ids) if len(ids) <= 3 else f"{len(ids)} cases such as {ids[0]}"


def _within(root: Path, path: Path) -> str:
    """A path in the data set, with forward slashes."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _steps(spacing: NDArray[np.float64]) -> str:
    return f"{' x '.join(f'{step:.3g}' for step in spacing)} mm"
