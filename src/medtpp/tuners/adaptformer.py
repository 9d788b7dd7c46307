"""AdaptFormer: a bottleneck beside each MLP (Chen et al., arXiv 2205.13535)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._bottleneck import Bottleneck, BottleneckBackbone, widths_of
from medtpp.tuners.base import TunedBackbone, Tuner, paths_of


class ParallelBottleneck(Bottleneck):
    """A bottleneck from the tokens between a block's attention and MLP to the block's output, scaled.

    `down` starts as torch's linear layers do, `up` at zero, so that the backbone starts unchanged.
    """

    def __init__(self, width: int, bottleneck: int, scale: float) -> None:
        super().__init__(width, bottleneck, nn.ReLU())
        nn.init.zeros_(self.up.weight)
        self.scale = scale
        self.tokens: Tensor | None = None  # (B, N, D), between the hooks of one block

    def begin(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG002  (torch's signature)
        """A forward pre-hook of the block: forgets what a forward pass that broke off has left."""
        self.tokens = None

    def read(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG002  (torch's signature)
        """A forward pre-hook of the MLP's norm and of its first layer: the one that runs first sees the tokens."""
        if self.tokens is None:
            self.tokens = inputs[0]

    def add(self, block: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG002  (torch's signature)
        """A forward hook of the block."""
        tokens, self.tokens = self.tokens, None
        if not self.enabled:
            return output
        # Swin's blocks have a grid, (B, H, W, D), around their sequence.
        added: Tensor = self.scale * self(tokens)
        return output + added.reshape(output.shape)


class AdaptFormerBackbone(BottleneckBackbone):
    """A backbone with a bottleneck beside the MLP of each block."""

    def __init__(self, source: Backbone, bottleneck: int, scale: float, seeds: Seeds) -> None:
        blocks = source.layout.blocks
        paths = paths_of(source, "norm.mlp", "mlp.in")
        widths = widths_of(source, blocks)
        super().__init__(source, lambda width: ParallelBottleneck(width, bottleneck, scale), widths, seeds)
        modules = dict(source.encoder.named_modules())
        for block, added in zip(blocks, self.bottlenecks, strict=True):
            modules[block].register_forward_pre_hook(added.begin)
            for path in paths:
                if path.startswith(f"{block}."):
                    modules[path].register_forward_pre_hook(added.read)
            modules[block].register_forward_hook(added.add)

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "ADAPTFORMER", "blocks": list(self.layout.blocks)}


class AdaptFormerOptions(MethodOptions):
    """Options of AdaptFormer."""

    name: Literal["adaptformer"] = "adaptformer"
    bottleneck: int = Field(64, ge=1, description="channels of the bottleneck")
    scale: float = Field(0.1, gt=0, description="of what the bottleneck adds")


@TUNERS.register("adaptformer")
class AdaptFormer(Tuner[AdaptFormerOptions]):
    """x + MLP(LN(x)) + scale * up(relu(down(x))) in place of x + MLP(LN(x)).

    As in the authors' code, the bottleneck reads x itself; the paper's formula has LN(x). The skip connection takes
    the sum up as it is: LayerScale is the MLP's alone. There is no dropout in the bottleneck (the code has 0.1).
    """

    Options: ClassVar[type[MethodOptions]] = AdaptFormerOptions
    summary: ClassVar[str] = "bottlenecks beside the MLPs (arXiv 2205.13535)"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return AdaptFormerBackbone(backbone, self.options.bottleneck, self.options.scale, seeds)
