"""Data layouts, one file each: a class registered in `medtpp.config.SOURCES` that recognises and reads one layout."""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from medtpp.config import DataOptions
from medtpp.data.case import Case, Dataset, Problem
from medtpp.data.listing import DICOM_SUFFIXES, list_images, spelled, stem_of
from medtpp.data.problems import agree, count, first_few, listed
from medtpp.errors import DataError

if TYPE_CHECKING:
    from medtpp.data.volumes.series import Series


_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Source(Protocol):
    """What a data layout offers.

    Attributes:
        summary: The layout in one line, for lists and error messages.
    """

    summary: ClassVar[str]

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether the path looks like this layout; a quick look that reads no image."""

    @staticmethod
    def read(path: Path, options: DataOptions) -> Dataset:
        """Read all cases, excluded ones too. Raises DataError where nothing at all can be read."""


def split_of(name: str) -> str | None:
    """The split that a folder or a cell names ("Validation" is "val"), or None."""
    return _SPLIT_NAMES.get(name.strip().casefold())


def class_names(cases: Iterable[Case]) -> tuple[str, ...]:
    """The labels of some cases in sorted order."""
    return tuple(sorted({label for case in cases for label in case.labels}))


def is_excluded(case: str, patterns: Sequence[str]) -> bool:
    """Whether a case id equals or matches one of the patterns; `*` also matches slashes."""
    return any(case == pattern or fnmatchcase(case, pattern) for pattern in patterns)


@dataclass(frozen=True)
class ImageFile:
    """An image, a volume or a DICOM scan in a folder.

    Attributes:
        name: Its case id. The path of its file relative to the folder, with forward slashes; of a stack of slices, the
            folder they lie in, with "#1", "#2" where several stacks lie there.
        image: For `Case.image`.
        files: For `Case.files`.
        scan: What the headers say, of DICOM.
        place: Of one of several stacks in a folder, the folder: its name without the number.
    """

    name: str
    image: Path
    files: tuple[Path, ...] = ()
    scan: Series | None = None
    place: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffix, `spelled` to pair it with a mask."""
        return spelled(self.name if len(self.files) > 1 else stem_of(self.name))

    @property
    def patient(self) -> str | None:
        """A pseudonym, where there is a header that tells patients apart."""
        return self.scan.patient if self.scan else None


def find_images(folder: Path) -> tuple[list[ImageFile], list[str]]:
    """All images under a folder: by suffix as `list_images` does, and DICOM scans by their content.

    Returns:
        Images sorted by name, and the names of other files.

    Raises:
        DataError: See `list_images`.
    """
    names, others = list_images(folder)
    images = [ImageFile(name, folder / name) for name in names]
    if any(_may_be_dicom(folder / name) for name in others):
        from medtpp.data.volumes import find_series  # brings pydicom

        scans = find_series(folder)
        images += _named(folder, scans)
        slices = {file.relative_to(folder).as_posix() for scan in scans for file in scan.files}
        others = [name for name in others if name not in slices and not _is_directory(name)]
    return sorted(images, key=lambda image: image.name), others


def find_scans(folder: Path, name: str) -> dict[str, ImageFile]:
    """The DICOM scans in a folder that a manifest names.

    Args:
        folder: Where it is.
        name: What the manifest calls it.

    Returns:
        By the names that the manifest may call them: of a scan that is alone, that of the folder; of several stacks in
        a folder, its name with "#1", "#2"; of files on their own, their paths.

    Raises:
        DataError: The folder cannot be opened.
    """
    from medtpp.data.volumes import find_series  # brings pydicom

    found = _named(folder.parent, find_series(folder))
    if len(found) == 1:
        return dict.fromkeys((name, f"{name}#1"), found[0])
    named = {name + scan.name.removeprefix(folder.name): scan for scan in found}
    # Where others lie deeper, or are files on their own, the folder's name alone could mean them as well.
    return {f"{name}#1" if called == name else called: scan for called, scan in named.items()}


def find_masks(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """All masks under a folder: images by suffix as `list_images` does, and DICOM segmentations by their content.

    Returns:
        Paths relative to the folder, each list sorted: masks, DICOM files that are no segmentation, and other files. A
        DICOM file that cannot be read is a mask, so that reading it says what is wrong.

    Raises:
        DataError: See `list_images`.
    """
    images, others = list_images(folder)
    dicom = {name: _may_be_segmentation(folder / name) for name in others if _may_be_dicom(folder / name)}
    masks = [name for name, is_mask in dicom.items() if is_mask]
    scans = [name for name, is_mask in dicom.items() if not is_mask and not _is_directory(name)]
    return sorted([*images, *masks]), scans, [name for name in others if name not in dicom]


def scan_problems(images: Iterable[ImageFile], exclude: Sequence[str]) -> list[Problem]:
    """What the headers of DICOM scans showed, of cases that are not left out: a problem for each kind of finding."""
    found: dict[tuple[str, str], list[tuple[str, Problem]]] = defaultdict(list)
    for image, scan in _kept_scans(images, exclude):
        for problem in scan.problems:
            found[problem.severity, problem.code].append((image.name, problem))
    problems = []
    for (_, code), its in found.items():
        told = [f"{name}: {problem.message}" for name, problem in its]
        text = f"DICOM: {told[0]}" if len(told) == 1 else f"DICOM, {count(told, 'finding')}:\n{listed(told, 3)}"
        problems.append(Problem(its[0][1].severity, code, text, tuple(dict.fromkeys(name for name, _ in its))))
    return problems


def crowded_folders(images: Iterable[ImageFile], exclude: Sequence[str]) -> list[Problem]:
    """A warning where folders hold several scans that nobody chose from, of cases that are not left out."""
    folders: dict[Path, list[tuple[ImageFile, Series]]] = defaultdict(list)
    for image, scan in _kept_scans(images, exclude):
        if scan.size:  # files that cannot be read are told of as such
            folders[scan.image.parent].append((image, scan))
    crowded = [inside for inside in folders.values() if len(inside) > 1 and any(scan.stacked for _, scan in inside)]
    if not crowded:
        return []
    series = (" and ".join(f"{image.name} ({scan.summary()})" for image, scan in inside) for inside in crowded)
    text = (
        f"{count(crowded, 'folder')} {agree(crowded, 'holds', 'hold')} several DICOM series: {first_few(series, 3)}. "
        "Each is a case; leave out those that are not meant with data.exclude."
    )
    return [Problem("warning", "several-series", text, tuple(image.name for inside in crowded for image, _ in inside))]


def _kept_scans(images: Iterable[ImageFile], exclude: Sequence[str]) -> list[tuple[ImageFile, Series]]:
    return [(image, image.scan) for image in images if image.scan and not is_excluded(image.name, exclude)]


def other_files(names: Sequence[str]) -> list[Problem]:
    """A warning where there are files that no one reads."""
    if not names:
        return []
    what = agree(names, "file is no image", "files are no images")
    return [Problem("warning", "not-an-image", f"{len(names)} {what}: {first_few(sorted(names), 3)}: ignored.")]


def _is_directory(name: str) -> bool:
    """Whether a file lists the DICOM files beside it, by its name."""
    return posixpath.basename(name).upper() == "DICOMDIR"


def _may_be_dicom(path: Path) -> bool:
    """Whether it is worth to look for scans, which takes long."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    try:
        with path.open("rb") as stream:
            start = stream.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or (not path.suffix and start[:2] in (b"\x08\x00", b"\x02\x00"))  # no preamble


def _may_be_segmentation(path: Path) -> bool:
    from medtpp.data.volumes.segmentation import is_segmentation  # brings pydicom

    try:
        return is_segmentation(path)
    except DataError:
        return True


def _named(folder: Path, scans: Sequence[Series]) -> list[ImageFile]:
    named = []
    for scan in sorted(scans, key=lambda scan: min(scan.files)):
        files = [file.relative_to(folder).as_posix() for file in scan.files]
        above = posixpath.commonpath([posixpath.dirname(name) for name in files]) or folder.resolve().name
        named.append((files[0] if len(files) == 1 else above, scan))
    total, seen = Counter(name for name, _ in named), Counter[str]()
    images = []
    for name, scan in named:
        seen[name] += 1
        numbered = f"{name}#{seen[name]}" if total[name] > 1 else name
        place = name if total[name] > 1 else ""
        images.append(ImageFile(numbered, scan.image, scan.files if scan.stacked else (), scan, place))
    return images
