"""Images and masks that lie as class folders do, so that masks would be taken for images of a class."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from medtpp.data.case import Problem
from medtpp.data.problems import agree, count, first_few
from medtpp.data.sources import ImageFile
from medtpp.data.sources._names import MASK_ENDING, means_images, means_masks
from medtpp.data.sources.segmentation_folders import without_masks
from medtpp.errors import DataError

_SHARED = 0.5  # of the files in a folder of masks have an image of the same name
_NUMBER = re.compile(r"[ _.-]\d+$")  # of several masks of an image, or of a channel
_CLASSES = "if they are classes all the same: --set data.layout=folders"


def refuse_masks_as_classes(root: Path, images: Sequence[ImageFile], classes: Mapping[str, str]) -> None:
    """Refuse folders whose names say that they hold images or masks.

    Names of files alone say nothing: 001.png in normal/ and in lesion/ are two patients as often as not.

    Args:
        root: The data set.
        images: All that are not left out.
        classes: By the name of each labelled image, the path of its class folder ("train/benign").

    Raises:
        DataError: A class folder is named like one of images; or one is named like one of masks and its files as those
            of another; or there are such folders inside class folders.
    """
    stems: dict[str, set[str]] = defaultdict(set)
    for image in images:
        if image.name in classes:
            folder = classes[image.name]
            stems[folder] |= _bare(image.stem.removeprefix(f"{folder}/"))
    for folder in stems:
        others = [other for other in stems if other != folder and _above(other) == _above(folder)]
        if means_images(_last(folder)):
            raise DataError(_named_as_images(root, folder, others), _ways(root, folder))
        pairs = [other for other in others if means_masks(_last(folder)) and not means_masks(_last(other))]
        for other in pairs:
            shared = len(stems[folder] & stems[other])
            if shared >= _SHARED * len(stems[folder]):
                raise DataError(
                    f"{root}: {folder}/ and {other}/ look like masks and their images, not like classes: {shared} of "
                    f"{len(stems[folder])} names are the same in both. What are they?",
                    _ways(root, other),
                )
    masks = _inside(images)
    if masks:
        patterns = sorted({f"*/{PurePosixPath(name).parent.name}/*" for name in masks})
        raise DataError(
            f"{root}: {count(masks, 'file')} in class folders {agree(masks, 'lies', 'lie')} in a folder of masks, "
            f"beside one of images: {first_few(masks, 3)}. What are they?",
            [
                f"masks that are not wanted: leave them out, --set 'data.exclude={json.dumps(patterns)}'",
                "masks to learn from: write a manifest.csv with the columns image, mask and label",
                "images of the classes all the same: --set data.layout=folders",
            ],
        )


def masks_among_images(images: Iterable[ImageFile], *, meant: bool) -> list[Problem]:
    """Files that are named as the mask of another in the same folder: a.nii.gz and a_seg.nii.gz.

    Args:
        images: All that are not left out.
        meant: Whether the user named the layout, so that this is a warning.
    """
    images = list(images)
    bare, starts = {image.stem for image in images}, set[str]()
    for image in images:
        if not MASK_ENDING.search(image.stem):  # channels count: a_t1, a_t2 and a_seg
            starts |= {image.stem[: gap.start()] for gap in re.finditer(r"[ _.-]", image.stem)}
    found, patterns = [], set[str]()
    for image in images:
        number = _NUMBER.search(image.stem)
        whole = image.stem[: number.start()] if number else image.stem
        ending = MASK_ENDING.search(whole)
        if ending and (whole[: ending.start()] in bare or (not number and whole[: ending.start()] in starts)):
            found.append(image.name)
            patterns.add(f"*{ending[0]}{number[0][0]}[0-9]*" if number else f"*{ending[0]}.*")
    if not found:
        return []
    taken = agree(found, "file is named as the mask of another and is", "files are named as masks of others and are")
    text = (
        f"{len(found)} {taken} taken for {agree(found, 'an image', 'images')}: {first_few(found, 3)}. Leave masks "
        f"out: --set 'data.exclude={json.dumps(sorted(patterns), ensure_ascii=False)}'; to learn from them, move them "
        "to masks/ and the images to images/."
    )
    if meant:
        return [Problem("warning", "masks-among-images", text, tuple(found))]
    return [
        Problem("error", "masks-among-images", f"{text} If they are images: --set data.layout=folders.", tuple(found))
    ]


def _bare(stem: str) -> set[str]:
    """A file's name as it may be in the folder beside: as it is, without the ending of a mask or a channel's number."""
    return {re.sub(r"_\d{4}$", "", MASK_ENDING.sub("", stem))}


def _above(folder: str) -> str:
    return folder.rpartition("/")[0]


def _last(folder: str) -> str:
    return folder.rpartition("/")[2]


def _named_as_images(root: Path, folder: str, others: Sequence[str]) -> str:
    beside = f" (beside it: {first_few(f'{other}/' for other in others)})" if others else ""
    return f"{root}: {folder}/ is named like a folder of images, not like a class{beside}. What is it?"


def _ways(root: Path, folder: str) -> list[str]:
    """What to do, for each thing that a folder of images may be."""
    return [
        "images with masks: call the two folders images/ and masks/; of nnU-Net, add its dataset.json",
        f"images without labels, or class folders: use {root / folder} in place of {root}",
        _CLASSES,
    ]


def _inside(images: Sequence[ImageFile]) -> list[str]:
    kept = {image.name for image in without_masks(images)}
    return [image.name for image in images if image.name not in kept]
