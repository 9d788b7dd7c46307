"""A part of a study: one comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StudyPart:
    """One comparison of a study; "" where the study has no such axis.

    Attributes:
        dataset: Name of the data set.
        backbone: Name of the backbone, where the study names backbones.
        fold: Number of the fold that the test cases are, from "1" on.
        site: The site that was left out for testing.
        folder: Of the comparison.
    """

    dataset: str
    backbone: str
    fold: str
    site: str
    folder: Path
