"""From a scan's own grid to the network's and back: axes, crop, size and padding, all written down."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from medtpp.config import Options
from medtpp.data.geometry import Geometry

ANISOTROPY = 3.0  # ratio of spacings above which slices are not mixed with each other; nnU-Net's

Interpolation = Literal["nearest", "label", "linear", "bspline"]
_INTERPOLATORS = {"label": SimpleITK.sitkLabelLinear, "linear": SimpleITK.sitkLinear, "bspline": SimpleITK.sitkBSpline}


class Restore(Options):
    """Where the network's array of one scan came from; brings predictions back to the scan's own voxels.

    The steps forward are: reorder and flip axes, crop, resize, pad. Each keeps the outer faces of the box that it
    works on, so that a step back is the same step with the shapes exchanged. Steps that change nothing copy bits.
    """

    geometry: Geometry  # of the scan
    order: tuple[int, ...]  # for each axis of the network's array, the axis of the scan that it is
    flipped: tuple[bool, ...]  # which of the reordered axes run the other way
    start: tuple[int, ...]  # first voxel of the crop, after reordering
    cropped: tuple[int, ...]  # its shape
    resized: tuple[int, ...]  # its shape after resampling
    before: tuple[int, ...]  # voxels of padding before each axis
    shape: tuple[int, ...]  # of the network's array, padding included

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance of neighbours in the network's array, in mm (in steps of the file where it tells no spacing)."""
        return tuple(s * n / m for s, n, m in zip(self._scan_spacing, self.cropped, self.resized, strict=True))

    @property
    def coarsened(self) -> tuple[float, ...]:
        """For each axis of the network's array how many of the scan's voxels one of its voxels spans."""
        return tuple(n / m for n, m in zip(self.cropped, self.resized, strict=True))

    @property
    def slices(self) -> int | None:
        """The axis across thick slices, where the scan's or the network's spacings are that uneven, or None."""
        across = slice_axis(self._scan_spacing)
        return slice_axis(self.spacing) if across is None else across

    @property
    def _scan_spacing(self) -> tuple[float, ...]:
        return tuple(self.geometry.spacing[axis] for axis in self.order)

    def crop(self, array: NDArray[Any]) -> NDArray[Any]:
        """What the network sees of an array (*scan), in the network's order of axes; a view."""
        return reorder(array, self.order, self.flipped)[_box(self.start, self.cropped)]

    def resize(self, array: NDArray[Any], interpolation: Interpolation) -> NDArray[Any]:
        """Bring a cropped array to the network's spacing."""
        return resize(array, self.resized, interpolation, self.slices)

    def pad(self, array: NDArray[Any], border: Literal["zero", "edge"]) -> NDArray[Any]:
        """Pad a resized array to the network's shape."""
        widths = [(b, s - n - b) for b, n, s in zip(self.before, self.resized, self.shape, strict=True)]
        return np.pad(array, widths, mode="edge" if border == "edge" else "constant")

    def labels(self, array: NDArray[Any]) -> NDArray[Any]:
        """Labels on the scan's own grid: nearest neighbours, 0 outside the crop.

        A mask comes back voxel by voxel as it went, along axes that were not coarsened.

        Args:
            array: (*shape) of any number type.

        Returns:
            (*geometry.shape) of the same type.
        """
        return self._back(array, "nearest", 0)

    def probability(self, array: NDArray[Any], outside: float = 0.0) -> NDArray[np.float32]:
        """One map of probabilities on the scan's own grid, by linear interpolation.

        Restore map by map where memory counts; the largest of them names the label.

        Args:
            array: (*shape), floating point.
            outside: The value outside the crop: 1 for the background, else 0.

        Returns:
            (*geometry.shape) float32.
        """
        return self._back(array.astype(np.float32, copy=False), "linear", outside)

    def _back(self, array: NDArray[Any], interpolation: Interpolation, outside: float) -> NDArray[Any]:
        if array.shape != self.shape:
            raise ValueError(f"an array of shape {array.shape} is not in the network's space of shape {self.shape}")
        inner = resize(array[_box(self.before, self.resized)], self.cropped, interpolation, self.slices)
        oriented = np.full([self.geometry.shape[axis] for axis in self.order], outside, dtype=inner.dtype)
        oriented[_box(self.start, self.cropped)] = inner
        # The flips are in the network's order of axes, so they are undone before the axes return.
        unflipped = reorder(oriented, tuple(range(oriented.ndim)), self.flipped)
        return np.ascontiguousarray(unflipped.transpose(np.argsort(self.order)))


def reorder(array: NDArray[Any], order: tuple[int, ...], flipped: tuple[bool, ...]) -> NDArray[Any]:
    """An array with its axes in another order, some of them reversed; a view."""
    return array.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]


def axes_to_ras(geometry: Geometry) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Order and flips that bring a volume closest to RAS: its axes (D, H, W) then run to the head, front and right.

    Images of two dimensions, and volumes whose files tell no position, stay as they are.
    """
    axes = tuple(range(geometry.dims))
    if geometry.dims == 2 or not geometry.known:
        return axes, (False,) * geometry.dims
    # [a, c]: how far array axis a runs along the coordinate that network axis c should run along (z, -y, -x in LPS).
    along = np.array(geometry.directions)[:, ::-1] * (1, -1, -1)
    order = max(itertools.permutations(axes), key=lambda order: sum(abs(along[a, c]) for c, a in enumerate(order)))
    return order, tuple(bool(along[a, c] < 0) for c, a in enumerate(order))


def slice_axis(spacing: tuple[float, ...]) -> int | None:
    """The axis of the largest spacing, if that is more than three times the smallest (nnU-Net's rule, 3D alone)."""
    if len(spacing) == 3 and max(spacing) > ANISOTROPY * min(spacing):
        return int(np.argmax(spacing))
    return None


def resize(
    array: NDArray[Any], shape: tuple[int, ...], interpolation: Interpolation, slices: int | None = None
) -> NDArray[Any]:
    """Resample to another number of voxels between the same outer faces.

    Args:
        array: (*spatial).
        shape: Of the result.
        interpolation: "nearest"; "label" (the label with the largest linear weight, for masks that are coarsened);
            "linear" or "bspline" (cubic) for intensities. B-splines need four voxels along each axis; thinner arrays
            are interpolated linearly.
        slices: The axis across thick slices, which are repeated or dropped, never mixed, as in nnU-Net.

    Returns:
        (*shape) of the same type; `array` itself where the shape stays.
    """
    if array.shape == shape:
        return array
    if interpolation == "nearest":
        return _nearest(array, shape)
    if slices is not None:
        plane = tuple(array.shape[axis] if axis == slices else size for axis, size in enumerate(shape))
        return _nearest(resize(array, plane, interpolation), shape)
    if interpolation == "bspline" and min(array.shape) < 4:  # ITK returns numbers from nowhere
        interpolation = "linear"
    image = SimpleITK.GetImageFromArray(array)
    # SimpleITK counts axes from the last one. Voxels have size 1, and the corner of the first one stays in place.
    steps = [n / m for n, m in zip(reversed(array.shape), reversed(shape), strict=True)]
    resampled = SimpleITK.Resample(
        image,
        list(reversed(shape)),
        interpolator=_INTERPOLATORS[interpolation],
        outputOrigin=[(step - 1) / 2 for step in steps],
        outputSpacing=steps,
    )
    values: NDArray[Any] = SimpleITK.GetArrayFromImage(resampled)
    return values


def _nearest(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    # In whole numbers: the voxel that holds the centre of each new one. Refined and brought back, every voxel meets
    # itself again, without a rounding error to fear.
    for axis, (n, m) in enumerate(zip(array.shape, shape, strict=True)):
        if n != m:
            array = array.take((2 * np.arange(m) + 1) * n // (2 * m), axis=axis)
    return array


def _box(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
