"""Where voxels lie in the patient, and volumes in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometry:
    """Where the elements of an array lie, in millimetres. All axes are in the order of the array.

    Element (i, j, k) of a volume lies at origin + i * spacing[0] * directions[0] + j * ... in DICOM's and ITK's
    coordinates (LPS: x to the patient's left, y to the back, z to the head). Images of two dimensions have two axes and
    two coordinates.

    Attributes:
        shape: (D, H, W) or (H, W).
        spacing: Distance of neighbours along each axis; 1.0 where the file does not say.
        origin: Coordinates of the first element.
        directions: For each axis of the array a unit vector of coordinates.
        known: Whether the file told spacing and position. PNG and JPEG do not.
        nifti: Of a NIfTI file, the fields of its header that place its voxels, by name: two transforms that may differ,
            whose choice is each reader's own, and the unit. What is written on this grid as NIfTI gets them as they
            are, so that every reader sees it where it sees the scan. They do not count when geometries are compared.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    directions: tuple[tuple[float, ...], ...]
    known: bool = True
    nifti: Mapping[str, tuple[float, ...]] | None = field(default=None, compare=False)

    @property
    def dims(self) -> int:
        """2 or 3."""
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class Volume:
    """An image in memory.

    Attributes:
        array: (C, D, H, W) or (C, H, W), any number type.
        geometry: Where its elements lie.
        units: "HU" for computed tomography, "levels" for 8-bit images, else "none".
    """

    array: NDArray[Any]
    geometry: Geometry
    units: Literal["HU", "levels", "none"] = "none"


def plain_geometry(shape: tuple[int, ...]) -> Geometry:
    """The geometry of an image whose file tells none: steps of one, axes along the coordinates."""
    dims = len(shape)
    # Array axes are in the reverse order of coordinates: the last axis runs along x.
    directions = tuple(tuple(float(dims - 1 - axis == other) for other in range(dims)) for axis in range(dims))
    return Geometry(shape, (1.0,) * dims, (0.0,) * dims, directions, known=False)


def same_grid(first: Geometry, second: Geometry, tolerance: float = 1e-3) -> bool:
    """Whether two arrays lie on the same voxels, within a share of the spacing. Unknown geometries: the same shape."""
    if first.shape != second.shape:
        return False
    if not (first.known and second.known):
        return True
    scale = min(first.spacing)
    return (
        np.allclose(first.spacing, second.spacing, atol=tolerance * scale)
        and np.allclose(first.origin, second.origin, atol=10 * tolerance * scale)
        and np.allclose(first.directions, second.directions, atol=tolerance)
    )
