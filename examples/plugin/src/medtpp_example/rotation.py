"""RotNet (Gidaris et al., arXiv 1803.07728): by how many quarter turns was the image turned?"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Backbone, Spec
from medtpp.config import PRETEXTS, MethodOptions
from medtpp.pretext.base import Pretext
from medtpp.seeds import Draws, Seeds


class RotationOptions(MethodOptions):
    """The task has no options."""

    name: Literal["rotation"] = "rotation"


@PRETEXTS.register("rotation")
class Rotation(Pretext):
    """Each image is turned at random in its last two axes; a linear layer on pooled features tells by how much."""

    Options: ClassVar[type[MethodOptions]] = RotationOptions
    summary: ClassVar[str] = "tell by how many quarter turns an image was turned (arXiv 1803.07728)"

    def __init__(self, options: RotationOptions, spec: Spec, seeds: Seeds) -> None:  # noqa: ARG002
        nn.Module.__init__(self)
        self.pooling = spec.pooling
        with seeds.scope("pretext", "rotation"):
            self.predict = nn.Linear(spec.width, 4)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy; every random number comes from `draws`, so that a resumed run turns the same."""
        turns = (draws.uniform("rotation/turns") * 4).long()  # (B,) 0 .. 3
        size = images.shape[2:]  # of the plane, height and width change places: stretched back
        every = torch.stack([F.interpolate(torch.rot90(images, turn, (-2, -1)), size) for turn in range(4)])
        turned = every[turns, torch.arange(len(images), device=images.device)]
        logits = self.predict(backbone.encode(turned).pooled(self.pooling)).float()
        return F.cross_entropy(logits, turns), {"told": (logits.argmax(dim=1) == turns).float().mean()}
