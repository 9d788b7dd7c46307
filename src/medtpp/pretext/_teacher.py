"""A teacher whose parameters are averages of the student's. It costs the target parameters and a head, no backbone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from medtpp.backbones import Backbone, Features


class Teacher(nn.Module):
    """Exponential averages of what is trained (Tarvainen and Valpola, arXiv 1703.01780), kept as buffers.

    Args:
        momentum: Share of the old average that a step keeps at first; it rises to 1 by a cosine, as in BYOL.
    """

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self._names: dict[str, str] = {}  # of a buffer, by the name of what it averages

    def begin(self, backbone: Backbone, head: nn.Module) -> None:
        """Start from the student: whatever requires gradients in the backbone, and the head."""
        for name, parameter in self._student(backbone, head).items():
            self._names[name] = f"average_{len(self._names)}"
            self.register_buffer(self._names[name], parameter.detach().clone())

    @torch.no_grad()
    def encode(self, backbone: Backbone, images: Tensor) -> Features:
        """The teacher's features of (B, C, *spatial) images."""
        features: Features = functional_call(backbone, self._averages("backbone."), (images,))
        return features

    @torch.no_grad()
    def project(self, head: nn.Module, values: Tensor) -> Tensor:
        """What the teacher's head makes of some values."""
        projected: Tensor = functional_call(head, self._averages("head."), (values,))
        return projected

    def look(self, backbone: Backbone, head: nn.Module, images: Tensor, pooling: str) -> Tensor:
        """What its head makes of its pooled features of (B, C, *spatial) images."""
        return self.project(head, self.encode(backbone, images).pooled(pooling))

    @torch.no_grad()
    def update(self, backbone: Backbone, head: nn.Module, step: int, total: int) -> None:
        """Move towards the student, after `step` of `total` steps."""
        kept = 1 - (1 - self.momentum) * (math.cos(math.pi * step / total) + 1) / 2
        averages = self._averages("")
        for name, parameter in _named(backbone, head):
            if name in averages:
                averages[name].lerp_(parameter, 1 - kept)

    def _student(self, backbone: Backbone, head: nn.Module) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in _named(backbone, head) if parameter.requires_grad}

    def _averages(self, prefix: str) -> dict[str, Tensor]:
        own: dict[str, Any] = self._buffers
        return {
            name.removeprefix(prefix): own[buffer] for name, buffer in self._names.items() if name.startswith(prefix)
        }


def _named(backbone: Backbone, head: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [*backbone.named_parameters(prefix="backbone"), *head.named_parameters(prefix="head")]
