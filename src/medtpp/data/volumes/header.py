"""What is read of a DICOM header: kind of image, size, place. Names, dates, descriptions and ids stay behind.

No message of this module holds text of a header, and no error of pydicom is passed on, since it may quote one.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from medtpp.data.listing import DICOM_SUFFIXES
from medtpp.data.volumes.grid import ORTHONORMAL
from medtpp.data.volumes.stack import Plane
from medtpp.errors import DataError

# One image per file, taken by projection; every other modality is made of slices where its files tell positions.
PROJECTIONS = frozenset({"CR", "DX", "MG", "IO", "PX", "RF", "XA", "RG", "DXA", "BMD"})

# Objects with rows and columns that are no scans.
_NO_SCANS = frozenset({"SEG", "RTDOSE", "RTIMAGE", "PR", "KO", "SR", "REG", "DOC"})

_NO_DICOM = "is no DICOM file, or its header is broken. Copy or export it again."

# Where a warning about a header may be said to come from: libraries name themselves or whoever called them.
_QUIET_MODULES = r"(pydicom|highdicom|medtpp\.data|medtpp\.inference)\b"
_QUIET = ("ignore", None, Warning, re.compile(_QUIET_MODULES), 0)

# What tells apart the stacks of one series, in the order tried.
_STACK_KEYS = (
    "AcquisitionNumber",
    "EchoNumbers",
    "EchoTime",
    "TemporalPositionIdentifier",
    "DiffusionBValue",
    "TriggerTime",
    "ImageType",
)
_KEYWORDS = (
    *_STACK_KEYS,
    "SOPClassUID",
    "SeriesInstanceUID",
    "PatientID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


@dataclass(frozen=True)
class Header:
    """One DICOM image file.

    Attributes:
        path: Where it is.
        modality: Such as "CT".
        size: Rows and columns.
        frames: Number of images in the file.
        spacing: Distance of rows and of columns in mm, where told.
        planes: One per frame where the header places all of them in space, else ().
        unscaled: Whether it does, but tells no pixel spacing, so that `planes` is ().
        localizer: Whether it is a scout view that other scans were planned on.
        patient: A pseudonym, where the header names a patient.
        series: Equal for files of one series. Not to be shown.
        stack: Further values that may tell apart stacks of one series. Not to be shown.
    """

    path: Path
    modality: str
    size: tuple[int, int]
    frames: int
    spacing: tuple[float, float] | None
    planes: tuple[Plane, ...]
    unscaled: bool
    localizer: bool
    patient: str | None
    series: str = field(repr=False)
    stack: tuple[str, ...] = field(repr=False)


@contextmanager
def discreet(reason: str) -> Iterator[None]:
    """Work with DICOM files whose errors, warnings and log entries are not passed on: all three may quote the header.

    Nothing is switched on and off that other threads share, since several read at once.

    Raises:
        DataError: Any error inside, with `reason` in place of its text.
    """
    _keep_quiet()
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - on broken files pydicom and the decoders raise nearly any type
        raise DataError(reason) from None


def _keep_quiet() -> None:
    """Silence the DICOM libraries, for as long as the process lives; handlers of their own loggers still see all."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # values as they are, without a word
    for name in ("pydicom", "highdicom"):
        logger = logging.getLogger(name)
        logger.propagate = False
        if not logger.handlers:  # else Python's handler of last resort would print
            logger.addHandler(logging.NullHandler())
    if _QUIET not in warnings.filters:  # whoever restores the filters, as pytest does, takes it away again
        warnings.filterwarnings("ignore", module=_QUIET_MODULES)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its suffix or its first bytes; old files without a preamble count.

    Raises:
        DataError: It cannot be opened. The reason without the path.
    """
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    try:
        with path.open("rb") as stream:
            head = stream.read(132)
    except OSError as error:
        raise DataError(f"cannot be opened ({error.strerror or error}).") from error
    return head[128:] == b"DICM" or (not path.suffix and head[:2] in (b"\x08\x00", b"\x02\x00") and head[3:4] == b"\0")


def read_header(path: Path) -> Header | None:
    """Read what counts of a DICOM file's header.

    Returns:
        None where the file holds no image: a report, a directory, a segmentation, a dose.

    Raises:
        DataError: The file is empty or broken. The reason without the path, and without any text of the header.
    """
    dataset = open_dataset(path, keywords=_KEYWORDS)
    with discreet("has a broken DICOM header. Export it again."):
        return _header(path, dataset)


def open_dataset(path: Path, *, keywords: tuple[str, ...] | None = None) -> Dataset:
    """A file's elements; with `keywords` those alone and no pixels.

    Raises:
        DataError: The file is empty, missing or no DICOM file. The reason without the path.
    """
    try:
        if not path.stat().st_size:
            raise DataError("is empty (0 bytes). Copy or export it again.")
        with path.open("rb") as stream, discreet(_NO_DICOM):
            dataset = pydicom.dcmread(
                stream,
                force=True,
                stop_before_pixels=keywords is not None,
                specific_tags=list(keywords) if keywords else None,
            )
            if "TransferSyntaxUID" not in dataset.file_meta:  # as in files from before there were preambles
                implicit, little = dataset.original_encoding
                explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
                dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
            return dataset
    except OSError as error:
        raise DataError(f"cannot be opened ({error.strerror or error}).") from error


def _header(path: Path, dataset: Dataset) -> Header | None:
    if "SOPClassUID" not in dataset:
        if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None
        raise DataError(_NO_DICOM)
    modality = str(dataset.get("Modality") or "")
    if "Rows" not in dataset or "Columns" not in dataset or modality in _NO_SCANS:
        return None
    size = (int(dataset.Rows), int(dataset.Columns))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if min(size) < 1 or frames < 1:
        raise DataError("has a broken DICOM header (an image without rows, columns or frames). Export it again.")
    planes = planes_of(path, dataset, size, frames)
    return Header(
        path=path,
        # A code of a few capitals by the standard; anything else could be a text.
        modality=modality if modality.isalpha() and modality.isupper() and len(modality) <= 4 else "unknown",
        size=size,
        frames=frames,
        spacing=_pair(dataset, "PixelSpacing") or _pair(dataset, "ImagerPixelSpacing"),
        planes=planes,
        unscaled=not planes and bool(planes_of(path, dataset, size, frames, spacing=(1.0, 1.0))),
        localizer="LOCALIZER" in (dataset.get("ImageType") or ()),
        patient=_pseudonym(str(dataset.get("PatientID") or "").strip()),
        series=str(dataset.get("SeriesInstanceUID") or path),
        stack=tuple(str(dataset.get(keyword, "")) for keyword in _STACK_KEYS),
    )


def planes_of(
    path: Path, dataset: Dataset, size: tuple[int, int], frames: int, *, spacing: tuple[float, float] | None = None
) -> tuple[Plane, ...]:
    """Where the frames of a file lie; () unless the header places all of them.

    Args:
        path: The file.
        dataset: Its header.
        size: Rows and columns.
        frames: Number of images in it.
        spacing: Distance of rows and of columns in mm where the header tells none; by default it places no frame then.
    """
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or ()), Dataset())
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or ([Dataset()] if frames == 1 else [])
    if len(groups) != frames:
        return ()
    planes = []
    for index, group in enumerate(groups):

        def find(sequence: str, group: Dataset = group) -> Dataset:
            """The macro of a functional group: of the frame, of all frames, or the file itself."""
            return next((part[sequence][0] for part in (group, shared) if part.get(sequence)), dataset)

        place = _numbers(find("PlanePositionSequence"), "ImagePositionPatient", 3)
        cosines = _numbers(find("PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        measures = find("PixelMeasuresSequence")
        pixels = _pair(measures, "PixelSpacing") or spacing
        if place is None or cosines is None or pixels is None:
            return ()
        step = _numbers(measures, "SpacingBetweenSlices", 1) or _numbers(measures, "SliceThickness", 1) or (1.0,)
        planes.append(
            Plane(
                file=path,
                frame=index if frames > 1 else None,
                size=size,
                position=(place[0], place[1], place[2]),
                orientation=_orientation(cosines),
                spacing=pixels,
                step=abs(step[0]) or 1.0,
            )
        )
    return tuple(planes)


def _orientation(cosines: tuple[float, ...]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    right, down = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.linalg.norm(right), np.linalg.norm(down)
    if max(abs(length - 1) for length in lengths) > 10 * ORTHONORMAL or abs(right @ down) > ORTHONORMAL:
        raise DataError("has a broken DICOM header (ImageOrientationPatient is no pair of directions).")
    right = right / lengths[0]
    down = down - (down @ right) * right  # the header rounds; columns follow the rows
    down = down / np.linalg.norm(down)
    x, y = (tuple(float(value) for value in axis) for axis in (right, down))
    return (y[0], y[1], y[2]), (x[0], x[1], x[2])


def _pair(dataset: Dataset, keyword: str) -> tuple[float, float] | None:
    values = _numbers(dataset, keyword, 2)
    if values is None:
        return None
    if min(values) <= 0:
        raise DataError(f"has a broken DICOM header ({keyword} is not above 0).")
    return values[0], values[1]


def _numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise DataError(f"has a broken DICOM header ({keyword} is not {count} numbers).")
    return tuple(float(number) for number in numbers)


@functools.lru_cache(maxsize=4096)
def _pseudonym(patient: str) -> str | None:
    """The same for the same patient everywhere, so that no patient falls in two splits. scrypt makes guessing slow."""
    if not patient:
        return None
    return hashlib.scrypt(patient.encode(), salt=b"medtpp patient", n=1 << 14, r=8, p=1, dklen=6).hex()
