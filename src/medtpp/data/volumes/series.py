"""Which scans a folder of DICOM files holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtpp.data.case import Problem
from medtpp.data.listing import list_images
from medtpp.data.problems import count
from medtpp.data.volumes.dicom import EXPORT_SPACING, no_volume
from medtpp.data.volumes.header import PROJECTIONS, Header, is_dicom, read_header
from medtpp.data.volumes.stack import doubled, in_order, stack_problems
from medtpp.errors import DataError

PREAMBLE = 132  # bytes with which a DICOM file begins
SAME_VIEW = np.cos(np.radians(30.0))  # slices nearer in direction are meant as one stack; planes of scouts are not


@dataclass(frozen=True)
class Series:
    """One scan in a folder of DICOM files: a stack of slices, a multi-frame file, or a single image.

    Attributes:
        files: Its files; slices in their order in space.
        stacked: Whether the files are slices of a volume: then they go into `Case.files`, also if there is but one.
        modality: Such as "CT"; "unknown" of a file that cannot be read.
        size: (D, H, W) of a volume, (H, W) of an image; () of a file that cannot be read.
        patient: A pseudonym, the same for a patient in every folder; None where the files name no patient.
        problems: What is wrong with it, to be read after its name and a colon. With an error among them it cannot be
            read.
    """

    files: tuple[Path, ...]
    stacked: bool
    modality: str
    size: tuple[int, ...]
    patient: str | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def image(self) -> Path:
        """The first file, for `Case.image`."""
        return self.files[0]

    def summary(self) -> str:
        """In words without any text of a header, such as "CT, 120 slices of 512 x 512"."""
        if not self.size:
            return f"unreadable ({self.image.name})"
        plane = " x ".join(map(str, self.size[-2:]))
        if len(self.size) == 2:
            return f"{self.modality}, {plane}"
        return f"{self.modality}, {count(self.size[0], 'slice')} of {plane}"


def find_series(folder: Path) -> list[Series]:
    """All scans under a folder, in any nesting, whatever the files are called.

    Files that are not DICOM are passed over, and so are directories (DICOMDIR), reports, segmentations and doses.
    Slices belong together by their series and direction; where places are taken twice, acquisition, echo, phase,
    b-value or image type tell the stacks apart, if one of them does. Radiographs, multi-frame files and images without
    a position are on their own. A DICOM file that cannot be read is a series with an error; so is one beside others
    that is empty or breaks off before it says that it is DICOM.

    Returns:
        Sorted by the path of the first file in space.

    Raises:
        DataError: The folder does not exist or cannot be opened.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder.")
    images, others = list_images(folder)
    found: list[Series] = []
    slices: dict[str, list[Header]] = defaultdict(list)
    unscaled: dict[str, list[Header]] = defaultdict(list)
    torn: list[Path] = []
    places: set[Path] = set()
    for path in (folder / name for name in sorted([*images, *others])):
        try:
            header = read_header(path) if is_dicom(path) else None
        except DataError as error:
            problem = Problem("error", "unreadable-dicom", error.message)
            found.append(Series((path,), False, "unknown", (), problems=(problem,)))
            continue
        if header is None:
            if _may_be_torn(path):
                torn.append(path)
            continue
        places.add(path.parent)
        if header.planes and header.frames == 1 and header.modality not in PROJECTIONS:
            slices[header.series].append(header)
        elif header.unscaled and header.frames == 1:
            unscaled[header.series].append(header)
        else:
            found.append(_single(header))
    found += [_unscaled(headers) for headers in unscaled.values()]
    found += [_torn(path) for path in torn if path.parent in places]
    found += [_stack(stack) for headers in slices.values() for stack in _stacks(headers)]
    return sorted(found, key=lambda series: series.image)


def _may_be_torn(path: Path) -> bool:
    """Whether a file may be the rest of a DICOM file, of which a copy that was broken off left too little to tell.

    Names without a suffix, and UIDs, are what such files have. Short texts and notes hold no zero bytes.
    """
    if path.suffix and not path.suffix[1:].isdecimal():
        return False
    data = path.read_bytes() if path.stat().st_size < PREAMBLE else None
    return data is not None and (not data or b"\0" in data)


def _torn(path: Path) -> Series:
    how = "is empty (0 bytes)" if not path.stat().st_size else "breaks off"
    text = (
        f"{how} and lies among DICOM files: a slice may be missing. Copy or export it again; delete the file if it is "
        "no slice."
    )
    return Series((path,), False, "unknown", (), problems=(Problem("error", "unreadable-dicom", text),))


def _unscaled(headers: Sequence[Header]) -> Series:
    """Slices of a series that tell where they lie and no pixel spacing; one alone can be read as an image."""
    first = headers[0]
    if len(headers) == 1:
        text = f"is a slice ({first.modality}) that tells no pixel spacing, and is read as a single image."
        problem = Problem("warning", "no-pixel-spacing", f"{text} {EXPORT_SPACING}")
        return Series((first.path,), False, first.modality, first.size, first.patient, (problem,))
    text = f"its {len(headers)} slices tell no pixel spacing, and make no volume. {EXPORT_SPACING}"
    return Series(
        tuple(header.path for header in headers),
        True,
        first.modality,
        (len(headers), *first.size),
        first.patient,
        (Problem("error", "no-pixel-spacing", text),),
    )


def _single(header: Header) -> Series:
    """A file on its own."""
    problems: Sequence[Problem] = ()
    size: tuple[int, ...] = header.size
    if header.frames > 1:
        size = (header.frames, *header.size)
        problems = (
            stack_problems(in_order(header.planes)) if header.planes else (Problem("error", "film", no_volume(header)),)
        )
    elif header.modality in ("CT", "MR", "PT"):
        text = (
            f"is a {header.modality} image without a position, such as a screenshot or a table. "
            "Leave it out with data.exclude if it is no scan."
        )
        problems = (Problem("warning", "no-position", text),)
    return Series((header.path,), False, header.modality, size, header.patient, tuple(problems))


def _stack(headers: Sequence[Header]) -> Series:
    planes = in_order(header.planes[0] for header in headers)
    problems = stack_problems(planes)
    first = headers[0]
    if first.localizer:
        text = (
            "is a localizer (a scout view other scans were planned on). Leave it out with "
            "data.exclude if it is no scan to learn from."
        )
        problems.append(Problem("warning", "localizer", text))
    return Series(
        tuple(plane.file for plane in planes),
        True,
        first.modality,
        (len(planes), *planes[0].size),
        first.patient,
        tuple(problems),
    )


def _stacks(headers: Sequence[Header]) -> list[list[Header]]:
    """The stacks of one series."""
    views: list[list[Header]] = []
    for header in headers:
        view = next((view for view in views if _same_view(view[0], header)), None)
        if view is None:
            views.append([header])
        else:
            view.append(header)
    return [stack for view in views for stack in _untangled(view)]


def _same_view(first: Header, second: Header) -> bool:
    """Whether rows and columns of two slices run about the same way."""
    axes = zip(first.planes[0].orientation, second.planes[0].orientation, strict=True)
    return all(np.dot(a, b) > SAME_VIEW for a, b in axes)


def _untangled(headers: list[Header]) -> list[list[Header]]:
    """Stacks that share places, told apart by a value of the header; one stack where none tells them apart."""
    count = doubled(header.planes[0] for header in headers)
    if count == 1:
        return [headers]
    width = len(headers[0].stack)
    for key in [*(slice(index, index + 1) for index in range(width)), slice(width)]:
        groups: dict[tuple[str, ...], list[Header]] = defaultdict(list)
        for header in headers:
            groups[header.stack[key]].append(header)
        # As many groups as images at a place: a number that changes from slice to slice tells nothing apart.
        if len(groups) == count and all(doubled(h.planes[0] for h in group) == 1 for group in groups.values()):
            return list(groups.values())
    return [headers]
