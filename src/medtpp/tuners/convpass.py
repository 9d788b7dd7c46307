"""Convpass: convolutions over the grid of patches beside attention and MLP (Jie and Deng, arXiv 2207.07039)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medtpp.backbones import Backbone, Spec
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners._switched import SwitchedBackbone
from medtpp.tuners.base import TunedBackbone, Tuner, paths_of


class ConvBypass(nn.Module):
    """up(gelu(conv(gelu(down(x))))), the convolution of side 3 over the grid; prefix tokens are grids of one patch.

    The convolution starts as the identity and `up` at zero, so that the backbone starts unchanged.

    Args:
        spec: Of the backbone.
        bottleneck: Channels in between.
        scale: Of what is added.
    """

    def __init__(self, spec: Spec, bottleneck: int, scale: float) -> None:
        super().__init__()
        self.prefix, self.grid = spec.prefix, spec.grid
        self.scale = scale
        self.down = nn.Linear(spec.width, bottleneck)
        self.conv = (nn.Conv2d if spec.dims == 2 else nn.Conv3d)(bottleneck, bottleneck, 3, padding=1)
        self.up = nn.Linear(bottleneck, spec.width)
        nn.init.dirac_(self.conv.weight)
        for parameter in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)
        self.enabled = True

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P + N, D) to (B, P + N, D).

        Raises:
            ConfigError: Patches are missing: there is no grid.
        """
        if tokens.shape[1] != self.prefix + math.prod(self.grid):
            raise ConfigError(
                "Convpass needs all patches, for its convolutions. Use a pretext task that drops none, such as simmim, "
                "or another tuner."
            )
        x = nn.functional.gelu(self.down(tokens))
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        centre = self.conv.weight.flatten(2)[..., 3 ** len(self.grid) // 2]
        prefix = nn.functional.linear(prefix, centre, self.conv.bias)
        image = patches.transpose(1, 2).reshape(x.shape[0], -1, *self.grid)  # (B, C, *grid)
        patches = self.conv(image).flatten(2).transpose(1, 2)
        added: Tensor = self.up(nn.functional.gelu(torch.cat([prefix, patches], dim=1)))
        return self.scale * added

    def hook(
        self,
        module: nn.Module,  # noqa: ARG002  (torch's signature)
        args: tuple[Tensor, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """A forward hook of an attention or MLP; attention of transformers gives its weights, too."""
        if not self.enabled:
            return output
        added = self(args[0] if args else kwargs["hidden_states"])
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


class ConvpassBackbone(SwitchedBackbone):
    """A backbone with a `ConvBypass` beside the attention and the MLP of each block."""

    def __init__(self, source: Backbone, bottleneck: int, scale: float, seeds: Seeds) -> None:
        super().__init__(source)
        inside = paths_of(source, "attention.projection", "mlp.out")
        self.paths = tuple(path.rpartition(".")[0] for path in inside)
        with seeds.scope("tuner"):
            self.bypasses: Any = nn.ModuleList([ConvBypass(source.spec, bottleneck, scale) for _ in self.paths])
        modules: dict[str, Any] = dict(source.encoder.named_modules())
        for path, added in zip(self.paths, self.bypasses, strict=True):
            modules[path].register_forward_hook(added.hook, with_kwargs=True)
        self._own(dict(self.bypasses.named_parameters()))

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return self.bypasses

    def fold(self) -> Backbone:
        """What is added is not linear: it cannot be folded into weights."""
        raise ConfigError("Convpass cannot be merged: it is not linear. Keep the adapter beside the backbone.")

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "CONVPASS", "modules": list(self.paths)}


class ConvpassOptions(MethodOptions):
    """Options of Convpass."""

    name: Literal["convpass"] = "convpass"
    bottleneck: int = Field(8, ge=1, description="channels of the convolutions")
    scale: float = Field(1.0, gt=0, description="of what is added")


@TUNERS.register("convpass")
class Convpass(Tuner[ConvpassOptions]):
    """Small convolutions give a transformer what it lacks with few images: that neighbours belong together."""

    Options: ClassVar[type[MethodOptions]] = ConvpassOptions
    summary: ClassVar[str] = "convolutions over patches beside attention and MLP (arXiv 2207.07039)"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"sequence"})
    needs_grid: ClassVar[bool] = True

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return ConvpassBackbone(backbone, self.options.bottleneck, self.options.scale, seeds)
