"""MoCo v3 (Chen et al., arXiv 2104.02057), with MoCo's queue (arXiv 1911.05722), since medical batches are small."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Backbone, Spec
from medtpp.config import PRETEXTS, MethodOptions
from medtpp.pretext._heads import mlp
from medtpp.pretext._teacher import Teacher
from medtpp.pretext._views import two_views
from medtpp.pretext.base import Pretext
from medtpp.seeds import Draws, Seeds


class MoCoV3Options(MethodOptions):
    """Options of MoCo v3."""

    name: Literal["moco_v3"] = "moco_v3"
    width: int = Field(128, ge=8, description="channels that are compared")
    temperature: float = Field(0.2, gt=0, description="of the similarities")
    momentum: float = Field(0.99, ge=0, lt=1, description="of the teacher's average, at first")
    queue: int = Field(
        1024, ge=0, description="keys of earlier batches that are negatives too; 0: none, as in the paper"
    )


@PRETEXTS.register("moco_v3")
class MoCoV3(Pretext):
    """Queries of the student against keys of an averaged teacher: of the batch, and of earlier ones."""

    Options: ClassVar[type[MethodOptions]] = MoCoV3Options
    summary: ClassVar[str] = "find an averaged teacher's view of the same image among others (arXiv 2104.02057)"
    couples_images = True

    def __init__(self, options: MoCoV3Options, spec: Spec, seeds: Seeds) -> None:
        nn.Module.__init__(self)
        self.pooling = spec.pooling
        self.temperature = options.temperature
        with seeds.scope("pretext", "moco_v3"):
            self.projection = mlp(spec.width, 2 * options.width, options.width)
            self.predictor = mlp(options.width, 2 * options.width, options.width)
        self.teacher = Teacher(options.momentum)
        self.queue: Tensor
        self.queued: Tensor
        self.register_buffer("queue", torch.zeros(options.queue, options.width))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))  # keys that were ever put there
        self._keys: Tensor | None = None

    def begin(self, backbone: Backbone) -> None:
        """See `Pretext.begin`."""
        self.teacher.begin(backbone, self.projection)

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int, total: int) -> None:
        """See `Pretext.after_step`."""
        self.teacher.update(backbone, self.projection, step, total)
        if self._keys is not None and len(self.queue):
            keys = self._keys[-len(self.queue) :]
            places = (torch.arange(len(keys), device=keys.device) + self.queued) % len(self.queue)
            self.queue[places] = keys
            self.queued += len(keys)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE, mean over both directions."""
        views = two_views(images, draws)
        keys = [
            F.normalize(self.teacher.look(backbone, self.projection, view, self.pooling).float(), dim=-1)
            for view in views
        ]
        queries = [self.predictor(self.projection(backbone.encode(view).pooled(self.pooling))) for view in views]
        losses = [self._contrast(queries[own], keys[1 - own]) for own in range(len(views))]
        self._keys = keys[0]
        return (losses[0] + losses[1]) / 2, {"queued": self.queued.clamp(max=len(self.queue)).float()}

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cross-entropy of the key of the same image among those of the batch and of the queue."""
        filled = min(int(self.queued), len(self.queue))
        candidates = torch.cat([keys, self.queue[:filled]])
        similarity = F.normalize(queries.float(), dim=-1) @ candidates.T / self.temperature
        # The paper's factor, so that the gradient does not depend on the temperature.
        return 2 * self.temperature * F.cross_entropy(similarity, torch.arange(len(queries), device=keys.device))
