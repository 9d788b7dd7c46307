"""How volumes are prepared, chosen from a fingerprint of the training cases alone.

A small version of nnU-Net's planning (Isensee et al., Nature Methods 2021, arXiv 1904.08128): the spacing is the
median, the patch covers as much of the median scan as a budget of voxels allows, the window of CT holds the labelled
structures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medtpp.config import Options, VolumeOptions, Window
from medtpp.data.restore import ANISOTROPY
from medtpp.data.volume_preprocess import LEVELS, VolumePreprocessing, middle
from medtpp.data.volume_scan import AIR, Units, VolumeScan
from medtpp.errors import ConfigError, DataError

VOXELS = 1 << 18  # of a patch: 64 x 64 x 64 or 512 x 512, which are 1,024 tokens of 4 x 8 x 8 or 16 x 16
PERCENTILES = (0.5, 99.5)  # between which intensities are kept; nnU-Net's
WHOLE = 95  # percentile of the scans' sizes, along each axis, that a patch for classification holds
CROP_BELOW = 0.8  # crop where the content's box takes less than this share of the median scan
DIGITS = 6  # significant ones of what is planned: headers in float32 have no more, and people read them


class DatasetFingerprint(Options):
    """What a plan needs to know of the training cases; axes are in RAS order, as preprocessing turns them."""

    shapes: tuple[tuple[int, ...], ...]  # of each case
    spacings: tuple[tuple[float, ...], ...]  # of each case, in mm
    known: bool  # whether all files tell their spacing
    units: Units
    channels: int  # the largest number that a case has
    lows: tuple[float, ...]  # of each channel: the 0.5 percentile over the structures of all cases, or all voxels
    highs: tuple[float, ...]  # the 99.5 percentile
    contents: tuple[tuple[int, ...], ...]  # of each case, the shape of the box of its content
    outside: int  # cases with structures outside that box


def fingerprint_of(scans: Sequence[VolumeScan]) -> DatasetFingerprint:
    """Sum up what reading the training cases told.

    Raises:
        DataError: No cases, unreadable ones (all are listed), or images and volumes together.
    """
    if not scans:
        raise DataError("There are no training cases to plan the preprocessing from.")
    problems = [f"{scan.case}: {scan.error}" for scan in scans if scan.error]
    if problems:
        raise DataError("Some training cases cannot be used. Mend them, or leave them out by data.exclude.", problems)
    if len({len(scan.shape) for scan in scans}) > 1:
        raise DataError("The training cases are images and volumes together. Make a data set of each.")
    units = {scan.units for scan in scans}
    if len(units) > 1 and "HU" in units:
        raise DataError("Some training cases are in HU, others are not. Set data.modality to ct if all of them are CT.")
    channels = {scan.channels for scan in scans}
    if len(channels) > 1 and units != {"levels"}:  # grey and coloured images go together
        raise DataError(f"The training cases have different numbers of channels: {sorted(channels)}.")
    labelled = [scan for scan in scans if scan.labelled] or scans
    widest = max(channels)
    pooled = np.concatenate([scan.samples for scan in labelled if scan.channels == widest], axis=1)
    return DatasetFingerprint(
        shapes=tuple(scan.shape for scan in scans),
        spacings=tuple(scan.spacing for scan in scans),
        known=all(scan.known for scan in scans),
        units=units.pop() if len(units) == 1 else "none",
        channels=widest,
        lows=tuple(np.percentile(pooled, PERCENTILES[0], axis=1).tolist()),
        highs=tuple(np.percentile(pooled, PERCENTILES[1], axis=1).tolist()),
        contents=tuple(scan.content for scan in scans),
        outside=sum(scan.outside for scan in scans),
    )


def fit_preprocessing(
    fingerprint: DatasetFingerprint,
    multiple: tuple[int, ...],
    options: VolumeOptions | None = None,
    *,
    size: tuple[int, ...] | None = None,
    channels: int | None = None,
    whole: bool = False,
    voxels: int = VOXELS,
) -> VolumePreprocessing:
    """Plan the preprocessing of a data set: what the options leave open.

    - Spacing: the median. Across thick slices (over three times the finest spacing) the finest tenth, as in nnU-Net.
      None where files tell no spacing.
    - Intensities: 0 .. 255 for 8-bit images; for CT the range of HU that the structures, or without masks all voxels,
      take in the data set; otherwise percentiles of each scan's content, since MRI has no units. A z-score is
      for the options to ask for.
    - Crop to content where that takes away a fifth of the median scan, and no structure.
    - Patch: the median shape, or what holds most scans whole; then smaller along the longest side in mm until the
      budget is met.

    What is planned has six significant digits, so that the experiment, the card and the arithmetic hold one number.

    Args:
        fingerprint: Of the training cases.
        multiple: The backbone's patch, which the patch shape is a multiple of; its length says 2D or 3D.
        options: What the user says; by default nothing.
        size: Voxels of every scan, in place of a spacing, where the options say neither.
        channels: 1 or 3 for 8-bit images, whatever they have.
        whole: Whether a patch is to hold 19 of 20 scans along each axis, since it is the scan that has a class, and not
            its parts.
        voxels: Budget of a patch.

    Raises:
        ConfigError: The options do not go together, or have another number of dimensions than the backbone.
        DataError: Images for a 3D backbone or the reverse.
    """
    options, dims = options or VolumeOptions(), len(fingerprint.shapes[0])
    if len(multiple) != dims:
        raise DataError(
            f"The images have {dims} dimensions, but the backbone has {len(multiple)}. Choose backbone.dims."
        )
    _require_consistent(options, fingerprint)
    size, spacing = _grid(fingerprint, options, size)
    steps = np.array(fingerprint.spacings)
    shares = [
        math.prod(box) / math.prod(shape) for box, shape in zip(fingerprint.contents, fingerprint.shapes, strict=True)
    ]
    crop = bool(np.median(shares) < CROP_BELOW) and not fingerprint.outside and fingerprint.units != "levels"
    if options.crop != "auto":
        crop = options.crop
    shapes = np.array(fingerprint.contents if crop else fingerprint.shapes, float)
    if options.center_crop is not None:
        shapes = _middles(shapes, options.center_crop, steps)
    if spacing is not None:
        shapes *= steps / np.array(spacing)
    held = np.percentile(shapes, WHOLE, axis=0, method="inverted_cdf") if whole else np.median(shapes, axis=0)
    shape = size or tuple(held.tolist())
    if options.patch != "auto":
        _require_whole(options.patch, multiple)
    unit = spacing or tuple(np.median(steps, axis=0).tolist())
    windows = _windows(fingerprint, channels) if options.windows == "auto" else options.windows
    values = {
        "patch": patch_shape(shape, unit, multiple, voxels) if options.patch == "auto" else options.patch,
        "spacing": spacing,
        "size": size,
        "windows": windows,
        "air": (AIR if fingerprint.units == "HU" else None) if options.air == "auto" else options.air,
        "crop": crop,
        "center_crop": options.center_crop,
        "dtype": "uint8" if all(window == LEVELS for window in windows) else "float16",
    }
    return VolumePreprocessing.model_validate(values)


def as_options(preprocessing: VolumePreprocessing) -> VolumeOptions:
    """The options that a plan answers; planned again with them, it is the same."""
    return VolumeOptions(
        patch=preprocessing.patch,
        spacing=preprocessing.spacing or "none",
        size=preprocessing.size or "none",
        windows=preprocessing.windows,
        air=preprocessing.air,
        crop=preprocessing.crop,
        center_crop=preprocessing.center_crop,
    )


def _grid(
    fingerprint: DatasetFingerprint, options: VolumeOptions, size: tuple[int, ...] | None
) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Size and spacing, at most one of them."""
    if isinstance(options.size, tuple):
        size = options.size
    elif options.size == "none" or options.spacing != "auto":
        size = None
    if size is not None or options.spacing == "none":
        return size, None
    if isinstance(options.spacing, tuple):
        return None, options.spacing
    if not fingerprint.known:
        return None, None
    spacings = np.array(fingerprint.spacings)
    spacing = np.median(spacings, axis=0)
    if len(spacing) == 3 and spacing.max() > ANISOTROPY * spacing.min():
        axis = int(spacing.argmax())
        spacing[axis] = max(np.percentile(spacings[:, axis], 10), np.delete(spacing, axis).max())
    return None, tuple(map(_rounded, spacing.tolist()))


def _middles(
    shapes: NDArray[np.float64], extents: tuple[float, ...], steps: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n, dims) what `center_crop` leaves of scans, in their own voxels."""
    scans = zip(shapes, steps, strict=True)
    kept = [[middle(int(n), *each) for n, *each in zip(shape, extents, own, strict=True)] for shape, own in scans]
    return np.array(kept, float)


def _require_consistent(options: VolumeOptions, fingerprint: DatasetFingerprint) -> None:
    dims, channels = len(fingerprint.shapes[0]), fingerprint.channels
    given = {
        "patch": options.patch,
        "spacing": options.spacing,
        "size": options.size,
        "center_crop": options.center_crop,
    }
    wrong = {name: value for name, value in given.items() if isinstance(value, tuple) and len(value) != dims}
    problems = [f"data.volume.{name} is {list(value)}: give {dims} numbers" for name, value in wrong.items()]
    windows = None if options.windows == "auto" else len(options.windows)
    if windows not in (None, channels) and fingerprint.units != "levels":  # grey and coloured images go together
        problems.append(f"data.volume.windows: {windows} for {channels} channels; give each channel its window")
    if isinstance(options.spacing, tuple) and isinstance(options.size, tuple):
        problems.append("data.volume.spacing and data.volume.size exclude each other: leave one out")
    if problems:
        raise ConfigError(f"The preprocessing of {dims}D images cannot be set up like this.", problems)


def _require_whole(patch: tuple[int, ...], multiple: tuple[int, ...]) -> None:
    if any(side % unit for side, unit in zip(patch, multiple, strict=True)):
        fitting = [max(1, round(side / unit)) * unit for side, unit in zip(patch, multiple, strict=True)]
        raise ConfigError(
            f"data.volume.patch is {list(patch)}; each side must be a multiple of the backbone's patch "
            f"{list(multiple)}. Use for example --set data.volume.patch={fitting}."
        )


def patch_shape(
    shape: Sequence[float], spacing: Sequence[float], multiple: tuple[int, ...], voxels: int
) -> tuple[int, ...]:
    """A patch of at most `voxels` voxels that covers as much of a scan as possible, as close to a cube in mm.

    Args:
        shape: Of the scan, in voxels.
        spacing: In mm.
        multiple: Each side is a multiple of this; at least once.
        voxels: Budget; one `multiple` is taken even if it is larger.
    """
    patch = [max(1, math.ceil(size / unit)) * unit for size, unit in zip(shape, multiple, strict=True)]
    while math.prod(patch) > voxels:
        reducible = [axis for axis in range(len(patch)) if patch[axis] > multiple[axis]]
        if not reducible:
            break
        longest = max(reducible, key=lambda axis: patch[axis] * spacing[axis])
        patch[longest] -= multiple[longest]
    return tuple(patch)


def _windows(fingerprint: DatasetFingerprint, channels: int | None) -> tuple[Window, ...]:
    if fingerprint.units == "levels":
        return (LEVELS,) * (channels or fingerprint.channels)
    if fingerprint.units == "HU":
        # A data set of one value has no window of its own: 1 HU wide.
        return tuple(
            Window(kind="fixed", low=low, high=max(high, low + 1))
            for low, high in zip(map(_rounded, fingerprint.lows), map(_rounded, fingerprint.highs), strict=True)
        )
    return (Window(kind="percentiles", low=PERCENTILES[0], high=PERCENTILES[1]),) * fingerprint.channels


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
