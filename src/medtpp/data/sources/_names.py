"""What names of folders and files say of what is in them: images, or masks of images."""

from __future__ import annotations

import re

IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs", "scan", "scans", "volume", "volumes"})
MASK_FOLDERS = frozenset(
    {
        *("mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations"),
        *("seg", "segs", "gt", "ground_truth", "groundtruth"),
    }
)
MASK_ENDING = re.compile(r"[ _.-](masks?|labels?|annotations?|segmentations?|segs?|gt|ground_?truth)$", re.IGNORECASE)

# Words that folders of masks are called by although no layout reads them.
_MASK_WORDS = MASK_FOLDERS | {
    *("msk", "msks", "lbl", "lbls", "annot", "annots", "segm", "truth", "contour", "contours", "roi", "rois"),
}
# Words that say nothing of the content beside one that does: imagesTr, images_png.
_ASIDE = frozenset(
    {
        *("tr", "ts", "train", "training", "val", "valid", "validation", "test", "testing"),
        *("png", "jpg", "jpeg", "tif", "tiff", "bmp", "nii", "gz", "nifti", "nrrd", "mha", "mhd", "dcm", "dicom"),
    }
)


def means_images(folder: str) -> bool:
    """Whether a folder's name is one for images and says nothing else: images, imagesTr, img_png; not liver_images."""
    words = _words(folder)
    return not words.isdisjoint(IMAGE_FOLDERS) and words <= IMAGE_FOLDERS | _ASIDE


def means_masks(folder: str) -> bool:
    """Whether a folder's name speaks of masks: labelsTr, msk, lesion_masks."""
    return not _words(folder).isdisjoint(_MASK_WORDS)


def _words(name: str) -> set[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return set(re.findall(r"[^\W\d_]+", apart.casefold()))
