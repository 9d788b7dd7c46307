"""Images and masks paired by name: `DATA/images/1.png` and `DATA/masks/1.png`, also inside train, val and test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from medtpp.config import SOURCES, DataOptions
from medtpp.data.case import Case, Dataset, Problem
from medtpp.data.listing import spelled, stem_of
from medtpp.data.problems import agree, count, first_few
from medtpp.data.sources import ImageFile, find_images, find_masks, scan_problems, split_of
from medtpp.data.sources._names import IMAGE_FOLDERS, MASK_ENDING, MASK_FOLDERS
from medtpp.data.sources._structures import named_structures
from medtpp.errors import DataError


@SOURCES.register("segmentation_folders")
class SegmentationFolders:
    """Two folders, one of images and one of masks, at the top or in each split folder.

    A mask has the name of its image, whatever the suffixes (`a.jpg`, `a.png`), or that name and an ending such as
    `_mask`, `_seg` or `_gt`. Folders inside are part of the name. The mask of a DICOM series has the name of its
    folder, and may be a DICOM segmentation. Images without a mask are unlabelled cases.
    """

    summary: ClassVar[str] = "images/ and masks/ with the same names in both, optionally inside train, val and test"

    @staticmethod
    def recognises(path: Path) -> bool:
        """A folder of images and one of masks, and no file that says more about them."""
        described = (path / "manifest.csv").is_file() or (path / "dataset.json").is_file()
        return not described and holds_masks(path)

    @staticmethod
    def read(path: Path, options: DataOptions) -> Dataset:
        """Read the names of all images and masks, and pair them.

        Raises:
            DataError: There are no such folders, more than one for masks or images, or no image has a mask.
        """
        parts = _parts(path)
        doubled = [
            f"{part.folder} has {first_few(folder.name for folder in folders)}"
            for part in parts
            for folders in (part.images, part.masks)
            if len(folders) > 1
        ]
        if doubled:
            raise DataError(f"{path}: which folder is it? Rename or move all but one:", doubled)
        cases: list[Case] = []
        found = _Found()
        for part in parts:
            cases += _read_part(path, part, options.exclude, found)
        if not any(case.mask for case in cases):
            raise DataError(_nothing_paired(path, cases, found))
        cases.sort(key=lambda case: case.id)
        structures = named_structures(options.structures)
        problems = (*found.problems, *_problems(cases, found))
        return Dataset(path, "segmentation_folders", tuple(cases), structures=structures, problems=problems)


def holds_masks(path: Path) -> bool:
    """Whether there are a folder of images and one of masks, at the top or in a split folder."""
    return path.is_dir() and any(part.masks for part in _parts(path))


def without_masks(images: Iterable[ImageFile]) -> list[ImageFile]:
    """Images of any folders, less those in folders of masks: pools and new images may lie beside their masks."""
    images = list(images)
    folders = {part for image in images for part in PurePosixPath(image.name).parents}
    with_images = {part.parent for part in folders if part.name.casefold() in IMAGE_FOLDERS | {"imagestr", "imagests"}}
    masks = {
        part
        for part in folders
        if part.parent in with_images and part.name.casefold() in MASK_FOLDERS | {"labelstr", "labelsts"}
    }
    return [image for image in images if masks.isdisjoint(PurePosixPath(image.name).parents)]


@dataclass(frozen=True)
class Pairing:
    """What `pair` found. Stems that belong to several images or several masks are doubled, and not paired.

    Attributes:
        masks: The mask of each image that has one, by the image's stem.
        alone: Masks without an image.
        doubled: By stem, the names of all images and masks that share it.
    """

    masks: dict[str, str]
    alone: list[str]
    doubled: dict[str, list[str]]


def pair(images: Iterable[tuple[str, str]], masks: Iterable[str]) -> Pairing:
    """Find the mask of each image by its stem.

    Args:
        images: Stem, as `ImageFile` gives it, and name of each image.
        masks: Names of masks. The whole stem is looked up first, then the stem without an ending such as "_mask", then
            the folder, in which viewers save a segmentation under a name of their own.
    """
    images_of: dict[str, list[str]] = defaultdict(list)
    masks_of: dict[str, list[str]] = defaultdict(list)
    alone = []
    for stem, name in images:
        images_of[stem].append(name)
    for mask in masks:
        whole = spelled(stem_of(mask))
        looked_up = (whole, MASK_ENDING.sub("", whole), spelled(PurePosixPath(mask).parent.as_posix()))
        found = next((stem for stem in looked_up if stem in images_of), None)
        if found is None:
            alone.append(mask)
        else:
            masks_of[found].append(mask)
    doubled = {
        stem: names + masks_of[stem] for stem, names in images_of.items() if len(names) > 1 or len(masks_of[stem]) > 1
    }
    return Pairing(
        {stem: names[0] for stem, names in masks_of.items() if stem not in doubled and names}, alone, doubled
    )


@dataclass(frozen=True)
class _Part:
    """The image and mask folders in one folder: one of each, unless the data set is wrong."""

    folder: Path
    split: str | None
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


class _Found:
    """What is told of the data set when all parts are read."""

    def __init__(self) -> None:
        self.alone: list[str] = []
        self.doubled: dict[str, list[str]] = {}
        self.others: list[str] = []
        self.problems: list[Problem] = []


def _parts(root: Path) -> list[_Part]:
    """The pair of folders at the top, or else those in each split folder; a split may lack its masks."""
    top = _part(root, None)
    if top.images and top.masks:
        return [top]
    inside = [_part(folder, split_of(folder.name)) for folder in _folders(root) if split_of(folder.name)]
    return [part for part in inside if part.images]


def _part(folder: Path, split: str | None) -> _Part:
    inside = _folders(folder)
    images = tuple(path for path in inside if path.name.casefold() in IMAGE_FOLDERS)
    masks = tuple(path for path in inside if path.name.casefold() in MASK_FOLDERS)
    return _Part(folder, split, images, masks)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:  # whoever lists the images says that the folder cannot be opened
        return []


def _read_part(root: Path, part: _Part, exclude: Sequence[str], found: _Found) -> list[Case]:
    folder = part.images[0]
    before = folder.relative_to(root).as_posix()
    images, others = find_images(folder)
    masks, other_masks = find_masks(part.masks[0]) if part.masks else ([], [])
    pairing = pair(((image.stem, image.name) for image in images), masks)
    splits = {} if part.split else _inner_splits(images)

    found.problems += scan_problems((replace(image, name=f"{before}/{image.name}") for image in images), exclude)
    found.others += [f"{before}/{name}" for name in others]
    if part.masks:
        beside = part.masks[0].relative_to(root).as_posix()
        found.others += [f"{beside}/{name}" for name in other_masks]
        found.alone += [f"{beside}/{name}" for name in pairing.alone]
    found.doubled |= {f"{before}/{stem}": names for stem, names in pairing.doubled.items()}
    return [
        Case(
            f"{before}/{image.name}",
            image.image,
            patient=image.patient,
            split=part.split or splits.get(image.name),
            files=image.files,
            mask=part.masks[0] / pairing.masks[image.stem] if image.stem in pairing.masks else None,
        )
        for image in images
        if image.stem not in pairing.doubled
    ]


def _inner_splits(images: Sequence[ImageFile]) -> Mapping[str, str | None]:
    """Splits by name where they lie inside: `images/train/1.png` and `masks/train/1.png`, every image in such one."""
    splits = {image.name: split_of(image.name.split("/", 1)[0]) if "/" in image.name else None for image in images}
    return splits if all(splits.values()) else {}


def _nothing_paired(root: Path, cases: Sequence[Case], found: _Found) -> str:
    if not (cases or found.alone or found.doubled):
        return (
            f"{root} holds no images and masks. Expected are two folders with the same names in them, such as "
            "images/1.png and masks/1.png."
        )
    images = first_few((case.id for case in cases), 3) or "none"
    masks = first_few(found.alone, 3) or "none"
    doubled = f" Names there twice: {first_few(found.doubled, 3)}." if found.doubled else ""
    return (
        f"{root}: no image has a mask of the same name. Images: {images}. Masks: {masks}.{doubled} Name each mask as "
        "its image, with or without an ending such as _mask, _seg or _gt, or write a manifest.csv with image and mask."
    )


def _problems(cases: Sequence[Case], found: _Found) -> list[Problem]:
    problems = []
    if found.doubled:
        which = first_few(f"{stem} ({first_few(names)})" for stem, names in found.doubled.items())
        what = f"{count(found.doubled, 'name')} {agree(found.doubled, 'belongs', 'belong')}"
        text = f"{what} to several images or several masks: {which}. Keep one of each."
        problems.append(Problem("error", "doubled-stem", text))
    bare = tuple(case.id for case in cases if case.mask is None)
    if bare:
        verbs = agree(bare, "has no mask and counts", "have no mask and count")
        text = f"{len(bare)} of {count(cases, 'image')} {verbs} as unlabelled: {first_few(bare)}."
        problems.append(Problem("warning", "image-without-mask", text, bare))
    if found.alone:
        what = f"{count(found.alone, 'mask')} {agree(found.alone, 'has', 'have')}"
        text = f"{what} no image of the same name: {first_few(sorted(found.alone))}: ignored."
        problems.append(Problem("warning", "mask-without-image", text))
    if found.others:
        verb = agree(found.others, "file is", "files are")
        text = f"{len(found.others)} {verb} not images, for example {min(found.others)}: ignored."
        problems.append(Problem("warning", "not-an-image", text))
    return problems
