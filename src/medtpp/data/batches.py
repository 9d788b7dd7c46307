"""The order of the cases: batches as a pure function of the step, on any number of processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtpp.errors import ConfigError
from medtpp.seeds import Draws, Seeds


@dataclass(frozen=True)
class Batch:
    """What one step sees.

    Attributes:
        images: (B, C, *spatial) uint8, or float16 in [0, 1].
        targets: (B, ...), where there are targets.
        rows: (B,) int64, the rows of the store.
        draws: Random numbers for these cases at this visit.
    """

    images: Tensor
    targets: Tensor | None
    rows: Tensor
    draws: Draws

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; copied in the background from pinned memory."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            targets=None if self.targets is None else self.targets.to(device, non_blocking=True),
            rows=self.rows.to(device, non_blocking=True),
            draws=self.draws.to(device),
        )


def to_unit(images: Tensor) -> Tensor:
    """uint8 levels to float32 in [0, 1]; floats stay as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


class CaseStream(ABC):
    """An endless stream of batches of one size.

    Epoch e visits all cases in the order `seeds.numpy("order", e)`. The epochs, one after another, are cut into
    batches, so that a batch may span epochs and, in a tiny data set, hold a case twice, each time with draws of its
    own. Nothing is remembered between batches: a resumed run asks for its step and gets the same bits.

    Args:
        rows: (n,) int64, the row of each case in the store.
        keys: (n,) int64, `name_key` of each case id.
        targets: (n, ...), the target of each case, or None.
        batch_size: Cases per step over all processes.
        seeds: Where order and draws come from.
        rank: Which of the processes this is; it takes the positions rank, rank + world, ... of each batch.
        world: How many processes there are.
        pin: Whether batches lie in pinned memory, where CUDA is available.

    Attributes:
        waited: Seconds that `iterate` spent waiting for data.

    Class attributes:
        readers: Threads that read ahead.
        ahead: Batches that they read ahead.

    Raises:
        ConfigError: The batch size is not a multiple of the number of processes, or there are no cases.
    """

    readers: ClassVar[int]
    ahead: ClassVar[int]

    def __init__(
        self,
        rows: NDArray[np.int64],
        keys: NDArray[np.int64],
        targets: Tensor | None,
        batch_size: int,
        seeds: Seeds,
        rank: int = 0,
        world: int = 1,
        pin: bool = True,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ConfigError(f"The batch size {batch_size} does not divide among {world} devices. Use a multiple.")
        if not len(rows):
            raise ConfigError("There are no cases to make batches of.")
        if len(keys) != len(rows) or (targets is not None and len(targets) != len(rows)):
            raise ValueError("rows, keys and targets differ in length")
        self.rows = rows
        self.keys = keys
        self.targets = targets
        self.batch_size = batch_size
        self.seeds = seeds
        self.rank = rank
        self.world = world
        self.pin = pin and torch.cuda.is_available()
        self.waited = 0.0
        self._orders: dict[int, NDArray[np.int64]] = {}

    @abstractmethod
    def read(self, rows: NDArray[np.int64], draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, *spatial) of some rows, and where they are targets, masks (B, *spatial)."""

    def batch(self, step: int) -> Batch:
        """This process's share of a step, counted from 0: (batch_size / world) cases."""
        positions = np.arange(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
        epochs, places = np.divmod(positions, len(self.rows))
        cases = self._cases(epochs, places)
        draws = self.seeds.draws(torch.from_numpy(epochs), torch.from_numpy(self.keys[cases]))
        rows = self.rows[cases]
        images, targets = self.read(rows, draws)
        if self.targets is not None:
            targets = self.targets[torch.from_numpy(cases)]
        if self.pin:
            images = images.pin_memory()
            targets = None if targets is None else targets.pin_memory()
        return Batch(images, targets, torch.from_numpy(rows), draws)

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the steps start .. stop - 1, read ahead by threads that end with the iterator.

        An exception of a thread is raised here.
        """
        steps = iter(range(start, stop))
        with ThreadPoolExecutor(max_workers=self.readers, thread_name_prefix="medtpp-batches") as pool:
            ahead = deque(pool.submit(self.batch, step) for step in islice(steps, self.ahead))
            try:
                while ahead:
                    began = perf_counter()
                    batch = ahead.popleft().result()
                    self.waited += perf_counter() - began
                    ahead.extend(pool.submit(self.batch, step) for step in islice(steps, 1))
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)

    def _cases(self, epochs: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The case at each place of its epoch's order. Orders are kept while batches use them."""
        needed = np.unique(epochs).tolist()
        known = self._orders
        orders = {epoch: known[epoch] if epoch in known else self._order(epoch) for epoch in needed}
        self._orders = orders
        cases = np.empty_like(places)
        for epoch in needed:
            cases[epochs == epoch] = orders[epoch][places[epochs == epoch]]
        return cases

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return self.seeds.numpy("order", epoch).permutation(len(self.rows))


class BatchStream(CaseStream):
    """Whole images of one size, from an array.

    Args:
        images: (N, C, S, S) uint8, such as `ImageCache.images`.
        rows: (n,) int64, the row of each case in `images`.
        others: See `CaseStream`.
    """

    readers = 1
    ahead = 2

    def __init__(self, images: NDArray[np.uint8], rows: NDArray[np.int64], *others: Any, **more: Any) -> None:
        super().__init__(rows, *others, **more)
        self.images = images

    def read(self, rows: NDArray[np.int64], draws: Draws) -> tuple[Tensor, None]:  # noqa: ARG002
        """See `CaseStream.read`."""
        return torch.from_numpy(self.images[rows]), None
