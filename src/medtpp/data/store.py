"""Prepared volumes on disk, compressed in small blocks, so that a patch is read without its volume.

Each case is an image, a mask, coordinates of its structures and an index, named by what is in them: the preprocessing,
the structures and the digests of the files' bytes. Runs with other splits or fewer labels share them; any change of an
image, a mask or an option makes other ones. The index is written last and makes a case whole; it holds no file names.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from medtpp.config import Options
from medtpp.data.cache import Progress, cache_root, parallel
from medtpp.data.case import Case, Structure
from medtpp.data.digests import file_digests
from medtpp.data.restore import Restore
from medtpp.data.volume_preprocess import VolumePreprocessing, overlapping, quantise
from medtpp.data.volume_scan import WORKERS, Reader
from medtpp.errors import DataError, OutputError
from medtpp.files import atomic, digest, read_json, write_json
from medtpp.seeds import Seeds

COORDINATES = 2_000  # of the voxels of each structure that are kept for balanced sampling
# Sides of what is compressed together, and of what is read together: several blocks hold a patch, few of them more.
BLOCK = {2: 128, 3: 32}
CHUNK = {2: 512, 3: 64}


class VolumeRecord(Options):
    """What preparing one case told.

    Attributes:
        case: The id of the case.
        shape: (C, *spatial) of its array.
        fingerprint: Of the image as it was read, 32 hexadecimal digits; empty on error.
        restore: The way back to the scan's grid.
        voxels: How many voxels of the array belong to each structure; None where the case has no mask.
        error: Why the case cannot be used, or None.
    """

    case: str
    shape: tuple[int, ...] = ()
    fingerprint: str = ""
    restore: Restore | None = None
    voxels: tuple[int, ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class VolumeStore:
    """Prepared cases. It pickles as paths; every read opens its file for itself, from any thread or process.

    Attributes:
        folder: Where the files lie.
        preprocessing: How they were made.
        names: The stem of each case's files.
        records: What preparing told, in the order of the cases. A row is a place in this order.
    """

    folder: Path
    preprocessing: VolumePreprocessing
    names: tuple[str, ...]
    records: tuple[VolumeRecord, ...]

    @functools.cached_property
    def row(self) -> dict[str, int]:
        """The row of each case id."""
        return {record.case: row for row, record in enumerate(self.records)}

    def image(self, row: int, region: tuple[slice, ...] = ()) -> NDArray[Any]:
        """An image, or a region of space of it, as (C, *region): float16 in [0, 1], or uint8 to divide by 255."""
        return _read(self._path(row, "image"), (slice(None), *region))

    def centre(self, row: int) -> NDArray[Any]:
        """The patch in the middle of an image: (C, *patch)."""
        patch, spatial = self.preprocessing.patch, self.records[row].shape[1:]
        starts = [(size - side) // 2 for size, side in zip(spatial, patch, strict=True)]
        return self.image(row, tuple(slice(first, first + side) for first, side in zip(starts, patch, strict=True)))

    def mask(self, row: int, region: tuple[slice, ...] = ()) -> NDArray[np.uint8]:
        """The mask of a labelled case, or a region of it: (*region) uint8, as `label_mask` numbers structures."""
        return _read(self._path(row, "mask"), region)

    def foreground(self, row: int, structure: int) -> NDArray[np.int32]:
        """Coordinates of at most 2,000 voxels of a structure (from 0) of a labelled case: (n, dims), drawn evenly."""
        voxels = self.records[row].voxels or ()
        kept = [min(COORDINATES, count) for count in voxels]
        first = sum(kept[:structure])
        coordinates = np.load(self._path(row, "foreground"), mmap_mode="r", allow_pickle=False)
        return np.array(coordinates[first : first + kept[structure]])

    def _path(self, row: int, part: str) -> Path:
        return self.folder / f"{self.names[row]}.{part}"


def build_store(
    cases: Sequence[Case],
    preprocessing: VolumePreprocessing,
    structures: Sequence[Structure],
    reader: Reader,
    folder: Path | None = None,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> VolumeStore:
    """Open the store of these cases, preparing first those that it does not hold.

    Runs that want the same case at the same time prepare it once. Cases that cannot be used are told by their records.

    Args:
        cases: Images, with masks or without.
        preprocessing: How to prepare them.
        structures: What masks show; () leaves the masks out.
        reader: Reads images and masks.
        folder: Where stores lie; `cache_root()` by default.
        workers: Threads. Each has one volume in memory.
        progress: Called with the numbers of cases done and in all.

    Raises:
        DataError: There are no cases, or a file changed while it was read.
        OutputError: The store cannot be written.
    """
    if not cases:
        raise DataError("There are no volumes to prepare.")
    folder = folder or cache_root()
    writer = _Writer(folder, preprocessing, tuple(structures), reader)
    names: list[str] = []
    records: list[VolumeRecord] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(parallel(writer.prepare, cases, workers)) as prepared:
            for name, record in prepared:
                names.append(name)
                records.append(record)
                if progress:
                    progress(len(records), len(cases))
    except (OSError, OutputError) as error:
        reason = error.message if isinstance(error, OutputError) else error
        raise OutputError(
            f"Prepared volumes cannot be written to {folder}: {reason} "
            "Set the environment variable MEDTPP_CACHE to a folder with more space."
        ) from error
    return VolumeStore(folder, preprocessing, tuple(names), tuple(records))


@dataclass(frozen=True)
class _Writer:
    folder: Path
    preprocessing: VolumePreprocessing
    structures: tuple[Structure, ...]
    reader: Reader

    def prepare(self, case: Case) -> tuple[str, VolumeRecord]:
        """The name of a case's files and its record; the files are written where they are missing."""
        masked = case.mask is not None and bool(self.structures)
        name = self._name(case, masked)
        record = self._find(name)
        if record is None:
            with FileLock(self.folder / f"{name}.lock"):
                record = self._find(name) or self._write(case, name, masked)
        return name, record.model_copy(update={"case": case.id})

    def _name(self, case: Case, masked: bool) -> str:
        values = repr([structure.values for structure in self.structures]) if masked else ""
        return digest(self.preprocessing.model_dump_json(), values, *file_digests(case, masked))

    def _find(self, name: str) -> VolumeRecord | None:
        """The record of a whole case; None where there is none, or a broken one."""
        try:
            index = read_json(self.folder / f"{name}.json")
            sizes = {part: (self.folder / f"{name}.{part}").stat().st_size for part in index["bytes"]}
            return VolumeRecord.model_validate(index["record"]) if sizes == index["bytes"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, case: Case, name: str, masked: bool) -> VolumeRecord:
        """Prepare a case; needs its lock. Nothing is written of one that cannot be used: it is tried again."""
        for leftover in self.folder.glob(f".{name}.*"):  # of a killed build
            leftover.unlink(missing_ok=True)
        try:
            parts, record = self._make(case, name, masked)
        except DataError as error:
            return VolumeRecord(case="", error=str(error))
        if self._name(case, masked) != name:
            raise DataError(f"{case.id} changed while it was being read. Start again when it is complete.")
        for part, content in parts.items():
            with atomic(self.folder / f"{name}.{part}") as temporary:
                temporary.write_bytes(content)
        sizes = {part: len(content) for part, content in parts.items()}
        write_json(self.folder / f"{name}.json", {"bytes": sizes, "record": record.model_dump(mode="json")})
        return record

    def _make(self, case: Case, name: str, masked: bool) -> tuple[dict[str, bytes], VolumeRecord]:
        volume = self.reader.volume(case)
        fingerprint = self.reader.fingerprint(volume)
        array, restore = self.preprocessing.apply(volume)
        del volume  # before the mask comes: a scan of 512 x 512 x 300 takes 160 MB
        stored = array if self.preprocessing.dtype == "float16" else quantise(array)
        record = VolumeRecord(case="", shape=array.shape, fingerprint=fingerprint, restore=restore)
        parts = {"image": _pack(stored, channels=1)}
        if masked and case.mask is not None:
            del array, stored
            values = self.reader.mask(case.mask, restore.geometry)
            mask = self.preprocessing.apply_mask(values, self.structures, restore)
            counts, coordinates = self._sample(mask, name)
            parts |= {"mask": _pack(mask, channels=0), "foreground": coordinates}
            record = record.model_copy(update={"voxels": counts})
        return parts, record

    def _sample(self, mask: NDArray[np.uint8], name: str) -> tuple[tuple[int, ...], bytes]:
        """How many voxels each structure has, and some of their coordinates as the bytes of a .npy file."""
        bits = overlapping(self.structures)
        counts, chosen = [], []
        for number in range(1, len(self.structures) + 1):
            places = np.flatnonzero(mask >> (number - 1) & 1 if bits else mask == number)
            counts.append(len(places))
            if len(places) > COORDINATES:
                rng = Seeds(0).numpy("foreground", name, number)
                places = np.sort(rng.choice(places, COORDINATES, replace=False))
            chosen.append(places)
        coordinates = np.stack(np.unravel_index(np.concatenate(chosen), mask.shape), axis=1).astype(np.int32)
        stream = io.BytesIO()
        np.save(stream, coordinates)
        return tuple(counts), stream.getvalue()


def _pack(array: NDArray[Any], channels: int) -> bytes:
    """Compress an array in blocks of space; its first axes are `channels`, which are read together."""
    dims = array.ndim - channels
    chunks = (*array.shape[:channels], *(min(CHUNK[dims], size) for size in array.shape[channels:]))
    blocks = (*(1,) * channels, *(min(BLOCK[dims], size) for size in array.shape[channels:]))
    # In memory first: on a full disk blosc2 itself raises nothing that could be told to the user.
    packed = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=chunks,
        blocks=blocks,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1},
    )
    return bytes(packed.to_cframe())


def _read(path: Path, region: tuple[slice, ...]) -> NDArray[Any]:
    # One thread each: patches are read by several threads at a time.
    array: NDArray[Any] = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})[region]
    return array
