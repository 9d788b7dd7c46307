"""Dense prediction of images and volumes of any size: overlapping windows, blended by Gaussian weights.

As in nnU-Net (Isensee et al., Nature Methods 2021), but with memory that is bounded by a slab of the volume: windows
are visited along the first axis, and what no further window reaches is handed out. Weights are normalised beforehand,
axis by axis, so that they sum to one at every voxel and neither a map of counts nor a division is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.data.batches import to_unit
from medtpp.data.restore import Restore
from medtpp.inference.maps import Maps
from medtpp.tasks.base import Task

SIGMA = 1 / 8  # standard deviation of the Gaussian as a share of a window's side; nnU-Net's and MONAI's

Member = Callable[[Tensor], Tensor]


def as_member(
    backbone: Backbone, task: Task, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Member:
    """A tuned backbone and its segmentation task, both in evaluation mode, as a member of an ensemble.

    Args:
        backbone: On the device that will be used.
        task: On the same one.
        autocast: For lower precision; float32 by default.
    """

    def probabilities(images: Tensor) -> Tensor:
        with autocast():
            logits = task(backbone.encode(images, taps=task.taps))
        return task.probabilities(logits)

    return probabilities


@dataclass(frozen=True)
class SlidingWindow:
    """Predicts whole arrays, window by window.

    Peak memory, beside the array, the result and what the members need for `batch` windows: a slab of 4 bytes for each
    output and each voxel of patch[0] x H x W, at most 12 bytes for each of its voxels to hand them out, and the batch's
    probabilities a few times. It does not grow with the first axis. For a scan of 300 x 512 x 512 voxels with 3
    structures and windows of 64 x 192 x 192 the slab takes 270 MB and the float16 probabilities 630 MB; see `Maps` for
    where those wait.

    Attributes:
        members: Each maps images (B, C, *patch) in [0, 1] to probabilities (B, K, *patch); see `as_member`. Their mean
            is taken. Several adapters share one loaded backbone when each member switches its own in.
        patch: Shape of a window.
        overlapping: Whether structures overlap: K probabilities of K structures, in place of K that sum to one and
            begin with the background.
        overlap: Share of a window by which neighbours overlap, at least; the windows are spread evenly.
        flips: Axes of space (0 the first) to average over: every combination is predicted, 2 ** len(flips) passes.
        batch: Windows at once.
        device: Where the members and the slab are.
        folder: Where probabilities of the whole wait that are too large for the memory; None: in memory all the same.
    """

    members: Sequence[Member]
    patch: tuple[int, ...]
    overlapping: bool = False
    overlap: float = 0.5
    flips: tuple[int, ...] = ()
    batch: int = 4
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path | None = None

    def slabs(self, array: NDArray[Any]) -> Iterator[Tensor]:
        """Probabilities in pieces along the first axis, which together make the whole.

        A piece is a view that is overwritten when the next one is asked for.

        Args:
            array: (C, *spatial), each side at least the patch's: floating point in [0, 1], or uint8.

        Yields:
            (K, d, *spatial[1:]) float32 on `device`.

        Raises:
            ValueError: The array is smaller than a window (preprocessing pads it), or has other dimensions.
        """
        spatial = array.shape[1:]
        if len(spatial) != len(self.patch) or any(n < p for n, p in zip(spatial, self.patch, strict=True)):
            raise ValueError(f"an array of {spatial} voxels cannot be covered by windows of {self.patch}")
        sides = zip(spatial, self.patch, strict=True)
        axes = [_window_axis(size, side, self.overlap, self.device) for size, side in sides]
        windows = list(itertools.product(*(range(len(axis.starts)) for axis in axes)))  # the first axis is the slowest
        slab: Tensor | None = None
        done = 0  # voxels along the first axis that were handed out
        for first in range(0, len(windows), self.batch):
            chosen = windows[first : first + self.batch]
            corners = [tuple(axis.starts[i] for axis, i in zip(axes, window, strict=True)) for window in chosen]
            mean = self._mean(self._read(array, corners))
            if slab is None:
                slab = torch.zeros(mean.shape[1], self.patch[0], *spatial[1:], device=self.device)
            for window, corner, probabilities in zip(chosen, corners, mean, strict=True):
                if corner[0] > done:
                    yield slab[:, : corner[0] - done]
                    _advance(slab, corner[0] - done)
                    done = corner[0]
                weight = torch.ones((), device=self.device)
                for axis, i in zip(axes, window, strict=True):
                    weight = weight[..., None] * axis.weights[i]  # (*patch) in the end
                slab[(slice(None), *_box((0, *corner[1:]), self.patch))].addcmul_(probabilities, weight)
        if slab is not None:
            yield slab

    def probabilities(self, array: NDArray[Any]) -> Maps:
        """Probabilities in the network's space.

        Args:
            array: See `slabs`.

        Returns:
            (K, *spatial).

        Raises:
            OutputError: They wait in a file, and the disk is full.
        """
        return self._maps(self.slabs(array), array.shape[1:])

    def labels(self, array: NDArray[Any]) -> NDArray[np.uint8]:
        """Labels in the network's space; the probabilities of the whole are never held.

        Args:
            array: See `slabs`.

        Returns:
            (*spatial), numbered as by `medtpp.data.volume_preprocess.label_mask`: i for the i-th structure, or where
            structures overlap bit i - 1 for each that is more likely than not.
        """
        result = np.empty(array.shape[1:], np.uint8)
        for _ in self._decided(array, result):
            pass
        return result

    def scan_labels(self, array: NDArray[Any], restore: Restore) -> NDArray[np.uint8]:
        """Labels on the scan's own grid; see `scan_maps` where probabilities are wanted as well.

        Args:
            array: What `VolumePreprocessing.apply` made of the scan.
            restore: The way back that came with it.

        Returns:
            (*restore.geometry.shape), numbered as by `labels`.
        """
        if max(restore.coarsened) > 1:
            return labels_on_scan(self.probabilities(array), restore, overlapping=self.overlapping)
        # The network's grid is as fine as the scan's: to pick its nearest voxel loses nothing, and a mask comes back
        # voxel by voxel.
        return restore.labels(self.labels(array))

    def scan_maps(self, array: NDArray[Any], restore: Restore) -> tuple[NDArray[np.uint8], Maps]:
        """The same labels, and the probabilities they were made from, in one pass.

        Args:
            array: See `scan_labels`.
            restore: Likewise.

        Returns:
            (*restore.geometry.shape) labels; (K, *spatial) probabilities in the network's space.

        Raises:
            OutputError: See `probabilities`.
        """
        labels = np.empty(array.shape[1:], np.uint8)
        maps = self._maps(self._decided(array, labels), labels.shape)
        if max(restore.coarsened) > 1:
            return labels_on_scan(maps, restore, overlapping=self.overlapping), maps
        return restore.labels(labels), maps

    def _maps(self, slabs: Iterator[Tensor], spatial: tuple[int, ...]) -> Maps:
        first = next(slabs)
        maps = Maps((len(first), *spatial), self.folder)
        for slab in itertools.chain([first], slabs):
            maps.append(slab.half().cpu().numpy())
        return maps

    def _decided(self, array: NDArray[Any], labels: NDArray[np.uint8]) -> Iterator[Tensor]:
        """The slabs, each after its `labels` (*spatial) were filled in."""
        done = 0
        for slab in self.slabs(array):
            labels[done : done + slab.shape[1]] = _decide(slab, self.overlapping).cpu().numpy()
            done += slab.shape[1]
            yield slab

    def _read(self, array: NDArray[Any], corners: Sequence[tuple[int, ...]]) -> Tensor:
        """(B, C, *patch) float32 in [0, 1]."""
        windows = np.stack([array[(slice(None), *_box(corner, self.patch))] for corner in corners])
        return to_unit(torch.from_numpy(windows).to(self.device))

    @torch.no_grad()
    def _mean(self, images: Tensor) -> Tensor:
        """(B, K, *patch) float32: the mean over members and flips."""
        total: Tensor | None = None
        for count in range(len(self.flips) + 1):
            for axes in itertools.combinations([axis + 2 for axis in self.flips], count):
                flipped = images.flip(axes)
                for member in self.members:
                    probabilities = member(flipped).float().flip(axes)
                    total = probabilities if total is None else total + probabilities
        if total is None:
            raise ValueError("an ensemble needs a member")
        mean: Tensor = total / (len(self.members) * 2 ** len(self.flips))
        return mean


def labels_on_scan(probabilities: Iterable[NDArray[Any]], restore: Restore, *, overlapping: bool) -> NDArray[np.uint8]:
    """Bring probabilities to the scan's grid by linear interpolation, map by map, and decide there.

    Peak memory, beside the probabilities: about 4 float32 maps of the scan, whatever the number of structures.

    Args:
        probabilities: K maps (*restore.shape), as `SlidingWindow.probabilities` gives them.
        restore: The way back to the scan.
        overlapping: Whether structures overlap; otherwise the first map is the background's.

    Returns:
        (*restore.geometry.shape), numbered as by `SlidingWindow.labels`.
    """
    labels = np.zeros(restore.geometry.shape, np.uint8)
    if overlapping:
        for bit, one in enumerate(probabilities):
            labels |= (restore.probability(one) > 0.5).astype(np.uint8) << np.uint8(bit)
        return labels
    maps = iter(probabilities)
    best = restore.probability(next(maps), outside=1.0)
    for number, one in enumerate(maps, start=1):
        current = restore.probability(one)
        labels[current > best] = number
        np.maximum(best, current, out=best)
    return labels


def windows_over(shape: Sequence[int], patch: Sequence[int], overlap: float) -> Iterator[tuple[slice, ...]]:
    """Regions of the shape of `patch` that cover `shape`, each axis of which is at least as long."""
    starts = [_starts(size, side, overlap) for size, side in zip(shape, patch, strict=True)]
    for corner in itertools.product(*starts):
        yield _box(corner, patch)


def _starts(size: int, side: int, overlap: float) -> list[int]:
    """As few windows as the overlap allows, evenly spread from the first voxel to the last (nnU-Net's rule)."""
    count = math.ceil((size - side) / (side * (1 - overlap))) + 1
    return [round(index * (size - side) / max(count - 1, 1)) for index in range(count)]


@dataclass(frozen=True)
class _Axis:
    """Windows along one axis.

    Attributes:
        starts: The first voxel of each window.
        weights: For each window (side,), normalised so that all windows' weights sum to one at every voxel.
    """

    starts: list[int]
    weights: list[Tensor]


def _window_axis(size: int, side: int, overlap: float, device: torch.device) -> _Axis:
    starts = _starts(size, side, overlap)
    gaussian = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (SIGMA * side)) ** 2)
    total = np.zeros(size)
    for start in starts:
        total[start : start + side] += gaussian
    shares = [gaussian / total[start : start + side] for start in starts]
    return _Axis(starts, [torch.from_numpy(share).to(device, torch.float32) for share in shares])


def _advance(slab: Tensor, step: int) -> None:
    """Move a slab (K, d, ...) along its first axis of space; what enters is 0."""
    for one in slab:
        one[:-step] = one[step:].clone()
        one[-step:] = 0


def _decide(probabilities: Tensor, overlapping: bool) -> Tensor:
    """(K, *spatial) to (*spatial) uint8."""
    if not overlapping:
        return probabilities.max(dim=0).indices.to(torch.uint8)  # several times as fast as argmax
    labels = torch.zeros(probabilities.shape[1:], dtype=torch.uint8, device=probabilities.device)
    for bit, one in enumerate(probabilities):
        labels |= (one > 0.5).to(torch.uint8) << bit
    return labels


def _box(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
