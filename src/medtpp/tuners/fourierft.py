"""FourierFT, through peft."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import FourierFTConfig, PeftConfig
from pydantic import Field, PositiveFloat

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, Auto, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftOptions, PeftTuner


class FourierFTOptions(PeftOptions):
    """Options of FourierFT."""

    name: Literal["fourierft"] = "fourierft"
    frequencies: int = Field(1000, ge=1, description="learned coefficients per layer")
    scaling: PositiveFloat | Auto = Field(
        "auto",
        description="of the update; auto: the paper's 300 at a width of 768, and as the width's square elsewhere",
    )


@TUNERS.register("fourierft")
class FourierFT(PeftTuner[FourierFTOptions]):
    """An update that is the inverse Fourier transform of a few learned coefficients (Gao et al.).

    They start at zero and not at random as in the paper: the transform divides by the size of a layer, so that in small
    ones the random start is larger than the weights.
    """

    Options: ClassVar[type[MethodOptions]] = FourierFTOptions
    summary: ClassVar[str] = "updates with few Fourier coefficients, through peft (arXiv 2405.03003)"
    learning_rate: ClassVar[float] = 1e-2
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:
        """See `PeftTuner.configure`."""
        scaling = self.options.scaling
        return FourierFTConfig(
            n_frequency=self.options.frequencies,
            scaling=300.0 * (backbone.spec.width / 768) ** 2 if scaling == "auto" else scaling,
            init_weights=True,
            random_loc_seed=seeds.number("tuner") % 2**31,
            target_modules=targets,
            bias="none",
        )
