"""Images and volumes of every format, as a `Volume`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medtpp.data.case import Case
from medtpp.data.decode import Pixels, decode, read_bytes, without_colour
from medtpp.data.geometry import Volume, plain_geometry, same_grid
from medtpp.data.npz import ARCHIVE, read_npz_row
from medtpp.data.volumes.grid import aligned, describe
from medtpp.errors import DataError
from medtpp.files import digest

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")


def read_volume(case: Case) -> Volume:
    """Read the image of a case, with its further channels (turned to run as the first where only axes differ).

    NIfTI, NRRD, MetaImage, DICOM (a file, the slices in `case.files`, or a folder that holds one scan), rows of a
    MedMNIST archive and what `medtpp.data.decode` reads. Which of them it is, is told by the suffix, of DICOM by the
    content.

    A single DICOM image is 2D, slices in `case.files` are 3D even if there is but one. Values are in HU for CT in DICOM
    alone: other formats do not say what theirs mean.

    Returns:
        (C, D, H, W) or (C, H, W): uint8, int16, uint16 or float32; units "HU", "levels" for 8-bit pixels, else "none".

    Raises:
        DataError: A file is missing, broken or of no known kind, holds NaN or infinite values, or has another grid
            than the first channel; slices do not make a volume. The message starts with the path and holds no text of a
            DICOM header.
    """
    if has_suffix(case.image, (ARCHIVE,)):
        return _row(case)
    volume = _read(case.image, case.files)
    if not case.channels:
        return volume
    volumes = [volume]
    for path in case.channels:
        other = _read(path, ())
        values, geometry = aligned(other.array, other.geometry, volume.geometry)
        volumes.append(Volume(values, geometry, other.units))
        if not same_grid(volume.geometry, geometry):
            raise DataError(
                f"{path}: has another grid than the first channel, {case.image.name}. Resample it to that one.",
                [f"{case.image.name}: {describe(volume.geometry)}", f"{path.name}: {describe(geometry)}"],
            )
    alike = len({other.array.dtype for other in volumes}) == 1
    arrays = [other.array if alike else other.array.astype(np.float32) for other in volumes]
    units = volume.units if all(other.units == volume.units for other in volumes) and alike else "none"
    return Volume(np.concatenate(arrays), volume.geometry, units)


def volume_fingerprint(volume: Volume) -> str:
    """The first 32 hexadecimal digits of a sha256 over shape, type and values: equal for equal images."""
    values = np.ascontiguousarray(volume.array)
    return digest(str(values.shape), values.dtype.name, hashlib.sha256(values.data).hexdigest())[:32]


def has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file's name ends so, in any case."""
    return path.name.lower().endswith(tuple(suffixes))


def _read(path: Path, files: Sequence[Path]) -> Volume:
    try:
        if files:
            from medtpp.data.volumes.dicom import read_dicom_series

            return read_dicom_series(files)
        if path.is_dir():
            return _read_folder(path)
        return read_file(path)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.problems) from error


def read_file(path: Path) -> Volume:
    """Read one file. The readers of each kind are imported here, since their libraries take long.

    Raises:
        DataError: See `read_volume`. The reason without the path.
    """
    if has_suffix(path, NIFTI_SUFFIXES):
        from medtpp.data.volumes.nifti import read_nifti

        # It prints what it mends in a header, without the file's name; what of it counts is told by `check`.
        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
        return read_nifti(path)
    if has_suffix(path, ITK_SUFFIXES):
        from medtpp.data.volumes.itk import read_itk

        return read_itk(path)
    from medtpp.data.volumes.header import is_dicom

    if is_dicom(path):
        from medtpp.data.volumes.dicom import read_dicom_file

        return read_dicom_file(path)
    return _plain(decode(read_bytes(path)))


def _row(case: Case) -> Volume:
    row = read_npz_row(case.image, case.id)
    if row.ndim == 3 and row.shape[-1] != 3:
        return Volume(row[None], plain_geometry(row.shape), "levels")
    return _plain(without_colour(row))


def _plain(pixels: Pixels) -> Volume:
    """A volume of (H, W) or (H, W, 3) pixels."""
    array = np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0))
    return Volume(array, plain_geometry(array.shape[1:]), "levels" if array.dtype == np.uint8 else "none")


def _read_folder(path: Path) -> Volume:
    from medtpp.data.volumes.series import find_series

    found = find_series(path)
    if not found:
        raise DataError("the folder holds no DICOM images.")
    if len(found) > 1:
        raise DataError(
            f"the folder holds {len(found)} series. Name the folder, or the files, of one:",
            [f"{series.image.relative_to(path).as_posix()}: {series.summary()}" for series in found],
        )
    return _read(found[0].image, found[0].files if found[0].stacked else ())
