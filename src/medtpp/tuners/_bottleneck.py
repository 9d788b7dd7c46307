"""Bottlenecks that are added to what modules give. They are not linear, so they stay beside the weights."""

from __future__ import annotations

from collections.abc import Callable
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


class BottleneckBackbone(SwitchedBackbone):
    """A backbone with bottlenecks, which subclasses hook to its modules.

    Args:
        source: The backbone.
        make: Makes one bottleneck, with torch's global generator.
        count: How many.
        seeds: Decide the initialisation.
    """

    def __init__(self, source: Backbone, make: Callable[[], Bottleneck], count: int, seeds: Seeds) -> None:
        super().__init__(source)
        with seeds.scope("tuner"):
            self.bottlenecks: Any = nn.ModuleList([make() for _ in range(count)])
        self._own(dict(self.bottlenecks.named_parameters()))

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return self.bottlenecks

    def fold(self) -> Backbone:
        """A bottleneck is not linear: it cannot be folded into weights."""
        raise ConfigError(
            "Bottleneck adapters cannot be merged: they are not linear. Keep the adapter beside the backbone."
        )
