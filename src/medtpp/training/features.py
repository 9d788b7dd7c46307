"""What heads read of many images that stand still: for the probe of the monitor, and for heads that start fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from lightning.fabric import Fabric
from torch import Tensor

from medtpp.backbones import Backbone, Features
from medtpp.inference.stored import patches_at_once
from medtpp.training.stage import StageData


@torch.no_grad()
def read_features(
    read: Callable[[Features], Tensor], backbone: Backbone, fabric: Fabric, batches: Iterable[Tensor]
) -> Tensor:
    """(n, D) float32 on the CPU, in the precision of the training.

    Args:
        read: Takes the features of a batch, gives (b, D).
        backbone: On the device of `fabric`.
        fabric: Where to compute, in which precision.
        batches: Images (b, C, *patch), floating point in [0, 1].
    """
    parts = []
    for images in batches:
        with fabric.autocast():
            parts.append(read(backbone.encode(images.to(fabric.device))).float().cpu())
    return torch.cat(parts)


def as_they_are(data: StageData, patch: tuple[int, ...]) -> Iterator[Tensor]:
    """All cases in their order, as batches (b, C, *patch) without augmentation; of volumes the patch in the middle."""
    at_once = patches_at_once(patch)
    for start in range(0, len(data), at_once):
        yield replace(data, cases=data.cases[start : start + at_once]).images(at_once)
