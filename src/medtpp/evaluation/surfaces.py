"""Agreement of two masks: Dice, the 95th percentile Hausdorff distance, normalised surface Dice, volumes.

Every metric is the field's own definition, and agrees with MONAI's: HD95 is measured between boundary voxels, as
`monai.metrics.compute_hausdorff_distance` does; surface Dice weighs each piece of surface by its area (Nikolov et al.,
JMIR 2021), as `monai.metrics.compute_surface_dice(use_subvoxels=True)` does. Counting boundary voxels there would give
each voxel of a thick slice's face as much weight as one of its rim, whose share of the surface is many times larger.
Both are computed here on the joint bounding box: HD95 by a distance transform, whose time depends on the size of the
box alone, surface Dice by a nearest-neighbour search that ends at the tolerance. A search without such an end, as
MONAI's, takes many minutes where one of two large masks lies deep inside the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import ConfigError, DataError

TOLERANCE = 2.0
_PERCENTILE = 95
# 2 elements of 1.1 mm are 2.2 mm, whatever their product in floating point: a tolerance of 2.2 takes them in.
_ROUNDING = 1 + 1e-6
_PER_UNIT = {2: 100.0, 3: 1000.0}  # mm² in a cm², mm³ in a ml

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """How a predicted mask agrees with the true one.

    Attributes:
        dice: Dice coefficient, 0 to 1; None where both masks are empty.
        hd95: 95th percentile Hausdorff distance in millimetres, or in pixels where the spacing is unknown; None where
            both masks are empty, the diagonal of the image where one is.
        nsd: Normalised surface Dice, 0 to 1; None where both masks are empty.
        volume: Of the prediction: ml, cm² for images of two dimensions, or pixels where the spacing is unknown.
        volume_true: Of the true mask.
    """

    dice: float | None
    hd95: float | None
    nsd: float | None
    volume: float
    volume_true: float


def compare_masks(
    predicted: Mask, true: Mask, *, spacing: Sequence[float] | None = None, tolerance: float = TOLERANCE
) -> Agreement:
    """Compare the predicted and the true mask of one structure.

    Two empty masks agree, but say nothing of how well the structure is outlined: their metrics are None, to be left out
    of means (nnU-Net; Metrics Reloaded, Maier-Hein et al., Nature Methods 2024). Where just one mask is empty, every
    metric has its worst value: 0, 0 and for HD95 the diagonal of the image (as in BraTS), so that a structure which is
    missed makes the mean no better.

    Args:
        predicted: (D, H, W) or (H, W).
        true: Same shape.
        spacing: Millimetres between neighbours along each axis; None counts in pixels.
        tolerance: Distance up to which surfaces agree, in millimetres, or in pixels without a spacing.

    Raises:
        ConfigError: The tolerance is negative or not finite.
        DataError: The masks are not boolean or differ in shape, or the spacing does not fit.
    """
    steps = np.ones(true.ndim) if spacing is None else np.asarray(spacing, dtype=np.float64)
    _check(predicted, true, steps, tolerance)
    element = 1.0 if spacing is None else float(steps.prod()) / _PER_UNIT[true.ndim]
    count, count_true = int(np.count_nonzero(predicted)), int(np.count_nonzero(true))
    volume, volume_true = count * element, count_true * element
    if not count and not count_true:
        return Agreement(None, None, None, 0.0, 0.0)
    if not count or not count_true:
        return Agreement(0.0, float(np.linalg.norm(true.shape * steps)), 0.0, volume, volume_true)
    box = _joint_box(predicted, true)
    # A rim of background: what touches the edge of the image has a surface there.
    predicted, true = np.pad(predicted[box], 1), np.pad(true[box], 1)
    return Agreement(
        dice=2 * int(np.count_nonzero(predicted & true)) / (count + count_true),
        hd95=_hd95(predicted, true, steps),
        nsd=_surface_dice(predicted, true, steps, tolerance),
        volume=volume,
        volume_true=volume_true,
    )


def _check(predicted: Mask, true: Mask, steps: Floats, tolerance: float) -> None:
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"The tolerance of surface Dice is {tolerance}. It is a distance: 0 or more.")
    if predicted.dtype != np.bool_ or true.dtype != np.bool_:
        raise DataError(
            f"Masks to compare are boolean, one structure at a time, not {predicted.dtype} and {true.dtype}. "
            "Compare with a structure's number first."
        )
    if predicted.shape != true.shape or true.ndim not in _PER_UNIT:
        raise DataError(
            f"The predicted mask has the shape {predicted.shape} and the true one {true.shape}. Both need the same two "
            "or three dimensions."
        )
    if len(steps) != true.ndim or not (np.isfinite(steps) & (steps > 0)).all():
        raise DataError(f"The spacing {steps.tolist()} does not fit masks of {true.ndim} dimensions.")


def _joint_box(first: Mask, second: Mask) -> tuple[slice, ...]:
    """The smallest box around two masks, of which at least one is not empty."""
    box = []
    for axis in range(first.ndim):
        others = tuple(other for other in range(first.ndim) if other != axis)
        inside = np.flatnonzero(first.any(axis=others) | second.any(axis=others))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)


def _hd95(predicted: Mask, true: Mask, steps: Floats) -> float:
    """The larger of both directions' 95th percentile distance between boundary voxels."""
    edges, edges_true = _boundary(predicted), _boundary(true)
    there, back = _distances(edges, edges_true, steps), _distances(edges_true, edges, steps)
    return float(max(np.percentile(there, _PERCENTILE), np.percentile(back, _PERCENTILE)))


def _distances(edges: Mask, others: Mask, steps: Floats) -> NDArray[np.float32]:
    """(m,) the distance of each of the m elements of `edges` to the nearest of `others` (Maurer et al., PAMI 2003)."""
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(others.view(np.uint8))
    image.SetSpacing(steps[::-1].tolist())
    signed = sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    distances: NDArray[np.float32] = np.maximum(sitk.GetArrayViewFromImage(signed)[edges], 0)
    return distances


def _boundary(mask: Mask) -> Mask:
    """The voxels of a mask that have a neighbour outside it, across a face. The mask has a rim of background."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        source, target = np.moveaxis(mask, axis, 0), np.moveaxis(inside, axis, 0)
        target[1:] &= source[:-1]
        target[:-1] &= source[1:]
    return mask & ~inside


def _surface_dice(predicted: Mask, true: Mask, steps: Floats, tolerance: float) -> float:
    """The share of both surfaces, by area, that lies within the tolerance of the other one."""
    codes, codes_true = _neighbourhoods(predicted), _neighbourhoods(true)
    areas = _areas(steps)
    whole = len(areas) - 1  # the code of a neighbourhood that lies inside altogether
    edges, edges_true = (codes > 0) & (codes < whole), (codes_true > 0) & (codes_true < whole)
    area, area_true = areas[codes[edges]], areas[codes_true[edges_true]]
    near, near_true = _near(edges, edges_true, steps, tolerance), _near(edges_true, edges, steps, tolerance)
    return float((area[near].sum() + area_true[near_true].sum()) / (area.sum() + area_true.sum()))


def _near(edges: Mask, others: Mask, steps: Floats, tolerance: float) -> Mask:
    """(m,) which of the m elements of `edges` have one of `others` within the tolerance."""
    near = others[edges]  # good masks share most of their surface, where there is nothing to search for
    apart = np.argwhere(edges)[~near] * steps
    if len(apart):
        from scipy.spatial import KDTree  # not by everybody who evaluates

        found, _ = KDTree(np.argwhere(others) * steps).query(apart, distance_upper_bound=tolerance * _ROUNDING)
        near[~near] = np.isfinite(found)
    return near


def _neighbourhoods(mask: Mask) -> NDArray[np.uint8]:
    """Which of the 2 x 2 (x 2) voxels that meet at each inner corner of the grid are in the mask, as bits of a number.

    The first voxel is the highest bit, as in the tables of `_areas`. The result is one shorter along each axis.
    """
    bits = mask.view(np.uint8)
    codes = np.zeros(tuple(length - 1 for length in mask.shape), dtype=np.uint8)
    for voxel in itertools.product((0, 1), repeat=mask.ndim):
        codes <<= 1
        codes |= bits[tuple(slice(start, start + length) for start, length in zip(voxel, codes.shape, strict=True))]
    return codes


def _areas(steps: Floats) -> Floats:
    """(16,) or (256,) the length in mm or area in mm² of the surface through each kind of neighbourhood."""
    from monai.metrics.utils import get_code_to_measure_table  # takes seconds

    table, _ = get_code_to_measure_table(steps.tolist())
    areas: Floats = table.numpy().astype(np.float64)
    return areas
