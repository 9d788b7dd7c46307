"""What a recipe is, and what recipes share: finding folders, looking into headers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from medtpp.data.decode import FORMATS
from medtpp.data.volumes.read import ITK_SUFFIXES, NIFTI_SUFFIXES, has_suffix
from medtpp.errors import DataError

DEPTH = 4  # levels of folders below the source in which a download is looked for


@dataclass(frozen=True)
class Part:
    """What is known to be in a whole download.

    Attributes:
        name: Of the part, as the data set calls it.
        count: How many cases it has.
        names: Theirs, where the data set numbers them.
        what: A case is, in the plural.
    """

    name: str
    count: int
    names: tuple[str, ...] = ()
    what: str = "images"


@dataclass(frozen=True)
class Row:
    """A row of the manifest.

    Attributes:
        image: A file, or the folder of a DICOM series.
        mask: Its segmentation.
        label: Its class.
        patient: As the data set publishes its pseudonyms; "" where it does not.
        site: Hospital or scanner.
        split: Where the data set prescribes it; "" to be drawn.
        stratum: What the draw keeps in proportion; by default the label.
        extra: Further columns, which medtpp does not read.
        make: Writes what cannot be read in place. Raises DataError.
        sources: The official image and mask where `make` writes one of the two; () where their sizes are not to be
            compared beforehand.
    """

    image: Path
    mask: Path | None = None
    label: str = ""
    patient: str = ""
    site: str = ""
    split: str = ""
    stratum: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    make: Callable[[], None] | None = None
    sources: tuple[Path, ...] | None = None


@dataclass
class Survey:
    """What a download holds.

    Attributes:
        rows: Its cases.
        found: Names of the cases by part, to be held against `Recipe.parts`.
        faults: What cannot be used: "what: why".
        notes: What was left out on purpose.
    """

    rows: list[Row] = field(default_factory=list)
    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Recipe(ABC):
    """One data set.

    Attributes:
        title: Its name in full.
        task: What is learnt, for lists.
        kind: "classification" or "segmentation".
        modality: For `data.modality`.
        licence: In a few words; the source's own page counts.
        access: Where to ask for the data.
        citation: Whom to cite.
        layout: What the download looks like, line by line.
        parts: What is in it.
        shares: Of the cases whose split is drawn, by split.
        protocol: The split in words.
        structures: Names of the values in masks.
    """

    title: ClassVar[str]
    task: ClassVar[str]
    kind: ClassVar[Literal["classification", "segmentation"]]
    modality: ClassVar[str]
    licence: ClassVar[str]
    access: ClassVar[str]
    citation: ClassVar[str]
    layout: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[Part, ...]]
    shares: ClassVar[Mapping[str, float]]
    protocol: ClassVar[str]
    structures: ClassVar[Mapping[str, int | list[int]]] = {}

    @abstractmethod
    def survey(self, source: Path, out: Path) -> Survey:
        """Look through a download; no file is changed or written.

        Args:
            source: The folder that the user named.
            out: Where `Row.make` may write.

        Raises:
            DataError: The folder has another layout.
        """

    def unknown(self, source: Path) -> DataError:
        """The error for another layout."""
        return DataError(f"{source} is not {self.title} as it is downloaded. Expected in there:", self.layout)


def folders(source: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The source and the folders in it, those nearer to it first, each level sorted."""
    level = [source]
    for _ in range(depth + 1):
        yield from level
        level = [
            Path(entry.path)
            for folder in level
            for entry in _entries(folder)
            if entry.is_dir() and entry.name[0] != "."
        ]


def locate(source: Path, *names: str) -> Path | None:
    """The first folder that holds folders of all these names."""
    return next((folder for folder in folders(source) if all((folder / name).is_dir() for name in names)), None)


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """Files of a folder with one of the suffixes (with any for none), sorted by name; hidden ones left out."""
    entries = (entry for entry in _entries(folder) if entry.name[0] != ".")
    return [Path(entry.path) for entry in entries if entry.name.lower().endswith(suffixes or "") and entry.is_file()]


def size_of(path: Path) -> tuple[int, ...]:
    """Columns and rows (and slices) of a file by its header; pixels are not read.

    Raises:
        DataError: It has no readable header. The reason without the path.
    """
    try:
        if not path.stat().st_size:
            raise DataError("the file is empty (0 bytes).")
        if has_suffix(path, NIFTI_SUFFIXES):
            import nibabel

            return tuple(nibabel.load(path).shape[:3])
        if has_suffix(path, ITK_SUFFIXES):
            import SimpleITK as sitk  # noqa: N813 - the name that everybody knows it by

            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            return tuple(reader.GetSize())
        from PIL import Image

        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except DataError:
        raise
    except OSError as error:
        reason = f"cannot be opened ({error.strerror})." if error.strerror else "is broken, or of another format."
        raise DataError(reason) from error
    except Exception as error:  # nibabel and SimpleITK raise many types on a broken header
        raise DataError("is broken, or of another format. Download it again.") from error


def compared_sizes(row: Row) -> str | None:
    """Why a row cannot be used, by the headers of its files; None if nothing is wrong."""
    files = (row.image, row.mask) if row.sources is None else row.sources
    sizes = []
    for path in filter(None, files):
        if path.is_dir():
            return None  # a DICOM series, which its recipe has looked into
        try:
            sizes.append(size_of(path))
        except DataError as error:
            return f"{path}: {error.message}"
    if len(set(sizes)) > 1:
        shapes = " and ".join(" x ".join(map(str, size)) for size in sizes)
        return f"{files[1]}: the mask has another size than its image ({shapes} of {row.image.name})."
    return None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"Cannot open the folder {folder}: {error.strerror}. Check its permissions.") from error
