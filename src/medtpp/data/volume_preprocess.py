"""From a scan to what the network sees: axes to RAS, content cropped, intensities in [0, 1], one spacing, padded.

Intensities are cut off and spread over [0, 1] rather than brought to mean 0 and deviation 1, as nnU-Net does, because
backbones expect [0, 1] and normalise by themselves. The two differ by a linear map, and by what is cut off: of MRI
nnU-Net cuts off nothing, so that a few bright vessels or artefacts may lie ten deviations away, where no network that
was pre-trained on images has seen a value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from pydantic import Field, model_validator

from medtpp.config import Options, Window
from medtpp.data.case import MASK_VALUES, Structure
from medtpp.data.decode import luma
from medtpp.data.geometry import Geometry, Volume
from medtpp.data.problems import count
from medtpp.data.restore import Restore, axes_to_ras
from medtpp.errors import DataError

LEVELS = Window(kind="fixed", low=0, high=255)  # of photographs


class VolumePreprocessing(Options):
    """How scans, or images with masks, become arrays. It is saved with an adapter and applied again to new scans.

    All values are resolved. Axes are in the order of arrays, (D, H, W) or (H, W); volumes whose files tell a position
    are turned to RAS first, so that D, H, W run to the head, front and right.
    """

    patch: tuple[int, ...] = Field(description="shape of what the network sees at once, in voxels; every array has it")
    spacing: tuple[float, ...] | None = Field(
        None, description="in mm (in pixels of the file where it tells no spacing: 2 halves an image); none: as it is"
    )
    size: tuple[int, ...] | None = Field(
        None, description="voxels of every scan, whatever its spacing; in place of spacing, for what is seen whole"
    )
    windows: tuple[Window, ...] = Field(min_length=1, description="intensities that become 0 and 1, for each channel")
    air: float | None = Field(
        None, description="content is brighter than this, in the file's values; none: than the scan's darkest voxel"
    )
    crop: bool = Field(False, description="keep the box of the content alone")
    center_crop: tuple[float, ...] | None = Field(
        None, description="keep the middle of it alone, so many mm along each axis (units as of spacing); none: all"
    )
    margin: float = Field(10.0, ge=0, description="mm kept around the content")
    interpolation: Literal["linear", "bspline"] = Field("linear", description="of intensities")
    border: Literal["zero", "edge"] = Field(
        "zero", description="what pads images and masks smaller than a patch, evenly on both sides"
    )
    dtype: Literal["float16", "uint8"] = Field("float16", description="how the store keeps intensities")
    version: Literal[1] = Field(1, description="changes with the arithmetic, so that old stores are not taken for new")

    @model_validator(mode="after")
    def _consistent(self) -> VolumePreprocessing:
        if len(self.patch) not in (2, 3) or min(self.patch) < 1:
            raise ValueError("a patch has two or three sides of at least one voxel")
        if self.spacing is not None and (len(self.spacing) != len(self.patch) or not min(self.spacing) > 0):
            raise ValueError(f"spacing needs {len(self.patch)} positive numbers, as many as the patch has sides")
        if self.size is not None and (len(self.size) != len(self.patch) or min(self.size) < 1):
            raise ValueError(f"size needs {len(self.patch)} positive numbers, as many as the patch has sides")
        if self.size is not None and self.spacing is not None:
            raise ValueError("spacing and size exclude each other")
        if self.center_crop is not None and (len(self.center_crop) != len(self.patch) or not min(self.center_crop) > 0):
            raise ValueError(f"center_crop needs {len(self.patch)} positive numbers, as many as the patch has sides")
        return self

    @property
    def dims(self) -> int:
        """2 or 3."""
        return len(self.patch)

    def apply(self, volume: Volume) -> tuple[NDArray[np.float16], Restore]:
        """Prepare one scan; the same scan always gives the same bits.

        Axes that become coarser are smoothed before by the Gaussian that makes up for the difference of the voxels'
        point spread functions (Cardoso et al., MICCAI 2015).

        Returns:
            (C, *spatial) in [0, 1], each side at least the patch's, and the way back.

        Raises:
            DataError: Another number of dimensions or channels than the training cases had.
        """
        if volume.geometry.dims != self.dims:
            advice = "Give the whole volume" if self.dims == 3 else "Cut it into images"
            raise DataError(
                f"has {volume.geometry.dims} dimensions, but the training images have {self.dims}. "
                f"{advice}, or leave it out."
            )
        channels = self._channels(volume)
        restore = self._plan(channels, volume.geometry)
        result = np.empty((len(channels), *restore.shape), np.float16)
        for index, (window, channel) in enumerate(zip(self.windows, channels, strict=True)):
            values = scale(restore.crop(channel).astype(np.float32), window, self.air)
            resized = restore.resize(_smooth(values, restore), self.interpolation)
            result[index] = restore.pad(resized.clip(0, 1), self.border)  # B-splines overshoot
        return result, restore

    def apply_mask(self, values: NDArray[Any], structures: Sequence[Structure], restore: Restore) -> NDArray[np.uint8]:
        """Prepare the mask of a scan.

        Nearest neighbours, so that nothing is lost where the grid is refined; the label with the largest linear weight
        where it is coarsened.

        Args:
            values: (*scan), whole numbers as they are in the file.
            structures: What they mean.
            restore: What `apply` returned for the scan.

        Returns:
            (*spatial), as `label_mask` numbers it.

        Raises:
            DataError: See `label_mask`.
        """
        labels = np.ascontiguousarray(restore.crop(label_mask(values, structures)))
        resized = restore.resize(labels, "label" if max(restore.coarsened) > 1 else "nearest")
        return restore.pad(resized, self.border)

    def _channels(self, volume: Volume) -> NDArray[Any]:
        """The channels as the windows want them; a grey image in a set of colour images, and the reverse, will do."""
        array, wanted = volume.array, len(self.windows)
        if volume.units == "levels" and (len(array), wanted) == (1, 3):
            return np.repeat(array, 3, axis=0)
        if volume.units == "levels" and (len(array), wanted) == (3, 1):
            return luma(np.moveaxis(array, 0, -1))[None]
        if len(array) != wanted:
            raise DataError(
                f"has {count(array, 'channel')}, but the training images have {wanted}. Give the channels of the "
                "training, in their order, or leave it out."
            )
        return array

    def _plan(self, channels: NDArray[Any], geometry: Geometry) -> Restore:
        order, flipped = axes_to_ras(geometry)
        spacing = tuple(geometry.spacing[axis] for axis in order)
        start, cropped = (0,) * self.dims, tuple(geometry.shape[axis] for axis in order)
        if self.crop:
            box = content_box(channels, self.air, tuple(self.margin / step for step in geometry.spacing))
            chosen = [box[axis] for axis in order]
            start = tuple(
                geometry.shape[axis] - last if flip else first
                for axis, flip, (first, last) in zip(order, flipped, chosen, strict=True)
            )
            cropped = tuple(last - first for first, last in chosen)
        if self.center_crop is not None:
            kept = tuple(map(middle, cropped, self.center_crop, spacing))
            start = tuple(first + (n - inner) // 2 for first, n, inner in zip(start, cropped, kept, strict=True))
            cropped = kept
        resized = self.size or cropped
        if self.spacing is not None:
            resized = tuple(
                max(1, round(n * old / new)) for n, old, new in zip(cropped, spacing, self.spacing, strict=True)
            )
        shape = tuple(max(pair) for pair in zip(resized, self.patch, strict=True))
        return Restore(
            geometry=geometry,
            order=order,
            flipped=flipped,
            start=start,
            cropped=cropped,
            resized=resized,
            before=tuple((s - n) // 2 for s, n in zip(shape, resized, strict=True)),
            shape=shape,
        )


def scale(values: NDArray[np.float32], window: Window, air: float | None) -> NDArray[np.float32]:
    """Intensities in [0, 1], computed in place. A channel of one value becomes 0.

    Args:
        values: Of any shape.
        window: What becomes 0 and 1.
        air: What counts as content, for percentiles and zscore; see `VolumePreprocessing.air`.
    """
    low, high = (window.low, window.high) if window.kind == "fixed" else _content_range(values, window, air)
    values -= np.float32(low)
    values /= np.float32(high - low) if low < high else np.float32(1)
    return values.clip(0, 1, out=values)


def _content_range(values: NDArray[np.float32], window: Window, air: float | None) -> tuple[float, float]:
    """What becomes 0 and 1 in this scan: the whole range where (nearly) all of its content has one value."""
    content = values[values > (values.min() if air is None else air)]
    content = content if content.size else values
    if window.kind == "percentiles":
        low, high = np.percentile(content, (window.low, window.high)).tolist()
    else:
        # In float64: a sum of ten million voxels in float32 loses digits.
        mean, deviation = float(content.mean(dtype=np.float64)), float(content.std(dtype=np.float64))
        low, high = mean + window.low * deviation, mean + window.high * deviation
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def quantise(array: NDArray[np.float16]) -> NDArray[np.uint8]:
    """(C, *spatial) in [0, 1] as 8-bit levels, channel by channel to save memory."""
    levels = np.empty(array.shape, np.uint8)
    for source, target in zip(array, levels, strict=True):
        np.rint(source.astype(np.float32) * 255, out=target, casting="unsafe")
    return levels


def overlapping(structures: Sequence[Structure]) -> bool:
    """Whether a voxel may belong to several of the structures."""
    values = [value for structure in structures for value in structure.values]
    return len(set(values)) < len(values)


def label_mask(values: NDArray[Any], structures: Sequence[Structure]) -> NDArray[np.uint8]:
    """Values of a mask file as numbers of structures; values of no structure are background.

    Args:
        values: (*spatial) whole numbers.
        structures: At most 255, or 8 that overlap.

    Returns:
        (*spatial) uint8: i for the i-th structure, counted from 1. Where structures overlap, bit i - 1 is set for each
        structure i that a voxel belongs to.

    Raises:
        DataError: Too many structures, or values that lie too far apart for labels.
    """
    overlap = overlapping(structures)
    if len(structures) > (8 if overlap else 255):
        limit = "8 structures that overlap" if overlap else "255 structures"
        raise DataError(f"The data set has {len(structures)} structures; at most {limit} are possible. Leave some out.")
    low, high = min(0, int(values.min())), max(0, int(values.max()))
    if high - low >= MASK_VALUES:
        raise DataError(f"the mask has values from {low} to {high}, which are no labels.")
    table = np.zeros(high - low + 1, np.uint8)  # negative values count from its end
    for number, structure in enumerate(structures, start=1):
        for value in structure.values:
            if low <= value <= high:
                table[value] |= np.uint8(1 << (number - 1) if overlap else number)
    labels = np.empty(values.shape, np.uint8)
    for source, target in zip(values, labels, strict=True):  # slice by slice: an index takes eight bytes per voxel
        target[...] = table[source]
    return labels


def content_box(array: NDArray[Any], air: float | None, margin: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    """First and one-past-last voxel, along each axis, of what is brighter than air in any channel.

    Args:
        array: (C, *spatial).
        air: None for the darkest value of each channel.
        margin: Voxels added on every side, for each axis.

    Returns:
        For each axis of space; the whole axis where there is no content.
    """
    content = np.zeros(array.shape[1:], bool)
    for channel in array:
        content |= channel > (channel.min() if air is None else air)
    box: list[tuple[int, int]] = []
    for axis, extra in enumerate(margin):
        size = int(content.shape[axis])
        filled = np.flatnonzero(content.any(axis=tuple(other for other in range(content.ndim) if other != axis)))
        first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, size)
        box.append((max(0, first - math.ceil(extra)), min(size, last + math.ceil(extra))))
    return tuple(box)


def middle(size: int, extent: float, spacing: float) -> int:
    """How many of an axis's voxels are kept of an extent in mm around its middle: those that lie in it whole.

    As many are left out on one side as on the other, so that it does not matter which way the axis runs. At least one
    is kept, or the two in the middle.
    """
    most = min(size, int(extent / spacing + 1e-6))
    return max(most - (size - most) % 2, 2 - size % 2)


def _smooth(values: NDArray[np.float32], restore: Restore) -> NDArray[np.float32]:
    """Take out what the coarser grid cannot show; slices that are not mixed are left alone."""
    # A Gaussian voxel of full width n at half maximum has the variance n**2 / (8 ln 2).
    variances = [
        0.0 if axis == restore.slices else max(0.0, factor**2 - 1) / (8 * np.log(2))
        for axis, factor in enumerate(restore.coarsened)
    ]
    if not any(variances):
        return values
    image = SimpleITK.GetImageFromArray(values)
    smoothed = SimpleITK.DiscreteGaussian(
        image, variances[::-1], maximumKernelWidth=64, maximumError=0.01, useImageSpacing=False
    )
    result: NDArray[np.float32] = SimpleITK.GetArrayFromImage(smoothed)
    return result
