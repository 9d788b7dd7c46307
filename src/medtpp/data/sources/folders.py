"""Class folders: `DATA/benign/1.png`, or `DATA/train/benign/1.nii.gz` where the split is prescribed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from medtpp.config import SOURCES, DataOptions
from medtpp.data.case import Case, Dataset, Problem
from medtpp.data.listing import IMAGE_SUFFIXES
from medtpp.data.problems import agree, count, first_few
from medtpp.data.sources import (
    ImageFile,
    class_names,
    crowded_folders,
    find_images,
    is_excluded,
    other_files,
    scan_problems,
    split_of,
)
from medtpp.data.sources._lookalikes import masks_among_images, refuse_masks_as_classes
from medtpp.data.sources.segmentation_folders import holds_masks
from medtpp.errors import DataError

_EXPECTED = """Expected is a folder for each class, optionally inside train, val and test:
    DATA/benign/1.png
    DATA/malignant/2.png
or images alone, without labels:
    DATA/1.png"""


@SOURCES.register("folders")
class Folders:
    """A folder for each class; images, volumes and DICOM series nested deeper in it belong to the class.

    Images outside class folders are unlabelled cases. Where the folders at the top are called train, val (valid,
    validation) and test, in any case, they prescribe the split and hold the class folders.
    """

    summary: ClassVar[str] = "a folder for each class, optionally inside train, val and test; or images without labels"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Any folder will do: this layout is tried last."""
        return path.is_dir()

    @staticmethod
    def read(path: Path, options: DataOptions) -> Dataset:
        """Read the names of all images.

        Raises:
            DataError: There is no image, split folders stand beside class folders, several labels are asked for, or
                the folders are images and masks rather than classes (by their names, unless `data.layout` says so).
        """
        if holds_masks(path):
            raise DataError(
                f"{path} holds images and their masks, not a folder for each class. Read it with --set "
                "data.layout=segmentation_folders, or write a manifest.csv with the columns image, mask and label."
            )
        if options.multilabel:
            raise DataError(
                f"{path}: class folders give one label to each image. For several labels (data.multilabel=true) "
                "write a manifest.csv with the columns image and label."
            )
        images, others = find_images(path)
        if not images:
            found = f"only other files ({first_few(others, 3)})" if others else "nothing"
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{path} holds no images ({suffixes}, DICOM), {found}.\n{_EXPECTED}")

        prescribed = _splits_prescribed(path, images)
        cases = tuple(_case(image, prescribed) for image in images)
        kept = [image for image in images if not is_excluded(image.name, options.exclude)]
        if options.layout != "folders":
            places = {case.id: _class_folder(case) for case in cases if case.labelled}
            refuse_masks_as_classes(path, kept, places)
        problems = (
            *scan_problems(images, options.exclude),
            *crowded_folders(images, options.exclude),
            *masks_among_images(kept, meant=options.layout == "folders"),
            *_problems(cases, others),
        )
        return Dataset(path, "folders", cases, class_names(cases), problems=problems)


def _splits_prescribed(root: Path, images: list[ImageFile]) -> bool:
    top = {image.name.split("/", 1)[0] for image in images if "/" in image.name}
    splits = {folder for folder in top if split_of(folder)}
    if splits and splits != top:
        raise DataError(
            f"{root} holds split folders ({first_few(sorted(splits))}) beside other folders with images "
            f"({first_few(sorted(top - splits))}), so that it is not clear which are classes. "
            "Move the class folders into the split folders, move other images elsewhere, or write a manifest.csv."
        )
    return bool(splits)


def _case(image: ImageFile, prescribed: bool) -> Case:
    parts = image.name.split("/")
    split = split_of(parts[0]) if prescribed and len(parts) > 1 else None
    inside = parts[1:] if split else parts
    labels = (inside[0],) if len(inside) > 1 else ()
    return Case(image.name, image.image, labels, bool(labels), image.patient, split=split, files=image.files)


def _class_folder(case: Case) -> str:
    return "/".join(case.id.split("/")[: 2 if case.split else 1])


def _problems(cases: tuple[Case, ...], others: list[str]) -> list[Problem]:
    problems = other_files(others)
    stray = tuple(case.id for case in cases if not case.labelled)
    if 0 < len(stray) < len(cases):
        problems.append(
            Problem(
                "warning",
                "outside-class-folders",
                f"{count(stray, 'image')} outside class folders, which {agree(stray, 'counts', 'count')} as "
                f"unlabelled: {first_few(stray)}.",
                stray,
            )
        )
    return problems
