"""The files in a folder, and what their names say they are."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from medtpp.data.problems import first_few
from medtpp.errors import DataError

PLANE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
VOLUME_SUFFIXES = frozenset({".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"})
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
IMAGE_SUFFIXES = PLANE_SUFFIXES | VOLUME_SUFFIXES  # DICOM is told by content: see `find_images`
_DETACHED = (".raw", ".zraw", ".raw.gz")  # voxels of the header (.mhd, .nhdr) beside them
_IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


def split_suffix(name: str) -> tuple[str, str]:
    """A name or path without its suffix, and the suffix in lower case; ".nii.gz" is one suffix."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    if suffix.lower() == ".gz" and stem.lower().endswith(".nii"):
        return stem[:-4], ".nii.gz"
    return stem, suffix.lower()


def stem_of(name: str) -> str:
    """A name or path without the suffix of an image's format.

    DICOM files are often named by a UID without any suffix, such as 1.2.840.5: what follows its last dot stays.
    """
    stem, suffix = split_suffix(name)
    return stem if suffix in IMAGE_SUFFIXES | DICOM_SUFFIXES else name


def spelled(name: str) -> str:
    """A name in one of the ways to write its letters (NFC), to compare it with another.

    Macs cut an umlaut in two signs where other systems have one, and copies keep that. Files are opened by the name
    that they have.
    """
    return unicodedata.normalize("NFC", name)


def find_spelled(root: Path, name: str) -> Path:
    """`root / name`, or the file or folder there whose name is `spelled` the same."""
    path = root / name
    if name.isascii() or os.path.exists(path):  # noqa: PTH110  (Path.exists would raise on a name that is too long)
        return path
    place = root
    for part in Path(name).parts:
        there = [entry.name for entry in place.iterdir()] if os.path.isdir(place) else []  # noqa: PTH112
        same = [entry for entry in there if spelled(entry) == spelled(part)]
        place /= same[0] if len(same) == 1 else part
    return place


def list_images(folder: Path) -> tuple[list[str], list[str]]:
    """All files under a folder, links followed, hidden ones and droppings of operating systems left out.

    Returns:
        Paths relative to the folder with forward slashes, each list sorted: images by suffix, and other files. DICOM
        files are among the others, data files that belong to a .mhd or .nhdr header in neither.

    Raises:
        DataError: A folder cannot be opened, or a name is not UTF-8 and so cannot be written to any table.
    """
    files = list(_walk(str(folder), "", frozenset()))
    broken = sorted(name.encode("utf-8", "replace").decode() for name in files if not _is_text(name))
    if broken:
        raise DataError(f"{folder}: {len(broken)} file names are not UTF-8: {first_few(broken)}. Rename them.")
    parts = {name: split_suffix(name) for name in sorted(files)}
    images = [name for name, (_, suffix) in parts.items() if suffix in IMAGE_SUFFIXES]
    headers = {stem for stem, suffix in parts.values() if suffix in (".mhd", ".nhdr")}
    voxels = {
        name for name in parts for end in _DETACHED if name.lower().endswith(end) and name[: -len(end)] in headers
    }
    others = [name for name, (_, suffix) in parts.items() if suffix not in IMAGE_SUFFIXES and name not in voxels]
    return images, others


def _walk(folder: str, prefix: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up
        return
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name[0] != "." and entry.name.casefold() not in _IGNORED]
    except OSError as error:
        raise DataError(f"Cannot open the folder {folder}: {error.strerror}. Check its permissions.") from error
    for entry in found:
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {real})
        else:
            yield prefix + entry.name


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
