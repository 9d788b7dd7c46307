"""Planes of DICOM images as a stack: their order in space, what is wrong with them, the geometry they make.

A volume has one distance between slices, one orientation and right angles. Slices that do not fill such a grid are
reported; nothing is stacked as if they did.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtpp.data.case import Problem
from medtpp.data.geometry import Geometry
from medtpp.data.problems import agree, count, first_few
from medtpp.data.volumes.grid import make_geometry

PARALLEL = 2e-3  # largest difference of direction cosines inside a stack; about 0.1 degrees
UNEVEN = 0.05  # share of the distance between slices by which single ones may be off
MISSING = 1.5  # distances between slices from which one is missing
DOUBLED = 0.05  # share of a pixel's size below which two slices lie at one place
LATERAL = 1.0  # pixels by which slices may be off the normal through the first, over the whole stack


@dataclass(frozen=True)
class Plane:
    """One image of a series: a file, or a frame of one.

    Attributes:
        file: Where it is.
        frame: Its number in the file, from 0; None where the file holds this image alone.
        size: Rows and columns.
        position: Coordinates (x, y, z) of its first pixel in mm.
        orientation: Unit vectors, first from row to row, then from column to column.
        spacing: Distance of rows and of columns in mm.
        step: Distance to the next slice in mm by the header, which counts for single slices only.
    """

    file: Path
    frame: int | None
    size: tuple[int, int]
    position: tuple[float, float, float]
    orientation: tuple[tuple[float, float, float], tuple[float, float, float]]
    spacing: tuple[float, float]
    step: float = 1.0


def in_order(planes: Iterable[Plane]) -> list[Plane]:
    """Planes by their position along the normal of the first; never by name or number."""
    planes = list(planes)
    heights = _heights(planes)
    return [planes[index] for index in sorted(range(len(planes)), key=lambda index: (heights[index], index))]


def stack_geometry(planes: Sequence[Plane]) -> Geometry:
    """The grid of planes that are in order and without problems; slices run along the first axis."""
    first = planes[0]
    heights = _heights(planes)
    step = (heights[-1] - heights[0]) / (len(planes) - 1) if len(planes) > 1 else first.step
    return make_geometry(
        (len(planes), *first.size),
        (float(step), *first.spacing),
        first.position,
        [_normal(first).tolist(), *first.orientation],
    )


def stack_problems(planes: Sequence[Plane]) -> list[Problem]:
    """Why planes in their order fill no regular grid; none where they do.

    Files are named relative to their common folder, places by their position along the normal in mm.
    """
    names = _names(planes)
    problems = _differences(planes, names)
    if not problems:  # distances between slices mean nothing while the slices themselves differ
        problems = [*_distances(planes, names), *_lateral(planes, names)]
    return problems


def doubled(planes: Iterable[Plane]) -> int:
    """The largest number of planes at one place."""
    planes = in_order(planes)
    most = here = 1
    for step in np.diff(_heights(planes)):
        here = here + 1 if step < DOUBLED * min(planes[0].spacing) else 1
        most = max(most, here)
    return most


def _normal(plane: Plane) -> NDArray[np.float64]:
    down, right = plane.orientation
    normal = np.cross(right, down)
    unit: NDArray[np.float64] = normal / np.linalg.norm(normal)
    return unit


def _heights(planes: Sequence[Plane], normal: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Positions in mm along a normal, by default that of the first plane."""
    along = _normal(planes[0]) if normal is None else normal
    heights: NDArray[np.float64] = np.array([plane.position for plane in planes]) @ along
    return heights


def _names(planes: Sequence[Plane]) -> list[str]:
    folder = os.path.commonpath([plane.file.parent for plane in planes])
    return [
        plane.file.relative_to(folder).as_posix() + ("" if plane.frame is None else f" (frame {plane.frame + 1})")
        for plane in planes
    ]


def _error(code: str, message: str) -> Problem:
    return Problem("error", code, message)


def _differences(planes: Sequence[Plane], names: Sequence[str]) -> list[Problem]:
    problems = []
    for code, what, texts in (
        ("slices-of-different-size", "size", ["{} x {}".format(*plane.size) for plane in planes]),
        (
            "slices-of-different-spacing",
            "pixel spacing",
            ["{:.3g} x {:.3g} mm".format(*plane.spacing) for plane in planes],
        ),
    ):
        groups: dict[str, list[str]] = defaultdict(list)
        for text, name in zip(texts, names, strict=True):
            groups[text].append(name)
        if len(groups) > 1:
            which = "; ".join(
                f"{len(files)} of {text} ({first_few(files, 3)})"
                for text, files in sorted(groups.items(), key=lambda group: len(group[1]), reverse=True)
            )
            problems.append(_error(code, f"Its slices differ in {what}: {which}. Keep the slices of one scan."))
    axes = np.array([plane.orientation for plane in planes]).reshape(len(planes), -1)
    # The middle of all directions, so that a single odd slice is the one that is named.
    odd = np.flatnonzero(np.abs(axes - np.median(axes, axis=0)).max(axis=1) > PARALLEL).tolist()
    if odd:
        # Along the normal of the others: that of an odd one would order them otherwise.
        straight = next((plane for index, plane in enumerate(planes) if index not in odd), planes[0])
        heights = _heights(planes, _normal(straight))
        which = first_few((f"{names[index]} at {heights[index]:.2f} mm" for index in odd), 3)
        text = (
            f"{len(odd)} of {len(planes)} slices {agree(odd, 'is', 'are')} not parallel to the others: {which}. A "
            f"volume has parallel slices: take out the odd {agree(odd, 'one', 'ones')}, or use the slices as "
            "single images."
        )
        problems.append(_error("slices-not-parallel", text))
    return problems


def _distances(planes: Sequence[Plane], names: Sequence[str]) -> list[Problem]:
    heights = _heights(planes)
    same = DOUBLED * min(planes[0].spacing)
    steps = np.diff(heights)
    apart = np.sort(steps[steps >= same])
    if len(planes) == 1:
        return []
    usual = float(apart[(len(apart) - 1) // 2]) if len(apart) else 1.0

    def places(indices: Iterable[int]) -> str:
        return first_few(
            (f"{names[i]} at {heights[i]:.2f} mm and {names[i + 1]} at {heights[i + 1]:.2f} mm" for i in indices), 3
        )

    problems = []
    twins = [index for index, step in enumerate(steps) if step < same]
    gaps = [index for index, step in enumerate(steps) if step > MISSING * usual]
    uneven = [
        index
        for index, step in enumerate(steps)
        if same <= step <= MISSING * usual and abs(step - usual) > UNEVEN * usual
    ]
    if twins:
        text = (
            f"{count(twins, 'slice')} {agree(twins, 'lies', 'lie')} where another one lies: {places(twins)}. Remove "
            "copies, or keep one scan."
        )
        problems.append(_error("slices-doubled", text))
    if gaps:
        missing = range(sum(max(round(steps[index] / usual) - 1, 1) for index in gaps))
        text = (
            f"About {count(missing, 'slice')} {agree(missing, 'is', 'are')} missing (slices are {usual:.3g} mm apart), "
            f"between {places(gaps)}. Export the series again."
        )
        problems.append(_error("slices-missing", text))
    if uneven:
        text = (
            f"The distance between slices changes (it is {usual:.3g} mm mostly, {steps[uneven].min():.3g} to "
            f"{steps[uneven].max():.3g} mm elsewhere), between {places(uneven)}. Resample the series to even slices."
        )
        problems.append(_error("slices-uneven", text))
    return problems


def _lateral(planes: Sequence[Plane], names: Sequence[str]) -> list[Problem]:
    """Slices beside the normal through the first: a tilted gantry, or a table that moved."""
    places = np.array([plane.position for plane in planes])
    places = places - places[0]
    levels = _heights(planes)
    heights = levels - levels[0]
    beside = places - heights[:, None] * _normal(planes[0])
    allowed = LATERAL * min(planes[0].spacing)
    if np.linalg.norm(beside, axis=1).max() <= allowed:
        return []
    slant = beside[-1] / heights[-1] if heights[-1] else np.zeros(3)
    if np.linalg.norm(beside - heights[:, None] * slant, axis=1).max() <= allowed:
        angle = math.degrees(math.atan(float(np.linalg.norm(slant))))
        text = (
            f"The slices are sheared by {angle:.1f} degrees (a tilted gantry): a grid with right angles cannot hold "
            "them. Correct the tilt (such as with dcm2niix) and use the result."
        )
        return [_error("slices-sheared", text)]
    jumps = [
        index for index, (a, b) in enumerate(pairwise(beside)) if np.linalg.norm(b - a) > 0.5 * allowed
    ]  # fmt: skip
    where = first_few((f"{names[i]} and {names[i + 1]} at {levels[i + 1]:.2f} mm" for i in jumps), 3)
    text = f"Slices are shifted sideways against each other, between {where}. Keep the slices of one scan."
    return [_error("slices-shifted", text)]
