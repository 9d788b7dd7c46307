"""Patches of prepared volumes: batches as a pure function of the step, read ahead from the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtpp.data.batches import CaseStream
from medtpp.data.store import VolumeStore
from medtpp.errors import DataError
from medtpp.seeds import Draws

FOREGROUND = 1 / 3  # share of patches centred on a structure; nnU-Net's


class PatchStream(CaseStream):
    """Patches of prepared volumes.

    Where a patch lies is drawn from (case, visit) alone: with probability `FOREGROUND` around a voxel of one of the
    case's structures, each structure as likely as the others, else anywhere.

    Args:
        store: Prepared volumes. All of them are at least as large as a patch.
        rows: (n,) int64, the row of each case in the store.
        others: See `CaseStream`.
        masks: Whether the targets are the patches of the masks.

    Raises:
        DataError: Cases that cannot be used, or lack the mask that is asked for; all of them are listed.
    """

    readers = 4  # each with a batch of its own in the making
    ahead = 4

    def __init__(
        self, store: VolumeStore, rows: NDArray[np.int64], *others: Any, masks: bool = False, **more: Any
    ) -> None:
        super().__init__(rows, *others, **more)
        _check(store, rows, masks)
        self.store = store
        self.masks = masks

    def read(self, rows: NDArray[np.int64], draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, *patch), float16 in [0, 1] or uint8 as the store has them, and masks (B, *patch) uint8."""
        places = list(zip(rows.tolist(), self._regions(rows, draws), strict=True))
        images = _stack([self.store.image(row, region) for row, region in places])
        return images, _stack([self.store.mask(row, region) for row, region in places]) if self.masks else None

    def _regions(self, rows: NDArray[np.int64], draws: Draws) -> list[tuple[slice, ...]]:
        """Where the patches lie, for each row of a batch."""
        around = draws.uniform("patch/foreground").numpy() < FOREGROUND
        picks = draws.uniform("patch/structure", 2).double().numpy()  # which structure, which of its voxels
        corners = draws.uniform("patch/place", self.store.preprocessing.dims).double().numpy()
        return [
            self._region(int(row), centred, pick, corner)
            for row, centred, pick, corner in zip(rows, around, picks, corners, strict=True)
        ]

    def _region(
        self, row: int, around: bool, pick: NDArray[np.float64], corner: NDArray[np.float64]
    ) -> tuple[slice, ...]:
        record, patch = self.store.records[row], np.array(self.store.preprocessing.patch)
        room = np.array(record.shape[1:]) - patch  # the last possible corner
        present = [structure for structure, count in enumerate(record.voxels or ()) if count]
        if around and present:
            voxels = self.store.foreground(row, present[int(pick[0] * len(present))])
            start = (voxels[int(pick[1] * len(voxels))] - patch // 2).clip(0, room)
        else:
            start = (corner * (room + 1)).astype(np.int64)
        return tuple(slice(int(first), int(first + size)) for first, size in zip(start, patch, strict=True))


def _stack(patches: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(patches))


def _check(store: VolumeStore, rows: NDArray[np.int64], masks: bool) -> None:
    records = [store.records[row] for row in rows]
    problems = [f"{record.case}: {record.error}" for record in records if record.error]
    problems += [
        f"{record.case}: has no mask" for record in records if masks and not record.error and record.voxels is None
    ]
    if problems:
        raise DataError("Some cases cannot be used. Mend them, or leave them out by data.exclude.", problems)
