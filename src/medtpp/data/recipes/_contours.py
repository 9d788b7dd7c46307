"""Closed contours in millimetres to a mask on the grid of a scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray

from medtpp.data.geometry import Geometry
from medtpp.errors import DataError

OFF_PLANE = 0.5  # slices by which a contour may be off a slice; it counts for the nearest


def fill_contours(contours: Sequence[NDArray[np.float64]], geometry: Geometry) -> NDArray[np.uint8]:
    """Fill planar contours; a voxel belongs to them where its centre is inside of one.

    Args:
        contours: Each (N, 3), coordinates (x, y, z) in mm as DICOM has them, in a plane of the scan's slices.
        geometry: Of the scan, three axes, slices along the first.

    Returns:
        (D, H, W) of 0 and 1.

    Raises:
        DataError: A contour is not in the plane of a slice, or outside the scan. The reason without a file.
    """
    mask = np.zeros(geometry.shape, np.uint8)
    for points in contours:
        if len(points) < 3:
            continue  # a point or a line has no inside
        steps = np.array(geometry.directions) / np.array(geometry.spacing)[:, None]
        indices = (points - geometry.origin) @ steps.T  # (N, 3): slice, row, column
        level = round(float(np.median(indices[:, 0])))
        if np.abs(indices[:, 0] - level).max() > OFF_PLANE:
            raise DataError("a contour lies across slices of the scan. Are contours and scan of one series?")
        low = np.maximum(np.floor(indices[:, 1:].min(axis=0)).astype(int), 0)
        high = np.minimum(np.ceil(indices[:, 1:].max(axis=0)).astype(int) + 1, geometry.shape[1:])
        if not 0 <= level < geometry.shape[0] or (low >= high).any():
            raise DataError("a contour lies outside the scan. Are contours and scan of one series?")
        rows, columns = np.mgrid[low[0] : high[0], low[1] : high[1]]
        centres = np.stack([rows.ravel(), columns.ravel()], axis=1)
        inside = Polygon(indices[:, 1:]).contains_points(centres).reshape(rows.shape)
        mask[level, low[0] : high[0], low[1] : high[1]] |= inside.astype(np.uint8)
    return mask
