"""DICOM files to volumes and images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtpp.data.geometry import Volume, plain_geometry
from medtpp.data.volumes.grid import compact, make_geometry
from medtpp.data.volumes.header import Header, read_header
from medtpp.data.volumes.pixels import PixelFile
from medtpp.data.volumes.stack import Plane, in_order, stack_geometry, stack_problems
from medtpp.errors import DataError

EXPORT_SPACING = "Export it again with its PixelSpacing, or convert it with a program that knows the spacing."


def read_dicom_file(path: Path) -> Volume:
    """Read a file on its own: a radiograph or any other single image in 2D, a multi-frame scan in 3D.

    Raises:
        DataError: It is broken, no image, a film over time, or its frames fill no regular grid. The reason without the
            path.
    """
    header = _image_header(path)
    if header.frames > 1:
        if not header.planes:
            raise DataError(no_volume(header))
        return _stacked(header.planes)
    file = PixelFile(path)
    values = file.values()
    array = np.ascontiguousarray(compact(values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)))
    plain = plain_geometry(array.shape[1:])
    geometry = make_geometry(
        plain.shape, header.spacing or plain.spacing, plain.origin, plain.directions, known=header.spacing is not None
    )
    if file.hounsfield:
        return Volume(array, geometry, "HU")
    return Volume(array, geometry, "levels" if array.dtype == np.uint8 else "none")


def read_dicom_series(paths: Sequence[Path]) -> Volume:
    """Read the slices of one series, in whatever order they are named, as a volume.

    Memory is about that of the volume: int16 where the values fit, else float32.

    Raises:
        DataError: A file is broken, no slice or of another series, or the slices fill no regular grid (missing,
            doubled, not parallel, sheared, of several sizes). All reasons together, without the path.
    """
    headers, broken = [], []
    for path in paths:
        try:
            headers.append(_image_header(path))
        except DataError as error:
            broken.append(f"{path.name} {error.message}")
    broken += [
        f"{header.path.name} tells no {'pixel spacing' if header.unscaled else 'position'}."
        for header in headers
        if not header.planes
    ]
    broken += [f"{header.path.name} holds {header.frames} frames." for header in headers if header.frames > 1]
    if broken:
        raise DataError(f"{len(broken)} of {len(paths)} files cannot be stacked:", shortened(broken))
    count = len({header.series for header in headers})
    if count > 1:
        raise DataError(f"its {len(paths)} files are of {count} series. Name the files of one.")
    return _stacked([header.planes[0] for header in headers])


def no_volume(header: Header) -> str:
    """Why a file with several frames that are not all placed in space is not read."""
    if header.unscaled:
        return f"holds {header.frames} frames and tells no pixel spacing. {EXPORT_SPACING}"
    return (
        f"holds {header.frames} frames without positions in space (a film, such as an ultrasound loop). Save the "
        "frames to use as single images."
    )


def shortened(lines: Sequence[str], limit: int = 10) -> list[str]:
    """The first of many findings, and how many more there are."""
    rest = len(lines) - limit
    return [*lines[:limit], f"and {rest} more"] if rest > 0 else list(lines)


def _image_header(path: Path) -> Header:
    header = read_header(path)
    if header is None:
        raise DataError("is a DICOM object without an image to read (a report, segmentation, dose or directory).")
    return header


def _stacked(planes: Sequence[Plane]) -> Volume:
    planes = in_order(planes)
    problems = stack_problems(planes)
    if problems:
        raise DataError("its slices do not make a volume:", [problem.message for problem in problems])
    geometry = stack_geometry(planes)
    array = np.empty(geometry.shape, np.int16)
    hounsfield, broken = True, []
    for index, (plane, outcome) in enumerate(_pixels(planes)):
        if isinstance(outcome, DataError):
            broken.append(f"{plane.file.name} {outcome.message}")
            continue
        values, is_hounsfield = outcome
        hounsfield = hounsfield and is_hounsfield
        if array.dtype == np.int16 and not _fits(values):
            array = array.astype(np.float32)
        array[index] = values
    if broken:
        raise DataError(f"{len(broken)} of {len(planes)} slices cannot be read:", shortened(broken))
    return Volume(array[None], geometry, "HU" if hounsfield else "none")


def _pixels(planes: Sequence[Plane]) -> Iterator[tuple[Plane, tuple[NDArray[Any], bool] | DataError]]:
    """The values of each plane and whether they are in HU, or why there are none; a file is opened once."""
    file, opened = None, None
    for plane in planes:
        try:
            if file is None or opened != plane.file:
                file, opened = PixelFile(plane.file), plane.file
            values = file.values(plane.frame or 0)
            if values.shape != plane.size:
                raise DataError(f"is in colour or not of {plane.size[0]} x {plane.size[1]} pixels.")
            yield plane, (values, file.hounsfield)
        except DataError as error:
            yield plane, error


def _fits(values: NDArray[Any]) -> bool:
    if values.dtype.kind not in "iu":
        return False
    limits = np.iinfo(np.int16)
    return bool(values.dtype.itemsize < 2 or (values.min() >= limits.min and values.max() <= limits.max))
