"""Cases for new images, which lie in no data set: files and folders that the user names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from medtpp.data.case import Case
from medtpp.data.listing import PLANE_SUFFIXES, split_suffix
from medtpp.data.predicted import predicted
from medtpp.data.preprocess import Preprocessing
from medtpp.data.problems import agree, count
from medtpp.data.sources import ImageFile, find_images
from medtpp.data.sources.segmentation_folders import without_masks
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import DataError

# Suffixes of volumes, and of masks in the same format: one file, also where the volume has header and voxels apart.
VOLUMES = {".nii": ".nii", ".nii.gz": ".nii.gz", ".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}


def image_cases(
    paths: Sequence[Path],
    preprocessing: Preprocessing | VolumePreprocessing,
    tell: Callable[[str], None] | None = None,
) -> list[Case]:
    """Cases for image files, and for all images and scans in folders; ids are the paths as given.

    In folders, masks that medtpp predicted are no images; a file that is named is taken. Slices of a DICOM series that
    are named one by one (`scan/*`) make one case, called as if their folder were named, where volumes are wanted.

    Args:
        paths: Files and folders.
        preprocessing: Of the adapter. Where it wants several channels, nnU-Net's `CASE_0000.nii.gz`, `CASE_0001.nii.gz`
            and so on make one case, `CASE.nii.gz`.
        tell: Called with a line about what was left out, if anything was.

    Raises:
        DataError: A path does not exist, a folder holds no images, or there is none at all.
    """
    cases: dict[str, Case] = {}
    volumes = isinstance(preprocessing, VolumePreprocessing) and preprocessing.dims == 3
    series = _series_of(paths) if volumes else {}
    wrong = []
    left_out = []
    for path in paths:
        found = without_masks(find_images(path)[0]) if path.is_dir() else [series.get(path, ImageFile(path.name, path))]
        masks = predicted(path, found) if path.is_dir() else set()
        if not path.exists():
            wrong.append(f"{path} does not exist")
        elif not found:
            wrong.append(f"{path} holds no images")
        elif len(masks) == len(found):
            wrong.append(f"{path} holds nothing but what medtpp predict wrote; name files to predict them all the same")
        left_out += sorted(masks)
        above = path if path.is_dir() else path.parent
        for image in found:
            name = (above / image.name).as_posix()
            if image.name not in masks:
                cases.setdefault(name, Case(name, image.image, patient=image.patient, files=image.files))
    if wrong:
        raise DataError("There is nothing to predict in:", wrong)
    if left_out and tell:
        tell(f"{count(left_out, 'file')} that medtpp predict wrote {agree(left_out, 'is', 'are')} left out.")
    channels = len(preprocessing.windows) if isinstance(preprocessing, VolumePreprocessing) else 1
    return _joined(list(cases.values()), channels)


def relative_cases(cases: Sequence[Case], paths: Sequence[Path], output: Path) -> list[Case]:
    """The same cases with ids relative to the folder that holds everything named, for files of the same names.

    Args:
        cases: As `image_cases` gives them.
        paths: What it was given.
        output: Where results go; what lies there is left out, since a second run would find the masks of the first.

    Raises:
        DataError: Nothing else is left.
    """
    above = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in paths])  # noqa: PTH100
    own = Path(os.path.abspath(output))  # noqa: PTH100  (links stay what they are called)
    named: dict[str, Case] = {}
    for case in cases:
        place = Path(os.path.abspath(case.id))  # noqa: PTH100
        if not place.is_relative_to(own):
            name = place.relative_to(above).as_posix()
            named.setdefault(name, replace(case, id=name))
    if not named:
        raise DataError(f"All images lie in the output folder {output}. Name another --out.")
    return list(named.values())


def is_dicom_case(case: Case) -> bool:
    """Whether a case is DICOM, judged by names alone: what has no suffix of another format."""
    return bool(case.files) or split_suffix(case.image.name)[1] not in {*PLANE_SUFFIXES, *VOLUMES}


def _series_of(paths: Sequence[Path]) -> dict[Path, ImageFile]:
    """For each file that is a slice of a DICOM series, the series of all its slices that are named with it."""
    named = {path for path in paths if path.is_file() and is_dicom_case(Case(path.name, path))}
    series: dict[Path, ImageFile] = {}
    for folder in dict.fromkeys(path.parent for path in paths if path in named):
        for image in find_images(folder)[0]:
            files = tuple(file for file in image.files if file in named)
            if len(files) > 1:
                series |= dict.fromkeys(files, replace(image, image=files[0], files=files))
    return series


def _joined(cases: Sequence[Case], channels: int) -> list[Case]:
    """Files that hold one channel each, joined where there are as many as wanted."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        stem, suffix = split_suffix(case.id)
        match = re.fullmatch(r"(.+)_(\d{4})", stem, re.DOTALL)
        # Numbered photographs are photographs: three channels are their colours.
        single = channels == 1 or case.files or (channels == 3 and suffix in PLANE_SUFFIXES)
        groups[case.id if single or match is None else match[1] + suffix].append(case)
    joined = []
    for name, group in groups.items():
        numbers = [int(split_suffix(case.id)[0][-4:]) if len(group) > 1 else -1 for case in group]
        if numbers == list(range(channels)):
            joined.append(replace(group[0], id=name, channels=tuple(case.image for case in group[1:])))
        else:
            joined += group
    return joined
