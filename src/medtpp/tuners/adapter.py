"""Bottleneck adapters in sequence (Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._bottleneck import Bottleneck, BottleneckBackbone, widths_of
from medtpp.tuners.base import TunedBackbone, Tuner, paths_of

DEVIATION = 0.01  # of the first weights: so small that the backbone starts all but unchanged


class SequentialBottleneck(Bottleneck):
    """A bottleneck of a module's output, added to that output."""

    def __init__(self, width: int, bottleneck: int, activation: nn.Module) -> None:
        super().__init__(width, bottleneck, activation)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG002  (torch's signature)
        """A forward hook of the module."""
        return output + self(output) if self.enabled else output


class AdapterBackbone(BottleneckBackbone):
    """A backbone with a bottleneck after each of some modules.

    Args:
        source: The backbone.
        paths: The modules.
        bottleneck: Channels of the bottlenecks.
        activation: Their non-linearity.
        seeds: Decide the initialisation.
    """

    def __init__(
        self, source: Backbone, paths: tuple[str, ...], bottleneck: int, activation: nn.Module, seeds: Seeds
    ) -> None:
        widths = widths_of(source, paths)
        super().__init__(source, lambda width: SequentialBottleneck(width, bottleneck, activation), widths, seeds)
        self.paths = paths
        for path, added in zip(paths, self.bottlenecks, strict=True):
            source.encoder.get_submodule(path).register_forward_hook(added.hook)

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "ADAPTER", "modules": list(self.paths)}


class AdapterOptions(MethodOptions):
    """Options of the adapter."""

    name: Literal["adapter"] = "adapter"
    placement: Literal["pfeiffer", "houlsby"] = Field(
        "pfeiffer", description="pfeiffer: after each block; houlsby: after attention and after the MLP"
    )
    bottleneck: int = Field(64, ge=1, description="channels of the bottleneck")


@TUNERS.register("adapter")
class Adapter(Tuner[AdapterOptions]):
    """A bottleneck with a residual connection, h + up(activation(down(h))), in place of h.

    - "pfeiffer": h is what the block gives, after the skip connection; ReLU. So does the `adapters` library in ViTs.
      (Some codes for vision call by this name the second half of "houlsby".)
    - "houlsby": h is what attention and MLP project back to the width, before the skip connection, and before
      LayerScale, which is younger; GELU, as in the authors' code.

    Both start by Houlsby's rule, a normal distribution of deviation 0.01 cut at two deviations. The norms stay frozen,
    where Houlsby trains them, and 64 channels are the default at any width, where Pfeiffer has a sixteenth of it.
    """

    Options: ClassVar[type[MethodOptions]] = AdapterOptions
    summary: ClassVar[str] = "bottlenecks after blocks or their parts (arXiv 1902.00751, arXiv 2005.00247)"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        size = self.options.bottleneck
        if self.options.placement == "pfeiffer":
            return AdapterBackbone(backbone, backbone.layout.blocks, size, nn.ReLU(), seeds)
        return AdapterBackbone(backbone, paths_of(backbone, "attention.projection", "mlp.out"), size, nn.GELU(), seeds)
