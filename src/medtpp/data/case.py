"""What a data set is made of: cases, classes, and the problems found on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Case:
    """One image with what is known of it.

    Attributes:
        id: Unique in its data set: the image's path relative to the root, with forward slashes.
        image: Where the image lies.
        labels: Class names: none for an unlabelled case, one for a single label, several for multi-label tasks.
            A case of a multi-label data set with no finding has the labels () and `labelled` True.
        labelled: Whether a label is known.
        patient: The patient, where known. Cases of one patient never fall in two splits.
        site: The hospital or scanner, where known.
        split: "train", "val" or "test" where the data set prescribes it.
    """

    id: str
    image: Path
    labels: tuple[str, ...] = ()
    labelled: bool = False
    patient: str | None = None
    site: str | None = None
    split: str | None = None


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
        problems: What the source found wrong while reading.
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    classes: tuple[str, ...] = ()
    multilabel: bool = False
    problems: tuple[Problem, ...] = field(default=())

    def with_cases(self, cases: tuple[Case, ...]) -> Dataset:
        """The same data set with other cases."""
        return replace(self, cases=cases)


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
