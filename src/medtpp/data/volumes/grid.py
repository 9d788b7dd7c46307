"""Geometries of files: made from what headers tell, checked before anything is placed by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medtpp.data.geometry import Geometry
from medtpp.errors import DataError

# How far axes may be from right angles and unit length: headers round direction cosines to a few decimals.
ORTHONORMAL = 1e-3


def make_geometry(
    shape: Sequence[int],
    spacing: Sequence[float],
    origin: Sequence[float],
    directions: ArrayLike,
    *,
    known: bool = True,
) -> Geometry:
    """A geometry of plain numbers.

    Args:
        shape: Of the array, (D, H, W) or (H, W).
        spacing: In mm, in the order of the array's axes.
        origin: Coordinates (x, y, z) of the first element in mm.
        directions: One unit vector of coordinates per axis of the array.
        known: Whether the file told position and orientation.

    Raises:
        DataError: Something is not finite, a spacing is not above zero, or the axes are not at right angles.
    """
    axes = np.asarray(directions, dtype=np.float64)
    steps = [float(step) for step in spacing]
    if not (np.isfinite(axes).all() and np.isfinite(steps).all() and np.isfinite(origin).all()):
        raise DataError("its header places the voxels at coordinates that are not finite. Write the header again.")
    if min(steps) <= 0:
        raise DataError(f"its header gives a spacing of {' x '.join(f'{step:g}' for step in steps)} mm, not above 0.")
    if np.abs(axes @ axes.T - np.eye(len(axes))).max() > ORTHONORMAL:
        raise DataError(
            "its axes are not at right angles to each other (sheared or degenerate directions). Resample it to a "
            "regular grid."
        )
    return Geometry(
        tuple(int(size) for size in shape),
        tuple(steps),
        tuple(float(value) for value in origin),
        tuple(tuple(float(value) for value in axis) for axis in axes),
        known,
    )


def describe(geometry: Geometry) -> str:
    """A geometry in one line, for messages."""

    def numbers(values: Sequence[float], digits: int) -> str:
        return ", ".join(f"{round(value, digits) + 0.0:g}" for value in values)

    size = " x ".join(map(str, geometry.shape))
    if not geometry.known:
        return f"{size} without a known position"
    axes = "; ".join(numbers(axis, 4) for axis in geometry.directions)
    return (
        f"{size}, spacing ({numbers(geometry.spacing, 4)}) mm, origin ({numbers(geometry.origin, 3)}) mm, axes ({axes})"
    )


def aligned(values: NDArray[Any], own: Geometry, target: Geometry) -> tuple[NDArray[Any], Geometry]:
    """Turn an array so that its axes run as the target's, by swapping and flipping alone.

    Converters from DICOM to NIfTI flip axes: the same voxels lie in another order. Where the axes of the two geometries
    are not the same up to order and sign, or one is unknown, nothing changes.

    Args:
        values: (..., *spatial).
        own: Where they lie.
        target: The grid of the image that they belong to.

    Returns:
        The values and their geometry.
    """
    if own == target or not (own.known and target.known) or own.dims != target.dims:
        return values, own
    axes = np.array(own.directions)
    cosines = np.array(target.directions) @ axes.T  # (axis of the target, own axis)
    order = np.abs(cosines).argmax(axis=1).tolist()
    signs = np.sign([cosines[axis, source] for axis, source in enumerate(order)])
    if sorted(order) != list(range(own.dims)) or np.abs(cosines[range(own.dims), order]).min() < 1 - ORTHONORMAL:
        return values, own
    origin = np.array(own.origin)
    for source, sign in zip(order, signs, strict=True):
        if sign < 0:  # the last element becomes the first
            origin = origin + (own.shape[source] - 1) * own.spacing[source] * axes[source]
    lead = values.ndim - own.dims
    turned = values.transpose([*range(lead), *(lead + source for source in order)])
    turned = np.flip(turned, tuple(lead + axis for axis, sign in enumerate(signs) if sign < 0))
    geometry = make_geometry(
        [own.shape[source] for source in order],
        [own.spacing[source] for source in order],
        origin.tolist(),
        signs[:, None] * axes[order],
    )
    return np.ascontiguousarray(turned), geometry


def compact(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in a type that costs no more than float32: wide integers in 16 bits where they fit.

    Float64 loses digits that no scanner measured; integers of any size below 2**24 stay exact.
    """
    if values.dtype.kind == "b":
        return values.view(np.uint8)
    if values.dtype.kind in "iu" and values.dtype.itemsize > 2:
        low, high = int(values.min()), int(values.max())
        for small in (np.int16, np.uint16):
            if np.iinfo(small).min <= low and high <= np.iinfo(small).max:
                return values.astype(small)
    wanted = values.dtype if values.dtype.kind in "iu" and values.dtype.itemsize <= 2 else np.dtype(np.float32)
    return values.astype(wanted.newbyteorder("="), copy=False)


def check_finite(values: NDArray[Any]) -> None:
    """Refuse NaN and infinite values, wherever they are.

    No value could be put in their place that is right for all scans: outside the body it would be air or zero, inside
    it hides a broken reconstruction. Whoever knows the scan replaces them.

    Args:
        values: (C, *spatial).

    Raises:
        DataError: There are such values; the message counts them and names the first.
    """
    if values.dtype.kind != "f":
        return
    finite = np.isfinite(values)
    if finite.all():
        return
    nans = int(np.isnan(values).sum())
    infinite = int(finite.size - finite.sum()) - nans
    first = tuple(int(index) for index in np.unravel_index(int(np.argmin(finite)), values.shape)[1:])
    kinds = " and ".join(f"{count:,} {kind}" for count, kind in ((nans, "NaN"), (infinite, "infinite")) if count)
    raise DataError(
        f"holds {kinds} of {values.size:,} values, the first at index {first} (in the order {'zyx'[-len(first) :]}). "
        "Replace them, such as by the value of the background."
    )
