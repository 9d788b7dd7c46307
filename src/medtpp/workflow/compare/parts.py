"""What a study consists of: comparisons, each of them a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StudyPart:
    """One comparison of a study; "" where that axis is not there.

    Attributes:
        dataset: Name of the data set.
        backbone: Name of the backbone.
        fold: Of a cross-validation.
        site: That is held out.
        folder: Of the comparison.
    """

    dataset: str
    backbone: str
    fold: str
    site: str
    folder: Path
