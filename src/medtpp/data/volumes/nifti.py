"""NIfTI files (.nii, .nii.gz).

Read by nibabel, since ITK's reader hands out a truncated file with zeros in place of the rest.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medtpp.data.decode import read_bytes
from medtpp.data.geometry import Geometry, Volume, plain_geometry
from medtpp.data.volumes.grid import ORTHONORMAL, check_finite, compact, make_geometry
from medtpp.errors import DataError

MAX_CHANNELS = 16  # on the fourth axis; more is a series over time

# The fields of a header that say where voxels lie.
_PLACE = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units"),
)

_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # by the header's code; no other is one, and ITK takes those for mm, too


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file.

    The scaling in the header is applied. Of the two transforms a header may hold, sform counts, unless its axes are not
    at right angles (a registration to an atlas) and qform's are. A fourth axis of at most 16 are channels, a fifth
    (vectors) and RGB voxels as well. The geometry keeps both transforms for what is written on it.

    Returns:
        (C, D, H, W), or (C, H, W) where the header says that there are two axes.

    Raises:
        DataError: The file is empty, truncated or broken, has more channels or axes, voxels that are no real numbers,
            NaN or infinite values, contradicting transforms or degenerate directions. The reason without the path.
    """
    data = _uncompressed(read_bytes(path))
    image = _parse(data)
    _check_length(image.dataobj, len(data))
    values = _channels(_values(image))
    check_finite(values)
    geometry = _geometry(image.header, values.shape[1:])
    return Volume(values, replace(geometry, nifti=_place(image.header)))


def _uncompressed(data: bytes) -> bytes:
    if not data:
        raise DataError("the file is empty (0 bytes).")
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError("is truncated or broken (its compressed data does not add up). Copy it again.") from error


def _parse(data: bytes) -> Any:
    kinds = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
    kind = kinds.get(int.from_bytes(data[:4], "little")) or kinds.get(int.from_bytes(data[:4], "big"))
    if kind is None:
        raise DataError("is not a NIfTI file, or its header is broken.")
    try:
        return kind.from_bytes(data)
    except Exception as error:  # nibabel raises many types on a broken header
        raise DataError(f"has a broken NIfTI header ({type(error).__name__}). Export it again.") from error


def _check_length(stored: Any, length: int) -> None:
    """Before the voxels are read, so that a broken header cannot ask for more memory than the file has bytes."""
    announced = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
    if announced > length:
        raise DataError(
            f"is truncated: its header announces {announced:,} bytes, {length:,} are there. Copy or export it again."
        )


def _values(image: Any) -> NDArray[Any]:
    """The voxels with the header's scaling, in the file's axes (x, y, z, ...); RGB as a last axis."""
    stored = image.dataobj
    colours = stored.dtype.names
    if 0 in stored.shape or len(stored.shape) < (3 if colours else 2):
        raise DataError(f"has the shape {stored.shape}, which is no image.")
    if stored.dtype.kind not in "iuf" and colours != ("R", "G", "B"):
        kind = "RGBA" if colours else str(stored.dtype)
        raise DataError(f"holds voxels of type {kind}. Only real numbers and RGB are read.")
    raw = stored.get_unscaled()
    if colours:
        return np.stack([raw[name] for name in colours], axis=-1)
    if (stored.slope, stored.inter) == (1, 0):
        return compact(raw)
    return compact(raw * np.float32(stored.slope) + np.float32(stored.inter))


def _channels(values: NDArray[Any]) -> NDArray[Any]:
    """From the file's axes (x, y[, z[, t[, vector]]]) to (C, D, H, W) or (C, H, W)."""
    if values.ndim <= 3:
        return np.ascontiguousarray(values.T[None])
    axes = values.shape[:3], values.shape[3:]
    further = [size for size in axes[1] if size > 1] or [1]
    if len(further) > 1:
        raise DataError(f"has {values.ndim} axes ({' x '.join(map(str, values.shape))}). Save one volume per file.")
    if further[0] > MAX_CHANNELS:
        raise DataError(
            f"has {further[0]} volumes on its fourth axis; up to {MAX_CHANNELS} are read as channels. Save the volumes "
            "to use in files of their own."
        )
    return np.ascontiguousarray(values.reshape(*axes[0], further[0]).T)


def _geometry(header: Any, shape: tuple[int, ...]) -> Geometry:
    unit = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    spacing = [float(step) * unit for step in header.get_zooms()[: len(shape)][::-1]]
    affine = _affine(header)
    if affine is None or len(shape) < 3:
        plain = plain_geometry(shape)
        return make_geometry(shape, spacing, plain.origin, plain.directions, known=affine is not None)
    # NIfTI's x runs to the right and y to the front; ours, as DICOM's, to the left and the back.
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    steps = affine[:3, :3].T[::-1]  # one row per axis of the array
    lengths = np.linalg.norm(steps, axis=1)
    if not (lengths > 0).all():
        raise DataError("its header has degenerate directions (an axis of length 0). Write the header again.")
    spacing, origin = (lengths * unit).tolist(), (affine[:3, 3] * unit).tolist()
    return make_geometry(shape, spacing, origin, steps / lengths[:, None])


def _place(header: Any) -> dict[str, tuple[float, ...]]:
    """See `Geometry.nifti`. What is not finite, as in a transform that the header says is not there, becomes 0."""
    return {name: tuple(np.nan_to_num(np.atleast_1d(header[name]), posinf=0, neginf=0).tolist()) for name in _PLACE}


def _affine(header: Any) -> NDArray[np.float64] | None:
    """The transform to use from indices to RAS coordinates, or None where the file has none."""
    sform: NDArray[np.float64] | None
    qform: NDArray[np.float64] | None
    try:
        (sform, sform_code), (qform, qform_code) = header.get_sform(coded=True), header.get_qform(coded=True)
    except Exception as error:  # an impossible quaternion, in several types
        raise DataError("its header has an orientation (qform) that is no rotation. Write the header again.") from error
    if sform is None or qform is None:
        return qform if sform is None else sform
    if sform_code == qform_code:
        _check_agreement(header, sform, qform)
    return sform if _regular(sform) or not _regular(qform) else qform


def _check_agreement(header: Any, sform: NDArray[np.float64], qform: NDArray[np.float64]) -> None:
    size = [*header.get_data_shape(), 1, 1][:3]
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(np.array(size) - 1), 1]
    apart = float(np.linalg.norm(corners @ (sform - qform).T, axis=1).max())
    if not apart <= 0.5 * min(header.get_zooms()[:3]):
        raise DataError(
            f"its header holds two transforms for the same space (qform and sform) that lie {apart:.3g} mm apart. "
            "Find out which is right and write it to both."
        )


def _regular(affine: NDArray[np.float64]) -> bool:
    steps = affine[:3, :3].T
    lengths = np.linalg.norm(steps, axis=1)
    if not (lengths > 0).all():
        return False
    axes = steps / lengths[:, None]
    return bool(np.abs(axes @ axes.T - np.eye(3)).max() <= ORTHONORMAL)
