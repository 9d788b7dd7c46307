"""MedMNIST by name: `medmnist:pneumoniamnist@224` is downloaded once, and only because somebody named it."""

from __future__ import annotations

import difflib
import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock

from medtpp.data.cache import DOWNLOADS, cache_root
from medtpp.data.sources import _medmnist_files as medmnist
from medtpp.errors import DataError
from medtpp.files import atomic

PREFIX = "medmnist:"
TIMEOUT = 60.0  # seconds without an answer


def is_name(path: Path) -> bool:
    """Whether a data path is the name of a MedMNIST file."""
    return str(path).lower().startswith(PREFIX)


def local_path(path: Path) -> Path:
    """The file or folder that a data path means; of a name the file in the cache, downloaded if it is not there.

    Raises:
        DataError: There is no such data set or size, no network, or another content than the MD5 sum says.
        OutputError: The cache cannot be written.
    """
    if not is_name(path):
        return path.expanduser()
    file, wanted = _file(str(path)[len(PREFIX) :])
    target = cache_root() / DOWNLOADS / file
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_file():
                _download(file, wanted, target)
    return target


def _file(name: str) -> tuple[str, str]:
    """The file of "pneumoniamnist@224", and its MD5 sum; without a size that of 28 pixels."""
    dataset, _, size = name.strip().lower().partition("@")
    if dataset not in medmnist.MD5:
        near = difflib.get_close_matches(dataset, medmnist.MD5, n=1)
        hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
        raise DataError(f"MedMNIST has no {dataset!r}.{hint} Known: {', '.join(sorted(medmnist.MD5))}.")
    sums = medmnist.MD5[dataset]
    sizes = medmnist.PLANE_SIZES if len(sums) == len(medmnist.PLANE_SIZES) else medmnist.VOLUME_SIZES
    if size and size not in map(str, sizes):
        raise DataError(f"{dataset} has no size {size!r}. Choose @{', @'.join(map(str, sizes))}.")
    number = int(size or sizes[0])
    return f"{dataset}{'' if number == sizes[0] else f'_{number}'}.npz", sums[sizes.index(number)]


def _download(file: str, wanted: str, target: Path) -> None:
    address = f"{medmnist.ADDRESS}{file}?download=1"
    with atomic(target) as temporary:
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, temporary.open("wb") as stream:
                shutil.copyfileobj(answer, stream, 1 << 20)
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise DataError(
                f"{address} cannot be downloaded ({reason}). Is there a network? Otherwise download it elsewhere, and "
                "give the path of the file in place of its name."
            ) from error
        with temporary.open("rb") as stream:
            found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != wanted:
            raise DataError(
                f"{address} has the MD5 sum {found}, not {wanted}: the download broke off, or the file is another one. "
                "Try again, or give the path of a file that you have."
            )
