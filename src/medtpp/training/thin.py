"""Thin volumes in float32 on a CPU, where the bfloat16 convolution of oneDNN reads and writes past its memory.

Seen with oneDNN 3.12 (torch 2.14): where a volume is less deep than a padded kernel, such as 2 slices under 3 x 3 x 3,
the gradient of the kernel takes in whatever lies beside it: not-a-number in a few steps of a hundred, or a crash.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def exact_thin_convolutions(module: nn.Module) -> Iterator[None]:
    """While inside, convolutions of volumes that are less deep than their kernel leave autocast, where they train.

    Args:
        module: All its `nn.Conv3d` are watched.
    """
    entered: list[ExitStack] = []

    def before(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        entered.append(ExitStack())
        if not args or not _is_at_risk(layer, args[0]):  # called by keyword, it is left as it is
            return None
        entered[-1].enter_context(torch.autocast("cpu", enabled=False))
        return (args[0].float(), *args[1:])

    def after(*_: object) -> None:
        entered.pop().close()

    hooks = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            hooks.append(layer.register_forward_pre_hook(before))
            hooks.append(layer.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_at_risk(layer: nn.Module, images: Tensor) -> bool:
    assert isinstance(layer, nn.Conv3d)
    depth = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
    training = layer.weight.requires_grad and torch.is_grad_enabled()
    return training and images.device.type == "cpu" and torch.is_autocast_enabled("cpu") and images.shape[-3] < depth
