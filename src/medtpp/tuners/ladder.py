"""Ladder side-tuning: a small network beside the backbone that reads its blocks (Sung et al., arXiv 2206.06522)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from medtpp.backbones import Backbone, Features, training_attention
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners._switched import SwitchedBackbone
from medtpp.tuners.base import TunedBackbone, Tuner

HEAD = 32  # channels of an attention head


class Ladder(nn.Module):
    """A narrow transformer each of whose blocks reads one of the backbone's.

    Args:
        width: Channels of the backbone, D.
        depth: Its blocks.
        narrow: Channels here, d.
    """

    def __init__(self, width: int, depth: int, narrow: int) -> None:
        super().__init__()
        self.down: Any = nn.ModuleList([nn.Linear(width, narrow) for _ in range(depth)])
        self.blocks: Any = nn.Sequential(
            *[Block(narrow, narrow // HEAD, mlp_ratio=2, qkv_bias=True) for _ in range(depth)]
        )
        self.gates = nn.Parameter(torch.zeros(depth - 1))
        self.norm = nn.LayerNorm(narrow)
        self.up = nn.Linear(narrow, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The outputs (B, N, D) of all blocks to what is added to each."""
        added = []
        x = self.down[0](states[0])  # (B, N, d)
        with training_attention(x):
            for index, block in enumerate(self.blocks):
                if index:
                    gate = torch.sigmoid(self.gates[index - 1])
                    x = gate * x + (1 - gate) * self.down[index](states[index])
                x = block(x)
                added.append(self.up(self.norm(x)))
        return added


class LadderBackbone(SwitchedBackbone):
    """A backbone whose features get what a ladder adds. No gradient goes through it, so none of its work is kept.

    Where something before its blocks learns as well, a mask token or the embedding of volumes, a gradient must.
    """

    def __init__(self, source: Backbone, narrow: int, seeds: Seeds) -> None:
        super().__init__(source)
        with seeds.scope("tuner"):
            self.ladder = Ladder(source.spec.width, source.spec.depth, narrow)
        self.enabled = True
        self._states: list[Tensor] = []
        for path in source.layout.blocks:
            source.encoder.get_submodule(path).register_forward_hook(self._read)
        self._own(dict(self.ladder.named_parameters()))

    def _read(self, block: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG002  (torch's signature)
        self._states.append(output)

    def encode(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Features:
        """See `Backbone.encode`."""
        before = [*self.embed.values(), *([] if mask_token is None else [mask_token])]
        self._states = []
        try:
            with nullcontext() if any(value.requires_grad for value in before) else torch.no_grad():
                features = self.source.encode(images, keep, mask, mask_token, taps)
            states = self._states
        finally:
            self._states = []
        if not self.enabled:
            return features
        added = self.ladder(states)
        maps = tuple(
            one + added[tap][:, features.prefix :].transpose(1, 2).unflatten(2, features.grid)
            for tap, one in zip(sorted(taps), features.maps, strict=True)
        )
        return replace(features, tokens=features.tokens + added[-1], maps=maps)

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return (self,)

    def fold(self) -> Backbone:
        """A network beside the backbone cannot be folded into its weights."""
        raise ConfigError("The ladder cannot be merged: it is a network of its own. Keep it beside the backbone.")

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "LADDER", "blocks": list(self.layout.blocks)}


class LadderOptions(MethodOptions):
    """Options of the ladder."""

    name: Literal["ladder"] = "ladder"
    width: int = Field(64, ge=HEAD, multiple_of=HEAD, description="channels of the side network")


@TUNERS.register("ladder")
class LadderTuner(Tuner[LadderOptions]):
    """Training needs the memory of the side network alone, since no gradient goes through the backbone."""

    Options: ClassVar[type[MethodOptions]] = LadderOptions
    summary: ClassVar[str] = "a small side network that reads all blocks (arXiv 2206.06522)"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"sequence"})

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return LadderBackbone(backbone, self.options.width, seeds)
