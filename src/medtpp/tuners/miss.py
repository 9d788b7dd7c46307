"""MiSS, through peft."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import MissConfig, PeftConfig
from pydantic import Field

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftOptions, PeftTuner


class MiSSOptions(PeftOptions):
    """Options of MiSS."""

    name: Literal["miss"] = "miss"
    rank: int = Field(16, ge=2, multiple_of=2, description="rank of the update")


@TUNERS.register("miss")
class MiSS(PeftTuner[MiSSOptions]):
    """An update made of one small trained matrix that all shards of the inputs share (Kang and Yin)."""

    Options: ClassVar[type[MethodOptions]] = MiSSOptions
    summary: ClassVar[str] = "one small matrix shared by shards of inputs, through peft (arXiv 2409.15371)"
    learning_rate: ClassVar[float] = 3e-4
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`."""
        return MissConfig(r=self.options.rank, target_modules=targets, bias="none")
