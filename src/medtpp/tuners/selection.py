"""Methods that train a few of the backbone's own parameters: BitFit, LN-tuning and last blocks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from timm.layers import RmsNorm, RmsNormFp32
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners._selected import SelectedBackbone
from medtpp.tuners.base import TunedBackbone, Tuner

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32, nn.GroupNorm, nn.BatchNorm2d, nn.BatchNorm3d)


class BitFitOptions(MethodOptions):
    """BitFit has no options."""

    name: Literal["bitfit"] = "bitfit"


@TUNERS.register("bitfit")
class BitFit(Tuner[BitFitOptions]):
    """All biases: of linear layers, of norms and of the patch embedding (Ben Zaken et al.)."""

    Options: ClassVar[type[MethodOptions]] = BitFitOptions
    summary: ClassVar[str] = "the backbone's biases (arXiv 2106.10199)"
    learning_rate: ClassVar[float] = 3e-3
    selects: ClassVar[bool] = True

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
    """Weights and biases of all norms, those inside attention and MLP too (Qi et al.); statistics stay as they are."""

    Options: ClassVar[type[MethodOptions]] = LNTuningOptions
    summary: ClassVar[str] = "the backbone's norms (arXiv 2211.08682)"
    learning_rate: ClassVar[float] = 3e-3
    selects: ClassVar[bool] = True

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


class LastBlocksOptions(MethodOptions):
    """Options of last blocks."""

    name: Literal["last_blocks"] = "last_blocks"
    blocks: int = Field(2, ge=1, description="how many")


@TUNERS.register("last_blocks")
class LastBlocks(Tuner[LastBlocksOptions]):
    """All parameters of the last blocks and of the final norm (partial fine-tuning; Yosinski et al.)."""

    Options: ClassVar[type[MethodOptions]] = LastBlocksOptions
    summary: ClassVar[str] = "all parameters of the last blocks (arXiv 1411.1792)"
    learning_rate: ClassVar[float] = 1e-4
    selects: ClassVar[bool] = True

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        blocks = backbone.layout.blocks
        if self.options.blocks > len(blocks):
            raise ConfigError(f"{backbone.spec.name} has {len(blocks)} blocks; tuner.blocks is {self.options.blocks}.")
        paths = (*blocks[-self.options.blocks :], *backbone.layout.paths("norm.final"))
        inside = tuple(f"{path}." for path in paths)
        names = tuple(name for name, _ in backbone.encoder.named_parameters() if name.startswith(inside))
        return SelectedBackbone(backbone, names, "LAST_BLOCKS")
