"""Overlays: the best, the median and the worst test case with the outlines of what is there and what was predicted.

Volumes are shown as three orthogonal slices in the radiological convention: axial and coronal slices have the patient's
right on the left of the picture, the front or the head on top; sagittal slices have the front on the left.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medtpp.data.geometry import Geometry
from medtpp.evaluation.segmentation_table import Segmentations
from medtpp.files import atomic, write_json

Kind = Literal["best", "median", "worst"]
Labels = NDArray[np.uint8]
Split = Callable[[Labels], Iterable[NDArray[np.bool_]]]

SIDE = 300  # pixels of a picture's longest side
# Blue and orange differ to every kind of colour vision (Okabe and Ito 2008), and neither is a grey.
TRUE, PREDICTED = "#40c4ff", "#ff8a00"
_SMALLEST = 24  # a side, of what is very long
_BRIGHTEST = 205  # of the scan, so that outlines stand out from bone and air alike
_ROOM = 0.75  # around the structures, as a share of their largest extent
_LEAST_ROOM = 0.15  # and as a share of the image
_PLACES = ((0.015, 0.5, "left", "center"), (0.985, 0.5, "right", "center"), (0.5, 0.985, "center", "top"),
           (0.5, 0.015, "center", "bottom"))  # fmt: skip


@dataclass(frozen=True)
class _Plane:
    """A slice through a volume whose axes run to the head, the front and the right.

    Attributes:
        axis: Of the volume, across the slice.
        flips: Whether rows and columns of the picture run against the volume's axes.
        sides: What is at the left, right, top and bottom of the picture.
    """

    axis: int
    flips: tuple[bool, bool]
    sides: str


_PLANES = {
    "axial": _Plane(0, (True, True), "RLAP"),
    "coronal": _Plane(1, (True, True), "RLSI"),
    "sagittal": _Plane(2, (True, True), "APSI"),
}


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of an overlay.

    Attributes:
        plane: "axial", "coronal", "sagittal"; "axis 1" to "axis 3" where nobody knows how a volume lies in the patient;
            "" for images of two dimensions.
        pixels: (h, w, 3) uint8.
    """

    plane: str
    pixels: NDArray[np.uint8]


def choose_cases(table: Segmentations) -> dict[Kind, int]:
    """Rows of the cases with the highest, the median and the lowest mean Dice over structures; none of them twice.

    Cases without a Dice, which show nothing and in which nothing was predicted, are left out.
    """
    known = np.flatnonzero(~np.isnan(table.dice).all(axis=1))
    if not len(known):
        return {}
    order = known[np.argsort(np.nanmean(table.dice[known], axis=1), kind="stable")].tolist()
    chosen: dict[Kind, int] = {"best": order[-1]}
    if len(order) > 2:
        chosen["median"] = order[len(order) // 2]
    if len(order) > 1:
        chosen["worst"] = order[0]
    return chosen


def draw_overlay(
    image: NDArray[Any], true: Labels, predicted: Labels, geometry: Geometry, split: Split
) -> list[Picture]:
    """Draw one case on its own grid: three slices through the largest structure's centre, or one image.

    The true outline is a blue line, the predicted one orange dashes over it, so that both are seen where they agree.
    What is shown is the neighbourhood of all that is there or was predicted.

    Args:
        image: (*spatial), from 0 (black) to 1 (white), or (*spatial, 3) in colour.
        true: (*spatial), as `label_mask` numbers structures.
        predicted: (*spatial), likewise.
        geometry: Of the scan.
        split: Cuts labels into one mask for each structure.
    """
    # Not above: SimpleITK comes with it, which takes half a second that readers of tables need not wait.
    from medtpp.data.restore import axes_to_ras, reorder

    order, flipped = axes_to_ras(geometry)
    channels = np.moveaxis(image, -1, 0) if image.ndim > geometry.dims else image[None]
    channels = np.stack([reorder(channel, order, flipped) for channel in channels], axis=-1)
    image = channels if image.ndim > geometry.dims else channels[..., 0]
    true, predicted = (reorder(array, order, flipped) for array in (true, predicted))
    steps = tuple(geometry.spacing[axis] for axis in order)
    box = _neighbourhood((true > 0) | (predicted > 0), steps)
    if geometry.dims == 2:
        return [Picture("", _paint(image[box], true[box], predicted[box], steps, split))]
    centre = _centre(true if true.any() else predicted, split)
    planes = _PLANES if geometry.known else {f"axis {axis + 1}": _Plane(axis, (False, False), "") for axis in range(3)}
    pictures = []
    for name, plane in planes.items():
        index = tuple(centre[axis] if axis == plane.axis else part for axis, part in enumerate(box))
        flips = tuple(slice(None, None, -1 if flip else 1) for flip in plane.flips)
        shown, there, found = (array[index][flips] for array in (image, true, predicted))
        inside = tuple(step for axis, step in enumerate(steps) if axis != plane.axis)
        pictures.append(Picture(name, _paint(shown, there, found, inside, split, plane.sides)))
    return pictures


def write_overlays(folder: Path, table: Segmentations, drawn: Iterable[tuple[Kind, int, Sequence[Picture]]]) -> None:
    """Write `overlays.json` and the pictures as PNG.

    Args:
        folder: Of these files alone.
        table: The test cases.
        drawn: For each case its kind, its row in the table and its pictures.

    Raises:
        OutputError: A file cannot be written.
    """
    from PIL import Image

    entries = []
    for kind, row, pictures in drawn:
        names = [f"{kind}-{picture.plane.replace(' ', '-') or 'image'}.png" for picture in pictures]
        for name, picture in zip(names, pictures, strict=True):
            with atomic(folder / name) as temporary:
                Image.fromarray(picture.pixels).save(temporary, format="PNG")
        structures = [
            {"name": structure, "dice": _known(table.dice[row, index]), "hd95": _known(table.hd95[row, index])}
            for index, structure in enumerate(table.structures)
        ]
        entries.append(
            {
                "kind": kind,
                "case": table.cases[row],
                "dice": _mean(table.dice[row]),
                "hd95": _mean(table.hd95[row]),
                "structures": structures,
                "pictures": [
                    {"plane": picture.plane, "image": name} for name, picture in zip(names, pictures, strict=True)
                ],
            }
        )
    write_json(folder / "overlays.json", entries)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean(values: NDArray[np.float64]) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _neighbourhood(shown: NDArray[np.bool_], steps: Sequence[float]) -> tuple[slice, ...]:
    """A box around what is there, with room; the whole where nothing is."""
    if not shown.any():
        return (slice(None),) * shown.ndim
    ends = [(int(places[0]), int(places[-1]) + 1) for places in map(np.flatnonzero, _along_axes(shown))]
    room = _ROOM * max((last - first) * step for (first, last), step in zip(ends, steps, strict=True))
    box = []
    for (first, last), step, size in zip(ends, steps, shown.shape, strict=True):
        extra = math.ceil(max(room / step, _LEAST_ROOM * size))
        box.append(slice(max(0, first - extra), min(size, last + extra)))
    return tuple(box)


def _centre(labels: Labels, split: Split) -> tuple[int, ...]:
    """Along each axis the median voxel of the largest structure, so that every slice shows it; else the middle."""
    sizes = [int(np.count_nonzero(mask)) for mask in split(labels)]
    if not any(sizes):
        return tuple(size // 2 for size in labels.shape)
    largest = next(mask for index, mask in enumerate(split(labels)) if index == int(np.argmax(sizes)))
    totals = [np.cumsum(counts) for counts in _along_axes(largest)]
    return tuple(int(np.searchsorted(total, total[-1] / 2)) for total in totals)


def _along_axes(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """For each axis how many voxels of a mask lie at each place."""
    for axis in range(mask.ndim):
        yield np.count_nonzero(mask, axis=tuple(other for other in range(mask.ndim) if other != axis))


def _paint(
    image: NDArray[Any], true: Labels, predicted: Labels, steps: Sequence[float], split: Split, sides: str = ""
) -> NDArray[np.uint8]:
    """(h, w, 3): a slice, grey or in colour, in its true proportions, with outlines, and letters at its sides."""
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from PIL import Image

    extent = [size * step for size, step in zip(true.shape, steps, strict=True)]
    height, width = (max(_SMALLEST, round(SIDE * length / max(extent))) for length in extent)
    levels = Image.fromarray((np.clip(image, 0, 1) * _BRIGHTEST).astype(np.uint8))
    figure = Figure(figsize=((width + 0.5) / 100, (height + 0.5) / 100), dpi=100)  # cut to whole pixels
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(levels.resize((width, height), Image.Resampling.BICUBIC), cmap="gray", vmin=0, vmax=255)
    for labels, colour, dashes in ((true, TRUE, "solid"), (predicted, PREDICTED, (0, (3, 2)))):
        for mask in split(_enlarged(labels, (height, width))):
            if mask.any() and not mask.all():
                axes.contour(mask, [0.5], colors=colour, linewidths=1.4, linestyles=[dashes])
    for letter, (x, y, across, along) in zip(sides, _PLACES, strict=False):
        axes.text(
            x, y, letter, color="white", fontsize=10, ha=across, va=along, transform=axes.transAxes,
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )  # fmt: skip
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    with Image.open(stream) as picture:
        return np.asarray(picture.convert("RGB"))


def _enlarged(labels: Labels, shape: tuple[int, ...]) -> Labels:
    """Labels at the size of a picture, each pixel the voxel that it lies in."""
    index = [(2 * np.arange(m) + 1) * n // (2 * m) for n, m in zip(labels.shape, shape, strict=True)]
    return labels[np.ix_(*index)]
