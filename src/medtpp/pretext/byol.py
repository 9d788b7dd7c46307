"""BYOL (Grill et al., arXiv 2006.07733): one view predicts what an averaged teacher makes of the other."""

from __future__ import annotations

from typing import ClassVar, Literal

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


class BYOLOptions(MethodOptions):
    """Options of BYOL."""

    name: Literal["byol"] = "byol"
    width: int = Field(256, ge=8, description="channels that are compared")
    momentum: float = Field(0.99, ge=0, lt=1, description="of the teacher's average, at first")


@PRETEXTS.register("byol")
class BYOL(Pretext):
    """No negatives: predictor and teacher keep the features from becoming all the same."""

    Options: ClassVar[type[MethodOptions]] = BYOLOptions
    summary: ClassVar[str] = "predict an averaged teacher's features of another view (arXiv 2006.07733)"

    def __init__(self, options: BYOLOptions, spec: Spec, seeds: Seeds) -> None:
        nn.Module.__init__(self)
        self.pooling = spec.pooling
        with seeds.scope("pretext", "byol"):
            self.projection = mlp(spec.width, 2 * options.width, options.width)
            self.predictor = mlp(options.width, 2 * options.width, options.width)
        self.teacher = Teacher(options.momentum)

    def begin(self, backbone: Backbone) -> None:
        """See `Pretext.begin`."""
        self.teacher.begin(backbone, self.projection)

    def after_step(self, backbone: Backbone, step: int, total: int) -> None:
        """See `Pretext.after_step`."""
        self.teacher.update(backbone, self.projection, step, total)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """1 - cosine of prediction and teacher, mean over both directions and the batch."""
        views = two_views(images, draws)
        targets = [self.teacher.look(backbone, self.projection, view, self.pooling) for view in views]
        predicted = [self.predictor(self.projection(backbone.encode(view).pooled(self.pooling))) for view in views]
        agreement = [
            F.cosine_similarity(predicted[own].float(), targets[1 - own].float()).mean() for own in range(len(views))
        ]
        spread = F.normalize(targets[0].float(), dim=-1).std(dim=0, correction=0).mean() * targets[0].shape[-1] ** 0.5
        return 1 - (agreement[0] + agreement[1]) / 2, {"spread": spread}
