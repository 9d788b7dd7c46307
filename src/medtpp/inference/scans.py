"""New scans read and prepared while the network works on others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray

from medtpp.data.case import Case
from medtpp.data.restore import Restore
from medtpp.data.volume_preprocess import VolumePreprocessing, quantise
from medtpp.data.volumes import read_volume
from medtpp.errors import DataError

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan as the network sees it.

    Attributes:
        array: (C, *spatial): float16 in [0, 1], or uint8 to divide by 255, to the bits that a store of it would hold.
        restore: The way back.
    """

    array: NDArray[Any]
    restore: Restore


def read_ahead(cases: Iterable[Case], preprocessing: VolumePreprocessing) -> Generator[tuple[Case, Scan | DataError]]:
    """Each case with its scan, or why there is none; one is read ahead.

    Peak memory: two prepared scans, and what reading takes (the file, its values, float32 while they are prepared).
    """

    def prepare(case: Case) -> Scan | DataError:
        try:
            array, restore = preprocessing.apply(read_volume(case))
        except DataError as error:
            return error
        return Scan(quantise(array) if preprocessing.dtype == "uint8" else array, restore)

    return ahead(prepare, cases, workers=1, depth=1)


def reason(case: Case, error: DataError) -> str:
    """Why a case is left out, to be read behind its name."""
    return str(error).removeprefix(f"{case.image}: ")


def ahead(work: Callable[[S], T], items: Iterable[S], *, workers: int, depth: int) -> Generator[tuple[S, T]]:
    """What `work` makes of each item, in their order, on several threads.

    Args:
        work: Called in a thread.
        items: Its arguments.
        workers: Threads.
        depth: Items that may be under way or wait beside the one that was handed out last: what bounds the memory.

    Yields:
        Each item with its result. Those not begun are dropped when the generator is closed.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[S, Future[T]]] = deque()

        def oldest() -> tuple[S, T]:  # in a frame of its own, so that no name here keeps the result alive
            item, future = waiting.popleft()
            return item, future.result()

        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > depth:
                    yield oldest()
            while waiting:
                yield oldest()
        finally:
            pool.shutdown(cancel_futures=True)
