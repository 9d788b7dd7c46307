"""LoHa and LoKr, through peft: updates that are products other than LoRA's."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import LoHaConfig, LoKrConfig, PeftConfig
from pydantic import Field

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftOptions, PeftTuner


class LoHaOptions(PeftOptions):
    """Options of LoHa."""

    name: Literal["loha"] = "loha"
    rank: int = Field(8, ge=1, description="rank of both factors")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")


@TUNERS.register("loha")
class LoHa(PeftTuner[LoHaOptions]):
    """An update that is the elementwise product of two low-rank matrices: rank up to its square (Hyeon-Woo et al.)."""

    Options: ClassVar[type[MethodOptions]] = LoHaOptions
    summary: ClassVar[str] = "Hadamard products of low-rank updates, through peft (arXiv 2108.06098)"
    learning_rate: ClassVar[float] = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"flat_layers"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`."""
        return LoHaConfig(r=self.options.rank, alpha=self.options.alpha, target_modules=targets)


class LoKrOptions(PeftOptions):
    """Options of LoKr."""

    name: Literal["lokr"] = "lokr"
    rank: int = Field(8, ge=1, description="rank of the larger factor")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")


@TUNERS.register("lokr")
class LoKr(PeftTuner[LoKrOptions]):
    """An update that is the Kronecker product of a small and a low-rank matrix (Edalati et al.; Yeh et al.)."""

    Options: ClassVar[type[MethodOptions]] = LoKrOptions
    summary: ClassVar[str] = "Kronecker products as updates, through peft (arXiv 2309.14859)"
    learning_rate: ClassVar[float] = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"flat_layers"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`."""
        return LoKrConfig(r=self.options.rank, alpha=self.options.alpha, target_modules=targets)
