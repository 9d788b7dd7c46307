"""The two ends of the scale, for comparison: nothing of the backbone trained, and all of it."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._selected import SelectedBackbone
from medtpp.tuners.base import TunedBackbone, Tuner


class LinearOptions(MethodOptions):
    """The linear reference has no options."""

    name: Literal["linear"] = "linear"


@TUNERS.register("linear")
class Linear(Tuner[LinearOptions]):
    """A head on frozen features. There is nothing for TPP to train."""

    Options: ClassVar[type[MethodOptions]] = LinearOptions
    summary: ClassVar[str] = "reference: a head on frozen features"
    has_targets: ClassVar[bool] = False

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return SelectedBackbone(backbone, (), "LINEAR")


class FullOptions(MethodOptions):
    """The full reference has no options."""

    name: Literal["full"] = "full"


@TUNERS.register("full")
class Full(Tuner[FullOptions]):
    """Full fine-tuning: all parameters of the backbone."""

    Options: ClassVar[type[MethodOptions]] = FullOptions
    summary: ClassVar[str] = "reference: all parameters of the backbone"
    learning_rate: ClassVar[float] = 1e-4
    selects: ClassVar[bool] = True

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return SelectedBackbone(backbone, tuple(dict(backbone.encoder.named_parameters())), "FULL")
