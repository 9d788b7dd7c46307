"""RepAdapter: linear bottlenecks before linear layers, which fold into them (Luo et al., arXiv 2302.08106)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._switched import SwitchedBackbone
from medtpp.tuners.base import TunedBackbone, Tuner


class LinearBottleneck(nn.Module):
    """x + scale * up(down(x)) as a layer's input; `up` has groups, so that it is sparse, and starts at zero.

    Args:
        width: Channels of the input, D.
        bottleneck: Channels in between, a multiple of `groups`.
        groups: Of `up`; one where D is no multiple of it.
        scale: Of what is added.
    """

    def __init__(self, width: int, bottleneck: int, groups: int, scale: float) -> None:
        super().__init__()
        self.groups = groups if width % groups == 0 else 1
        self.scale = scale
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Parameter(torch.zeros(self.groups, bottleneck // self.groups, width // self.groups))
        self.shift = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        changed: Tensor = x + self.scale * (self._lead_out(self.down(x)) + self.shift).to(x.dtype)
        return changed

    def _lead_out(self, inner: Any) -> Any:
        """(..., bottleneck) to (..., D), group by group."""
        return (inner.unflatten(-1, (self.groups, 1, -1)) @ self.up.to(inner.dtype)).flatten(-3)

    def hook(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:  # noqa: ARG002
        """A forward pre-hook of the layer."""
        return (self(inputs[0]), *inputs[1:]) if self.enabled else None

    @torch.no_grad()
    def fold_into(self, layer: Any) -> None:
        """W (x + s (U (D x + d) + u)) + b is W (I + s U D) x + W s (U d + u) + b."""
        weight = layer.weight.data.double()
        up = self._lead_out(torch.eye(len(self.down.bias)).to(weight)).T  # (D, bottleneck)
        added = weight @ (self.scale * (up @ self.down.bias.double() + self.shift.double()))
        merged = weight + self.scale * (weight @ up) @ self.down.weight.double()
        bias = added if layer.bias is None else layer.bias.data.double() + added
        layer.weight.data = merged.to(layer.weight.dtype)
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


class RepAdapterBackbone(SwitchedBackbone):
    """A backbone with a `LinearBottleneck` before each layer of some roles."""

    def __init__(self, source: Backbone, options: RepAdapterOptions, seeds: Seeds) -> None:
        super().__init__(source)
        modules: dict[str, Any] = dict(source.encoder.named_modules())
        paths = source.layout.paths("attention.qkv", "mlp.in")
        self.paths = tuple(path for path in paths if isinstance(modules[path], nn.Linear))
        with seeds.scope("tuner"):
            self.bottlenecks: Any = nn.ModuleList(
                [
                    LinearBottleneck(modules[path].in_features, options.bottleneck, options.groups, options.scale)
                    for path in self.paths
                ]
            )
        for path, added in zip(self.paths, self.bottlenecks, strict=True):
            modules[path].register_forward_pre_hook(added.hook)
        self._own(dict(self.bottlenecks.named_parameters()))

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return self.bottlenecks

    def fold(self) -> Backbone:
        """See `TunedBackbone.fold`."""
        twin = copy.deepcopy(self)
        modules: dict[str, Any] = dict(twin.source.encoder.named_modules())
        for path, added in zip(twin.paths, twin.bottlenecks, strict=True):
            hooks = modules[path]._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is added]:
                del hooks[key]
            added.fold_into(modules[path])
        return twin.source

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "REPADAPTER", "modules": list(self.paths)}


class RepAdapterOptions(MethodOptions):
    """Options of RepAdapter."""

    name: Literal["repadapter"] = "repadapter"
    bottleneck: int = Field(8, ge=2, multiple_of=2, description="channels of the bottlenecks")
    groups: Literal[1, 2] = Field(2, description="of the layer that leads out of a bottleneck")
    scale: PositiveFloat = Field(1.0, description="of what is added")


@TUNERS.register("repadapter")
class RepAdapter(Tuner[RepAdapterOptions]):
    """An adapter that costs nothing after training: without an activation, it folds into the next layer exactly.

    Before the first layers of attention and MLP. Where queries, keys and values have layers of their own, each has its
    own bottleneck.
    """

    Options: ClassVar[type[MethodOptions]] = RepAdapterOptions
    summary: ClassVar[str] = "linear bottlenecks before attention and MLP (arXiv 2302.08106)"
    learning_rate: ClassVar[float] = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return RepAdapterBackbone(backbone, self.options, seeds)
