"""What recipes of DICOM collections share. No text of a header leaves these functions but codes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from medtpp.data.recipes.base import files_in
from medtpp.data.volumes import Series, find_series
from medtpp.data.volumes.header import is_dicom


def dicom_folders(folder: Path) -> Iterator[Path]:
    """All folders that directly hold DICOM files, sorted."""
    for path, inside, names in os.walk(folder, followlinks=True):
        inside.sort()
        if names and any(is_dicom(file) for file in files_in(Path(path))):
            yield Path(path)


def only_scan(folder: Path) -> Series | str | None:
    """The volume that the folder of a series holds; why there is none that can be used; None where no image is.

    A manifest names the folder, so that it must hold one scan alone.
    """
    scans = find_series(folder)
    if not scans:
        return None
    if len(scans) > 1:
        return f"the folder holds {len(scans)} scans ({'; '.join(scan.summary() for scan in scans[:4])})."
    errors = [problem.message for problem in scans[0].problems if problem.severity == "error"]
    return errors[0] if errors else scans[0]
