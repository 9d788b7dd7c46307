"""Masked feature prediction: what the frozen backbone sees in hidden patches, predicted from the visible ones.

The targets are those of MaskFeat (Wei et al., arXiv 2112.09133) and EVA (Fang et al., arXiv 2211.07636), features in
place of pixels, given by the backbone itself without its tuner; the design is MAE's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from medtpp.backbones import Backbone, Spec, gather_tokens
from medtpp.config import PRETEXTS, MethodOptions
from medtpp.pretext.masked import MaskedOptions, MaskedPretext
from medtpp.seeds import Draws, Seeds


class FeaturesOptions(MaskedOptions):
    """Options of masked feature prediction."""

    name: Literal["features"] = "features"


@PRETEXTS.register("features")
class MaskedFeatures(MaskedPretext):
    """The target parameters learn to see a part as the frozen backbone sees the whole."""

    Options: ClassVar[type[MethodOptions]] = FeaturesOptions
    summary: ClassVar[str] = "predict the frozen backbone's own features of hidden patches (arXiv 2112.09133)"
    needs = frozenset({"drops_tokens", "dense"})

    def __init__(self, options: FeaturesOptions, spec: Spec, seeds: Seeds) -> None:
        super().__init__(options, spec, seeds, outputs=spec.width)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error on layer-normalised features of the hidden patches, over the batch."""
        ids_keep, ids_hidden = self.split(draws)
        with torch.no_grad(), backbone.disabled():
            whole = gather_tokens(backbone.encode(images).patches, ids_hidden).float()
        target = F.layer_norm(whole, whole.shape[-1:])  # (B, H, D)
        loss = F.mse_loss(self.decode(backbone, images, ids_keep, ids_hidden).float(), target)
        return loss, {}
