"""Conv-Adapter: bottlenecks of convolutions beside those of a ConvNet (Chen et al., arXiv 2208.07463)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners._switched import SwitchedBackbone
from medtpp.tuners.base import TunedBackbone, Tuner


class ConvBottleneck(nn.Module):
    """scale * up(gelu(down(x))), beside a convolution of which `down` has the kernel, stride, padding and dilation.

    `down` is grouped, one group for each channel of the bottleneck, and `up` looks at single pixels. As in the paper,
    the learned scale of each channel starts at one; here `up` starts at zero, so that the backbone starts unchanged.

    Args:
        layer: The convolution.
        reduction: Its outputs per channel of the bottleneck.
    """

    def __init__(self, layer: Any, reduction: int) -> None:
        super().__init__()
        convolution: Any = type(layer) if type(layer) in (nn.Conv2d, nn.Conv3d) else nn.Conv2d
        inner = max(1, layer.in_channels // reduction)
        while layer.in_channels % inner:
            inner -= 1
        shape = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        self.down = convolution(layer.in_channels, inner, groups=inner, bias=False, **shape)
        self.up = convolution(inner, layer.out_channels, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(layer.out_channels, *[1] * len(layer.kernel_size)))
        nn.init.zeros_(self.up.weight)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *grid) to what is added to the convolution's output."""
        added: Tensor = self.scale * self.up(nn.functional.gelu(self.down(x)))
        return added

    def hook(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG002
        """A forward hook of the convolution."""
        return output + self(inputs[0]) if self.enabled else output


class ConvAdapterBackbone(SwitchedBackbone):
    """A backbone with a `ConvBottleneck` beside each convolution that looks at neighbours."""

    def __init__(self, source: Backbone, reduction: int, seeds: Seeds) -> None:
        super().__init__(source)
        modules: dict[str, Any] = dict(source.encoder.named_modules())
        paths = source.layout.paths("conv", "conv.depthwise")
        self.paths = tuple(path for path in paths if max(modules[path].kernel_size) > 1)
        with seeds.scope("tuner"):
            self.bottlenecks: Any = nn.ModuleList([ConvBottleneck(modules[path], reduction) for path in self.paths])
        for path, added in zip(self.paths, self.bottlenecks, strict=True):
            modules[path].register_forward_hook(added.hook)
        self._own(dict(self.bottlenecks.named_parameters()))

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return self.bottlenecks

    def fold(self) -> Backbone:
        """What is added is not linear: it cannot be folded into weights."""
        raise ConfigError("Conv-Adapter cannot be merged: it is not linear. Keep the adapter beside the backbone.")

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "CONV_ADAPTER", "modules": list(self.paths)}


class ConvAdapterOptions(MethodOptions):
    """Options of Conv-Adapter."""

    name: Literal["conv_adapter"] = "conv_adapter"
    reduction: int = Field(4, ge=1, description="inputs of a convolution per channel of its bottleneck")


@TUNERS.register("conv_adapter")
class ConvAdapter(Tuner[ConvAdapterOptions]):
    """Beside each 3 x 3 (7 x 7) convolution of a block, in parallel: the paper's best variant on ConvNets."""

    Options: ClassVar[type[MethodOptions]] = ConvAdapterOptions
    summary: ClassVar[str] = "bottlenecks beside the convolutions of ConvNets (arXiv 2208.07463)"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"convolutions"})

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return ConvAdapterBackbone(backbone, self.options.reduction, seeds)
