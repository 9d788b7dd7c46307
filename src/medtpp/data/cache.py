"""Images decoded once, into a memory-mapped file that parallel runs share.

A cache is named by what is in it: the preprocessing and the digests of the image files' bytes (of an archive, of its
rows). Renaming or copying the data still finds it; any change of an image or an option makes another one. Its index
holds digests, no file names.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import platformdirs
from filelock import FileLock
from numpy.typing import NDArray

from medtpp.data.case import Case, ImageRecord
from medtpp.data.decode import Pixels, decode, pixel_fingerprint, read_bytes, without_colour
from medtpp.data.npz import ARCHIVE, read_npz_row
from medtpp.data.preprocess import Preprocessing
from medtpp.errors import DataError, OutputError
from medtpp.files import atomic, digest, read_json, write_json

Progress = Callable[[int, int], None]
S = TypeVar("S")
T = TypeVar("T")

DOWNLOADS = "medmnist"  # folder of the cache for files that were asked for by name
_OWN_FILE = re.compile(r"\.?[0-9a-f]{64}\.(pixels|json|lock|image|mask|foreground|scan).*")


@dataclass(frozen=True)
class ImageCache:
    """Prepared images of a data set. It pickles as a path; every process maps the file for itself.

    Attributes:
        path: The file of N x C x S x S bytes.
        shape: (N, C, S, S). N counts different images: byte-identical files share a row.
        records: What decoding told, in the order of the cases.
        row: The row of each case id. Rows of unreadable images are zeros.
    """

    path: Path
    shape: tuple[int, int, int, int]
    records: tuple[ImageRecord, ...]
    row: dict[str, int]

    @functools.cached_property
    def images(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        """(N, C, S, S) uint8, read-only, mapped at the first use."""
        return np.memmap(self.path, dtype=np.uint8, mode="r", shape=self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "images"}


def build(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    folder: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ImageCache:
    """Open the cache of these cases, decoding them first where it does not exist.

    Runs that want the same cache at the same time build it once. Unreadable images are told by their records.

    Args:
        cases: Images to prepare.
        preprocessing: How.
        folder: Where caches lie; `cache_root()` by default.
        workers: Threads; one per core by default.
        progress: Called with the numbers of images done and in all, while decoding.

    Raises:
        DataError: There are no cases, or a file changed while it was read.
        OutputError: The cache cannot be written.
    """
    if not cases:
        raise DataError("There are no images to prepare.")
    folder = folder or cache_root()
    digests = list(parallel(case_digest, cases, workers))
    rows = {name: row for row, name in enumerate(sorted(set(digests)))}
    path = folder / f"{digest(preprocessing.model_dump_json(), *rows)}.pixels"
    shape = (len(rows), preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    contents = _read_index(path, shape)
    if contents is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                different = dict(zip(digests, cases, strict=True))
                contents = _read_index(path, shape) or _write(path, rows, different, preprocessing, workers, progress)
        except (OSError, OutputError) as error:
            reason = error.message if isinstance(error, OutputError) else error
            raise OutputError(
                f"The image cache cannot be written to {folder}: {reason} "
                "Set the environment variable MEDTPP_CACHE to a folder with more space."
            ) from error
    return ImageCache(
        path=path,
        shape=shape,
        records=tuple(replace(contents[name], case=case.id) for name, case in zip(digests, cases, strict=True)),
        row={case.id: rows[name] for name, case in zip(digests, cases, strict=True)},
    )


def scan(cases: Sequence[Case], workers: int | None = None, progress: Progress | None = None) -> dict[str, ImageRecord]:
    """Decode all images, keep none: one record per case id. Unreadable images are told by their records."""
    records = {}
    with closing(parallel(lambda case: _examine(case)[1], cases, workers)) as found:
        for done, (case, record) in enumerate(zip(cases, found, strict=True), start=1):
            records[case.id] = replace(record, case=case.id)
            if progress:
                progress(done, len(cases))
    return records


def read_pixels(case: Case) -> Pixels:
    """The image of a case: a file that `decode` reads, or a row of an archive of images.

    Returns:
        (H, W) grey or (H, W, 3) colour, uint8 or uint16.

    Raises:
        DataError: It cannot be read. The message holds the reason without the path.
    """
    return _pixels(_content(case))


def case_digest(case: Case) -> str:
    """The sha256 of a file's bytes, or of a row of an archive; of the reason where there are none."""
    try:
        return _digest(_content(case))
    except DataError as error:
        return _digest(error)


def cache_root() -> Path:
    """Where caches lie: $MEDTPP_CACHE, or the user's cache folder."""
    return Path(os.environ.get("MEDTPP_CACHE") or platformdirs.user_cache_dir("medtpp", appauthor=False))


def cache_size() -> int:
    """Bytes that caches take in `cache_root()`."""
    return sum(path.stat().st_size for path in _own_files(cache_root()))


def clear_cache() -> None:
    """Delete all caches in `cache_root()`. Other files there stay."""
    for path in _own_files(cache_root()):
        path.unlink(missing_ok=True)


def _own_files(folder: Path) -> list[Path]:
    downloads = [path for path in (folder / DOWNLOADS).glob("*") if path.suffix in (ARCHIVE, ".lock")]
    return [*downloads, *(path for path in folder.glob("*") if _OWN_FILE.fullmatch(path.name))]


def parallel(work: Callable[[S], T], items: Iterable[S], workers: int | None) -> Generator[T]:
    """What `work` makes of each item, in their order, on several threads; those not begun are dropped when closed."""
    # Threads: Pillow, hashlib and most of NumPy work without the interpreter lock, and nothing has to be copied between
    # processes.
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _content(case: Case) -> bytes | NDArray[np.uint8]:
    """A file's bytes, or a row of an archive. The reason why there are none names no file: records are kept."""
    if case.image.suffix.lower() != ARCHIVE:
        return read_bytes(case.image)
    try:
        return read_npz_row(case.image, case.id)
    except DataError as error:
        raise DataError(error.message.removeprefix(f"{case.image}: ")) from error


def _pixels(content: bytes | NDArray[np.uint8]) -> Pixels:
    return decode(content) if isinstance(content, bytes) else without_colour(content)


def _digest(content: bytes | NDArray[np.uint8] | DataError) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    if isinstance(content, DataError):
        return digest("unreadable", content.message)
    return digest("row", str(content.shape), content.tobytes())


def _examine(case: Case) -> tuple[str, ImageRecord, Pixels | None]:
    """The digest of what was read, what decoding it told, and the image unless there was an error."""
    name = None
    try:
        content = _content(case)
        name = _digest(content)
        pixels = _pixels(content)
    except DataError as error:
        return name or _digest(error), ImageRecord(case="", error=error.message), None
    height, width = pixels.shape[:2]
    record = ImageRecord(
        case="",
        width=width,
        height=height,
        bits=8 * pixels.itemsize,
        colour=pixels.ndim == 3,
        fingerprint=pixel_fingerprint(pixels),
    )
    return name, record, pixels


def _write(
    path: Path,
    rows: dict[str, int],
    cases: dict[str, Case],
    preprocessing: Preprocessing,
    workers: int | None,
    progress: Progress | None,
) -> dict[str, ImageRecord]:
    """Decode all images into their rows of `path`, then write the index, which makes the cache whole. Needs the lock.

    Args:
        path: The cache.
        rows: The row of each digest.
        cases: A case of each digest, in the order to read them: rows of an archive are quick to read in their own.
        preprocessing: How.
        workers: Threads.
        progress: Called with the numbers of images done and in all.
    """
    for leftover in path.parent.glob(f".{path.stem}.*"):  # of a killed build
        leftover.unlink(missing_ok=True)
    empty = np.zeros((preprocessing.channels, preprocessing.image_size, preprocessing.image_size), np.uint8)

    def prepare(item: tuple[str, Case]) -> tuple[ImageRecord, NDArray[np.uint8]]:
        name, case = item
        found, record, pixels = _examine(case)
        if found != name:
            raise DataError(f"{case.image} changed while it was being read. Start again when it is complete.")
        return record, empty if pixels is None else preprocessing.apply(pixels)

    contents = {}
    # Written as a stream, not through a map: on a full disk a write is an error, a mapped page kills the process.
    with (
        atomic(path) as temporary,
        temporary.open("wb") as stream,
        closing(parallel(prepare, cases.items(), workers)) as prepared,
    ):
        for name, (record, array) in zip(cases, prepared, strict=True):
            stream.seek(rows[name] * array.nbytes)
            stream.write(array.tobytes())
            contents[name] = record
            if progress:
                progress(len(contents), len(rows))
    images = {name: {k: v for k, v in asdict(contents[name]).items() if k != "case"} for name in rows}
    write_json(path.with_suffix(".json"), {"preprocessing": preprocessing.model_dump(), "images": images})
    return contents


def _read_index(path: Path, shape: tuple[int, ...]) -> dict[str, ImageRecord] | None:
    """The records of a whole cache by file digest; None where there is none, or a broken one."""
    try:
        if path.stat().st_size != np.prod(shape):
            return None
        images = read_json(path.with_suffix(".json"))["images"]
        return {name: ImageRecord(case="", **fields) for name, fields in images.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
