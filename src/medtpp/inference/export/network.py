"""The network that is exported: backbone, tuner and head as one function from images to probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medtpp.adapter import Adapter
from medtpp.backbones import Backbone
from medtpp.config import TUNERS
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import WeightsError
from medtpp.seeds import Seeds
from medtpp.tasks.base import Task

TOLERANCE = 1e-4  # of probabilities, between the adapter and what was written
IMAGES, PROBABILITIES = "images", "probabilities"  # names of input and output


@dataclass(frozen=True)
class Written:
    """What a target's writer did.

    Attributes:
        files: Paths relative to the folder, the network first.
        batch: Whether the network takes batches of any size; else of one image.
        difference: The largest difference of its outputs from the adapter's.
        about: What else `preprocessing.json` says of it.
    """

    files: tuple[str, ...]
    batch: bool
    difference: float
    about: dict[str, Any] = field(default_factory=dict)


class ExportedNetwork(nn.Module):
    """From images (B, C, *spatial) in [0, 1] to probabilities (B, K) or (B, K, *spatial), float32."""

    def __init__(self, backbone: Backbone, task: Task) -> None:
        super().__init__()
        self.backbone = backbone
        self.task = task
        self.float().eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.task.probabilities(self.task(self.backbone.encode(images, taps=self.task.taps)))


def exported_network(adapter: Adapter) -> ExportedNetwork:
    """A network of its own, merged where that is exact, as it is where a tuner cannot be merged.

    Raises:
        WeightsError: The adapter has no head.
    """
    if adapter.task is None:
        raise WeightsError("The adapter has no head: fine-tune it first.")
    merges = TUNERS.get(adapter.card.tuner["name"]).merges
    return ExportedNetwork(adapter.backbone.merged() if merges else adapter.backbone, adapter.task)


def channels_of(preprocessing: Preprocessing | VolumePreprocessing) -> int:
    """Channels of prepared images."""
    return preprocessing.channels if isinstance(preprocessing, Preprocessing) else len(preprocessing.windows)


def example(adapter: Adapter, count: int) -> Tensor:
    """(count, C, *patch) random images in [0, 1], the same ones each time."""
    preprocessing = adapter.card.preprocessing
    shape = (count, channels_of(preprocessing), *preprocessing.patch)
    return torch.rand(shape, generator=Seeds(0).generator("export", count))


@torch.no_grad()
def difference(adapter: Adapter, network: Callable[[Tensor], Tensor], *, batch: bool) -> float:
    """The largest difference from the adapter as it is used for prediction, over batches that no tracing has seen."""
    if adapter.task is None:
        raise WeightsError("The adapter has no head: fine-tune it first.")
    ours = ExportedNetwork(adapter.backbone, adapter.task)
    batches = [example(adapter, count) for count in ((1, 3) if batch else (1,))]
    return max(float((network(images) - ours(images)).abs().max()) for images in batches)
