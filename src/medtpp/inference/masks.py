"""Which files hold the results of a case, and how its mask gets there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medtpp.adapter import TaskCard
from medtpp.data.case import Case, Structure
from medtpp.data.geometry import Geometry
from medtpp.data.listing import split_suffix, stem_of
from medtpp.data.problems import first_few
from medtpp.errors import ConfigError
from medtpp.inference.cases import VOLUMES, is_dicom_case
from medtpp.inference.write import structure_path, write_dicom_seg, write_mask, write_overlapping

Format = Literal["auto", "nii.gz", "nii", "nrrd", "mha", "png", "dicom-seg"]
LEVELS = 256  # of labels in memory, which have 8 bits


@dataclass(frozen=True)
class Target:
    """Where the results of one case go.

    Attributes:
        place: Of the mask: a file, or the folder of one file for each structure.
        suffix: Of the mask's files: ".dcm" is a DICOM segmentation.
        values: What stands for each structure in them.
        masks: The files of the mask.
        maps: The files of the probabilities, one for each structure; () where they are not wanted.
    """

    place: Path
    suffix: str
    values: tuple[int, ...]
    masks: tuple[Path, ...]
    maps: tuple[Path, ...]

    @property
    def complete(self) -> bool:
        """Whether all files are there; each is written whole or not at all."""
        return all(path.is_file() for path in (*self.masks, *self.maps))


def plan_targets(
    cases: Sequence[Case], output: Path, card: TaskCard, dims: int, kind: Format, *, probabilities: bool
) -> dict[str, Target]:
    """Where the results of all cases go, by case id: files named as the case, with its folders, under `output`.

    With `auto`, NIfTI, NRRD and MetaImage stay what they are, DICOM volumes become DICOM segmentations, and images of
    two dimensions PNG. Structures that overlap lie in a folder of the case's name, since a mask file holds one value
    per voxel; a DICOM segmentation holds them all. Values are those of the training (see `Structure.value`), but 1 in
    a file for one structure, and in a DICOM segmentation the segment's number, counted from 1.

    Args:
        cases: With ids relative to a folder.
        output: The folder.
        card: Of the task.
        dims: 2 or 3, of what the adapter was trained on.
        kind: The format.
        probabilities: Whether a map for each structure is wanted.

    Raises:
        ConfigError: The format does not fit, or two cases would be written to one file.
    """
    if kind == "png" and dims == 3:
        raise ConfigError("--format png: a PNG holds no volume, and this adapter segments volumes. Choose another one.")
    others = [case.id for case in cases if not is_dicom_case(case)] if kind == "dicom-seg" else []
    if others:
        raise ConfigError(
            f"--format dicom-seg: a DICOM segmentation refers to DICOM images, which {len(others)} of {len(cases)} "
            f"images are not: {first_few(others, 3)}. Use auto, or predict them apart."
        )
    structures, targets = card.structures, {}
    taken: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        suffix = _suffix(case, dims, kind)
        stem = case.id if len(case.files) > 1 else stem_of(case.id)  # a series is called by its folder
        folder = card.multilabel and suffix != ".dcm"
        place = output / stem if folder else output / f"{stem}{suffix}"
        numbered = list(enumerate(structures, start=1))
        masks = [structure_path(place, number, one, suffix) for number, one in numbered] if folder else [place]
        beside = output / f"{stem}_probabilities"
        maps = [structure_path(beside, number, one, ".nii.gz") for number, one in numbered] if probabilities else []
        values = tuple(number if suffix == ".dcm" else 1 if folder else one.value for number, one in numbered)
        targets[case.id] = Target(place, suffix, values, tuple(masks), tuple(maps))
        taken[str(place).casefold()].append(case.id)  # as file systems that do not tell a.png from A.png
    doubled = [" and ".join(names) for names in taken.values() if len(names) > 1]
    if doubled:
        raise ConfigError(
            "These images would be written to the same file. Rename them, or predict them apart:", doubled
        )
    return targets


def _suffix(case: Case, dims: int, kind: Format) -> str:
    if kind != "auto":
        return ".dcm" if kind == "dicom-seg" else f".{kind}"
    if is_dicom_case(case):
        return ".dcm" if dims == 3 else ".png"
    return VOLUMES.get(split_suffix(case.image.name)[1], ".png")


def write_case(target: Target, labels: NDArray[np.uint8], card: TaskCard, case: Case, geometry: Geometry) -> None:
    """Write the mask of one case.

    Args:
        target: Where to.
        labels: (*geometry.shape) as `SlidingWindow.labels` numbers structures.
        card: Of the task.
        case: Where they were found.
        geometry: Of its image.

    Raises:
        DataError: A DICOM segmentation cannot refer to the image. No text of the header is in it.
        OutputError: The file cannot be written.
    """
    if target.suffix == ".dcm":
        slices = labels if labels.ndim == 3 else labels[None]
        files = case.files or (case.image,)
        write_dicom_seg(target.place, slices, card.structures, files, overlapping=card.multilabel)
    elif card.multilabel:
        write_overlapping(target.place, labels, card.structures, geometry, target.suffix)
    else:
        write_mask(target.place, with_values(labels, target.values), geometry)


def with_values(labels: NDArray[np.uint8], values: Sequence[int]) -> NDArray[np.unsignedinteger[Any]]:
    """Values in the place of numbers of structures.

    Args:
        labels: (*spatial), i for the i-th structure.
        values: What stands for each structure, above 0.

    Returns:
        (*spatial), uint8 where the values fit, else uint16.
    """
    kind = np.uint8 if max(values) < LEVELS else np.uint16
    table: NDArray[np.unsignedinteger[Any]] = np.zeros(LEVELS, kind)
    table[1 : len(values) + 1] = values
    mask: NDArray[np.unsignedinteger[Any]] = np.empty(labels.shape, kind)
    for source, target in zip(labels, mask, strict=True):  # slice by slice: an index takes eight bytes per voxel
        target[...] = table[source]
    return mask


def measured(
    labels: NDArray[np.uint8], structures: Sequence[Structure], geometry: Geometry, *, overlapping: bool
) -> tuple[list[float], str]:
    """The size of each structure, and the unit: "ml", of images of two dimensions "cm2", "px" of unknown spacing."""
    counts = np.zeros(LEVELS, np.int64)
    for part in labels:
        counts += np.bincount(part.reshape(-1), minlength=LEVELS)
    bits = np.arange(LEVELS)
    numbers = range(1, len(structures) + 1)
    voxels = [int(counts[bits >> (i - 1) & 1 == 1].sum() if overlapping else counts[i]) for i in numbers]
    if not geometry.known:
        return [float(count) for count in voxels], "px"
    size = math.prod(geometry.spacing) / 10**geometry.dims  # from mm to cm, and a cubic centimetre is a millilitre
    return [count * size for count in voxels], "ml" if geometry.dims == 3 else "cm2"
