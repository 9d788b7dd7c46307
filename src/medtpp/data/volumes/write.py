"""Arrays as NIfTI and PNG files; read back they are equal. Written whole or not at all.

Compression is the fastest there is (level 1): masks are mostly background, and higher levels save little.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtpp.data.geometry import Geometry
from medtpp.data.volumes.read import has_suffix
from medtpp.files import atomic

_OFFSET = 352  # 348 bytes of header, 4 that say that no extension follows


def write_nifti(path: Path, values: NDArray[Any], geometry: Geometry, slope: float = 1.0) -> None:
    """Write a volume, or an image, as .nii or .nii.gz.

    Header and voxels go one after the other: nibabel would choose a scaling of its own, and copy. On the grid of a
    NIfTI file the header places voxels as that file's does; otherwise in mm, by two equal transforms.

    Args:
        path: The file.
        values: (*geometry.shape), uint8, uint16 or float32.
        geometry: Where they lie.
        slope: What readers multiply the values by.

    Raises:
        OutputError: The file cannot be written.
    """
    from nibabel.nifti1 import Nifti1Header

    values = np.ascontiguousarray(values)
    header = Nifti1Header()
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape[::-1])  # NIfTI counts axes from the fastest
    header.set_zooms(geometry.spacing[::-1])
    header.set_xyzt_units("mm")
    header.set_data_offset(_OFFSET)
    header.set_slope_inter(slope, 0)
    if geometry.nifti is not None:
        for name, numbers in geometry.nifti.items():
            header[name] = np.reshape(numbers, header[name].shape)
    elif geometry.known:
        affine = _affine(geometry)
        header.set_qform(affine, code="scanner")
        header.set_sform(affine, code="scanner")
    head = header.binaryblock.ljust(_OFFSET, b"\0")
    with atomic(path) as temporary, temporary.open("wb") as raw:
        if has_suffix(path, (".gz",)):
            # Without a name and a time, so that equal masks are equal files.
            with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0) as stream:
                stream.write(head)
                stream.write(values.data)
        else:
            raw.write(head)
            raw.write(values.data)


def write_png(path: Path, values: NDArray[np.unsignedinteger[Any]]) -> None:
    """Write a grey image or mask, (H, W) uint8 or uint16.

    Raises:
        OutputError: The file cannot be written.
    """
    from PIL import Image

    with atomic(path) as temporary:
        Image.fromarray(values).save(temporary, format="PNG", compress_level=1)


def _affine(geometry: Geometry) -> NDArray[np.float64]:
    """From NIfTI's indices (the reverse of ours) to its coordinates, x to the right and y to the front."""
    dims = geometry.dims
    affine = np.eye(4)
    steps = np.array(geometry.directions) * np.array(geometry.spacing)[:, None]
    affine[:dims, :dims] = steps[::-1].T
    affine[:dims, 3] = geometry.origin
    flipped: NDArray[np.float64] = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return flipped
