"""SimMIM (Xie et al., arXiv 2111.09886): replace patches by a token, predict their pixels by one linear layer."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medtpp.backbones import Backbone, Spec, gather_tokens, match_channels
from medtpp.config import PRETEXTS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.pretext.base import Pretext
from medtpp.pretext.mae import normalised, patchify
from medtpp.seeds import Draws, Seeds


class SimMIMOptions(MethodOptions):
    """Options of SimMIM."""

    name: Literal["simmim"] = "simmim"
    mask_ratio: float = Field(0.6, gt=0, lt=1, description="share of the patches that is hidden")


@PRETEXTS.register("simmim")
class SimMIM(Pretext):
    """Masked patches stay in place as a learned token, so that any backbone with a grid of features will do.

    Pixels are normalised per patch, and near-constant patches left out of the loss, as in this package's MAE.
    """

    Options: ClassVar[type[MethodOptions]] = SimMIMOptions
    summary: ClassVar[str] = "predict the pixels of masked patches from features in their place (arXiv 2111.09886)"
    needs = frozenset({"dense", "masks"})

    def __init__(self, options: SimMIMOptions, spec: Spec, seeds: Seeds) -> None:
        nn.Module.__init__(self)
        self.patch = spec.patch
        self.channels = spec.channels
        self.num_patches = math.prod(spec.grid)
        if self.num_patches < 2:
            size = "x".join(map(str, spec.image_size))
            raise ConfigError(
                f"An image of {size} is one patch for {spec.name}, and simmim hides some and shows some. Use larger "
                "images (data.image_size, of volumes data.volume.patch), or pretext=restoration."
            )
        self.num_hidden = min(self.num_patches - 1, max(1, round(self.num_patches * options.mask_ratio)))
        with seeds.scope("pretext", "simmim"):
            self.mask_token = nn.Parameter(torch.randn(spec.mask_width) * 0.02)
            self.predict = nn.Linear(spec.width, math.prod(spec.patch) * spec.channels)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error on normalised pixels of the masked patches, averaged per image, then over the batch."""
        ids_hidden = draws.permutation("mask", self.num_patches)[:, : self.num_hidden]  # (B, H)
        mask = torch.zeros(len(images), self.num_patches, dtype=torch.bool, device=images.device)
        features = backbone.encode(images, mask=mask.scatter(1, ids_hidden, True), mask_token=self.mask_token)
        hidden = gather_tokens(features.patches, ids_hidden)  # (B, H, D)
        pixels = match_channels(images, self.channels).float()
        target, weight = normalised(gather_tokens(patchify(pixels, self.patch), ids_hidden), pixels)
        error = (self.predict(hidden).float() - target).abs().mean(dim=-1)  # (B, H)
        loss = ((error * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)).mean()
        return loss, {"kept_in_loss": weight.mean()}
