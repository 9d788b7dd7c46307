"""Bottlenecks that are added to what modules give. They are not linear, so they stay beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners._switched import SwitchedBackbone


class Bottleneck(nn.Module):
    """up(activation(down(x))), both with a bias that starts at zero.

    Args:
        width: Channels of a token, D.
        bottleneck: Channels in between.
        activation: The non-linearity.
    """

    def __init__(self, width: int, bottleneck: int, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.activation = activation
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        added: Tensor = self.up(self.activation(self.down(x)))
        return added


def widths_of(backbone: Backbone, paths: Sequence[str]) -> list[int]:
    """The channels that some blocks, or linear layers in them, give."""
    layout = backbone.layout
    of_blocks = dict(zip(layout.blocks, layout.widths or [backbone.spec.width] * len(layout.blocks), strict=True))
    modules: dict[str, Any] = dict(backbone.encoder.named_modules())
    return [of_blocks[path] if path in of_blocks else modules[path].out_features for path in paths]


class BottleneckBackbone(SwitchedBackbone):
    """A backbone with bottlenecks, which subclasses hook to its modules.

    Args:
        source: The backbone.
        make: Makes a bottleneck for some channels, with torch's global generator.
        widths: Channels for each.
        seeds: Decide the initialisation.
    """

    def __init__(
        self, source: Backbone, make: Callable[[int], Bottleneck], widths: Sequence[int], seeds: Seeds
    ) -> None:
        super().__init__(source)
        with seeds.scope("tuner"):
            self.bottlenecks: Any = nn.ModuleList([make(width) for width in widths])
        self._own(dict(self.bottlenecks.named_parameters()))

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return self.bottlenecks

    def fold(self) -> Backbone:
        """A bottleneck is not linear: it cannot be folded into weights."""
        raise ConfigError(
            "Bottleneck adapters cannot be merged: they are not linear. Keep the adapter beside the backbone."
        )
