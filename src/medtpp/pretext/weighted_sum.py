"""Several pretext tasks at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from medtpp.backbones import Backbone, Spec
from medtpp.config import PRETEXTS, MethodOptions
from medtpp.pretext.base import Pretext
from medtpp.seeds import Draws, Seeds


class SumOptions(MethodOptions):
    """Options of a sum."""

    name: Literal["sum"] = "sum"
    parts: dict[str, dict[str, Any]] = Field(
        {"mae": {}, "features": {}},
        min_length=1,
        description="tasks by name, each with its options and its `weight` (1): {mae: {weight: 2, mask_ratio: 0.5}}",
    )

    @field_validator("parts")
    @classmethod
    def _known(cls, parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, options in parts.items():
            if name == "sum":
                raise ValueError("a sum cannot be a part of a sum")
            if name not in PRETEXTS.names():
                raise ValueError(f"there is no pretext task {name!r}; known: {', '.join(PRETEXTS.names())}")
            if not float(options.get("weight", 1)) > 0:
                raise ValueError(f"the weight of {name} must be above 0")
            PRETEXTS.get(name).Options.model_validate(_without_weight(options))
        return parts


@PRETEXTS.register("sum")
class Sum(Pretext):
    """The weighted sum of the losses of other tasks, each with a head of its own, on the same images."""

    Options: ClassVar[type[MethodOptions]] = SumOptions
    summary: ClassVar[str] = "a weighted sum of other pretext tasks"

    def __init__(self, options: SumOptions, spec: Spec, seeds: Seeds) -> None:
        nn.Module.__init__(self)
        self.weights = {name: float(given.get("weight", 1)) for name, given in options.parts.items()}
        self.parts: Any = nn.ModuleDict(
            {
                name: PRETEXTS.get(name)(PRETEXTS.get(name).Options.model_validate(_without_weight(given)), spec, seeds)
                for name, given in options.parts.items()
            }
        )
        parts: list[Any] = list(self.parts.values())
        self.needs = self.needs_of(options)
        self.couples_images = any(part.couples_images for part in parts)
        self.least_batch = max(part.least_batch for part in parts)

    @classmethod
    def needs_of(cls, options: MethodOptions) -> frozenset[str]:
        """See `Pretext.needs_of`: what all of its parts need."""
        parts: Mapping[str, Any] = getattr(options, "parts", {})
        return frozenset(capability for name in parts for capability in PRETEXTS.get(name).needs)

    def begin(self, backbone: Backbone) -> None:
        """See `Pretext.begin`."""
        for part in self.parts.values():
            part.begin(backbone)

    def after_step(self, backbone: Backbone, step: int, total: int) -> None:
        """See `Pretext.after_step`."""
        for part in self.parts.values():
            part.after_step(backbone, step, total)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and the loss of each part."""
        losses = {name: part.loss(backbone, images, draws)[0] for name, part in self.parts.items()}
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        return total, {f"loss_{name}": loss.detach() for name, loss in losses.items()}

    def preview(self, backbone: Backbone, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The pictures of all parts."""
        views: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            views |= {f"{name} {view}": pictures for view, pictures in part.preview(backbone, images, draws).items()}
        return views

    def load_head(self, heads: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """See `Pretext.load_head`: true where all parts found theirs."""
        found = [part.load_head(heads) for part in self.parts.values()]  # each tries, whatever the others found
        return all(found)


def _without_weight(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "weight"}
