"""NRRD and MetaImage files (.nrrd, .nhdr, .mha, .mhd), by SimpleITK."""

from __future__ import annotations

import gzip
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
    """Test the checksum of compressed data, in the file or in one of its own, which ITK's readers leave alone."""
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 16)
            if not head:
                raise DataError("the file is empty (0 bytes).")
            nrrd = head[:4] == b"NRRD"
            end = re.search(rb"\r?\n\r?\n" if nrrd else rb"(?m)^ElementDataFile\s*=\s*LOCAL\s*?\n", head)
            fields = head[: end.start()] if end else head
            detached = re.search(rb"(?im)^(?:data ?file:|ElementDataFile\s*=)[ \t]*([^\r\n\0]+?)[ \t\r]*$", fields)
            if not re.search(rb"(?im)^(encoding:\s*gz|CompressedData\s*=\s*True)", fields):
                return
            data = b""  # what is missing is told by ITK's reader
            if detached:
                voxels = path.parent / os.fsdecode(detached[1])
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
