"""What a data set is made of: cases, classes, and the problems found on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

SPLITS = ("train", "val", "test")
MASK_VALUES = 1 << 16  # between the least and the greatest value of a mask: more are no labels


@dataclass(frozen=True)
class Structure:
    """What a segmentation looks for: an organ, a lesion, or a region made of several.

    Attributes:
        name: For tables.
        values: The values in mask files that belong to it. Structures that share a value overlap.
    """

    name: str
    values: tuple[int, ...]

    @property
    def value(self) -> int:
        """What stands for it in predicted masks: its value in those of the training, of several the smallest.

        Structures that share no value are told apart by it, and read back it means the same structure.
        """
        return min(self.values)


@dataclass(frozen=True)
class Case:
    """One image or volume with what is known of it.

    Attributes:
        id: Unique in its data set: the image's path relative to the root, with forward slashes.
        image: Where the image lies; of a DICOM series, its first slice.
        labels: Class names: none for an unlabelled case, one for a single label, several for multi-label tasks.
            A case of a multi-label data set with no finding has the labels () and `labelled` True.
        labelled: Whether a label is known.
        patient: The patient, where known. Cases of one patient never fall in two splits.
        site: The hospital or scanner, where known.
        split: "train", "val" or "test" where the data set prescribes it.
        files: The slices of a DICOM series in their order in space; () where one file holds the image.
        channels: Further files of the same shape and geometry, such as other MRI sequences, each a channel.
        mask: Its segmentation, where there is one.
    """

    id: str
    image: Path
    labels: tuple[str, ...] = ()
    labelled: bool = False
    patient: str | None = None
    site: str | None = None
    split: str | None = None
    files: tuple[Path, ...] = ()
    channels: tuple[Path, ...] = ()
    mask: Path | None = None


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set. Errors stop a run, warnings are shown.

    Attributes:
        severity: "error" or "warning".
        code: A short stable name, such as "patient-in-two-splits".
        message: What is wrong, where, and what to do.
        cases: Ids of the cases concerned (may be empty).
    """

    severity: Literal["error", "warning"]
    code: str
    message: str
    cases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Cases of one folder or manifest.

    Attributes:
        root: The folder that case ids are relative to.
        layout: The name of the source that read it.
        classes: Class names in sorted order; empty when nothing is labelled.
        multilabel: Whether a case may have several labels.
        structures: What masks show, in the order of the logits; empty where no case has a mask.
        problems: What the source found wrong while reading.
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    classes: tuple[str, ...] = ()
    multilabel: bool = False
    structures: tuple[Structure, ...] = ()
    problems: tuple[Problem, ...] = field(default=())

    def for_classification(self) -> Dataset:
        """The same data set without its masks."""
        cases = tuple(replace(case, mask=None) for case in self.cases)
        return replace(self, cases=cases, structures=())

    def for_segmentation(self) -> Dataset:
        """The same data set, with its masks in the place of labels: a case that has one is labelled."""
        cases = tuple(replace(case, labels=(), labelled=case.mask is not None) for case in self.cases)
        return replace(self, cases=cases, classes=(), multilabel=False)

    def with_cases(self, cases: tuple[Case, ...]) -> Dataset:
        """The same data set with other cases."""
        return replace(self, cases=cases)


class Record(Protocol):
    """What reading one image told, of every kind of image."""

    @property
    def case(self) -> str:
        """The id of the case."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal images; empty on error."""

    @property
    def error(self) -> str | None:
        """Why the image cannot be used, or None."""


@dataclass(frozen=True)
class ImageRecord:
    """What decoding one image told.

    Attributes:
        case: The id of the case.
        width: Columns in pixels, after EXIF rotation.
        height: Rows in pixels.
        bits: 8 or 16 bits per channel.
        colour: Whether the channels differ (a grey image stored as RGB is not coloured).
        fingerprint: sha256 of the decoded pixels with their shape, 32 hexadecimal digits; empty on error.
        error: Why the image cannot be read, or None.
    """

    case: str
    width: int = 0
    height: int = 0
    bits: int = 8
    colour: bool = False
    fingerprint: str = ""
    error: str | None = None
