"""NRRD and MetaImage files (.nrrd, .nhdr, .mha, .mhd), by SimpleITK."""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name that everybody knows it by

from medtpp.data.geometry import Geometry, Volume
from medtpp.data.volumes.grid import check_finite, compact, make_geometry
from medtpp.data.volumes.nifti import MAX_CHANNELS
from medtpp.errors import DataError


def read_itk(path: Path) -> Volume:
    """Read an NRRD or MetaImage file. A fourth axis of at most 16 and vectors are channels.

    Returns:
        (C, D, H, W), or (C, H, W) where the file has two axes.

    Raises:
        DataError: The file is missing, empty, truncated or broken, has more channels or axes, complex voxels, NaN or
            infinite values, or degenerate directions. The reason without the path.
    """
    _check_file(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        if "direction" in str(error):
            raise DataError("its header has degenerate directions. Write the header again.") from error
        detached = " Its data file may be missing." if path.suffix.lower() in (".mhd", ".nhdr") else ""
        raise DataError(
            f"is truncated or broken, or no {path.suffix} file.{detached} Copy or export it again."
        ) from error
    if "complex" in image.GetPixelIDTypeAsString():
        raise DataError("holds complex voxels. Only real numbers are read; save the magnitude.")
    values = sitk.GetArrayFromImage(image)
    components, dims = image.GetNumberOfComponentsPerPixel(), image.GetDimension()
    if dims > 4 or (dims == 4 and components > 1):
        raise DataError(f"has {dims} axes with {components} values per voxel. Save one volume per file.")
    if components > 1:
        values = np.moveaxis(values, -1, 0)
    elif dims < 4:
        values = values[None]
    if len(values) > MAX_CHANNELS:
        raise DataError(
            f"has {len(values)} channels; up to {MAX_CHANNELS} are read. Save the ones to use on their own."
        )
    geometry = _geometry(image, values.shape[1:])
    values = np.ascontiguousarray(compact(values))
    check_finite(values)
    return Volume(values, geometry)


def _geometry(image: sitk.Image, shape: tuple[int, ...]) -> Geometry:
    dims = len(shape)
    # Of four axes the first three are space. ITK counts them as x, y, z; columns of the matrix are their directions.
    matrix = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)[:dims, :dims]
    # An NRRD file may leave out in which space its axes are; a MetaImage never does.
    known = image.GetMetaData("ITK_InputFilterName") != "NrrdImageIO" or image.HasMetaDataKey("NRRD_space")
    return make_geometry(shape, image.GetSpacing()[:dims][::-1], image.GetOrigin()[:dims], matrix.T[::-1], known=known)


def _check_file(path: Path) -> None:
    """Test what ITK's readers leave alone, or print about past our messages.

    These are the checksum of compressed data, in the file or in one of its own, and the length of a MetaImage's data.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 16)
            if not head:
                raise DataError("the file is empty (0 bytes).")
            nrrd = head[:4] == b"NRRD"
            end = re.search(rb"\r?\n\r?\n" if nrrd else rb"(?m)^ElementDataFile\s*=\s*LOCAL\s*?\n", head)
            fields = head[: end.start()] if end else head
            detached = re.search(rb"(?im)^(?:data ?file:|ElementDataFile\s*=)[ \t]*([^\r\n\0]+?)[ \t\r]*$", fields)
            voxels = path.parent / os.fsdecode(detached[1]) if detached else None
            if voxels and not nrrd and not _is_list(voxels.name) and not voxels.is_file():
                raise DataError("its data file is missing. Copy it to where the header says, or export both again.")
            if not re.search(rb"(?im)^(encoding:\s*gz|CompressedData\s*=\s*True)", fields):
                if voxels is None and end and not nrrd:
                    _check_length(path, path.stat().st_size - end.end())
                elif voxels and voxels.is_file() and not nrrd:
                    _check_length(path, voxels.stat().st_size)
                return
            data = b""  # what is missing of a NRRD file is told by ITK's reader
            if voxels:
                data = voxels.read_bytes() if voxels.is_file() else data
            elif end:
                stream.seek(end.end())
                data = stream.read()
            if data:
                (gzip.decompress if data[:2] == b"\x1f\x8b" else zlib.decompress)(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            "is truncated or broken (its compressed data does not add up). Copy or export it again."
        ) from error
    except OSError as error:
        raise DataError(f"cannot be opened ({error.strerror or error}).") from error


def _is_list(name: str) -> bool:
    """Whether a MetaImage names several data files: listed in the header, or by a pattern such as slice%03d.raw."""
    return name.upper().startswith("LIST") or "%" in name


def _check_length(path: Path, there: int) -> None:
    """Compare the bytes that are there with those that the header announces; what else is wrong is told on reading."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return
    dims, components = reader.GetDimension(), reader.GetNumberOfComponents()
    pixel = sitk.Image([1] * dims, reader.GetPixelID(), components if components > 1 else 0)
    announced = math.prod(reader.GetSize()) * sitk.GetArrayViewFromImage(pixel).nbytes
    if there < announced:
        raise DataError(
            f"is truncated: its header announces {announced:,} bytes of voxels, {there:,} are there. Copy or export it "
            "again."
        )
