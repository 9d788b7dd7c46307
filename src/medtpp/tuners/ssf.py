"""SSF: scale and shift deep features (Lian et al., arXiv 2210.08823)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from timm.layers import LayerNorm2d, RmsNorm, RmsNormFp32
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._switched import SwitchedBackbone, unhook
from medtpp.tuners.base import TunedBackbone, Tuner

ROLES = (
    "embed.patch",
    "norm.embed",
    "conv",
    "conv.depthwise",
    "norm.conv",
    "norm.attention",
    "attention.qkv",
    "attention.projection",
    "norm.mlp",
    "mlp.in",
    "mlp.out",
    "downsample",
    "norm.downsample",
    "norm.final",
)
LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32)  # whose output has its channels last


class ScaleShift(nn.Module):
    """gamma * x + beta for each channel of a module's output.

    Args:
        width: Channels.
        channel_dim: Where the channels of the output are: -1 after linear layers and norms, 1 after convolutions.
        generator: Draws the small departures from identity of the paper, N(1, 0.02) and N(0, 0.02).
    """

    def __init__(self, width: int, channel_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.normal(1.0, 0.02, (width,), generator=generator))
        self.beta = nn.Parameter(torch.normal(0.0, 0.02, (width,), generator=generator))
        self.channel_dim = channel_dim
        self.enabled = True

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG002  (torch's signature)
        """A forward hook of the module whose output is scaled."""
        if not self.enabled:
            return output
        shape = [-1] + [1] * (output.ndim - 1 - self.channel_dim % output.ndim)
        return torch.addcmul(self.beta.view(shape).to(output.dtype), output, self.gamma.view(shape).to(output.dtype))

    def fold_into(self, module: Any) -> None:
        """Put scale and shift into the weight and bias of a linear layer, convolution or norm."""
        weight, bias = module.weight.data, module.bias
        module.weight.data = weight * self.gamma.data.view(-1, *[1] * (weight.ndim - 1))
        shift = self.beta.data if bias is None else bias.data * self.gamma.data + self.beta.data
        module.bias = nn.Parameter(shift.clone(), requires_grad=False)


class SSFBackbone(SwitchedBackbone):
    """A backbone with a `ScaleShift` after each module of some roles."""

    def __init__(self, source: Backbone, seeds: Seeds) -> None:
        super().__init__(source)
        modules: dict[str, Any] = dict(source.encoder.named_modules())
        self.paths = source.layout.paths(*ROLES)
        scales = []
        for path in self.paths:
            module = modules[path]
            last = isinstance(module, LAST) and not isinstance(module, LayerNorm2d)
            scale = ScaleShift(module.weight.shape[0], -1 if last else 1, seeds.generator("tuner", path))
            scales.append(scale)
            module.register_forward_hook(scale.hook)
        self.scales: Any = nn.ModuleList(scales)
        self._own({f"scales.{name}": parameter for name, parameter in self.scales.named_parameters()})

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return self.scales

    def fold(self) -> Backbone:
        """See `TunedBackbone.fold`."""
        twin = copy.deepcopy(self)
        modules = dict(twin.source.encoder.named_modules())
        for path, scale in zip(twin.paths, twin.scales, strict=True):
            unhook(modules[path], scale)
            scale.fold_into(modules[path])
        return twin.source

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "SSF", "modules": list(self.paths)}


class SSFOptions(MethodOptions):
    """SSF has no options."""

    name: Literal["ssf"] = "ssf"


@TUNERS.register("ssf")
class SSF(Tuner[SSFOptions]):
    """Scale and shift after the patch embedding, every linear layer and every norm; folds into the weights exactly."""

    Options: ClassVar[type[MethodOptions]] = SSFOptions
    summary: ClassVar[str] = "scale and shift of features after every operation (arXiv 2210.08823)"
    learning_rate: ClassVar[float] = 3e-3

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return SSFBackbone(backbone, seeds)
