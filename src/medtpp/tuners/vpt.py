"""VPT: learned prompt tokens beside the image's (Jia et al., arXiv 2203.12119)."""

from __future__ import annotations

import math
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


class VPTBackbone(SwitchedBackbone):
    """A backbone whose blocks see prompts at the end of their input.

    So prompts come after dropping, and are never masked, pooled or decoded.

    Args:
        source: The backbone.
        prompts: Tokens for a block.
        deep: New ones in each block, which its output drops (VPT-deep); else those that enter the first block leave the
            last one (VPT-shallow).
        seeds: Decide the initialisation.
    """

    def __init__(self, source: Backbone, prompts: int, deep: bool, seeds: Seeds) -> None:
        super().__init__(source)
        spec = source.spec
        # The bound of the reference code: Xavier's for the patch projection.
        bound = math.sqrt(6.0 / (3 * math.prod(spec.patch) + spec.width))
        self.prompts = nn.Parameter(torch.empty(spec.depth if deep else 1, prompts, spec.width))
        with torch.no_grad():
            self.prompts.uniform_(-bound, bound, generator=seeds.generator("tuner"))
        self.enabled = True
        modules = dict(source.encoder.named_modules())
        for index, path in enumerate(source.layout.blocks):
            hooks = _BlockHooks(self, index, first=deep or index == 0, last=deep or index == spec.depth - 1)
            modules[path].register_forward_pre_hook(hooks.append, with_kwargs=True)
            modules[path].register_forward_hook(hooks.remove)
        self._own({"prompts": self.prompts})

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return (self,)

    def fold(self) -> Backbone:
        """Prompts are input, not weights: they cannot be folded in."""
        raise ConfigError(
            "VPT cannot be merged: prompts are tokens, not weights. Keep the adapter beside the backbone."
        )

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        kind = "VPT_DEEP" if len(self.prompts) == self.spec.depth else "VPT_SHALLOW"
        return {"medtpp_type": kind, "prompts": self.prompts.shape[1], "blocks": list(self.layout.blocks)}


class _BlockHooks:
    """Appends prompts before a block runs if they are new there, and removes them after if they go no further."""

    def __init__(self, tuned: VPTBackbone, index: int, first: bool, last: bool) -> None:
        self.tuned = tuned
        self.index = index
        self.first = first
        self.last = last

    def append(
        self,
        block: nn.Module,  # noqa: ARG002  (torch's signature)
        args: tuple[Tensor, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        if not self.tuned.enabled:
            return args, kwargs
        tokens = args[0]  # (B, N, D)
        count = self.tuned.prompts.shape[1]
        rope = kwargs.get("rope")
        if rope is not None:  # prompts have no place in the image: their rotation is by zero, sin 0 and cos 1
            half = rope.shape[-1] // 2
            still = torch.cat([rope.new_zeros(count, half), rope.new_ones(count, half)], dim=-1)
            kwargs = {**kwargs, "rope": torch.cat([rope, still.expand(*rope.shape[:-2], -1, -1)], dim=-2)}
        if kwargs.get("shared_rel_pos_bias") is not None:  # nor have they a bias by it
            bias = nn.functional.pad(kwargs["shared_rel_pos_bias"], (0, count, 0, count))
            kwargs = {**kwargs, "shared_rel_pos_bias": bias}
        if "position_embeddings" in kwargs:  # cosines and sines apart, in networks of transformers
            cosines, sines = (
                nn.functional.pad(part, (0, 0, 0, count), value=value)
                for part, value in zip(kwargs["position_embeddings"], (1.0, 0.0), strict=True)
            )
            kwargs = {**kwargs, "position_embeddings": (cosines, sines)}
        if not self.first:
            return args, kwargs
        prompts = self.tuned.prompts[self.index].to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return (torch.cat([tokens, prompts], dim=1), *args[1:]), kwargs

    def remove(self, block: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002  (torch's signature)
        return output[:, : -self.tuned.prompts.shape[1]] if self.tuned.enabled and self.last else output


class VPTDeepOptions(MethodOptions):
    """Options of VPT-deep."""

    name: Literal["vpt_deep"] = "vpt_deep"
    prompts: int = Field(8, ge=1, description="prompt tokens per block")


@TUNERS.register("vpt_deep")
class VPTDeep(Tuner[VPTDeepOptions]):
    """Learned tokens beside the image's, new ones in every block."""

    Options: ClassVar[type[MethodOptions]] = VPTDeepOptions
    summary: ClassVar[str] = "learned prompt tokens in every block (arXiv 2203.12119)"
    learning_rate: ClassVar[float] = 5e-3
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"sequence"})

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return VPTBackbone(backbone, self.options.prompts, deep=True, seeds=seeds)


class VPTShallowOptions(MethodOptions):
    """Options of VPT-shallow."""

    name: Literal["vpt_shallow"] = "vpt_shallow"
    prompts: int = Field(8, ge=1, description="prompt tokens")


@TUNERS.register("vpt_shallow")
class VPTShallow(Tuner[VPTShallowOptions]):
    """Learned tokens that enter the first block beside the image's and go through all."""

    Options: ClassVar[type[MethodOptions]] = VPTShallowOptions
    summary: ClassVar[str] = "learned prompt tokens in the first block (arXiv 2203.12119)"
    learning_rate: ClassVar[float] = 5e-3
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"sequence"})

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return VPTBackbone(backbone, self.options.prompts, deep=False, seeds=seeds)
