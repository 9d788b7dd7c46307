"""IA3, through peft."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import IA3Config, PeftConfig
from pydantic import Field

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftOptions, PeftTuner, Role, target_pattern


class IA3Options(PeftOptions):
    """Options of IA3."""

    name: Literal["ia3"] = "ia3"
    roles: tuple[Role, ...] = Field(
        ("attention.qkv", "mlp.out", "conv"), min_length=1, description="which layers are scaled"
    )


@TUNERS.register("ia3")
class IA3(PeftTuner[IA3Options]):
    """Learned scales of queries, keys and values and of the MLP's hidden units; they start at one (Liu et al.).

    The paper scales keys and values; where the backbone has one layer for all three, queries are scaled as well.
    """

    Options: ClassVar[type[MethodOptions]] = IA3Options
    summary: ClassVar[str] = "scales of attention and hidden units, through peft (arXiv 2205.05638)"
    learning_rate: ClassVar[float] = 3e-3

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`. Inputs are scaled in the MLP's second layer, outputs elsewhere."""
        before = "mlp.out" in self.options.roles and backbone.layout.paths("mlp.out")
        scaled_before = target_pattern(backbone, ("mlp.out",)) if before else []
        return IA3Config(target_modules=targets, feedforward_modules=scaled_before)
