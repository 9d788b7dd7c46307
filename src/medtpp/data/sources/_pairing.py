"""Which mask belongs to which image, by their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from medtpp.data.listing import spelled, stem_of
from medtpp.data.sources import ImageFile
from medtpp.data.sources._names import MASK_ENDING


@dataclass(frozen=True)
class Pairing:
    """What `pair` found. Stems that belong to several images or several masks are doubled, and not paired.

    Attributes:
        masks: The mask of each image that has one, by the image's stem.
        alone: Masks without an image.
        doubled: By stem, the names of the images and of the masks that share it.
    """

    masks: dict[str, str]
    alone: list[str]
    doubled: dict[str, tuple[list[str], list[str]]]


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
        stem: (names, masks_of[stem]) for stem, names in images_of.items() if len(names) > 1 or len(masks_of[stem]) > 1
    }
    return Pairing(
        {stem: names[0] for stem, names in masks_of.items() if stem not in doubled and names}, alone, doubled
    )


@dataclass(frozen=True)
class Matches:
    """The masks of the images and scans in a folder.

    Attributes:
        masks: By the name of their image.
        alone: Masks without an image.
        doubled: By stem, the names of the images and of the masks that share it.
        unclear: By mask, the names of several scans in the folder that it is called after: it may belong to each.
    """

    masks: dict[str, str]
    alone: list[str]
    doubled: dict[str, tuple[list[str], list[str]]]
    unclear: dict[str, list[str]]


def match(images: Sequence[ImageFile], masks: Sequence[str], left_out: Container[str]) -> Matches:
    """Find the mask of each image; of several scans in a folder, also by the folder where a single one is kept.

    Args:
        images: All images.
        masks: Names of masks.
        left_out: Names of images that get no mask, and whose masks are not missed.
    """
    kept = [image for image in images if image.name not in left_out]
    pairing = pair(((image.stem, image.name) for image in kept), masks)
    found = {image.name: pairing.masks[image.stem] for image in kept if image.stem in pairing.masks}
    scans: dict[str, list[str]] = defaultdict(list)
    for image in kept:
        if image.place:
            scans[spelled(image.place)].append(image.name)
    of_folders = pair(((place, place) for place in scans), pairing.alone)
    alone, doubled, unclear = of_folders.alone, dict(pairing.doubled), {}
    for place, mask in of_folders.masks.items():
        if len(scans[place]) > 1:
            unclear[mask] = scans[place]
        elif scans[place][0] in found:
            alone.append(mask)
        else:
            found[scans[place][0]] = mask
    doubled |= {place: (scans[place], its_masks) for place, (_, its_masks) in of_folders.doubled.items()}
    names = ((name, image.name) for image in images if image.name in left_out for name in _names(image))
    return Matches(found, pair(names, alone).alone, doubled, unclear)


def _names(image: ImageFile) -> set[str]:
    """What the mask of an image may be called."""
    return {image.stem, spelled(image.place)} if image.place else {image.stem}
