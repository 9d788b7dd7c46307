"""From a path to cases: choose the layout, read it, leave out what is to be left out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from medtpp.config import SOURCES, DataOptions
from medtpp.data.case import Case, Dataset, Problem
from medtpp.data.download import local_path
from medtpp.data.predicted import predicted
from medtpp.data.problems import first_few
from medtpp.data.sources import ImageFile, class_names, find_images
from medtpp.data.sources.segmentation_folders import without_masks
from medtpp.errors import DataError


def read_dataset(options: DataOptions) -> Dataset:
    """Read the labelled data set of an experiment. No image is decoded.

    Problems in single cases are in the result; `medtpp.data.check` adds those that decoding shows.

    Raises:
        DataError: The path does not exist, no layout fits, or nothing can be read. Of a name of MedMNIST, see
            `medtpp.data.download.local_path`.
    """
    path = local_path(options.path)
    if not path.exists():
        raise DataError(f"There is no file or folder {path}. Check data.path.")
    name = _recognise(path) if options.layout == "auto" else options.layout
    dataset: Dataset = SOURCES.get(name).read(path, options)
    return _exclude(dataset, options.exclude)


def read_unlabelled(paths: Sequence[Path], option: str = "data.unlabelled") -> tuple[Case, ...]:
    """All images under some folders, labels and layout disregarded. Masks that medtpp predicted are left out.

    An id is "unlabelled:", the folder's name and the path in it ("unlabelled:pool/a/1.png"), so that it equals no id
    of a labelled data set. An image that lies in two of the folders is one case.

    Args:
        paths: The folders.
        option: Where the user named them.

    Raises:
        DataError: A folder does not exist or holds no images; all such folders are reported together.
    """
    folders = [path.expanduser() for path in paths]
    wrong = [f"{folder} is not a folder" for folder in folders if not folder.is_dir()]
    images = [_pool(folder) if folder.is_dir() else [] for folder in folders]
    wrong += [
        f"{folder} holds no images"
        for folder, found in zip(folders, images, strict=True)
        if not found and folder.is_dir()
    ]
    if wrong:
        raise DataError(f"Folders of unlabelled images ({option}) cannot be used:", wrong)
    cases: dict[str, Case] = {}
    taken: set[str] = set()
    for folder, found in zip(folders, images, strict=True):
        prefix = _unique_prefix(folder, taken)
        for image in found:
            case = Case(prefix + image.name, image.image, patient=image.patient, files=image.files)
            cases.setdefault(os.path.realpath(case.image), case)
    return tuple(cases.values())


def _pool(folder: Path) -> list[ImageFile]:
    images = without_masks(find_images(folder)[0])
    masks = predicted(folder, images)
    return [image for image in images if image.name not in masks]


def _recognise(path: Path) -> str:
    names = [name for name, source in SOURCES.items() if source.recognises(path)]
    # Any folder is recognised as class folders, hence any other layout knows better.
    names = [name for name in names if name != "folders"] or names
    if len(names) == 1:
        return names[0]
    if names:
        raise DataError(f"{path} could be {' or '.join(names)}. Choose one with --set data.layout={names[0]}.")
    known = [f"{name}: {source.summary}" for name, source in SOURCES.items()]
    raise DataError(f"{path} has none of the layouts that are known:", known)


def _exclude(dataset: Dataset, patterns: Sequence[str]) -> Dataset:
    if not patterns:
        return dataset
    ids = {case.id for case in dataset.cases}
    excluded: set[str] = set()
    idle = []
    for pattern in patterns:
        matched = {pattern} & ids or {case for case in ids if fnmatchcase(case, pattern)}
        excluded |= matched
        if not matched:
            idle.append(pattern)
    problems = list(dataset.problems)
    if idle:
        problems.append(
            Problem("warning", "idle-exclude", f"No case matches {first_few(map(repr, idle))} in data.exclude.")
        )
    cases = tuple(case for case in dataset.cases if case.id not in excluded)
    return replace(dataset, cases=cases, classes=class_names(cases), problems=tuple(problems))


def _unique_prefix(folder: Path, taken: set[str]) -> str:
    name = f"unlabelled:{folder.resolve().name}"
    number, prefix = 1, f"{name}/"
    while prefix in taken:
        number += 1
        prefix = f"{name}-{number}/"
    taken.add(prefix)
    return prefix
