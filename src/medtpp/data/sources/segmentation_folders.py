"""Images and masks paired by name: `DATA/images/1.png` and `DATA/masks/1.png`, also inside train, val and test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from medtpp.config import SOURCES, DataOptions
from medtpp.data.case import Case, Dataset, Problem
from medtpp.data.listing import split_suffix
from medtpp.data.problems import agree, count, exclude_option, first_few
from medtpp.data.sources import (
    ImageFile,
    crowded_folders,
    find_images,
    find_masks,
    is_excluded,
    other_files,
    scan_problems,
    split_of,
)
from medtpp.data.sources._names import IMAGE_FOLDERS, MASK_FOLDERS
from medtpp.data.sources._pairing import match
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
        cases.sort(key=lambda case: case.id)
        kept = [case for case in cases if not is_excluded(case.id, options.exclude)]
        if not any(case.mask for case in kept):
            raise DataError(_nothing_paired(path, kept, found))
        structures = named_structures(options.structures)
        problems = (*found.problems, *_problems(kept, found))
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
class _Part:
    """The image and mask folders in one folder: one of each, unless the data set is wrong."""

    folder: Path
    split: str | None
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass
class _Found:
    """What is told of the data set when all parts are read; see `medtpp.data.sources._pairing.Matches`."""

    alone: list[str] = field(default_factory=list)
    doubled: dict[str, list[str]] = field(default_factory=dict)
    unclear: dict[str, list[str]] = field(default_factory=dict)
    scans: list[str] = field(default_factory=list)  # among the masks
    others: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


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
    beside = part.masks[0].relative_to(root).as_posix() if part.masks else ""
    images, others = find_images(folder)
    masks, scans, other_masks = find_masks(part.masks[0]) if part.masks else ([], [], [])
    matches = match(images, masks, {i.name for i in images if is_excluded(f"{before}/{i.name}", exclude)})
    splits = {} if part.split else _inner_splits(images)

    named = [replace(image, name=f"{before}/{image.name}") for image in images]
    found.problems += [*scan_problems(named, exclude), *crowded_folders(named, exclude)]
    found.others += [f"{before}/{name}" for name in others]
    found.others += [f"{beside}/{name}" for name in other_masks]
    found.scans += [f"{beside}/{name}" for name in scans]
    found.alone += [f"{beside}/{name}" for name in matches.alone]
    for stem, (same, its_masks) in matches.doubled.items():
        names = (*(f"{before}/{name}" for name in same), *(f"{beside}/{name}" for name in its_masks))
        found.doubled[f"{before}/{stem}"] = list(names)
    for mask, same in matches.unclear.items():
        found.unclear[f"{beside}/{mask}"] = [f"{before}/{name}" for name in same]
    in_doubt = {name for same, _ in matches.doubled.values() for name in same}
    return [
        Case(
            f"{before}/{image.name}",
            image.image,
            patient=image.patient,
            split=part.split or splits.get(image.name),
            files=image.files,
            mask=part.masks[0] / matches.masks[image.name] if image.name in matches.masks else None,
        )
        for image in images
        if image.name not in in_doubt
    ]


def _inner_splits(images: Sequence[ImageFile]) -> Mapping[str, str | None]:
    """Splits by name where they lie inside: `images/train/1.png` and `masks/train/1.png`, every image in such one."""
    splits = {image.name: split_of(image.name.split("/", 1)[0]) if "/" in image.name else None for image in images}
    return splits if all(splits.values()) else {}


def _nothing_paired(root: Path, cases: Sequence[Case], found: _Found) -> str:
    if found.unclear:
        return f"{root}: no image has a mask that is its alone. {_unclear(found)}"
    if not (cases or found.alone or found.doubled):
        return (
            f"{root} holds no images and masks. Expected are two folders with the same names in them, such as "
            "images/1.png and masks/1.png."
        )
    images = first_few((case.id for case in cases), 3) or "none"
    masks = first_few(found.alone, 3) or "none"
    others = f" {_no_segmentations(found.scans)}" if found.scans else ""
    doubled = f" Names there twice: {first_few(found.doubled, 3)}." if found.doubled else ""
    return (
        f"{root}: no image has a mask of the same name. Images: {images}. Masks: {masks}.{doubled}{others} Name each "
        "mask as its image, with or without an ending such as _mask, _seg or _gt, or write a manifest.csv with image "
        "and mask."
    )


def _unclear(found: _Found) -> str:
    """Which scan of a folder is a mask of?"""
    mask, scans = next(iter(found.unclear.items()))
    which = first_few((f"{mask} ({' or '.join(scans)})" for mask, scans in found.unclear.items()), 3)
    what = f"{count(found.unclear, 'mask')} {agree(found.unclear, 'is', 'are')} called after a folder with several"
    own = PurePosixPath(mask).with_name(PurePosixPath(scans[0]).name + split_suffix(mask)[1])
    return (
        f"{what} scans: {which}. Leave out the scans that are not meant, such as {exclude_option(scans[1:])}, or call "
        f"the mask after one, such as {own}."
    )


def _no_segmentations(scans: Sequence[str]) -> str:
    what = f"{count(scans, 'file')} among the masks {agree(scans, 'is', 'are')} DICOM, but no segmentation (SEG)"
    return f"{what}: {first_few(sorted(scans), 3)}: ignored. Save masks as SEG, NIfTI or PNG."


def _problems(cases: Sequence[Case], found: _Found) -> list[Problem]:
    problems = []
    if found.doubled:
        which = first_few(f"{stem} ({first_few(names)})" for stem, names in found.doubled.items())
        what = f"{count(found.doubled, 'name')} {agree(found.doubled, 'belongs', 'belong')}"
        text = f"{what} to several images or several masks: {which}. Keep one of each."
        problems.append(Problem("error", "doubled-stem", text))
    if found.unclear:
        names = tuple(dict.fromkeys(name for scans in found.unclear.values() for name in scans))
        problems.append(Problem("error", "mask-of-several-series", _unclear(found), names))
    bare = tuple(case.id for case in cases if case.mask is None)
    if bare:
        verbs = agree(bare, "has no mask and counts", "have no mask and count")
        text = f"{len(bare)} of {count(cases, 'image')} {verbs} as unlabelled: {first_few(bare)}."
        problems.append(Problem("warning", "image-without-mask", text, bare))
    if found.alone:
        what = f"{count(found.alone, 'mask')} {agree(found.alone, 'has', 'have')}"
        text = f"{what} no image of the same name: {first_few(sorted(found.alone))}: ignored."
        problems.append(Problem("warning", "mask-without-image", text))
    if found.scans:
        problems.append(Problem("warning", "mask-no-segmentation", _no_segmentations(found.scans)))
    return problems + other_files(found.others)
