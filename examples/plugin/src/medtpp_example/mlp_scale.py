"""A learned scale of what each MLP adds: one place of IA3 (Liu et al., arXiv 2205.05638)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners import TunedBackbone, Tuner


class Scale(nn.Module):
    """gamma * x for each channel; it starts at one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.enabled = True

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG002  (torch's signature)
        """A forward hook of the layer whose output is scaled."""
        return output * self.gamma.to(output.dtype) if self.enabled else output


class ScaledBackbone(TunedBackbone):
    """A backbone with a `Scale` after the last layer of each MLP."""

    def __init__(self, source: Backbone) -> None:
        super().__init__(source)
        self.paths = source.layout.paths("mlp.out")
        layers: list[Any] = [source.encoder.get_submodule(path) for path in self.paths]
        self.scales: Any = nn.ModuleList([Scale(layer.out_features) for layer in layers])
        for layer, scale in zip(layers, self.scales, strict=True):
            layer.register_forward_hook(scale.hook)
        self._own(dict(self.scales.named_parameters()))  # enters the target parameters and freezes all else

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """See `TunedBackbone.bypass`."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, enabled: bool) -> None:
        for scale in self.scales:
            scale.enabled = enabled

    def fold(self) -> Backbone:
        """See `TunedBackbone.fold`."""
        twin = copy.deepcopy(self)
        for path, scale in zip(twin.paths, twin.scales, strict=True):
            layer: Any = twin.source.encoder.get_submodule(path)
            layer._forward_hooks.clear()
            layer.weight.data = layer.weight.data * scale.gamma.data[:, None]
            layer.bias.data = layer.bias.data * scale.gamma.data
        return twin.source

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "MLP_SCALE", "modules": list(self.paths)}


class MLPScaleOptions(MethodOptions):
    """The tuner has no options."""

    name: Literal["mlp_scale"] = "mlp_scale"


@TUNERS.register("mlp_scale")
class MLPScale(Tuner[MLPScaleOptions]):
    """A scale for each channel that an MLP adds."""

    Options: ClassVar[type[MethodOptions]] = MLPScaleOptions
    summary: ClassVar[str] = "a scale of each channel that an MLP adds (arXiv 2205.05638)"
    learning_rate: ClassVar[float] = 3e-3
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return ScaledBackbone(backbone)
