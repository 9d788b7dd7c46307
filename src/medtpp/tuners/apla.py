"""APLA: a random part of the layers that project attention (Sorkhei et al., arXiv 2503.11335)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._switched import SwitchedBackbone, unhook
from medtpp.tuners.base import TunedBackbone, Tuner, check_keys, paths_of


class TrainedRows(nn.Module):
    """Copies of some rows of a linear layer's weight, which take their place.

    Args:
        layer: The layer, which stays as it is.
        rows: Which of its outputs.
    """

    def __init__(self, layer: Any, rows: Tensor) -> None:
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.weight = nn.Parameter(layer.weight.detach()[rows].clone())
        self.enabled = True

    def hook(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of the layer: what the trained rows give more than the layer's own."""
        if not self.enabled:
            return output
        more = F.linear(inputs[0], self.weight - layer.weight[self.rows])
        return output.index_add(-1, self.rows, more.to(output.dtype))


class APLABackbone(SwitchedBackbone):
    """A backbone some rows of whose attention projections are trained."""

    def __init__(self, source: Backbone, share: float, seeds: Seeds) -> None:
        super().__init__(source)
        modules: dict[str, Any] = dict(source.encoder.named_modules())
        self.paths = paths_of(source, "attention.projection")
        parts = []
        for path in self.paths:
            outputs = modules[path].out_features
            order = torch.randperm(outputs, generator=seeds.generator("tuner", path))
            part = TrainedRows(modules[path], order[: max(1, round(share * outputs))].sort().values)
            modules[path].register_forward_hook(part.hook)
            parts.append(part)
        self.rows: Any = nn.ModuleList(parts)
        self._own(dict(self.rows.named_parameters()))

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return self.rows

    def fold(self) -> Backbone:
        """See `TunedBackbone.fold`."""
        twin = copy.deepcopy(self)
        modules: dict[str, Any] = dict(twin.source.encoder.named_modules())
        for path, part in zip(twin.paths, twin.rows, strict=True):
            unhook(modules[path], part)
            modules[path].weight.data[part.rows] = part.weight.data
        return twin.source

    def adapter_state(self) -> dict[str, Tensor]:
        """The weights, and which rows they are: another version of torch may choose others."""
        rows = {f"rows.{index}.rows": part.rows for index, part in enumerate(self.rows)}
        return {**super().adapter_state(), **rows}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """See `TunedBackbone.load_adapter_state`."""
        check_keys(state, self.adapter_state())
        for index, part in enumerate(self.rows):
            part.rows.copy_(state[f"rows.{index}.rows"])
            part.weight.data.copy_(state[f"rows.{index}.weight"])

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "APLA", "modules": list(self.paths)}


class APLAOptions(MethodOptions):
    """Options of APLA."""

    name: Literal["apla"] = "apla"
    share: float = Field(0.25, gt=0, le=1, description="of each layer's outputs that is trained")


@TUNERS.register("apla")
class APLA(Tuner[APLAOptions]):
    """Weights of randomly chosen outputs of the projection after attention; the seed chooses them."""

    Options: ClassVar[type[MethodOptions]] = APLAOptions
    summary: ClassVar[str] = "a random part of the attention projections (arXiv 2503.11335)"
    learning_rate: ClassVar[float] = 1e-4
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    selects: ClassVar[bool] = True

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return APLABackbone(backbone, self.options.share, seeds)
