"""Probabilities of a whole scan, which may be larger than the memory: written slab by slab, read map by map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import OutputError

IN_MEMORY = 1 << 30  # bytes; more wait in a file


class Maps:
    """(K, *spatial) float16. Iterating reads one map (*spatial) after the other, each time anew.

    They wait in memory, or where they take more than `IN_MEMORY` in a file without a name, which goes away with this
    object or a killed process. Peak memory is then that of a slab and a map.

    Args:
        shape: (K, *spatial).
        folder: Where such a file lies; None keeps maps of any size in memory.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, shape: tuple[int, ...], folder: Path | None = None) -> None:
        self.shape = shape
        self._folder = folder
        self._filled = 0  # voxels along the first axis of space
        self._stream = SpooledTemporaryFile(dir=None if folder is None else str(folder))  # noqa: SIM115 - closed with this object
        if folder is not None and 2 * math.prod(shape) > IN_MEMORY:
            with self._writing():
                self._stream.rollover()

    def append(self, slab: NDArray[np.float16]) -> None:
        """Add the next piece along the first axis of space, (K, d, *spatial[1:]).

        Raises:
            OutputError: The disk is full.
        """
        plane = 2 * math.prod(self.shape[2:])
        with self._writing():
            for number, one in enumerate(slab):
                self._stream.seek((number * self.shape[1] + self._filled) * plane)
                self._stream.write(np.ascontiguousarray(one).data)
        self._filled += slab.shape[1]

    def __iter__(self) -> Iterator[NDArray[np.float16]]:
        size = 2 * math.prod(self.shape[1:])
        for number in range(self.shape[0]):
            self._stream.seek(number * size)
            yield np.frombuffer(self._stream.read(size), np.float16).reshape(self.shape[1:])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"Cannot write to {self._folder}, where the probabilities of a scan wait ({error.strerror}). They need "
                f"{2 * math.prod(self.shape) / 1e9:.1f} GB beside the results: free some space or name another folder."
            ) from error
