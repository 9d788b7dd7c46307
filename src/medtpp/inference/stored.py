"""Predictions for prepared cases: class logits and masks, from an image cache or a store of volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.data.batches import to_unit
from medtpp.data.cache import ImageCache
from medtpp.data.store import VolumeStore
from medtpp.inference.sliding import SlidingWindow, as_member, windows_over
from medtpp.tasks.base import Task

BATCH = 64
VOXELS = 1 << 20  # of the patches that go through a network at once

Autocast = Callable[[], AbstractContextManager[object]]


def classify(
    backbone: Backbone,
    task: Task,
    store: ImageCache | VolumeStore,
    rows: NDArray[np.int64],
    *,
    device: torch.device,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Logits (n, K) of some rows, in their order, in float32 on the CPU. A volume's are the mean over its patches.

    Args:
        backbone: Tuned, on `device`.
        task: A classification with its head, on `device`.
        store: The images.
        rows: (n,) which of them.
        device: Where to compute.
        autocast: For lower precision; float32 by default.
    """
    logits = network(backbone, task, device=device, autocast=autocast)
    if isinstance(store, ImageCache):
        starts = range(0, len(rows), BATCH)
        return torch.cat([logits(store.images[rows[start : start + BATCH]]) for start in starts])
    return torch.stack([over_patches(store.image(int(row)), store.preprocessing.patch, logits) for row in rows])


def network(
    backbone: Backbone, task: Task, *, device: torch.device, autocast: Autocast = nullcontext
) -> Callable[[NDArray[Any]], Tensor]:
    """A function from arrays (n, C, *patch), uint8 or floating point in [0, 1], to logits (n, K): see `classify`."""

    @torch.no_grad()
    def logits(images: NDArray[Any]) -> Tensor:
        batch = to_unit(torch.from_numpy(images).to(device))
        with autocast():
            found: Tensor = task(backbone.encode(batch))
        return found.float().cpu()

    return logits


def over_patches(array: NDArray[Any], patch: tuple[int, ...], logits: Callable[[NDArray[Any]], Tensor]) -> Tensor:
    """(K,) mean logits over patches that cover (C, *spatial) with as little overlap as possible."""
    regions = list(windows_over(array.shape[1:], patch, overlap=0.0))
    at_once = patches_at_once(patch)
    batches = (regions[first : first + at_once] for first in range(0, len(regions), at_once))
    parts = [logits(np.stack([array[(slice(None), *region)] for region in batch])) for batch in batches]
    return torch.cat(parts).mean(dim=0)


def patches_at_once(patch: tuple[int, ...]) -> int:
    """How many patches go through a network together."""
    return max(1, min(BATCH, VOXELS // int(np.prod(patch))))


def sliding_window(
    backbone: Backbone,
    task: Task,
    patch: tuple[int, ...],
    *,
    device: torch.device,
    overlap: float = 0.5,
    autocast: Autocast = nullcontext,
) -> SlidingWindow:
    """The window that segments with one adapter.

    Args:
        backbone: Tuned, on `device`.
        task: A segmentation with its head, on `device`.
        patch: Shape of a window.
        device: Where to compute.
        overlap: Share of a window by which neighbours overlap, at least.
        autocast: For lower precision; float32 by default.
    """
    return SlidingWindow(
        [as_member(backbone, task, autocast)],
        patch,
        task.multilabel,
        overlap=overlap,
        batch=patches_at_once(patch),
        device=device,
    )


def mean_dice(window: SlidingWindow, store: VolumeStore, rows: NDArray[np.int64], structures: int) -> float:
    """Dice on the network's grid: the mean over structures of the means over cases that show or predict them.

    Quick, for validation; tests compare masks on the scans' own grids.
    """
    dice: list[list[float]] = [[] for _ in range(structures)]
    for row in rows:
        predicted, true = window.labels(store.image(int(row))), store.mask(int(row))
        pairs = zip(
            planes(predicted, structures, overlapping=window.overlapping),
            planes(true, structures, overlapping=window.overlapping),
            strict=True,
        )
        for values, (one, other) in zip(dice, pairs, strict=True):
            total = int(one.sum()) + int(other.sum())
            if total:
                values.append(2 * int((one & other).sum()) / total)
    means = [float(np.mean(values)) for values in dice if values]
    return float(np.mean(means)) if means else 0.0


def planes(labels: NDArray[np.uint8], structures: int, *, overlapping: bool) -> Iterator[NDArray[np.bool_]]:
    """A mask (*spatial) as `label_mask` numbers it, structure by structure."""
    for number in range(1, structures + 1):
        yield (labels >> np.uint8(number - 1) & 1).astype(bool) if overlapping else labels == number
