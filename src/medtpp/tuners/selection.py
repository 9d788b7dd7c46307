"""Methods that train a few of the backbone's own parameters: BitFit and LN-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from timm.layers import RmsNorm, RmsNormFp32
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners._selected import SelectedBackbone
from medtpp.tuners.base import TunedBackbone, Tuner

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32)


class BitFitOptions(MethodOptions):
    """BitFit has no options."""

    name: Literal["bitfit"] = "bitfit"


@TUNERS.register("bitfit")
class BitFit(Tuner[BitFitOptions]):
    """All biases: of linear layers, of norms and of the patch embedding (Ben Zaken et al.)."""

    Options: ClassVar[type[MethodOptions]] = BitFitOptions
    summary: ClassVar[str] = "the backbone's biases (arXiv 2106.10199)"
    learning_rate: ClassVar[float] = 3e-3

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        names = tuple(name for name, _ in backbone.encoder.named_parameters() if name.endswith("bias"))
        if not names:
            raise ConfigError(f"{backbone.spec.name} has no biases for BitFit to train. Choose another tuner.")
        return SelectedBackbone(backbone, names, "BITFIT")


class LNTuningOptions(MethodOptions):
    """LN-tuning has no options."""

    name: Literal["ln_tuning"] = "ln_tuning"


@TUNERS.register("ln_tuning")
class LNTuning(Tuner[LNTuningOptions]):
    """Weights and biases of all layer norms and RMS norms, those inside attention and MLP too (Qi et al.)."""

    Options: ClassVar[type[MethodOptions]] = LNTuningOptions
    summary: ClassVar[str] = "the backbone's norms (arXiv 2211.08682)"
    learning_rate: ClassVar[float] = 3e-3

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        names = tuple(
            f"{path}.{name}"
            for path, module in backbone.encoder.named_modules()
            if isinstance(module, NORMS)
            for name, _ in module.named_parameters()
        )
        if not names:
            raise ConfigError(f"{backbone.spec.name} has no norms for LN-tuning to train. Choose another tuner.")
        return SelectedBackbone(backbone, names, "LN_TUNING")
