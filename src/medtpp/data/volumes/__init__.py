"""Volumes and images of the formats that hospitals have, with their place in the patient.

`read_volume` and `read_mask` read a case; `find_series` lists the scans in a folder of DICOM files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medtpp.data.volumes.mask import read_mask
from medtpp.data.volumes.read import read_volume, volume_fingerprint

if TYPE_CHECKING:
    from medtpp.data.volumes.series import Series, find_series

__all__ = ["Series", "find_series", "read_mask", "read_volume", "volume_fingerprint"]


def __getattr__(name: str) -> Any:
    # pydicom is loaded when a folder is searched, not when a PNG is read.
    if name in ("Series", "find_series"):
        from medtpp.data.volumes import series

        return getattr(series, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
