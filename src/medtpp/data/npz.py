"""Single rows of the arrays in a NumPy `.npz` archive, without loading the archive."""

from __future__ import annotations

import functools
import math
import os
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import DataError

ARCHIVE = ".npz"
# Rows are decompressed this many together, and the last blocks kept: threads ask for rows nearly in order, not quite.
ROWS, BYTES = 16, 1 << 20  # the larger of 16 rows and 1 MiB
BLOCKS = 8

_LOCK = threading.Lock()


class NpzArray(NamedTuple):
    """What the header of an array says, and where its values begin in the uncompressed member."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


def npz_arrays(path: Path) -> dict[str, NpzArray]:
    """The arrays of an archive by name; values are not read.

    Raises:
        DataError: The file is no archive of NumPy arrays, or an array holds Python objects or is in Fortran's order.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as stream:
                        arrays[member.removesuffix(".npy")] = _header(stream)
            return arrays
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise DataError(f"{path} is not an archive of NumPy arrays: {error}. Download it again.") from error


def read_npz_array(path: Path, name: str) -> NDArray[np.generic]:
    """A whole array, such as labels.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: NDArray[np.generic] = archive[name]
            return array
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: the array {name} cannot be read: {error}. Download the file again.") from error


def read_npz_row(path: Path, name: str) -> NDArray[np.uint8]:
    """One image of a MedMNIST archive.

    An archive is compressed as a whole, so that a row is reached through all rows before it. The place of the last
    rows read is kept: reading rows in order, on several threads as well, decompresses each once; going far back begins
    anew. Memory is a few blocks of rows.

    Args:
        path: The archive.
        name: Split and row as in the case's id, such as "train/00012": row 12 of the array `train_images`.

    Returns:
        (H, W) grey, (H, W, 3) colour or (D, H, W) uint8. Three axes are those of a colour image if the last has three.

    Raises:
        DataError: There is no such row, or the archive is broken there.
    """
    split, _, row = name.partition("/")
    try:
        stamp = path.stat().st_mtime_ns
        # Processes after a fork share the place in an open file: each opens its own.
        with _LOCK:
            opened = path, f"{split}_images.npy", stamp, os.getpid()
            _, array = _open(*opened)
            if array.dtype != np.uint8:
                raise ValueError(f"its values are {array.dtype}, not uint8")
            if not 0 <= int(row) < array.shape[0]:
                raise IndexError(f"there is no row {row} among {array.shape[0]}")
            block, place = divmod(int(row), _rows_of_a_block(array))
            data = _block(*opened, block)
        shape = array.shape[1:]
        size = math.prod(shape)
        return np.frombuffer(data, np.uint8, size, place * size).reshape(shape).copy()
    except (OSError, LookupError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: the image {name} cannot be read: {error}. Download the file again.") from error


def row_dims(path: Path) -> int:
    """2 for an archive of images, 3 for one of volumes; only its headers are read.

    Raises:
        DataError: The file is no archive of images.
    """
    shapes = [array.shape[1:] for name, array in npz_arrays(path).items() if name.endswith("_images")]
    if not shapes:
        raise DataError(f"{path} holds no images as MedMNIST has them (train_images).")
    return 2 if len(shapes[0]) == 2 or shapes[0][-1] == 3 else 3


@functools.lru_cache(maxsize=BLOCKS)
def _block(path: Path, member: str, stamp: int, process: int, number: int) -> bytes:
    stream, array = _open(path, member, stamp, process)
    size = _rows_of_a_block(array) * math.prod(array.shape[1:])
    stream.seek(array.offset + number * size)
    return stream.read(size)


def _rows_of_a_block(array: NpzArray) -> int:
    return max(ROWS, BYTES // max(1, math.prod(array.shape[1:])))


@functools.lru_cache(maxsize=3)  # train, val and test of one archive
def _open(path: Path, member: str, stamp: int, process: int) -> tuple[IO[bytes], NpzArray]:  # noqa: ARG001
    with zipfile.ZipFile(path) as archive:
        stream = archive.open(member)
    return stream, _header(stream)


def _header(stream: IO[bytes]) -> NpzArray:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran and len(shape) > 1:
        raise ValueError("an array is stored in Fortran's order")
    if dtype.hasobject:
        raise ValueError("an array holds Python objects")
    return NpzArray(shape, dtype, stream.tell())
