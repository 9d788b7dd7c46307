"""VeRA and RandLoRA, through peft: frozen random matrices that all layers share, and small trained ones beside them."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import PeftConfig, RandLoraConfig, VeraConfig
from pydantic import Field

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftOptions, PeftTuner


class VeRAOptions(PeftOptions):
    """Options of VeRA."""

    name: Literal["vera"] = "vera"
    rank: int = Field(256, ge=1, description="rank of the random matrices")


@TUNERS.register("vera")
class VeRA(PeftTuner[VeRAOptions]):
    """W x + b * B (d * A x): A and B random, frozen and shared, b and d trained for each layer (Kopiczko et al.)."""

    Options: ClassVar[type[MethodOptions]] = VeRAOptions
    summary: ClassVar[str] = "scales of shared random low-rank updates, through peft (arXiv 2310.11454)"
    learning_rate: ClassVar[float] = 1e-2
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`. The random matrices are saved: another version of torch may draw others."""
        return VeraConfig(
            r=self.options.rank,
            target_modules=targets,
            projection_prng_key=seeds.number("tuner") % 2**31,
            save_projection=True,
            bias="none",
        )


class RandLoRAOptions(PeftOptions):
    """Options of RandLoRA."""

    name: Literal["randlora"] = "randlora"
    rank: int = Field(32, ge=1, description="rank of each random matrix; the fewer, the more matrices and parameters")
    alpha: float = Field(640.0, gt=0, description="the update is scaled by alpha / rank and by the matrices' sizes")


@TUNERS.register("randlora")
class RandLoRA(PeftTuner[RandLoRAOptions]):
    """An update of full rank: a trained combination of frozen random low-rank matrices (Albert et al.)."""

    Options: ClassVar[type[MethodOptions]] = RandLoRAOptions
    summary: ClassVar[str] = "full-rank updates combined from random matrices, through peft (arXiv 2502.00987)"
    learning_rate: ClassVar[float] = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`. The random matrices are saved: another version of torch may draw others."""
        return RandLoraConfig(
            r=self.options.rank,
            randlora_alpha=self.options.alpha,
            target_modules=targets,
            projection_prng_key=seeds.number("tuner") % 2**31,
            save_projection=True,
            bias="none",
        )
