"""Every case of a data set read once: what preparing, splitting and checking need to know of it.

What reading a case told is kept in the cache, under a name made from its files' bytes, so that the next command need
not read it again. A case that cannot be used is not kept: it is tried again.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medtpp.config import Modality
from medtpp.data.cache import Progress, cache_root, parallel
from medtpp.data.case import Case, Structure
from medtpp.data.decode import orientation
from medtpp.data.digests import file_digests
from medtpp.data.geometry import Geometry, Volume
from medtpp.data.restore import axes_to_ras
from medtpp.data.volume_preprocess import content_box, label_mask
from medtpp.errors import DataError, OutputError
from medtpp.files import atomic, digest
from medtpp.seeds import Seeds

AIR = -500.0  # HU: halfway between air and water, as usual for the outline of the body
SAMPLES = 10_000  # voxels per case that percentiles over the data set are made of; nnU-Net's
WORKERS = 4  # volumes in memory at a time; SimpleITK itself uses all cores
MOST_VALUES = 64  # in a mask; more are grey levels
FIRST_QUARTER_TURN = 5  # of EXIF's orientations: from here on rows and columns are swapped
VERSION = 3  # of what is kept; changes with the arithmetic

Units = Literal["HU", "levels", "none"]


@dataclass(frozen=True)
class Reader:
    """How files become arrays.

    Attributes:
        volume: Reads a case's image; raises DataError.
        mask: Reads a mask on a known grid, its values as they are in the file; raises DataError.
        fingerprint: 32 hexadecimal digits, equal for equal images.
    """

    volume: Callable[[Case], Volume]
    mask: Callable[[Path, Geometry], NDArray[Any]]
    fingerprint: Callable[[Volume], str]


def _no_samples() -> NDArray[np.float32]:
    return np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class VolumeScan:
    """What reading one case told; axes are in RAS order, as preprocessing turns them.

    Attributes:
        case: The id of the case.
        fingerprint: Of the image as it was read, 32 hexadecimal digits; empty on error.
        shape: In voxels.
        spacing: In mm (steps of the file where it tells no spacing).
        known: Whether the file tells its spacing.
        units: Of the values; of CT in other files than DICOM by the data set's modality.
        channels: How many.
        constant: Whether all voxels of a channel are the same.
        content: Shape of the box of what is brighter than air.
        values: The values in the mask, 0 and negative ones included; None without a mask.
        mask_fingerprint: Of the mask as it was read, 32 hexadecimal digits; empty without one.
        labelled: Whether the mask shows any structure.
        outside: Whether structures lie outside that box.
        turned: Whether image and mask differ in their EXIF orientations, and their size does not tell on which view the
            mask was drawn.
        samples: (C, n) voxels drawn at random, of the structures where there are any.
        error: Why the case cannot be used, or None.
    """

    case: str
    fingerprint: str = ""
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    known: bool = False
    units: Units = "none"
    channels: int = 0
    constant: bool = False
    content: tuple[int, ...] = ()
    values: tuple[int, ...] | None = None
    mask_fingerprint: str = ""
    labelled: bool = False
    outside: bool = False
    turned: bool = False
    samples: NDArray[np.float32] = field(default_factory=_no_samples, repr=False)
    error: str | None = None

    def without_samples(self) -> VolumeScan:
        """The same without what planning alone needs: 40 kB for each channel, in every process of a comparison."""
        return replace(self, samples=_no_samples())


def scan_volumes(
    cases: Sequence[Case],
    structures: Sequence[Structure] | None,
    modality: Modality,
    reader: Reader,
    folder: Path | None = None,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> dict[str, VolumeScan]:
    """Read all cases that were not read before; in memory are one volume per worker and 10,000 voxels per case.

    Args:
        cases: With masks or without.
        structures: What masks show; () if nobody has named it, so that all values above 0 are structures; None leaves
            the masks alone.
        modality: "ct": files that tell no units, such as NIfTI, hold HU.
        reader: Reads images and masks.
        folder: Where what reading told is kept; `cache_root()` by default.
        workers: Threads.
        progress: Called with the numbers of cases done and in all.

    Returns:
        What each told, by case id; cases that cannot be used say why.
    """

    def examine(case: Case) -> VolumeScan:
        name = _name(case, structures, modality)
        kept = _find(home / name)
        if kept is not None:
            return kept
        try:
            scan = _examine(case, structures, modality, reader)
        except DataError as error:
            return VolumeScan(case.id, error=str(error))
        if _name(case, structures, modality) == name:  # else it changed while it was read
            _keep(home / name, scan)
        return scan

    home = folder or cache_root()
    found = {}
    with closing(parallel(examine, cases, workers)) as results:
        for done, scan in enumerate(results, start=1):
            found[scan.case] = scan
            if progress:
                progress(done, len(cases))
    return found


def _name(case: Case, structures: Sequence[Structure] | None, modality: Modality) -> str:
    masked = case.mask is not None and structures is not None
    values = repr([structure.values for structure in structures or ()]) if masked else ""
    return digest(str(VERSION), case.id, values, str(modality == "ct"), *file_digests(case, masked)) + ".scan"


def _find(path: Path) -> VolumeScan | None:
    """What was kept; None where there is nothing, or a broken file."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            told = json.loads(str(kept["told"]))
            for name in ("shape", "spacing", "content", "values"):
                told[name] = None if told[name] is None else tuple(told[name])
            return VolumeScan(**told, samples=kept["samples"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _keep(path: Path, scan: VolumeScan) -> None:
    told = {name: value for name, value in asdict(scan).items() if name != "samples"}
    stream = io.BytesIO()
    np.savez_compressed(stream, told=json.dumps(told), samples=scan.samples)
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(stream.getvalue())
    except OutputError:
        pass  # a full disk: `check` needs none, and whoever goes on to prepare volumes is told


def structures_in(scans: Iterable[VolumeScan]) -> tuple[Structure, ...]:
    """A structure for each value above 0, where nobody has named them: by its number, or "foreground" for one.

    None where there are too many values for labels: `check` tells that they are grey levels.
    """
    found = {value for scan in scans for value in scan.values or ()} - {0}
    if len(found) > MOST_VALUES:
        return ()
    values = sorted(value for value in found if value > 0)
    if len(values) == 1:
        return (Structure("foreground", (values[0],)),)
    return tuple(Structure(str(value), (value,)) for value in values)


def _labels(path: Path, mask: NDArray[Any], structures: Sequence[Structure]) -> NDArray[Any]:
    """Where the structures are; anything above 0 where nobody has named them."""
    try:
        return label_mask(mask, structures) if structures else mask > 0
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from error


def _turned(image: Path, mask: Path, geometry: Geometry) -> bool:
    """See `VolumeScan.turned`; image and mask are known to have one size when both are upright."""
    own, other = orientation(image), orientation(mask)
    if own == other:
        return False
    # The mask fits the upright view. Of an oblong image that is turned by a quarter it would not fit the stored one.
    quarter = (own >= FIRST_QUARTER_TURN) != (other >= FIRST_QUARTER_TURN)
    return not quarter or geometry.shape[0] == geometry.shape[1]


def _examine(case: Case, structures: Sequence[Structure] | None, modality: Modality, reader: Reader) -> VolumeScan:
    volume = reader.volume(case)
    geometry = volume.geometry
    units = volume.units
    if units == "levels" and geometry.dims == 3 and geometry.known:
        units = "none"  # a scan whose values happen to fit into 8 bits
    if units == "none" and modality == "ct":
        units = "HU"
    order, _ = axes_to_ras(geometry)
    box = content_box(volume.array, AIR if units == "HU" else None, (0.0,) * geometry.dims)
    values, foreground, outside, mask_fingerprint, turned = None, np.arange(0), False, "", False
    if case.mask is not None and structures is not None:
        mask = reader.mask(case.mask, geometry)
        labels = _labels(case.mask, mask, structures)
        foreground = np.flatnonzero(labels)
        values = tuple(np.unique(mask).tolist())
        mask_fingerprint = digest(str(mask.shape), hashlib.sha256(np.ascontiguousarray(mask).data).hexdigest())[:32]
        outside = int(np.count_nonzero(labels[tuple(slice(*ends) for ends in box)])) < len(foreground)
        turned = _turned(case.image, case.mask, geometry)
    rng = Seeds(0).numpy("fingerprint", case.id)
    if len(foreground):
        chosen = rng.choice(foreground, min(SAMPLES, len(foreground)), replace=False)
    else:
        chosen = rng.integers(0, math.prod(geometry.shape), SAMPLES)
    return VolumeScan(
        case=case.id,
        fingerprint=reader.fingerprint(volume),
        shape=tuple(geometry.shape[axis] for axis in order),
        spacing=tuple(geometry.spacing[axis] for axis in order),
        known=geometry.known,
        units=units,
        channels=len(volume.array),
        constant=any(channel.min() == channel.max() for channel in volume.array),
        content=tuple(box[axis][1] - box[axis][0] for axis in order),
        values=values,
        mask_fingerprint=mask_fingerprint,
        labelled=bool(len(foreground)),
        outside=outside,
        turned=turned,
        samples=np.stack([channel.reshape(-1)[chosen] for channel in volume.array]).astype(np.float32),
    )
