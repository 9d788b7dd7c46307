"""Masks: the values of the file, on the grid of the image."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from medtpp.data.decode import FORMATS, decode, read_bytes
from medtpp.data.geometry import Geometry, plain_geometry, same_grid
from medtpp.data.problems import first_few
from medtpp.data.volumes.grid import aligned, describe
from medtpp.data.volumes.read import ITK_SUFFIXES, NIFTI_SUFFIXES, has_suffix, read_file
from medtpp.errors import DataError


def read_mask(path: Path, geometry: Geometry) -> NDArray[np.integer[Any]]:
    """Read a segmentation: NIfTI, NRRD, MetaImage, DICOM-SEG, PNG, TIFF, BMP.

    Values are those of the file, of palettes the indices. EXIF rotation is applied, as to images, and a mask
    whose voxels are the image's in another order of axes is turned.

    Args:
        path: The file.
        geometry: Of the image it belongs to.

    Returns:
        (*spatial), uint8 where the values fit, else int32.

    Raises:
        DataError: The file is missing or broken, in colour, has several channels, values that are no whole numbers, or
            another size or place than the image. The message starts with the path.
    """
    try:
        values, own = _read(path, geometry)
        values, own = aligned(_whole_numbers(values), own, geometry)
        if not same_grid(own, geometry):
            swapped = own.shape != geometry.shape and own.shape[-2:] == geometry.shape[-2:][::-1]
            hint = " Rows and columns are swapped: was one of the two rotated?" if swapped else ""
            what = "place" if own.shape == geometry.shape else "size"
            raise DataError(
                f"the mask has another {what} than its image.{hint} Resample or export it on the grid of the image.",
                [f"mask: {describe(own)}", f"image: {describe(geometry)}"],
            )
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.problems) from error
    return values


def _read(path: Path, geometry: Geometry) -> tuple[NDArray[Any], Geometry]:
    if has_suffix(path, (*NIFTI_SUFFIXES, *ITK_SUFFIXES)):
        volume = read_file(path)
        if len(volume.array) > 1:
            raise DataError(f"the mask has {len(volume.array)} channels. Save one value per voxel.")
        return volume.array[0], volume.geometry
    from medtpp.data.volumes.header import is_dicom

    if is_dicom(path):
        from medtpp.data.volumes.segmentation import read_segmentation

        return read_segmentation(path, geometry), geometry
    values = _image_values(read_bytes(path))
    return values, plain_geometry(values.shape)


def _image_values(data: bytes) -> NDArray[Any]:
    decode(data)  # finds whatever is broken; below its colours are of no use, since palettes hold values
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    values = np.asarray(ImageOps.exif_transpose(image))
    if values.ndim == 3:
        values = _one_channel(values, opaque=image.mode in ("LA", "PA", "RGBA"))
    if image.format in ("JPEG", "MPO") and len(found := np.unique(values)) > 2:
        raise DataError(
            f"the mask is a JPEG, whose compression turned its values into {len(found)} ({first_few(found)}). "
            "Save masks as PNG."
        )
    return values


def _one_channel(pixels: NDArray[Any], *, opaque: bool) -> NDArray[Any]:
    """Grey values of a mask that was stored in colour.

    Args:
        pixels: (H, W, channels).
        opaque: Whether the last channel is opacity, which says nothing about structures.
    """
    colours = pixels[..., :-1] if opaque else pixels
    if (colours == colours[..., :1]).all():
        return np.ascontiguousarray(colours[..., 0])
    found = Counter(map(tuple, colours.reshape(-1, colours.shape[-1]).tolist())).most_common()
    names = first_few((f"{tuple(colour)} at {count:,} pixels" for colour, count in found), 8)
    raise DataError(
        f"the mask is in colour, with {len(found)} colours: {names}. Save a number for each structure in place of its "
        "colour (0 for the background), as a grey or palette PNG."
    )


def _whole_numbers(values: NDArray[Any]) -> NDArray[np.integer[Any]]:
    if values.dtype.kind == "f":
        odd = values[values != np.rint(values)]
        if odd.size:
            raise DataError(
                f"the mask holds {odd.size:,} values that are no whole numbers ({first_few(np.unique(odd), 3)}): "
                "probabilities, or labels that were interpolated. Save whole numbers."
            )
    low, high = values.min(), values.max()
    if low >= 0 and high <= 255:
        return values.astype(np.uint8)
    if abs(float(low)) > 2**24 or abs(float(high)) > 2**24:
        raise DataError(f"the mask holds values from {low:g} to {high:g}, which are no labels.")
    return values.astype(np.int32)
