"""What names cached volumes: digests of the bytes of a case's files."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path

from medtpp.data.cache import case_digest
from medtpp.data.case import Case
from medtpp.data.npz import ARCHIVE
from medtpp.files import digest

DETACHED = (".mhd", ".nhdr", ".hdr")


def file_digests(case: Case, masked: bool) -> Iterator[str]:
    """Digests of the files of a case, with its mask where `masked`, each after what it is to the case."""
    if case.image.suffix.lower() == ARCHIVE:  # one file for all cases
        yield from ("image", case_digest(case))
        return
    roles = {
        "image": case.files or (case.image,),
        "channel": case.channels,
        "mask": (case.mask,) if masked and case.mask is not None else (),
    }
    for role, paths in roles.items():
        for path in paths:
            # A header such as .mhd or .nhdr leaves the voxels to a file of the same stem.
            parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*")) if path.suffix in DETACHED else [path]
            for part in parts:
                yield role
                yield _file_digest(part)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return digest("unreadable", str(error.strerror))
