"""SimCLR (Chen et al., arXiv 2002.05709): two views of an image are near, views of others far."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Backbone, Spec
from medtpp.config import PRETEXTS, MethodOptions
from medtpp.pretext._heads import mlp
from medtpp.pretext._views import two_views
from medtpp.pretext.base import Pretext
from medtpp.seeds import Draws, Seeds


class SimCLROptions(MethodOptions):
    """Options of SimCLR."""

    name: Literal["simclr"] = "simclr"
    width: int = Field(128, ge=8, description="channels that are compared")
    temperature: float = Field(0.2, gt=0, description="of the similarities")


@PRETEXTS.register("simclr")
class SimCLR(Pretext):
    """The other images of the batch are the negatives, so that it must be large; MoCo v3 has a queue instead."""

    Options: ClassVar[type[MethodOptions]] = SimCLROptions
    summary: ClassVar[str] = "tell two views of an image from those of others (arXiv 2002.05709)"
    couples_images = True
    least_batch = 32

    def __init__(self, options: SimCLROptions, spec: Spec, seeds: Seeds) -> None:
        nn.Module.__init__(self)
        self.pooling = spec.pooling
        self.temperature = options.temperature
        with seeds.scope("pretext", "simclr"):
            self.projection = mlp(spec.width, 2 * options.width, options.width)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent: cross-entropy of each view's partner among all other views of the batch."""
        views = torch.cat(two_views(images, draws))  # (2B, C, *spatial)
        projected = F.normalize(self.projection(backbone.encode(views).pooled(self.pooling)).float(), dim=-1)
        similarity = projected @ projected.T / self.temperature  # (2B, 2B)
        similarity = similarity.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf)
        partner = torch.arange(len(views), device=views.device).roll(len(images))
        found = (similarity.argmax(dim=1) == partner).float().mean()
        return F.cross_entropy(similarity, partner), {"partners_found": found}
