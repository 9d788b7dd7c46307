"""LoRA, rsLoRA and DoRA, through peft."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import LoraConfig, PeftConfig
from pydantic import Field
from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftBackbone, PeftOptions, PeftTuner
from medtpp.tuners._starts import Start, StartedLoRA, start_from_images
from medtpp.tuners.base import TunedBackbone


class _LowRankOptions(PeftOptions):
    """What these methods have in common."""

    rank: int = Field(8, ge=1, description="rank of the update")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")

    def config(self, targets: str, **variant: bool) -> PeftConfig:
        """Peft's configuration."""
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets, bias="none", **variant)


class PlainLoRAOptions(_LowRankOptions):
    """Options of LoRA with its own start."""

    name: Literal["lora"] = "lora"


class LoRAOptions(PlainLoRAOptions):
    """Options of LoRA."""

    start: Start = Field(
        "standard", description="of A and B; standard: A random, B zero; others exclude TPP, which is one itself"
    )


@TUNERS.register("lora")
class LoRA(PeftTuner[PlainLoRAOptions]):
    """A low-rank update beside linear layers: W x + (alpha / rank) B A x, with B starting at zero (Hu et al.)."""

    Options: ClassVar[type[MethodOptions]] = LoRAOptions
    summary: ClassVar[str] = "low-rank updates of linear layers, through peft (arXiv 2106.09685)"
    learning_rate: ClassVar[float] = 1e-3

    @property
    def needs_images(self) -> bool:
        """See `Tuner.needs_images`."""
        return self.own_start == "eva"

    @property
    def own_start(self) -> Start | None:
        """See `Tuner.own_start`."""
        start = self.options.start if isinstance(self.options, LoRAOptions) else "standard"
        return None if start == "standard" else start

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`."""
        return self.options.config(targets)

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:
        """See `Tuner.attach`."""
        if self.own_start and "conv" in self.options.roles and backbone.layout.paths("conv"):
            raise ConfigError(
                f"tuner.start={self.own_start} is for linear layers, and {backbone.spec.name} has convolutions in "
                "the role conv. Use --set tuner.start=standard."
            )
        config = self.configure(backbone, self.pattern(backbone), seeds)
        if self.own_start in ("pissa", "olora", "lora_ga"):
            return StartedLoRA(backbone, config, self.own_start, seeds)
        tuned = PeftBackbone(backbone, config, seeds)
        if self.needs_images and images is not None:
            start_from_images(tuned, images)
        return tuned


class RsLoRAOptions(_LowRankOptions):
    """Options of rsLoRA."""

    name: Literal["rslora"] = "rslora"
    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(8.0, gt=0, description="the update is scaled by alpha / sqrt(rank)")


@TUNERS.register("rslora")
class RsLoRA(PeftTuner[RsLoRAOptions]):
    """LoRA whose update is scaled by alpha / sqrt(rank), so that high ranks learn as well (Kalajdzievski)."""

    Options: ClassVar[type[MethodOptions]] = RsLoRAOptions
    summary: ClassVar[str] = "LoRA scaled for high ranks, through peft (arXiv 2312.03732)"
    learning_rate: ClassVar[float] = 1e-3

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`."""
        return self.options.config(targets, use_rslora=True)


class DoRAOptions(_LowRankOptions):
    """Options of DoRA."""

    name: Literal["dora"] = "dora"


@TUNERS.register("dora")
class DoRA(PeftTuner[DoRAOptions]):
    """LoRA's update, after which each row of the weights gets a learned length: (m / |V|) V x (Liu et al.).

    V is W + (alpha / rank) B A, and m starts as the lengths of W's rows. No gradient goes through |V|, as in the paper.
    """

    Options: ClassVar[type[MethodOptions]] = DoRAOptions
    summary: ClassVar[str] = (
        "low-rank updates of linear layers and lengths of their rows, through peft (arXiv 2402.09353)"
    )
    learning_rate: ClassVar[float] = 1e-3

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`."""
        return self.options.config(targets, use_dora=True)
