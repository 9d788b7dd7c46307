"""Data layouts, one file each: a class registered in `medtpp.config.SOURCES` that recognises and reads one layout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import ClassVar, Protocol

from medtpp.config import DataOptions
from medtpp.data.case import Case, Dataset
from medtpp.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


class Source(Protocol):
    """What a data layout offers.

    Attributes:
        summary: The layout in one line, for lists and error messages.
    """

    summary: ClassVar[str]

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether the path looks like this layout; a quick look that reads no image."""

    @staticmethod
    def read(path: Path, options: DataOptions) -> Dataset:
        """Read all cases, excluded ones too. Raises DataError where nothing at all can be read."""


def split_of(name: str) -> str | None:
    """The split that a folder or a cell names ("Validation" is "val"), or None."""
    return _SPLIT_NAMES.get(name.strip().casefold())


def class_names(cases: Iterable[Case]) -> tuple[str, ...]:
    """The labels of some cases in sorted order."""
    return tuple(sorted({label for case in cases for label in case.labels}))


def is_excluded(case: str, patterns: Sequence[str]) -> bool:
    """Whether a case id equals or matches one of the patterns; `*` also matches slashes."""
    return any(case == pattern or fnmatchcase(case, pattern) for pattern in patterns)


def first_few(items: Iterable[object], limit: int = 5) -> str:
    """The first items as text with the number of the rest: "a, b and 7 more"."""
    rest = iter(items)
    text = ", ".join(str(item) for item in islice(rest, limit))
    left = sum(1 for _ in rest)
    return f"{text} and {left} more" if left else text


def list_images(folder: Path) -> tuple[list[str], list[str]]:
    """All files under a folder, links followed, hidden ones and droppings of operating systems left out.

    Returns:
        Paths relative to the folder with forward slashes, each list sorted: images by suffix, and other files.

    Raises:
        DataError: A folder cannot be opened, or a name is not UTF-8 and so cannot be written to any table.
    """
    files = list(_walk(str(folder), "", frozenset()))
    broken = sorted(name.encode("utf-8", "replace").decode() for name in files if not _is_text(name))
    if broken:
        raise DataError(f"{folder}: {len(broken)} file names are not UTF-8: {first_few(broken)}. Rename them.")
    images = sorted(name for name in files if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)  # noqa: PTH122
    return images, sorted(set(files).difference(images))


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
