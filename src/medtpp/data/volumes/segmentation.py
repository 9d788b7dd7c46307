"""DICOM segmentations (SEG): their frames laid on the grid of the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import MediaStorageDirectoryStorage

from medtpp.data.geometry import Geometry
from medtpp.data.volumes.grid import aligned, describe
from medtpp.data.volumes.header import discreet, open_dataset, planes_of
from medtpp.data.volumes.stack import Plane, stack_geometry
from medtpp.errors import DataError

_OFF_GRID = 0.05  # voxels by which a frame may be off


def is_segmentation(path: Path) -> bool:
    """Whether a DICOM file is a segmentation (SEG), or breaks off before it says what it is.

    Raises:
        DataError: See `open_dataset`.
    """
    dataset = open_dataset(path, keywords=("Modality",))
    if "Modality" in dataset:
        return bool(dataset.Modality == "SEG")
    return bool(dataset.file_meta.get("MediaStorageSOPClassUID") != MediaStorageDirectoryStorage)


def read_segmentation(path: Path, geometry: Geometry) -> NDArray[np.integer[Any]]:
    """Read a SEG object of type BINARY or LABELMAP.

    Each frame is placed by its own position, since frames without any structure are left out of such files.

    Args:
        path: The file.
        geometry: Of the image.

    Returns:
        (D, H, W) segment numbers, 0 where there is none.

    Raises:
        DataError: It is broken or no segmentation, holds fractions, has frames off the image's grid, or segments
            overlap. The reason without the path.
    """
    dataset = open_dataset(path)
    with discreet("is truncated or broken, or its compression is not supported. Export it again."):
        if dataset.get("Modality") != "SEG" or geometry.dims != 3:
            raise DataError("is no DICOM segmentation (SEG) of a volume. Save masks as SEG, NIfTI or PNG.")
        kind = str(dataset.get("SegmentationType", ""))
        if kind not in ("BINARY", "LABELMAP"):
            raise DataError("is a segmentation of fractions. Save it as BINARY or LABELMAP.")
        size, count = (int(dataset.Rows), int(dataset.Columns)), int(dataset.NumberOfFrames)
        planes = planes_of(path, dataset, size, count)
        frames = pixel_array(dataset).reshape(count, *size)
        numbers = [_segment(group) for group in dataset.PerFrameFunctionalGroupsSequence] if kind == "BINARY" else []
    if not planes:
        raise DataError("does not say where its frames lie. Export it again.")
    mask = np.zeros(geometry.shape, np.int32)
    for index, (plane, frame) in enumerate(zip(planes, frames, strict=True)):
        labels, region = _placed(frame[None], plane, geometry)
        labels = labels.astype(np.int32) * (numbers[index] if numbers else 1)
        there = mask[region]
        if ((there > 0) & (labels > 0) & (there != labels)).any():
            raise DataError("has segments that overlap, and a mask holds one value per voxel. Save each in a file.")
        mask[region] = np.maximum(there, labels)
    return mask


def _segment(group: Dataset) -> int:
    return int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _placed(frame: NDArray[Any], plane: Plane, geometry: Geometry) -> tuple[NDArray[Any], tuple[slice, ...]]:
    """A frame (1, H, W) turned to the axes of the image, and the part of the image's grid that it covers."""
    values, own = aligned(frame, stack_geometry([plane]), geometry)
    axes = np.array(geometry.directions)
    start = axes @ (np.array(own.origin) - geometry.origin) / geometry.spacing
    region = tuple(slice(round(first), round(first) + size) for first, size in zip(start, own.shape, strict=True))
    fits = all(part.start >= 0 and part.stop <= size for part, size in zip(region, geometry.shape, strict=True))
    even = all(
        size == 1 or abs(step - wanted) * size < _OFF_GRID * wanted
        for size, step, wanted in zip(own.shape, own.spacing, geometry.spacing, strict=True)
    )
    turned = np.allclose(own.directions, axes, atol=1e-3)
    if not (fits and even and turned and np.abs(start - np.rint(start)).max() < _OFF_GRID):
        raise DataError(
            "has frames off the grid of its image. Resample or export it on that grid.",
            [f"frame: {describe(own)}", f"image: {describe(geometry)}"],
        )
    return values, region
